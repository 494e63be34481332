"""Latency, NVML energy and error of torch on an NVIDIA GPU: eager in fp32, tf32, fp16 and bf16, inductor in fp16 and bf16.

    python benchmarks/gpu_latency.py [--models deit_tiny_patch16_224,...] [--rounds 11] [--layout contiguous] [--out docs/results]

Batch 1, one CUDA graph an inference, random live weights, all ways of one network interleaved in random order: a round gives each way a
discarded inference and ten that are timed from the images on the host to the logits on the host; the figure is the median over rounds of
the rounds' medians, with its order-statistics interval (95 %), and beside it the median of the GPU's own time by CUDA events. Energy is
NVML's counter over a loop of --energy-s seconds, gross, per image; a GPU without that counter has none. The error is of logits, against
eager fp32. Writes gpu_latency_<date>.json and .md. Without a GPU it says so and exits 0. Needs torch alone; without timm the networks
are plain ViTs of two sizes. From source: PYTHONPATH=src.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are random: nothing is to be fetched
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # NVML's own order: the counter must be that of the GPU that computes

from edgejoule.compile.cuda import GpuRun
from edgejoule.compile.export import TorchExport, save_program
from edgejoule.compile.reasons import reason
from edgejoule.compile.torch_program import lacking, load_program, program_of, set_products

WAYS = (*(("eager", word) for word in ("fp32", "tf32", "fp16", "bf16")), ("inductor", "fp16"), ("inductor", "bf16"))
MODELS = "deit_tiny_patch16_224,vit_small_patch16_224,levit_conv_192,efficientvit_b1,swin_tiny_patch4_window7_224,mobilenetv3_large_100"
PLAIN = {"plain_vit_tiny": (192, 3), "plain_vit_small": (384, 6)}  # width, heads; DeiT's sizes, 12 blocks
SIDE, TIMED = 224, 10
STILL_S = 5.0  # a counter that has not moved for so long under load does not count
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """One way of running one network. Seconds and joules of one image; None where it could not be had."""

    model: str
    way: str
    precision: str
    latency_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    device_s: float | None = None
    energy_j: float | None = None
    error: float | None = None  # Euclidean norms of logits, relative to eager fp32
    failure: str = ""


# ---------------------------------------------------------------- networks and ways


def network(name: str) -> Any:
    """A network in eval mode with live random weights, of (1, 3, 224, 224)."""
    import torch

    torch.manual_seed(0)
    if name in PLAIN:
        return plain_vit(*PLAIN[name]).eval()
    from edgejoule.torchvision import ensure

    ensure()
    import timm

    from edgejoule.zoo.live import enliven

    module = timm.create_model(name, pretrained=False).eval()
    enliven(module, torch.randn(8, 3, SIDE, SIDE), seed=0)
    return module


def plain_vit(width: int, heads: int, depth: int = 12) -> Any:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, D) -> (B, N, D)
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)  # (B, H, N, D / H) each
            mixed: torch.Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return mixed

    class Residual(nn.Module):
        def __init__(self, *inner: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(width), *inner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, N, D) -> (B, N, D)
            y: torch.Tensor = self.inner(x)
            return x + y

    class PlainViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, width, 16, 16)
            self.place = nn.Parameter(torch.randn(1, (SIDE // 16) ** 2, width) / 10)
            mlp = (Residual(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth))
            self.blocks = nn.Sequential(*(nn.Sequential(Residual(Attention()), one) for one in mlp), nn.LayerNorm(width))
            self.head = nn.Linear(width, 1000)

        def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, 3, 224, 224) -> (B, 1000)
            tokens = self.patches(images).flatten(2).transpose(1, 2) + self.place  # (B, N, D)
            logits: torch.Tensor = self.head(self.blocks(tokens).mean(1))
            return logits

    return PlainViT()


def ready(export: TorchExport, way: str, precision: str, layout: Any, folder: Path) -> GpuRun:
    """The network on the GPU, warmed up and captured. Raises EdgejouleError, and whatever inductor raises."""
    import torch

    shape = (1, 3, SIDE, SIDE)
    path = folder / "model.pt2"
    set_products(precision == "tf32")
    torch.backends.cudnn.benchmark = True
    save_program(program_of(export, precision, layout, shape), path)
    module: Any = load_program(path, "cuda").module(check_guards=False)
    if way == "inductor":
        with torch.inference_mode():
            module = torch.compile(module, fullgraph=True, options={"freezing": True})
            module(torch.zeros(shape, device="cuda"))
    return GpuRun(module, shape, graphs=True)


# ---------------------------------------------------------------- measuring


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the narrowest pair of order statistics that hold it with 95 % (binomial), as far as there are enough values."""
    ordered, n = sorted(values), len(values)
    k = max((k for k in range(n // 2) if 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n <= 0.05), default=0)
    return statistics.median(ordered), ordered[k], ordered[-1 - k]


def timed(runs: dict[tuple[str, str], GpuRun], images: Any, rounds: int) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """{way: (medians of host seconds, medians of GPU seconds), one a round}."""
    order = random.Random(0)
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {way: ([], []) for way in runs}
    for _ in range(rounds):
        for way in order.sample(list(runs), len(runs)):
            run, host, device = runs[way], [], []
            run.run(images)
            for _ in range(TIMED):
                began = time.perf_counter()
                run.run(images)
                host.append(time.perf_counter() - began)
                device.append(run.device_time_s)
            found[way][0].append(statistics.median(host))
            found[way][1].append(statistics.median(device))
    return found


def counter() -> Callable[[], float] | None:
    """Joules since whenever of the GPU that torch computes on, by NVML; None where there is no library or no counter (Volta and newer)."""
    import torch

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    board, joules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"  # NVML does not know CUDA_VISIBLE_DEVICES
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(board)):
        return None
    if nvml.nvmlDeviceGetTotalEnergyConsumption(board, ctypes.byref(joules)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(board, ctypes.byref(joules))
        return joules.value / 1e3  # millijoules

    return read


def energy(run: GpuRun, images: Any, read: Callable[[], float], seconds: float) -> float | None:
    """Joules of one image, over whole updates of the counter (about every 100 ms); None where it does not move."""
    before, patience = read(), time.perf_counter() + STILL_S
    while (start := read()) == before:
        run.run(images)
        if time.perf_counter() > patience:
            return None
    n, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until or read() == start:
        run.run(images)
        n += 1
    last = read()
    while (stop := read()) == last:
        run.run(images)
        n += 1
    return (stop - start) / n


def rows_of(name: str, options: argparse.Namespace, read: Callable[[], float] | None) -> list[Row]:
    import torch

    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    runs: dict[tuple[str, str], GpuRun] = {}
    failed: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            export = TorchExport(network(name), (1, 3, SIDE, SIDE), Path(folder), name)
        except Exception as error:  # one network that cannot be built must not end the others
            return [Row(name, "", "", failure=reason(error))]
        for way, precision in WAYS:
            try:
                if (missing := lacking(precision, "cuda")) is not None:
                    raise RuntimeError(missing)
                runs[way, precision] = ready(export, way, precision, options.layout, Path(folder))
            except Exception as error:
                failed.append(Row(name, way, precision, failure=reason(error)))
    logits = {way: run.run(images).double() for way, run in runs.items()}  # a copy: run's own is overwritten
    exact = logits.get(("eager", "fp32"))
    rows = []
    for (way, precision), (host, device) in timed(runs, images, options.rounds).items():
        latency, low, high = interval(host)
        joules = energy(runs[way, precision], images, read, options.energy_s) if read is not None else None
        off = None if exact is None else float((logits[way, precision] - exact).norm() / exact.norm())
        rows.append(Row(name, way, precision, latency, low, high, statistics.median(device), joules, off))
    for run in runs.values():
        run.close()
    return rows + failed


# ---------------------------------------------------------------- writing


def markdown(facts: dict[str, str], rows: Sequence[Row]) -> str:
    lines = [f"# {facts['gpu']}: torch's own backends", "", f"{facts['date']}, {facts['how']}", ""]
    lines += [
        "| model | way | precision | latency, ms | on the GPU, ms | speed-up over eager fp32 | energy, mJ per image | relative error |"
    ]
    lines += ["|" + "---|" * 8]
    base = {row.model: row.latency_s for row in rows if (row.way, row.precision) == ("eager", "fp32")}
    for row in rows:
        if row.latency_s is None or row.low_s is None or row.high_s is None or row.device_s is None:
            lines.append(f"| {row.model} | {row.way} | {row.precision} | failed: {row.failure} | | | | |")
            continue
        first = base.get(row.model)
        cells = [row.model, row.way, row.precision, f"{1e3 * row.latency_s:.3f} [{1e3 * row.low_s:.3f}, {1e3 * row.high_s:.3f}]"]
        cells += [f"{1e3 * row.device_s:.3f}", "–" if first is None else f"{first / row.latency_s:.2f}"]
        cells += ["–" if row.energy_j is None else f"{1e3 * row.energy_j:.1f}", "–" if row.error is None else f"{row.error:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Latency, energy and error of torch's own backends on an NVIDIA GPU.")
    parser.add_argument("--models", default="", help=f"timm's names; {MODELS}")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--energy-s", type=float, default=3.0)
    parser.add_argument("--layout", choices=["contiguous", "channels_last"], default="contiguous")
    parser.add_argument("--minutes", type=float, default=9.0, help="no further model is begun after so many")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    if (missing := lacking("fp32", "cuda")) is not None:
        print(f"nothing measured: {missing}")
        return 0
    import torch

    names = (options.models or (MODELS if has_timm() else ",".join(PLAIN))).split(",")
    read, until = counter(), time.monotonic() + 60 * options.minutes
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "how": f"torch {torch.__version__}, batch 1, {options.rounds} rounds of {TIMED}, {options.layout}, CUDA graphs, random live weights"
        + ("." if read is not None else "; NVML gives no energy here."),
    }
    rows: list[Row] = []
    for name in names:
        if time.monotonic() > until:
            rows.append(Row(name, "", "", failure="the minutes were over"))
        else:
            try:
                rows += rows_of(name, options, read)
            except Exception as error:  # a GPU that runs out of memory in the middle: the others' figures stay
                rows.append(Row(name, "", "", failure=reason(error)))
            print(f"{name}: done", flush=True)
        page = keep(options.out, facts, rows)
    print(page)
    return 0


def keep(folder: Path, facts: dict[str, str], rows: Sequence[Row]) -> str:
    """Writes both files, after each network anew, so that a run that is cut off leaves what it measured; the page."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"gpu_latency_{facts['date']}"
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    page = markdown(facts, rows)
    stem.with_suffix(".md").write_text(page)
    return page


def has_timm() -> bool:
    try:
        from edgejoule.torchvision import ensure

        ensure()
        import timm  # noqa: F401
    except Exception:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
