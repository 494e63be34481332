"""Every backend and precision that runs here, on a model of each family: speed-up over eager fp32, agreement, share of the roofline.

    python benchmarks/backends.py [--models deit_tiny,swin_tiny] [--backends "onnxruntime;openvino"] [--rounds 9] [--tune] [--out FILE]

Each artifact sits in a worker process of its own, idle but for its turns: a round gives every one a turn of a few inferences in random
order; speed-ups are ratios paired by round, with a t-interval on logarithms over rounds (over models for the geometric mean). The roofline
is this machine's best product of two square matrices in float32, bfloat16 and int8 (``peaks.py``), in the same run; a model's share is its
counted MACs per second over its precision's. ``--tune`` also lets autotuning choose, runs its pick beside the others, and then against the
best of them in several launches of both.

Agreement is with the float32 network. Networks of digits are trained first (about a minute each) and judged on 374 test digits, which
nothing was trained, calibrated or chosen on. The others have live random weights, whose classes are near ties that any rounding flips: of
them, the logits' relative error tells something, and their agreement on 128 photographs is shown for what it is. Knows no energy.
Needs the host extra.
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
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule import data as images
from edgejoule.records import Artifact
from peaks import gemm_peaks

MODELS = (
    *("deit_tiny", "vit_small", "levit_conv_128s", "tiny_vit_11m", "mobilevit_s", "efficientvit_b1", "swin_tiny", "pvt_v2_b0"),
    *("edgevit_xxs", "edgenext_xx_small", "fastvit_t8", "efficientformerv2_s0", "mobilenetv3_large_075"),
    *("edgevit_digits", "tiny_vit_digits", "levit_digits"),
)
TURN_S, PHOTOS = 0.3, "photos(n=128, seed=7)"
LAUNCHES = 6
BASE = "eager(precision='fp32')"


# ---------------------------------------------------------------- turns


def serve(folder: str, threads: int) -> None:
    """A worker: loads an artifact, then answers each line on stdin with the median seconds of a turn."""
    from edgejoule import manifest, registry
    from edgejoule.processes import take_stdout

    out = take_stdout()
    artifact = manifest.read(Path(folder))
    session = registry.create("backend", artifact.backend).load(artifact, threads)
    images = np.random.default_rng(0).normal(size=(artifact.batch, *artifact.variant.spec.preprocessing.input_size)).astype(np.float32)
    until = time.perf_counter() + 1.0
    while time.perf_counter() < until:
        session.infer(images)
    for _ in sys.stdin:
        end = time.perf_counter() + TURN_S
        spent: list[float] = []
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


def subject(name: str, bench: Any) -> tuple[Any, str, str]:
    """A network's spec and weights, and the data that it was trained on; none, with live random weights, but for those of digits."""
    from edgejoule.catalog import find_model
    from edgejoule.evaluating import spec_of_weights

    if not name.endswith("_digits"):
        return find_model(name), "random", ""
    model, out = f'timm(name="{name}")', bench.cache / "trained" / name
    train = [sys.executable, "-m", "edgejoule", "train", "--model", model, "--data", "digits", "--recipe", "digits"]
    subprocess.run([*train, "--weights", "random", "--seed", "0", "--out", str(out)], check=True, stdout=sys.stderr)
    (weights,) = (out / "weights").glob("*.safetensors")
    return spec_of_weights(model, str(weights)), str(weights), "digits"


def judged(artifact: Artifact, data: str, reference: Any, threads: int, bench: Any) -> dict[str, Any]:
    """How often an artifact gives the float32 network's first answer, on test images or on photographs; with labels also its top-1."""
    from edgejoule.evaluating import evaluate_artifact
    from edgejoule.fleet.dispatch import run_job
    from edgejoule.records import Job, Outputs, Workload

    if data:
        found = evaluate_artifact(artifact, data, "test", bench, reference, threads=threads)
        assert found.agreement
        return {"agreement": found.agreement.value, "images": found.agreement.n, "top1": found.scores.top1.value}
    crops, _ = images.write_crops(PHOTOS, artifact.variant.spec.preprocessing, bench.cache / "images")
    answer = run_job(Job("outputs", artifact.folder, str(crops), Workload(), threads, most=128))
    assert isinstance(answer, Outputs)
    answers = np.frombuffer(answer.logits, dtype=np.float64).reshape(answer.shape).argmax(1)  # (N,)
    return {"agreement": float((answers == reference(images.read_crops(crops))).mean()), "images": len(answers), "top1": None}


