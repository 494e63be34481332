"""What values flow where: the float graph is run over the calibration images, and extremes and histograms are kept.

Two runs over the images: the first for the extremes, the second for histograms between them, of a sample of the values. Images go
one static batch at a time, and tensors in groups of bounded size, so that memory is bounded. Knows no quantiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.quantize.graph import Array, Graph

BINS, CHANNEL_BINS = 2048, 256
SAMPLE = 1 << 16  # values of one tensor and batch that go into histograms
GROUP_BYTES = 1 << 28  # of tensors that one run gives out


@dataclass
class Observed:
    """Extremes (G,) and histogram (G, bins) of a tensor: G = 1, or its channels where ``axis`` says which they are."""

    axis: int | None
    low: Array
    high: Array
    counts: Array = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def centres(self) -> Array:
        """(G, bins) values that the counts stand for."""
        bins = self.counts.shape[1]
        steps = (np.arange(bins) + 0.5) / bins
        return np.asarray(self.low[:, None] + (self.high - self.low)[:, None] * steps)


def observe(graph: Graph, tensors: Mapping[str, int | None], images: Any, batch: int, folder: Path) -> dict[str, Observed]:
    """{tensor: Observed}. ``tensors`` maps each to its channel axis, or None for the whole; ``images`` (N, C, H, W) float32."""
    found: dict[str, Observed] = {}

    def widen(name: str, rows: Array) -> None:
        low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        if name in found:
            low, high = np.minimum(low, found[name].low), np.maximum(high, found[name].high)
        found[name] = Observed(tensors[name], low, high)

    def count(name: str, rows: Array) -> None:
        seen = found[name]
        if seen.counts.size == 0:
            seen.counts = np.zeros((len(rows), BINS if seen.axis is None else CHANNEL_BINS))
        seen.counts += _histograms(_sample(rows), seen.low, seen.high, seen.counts.shape[1])

    for names in _groups(graph, tensors):
        run = outputs_of(graph, names, folder)
        for keep in (widen, count):
            for part in batches(images, batch):
                for name, values in zip(names, run(part), strict=True):
                    keep(name, _rows(values, tensors[name]))
    return found


def outputs_of(graph: Graph, names: Sequence[str], folder: Path) -> Callable[[Any], list[Array]]:
    """A function from a batch of images to the values of the named tensors, computed in float."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    path = folder / "observed.onnx"
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), session_options(onnxruntime), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda part: session.run(list(names), {entry: part})


def session_options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")  # a candidate is judged without saturating, as it will be run
    return options


def batches(images: Any, batch: int) -> Iterator[Any]:
    """(B, C, H, W) at a time; the last is filled up by beginning again."""
    for start in range(0, len(images), batch):
        yield np.ascontiguousarray(images[np.arange(start, start + batch) % len(images)])


def _groups(graph: Graph, tensors: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    total = 0
    for name in tensors:
        size = 4 * math.prod(graph.shapes.get(name, (GROUP_BYTES,)))
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _rows(values: Array, axis: int | None) -> Array:
    """(G, values): one row a channel, or one row for all."""
    if axis is None:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _sample(rows: Array) -> Array:
    """Every k-th column, k without a common factor with their number: no regular pattern of the tensor is skipped or favoured."""
    step = max(1, rows.size // SAMPLE)
    while step > 1 and math.gcd(step, rows.shape[1]) != 1:
        step += 1
    return rows[:, ::step] if step < rows.shape[1] else rows[:, :1]


def _histograms(rows: Array, low: Array, high: Array, bins: int) -> Array:
    """(G, bins) counts of each row between its own extremes."""
    width = np.maximum(high - low, np.finfo(np.float32).tiny)
    places = np.clip(((rows - low[:, None]) * (bins / width)[:, None]).astype(np.int64), 0, bins - 1)
    places += np.arange(len(rows))[:, None] * bins
    return np.bincount(places.ravel(), minlength=len(rows) * bins).reshape(len(rows), bins)
