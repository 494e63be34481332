"""Where an inference's time goes in OpenVINO's int8 files: by class of operator, and how near the int8 products alone come to the peak.

    python benchmarks/where_time_goes.py [--models deit_tiny,swin_tiny] [--backend "openvino(precision='int8')"] [--rounds 12] [--seed 0]

Each model is compiled by the product, with live random weights, and run at one thread with the runtime's own counters (PERF_COUNT). The
search for layers to keep in float is off: it would judge random weights by answers that are near ties, and keep layers that a trained
network does not. Rounds take the models in random order, a few inferences each, with a product of two int8 matrices (the peak) between
them; of each model the quietest quarter of its inferences counts. A kernel counts for what it mainly computes: what the
runtime fused into a product (bias, activation, residual sum, requantising) is that product's time. The share of the peak counts the
multiply-adds at weights, attention's not. Knows no energy. Counters are whole microseconds, cut: small kernels seem a little faster.
Needs the host extra.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.records import Artifact
from peaks import GEMM, best_s, products

MODELS = (
    *("deit_tiny", "vit_small", "swin_tiny", "levit_conv_128s", "tiny_vit_5m", "mobilevit_s", "efficientvit_b1", "mobilenetv3_large_075"),
)
BACKEND = "openvino(precision='int8', smoothing=0.5, ranges='minmax', search=False)"
CONFIG = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": "YES"}
TURN, WARM = 6, 10  # inferences a turn, inferences before the first

INT8 = ("linear", "1x1", "dense", "depthwise")
FLOAT, ATTENTION = "float products", "attention"
COPIES, QUANTISE, REST = "copies", "quantise", "rest"
OTHERS = (FLOAT, ATTENTION, "softmax", "norm", "activation", "elementwise", COPIES, QUANTISE, REST)
# A kernel of several operators is the first of these that it has one of.
CLASSES = {
    ATTENTION: {"MatMul", "ScaledDotProductAttention", "MHA"},
    "softmax": {"Softmax", "SoftMax"},
    "norm": {"MVN", "NormalizeL2", "RMS", "RMSNorm", "GroupNormalization", "LayerNorm"},
    "activation": {"Gelu", "GELU", "HSwish", "HSigmoid", "Swish", "Sigmoid", "Relu", "Clamp", "Tanh", "Erf", "Exp", "HardSigmoid"},
    "elementwise": {"Add", "Multiply", "Subtract", "Divide", "Power", "Eltwise", "Maximum", "Sqrt"},
    COPIES: {"Reorder", "Transpose", "Convert", "Split", "VariadicSplit", "Concat", "Concatenation", "Reshape", "StridedSlice", "Slice"}
    | {"Crop", "Gather", "Pad", "Tile", "Broadcast", "ShuffleChannels", "SpaceToDepth", "Roll"},
    QUANTISE: {"FakeQuantize"},
}


@dataclass(frozen=True)
class Product:
    """A linear layer or convolution of the file."""

    kind: str  # one of INT8
    macs: int


@dataclass
class Subject:
    """A compiled model with its counters."""

    name: str
    request: Any
    images: Any  # (B, C, H, W)
    products: dict[str, Product]  # by the name of the operator in the file
    types: dict[str, str]  # of the file's operators, by name
    originals: dict[str, list[str]]  # kernel -> the file's operators that it computes
    turns: list[dict[str, tuple[str, str, float]]] = field(default_factory=list)  # of an inference: kernel -> type, implementation, seconds


@dataclass
class Row:
    """Seconds of one inference by class; seconds and multiply-adds of the int8 products by kind."""

    name: str
    seconds: dict[str, float]
    macs: Counter[str]
    all_macs: int


def compiled(names: list[str], backend: str) -> list[Subject]:
    """The models as the product compiles them; one that it cannot compile is left out, aloud."""
    from edgejoule import catalog, compiling
    from edgejoule.bench import Bench
    from edgejoule.study_file import CompilePlan, MeasurePlan

    bench = Bench(notify=lambda event: print(f"  {event.stage}: {event.text}", file=sys.stderr))
    found = []
    for name in names:
        print(f"== {name}", file=sys.stderr)
        spec = catalog.find_model(name)
        (made,) = compiling.compile_model(spec, (backend,), MeasurePlan(threads=1), "random", bench, compiling=CompilePlan())
        if isinstance(made, Artifact):
            found.append(subject(name, Path(made.folder) / "model.xml"))
        else:
            print(f"  {name} is left out: {made.reason}", file=sys.stderr)
    return found


def subject(name: str, path: Path) -> Subject:
    from edgejoule.compile.openvino_import import core

    model = core().read_model(path)
    runs = core().compile_model(model, "CPU", CONFIG)
    images = np.random.default_rng(0).normal(size=tuple(runs.input(0).shape)).astype(np.float32)
    originals = {}
    for node in runs.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        told = facts["originalLayersNames"].astype(str) if "originalLayersNames" in facts else ""
        originals[node.get_friendly_name()] = [one for one in told.split(",") if one]
    products = products_of(model)
    types = {node.get_friendly_name(): node.get_type_name() for node in model.get_ops()}
    made = Subject(name, runs.create_infer_request(), images, products, types, originals)
    for _ in range(WARM):
        made.request.infer(images)
    return made


def products_of(model: Any) -> dict[str, Product]:
    """The products with weights of an OpenVINO model, by name, with their multiply-adds."""
    from edgejoule.compile.openvino_restore import is_weighted

    found = {}
    for node in model.get_ops():
        if not is_weighted(node):
            continue
        weights = tuple(node.input_value(1).shape)  # (O, I, P, Q), grouped (G, O, I, P, Q), or a matrix
        if node.get_type_name() == "MatMul":
            inner = node.input_value(0).shape[-2 if node.get_attributes()["transpose_a"] else -1]
            kind = "linear"
        else:
            inner = math.prod(weights[-3:])
            kind = "depthwise" if len(weights) == 5 else "1x1" if math.prod(weights[-2:]) == 1 else "dense"
        found[node.get_friendly_name()] = Product(kind, math.prod(node.shape) * inner)
    return found


def take_turn(one: Subject) -> None:
    for _ in range(TURN):
        one.request.infer(one.images)
        told = one.request.profiling_info
        one.turns.append({info.node_name: (info.node_type, info.exec_type, info.real_time.total_seconds()) for info in told})


def peak_of(multiply: Sequence[Callable[[], Any]]) -> float:
    """Operations a second (2 a multiply-add) of one product of two int8 matrices at one thread, by the better runtime."""
    return 2 * GEMM**3 / best_s(multiply, runs=1)


def class_of(one: Subject, kernel: str, kind: str, implementation: str) -> tuple[str, int]:
    """(class, multiply-adds at weights) of a kernel."""
    names = [name.partition("/Dequantization")[0] for name in one.originals.get(kernel, [])]  # some kernels name only that of a product
    inside = [one.products[name] for name in dict.fromkeys(names) if name in one.products]
    if inside:
        int8 = implementation.lower().endswith(("i8", "u8"))
        return (inside[0].kind if int8 else FLOAT), sum(product.macs for product in inside)
    types = {kind} if kind != "Subgraph" else {one.types.get(name, "") for name in names}
    return next((name for name, members in CLASSES.items() if types & members), REST), 0


def summed(one: Subject) -> Row:
    """The mean over the quietest quarter of a model's inferences."""
    totals = [sum(seconds for *_, seconds in turn.values()) for turn in one.turns]
    limit = statistics.quantiles(totals, n=4)[0]
    quiet = [turn for turn, total in zip(one.turns, totals, strict=True) if total <= limit]
    row = Row(one.name, defaultdict(float), Counter(), sum(product.macs for product in one.products.values()))
    spent: dict[str, float] = defaultdict(float)
    for turn in quiet:
        for kernel, (*_, seconds) in turn.items():
            spent[kernel] += seconds / len(quiet)
    for kernel, (kind, implementation, _) in quiet[0].items():
        name, macs = class_of(one, kernel, kind, implementation)
        row.seconds[name] += spent[kernel]
        if spent[kernel] > 0:
            row.macs[name] += macs
    return row


