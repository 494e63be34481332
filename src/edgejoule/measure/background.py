"""What a power curve shows while nothing runs: the background, which may drift, and how far idle samples scatter around it. Pure numpy.

The background is piecewise linear through the idle stretches before, between and after the regions of activity. A first
guess needs no threshold: samples above the middle of the range are active, and in what is left the lowest level counts,
unless it is reached by a jump upwards (that is a lower level of activity, not drift). Later rounds take the stretches that
the regions leave, and drop those where power is still falling after a region: a tail is not idle.
Knows no inference, no threshold and no unit but SI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SHORTEST = 20  # samples: what is shorter is neither a region nor an idle stretch (measurement.md 0)
SIGMA = 1.4826  # standard deviations per median absolute deviation, for a normal distribution
CHUNK, CHUNKS = 256, 64  # an idle stretch has one knot per so many samples, and at most so many knots
JUMP, JUMP_ACROSS = 0.05, 0.25  # of the range: more than this from one idle stretch to the next (across activity) is no drift
FLOOR = 5e-4  # of the range: a noiseless idle still gets a deviation
SETTLED = 0.003  # of the range: how much an idle stretch after a region may fall, beside its noise
TAIL = 1.5  # times the fall within it: how much higher than the idle around all regions a tail may lift what is between them
SLOW = 0.015  # of the range: the same where power takes most of the gap to come back, so that little of it is idle
INLIER = 3.5  # deviations
SEEN = 100_000  # samples that a quantile is taken from

Samples = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Curve:
    """Power over time, and the joules since the first sample: float64 arrays of one length (N,), times ascending."""

    times_s: Samples
    power_w: Samples
    joules: Samples


@dataclass(frozen=True, slots=True)
class Background:
    """The background at every sample (N,), the deviation of idle samples around it, and the range between idle and active power."""

    power_w: Samples
    sigma_w: float
    range_w: float
    unsettled: int = 0  # gaps between regions in which power was still falling


def running(values: Samples, width: int, combine: Callable[[Samples, Samples], Any] = np.minimum) -> Samples:
    """(N,) -> (N - width + 1,): the least (or, with ``np.maximum``, the greatest) of every ``width`` neighbours."""
    have = 1
    while have < width:
        step = min(have, width - have)
        values, have = combine(values[:-step], values[step:]), have + step
    return values


def smooth(values: Samples, width: int) -> Samples:
    """(N,) -> (N,): centred means of ``width`` (odd) neighbours; the first and last value stand for those beyond the ends."""
    half = width // 2
    total = np.cumsum(np.concatenate((np.full(half + 1, values[0]), values, np.full(half, values[-1]))))
    means: Samples = (total[width:] - total[:-width]) / width
    return means


def runs(mask: Mask) -> tuple[Index, Index]:
    """First indices and ends (one past the last) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges[::2], edges[1::2]


def first_background(curve: Curve) -> Background | None:
    """A first guess; None where nothing lasting ``SHORTEST`` samples stands out from the rest (constant power, noise)."""
    power = curve.power_w
    if len(power) < 3 * SHORTEST:
        return None
    # A feature shorter than SHORTEST moves neither bound.
    low, high = float(running(power, SHORTEST, np.maximum).min()), float(running(power, SHORTEST).max())
    if not high - low > 1e-9 * max(abs(high), abs(low)):
        return None
    noise = SIGMA * float(np.median(np.abs(np.diff(_some(power))))) / np.sqrt(2)
    calm = smooth(power, 5)
    first, end = runs(calm > (low + high) / 2)
    lasting = end - first >= SHORTEST
    starts, stops, after_core = _stretches(first[lasting], end[lasting], len(power))
    if not len(starts):
        return None
    ceiling = np.concatenate((running(calm, 10, np.maximum), np.full(9, high)))
    levels = np.array([ceiling[a:b].min() for a, b in zip(starts, stops, strict=True)])
    idle = _reached_by_drift(levels, after_core, (high - low), 4 * noise)
    middles = (curve.times_s[starts] + curve.times_s[stops - 1]) / 2
    level = np.interp(curve.times_s, middles[idle], levels[idle])
    return Background(level, max(noise, FLOOR * (high - low)), high - low)


