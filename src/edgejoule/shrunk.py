"""The nouns of shrinking: a network before a recipe and after it, and what a pass on one layer costs. Standard library and records only."""

from __future__ import annotations

from dataclasses import dataclass

from edgejoule.records import Interval


@dataclass(frozen=True, slots=True)
class Size:
    """A network by what it holds and computes; ``top1`` in float32 in torch, a fraction, None where no labelled data was named."""

    label: str
    params: int
    macs: int
    bytes: int  # of its parameters and buffers
    top1: Interval | None


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A network before a recipe and after it."""

    before: Size
    after: Size


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one pass on one layer alone costs and saves, beside the unchanged network. Shares are of the whole network, 0 to 1."""

    layer: str  # "blocks.3.attn"
    what: str  # the pass: "prune_heads(ratio=0.25)"
    drop_points: Interval  # percentage points of top-1 lost, or of agreement with the unchanged network
    saved_macs: float
    saved_bytes: float
    saved_time: Interval | None  # share of the latency, measured as a ratio; None where it was not measured
    n_images: int
    note: str = ""