def markdown(rows: list[Row], peak: float) -> str:
    """Shares of the time by class; then of the int8 products alone, the share of the peak by kind."""
    lines = [f"int8 GEMM peak at one thread: {peak * 1e-9:.0f}e9 operations per second.", ""]
    head: tuple[str, ...] = ("model", "ms", "of peak", "int8 products", *OTHERS)
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        total, int8 = sum(row.seconds.values()), sum(row.seconds[kind] for kind in INT8)
        shares = [f"{value / total:.1%}" for value in (int8, *(row.seconds[name] for name in OTHERS))]
        lines.append(f"| {row.name} | {1e3 * total:.2f} | {2 * row.all_macs / total / peak:.0%} | {' | '.join(shares)} |")
    whole = statistics.geometric_mean(2 * row.all_macs / sum(row.seconds.values()) / peak for row in rows)
    inside = [(sum(row.macs[kind] for kind in INT8), sum(row.seconds[kind] for kind in INT8)) for row in rows]
    alone = [2 * macs / seconds / peak for macs, seconds in inside if macs and seconds]
    told = f"{statistics.geometric_mean(alone):.0%}" if alone else "–"
    lines += ["", f"Geometric mean of the shares of the peak: {whole:.0%}; of the int8 products alone: {told}.", ""]
    head = ("model", "MACs in int8", "int8 products alone, of peak", *(f"{kind}: time, of peak" for kind in INT8))
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        macs, seconds = sum(row.macs[kind] for kind in INT8), sum(row.seconds[kind] for kind in INT8)
        cells = [f"{macs / row.all_macs:.1%}", f"{2 * macs / seconds / peak:.0%}" if seconds else "–"]
        for kind in INT8:
            time_s = row.seconds[kind]
            cells.append(f"{time_s / sum(row.seconds.values()):.1%}, {2 * row.macs[kind] / time_s / peak:.0%}" if time_s else "–")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--backend", default=BACKEND)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    multiply, order = products(1)["int8"], random.Random(args.seed)
    subjects, peaks = compiled(args.models.split(","), args.backend), [peak_of(multiply)]
    if not subjects:
        parser.error("nothing was compiled, so there is nothing to look into")
    before = os.getloadavg()[0]
    for _ in range(args.rounds):
        for one in order.sample(subjects, len(subjects)):
            take_turn(one)
            peaks.append(peak_of(multiply))
    print(markdown([summed(one) for one in subjects], max(peaks)))
    rates = f"median {statistics.median(peaks) / max(peaks):.0%}, least {min(peaks) / max(peaks):.0%} of the best"
    print(f"Load average {before:.1f} before, {os.getloadavg()[0]:.1f} after; the matrices' rate: {rates}.")


if __name__ == "__main__":
    main()
