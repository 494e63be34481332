"""What token reduction does to speed: latency of DeiT with and without merged or pruned tokens, at batch 1 and at batch 64.

    python benchmarks/tokens.py [--quick] [--rounds 20] [--rounds64 6] [--also64 deit_small_patch16_224] [--threads 1] [--out benchmarks]

Every network is exported once and compiled for onnxruntime and openvino in float32, in two processes; the MACs are counted on the network.
Then the files of one network and batch size, all recipes on both runtimes, are loaded in this process, and each round times every one of
them in random order: at batch 1 the median of as many calls as fill a tenth of a second, at batch 64 one call. The ratio is to the same
network without a recipe on the same runtime, paired by round: the geometric mean with a t-interval on logarithms. Faster or slower is
said only where the interval lies on one side of 1. It is over the rounds of one launch: what differs between launches is not in it.

Weights are random and live: the tokens that are merged or dropped are then others than a trained network's, but their number is fixed by
the recipe, so that the speed does not depend on the weights. Knows no accuracy and no energy. At batch 64 it is deit_tiny alone, unless
``--also64`` names more: deit_small takes minutes. Writes tokens.md and tokens.json, but not with ``--quick`` (deit_tiny, one recipe,
batches 1 and 4, few rounds). Needs the host extra.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch reads it, as in fuse.py

import numpy as np
import torch

from backends import machine
from edgejoule import data, registry, zoo
from edgejoule.compile.export import TorchExport
from edgejoule.measure.stats import ratio_interval
from edgejoule.optimize.recipe import apply
from edgejoule.records import Interval
from edgejoule.screen.cost import count
from edgejoule.seams import CompileContext, PassContext
from fuse import Infer, find, turn_s
from gpu_energy import commit

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
PLAIN = ""
RECIPES = (PLAIN, "merge_tokens(r=8)", "merge_tokens(r=13)", "prune_tokens(keep=0.7, criterion='attention')")
RUNTIMES = ("onnxruntime", "openvino")
LARGE = 64
TURN_S = 0.1  # at batch 1 a turn is as many calls as fill this, at least two
Lane = tuple[str, str]  # recipe, runtime


@dataclass(frozen=True)
class Job:
    """One network and batch size, and how many rounds its files are timed in."""

    model: str
    batch: int
    rounds: int
    recipes: tuple[str, ...] = RECIPES


@dataclass(frozen=True)
class Row:
    """One file. ``seconds`` are of one inference of the whole batch, a number a round."""

    model: str
    recipe: str
    runtime: str
    batch: int
    macs: int  # of one image
    macs_ratio: float
    latency_ms: float  # median over the rounds
    ratio: Interval | None  # of the latency to that without the recipe; None for what has none
    verdict: str
    seconds: tuple[float, ...]


@functools.cache
def plain(model: str) -> tuple[Any, Any]:
    """A network with live random weights, and its spec; in a worker process once for all recipes."""
    spec = find(model)
    return zoo.build(zoo.identify(spec, weights="random")), spec


def compiled(model: str, recipe: str, batch: int, folder: str) -> int:
    """A network's files, a folder a runtime, made in a worker process; the MACs of one image."""
    torch.set_num_threads(1)
    network, spec = plain(model)
    network, spec = apply(recipe, network, spec, PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path(folder)))
    size = spec.preprocessing.input_size
    shape = (batch, *size)
    export = TorchExport(network, shape, Path(folder) / "export", f"{model} | {recipe}")
    for runtime in RUNTIMES:
        (Path(folder) / runtime).mkdir(parents=True)
        context = CompileContext(shape, Path(folder) / runtime, calibration=lambda: np.zeros(shape, np.float32))
        registry.create("backend", f"{runtime}(precision='fp32')").compile(export, context)
    return count(network, size).macs


def loaded(folder: Path, runtime: str, threads: int) -> Infer:
    session = registry.create("backend", runtime).load(SimpleNamespace(folder=str(folder)), threads)
    return lambda images: session.infer(images)["logits"]


def timed(sessions: Mapping[Lane, Infer], images: Any, rounds: int) -> dict[Lane, list[float]]:
    """Seconds of each session, one number a round, after a warm-up round; rounds go through them in random order."""
    large = len(images) > 1
    calls = {lane: 1 if large else max(2, round(TURN_S / max(turn_s(infer, images, 2), 1e-6))) for lane, infer in sessions.items()}
    order, spent = random.Random(0), {lane: list[float]() for lane in sessions}
    for number in range(rounds + 1):
        for lane in order.sample(list(sessions), len(sessions)):
            seconds = turn_s(sessions[lane], images, calls[lane])
            if number:
                spent[lane].append(seconds)
    return spent


def verdict(ratio: Interval | None) -> str:
    if ratio is None or ratio.low is None or ratio.high is None:
        return "–"
    if ratio.high < 1:
        return "faster"
    return "slower" if ratio.low > 1 else "no difference shown"


