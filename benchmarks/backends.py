"""Every backend and precision that runs here, on a model of each family: speed-up over eager fp32, agreement, share of the roofline.

    python benchmarks/backends.py [--models deit_tiny,swin_tiny] [--backends "onnxruntime;openvino"] [--rounds 9] [--tune] [--out FILE]

Each artifact sits in a worker process of its own, idle but for its turns: a round gives every one a turn of a few inferences in random
order; speed-ups are ratios paired by round, with a t-interval on logarithms over rounds (over models for the geometric mean). The roofline
is this machine's best product of two square matrices in float32, bfloat16 and int8, in the same run; a model's share is its counted MACs
per second over its precision's. ``--tune`` also lets autotuning choose and runs its pick beside the others.

A network that tells nothing apart has near ties everywhere, and how often rounding flips those says nothing. So each network tells digits
apart: its body has live random weights, its last layer is fitted to the training digits (``fit_head``). What is quantised is calibrated on
these; agreement with the float32 network and accuracy are of test digits. Knows no energy. Needs the host extra.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

MODELS = (
    *("deit_tiny", "vit_small", "levit_conv_192", "tiny_vit_11m", "mobilevit_s", "efficientvit_b1", "swin_tiny", "pvt_v2_b0"),
    *("edgevit_xxs", "edgenext_xx_small", "fastvit_t8", "efficientformerv2_s0", "mobilenetv3_large_075"),
)
TURN_S = 0.3
FITTED, TESTED = 600, 256  # digits
GEMM = 2048
BASE = "eager(precision='fp32')"


# ---------------------------------------------------------------- turns


def serve(folder: str, threads: int) -> None:
    """A worker: loads an artifact, then answers each line on stdin with the median seconds of a turn."""
    from edgejoule import manifest, registry
    from edgejoule.fleet.agent import take_stdout

    out = take_stdout()
    artifact = manifest.read(Path(folder))
    session = registry.create("backend", artifact.backend).load(artifact, threads)
    images = np.random.default_rng(0).normal(size=(artifact.batch, *artifact.variant.spec.preprocessing.input_size)).astype(np.float32)
    until = time.perf_counter() + 1.0
    while time.perf_counter() < until:
        session.infer(images)
    for _ in sys.stdin:
        spent, end = [], time.perf_counter() + TURN_S
        session.infer(images)  # wakes the threads up
        while time.perf_counter() < end or len(spent) < 3:
            start = time.perf_counter()
            session.infer(images)
            spent.append(time.perf_counter() - start)
        print(statistics.median(spent), file=out, flush=True)


def start(artifact: Any, threads: int) -> subprocess.Popen[str]:
    import os

    from edgejoule import environments, registry
    from edgejoule.fleet.agent import thread_limits

    name = getattr(registry.create("backend", artifact.backend), "environment", "")
    python = (environments.python_of(name) if name else None) or sys.executable
    argv = [python, __file__, "--serve", artifact.folder, "--threads", str(threads)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | thread_limits(threads))


def turn(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin and worker.stdout
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    return float(line) if line else math.nan  # it died: that lane is left out


def take_turns(lanes: dict[str, tuple[Any, int]], rounds: int, seed: int) -> dict[str, list[float]]:
    """{lane: seconds of each round} of {lane: (artifact, threads)}."""
    workers = {name: start(artifact, threads) for name, (artifact, threads) in lanes.items()}
    found: dict[str, list[float]] = {name: [] for name in lanes}
    try:
        for name, worker in list(workers.items()):  # all are loaded and warm before the first round counts
            if math.isnan(turn(worker)):
                print(f"  the worker of {name} ended: left out", file=sys.stderr)
                del workers[name], found[name]
        for number in range(rounds):
            order = list(workers)
            random.Random(f"{seed} {number}").shuffle(order)
            for name in order:
                found[name].append(turn(workers[name]))
    finally:
        for worker in workers.values():
            worker.kill()
    return {name: seconds for name, seconds in found.items() if not any(map(math.isnan, seconds))}


# ---------------------------------------------------------------- one model


def fit_head(name: str, bench: Any) -> tuple[Any, str]:
    """A catalog network that tells digits apart: its spec, and the file of its weights.

    The last linear layers are fitted by ridge regression to what a body with live random weights makes of ``FITTED`` training digits; of
    five penalties the one that is right most often about a quarter of them that the others were fitted without.
    """
    import torch
    from safetensors.torch import save_file

    from edgejoule import data, zoo
    from edgejoule.catalog import find_model
    from edgejoule.training import open_data

    digits = open_data("digits")
    spec = replace(find_model(name), num_classes=len(digits.classes), dataset=digits.dataset, published=None, plain="")
    place = bench.cache / "heads" / f"{name}.safetensors"
    if place.exists():
        return spec, str(place)
    module, images = zoo.build(zoo.identify(spec, bench.seed, "random")), digits.split("train")
    picked = np.random.default_rng(1).permutation(len(images))[:FITTED]
    labels = torch.tensor([images[int(i)][1] for i in picked])  # (N,)
    heads = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear) and layer.out_features == spec.num_classes]
    seen: dict[Any, list[Any]] = {head: [] for head in heads}
    for head in heads:
        head.register_forward_pre_hook(lambda layer, inputs: seen[layer].append(inputs[0].double()))
    crops = np.stack([data.crop(images[int(i)][0], spec.preprocessing) for i in picked]).transpose(0, 3, 1, 2)  # (N, C, H, W)
    with torch.inference_mode():
        for first in range(0, FITTED, 20):
            module(torch.from_numpy(data.normalise(crops[first : first + 20], spec.preprocessing)))
    for head in heads:
        weights = ridge(torch.cat(seen[head]), labels, spec.num_classes)
        head.weight.data, head.bias.data = weights[:-1].T.float().contiguous(), weights[-1].float().contiguous()
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}, place)
    return spec, str(place)


def ridge(features: Any, labels: Any, classes: int) -> Any:
    """(D + 1, K) weights, the biases last, of features (N, D) that answer 1 for an image's own class and 0 for the others."""
    import torch

    inputs = torch.cat([features, features.new_ones(len(features), 1)], dim=1)  # (N, D + 1)
    wanted = torch.nn.functional.one_hot(labels, classes).double()  # (N, K)

    def fitted(part: slice, penalty: float) -> Any:
        x, y = inputs[part], wanted[part]
        gram = x.T @ x
        return torch.linalg.solve(gram + penalty * gram.trace() / len(gram) * torch.eye(len(gram), dtype=x.dtype), x.T @ y)

    cut = len(inputs) * 3 // 4
    right = {p: (inputs[cut:] @ fitted(slice(cut), p)).argmax(1).eq(labels[cut:]).sum().item() for p in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}
    return fitted(slice(None), max(right, key=lambda penalty: right[penalty]))


