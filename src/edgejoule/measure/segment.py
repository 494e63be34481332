"""Finds N inferences in a power curve, as EdgeViT (arXiv 2205.03436) did: contiguous regions of significantly higher draw. Pure numpy.

A region begins above background + k deviations and ends below half of that; short dips are closed, what is shorter than 20
samples is dropped, and then exactly N must be left (measurement.md 0 and 1.4). A region is counted from where power leaves the
background to where it is back, so that the threshold cuts no tail off; where power does not come back between two inferences
they are cut apart at the lowest point, which leaves their sum alone. All is done again at half and twice the threshold.
Knows no file, no rail and no clock: times are those of the curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.background import SHORTEST, Background, Curve, Index, Mask, Samples, first_background, refined, runs, smooth
from edgejoule.records import Caveat, Segment

K = 6.0
MOST_W = 1e9  # beyond the power of any device: a wrong unit or a damaged file
HYSTERESIS = 0.5  # of the threshold, to leave a region
DIP, DIPS = 0.05, 3  # a dip is closed that is shorter than this share of the usual region, or than so many samples
SLOWEST_HZ = 350.0  # arXiv 2206.10377, by measurement.md 1.4
SENSITIVITY = (0.5, 1.0, 2.0)  # times k
SPREAD = 0.02  # between the energies at those
COARSE = (0.2, 0.1, 0.04)  # of the range: the least threshold of the first rounds, whose background is a guess
ROUNDS = 5  # after those
CALM = 9  # neighbours whose mean tells that power is back at the background
BACK, BACK_SHARE = 0.1, 5e-4  # deviations, or a share of the range, above it that still count as back
LEVELS, HIGHEST = 24, 0.5  # thresholds tried where tails overlap, up to this share of the active level
VALLEY = 0.1  # of the active level: how much a valley must be lower than the peaks on both sides


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions in order, as indices into the curve: cores [first, end) above the threshold, and [start, stop] as far as they reach."""

    first: Index
    end: Index
    start: Index
    stop: Index
    leaves: Index  # up to here, from the calm of the region before, power may be taken for background
    calm: Index
    whole: Mask  # neither begins before the curve nor ends after it
    short: int = 0  # runs above the threshold that were too short
    cuts: int = 0  # between regions that power does not come back between

    def count(self) -> int:
        return int(np.count_nonzero(self.whole))


@dataclass(frozen=True, slots=True)
class Found:
    """N inferences and how they were found. Energies in joules; ``sensitivity`` is {k: net of all, None where not N were found}."""

    segments: tuple[Segment, ...]
    background: Background
    threshold_w: float  # above the background
    sensitivity: dict[str, float | None]
    caveats: tuple[Caveat, ...]

    def energies(self, net: bool = False) -> tuple[float, float] | None:
        """Mean and standard deviation (n - 1) over the segments; None for fewer than two, of which there is no deviation."""
        joules = [one.net_energy_j if net else one.energy_j for one in self.segments]
        return (float(np.mean(joules)), float(np.std(joules, ddof=1))) if len(joules) > 1 else None


def segmented(curve: Curve, count: int, k: float = K) -> Found:
    """Exactly ``count`` inferences. Raises MeterError saying how many were found at which threshold, and what to do."""
    if count < 1:
        raise MeterError(f"--segments {count}: expected the number of inferences in the trace, at least 1")
    if not (np.isfinite(k) and k > 0):
        raise MeterError(f"--k {k:g}: expected a number of deviations above 0 (6 is usual)")
    if not float(np.max(np.abs(curve.power_w), initial=0.0)) <= MOST_W:
        raise MeterError(
            f"the trace holds powers above {MOST_W:g} W, or none: look at its unit, for inferences are expected well below that"
        )
    return _segmented(curve, count, k)


def _segmented(curve: Curve, count: int, k: float) -> Found:
    found = _first_search(curve, k)
    if found is None:
        raise MeterError(
            f"found no region of {SHORTEST} samples or more that stands out from the rest of the trace, expected {count}: "
            "check that it holds both idle and the inferences, and that it was sampled finely enough"
        )
    regions, background = found
    cut = _exactly(curve, background, regions, count, k)
    if cut is None:
        raise MeterError(_refusal(curve, background, regions, count, k))
    segments = _segments(curve, background, cut)
    net = {f"{k * factor:g}": _net_at(curve, background, count, k * factor) for factor in SENSITIVITY if factor != 1}
    net[f"{k:g}"] = sum(one.net_energy_j for one in segments)
    sensitivity = {key: net[key] for key in sorted(net, key=float)}
    doubts = [*_sampling(curve, cut), *_tails(cut, background), *_reach(curve, cut), *_sensitive(sensitivity, net[f"{k:g}"])]
    return Found(segments, background, k * background.sigma_w, sensitivity, tuple(doubts))


