"""What exact fusion saves: latency before and after the pass ``fuse``, interleaved in one process, per model and runtime.

    python benchmarks/fuse.py [--rounds 40] [--models edgevit_xxs,repvit_m0_9] [--runtimes module,onnxruntime] [--json fuse.json]

Each round times the plain and the fused network in random order, the median of a few calls each; the ratio is fused over plain, the
median over rounds with a bootstrap 95 % interval (rounds are resampled in pairs). ``module`` is the nn.Module called as it is; the others
are our backends, which fold norms themselves: what they gain is what they could not see. Batch 1, live random weights, one thread
unless told otherwise. Knows no energy. Needs the host extra.
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
from types import SimpleNamespace
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch reads it: threads that spin beside a busy neighbour drown what is looked for

import numpy as np
import torch

from edgejoule import catalog, data, registry, zoo
from edgejoule.compile.export import TorchExport
from edgejoule.errors import EdgejouleError
from edgejoule.optimize.fuse import fused_report
from edgejoule.seams import CompileContext

MODELS = (
    *("edgevit_xxs", "edgevit_xs", "edgevit_s", "uniformer_tiny", "levit_conv_192", "repvit_m1_0", "fastvit_t8"),
    *("mobilenetv2_100", "efficientnet_b0", "tiny_vit_5m", "efficientvit_m0", "twins_svt_small"),
)
RUNTIMES = ("module", "onnxruntime", "openvino")
TURN_S = 0.1  # a turn is as many calls as fill this, at least three
RESAMPLES = 4000

Infer = Callable[[Any], Any]


def find(name: str) -> Any:
    """A catalog name, or any name that timm (and so our zoo) knows."""
    try:
        return catalog.find_model(name)
    except EdgejouleError:
        return catalog.find_model(f'timm(name="{name}")')


def session(module: Any, shape: tuple[int, int, int, int], runtime: str, folder: Path, threads: int) -> Infer:
    if runtime == "module":

        def infer(images: Any) -> Any:
            with torch.inference_mode():
                return module(torch.from_numpy(images)).numpy()

        return infer
    folder.mkdir(parents=True, exist_ok=True)
    backend = registry.create("backend", runtime)
    context = CompileContext(shape, folder, calibration=lambda: np.zeros(shape, np.float32))
    backend.compile(TorchExport(module, shape, folder), context)
    loaded = backend.load(SimpleNamespace(folder=str(folder)), threads)
    return lambda images: loaded.infer(images)["logits"]


def turn_s(infer: Infer, images: Any, calls: int) -> float:
    spent = []
    for _ in range(calls):
        start = time.perf_counter()
        infer(images)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def compare(plain: Infer, fused: Infer, images: Any, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the plain and of the fused network, one pair a round, after a warm-up round."""
    calls = max(3, round(TURN_S / max(turn_s(plain, images, 3), 1e-6)))
    order, spent = random.Random(0), {"plain": list[float](), "fused": list[float]()}
    loops = {"plain": plain, "fused": fused}
    for number in range(rounds + 1):
        for name in order.sample(list(loops), 2):
            seconds = turn_s(loops[name], images, calls)
            if number:
                spent[name].append(seconds)
    return spent["plain"], spent["fused"]


def bootstrap(plain: Sequence[float], fused: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of fused / plain, and the 2.5 and 97.5 percentiles of that median over resampled rounds (Efron 1979)."""
    ratios = np.divide(fused, plain)
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    return float(np.median(ratios)), float(np.percentile(medians, 2.5)), float(np.percentile(medians, 97.5))


def rows_of(name: str, runtimes: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    spec = find(name)
    size = spec.preprocessing.input_size
    network = zoo.build(zoo.identify(spec, weights="random"))
    images = data.normalise(data.crops("photos(n=4, seed=20)", spec.preprocessing), spec.preprocessing)  # (4, C, H, W)
    fused, done = fused_report(network, size, name, torch.from_numpy(images))
    images = images[:1]
    rows = []
    with TemporaryDirectory() as folder:
        for runtime in runtimes:
            shape = (1, *size)
            before = session(network, shape, runtime, Path(folder) / runtime / "plain", threads)
            after = session(fused, shape, runtime, Path(folder) / runtime / "fused", threads)
            torch.set_num_threads(threads)  # process-wide: a session may have set it
            seconds = compare(before, after, images, rounds)
            ratio, low, high = bootstrap(*seconds)
            rows.append(
                {
                    "model": name,
                    "runtime": runtime,
                    "plain_ms": 1e3 * float(np.median(seconds[0])),
                    "fused_ms": 1e3 * float(np.median(seconds[1])),
                    "ratio": ratio,
                    "low": low,
                    "high": high,
                    "rounds": rounds,
                    "fused": {key: getattr(done, key) for key in ("norms", "layer_scales", "residuals", "blocks", "error", "exact_error")},
                }
            )
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    counts = " ".join(f"{row['fused'][key]:6}" for key in ("norms", "layer_scales", "residuals", "blocks"))
    ratio = f"{row['ratio']:7.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    print(f"{row['model']:18} {row['runtime']:12} {counts} {row['plain_ms']:9.2f} {row['fused_ms']:9.2f} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency before and after exact fusion.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{'model':18} {'runtime':12} {'norms':>6} {'scales':>6} {'resid.':>6} {'blocks':>6} {'plain ms':>9} {'fused ms':>9}   ratio, 95 %"
    )
    rows = [row for name in options.models for row in rows_of(name, options.runtimes, options.rounds, options.threads)]
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