def pictures(bench: Any) -> str:
    """Training digits as a folder of pictures, for the truth gate: photographs are nothing that these networks know."""
    from edgejoule.training import open_data

    folder, images = bench.cache / "heads" / "digits", open_data("digits").split("train")
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(64):
        images[place][0].save(folder / f"{place:02}.png")
    return f"folder(path={str(folder)!r})"


def measure_model(name: str, backends: Sequence[str], args: argparse.Namespace, bench: Any, peaks: dict[str, float]) -> dict[str, Any]:
    from edgejoule import compiling, stages
    from edgejoule.evaluating import evaluate_artifact, float_network
    from edgejoule.measure.stats import ratio_interval
    from edgejoule.records import Artifact
    from edgejoule.study_file import CompilePlan, MeasurePlan
    from edgejoule.tuning import tune

    spec, weights = fit_head(name, bench)
    plan, quantising = MeasurePlan(threads=args.threads, images=pictures(bench)), CompilePlan(calibration="digits")
    lanes: dict[str, tuple[Any, int]] = {}
    refused = {}
    for made in compiling.compile_model(spec, backends, plan, weights, bench, compiling=quantising):
        if isinstance(made, Artifact):
            lanes[made.backend] = (made, args.threads)
        else:
            refused[made.backend] = made.reason
    if args.tune:
        from edgejoule import manifest

        won = tune(spec, weights, plan, quantising, bench, [b for b in backends if b in lanes]).winner
        lanes["autotuned"] = (manifest.read(Path(won.folder)), won.choice.threads)
    turns = take_turns(lanes, args.rounds, 0)
    lanes = {lane: made for lane, made in lanes.items() if lane in turns}
    macs = stages.count_models([spec], bench)[spec.name].macs
    reference = float_network(next(iter(lanes.values()))[0].variant, bench)
    rows = []
    for lane, (artifact, threads) in lanes.items():
        judged = evaluate_artifact(artifact, "digits", "test", bench, reference, limit=TESTED, threads=args.threads)
        latency = statistics.median(turns[lane])
        speed = ratio_interval(turns[BASE], turns[lane]) if BASE in turns else None
        rows.append(
            {
                "model": name,
                "lane": lane,
                "backend": artifact.backend,
                "recipe": artifact.variant.recipe,
                "threads": threads,
                "latency_ms": 1e3 * latency,
                "speedup": [speed.value, speed.low, speed.high] if speed else None,
                "agreement": judged.agreement.value if judged.agreement else math.nan,
                "top1": judged.scores.top1.value,
                "drop": judged.drop.value if judged.drop else math.nan,
                "median_rel": artifact.parity.median_rel if artifact.parity else None,
                "share_of_peak": 2e-9 * macs / latency / peaks[artifact.info.precision] if artifact.info.precision in peaks else None,
                "placement": artifact.info.placement.words if artifact.info.placement else "",
                "doubts": [doubt.code for doubt in artifact.caveats if doubt.severity == "reject"],
                "seconds": turns[lane],
            }
        )
    return {
        "model": name,
        "family": spec.family,
        "macs": macs,
        "rows": rows,
        "refused": refused,
        "pick": _pick(turns, rows, ratio_interval),
    }