def measure_model(name: str, backends: Sequence[str], args: argparse.Namespace, bench: Any) -> dict[str, Any]:
    from edgejoule import compiling, stages
    from edgejoule.evaluating import float_network
    from edgejoule.measure.stats import ratio_interval
    from edgejoule.study_file import CompilePlan, MeasurePlan
    from edgejoule.tuning import tune

    spec, weights, data = subject(name, bench)
    plan, quantising = MeasurePlan(threads=args.threads), CompilePlan(calibration=data or "auto")
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
    ways = {lane: (made.backend, made.sha256, threads) for lane, (made, threads) in lanes.items()}
    itself = next((lane for lane in ways if lane != "autotuned" and ways[lane] == ways.get("autotuned")), None)
    # A pick that is one of the defaults gets no worker of its own: two processes of one file differ by more than their rounds tell.
    turns = take_turns({lane: made for lane, made in lanes.items() if itself is None or lane != "autotuned"}, args.rounds, 0)
    if itself in turns:
        turns["autotuned"] = turns[itself]
    lanes = {lane: made for lane, made in lanes.items() if lane in turns}
    macs = stages.count_models([spec], bench)[spec.name].macs
    reference = float_network(next(iter(lanes.values()))[0].variant, bench)
    rows = []
    for lane, (artifact, threads) in lanes.items():
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
                **judged(artifact, data, reference, args.threads, bench),
                "median_rel": artifact.parity.median_rel if artifact.parity else None,
                "precision": artifact.info.precision,
                "placement": artifact.info.placement.words if artifact.info.placement else "",
                "doubts": [doubt.code for doubt in artifact.caveats if doubt.severity == "reject"],
                "seconds": turns[lane],
            }
        )
    return {
        "model": name,
        "family": spec.family,
        "macs": macs,
        "trained": bool(data),
        "rows": rows,
        "refused": refused,
        "pick": picked(lanes, rows, itself),
    }


def picked(lanes: dict[str, tuple[Any, int]], rows: Sequence[dict[str, Any]], itself: str | None) -> dict[str, Any] | None:
    """The autotuned pick against the best single backend at its defaults that passes the gate: its speed over that one's.

    Two processes of one file differ by more than their rounds tell, so both are launched again and again, and a launch is one pair.
    """
    from edgejoule.measure.stats import ratio_interval

    took = {row["lane"]: row["latency_ms"] for row in rows if row["lane"] != "autotuned" and not row["doubts"]}
    if not took or "autotuned" not in lanes:
        return None
    best = min(took, key=lambda lane: took[lane])
    if best == itself:
        return {"best": best, "itself": True, "speed_over_best": [1.0, None, None], "keeps": True}
    seconds: dict[str, list[float]] = {best: [], "autotuned": []}
    for launch in range(LAUNCHES):
        turns = take_turns({lane: lanes[lane] for lane in seconds}, 3, launch)
        if len(turns) == 2:  # else one of them died
            for lane in seconds:
                seconds[lane].append(statistics.median(turns[lane]))
    speed = ratio_interval(seconds[best], seconds["autotuned"])
    keeps = speed.high is None or speed.high >= 0.97
    return {"best": best, "itself": False, "speed_over_best": [speed.value, speed.low, speed.high], "keeps": keeps, "seconds": seconds}


# ---------------------------------------------------------------- the roofline and the table


def machine() -> str:
    """This processor, as far as its results differ: its name is often no more than the maker's, so its instructions too."""
    from edgejoule.compile.cpu import flags
    from edgejoule.measure.environment import environment

    known = sorted(
        (flags() or frozenset()) & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16"}
    )
    return f"{environment(0).device.cpu}: {', '.join(known)}"


def share_of(row: dict[str, Any], model: dict[str, Any], peaks: dict[str, float]) -> float | None:
    """Of the peak of the precision that a lane ran in."""
    if row["precision"] not in peaks:
        return None
    share: float = 2e-9 * model["macs"] / (1e-3 * row["latency_ms"]) / peaks[row["precision"]]
    return share


def summary(models: Sequence[dict[str, Any]], peaks: dict[str, float]) -> list[dict[str, Any]]:
    """By lane, of what passed the gate: the geometric mean over models of speed-up and share of the peak, with intervals over models."""
    from edgejoule.measure.stats import t_interval

    lanes: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        for row in model["rows"]:
            if not row["doubts"]:  # the speed of a file that computes something else is none
                lanes.setdefault(row["lane"], []).append(row | {"share": share_of(row, model, peaks)})
    found = []
    for lane, rows in lanes.items():
        least = min(one["agreement"] for one in rows)
        errors = [one["median_rel"] for one in rows if one["median_rel"] is not None]
        mean: dict[str, Any] = {"lane": lane, "models": len(rows), "least_agreement": least, "most_error": max(errors)}
        for key, values in (
            ("speedup", [one["speedup"][0] for one in rows if one["speedup"]]),
            ("share", [one["share"] for one in rows if one["share"]]),
        ):
            logs = t_interval([math.log(value) for value in values]) if values else None
            mean[key] = None if logs is None else [math.exp(x) if x is not None else None for x in (logs.value, logs.low, logs.high)]
        found.append(mean)
    return sorted(found, key=lambda row: -(row["speedup"] or [0])[0])