def rows_of(job: Job, macs: Mapping[str, int], folders: Mapping[str, Path], threads: int) -> list[Row]:
    preprocessing = find(job.model).preprocessing
    photos = data.normalise(data.crops("photos(n=4, seed=20)", preprocessing), preprocessing)  # (4, C, H, W)
    images = np.ascontiguousarray(photos.take(range(job.batch), axis=0, mode="wrap"))  # (B, C, H, W)
    lanes = [(recipe, runtime) for recipe in job.recipes for runtime in RUNTIMES]
    spent = timed({lane: loaded(folders[lane[0]] / lane[1], lane[1], threads) for lane in lanes}, images, job.rounds)
    rows = []
    for recipe, runtime in lanes:
        seconds = spent[recipe, runtime]
        ratio = ratio_interval(seconds, spent[PLAIN, runtime]) if recipe else None
        median, fewer = 1e3 * statistics.median(seconds), macs[recipe] / macs[PLAIN]
        rows.append(
            Row(
                job.model,
                recipe,
                runtime,
                job.batch,
                macs[recipe],
                fewer,
                median,
                ratio,
                verdict(ratio),
                tuple(round(s, 6) for s in seconds),
            )
        )
    return rows


def measured(jobs: Sequence[Job], threads: int) -> list[Row]:
    """All files are made before the first is timed, so that nothing else runs beside the clock."""
    rows, begun = [], time.monotonic()
    with TemporaryDirectory() as root:
        folders = {(job, recipe): Path(root) / f"{at}-{number}" for at, job in enumerate(jobs) for number, recipe in enumerate(job.recipes)}
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
            pending: dict[tuple[Job, str], Future[int]] = {
                (job, recipe): workers.submit(compiled, job.model, recipe, job.batch, str(folders[job, recipe]))
                for job, recipe in sorted(folders, key=lambda key: -key[0].batch)  # the slow ones first
            }
            macs = {key: future.result() for key, future in pending.items()}
        print(f"{len(macs)} networks compiled in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        for job in jobs:
            known = {recipe: macs[job, recipe] for recipe in job.recipes}
            rows += rows_of(job, known, {recipe: folders[job, recipe] for recipe in job.recipes}, threads)
            print(f"{job.model} at batch {job.batch} timed, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    head = ["network", "batch", "recipe", "runtime", "MACs an image, 1e9", "MACs over plain", "ms a batch", "ms an image"]
    lines = [f"| {' | '.join([*head, 'latency over plain, 95 %', 'verdict'])} |", "|---" * (len(head) + 2) + "|"]
    for row in rows:
        ratio = "1" if row.ratio is None else f"{row.ratio.value:.3f}"
        if row.ratio is not None and row.ratio.low is not None and row.ratio.high is not None:
            ratio += f" [{row.ratio.low:.3f}, {row.ratio.high:.3f}]"
        cells = (row.model, str(row.batch), row.recipe or "none", row.runtime, f"{row.macs * 1e-9:.3f}", f"{row.macs_ratio:.2f}")
        costs = (f"{row.latency_ms:.1f}", f"{row.latency_ms / row.batch:.2f}", ratio, row.verdict)
        lines.append(f"| {' | '.join((*cells, *costs))} |")
    return "\n".join(lines) + "\n"


def facts(options: argparse.Namespace, before: float, jobs: Sequence[Job]) -> dict[str, Any]:
    """What the figures depend on, and whether the machine was quiet."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", *RUNTIMES)}
    return {
        "date": str(datetime.date.today()),
        "machine": f"{machine()}; {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "rounds": {f"{job.model}, batch {job.batch}": job.rounds for job in jobs},
        "versions": versions,
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
    }


def page(rows: Sequence[Row], found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rounds = "; ".join(f"{what}: {number}" for what, number in found["rounds"].items())
    at = f"at commit {found['commit']}, " if "commit" in found else ""
    lines = [
        f"{found['date']}, {at}{found['machine']}, {found['threads']} thread(s). {versions}. Float32, live random weights.",
        f"Rounds: {rounds}. Load average {found['load'][0]} before, {found['load'][1]} after.",
    ]
    return "\n".join(lines) + "\n\n" + markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency with and without token reduction, at batch 1 and 64.")
    parser.add_argument("--rounds", type=int, default=20, help="at batch 1")
    parser.add_argument("--rounds64", type=int, default=6, help="at batch 64")
    parser.add_argument("--also64", type=lambda text: text.split(","), default=[], help="networks to run at batch 64 beside deit_tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="deit_tiny, one recipe, batches 1 and 4, few rounds, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of tokens.md and tokens.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        jobs = [Job(MODELS[0], 1, 4, RECIPES[:2]), Job(MODELS[0], 4, 3, RECIPES[:2])]
    else:
        large = dict.fromkeys((MODELS[0], *options.also64))
        jobs = [*(Job(model, 1, options.rounds) for model in MODELS), *(Job(model, LARGE, options.rounds64) for model in large)]
    before = os.getloadavg()[0]
    rows = measured(jobs, options.threads)
    found = facts(options, before, jobs)
    if options.quick:
        print(page(rows, found))
        return
    found["commit"] = commit()
    print(page(rows, found))
    command = " ".join(["python benchmarks/tokens.py", *sys.argv[1:]])
    (options.out / "tokens.md").write_text(f"# Token reduction, batch 1 and 64\n\n    {command}\n\n{page(rows, found)}")
    (options.out / "tokens.json").write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