def _pick(turns: dict[str, list[float]], rows: Sequence[dict[str, Any]], ratio_interval: Any) -> dict[str, Any] | None:
    """The autotuned pick against the best single backend at its defaults that passes the gate: its speed over that one's, by round."""
    if "autotuned" not in turns:
        return None
    sound = [row["lane"] for row in rows if row["lane"] != "autotuned" and not row["doubts"]]
    best = min(sound, key=lambda lane: statistics.median(turns[lane]))
    speed = ratio_interval(turns[best], turns["autotuned"])
    return {"best": best, "speed_over_best": [speed.value, speed.low, speed.high], "keeps": speed.high is None or speed.high >= 0.97}


# ---------------------------------------------------------------- the roofline and the table


def gemm_peaks(threads: int) -> dict[str, float]:
    """The best of several products of two square matrices, in 1e9 operations (2 a multiply-add) per second."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.int8)):
        one, other = (torch.randint(-9, 9, (GEMM, GEMM)).to(kind) for _ in range(2))
        multiply = torch._int_mm if kind is torch.int8 else torch.mm
        best = math.inf
        for _ in range(8):
            began = time.perf_counter()
            multiply(one, other)
            best = min(best, time.perf_counter() - began)
        found[name] = 2e-9 * GEMM**3 / best
    return found


def summary(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By lane, of what passed the gate: the geometric mean over models of speed-up and share of the peak, with intervals over models."""
    from edgejoule.measure.stats import t_interval

    lanes: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        for row in model["rows"]:
            if not row["doubts"]:  # the speed of a file that computes something else is none
                lanes.setdefault(row["lane"], []).append(row)
    found = []
    for lane, rows in lanes.items():
        row: dict[str, Any] = {
            "lane": lane,
            "models": len(rows),
            "least_agreement": min(one["agreement"] for one in rows),
            "largest_drop": max(one["drop"] for one in rows),
        }
        for key, values in (
            ("speedup", [one["speedup"][0] for one in rows if one["speedup"]]),
            ("share_of_peak", [one["share_of_peak"] for one in rows if one["share_of_peak"]]),
        ):
            logs = t_interval([math.log(value) for value in values]) if values else None
            row[key] = None if logs is None else [math.exp(x) if x is not None else None for x in (logs.value, logs.low, logs.high)]
        found.append(row)
    return sorted(found, key=lambda row: -(row["speedup"] or [0])[0])


def markdown(result: dict[str, Any]) -> str:
    """The two tables."""

    def bounds(values: Any, digits: int = 2) -> str:
        if not values:
            return "–"
        low, high = values[1:]
        return f"{values[0]:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")

    peaks = ", ".join(f"{name} {value:.0f}" for name, value in result["peaks"].items())
    lines = [f"GEMM peaks, 1e9 operations per second, {result['threads']} threads: {peaks}.", ""]
    lines += [
        "| lane | models | speed-up over eager fp32 | share of its GEMM peak | least agreement | most top-1 lost |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        least = f"{row['least_agreement']:.1%} | {row['largest_drop']:.1%}"
        lines.append(f"| {row['lane']} | {row['models']} | {bounds(row['speedup'])} | {bounds(row['share_of_peak'])} | {least} |")
    lines += [
        "",
        "| model | lane | ms | speed-up | of peak | agreement | top-1 | error | doubts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in result["models"]:
        for row in sorted(model["rows"], key=lambda row: row["latency_ms"]):
            share = f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else "–"
            lines.append(
                f"| {row['model']} | {row['lane']} | {row['latency_ms']:.2f} | {bounds(row['speedup'])} | {share} | {row['agreement']:.1%} "
                f"| {row['top1']:.1%} | {row['median_rel']:.1e} | {', '.join(row['doubts'])} |"
            )
    for model in result["models"]:
        lines += [f"\n{model['model']}: {lane} is not there: {why}" for lane, why in model["refused"].items()]
        if model["pick"]:
            lines.append(
                f"\n{model['model']}: the pick is {bounds(model['pick']['speed_over_best'])} times as fast as {model['pick']['best']}"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--backends", default="", help="spellings joined by ';'; all that work here by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return
    from edgejoule import registry
    from edgejoule.bench import Bench, cores
    from edgejoule.tuning import usable

    args.threads = cores(args.threads)
    bench = Bench(notify=lambda event: print(f"  {event.stage}: {event.text}", file=sys.stderr))
    backends = [registry.canonical(one) for one in args.backends.split(";")] if args.backends else list(usable())
    if BASE not in backends:
        backends.insert(0, BASE)
    result: dict[str, Any] = {"threads": args.threads, "rounds": args.rounds, "peaks": gemm_peaks(args.threads), "models": []}
    for name in args.models.split(","):
        print(f"== {name}", file=sys.stderr)
        again = gemm_peaks(args.threads)  # the machine may have been busy before: the best of all counts
        result["peaks"] = {kind: max(value, again[kind]) for kind, value in result["peaks"].items()}
        result["models"].append(measure_model(name, backends, args, bench, result["peaks"]))
        result["summary"] = summary(result["models"])
        if args.out:  # after every model: a killed run keeps what it has
            Path(args.out).write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