def markdown(result: dict[str, Any]) -> str:
    """The tables of what a FILE holds; they measure nothing."""

    def bounds(values: Any, digits: int = 2) -> str:
        if not values:
            return "–"
        low, high = values[1:]
        return f"{values[0]:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")

    peaks = ", ".join(f"{name} {value:.0f}" for name, value in result["peaks"].items())
    lines = [f"{result['machine']}. GEMM peaks, 1e9 operations per second, {result['threads']} threads: {peaks}."]
    for title, trained in (("Networks of catalog sizes, random weights", False), ("Networks of digits, trained", True)):
        rows = summary([model for model in result["models"] if model["trained"] is trained], result["peaks"])
        lines += ["", f"{title}, what passes the gate:", ""]
        lines += ["| lane | models | speed-up over eager fp32 | share of its GEMM peak | least agreement | largest median error |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in rows:
            mean, least = bounds(row["share"]), f"{row['least_agreement']:.1%}"
            lines.append(f"| {row['lane']} | {row['models']} | {bounds(row['speedup'])} | {mean} | {least} | {row['most_error']:.1e} |")
    lines += [
        "",
        "| model | lane | ms | speed-up | of peak | agreement | top-1 | error | doubts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in result["models"]:
        for row in sorted(model["rows"], key=lambda row: row["latency_ms"]):
            share = share_of(row, model, result["peaks"])
            of_peak = "–" if share is None else f"{share:.0%}"
            top1 = "–" if row["top1"] is None else f"{row['top1']:.1%}"
            speed, doubts = bounds(row["speedup"]), ", ".join(row["doubts"])
            lines.append(
                f"| {row['model']} | {row['lane']} | {row['latency_ms']:.2f} | {speed} | {of_peak} | {row['agreement']:.1%} "
                f"| {top1} | {row['median_rel']:.1e} | {doubts} |"
            )
    for model in result["models"]:
        lines += [f"\n{model['model']}: {lane} is not there: {why}" for lane, why in model["refused"].items()]
        if pick := model["pick"]:
            (row,) = (row for row in model["rows"] if row["lane"] == "autotuned")
            what = ", ".join(filter(None, (row["backend"], row["recipe"], f"threads {row['threads']}")))
            against = "is that itself" if pick["itself"] else f"is {bounds(pick['speed_over_best'])} times as fast"
            lines.append(f"\n{model['model']}: beside {pick['best']}, the best default, the pick ({what}) {against}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--backends", default="", help="spellings joined by ';'; all that work here by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--tables", metavar="FILE", help="print the tables of an earlier --out, from any machine, and measure nothing")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return
    if args.tables:
        print(markdown(json.loads(Path(args.tables).read_text())))
        return
    from edgejoule import registry
    from edgejoule.bench import Bench, cores
    from edgejoule.tuning import usable

    args.threads = cores(args.threads)
    bench = Bench(notify=lambda event: print(f"  {event.stage}: {event.text}", file=sys.stderr))
    backends = [registry.canonical(one) for one in args.backends.split(";")] if args.backends else list(usable())
    if BASE not in backends:
        backends.insert(0, BASE)
    out = Path(args.out) if args.out else None
    ways: dict[str, Any] = {"machine": machine(), "threads": args.threads, "rounds": args.rounds}
    result: dict[str, Any] = ways | {"peaks": gemm_peaks(args.threads), "models": []}
    if out is not None and out.exists():  # a run that was stopped goes on behind the last model that it finished
        before = json.loads(out.read_text())
        if others := {way: before.get(way) for way in ways if before.get(way) != ways[way]}:
            parser.error(f"{out} was measured otherwise ({others}): name another --out")
        result["models"] = before["models"]
        result["peaks"] = {kind: max(value, before["peaks"].get(kind, 0.0)) for kind, value in result["peaks"].items()}
    for name in args.models.split(","):
        if any(model["model"] == name for model in result["models"]):
            continue
        print(f"== {name}", file=sys.stderr)
        again = gemm_peaks(args.threads)  # the machine may have been busy before: the best of all counts
        result["peaks"] = {kind: max(value, again[kind]) for kind, value in result["peaks"].items()}
        result["models"].append(measure_model(name, backends, args, bench))
        if out is not None:
            out.write_text(json.dumps(result, indent=1))
    print(markdown(result))


if __name__ == "__main__":
    main()
