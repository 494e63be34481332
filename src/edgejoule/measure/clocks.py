"""The offset between a remote meter's clock and the device's: by exchanged stamps, or by a load pattern found again in the trace.

An offset is what must be added to the meter's stamps to get the device's, as in Trace.offset_s. Pure numpy: opens no connection and
reads no clock. What it does not know: a sensor's own delay. By stamps it stays in the trace; by a load pattern it is part of the
offset (half a boxcar, about one time constant of an exponential filter), which is what puts the energy where it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgejoule.errors import MeterError
from edgejoule.records import Trace

THIRDS = 3  # of a run of exchanges, to see a drift
FEWEST_DRIFT = 6  # exchanges
ALIKE = 0.9  # a second peak this near the first makes the offset ambiguous
FAINT = 0.5  # a correlation below this is no pattern
FEWEST, MOST = 20, 2**20  # samples of a trace; points of the common grid
PARTS = 8  # of the pattern, each left out once
LARGEST = 1e12  # seconds, watts
COVERED = 0.5  # of the pattern, that the trace must see at a lag

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Offset:
    """Seconds to add to the meter's stamps, give or take ``uncertainty_s``; ``how`` says where they come from."""

    offset_s: float
    uncertainty_s: float
    how: str


def aligned(trace: Trace, offset: Offset) -> Trace:
    """The trace on the device's clock: the same samples, with the offset and its uncertainty noted."""
    return replace(trace, offset_s=offset.offset_s, offset_uncertainty_s=offset.uncertainty_s)


