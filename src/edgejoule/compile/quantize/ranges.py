"""Which part of a tensor's values int8 shall cover: all (min-max), all but outliers (percentile), or what loses least (MSE).

Pure mathematics on histograms and weights; no files. Scales: u8 = round(x / scale) + zero_point over [0, 255], s8 symmetric over
[-127, 127]; a range always covers zero, so that zero is exact.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from edgejoule.compile.quantize.graph import Array
from edgejoule.compile.quantize.observe import BINS, Observed

SHRINKS = np.concatenate([np.linspace(1.0, 0.3, 29), np.geomspace(0.25, 0.01, 14)])  # fractions of an extreme that MSE tries
WEIGHT_SHRINKS = np.linspace(1.0, 0.7, 13)
TINY = 1e-12


@dataclass(frozen=True)
class Scale:
    """One quantiser of an activation."""

    scale: float
    zero_point: int
    signed: bool

    @property
    def dtype(self) -> type[np.int8 | np.uint8]:
        return np.int8 if self.signed else np.uint8

    def rounded(self, values: Array) -> Array:
        """What the quantiser makes of float values."""
        low, high = (-127, 127) if self.signed else (0, 255)
        return np.asarray((np.clip(np.rint(values / self.scale) + self.zero_point, low, high) - self.zero_point) * self.scale)


def activation_scale(observed: Observed, method: str, signed: bool) -> Scale:
    """``method``: "minmax", "percentile P" (P in percent, 99.99), or "mse". Of channel-wise observations, one scale for all of them."""
    values, counts, low, high = _merged(observed)
    if method.startswith("percentile"):
        low, high = _percentile(values, counts, low, high, float(method.split()[1]))
    elif method == "mse":
        low, high = _least_error(values, counts, low, high, signed)
    return scale_of(low, high, signed)


def scale_of(low: float, high: float, signed: bool) -> Scale:
    low, high = min(low, 0.0), max(high, 0.0)
    if signed:
        return Scale(float(np.float32(max(-low, high, TINY) / 127)), 0, True)
    scale = max(high - low, TINY) / 255
    return Scale(float(np.float32(scale)), int(np.clip(np.rint(-low / scale), 0, 255)), False)


def weight_scale(weight: Array, axis: int, bits: int, clip: bool) -> Array:
    """(K,) symmetric scales along ``axis``. ``clip``: the one of 13 fractions of the largest magnitude with the least squared error."""
    most = 2 ** (bits - 1) - 1
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scales: Array = np.maximum(np.abs(rows).max(axis=1), TINY) / most
    if not clip:
        return scales.astype(np.float32)
    errors = []
    for shrink in WEIGHT_SHRINKS:
        tried = (scales * shrink)[:, None]
        errors.append(np.square(rows - np.clip(np.rint(rows / tried), -most, most) * tried).sum(axis=1))
    best: Array = scales * WEIGHT_SHRINKS[np.argmin(errors, axis=0)]
    return best.astype(np.float32)


def _merged(observed: Observed) -> tuple[Array, Array, float, float]:
    """(values, counts) of one histogram over all channels, and its extremes."""
    low, high = float(observed.low.min()), float(observed.high.max())
    if len(observed.low) == 1:
        return observed.centres[0], observed.counts[0], low, high
    places = ((observed.centres - low) * (BINS / max(high - low, TINY))).astype(np.int64).clip(0, BINS - 1)
    counts = np.bincount(places.ravel(), weights=observed.counts.ravel(), minlength=BINS)
    return low + (high - low) * (np.arange(BINS) + 0.5) / BINS, counts, low, high


def _percentile(values: Array, counts: Array, low: float, high: float, percent: float) -> tuple[float, float]:
    """The range that leaves (100 - percent) / 2 percent of the values out on each side."""
    share = np.cumsum(counts) / max(counts.sum(), 1.0)
    tail = (1.0 - percent / 100.0) / 2
    first, last = int(np.searchsorted(share, tail, side="right")), int(np.searchsorted(share, 1.0 - tail))
    half = (values[1] - values[0]) / 2 if len(values) > 1 else 0.0
    return max(low, float(values[min(first, len(values) - 1)] - half)), min(high, float(values[min(last, len(values) - 1)] + half))


def _least_error(values: Array, counts: Array, low: float, high: float, signed: bool) -> tuple[float, float]:
    """Least squared error over the histogram: both ends shrunk together, then each alone."""
    kept = counts > 0
    values, counts = values[kept], counts[kept]

    def error(ends: tuple[float, float]) -> float:
        return float((counts * np.square(values - scale_of(*ends, signed).rounded(values))).sum())

    best = min(((low * shrink, high * shrink) for shrink in SHRINKS), key=error)
    if signed:
        return best
    for end, shrink in itertools.product((0, 1, 0), SHRINKS):
        extreme = (low, high)[end] * shrink
        best = min(best, (extreme, best[1]) if end == 0 else (best[0], extreme), key=error)
    return best