def refined(curve: Curve, found: Background, first: Index, end: Index, about_w: float = 0.0, settling: float = 0.0) -> Background:
    """The background through what lies outside the regions [first, end), in order and apart; ``found`` where that is nothing.

    ``about_w`` says how far ``found`` may be off as yet, in watts; where it is 0, tails are looked for. ``settling`` is how many samples
    power usually takes to come back after a core.
    """
    residual = curve.power_w - found.power_w
    starts, stops, follows = _stretches(first, end, len(residual))
    long = _worth(starts, stops, follows, first) if about_w == 0 else stops - starts >= SHORTEST
    starts, stops, follows = starts[long], stops[long], follows[long]
    inlying = np.abs(residual) <= max(INLIER * found.sigma_w, about_w)
    falling, fall_w = np.zeros(len(starts), dtype=bool), 0.0
    if about_w == 0 and np.any(follows):
        starts, falling, fall_w = _tails(np.where(inlying, residual, 0.0), starts, stops, follows, found)
    if np.all(falling):
        return found
    between = int(np.count_nonzero(falling & (stops <= first[-1]))) if len(first) else 0
    starts, stops = starts[~falling], stops[~falling]
    offset, when, share = _means(curve.times_s, residual, inlying, starts, stops)
    for i in np.flatnonzero(share < 0.5):  # the last round was too far off here: most samples lie outside
        offset[i], when[i] = np.median(residual[starts[i] : stops[i]]), np.mean(curve.times_s[starts[i] : stops[i]])
    level = np.interp(when, curve.times_s, found.power_w) + offset
    slow = len(first) > 1 and settling > float(np.median(first[1:] - end[:-1]))
    if fall_w > 0 or slow:
        outside = (stops <= first[0]) | (starts >= end[-1])
        lift_w = max(TAIL * fall_w, SLOW * found.range_w * slow)
        if _explained(when, level, outside, found.sigma_w / np.sqrt(stops - starts), lift_w):
            when, level, starts, stops = when[outside], level[outside], starts[outside], stops[outside]
    level = _through(curve.times_s, *_drawn_out(when, level, curve.times_s[starts], curve.times_s[stops - 1], fall_w == 0))
    quiet = np.zeros(len(residual), dtype=bool)
    for a, b in zip(starts, stops, strict=True):
        quiet[a:b] = True
    sigma = max(_spread(_some((curve.power_w - level)[quiet]), _some(curve.power_w[quiet]), found.range_w), FLOOR * found.range_w)
    return Background(level, sigma, found.range_w, between)


def _worth(starts: Index, stops: Index, follows: Mask, first: Index) -> Mask:
    """Which stretches are long enough. Where most gaps are short of that, those that just reach it do so by noise."""
    size = stops - starts
    between = follows & (stops <= first[-1]) if len(first) else follows
    scant = between & (size <= 2 * SHORTEST)
    reached = scant & (size >= SHORTEST)
    gaps = len(first) - 1 - np.count_nonzero(between & ~scant)  # some have no stretch at all
    return (size >= SHORTEST) & ~(reached & (2 * np.count_nonzero(reached) < gaps))


