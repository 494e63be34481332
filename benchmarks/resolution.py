"""What resolution costs: MACs and latency of plain, windowed and hierarchical transformers at 224 to 560 pixels.

    python benchmarks/resolution.py [--quick] [--rounds 20] [--models deit_tiny,levit_128s] [--threads 1] [--out benchmarks]

The passes ``resize`` and ``window_attention(size=7)`` make the networks. Sizes are multiples of 112, so that windows of 7 patches of 16
pixels tile the grid (288 and 384 do not). Every network is compiled for onnxruntime, in two processes; then all are loaded, and each round
times all of them in random order, the median of a few calls each; ratios are paired by round: the median with a bootstrap 95 % interval.
Batch 1, live random weights, one thread unless told otherwise. Writes resolution.md and resolution.json, but not with ``--quick``
(one network, two sizes).

The formula is that of a plain transformer's block of N tokens, width C, all heads together as wide, and a feed-forward network four times
as wide: 4 N C^2 (projections) + 2 N^2 C (products of tokens with tokens) + 8 N C^2. Windows of w^2 of the N - P patches, beside P prefix
tokens that see all: the products are 2 C (P N + (N - P) (P + w^2)). Patch embedding and classifier are left out. Outside of this domain
(LeViT, EdgeViT) only what is counted is given. The timed share is of onnxruntime's own profile: kernel time of products of two
activations and of softmax over that of all operators. Knows no energy and no accuracy. Needs the host extra.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch reads it, as in fuse.py

import numpy as np
import onnxruntime
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgejoule import data, registry, zoo
from edgejoule.compile.export import TorchExport
from edgejoule.compile.onnxruntime_sessions import open_session
from edgejoule.optimize.resize import Resize
from edgejoule.optimize.window_attention import WindowAttention
from edgejoule.screen.cost import MACS, count
from edgejoule.seams import CompileContext, PassContext
from fuse import Infer, bootstrap, find, turn_s

SIZES = (224, 336, 448, 560)
WINDOW = 7
WINDOWED = f" | window_attention(size={WINDOW})"
MODELS = ("deit_tiny", f"deit_tiny{WINDOWED}", "levit_128s", "edgevit_xxs")
PROFILED = 10  # runs, after one to warm up
TURN_S = 0.1  # a turn is as many calls as fill this, at least two


@dataclass(frozen=True)
class Row:
    """One network at one size. Shares are of the blocks' MACs where ``by_formula``, of all counted MACs where counted."""

    model: str
    px: int
    macs: int  # by the package's counter
    products: float  # share of the counted MACs in products of tokens with tokens
    formula_attention: float | None  # share of projections and products
    formula_products: float | None
    timed_products: float  # share of the kernels' time in those products and in softmax
    latency_ms: float
    ratio: tuple[float, float, float]  # latency over the first size's, with its interval
    over_global: tuple[float, float, float] | None  # a windowed network's latency over the global one's at the same size


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of products of two activations: batched matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in ("bmm", "baddbmm") or "scaled_dot_product" in name:
            self.macs += MACS[func._overloadpacket](args, output[0] if isinstance(output, tuple) else output)
        return output


def products(network: Any, size: tuple[int, int, int]) -> int:
    with torch.no_grad(), Products() as counter:
        network(torch.zeros(1, *size))
    return int(counter.macs)


def by_formula(network: Any, px: int, window: int | None) -> tuple[float, float] | None:
    """The shares of attention and of its products alone, as the formula has them; None outside its domain."""
    if not hasattr(network, "num_prefix_tokens"):
        return None
    width, prefix = network.embed_dim, network.num_prefix_tokens
    tokens = (px // network.patch_embed.patch_size[0]) ** 2 + prefix
    pairs = tokens**2 if window is None else prefix * tokens + (tokens - prefix) * (prefix + window**2)
    parts = 4 * tokens * width**2, 2 * pairs * width, 8 * tokens * width**2
    return (parts[0] + parts[1]) / sum(parts), parts[1] / sum(parts)


def made(model: str, px: int) -> tuple[Any, Any]:
    """A network by its name and passes, at a size, and its spec."""
    name, _, windowed = model.partition(" | ")
    spec = find(name)
    context = PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path())
    network, spec = Resize(px)(zoo.build(zoo.identify(spec, weights="random")), spec, context)
    return WindowAttention(WINDOW)(network, spec, context) if windowed else (network, spec)


