"""The nouns of shrinking: a network before a recipe and after it. Standard library and records only."""

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