def _first_search(curve: Curve, k: float) -> tuple[Regions, Background] | None:
    """Regions and background from nothing: with thresholds of a share of the range first, for the first background is a guess."""
    background = first_background(curve)
    if background is None:
        return None
    for share in COARSE:
        least_w = share * background.range_w
        regions = _regions(curve, background, max(k * background.sigma_w, least_w), least_w / 4)
        background = refined(curve, background, regions.leaves, regions.calm, least_w)
    return _search(curve, background, k)


def _search(curve: Curve, background: Background, k: float) -> tuple[Regions, Background]:
    """Regions and background in turn, until the regions stay."""
    before = np.empty(0, np.intp)
    for _ in range(ROUNDS):
        back_w = max(BACK * background.sigma_w, BACK_SHARE * background.range_w)
        regions = _regions(curve, background, k * background.sigma_w, back_w)
        settling = float(np.median(regions.calm - regions.end)) if len(regions.end) else 0.0
        background = refined(curve, background, regions.leaves, regions.calm, settling=settling)
        cores = np.concatenate((regions.first, regions.end))
        if np.array_equal(before, cores):
            break
        before = cores
    return regions, background


def _regions(curve: Curve, background: Background, threshold: float, back_w: float) -> Regions:
    residual = curve.power_w - background.power_w
    first, end = _above(residual, threshold, HYSTERESIS * threshold)
    lasting = end - first >= SHORTEST
    usual = float(np.median((end - first)[lasting])) if np.any(lasting) else 0.0
    first, end = _merged(first, end, DIP * usual)
    lasting = end - first >= SHORTEST
    short = int(np.count_nonzero(~lasting))
    first, end = first[lasting], end[lasting]
    return Regions(first, end, *_outwards(residual, first, end, back_w), (first > 0) & (end < len(residual)), short)


def _above(values: Samples, enter: float, leave: float) -> tuple[Index, Index]:
    """Runs above ``leave`` that somewhere rise above ``enter``."""
    first, end = runs(values > leave)
    if not len(first):
        return first, end
    kept = np.maximum.reduceat(values, first) > enter  # what lies between two runs is below both
    return first[kept], end[kept]


def _merged(first: Index, end: Index, dip: float) -> tuple[Index, Index]:
    """Runs with the gaps between them closed that are shorter than ``dip`` samples and than both neighbours, or than ``DIPS``."""
    if len(first) < 2:
        return first, end
    length = end - first
    apart = first[1:] - end[:-1] >= np.maximum(DIPS, np.minimum(dip, np.minimum(length[1:], length[:-1])))
    return first[np.concatenate(([True], apart))], end[np.concatenate((apart, [True]))]


