"""What the harness costs: its window loop against a bare timed loop over the same session, interleaved in one process.

    python benchmarks/overhead.py [--rounds 60] [--json overhead.json]

Goal: below 1 %. Three loops take turns in random order on a model of about 5 ms: bare (``for``: clock, infer, clock), the harness's
``run_window``, and ``run_window`` beside a polling meter. Each round gives every loop's median latency, and its wall and CPU time per
inference, all included; ratios are of the rounds' pairs (geometric mean, Student-t interval over rounds, and the middle pair). The order
and the pairing take a machine's drift out of the ratio, not its noise: on a busy machine CPU time, and the cost of a call that does
nothing, say most. Needs onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy reads it: threads that spin beside a busy neighbour drown what is looked for

import numpy as np

from edgejoule.measure.meters import open_meter
from edgejoule.measure.stats import ratio_interval
from edgejoule.measure.window import back_to_back, run_window

AIM_S = 0.005
CALLS = 20  # inferences a turn: 0.1 s
SHAPE = (1, 3, 64, 64)
GOAL = 0.01

Infer = Callable[[Any], Any]
Turn = tuple[float, float, float]  # seconds per inference: median latency, wall time all included, CPU time all included
FIGURES = ("median", "wall", "cpu")


def matmul_session() -> Infer:
    """Matrix products of about 5 ms on this machine; calibrated, because machines differ."""
    matrix = np.random.default_rng(0).normal(size=(384, 384)).astype(np.float32)

    def infer(images: Any, repeats: int = 1) -> dict[str, Any]:
        found = matrix
        for _ in range(repeats):
            found = matrix @ matrix
        return {"logits": found[:1]}

    return calibrated(infer)


def onnx_session(folder: Path) -> Infer:
    """Convolutions in a real runtime, as many as make about 5 ms."""
    layers = 1
    while True:
        infer = convolutions(folder / f"{layers}.onnx", layers)
        spent = typical_s(infer)
        if spent >= 0.8 * AIM_S or layers >= 256:
            return infer
        layers = max(layers + 1, min(2 * layers, round(layers * AIM_S / spent)))


def convolutions(path: Path, layers: int) -> Infer:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng, channels = np.random.default_rng(0), 32
    nodes, weights, name = [], [], "images"
    for layer in range(layers):
        weight = (rng.normal(size=(channels, channels if layer else 3, 3, 3)) * 0.05).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [name, f"w{layer}"], [f"m{layer}"], pads=[1, 1, 1, 1]))
        name = f"m{layer}"
    nodes += [helper.make_node("GlobalAveragePool", [name], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["logits"])]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, list(SHAPE))]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, channels])]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: {"logits": session.run(["logits"], {"images": images})[0]}


def calibrated(infer: Callable[..., Any]) -> Infer:
    repeats = max(1, round(AIM_S / typical_s(infer)))
    return lambda images: infer(images, repeats)


def typical_s(infer: Infer) -> float:
    images, spent = np.zeros(SHAPE, np.float32), []
    for _ in range(15):
        start = time.perf_counter()
        infer(images)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def bare(infer: Infer, pool: Sequence[Any], calls: int = CALLS) -> Turn:
    spent, clock, cpu = [], time.perf_counter, time.process_time()
    begin = clock()
    for i in range(calls):
        start = clock()
        infer(pool[i % len(pool)])
        spent.append(clock() - start)
    return float(np.median(spent)), (clock() - begin) / calls, (time.process_time() - cpu) / calls


def harness(infer: Infer, pool: Sequence[Any], calls: int = CALLS) -> Turn:
    begin, cpu = time.perf_counter(), time.process_time()
    stamps = run_window(infer, pool, 0.0, calls, calls, time.perf_counter)
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    return float(np.median(back_to_back(stamps).latencies_s)), wall / calls, used / calls


def metered(infer: Infer, pool: Sequence[Any], calls: int = CALLS) -> Turn:
    meter = open_meter("estimate")
    assert meter is not None
    meter.start()
    turn = harness(infer, pool, calls)
    meter.stop()
    return turn


LOOPS: dict[str, Callable[..., Turn]] = {"bare": bare, "harness": harness, "harness + meter": metered}


def compare(infer: Infer, rounds: int) -> dict[str, list[Turn]]:
    pool = [np.random.default_rng(i).normal(size=SHAPE).astype(np.float32) for i in range(16)]
    order, turns = random.Random(0), {name: list[Turn]() for name in LOOPS}
    for number in range(rounds + 3):  # three rounds to warm up
        for name in order.sample(list(LOOPS), len(LOOPS)):
            turn = LOOPS[name](infer, pool)
            if number >= 3:
                turns[name].append(turn)
    return turns


def bookkeeping_s(loop: Callable[..., Turn]) -> float:
    """CPU seconds a call that does nothing takes in a loop: the least of several turns, because noise only adds."""
    return min(loop(lambda images: None, [None] * 16, 20_000)[2] for _ in range(9))


def report(session: str, turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    rows = []
    for name, found in turns.items():
        row: dict[str, Any] = {"session": session, "loop": name}
        for k, figure in enumerate(FIGURES):
            mine, base = [turn[k] for turn in found], [turn[k] for turn in turns["bare"]]
            ratio = ratio_interval(mine, base)
            middle = float(np.median(np.divide(mine, base)))
            row[figure] = {"ms": 1e3 * float(np.median(mine)), "ratio": ratio.value, "low": ratio.low, "high": ratio.high, "middle": middle}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What the harness costs: its window loop against a bare timed loop.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        sessions = {"onnxruntime": onnx_session(Path(folder)), "numpy matmul": matmul_session()}
        rows = [row for name, infer in sessions.items() for row in report(name, compare(infer, options.rounds))]
    print(f"{'session':13} {'loop':16}" + "".join(f" {figure + ' ms':>10} {'ratio to bare, 95 %':>25} {'middle':>7}" for figure in FIGURES))
    for row in rows:
        cells = [row[figure] for figure in FIGURES]
        shown = "".join(f" {c['ms']:10.3f} {c['ratio']:9.4f} [{c['low']:.4f}, {c['high']:.4f}]{c['middle']:7.4f}" for c in cells)
        print(f"{row['session']:13} {row['loop']:16}{shown}")
    extra = {name: bookkeeping_s(loop) - bookkeeping_s(bare) for name, loop in LOOPS.items() if name != "bare"}
    for name, spent in extra.items():
        print(f"{name}: {1e6 * spent:+.2f} us of CPU a call beyond the bare loop's = {100 * spent / AIM_S:+.4f} % of {1e3 * AIM_S:g} ms")
    worst = max(row["cpu"]["ratio"] - 1 for row in rows)
    print(f"largest overhead in CPU time {100 * worst:+.2f} %; the goal is below {100 * GOAL:.0f} %")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "bookkeeping_s": extra}, indent=1))


if __name__ == "__main__":
    main()