def _tails(residual: Samples, starts: Index, stops: Index, follows: Mask, found: Background) -> tuple[Index, Mask, float]:
    """Where the stretches may start for the tails of the regions before them, those in which power still falls then, and by how much.

    Where it falls from the first half to the second in the mean of all, the first half is left out, of all. No fall is 0 W.
    """
    total = np.concatenate(([0.0], np.cumsum(residual)))

    def falls(starts: Index) -> tuple[Samples, Samples, float, float]:
        middle = (starts + stops) // 2
        fall = (total[middle] - total[starts]) / (middle - starts) - (total[stops] - total[middle]) / (stops - middle)
        noise = 2 * found.sigma_w / np.sqrt(stops - starts)  # of the difference of two means of half the samples each
        count = np.count_nonzero(follows)
        return fall, noise, float(np.mean(fall[follows])), float(np.sqrt(np.sum(noise[follows] ** 2))) / count

    fall, noise, mean, spread = falls(starts)
    steepest = mean if mean > 3 * spread else 0.0
    if steepest:
        starts = np.where(follows, (starts + stops) // 2, starts)
        fall, noise, mean, spread = falls(starts)
    settled_w = SETTLED * found.range_w
    falling: Mask = follows & (fall > 3 * noise + settled_w)
    if mean > 3 * spread + settled_w:
        falling |= follows & (fall > settled_w)
    return starts, falling, steepest


def _explained(when: Samples, level: Samples, outside: Mask, noise: Samples, lift_w: float) -> bool:
    """Whether the idle around all regions explains that between them, but for noise and for tails that lift it by up to ``lift_w``."""
    if np.all(outside) or not (outside[0] and outside[-1]):
        return False
    left = level[~outside] - np.interp(when[~outside], when[outside], level[outside])
    mean, noise = float(np.mean(left)), noise[~outside]
    spread = float(np.sqrt(np.sum(noise**2))) / len(left)
    scatter = float(np.mean(((left - mean) / noise) ** 2))
    return -3 * spread < mean < 3 * spread + lift_w and scatter < 1 + 3 * np.sqrt(2 / len(left))


def _stretches(first: Index, end: Index, size: int) -> tuple[Index, Index, Mask]:
    """What lies outside the regions, long stretches in pieces: starts, stops, and whether a piece comes right after a region."""
    starts: list[Index] = []
    stops: list[Index] = []
    follows: list[bool] = []
    for number, (a, b) in enumerate(zip(np.append(0, end), np.append(first, size), strict=True)):
        if b <= a:
            continue
        pieces = min(CHUNKS, max(1, int(b - a) // CHUNK))
        edges = np.linspace(a, b, pieces + 1).astype(np.intp)
        starts.append(edges[:-1])
        stops.append(edges[1:])
        follows += [number > 0] + [False] * (pieces - 1)
    if not starts:
        return np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.bool_)
    return np.concatenate(starts), np.concatenate(stops), np.array(follows)


def _reached_by_drift(levels: Samples, after_core: Mask, range_w: float, noise_w: float) -> Mask:
    """Which stretches are idle: those on a plateau that is not entered by a jump up nor left by a jump down. The lowest one always is."""
    step = np.diff(levels)
    allowed = np.where(after_core[1:], JUMP_ACROSS, JUMP) * range_w + noise_w
    plateau = np.concatenate(([0], np.cumsum(np.abs(step) > allowed)))
    lifted = np.concatenate((plateau[1:][step > allowed], plateau[:-1][step < -allowed]))
    return ~np.isin(plateau, lifted)


def _means(times: Samples, values: Samples, counted: Mask, starts: Index, stops: Index) -> tuple[Samples, Samples, Samples]:
    """Per stretch [start, stop), in order and apart: the mean value and time of the samples that count, and the share of them."""
    bounds = np.stack((starts, stops), axis=1).ravel()
    bounds = bounds[:-1] if bounds[-1] == len(values) else bounds
    many = np.add.reduceat(counted, bounds, dtype=np.float64)[::2]
    some = np.maximum(many, 1.0)
    total, when = (np.add.reduceat(np.where(counted, of, 0.0), bounds)[::2] for of in (values, times))
    return total / some, when / some, many / (stops - starts)


def _drawn_out(when: Samples, level: Samples, start_s: Samples, stop_s: Samples, both: bool) -> tuple[Samples, Samples]:
    """The knots, and one more where a long idle stretch meets a region, straight on from its last two: drift does not stop there.

    At its end; at its beginning only where ``both``, for a tail looks like drift.
    """
    joined = start_s[1:] <= stop_s[:-1] + (stop_s - start_s)[:-1] / 8  # pieces of one stretch
    slope = np.diff(level) / np.diff(when)
    end = np.flatnonzero(np.append(False, joined) & np.append(~joined, True))
    begin = np.flatnonzero(np.append(joined, False) & np.append(True, ~joined) & both)
    more = np.concatenate((stop_s[end], start_s[begin]))
    above = np.concatenate((level[end] + slope[end - 1] * (stop_s - when)[end], level[begin] + slope[begin] * (start_s - when)[begin]))
    order = np.argsort(np.concatenate((when, more)))
    return np.concatenate((when, more))[order], np.concatenate((level, above))[order]


def _through(times: Samples, when: Samples, level: Samples) -> Samples:
    """Piecewise linear through the knots, and straight on at both ends for as far as the outermost stretches reach."""
    if len(when) < 2:
        return np.full(len(times), level[0])
    slope = np.diff(level) / np.diff(when)
    ends = (level[0] + slope[0] * (times[0] - when[0]), level[-1] + slope[-1] * (times[-1] - when[-1]))
    # A knot far from the end would be drawn out too far: there the level stays.
    reach = np.diff(when)[[0, -1]]
    head = ends[0] if when[0] - times[0] <= reach[0] else level[0]
    tail = ends[1] if times[-1] - when[-1] <= reach[1] else level[-1]
    return np.interp(times, np.concatenate(([times[0]], when, [times[-1]])), np.concatenate(([head], level, [tail])))


def _spread(around: Samples, power: Samples, range_w: float) -> float:
    """The robust deviation of idle samples; of a coarse sensor, where that may be 0, at least the deviation within two steps."""
    spread = SIGMA * float(np.median(np.abs(around - np.median(around))))
    step = _quantum(power, range_w)
    near = around[np.abs(around) <= 2.5 * step]
    return max(spread, float(np.sqrt(np.mean(near**2) + step**2 / 12)) if step and len(near) else 0.0)


def _quantum(power: Samples, range_w: float) -> float:
    """The step between the values of a coarse sensor; 0 where values are too many to be steps."""
    grain = 1e-7 * range_w
    steps = np.unique(np.round(power / grain))
    return float(np.min(np.diff(steps))) * grain if 1 < len(steps) <= len(power) / 20 else 0.0


def _some(values: Samples) -> Samples:
    """At most ``SEEN`` of the values in runs of neighbours, evenly from all over: enough for a quantile."""
    if len(values) <= SEEN:
        return values
    length = 100
    starts = np.linspace(0, len(values) - length, SEEN // length).astype(np.intp)
    picked: Samples = values[(starts[:, None] + np.arange(length)).ravel()]
    return picked
