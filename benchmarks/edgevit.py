"""EdgeViT through the pipeline (fused, compiled) against the plain eager module, batch 1, interleaved in one process.

    python benchmarks/edgevit.py [--rounds 40] [--threads 0] [--models edgevit_xxs ...] [--json edgevit.json]

Goals, fused, for each variant: at least 3 times as fast with bf16, at least 1.5 times with fp32. Also the share of the roofline that each
reaches: counted MACs per second over this machine's best matrix product of that precision, measured here, in turn with the rest.
In every round each contender has one turn, in random order: a pause (so that another runtime's threads stop spinning), a call that is not
counted, then CALLS that are; the turn's figure is their median. Ratios are of the rounds' pairs (geometric mean, Student-t interval).
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgejoule import data, zoo
from edgejoule.bench import Bench, cores, default_cache
from edgejoule.catalog import find_model
from edgejoule.compiling import compile_model
from edgejoule.measure.stats import ratio_interval
from edgejoule.records import Artifact
from edgejoule.screen.cost import count
from edgejoule.stages import backend_of
from edgejoule.study_file import MeasurePlan

MODELS = ("edgevit_xxs", "edgevit_xs", "edgevit_s")
CONTENDERS = (  # backend, recipe
    ("onnxruntime", ""),
    ("onnxruntime", "fuse"),
    ("openvino", ""),
    ("openvino", "fuse"),
    ('openvino(precision="bf16")', "fuse"),
)
PEAKS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 2048  # of the square matrices: large enough for the best rate, small enough for a turn of a fraction of a second
GOALS = {"fp32": 1.5, "bf16": 3.0}
CALLS, PAUSE_S = 5, 0.02
Infer = Callable[[], Any]


def eager(name: str, images: np.ndarray[Any, Any]) -> Infer:
    """The network as its constructor makes it, called as a user would."""
    spec = find_model(name)
    module, tensor = zoo.build(zoo.identify(spec, weights="random")), torch.from_numpy(images)

    def infer() -> Any:
        with torch.inference_mode():
            return module(tensor)

    return infer


def compiled(name: str, backend: str, recipe: str, images: np.ndarray[Any, Any], threads: int, bench: Bench) -> tuple[Infer, str]:
    """The artifact of the pipeline, loaded here; and the precision that its runtime reads back."""
    (made,) = compile_model(find_model(name), [backend], MeasurePlan(threads=threads), "random", bench, recipe)
    if not isinstance(made, Artifact):
        raise SystemExit(f"{made.variant} @ {made.backend}: {made.reason}")
    session = backend_of(made).load(made, threads)
    return lambda: session.infer(images), session.info().precision


def products() -> dict[str, Infer]:
    """One square matrix product in each precision that this processor has natively: the roof."""
    from edgejoule.compile.cpu import has_bf16

    kinds = {kind: dtype for kind, dtype in PEAKS.items() if kind == "fp32" or has_bf16()}
    pairs = {kind: (torch.randn(SIDE, SIDE).to(dtype), torch.randn(SIDE, SIDE).to(dtype)) for kind, dtype in kinds.items()}
    return {f"GEMM {kind}": functools.partial(torch.mm, *pair) for kind, pair in pairs.items()}


def turn_s(infer: Infer) -> float:
    time.sleep(PAUSE_S)
    infer()
    spent = []
    for _ in range(CALLS):
        start = time.perf_counter()
        infer()
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def compare(contenders: dict[str, Infer], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, a figure a round, every contender once in each round."""
    order, turns = random.Random(0), {name: list[float]() for name in contenders}
    for number in range(rounds + 2):  # two rounds to warm up
        for name in order.sample(list(contenders), len(contenders)):
            spent = turn_s(contenders[name])
            if number >= 2:
                turns[name].append(spent)
    return turns


def rows_of(model: str, macs: int, turns: dict[str, list[float]], precisions: dict[str, str]) -> list[dict[str, Any]]:
    roof = {name.removeprefix("GEMM "): SIDE**3 / min(spent) for name, spent in turns.items() if name.startswith("GEMM")}  # MACs per second
    rows = []
    for name, spent in turns.items():
        if name.startswith("GEMM"):
            continue
        ratio = ratio_interval(turns["eager module"], spent)
        median, precision = float(np.median(spent)), precisions[name]
        row = {"model": model, "contender": name, "precision": precision, "ms": 1e3 * median, "times": ratio.value}
        share = macs / median / roof[precision] if precision in roof else None
        rows.append(row | {"low": ratio.low, "high": ratio.high, "macs": macs, "roofline": share})
    return rows


def run(model: str, rounds: int, threads: int, bench: Bench) -> list[dict[str, Any]]:
    spec = find_model(model)
    images = data.normalise(data.crops("photos(n=1)", spec.preprocessing), spec.preprocessing)  # (1, C, H, W)
    contenders, precisions = {"eager module": eager(model, images)}, {"eager module": "fp32"}
    for backend, recipe in CONTENDERS:
        name = f"{recipe or 'as it is'} @ {backend}"
        contenders[name], precisions[name] = compiled(model, backend, recipe, images, threads, bench)
    macs = count(zoo.build_meta(spec), spec.preprocessing.input_size).macs
    return rows_of(model, macs, compare(contenders | products(), rounds), precisions)


def main() -> None:
    parser = argparse.ArgumentParser(description="EdgeViT through the pipeline against the plain eager module.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="0 means all cores")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    threads = cores(options.threads)
    torch.set_num_threads(threads)
    rows = [row for model in options.models for row in run(model, options.rounds, threads, Bench(cache=default_cache()))]
    print(f"{threads} threads, batch 1; times as fast as the eager module (95 %), share of the measured GEMM peak")
    for row in rows:
        share = f"{row['roofline']:8.0%}" if row["roofline"] else f"{'':8}"
        bounds = f"{row['times']:6.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{row['model']:12} {row['contender']:40} {row['precision']:5} {row['ms']:8.2f} ms {bounds:>22} {share}")
    for precision, goal in GOALS.items():
        fused = [row for row in rows if row["precision"] == precision and row["contender"].startswith("fuse @")]
        best = {m: max((row["low"] for row in fused if row["model"] == m), default=0) for m in options.models}
        met = "met" if all(low >= goal for low in best.values()) else "NOT met"
        print(f"goal, {precision} at least {goal:g} times: {met} ({', '.join(f'{m} {low:.2f}' for m, low in best.items())}, lower bounds)")
    if options.json:
        options.json.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