def timed(sessions: Mapping[Any, tuple[Infer, Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each session, one number a round, after a warm-up round; rounds go through them in random order."""
    calls = {key: max(2, round(TURN_S / max(turn_s(infer, images, 2), 1e-6))) for key, (infer, images) in sessions.items()}
    order, spent = random.Random(0), {key: list[float]() for key in sessions}
    for number in range(rounds + 1):
        for key in order.sample(list(sessions), len(sessions)):
            seconds = turn_s(*sessions[key], calls[key])
            if number:
                spent[key].append(seconds)
    return spent


def compiled(model: str, px: int, folder: str) -> tuple[int, float, Any, Any]:
    """A network's file, in a worker process, for exporting is slow: counted MACs, share of products, the formula's shares, an image."""
    torch.set_num_threads(1)
    network, spec = made(model, px)
    size = spec.preprocessing.input_size
    macs = count(network, size).macs
    shares = by_formula(network, px, WINDOW if WINDOWED in model else None) or (None, None)
    share = products(network, size) / macs
    Path(folder).mkdir()
    context = CompileContext((1, *size), Path(folder), calibration=lambda: np.zeros((1, *size), np.float32))
    registry.create("backend", "onnxruntime").compile(TorchExport(network, (1, *size), Path(folder), model), context)
    images = data.normalise(data.crops("photos(n=1, seed=20)", spec.preprocessing), spec.preprocessing)  # (1, C, H, W)
    return macs, share, shares, images


def loaded(folder: str, threads: int) -> Infer:
    session = registry.create("backend", "onnxruntime").load(SimpleNamespace(folder=folder), threads)
    return lambda images: session.infer(images)["logits"]


def products_timed(folder: str, threads: int, images: Any) -> float:
    """The share of kernel time in products of two activations and in softmax, by the runtime's profile of some runs."""
    (file,) = Path(folder).glob("*.onnx")
    session = open_session(file, "cpu", threads, profile=str(Path(folder) / "profile"))
    for _ in range(PROFILED + 1):
        session.run(None, {session.get_inputs()[0].name: images})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    ran = ran[len(ran) // (PROFILED + 1) :]
    mine = [event["dur"] for event in ran if "Softmax" in event["args"]["op_name"] or _of_activations(event["args"])]
    return float(sum(mine) / sum(event["dur"] for event in ran))


def _of_activations(node: Mapping[str, Any]) -> bool:
    operands = [shape for tensor in node["input_type_shape"] for shape in tensor.values() if len(shape) > 1]
    return "MatMul" in node["op_name"] and len(operands) == 2 and int(node["parameter_size"]) == 0


def measured(models: Sequence[str], sizes: Sequence[int], rounds: int, threads: int) -> list[Row]:
    facts: dict[tuple[str, int], tuple[int, float, Any]] = {}
    profiled: dict[tuple[str, int], float] = {}
    sessions: dict[tuple[str, int], tuple[Infer, Any]] = {}
    with TemporaryDirectory() as root, ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        keys = [(model, px) for px in reversed(sizes) for model in models]  # the slow ones first
        folders = {key: str(Path(root) / str(number)) for number, key in enumerate(keys)}
        pending = {key: workers.submit(compiled, *key, folders[key]) for key in keys}
        for model, px in ((model, px) for model in models for px in sizes):
            *known, images = pending[model, px].result()
            facts[model, px] = known[0], known[1], known[2]
            sessions[model, px] = loaded(folders[model, px], threads), images
        workers.shutdown()
        spent = timed(sessions, rounds)
        profiled = {key: products_timed(folders[key], threads, images) for key, (_, images) in sessions.items()}
    rows = []
    for (model, px), (macs, share, shares) in facts.items():
        seconds, beside = spent[model, px], spent.get((model.removesuffix(WINDOWED), px))
        over_global = bootstrap(beside, seconds) if WINDOWED in model and beside else None
        ratio = bootstrap(spent[model, sizes[0]], seconds)
        rows.append(
            Row(model, px, macs, share, shares[0], shares[1], profiled[model, px], 1e3 * float(np.median(seconds)), ratio, over_global)
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    def told(value: tuple[float, float, float] | None) -> str:
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else "–"

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    first = {row.model: row for row in reversed(rows)}
    head = ["network", "px", "MACs, 1e9", "over first", "attention, formula", "products, formula", "products, counted"]
    head += ["products and softmax, timed", "ms", "over first, 95 %", "over global, 95 %"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        shares = (percent(row.formula_attention), percent(row.formula_products), percent(row.products), percent(row.timed_products))
        costs = (f"{row.macs * 1e-9:.2f}", f"{row.macs / first[row.model].macs:.2f}", *shares)
        cells = (row.model.replace(" | ", ", "), str(row.px), *costs, f"{row.latency_ms:.1f}", told(row.ratio), told(row.over_global))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="MACs and latency against resolution.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="levit_128s at two sizes, three rounds, nothing written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of resolution.md and resolution.json")
    options = parser.parse_args()
    models, sizes, rounds = (["levit_128s"], SIZES[:2], 3) if options.quick else (options.models, SIZES, options.rounds)
    before = os.getloadavg()[0]
    rows = measured(models, sizes, rounds, options.threads)
    table = markdown(rows)
    load = f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after"
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    told = f"{datetime.date.today()}, {options.threads} thread(s), {rounds} rounds, {load}; {versions}."
    print(f"{table}\n{told}")
    if not options.quick:
        page = f"# Cost against resolution\n\n    python benchmarks/resolution.py --rounds {rounds}\n\n{told}\n\n{table}"
        (options.out / "resolution.md").write_text(page)
        asked = {"date": str(datetime.date.today()), "threads": options.threads, "rounds": rounds, "versions": versions, "load": load}
        (options.out / "resolution.json").write_text(json.dumps({**asked, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