def offset_by_exchange(samples: Sequence[tuple[float, float, float]]) -> Offset:
    """From triples of seconds (asked, the remote's stamp, answered), asked and answered on the device's clock: NTP's rule (RFC 5905).

    The exchange with the least round trip decides; the true offset lies within half of that trip. Where six exchanges or more span a
    run and the clocks drift apart, the offset is that of the run's middle, and the uncertainty covers both of its ends.
    Raises MeterError where there is no exchange, or one whose answer came before it was asked.
    """
    found = np.asarray(samples, dtype=np.float64).reshape(-1, 3) if len(samples) else np.empty((0, 3))
    if not len(found) or not np.all(np.abs(found) < LARGEST) or np.any(found[:, 2] < found[:, 0]):
        raise MeterError(f"{len(found)} exchanges of stamps give no offset: expected at least one, asked before it was answered")
    half = (found[:, 2] - found[:, 0]) / 2
    offset = found[:, 0] + half - found[:, 1]
    best = int(np.argmin(half))
    how = f"the least round trip of {len(found)} exchanges, {2e3 * half[best]:.3g} ms"
    if len(found) >= FEWEST_DRIFT:
        order = np.argsort(found[:, 0], kind="stable")
        first, last = (part[np.argmin(half[part])] for part in (order[: len(order) // THIRDS], order[-(len(order) // THIRDS) :]))
        apart, passed = float(offset[last] - offset[first]), float(found[last, 0] - found[first, 0])
        span = float(np.ptp(found[:, 0]))
        if abs(apart) > half[first] + half[last] and passed > 0:
            rate, begin = apart / passed, float(np.min(found[:, 0]))
            middle = float(offset[first] + rate * (begin + span / 2 - found[first, 0]))
            # the line through the two, drawn on to an end of the run, is off there by what both are off, the farther the more
            weights = (np.array([begin, begin + span]) - found[first, 0]) / passed
            drawn_on = float(np.max(np.abs(1 - weights) * half[first] + np.abs(weights) * half[last]))
            return Offset(middle, abs(rate) * span / 2 + drawn_on, f"{how}; the clocks drift by {1e6 * rate:.3g} ppm")
    return Offset(float(offset[best]), float(half[best]), how)


def offset_by_step(times_a: Samples, load_a: Samples, times_b: Samples, power_b: Samples) -> Offset:
    """From a load that was switched: its level ``load_a`` (N,) from each of ``times_a`` on, and the meter's trace, (M,) seconds and watts.

    The lag with the largest correlation over the part that both cover, refined by a parabola between grid points; the uncertainty is of
    95 %, a jackknife over eight parts of the pattern, and no less than the trace's sampling allows. Raises MeterError where the pattern
    is not in the trace, or fits at several places (a load of even beats: use phases of random length).
    """
    edges, level = _clean(times_a, load_a, 3, "the load's")
    at, watts = _clean(times_b, power_b, FEWEST, "the meter's")
    poll = float(np.median(np.diff(at)))
    step = max(poll / 4, (np.ptp(edges) + np.ptp(at)) / MOST)
    grid_a = np.arange(edges[0], edges[-1], step)
    pattern = level[np.searchsorted(edges, grid_a, side="right") - 1]
    # the mean over each cell, so that an edge between two grid points counts by its place
    pattern = np.diff(_held_sum(edges, level, np.append(grid_a, grid_a[-1] + step) - step / 2)) / step
    trace = np.interp(np.arange(at[0], at[-1], step), at, watts)
    if len(pattern) < FEWEST or np.ptp(pattern) <= 0 or np.ptp(trace) <= 0:
        raise MeterError("the load or the power never changes: expected a load that was switched on and off, and the trace of it")
    match = _correlations(pattern, trace)
    peak = int(np.argmax(match))
    _judge(match, peak)
    lag = _refined(match, peak)
    parts = np.array_split(np.arange(len(pattern)), PARTS)
    lags = np.array([_near(pattern, trace, part, peak) for part in parts])
    scatter = float(np.sqrt((PARTS - 1) / PARTS * np.sum((lags - np.mean(lags)) ** 2))) * step
    moves = max(1, int(np.count_nonzero(np.diff(level))))
    uncertainty = 2 * float(np.hypot(scatter, poll / np.sqrt(12 * moves)))
    offset = edges[0] - at[0] - (lag - (len(pattern) - 1)) * step
    return Offset(float(offset), uncertainty, f"a load pattern of {moves} steps found in the trace, correlation {match[peak]:.2f}")


def _clean(times: Samples, values: Samples, fewest: int, whose: str) -> tuple[Samples, Samples]:
    t, v = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    fits = t.shape == v.shape and t.ndim == 1 and len(t) >= fewest
    if not fits or not np.all((np.abs(t) < LARGEST) & (np.abs(v) < LARGEST)) or not np.all(np.diff(t) > 0):
        raise MeterError(
            f"{whose} {t.size} stamps and {v.size} values give no offset: expected {fewest} pairs or more of numbers, in order of time"
        )
    return t, v


def _held_sum(edges: Samples, level: Samples, at: Samples) -> Samples:
    """The integral of the load up to each instant: its level holds from one stamp to the next."""
    sums = np.concatenate(([0.0], np.cumsum(np.diff(edges) * level[:-1])))
    inside = np.interp(at, edges, sums)
    return np.asarray(inside + np.minimum(at - edges[0], 0.0) * level[0] + np.maximum(at - edges[-1], 0.0) * level[-1])


def _correlations(pattern: Samples, trace: Samples, weights: Samples | None = None) -> Samples:
    """Pearson's correlation at every lag over what both cover; -1 where little is. At entry k pattern[0] lies at trace[k - N + 1].

    By FFT: sums of products over the overlap are correlations with the ones that mark where either is known.
    """
    known = np.ones_like(pattern) if weights is None else weights
    x, y = pattern - np.mean(pattern), trace - np.mean(trace)
    size = len(x) + len(y) - 1
    padded = 1 << (size - 1).bit_length()

    def sums(a: Samples, b: Samples) -> Samples:
        return np.fft.irfft(np.fft.rfft(b, padded) * np.fft.rfft(a[::-1], padded), padded)[:size]

    ones = np.ones_like(y)
    n = np.maximum(sums(known, ones), 1.0)
    mean_x, mean_y = sums(x * known, ones) / n, sums(known, y) / n
    var_x = sums(x * x * known, ones) / n - mean_x**2
    var_y = sums(known, y * y) / n - mean_y**2
    both = sums(x * known, y) / n - mean_x * mean_y
    total_x, total_y = float(np.sum(known * x * x) / np.sum(known)), float(np.var(y))
    # an overlap that holds hardly a step correlates with anything
    good = (n >= COVERED * np.sum(known)) & (var_x > 0.1 * total_x) & (var_y > 1e-9 * total_y)
    return np.where(good, both / np.sqrt(np.where(good, var_x * var_y, 1.0)), -1.0)


def _judge(match: Samples, peak: int) -> None:
    """Raises MeterError where the peak is faint, or where another one is as good."""
    top = float(match[peak])
    if top < FAINT:
        raise MeterError(f"the load's pattern is not in the trace (best correlation {top:.2f}): check that the meter sees this device")
    low = np.flatnonzero(match < top / 2)
    left, right = low[low < peak], low[low > peak]
    beside = np.concatenate((match[: left[-1]] if len(left) else [], match[right[0] :] if len(right) else []))
    if len(beside) and float(np.max(beside)) > ALIKE * top:
        raise MeterError(
            f"the load's pattern fits the trace at several places (correlations {top:.2f} and {float(np.max(beside)):.2f}): "
            "switch the load in phases of random length, and record idle before and after"
        )


def _refined(match: Samples, peak: int) -> float:
    """The top of a parabola through the peak and its neighbours, in grid points."""
    if not 0 < peak < len(match) - 1 or min(match[peak - 1], match[peak + 1]) < 0:
        return float(peak)
    before, top, after = (float(match[peak + k]) for k in (-1, 0, 1))
    bend = before - 2 * top + after
    return peak + (0.5 * (before - after) / bend if bend < 0 else 0.0)


def _near(pattern: Samples, trace: Samples, left_out: npt.NDArray[np.intp], peak: int) -> float:
    """The lag without a part of the pattern, looked for on the slope of the peak that all of it has."""
    known = np.ones_like(pattern)
    known[left_out] = 0.0
    match = _correlations(pattern, trace, known)
    reach = max(8, len(pattern) // (4 * PARTS))
    start = max(0, peak - reach)
    return _refined(match, start + int(np.argmax(match[start : peak + reach + 1])))