def _outwards(residual: Samples, first: Index, end: Index, back_w: float) -> tuple[Index, Index, Index, Index]:
    """How far regions reach: twice as far as from the core to where power is back, for by then a tail hides in the noise.

    To the left at most to the middle of the gap, to the right at most to where the next begins: a tail belongs to what caused it.
    """
    size = len(residual)
    if not len(first):
        return first, end, first, end
    back = np.flatnonzero(smooth(residual, CALM) <= back_w)
    before = np.searchsorted(back, first, side="right") - 1
    padded = np.concatenate((back, [size - 1])).astype(np.intp)
    leaves = np.where(before >= 0, padded[np.maximum(before, 0)], 0)
    start = np.maximum(2 * leaves - first, np.concatenate(([0], (end[:-1] + first[1:]) // 2)))
    following = np.concatenate((start[1:], [size - 1]))
    returns = padded[np.searchsorted(back, end - 1, side="left")]
    stop = np.minimum(2 * returns - (end - 1), following)
    calm = np.minimum(stop, np.maximum(returns, np.append(leaves[1:], size - 1) - 2 * SHORTEST)) + 1
    return start, stop, np.maximum(leaves, start), calm


def _exactly(curve: Curve, background: Background, regions: Regions, count: int, k: float) -> Regions | None:
    """The whole regions if they are ``count``; if fewer, cut at their valleys by the lowest threshold that gives ``count``."""
    whole = Regions(*(getattr(regions, name)[regions.whole] for name in ("first", "end", "start", "stop", "leaves", "calm", "whole")))
    if whole.count() == count:
        return whole
    if whole.count() > count or not whole.count():
        return None
    residual = curve.power_w - background.power_w
    calm = smooth(residual, 5)
    inside = np.concatenate([residual[a:b] for a, b in zip(whole.first, whole.end, strict=True)])
    active = float(np.quantile(inside, 0.95))
    noise = k * background.sigma_w / np.sqrt(5)
    for level in np.linspace(k * background.sigma_w, HIGHEST * active, LEVELS):
        first, end = _above(calm, level + max(noise, VALLEY * active), level)
        lasting = end - first >= SHORTEST
        first, end = first[lasting], end[lasting]
        owner = np.searchsorted(whole.start, first, side="right") - 1
        within = (owner >= 0) & (end - 1 <= whole.stop[np.maximum(owner, 0)])
        first, end, owner = first[within], end[within], owner[within]
        same = np.flatnonzero(owner[1:] == owner[:-1]) if len(owner) else owner
        if len(whole.first) + len(same) == count:
            valleys = np.array([a + np.argmin(calm[a:b]) for a, b in zip(end[same], first[same + 1], strict=True)], dtype=np.intp)
            return _cut(whole, valleys)
    return None


def _cut(whole: Regions, valleys: Index) -> Regions:
    """The regions cut at the valleys: neighbours share the sample, so that their energies add up."""
    start, stop = np.sort(np.concatenate((whole.start, valleys))), np.sort(np.concatenate((whole.stop, valleys)))
    first, end = np.sort(np.concatenate((whole.first, valleys))), np.sort(np.concatenate((whole.end, valleys)))
    return Regions(first, end, start, stop, start, stop, np.ones(len(start), dtype=bool), cuts=len(valleys))


def _segments(curve: Curve, background: Background, regions: Regions) -> tuple[Segment, ...]:
    times, level = curve.times_s, background.power_w
    idle = np.concatenate(([0.0], np.cumsum(np.diff(times) * (level[1:] + level[:-1]) / 2)))
    # Shown from half a sample before the first above the threshold to half a sample after the last, so that a short inference is not drawn
    # out. What is above the background is taken from all that the region reaches, tails included; the background only from what is shown.
    before, after = np.maximum(regions.first - 1, regions.start), np.minimum(regions.end, regions.stop)
    first, last = (times[before] + times[regions.first]) / 2, (times[regions.end - 1] + times[after]) / 2
    net = curve.joules[regions.stop] - curve.joules[regions.start] - (idle[regions.stop] - idle[regions.start])
    gross = net + np.interp(last, times, idle) - np.interp(first, times, idle)
    columns = (first, last, gross, net)
    return tuple(Segment(*map(float, row)) for row in zip(*columns, strict=True))


def _net_at(curve: Curve, background: Background, count: int, k: float) -> float | None:
    regions, background = _search(curve, background, k)
    cut = _exactly(curve, background, regions, count, k)
    return None if cut is None else sum(one.net_energy_j for one in _segments(curve, background, cut))


# ---------------------------------------------------------------- doubts


def _sampling(curve: Curve, regions: Regions) -> list[Caveat]:
    rate = 1 / float(np.median(np.diff(curve.times_s)))
    fewest = int(np.min(regions.end - regions.first))
    if rate >= SLOWEST_HZ and fewest >= SHORTEST:
        return []
    return [caveat("coarse_sampling", f"{rate:.3g} samples per second, {fewest} in the shortest region")]


def _tails(regions: Regions, background: Background) -> list[Caveat]:
    touching = int(np.count_nonzero(regions.stop[:-1] >= regions.start[1:]))
    together = max(regions.cuts, background.unsettled, touching)
    return [caveat("tails_overlap", f"{together} of the {len(regions.start) - 1} gaps")] if together else []


def _reach(curve: Curve, regions: Regions) -> list[Caveat]:
    ends = [name for name, there in (("begins", regions.start[0] == 0), ("ends", regions.stop[-1] == len(curve.times_s) - 1)) if there]
    return [caveat("unpadded", f"the trace {' and '.join(ends)} before power is at the background")] if ends else []


def _sensitive(sensitivity: dict[str, float | None], net_j: float | None) -> list[Caveat]:
    known = [value for value in sensitivity.values() if value is not None]
    if len(known) < len(sensitivity):
        lost = ", ".join(key for key, value in sensitivity.items() if value is None)
        return [caveat("threshold_sensitive", f"another number of regions at k = {lost}")]
    spread = (max(known) - min(known)) / abs(net_j) if net_j else np.inf
    return [caveat("threshold_sensitive", f"{100 * spread:.2g} % between k = {' and '.join(sensitivity)}")] if spread > SPREAD else []


def _refusal(curve: Curve, background: Background, regions: Regions, count: int, k: float) -> str:
    found = regions.count()
    level = float(np.median(background.power_w))
    at = f"above {level + k * background.sigma_w:.4g} W (background {level:.4g} W, k = {k:g})"
    left = [(regions.short, f"shorter than {SHORTEST} samples"), (len(regions.first) - found, "cut off by an end of the trace")]
    besides = " and ".join(f"{number} {what}" for number, what in left if number)
    rate = 1 / float(np.median(np.diff(curve.times_s)))
    if found > count:
        advice = "cut the others off with --start and --stop, or raise --k"
    elif rate < SLOWEST_HZ:
        advice = f"{rate:.3g} samples per second may be too few, so sample faster, or run a back-to-back loop and divide by the number"
    else:
        advice = (
            "lower --k, check --start and --stop, leave more time between inferences, or run a back-to-back loop and divide by the number"
        )
    return f"found {found} regions {at}{f', besides {besides}' if besides else ''}, expected {count}: {advice}"
