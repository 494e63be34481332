"""One long window over time: throughput, power, clock and temperature in bins, and the state that the device can hold.

A phone or a board without a fan is fast for a minute and then throttles. The bins' levels are cut where they change (optimal
partitioning with a linear penalty, which PELT computes too: Killick et al., 2012), and the steady state is the last level that
lasts, has no slope and is not still heating up; a governor that goes up and down for good is a steady state as well. Intervals
come from the means of six consecutive batches (batch means), because neighbouring inferences and bins are not independent; in a steady
state of few bins whose noise lasts for several of them (correlation 0.8) they still cover less than 95 % (85 % in 40 bins).
Pure numpy, scipy through stats.py: no clock, no sensor. Knows no files, no repeats and no pages. What is unknown is NaN or None, never 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.energy import samples
from edgejoule.measure.stats import t_interval
from edgejoule.records import Caveat, Floats, Interval, Phase, Series, Trace, floats

BINS, FEWEST_BINS = 90, 12
LEAST_BIN_S = 2.0
PER_BIN = 5.0  # update or averaging times of the meter, or inferences, that a bin holds at least
FIRST_S, FIRST = 60.0, 0.2  # the first minute, or the first fifth of a window that is shorter than five
TOLERANCE = 0.02  # levels that differ by less are one level, and a slope that adds up to less is none
BESIDE = 4  # bins on both sides of a change that say whether it goes up or down
STEADY_BINS, STEADY = 10, 0.2  # the steady state lasts this many bins and this part of the window
PENALTY = 4.0  # per change and series, times log(bins), in variances
CLEAR = 2.0  # standard errors of a slope
ALIKE = 0.8  # the largest correlation of neighbouring bins that is believed
BATCHES = 6
HEATING_C_PER_MIN = 1.0
MISFIT = 0.02  # between the sum of the latencies and the window

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sustained:
    """A window of ``duration_s`` in bins of ``bin_s``; ``times_s`` are the bins' middles, from the window's start.

    A series that nobody recorded is empty, a bin without a sample is NaN. ``first_*`` cover the first ``first_s`` seconds.
    Where no steady state was reached, ``steady_*`` are None and ``reason`` says why. Energies are per image, intervals 95 %.
    """

    duration_s: float
    bin_s: float
    times_s: Floats
    throughput_ips: Floats
    power_w: Floats
    clock_hz: Floats
    temperature_c: Floats
    first_s: float
    first_ips: float
    first_power_w: float | None
    first_energy_j: float | None
    last_ips: float  # over as long a time at the end
    changes_s: tuple[float, ...]
    steady_from_s: float | None
    steady_ips: Interval | None
    steady_power_w: Interval | None
    steady_energy_j: Interval | None
    ratio: float | None  # of throughput, steady over first
    reason: str
    grade: str = ""
    scope: str = ""
    caveats: tuple[Caveat, ...] = ()


@dataclass(frozen=True, slots=True)
class _Bins:
    """(N,) per bin; ``joules`` is NaN where the meter left a hole and empty where there is no meter."""

    edges: Numbers  # (N + 1,) seconds from the window's start
    images: Numbers
    joules: Numbers

    @property
    def width_s(self) -> float:
        return float(self.edges[1] - self.edges[0])


def sustained(latencies_s: Floats, batch: int, window: Phase, traces: Sequence[Trace] = (), watched: Sequence[Series] = ()) -> Sustained:
    """What one long back-to-back window held. ``traces`` and ``watched`` are on the window's clock; only ``total`` rails count.

    Raises MeterError where the window is too short or the latencies do not fill it.
    """
    ends = _ends(latencies_s, window)
    duration = window.stop_s - window.start_s
    totals = [trace for trace in traces if trace.total]
    edges = np.linspace(0.0, duration, _bin_count(duration, ends, totals) + 1)
    bins = _Bins(edges, _images(ends, batch, edges), _joules(totals, window.start_s + edges))
    first = min(FIRST_S, FIRST * duration)
    temperature = _watched(watched, "temperature", window.start_s + edges)
    changes = _changes(_levels(bins))
    start, reason = _steady(bins, changes, temperature)
    first_ips, first_w, first_j = _between(ends, batch, totals, window, 0.0, first)
    last_ips = _between(ends, batch, [], window, duration - first, duration)[0]
    steady = _Steady() if start is None else _intervals(bins, start)
    ratio = None if steady.ips is None or first_ips <= 0 else steady.ips.value / first_ips
    return Sustained(
        duration_s=duration,
        bin_s=bins.width_s,
        times_s=floats((edges[1:] + edges[:-1]) / 2),
        throughput_ips=floats(bins.images / bins.width_s),
        power_w=floats(bins.joules / bins.width_s),
        clock_hz=floats(_watched(watched, "clock", window.start_s + edges)),
        temperature_c=floats(temperature),
        first_s=first,
        first_ips=first_ips,
        first_power_w=first_w,
        first_energy_j=first_j,
        last_ips=last_ips,
        changes_s=tuple(float(edges[i]) for i in changes),
        steady_from_s=None if start is None else float(edges[start]),
        steady_ips=steady.ips,
        steady_power_w=steady.power_w,
        steady_energy_j=steady.energy_j,
        ratio=ratio,
        reason=reason,
        grade=max((trace.grade for trace in totals), default=""),
        scope=totals[0].scope if totals else "",
        caveats=tuple(_doubts(steady, first_ips, first, ratio, reason)),
    )


def _ends(latencies_s: Floats, window: Phase) -> Numbers:
    """(n,) the ends of the inferences, in seconds from the window's start; the last one is the window's end exactly."""
    spent = np.asarray(latencies_s, dtype=np.float64)
    duration = window.stop_s - window.start_s
    if not len(spent) or not np.all(np.isfinite(spent)) or np.any(spent < 0) or not (math.isfinite(duration) and duration > 0):
        raise MeterError("a sustained run needs a window and its latencies: expected finite times of at least one inference, measure again")
    with np.errstate(over="ignore"):
        ends = np.cumsum(spent)
    if not abs(ends[-1] - duration) <= MISFIT * duration:
        raise MeterError(
            f"the latencies add up to {ends[-1]:.4g} s of a window of {duration:.4g} s: "
            "a sustained run is one inference after the other, use scenario single_stream or offline"
        )
    return np.asarray(ends * (duration / ends[-1]), dtype=np.float64)


def _bin_count(duration_s: float, ends: Numbers, totals: Sequence[Trace]) -> int:
    slowest = max((max(trace.averaging_s, trace.period_s) for trace in totals), default=0.0)
    least = max(LEAST_BIN_S, PER_BIN * slowest, PER_BIN * duration_s / len(ends))
    count = min(BINS, int(duration_s / least + 1e-9))
    if count < FEWEST_BINS:
        raise MeterError(
            f"a window of {duration_s:.4g} s is too short to look for a steady state: expected at least {FEWEST_BINS * least:.0f} s "
            "for this model and meter, sustain for longer"
        )
    return count


def _images(ends: Numbers, batch: int, edges: Numbers) -> Numbers:
    """Images between edges, fractions of an inference included: whole ones would alias with the bins."""
    done = np.interp(edges, np.concatenate(([0.0], ends)), batch * np.arange(len(ends) + 1.0))
    return np.asarray(np.diff(done), dtype=np.float64)


def _joules(totals: Sequence[Trace], edges: Numbers) -> Numbers:
    """Joules of all rails between edges on the trial's clock: NaN where a rail has no sample in the bin or does not cover it."""
    if not totals:
        return np.empty(0)
    return np.asarray(np.sum([_rail_joules(trace, edges) for trace in totals], axis=0), dtype=np.float64)


def _rail_joules(trace: Trace, edges: Numbers) -> Numbers:
    times, values = _clean(*samples(trace))
    if len(times) < 2:
        return np.full(len(edges) - 1, np.nan)
    if trace.quantity == "energy_j":
        total = np.interp(edges, times, values)
    else:
        at = np.union1d(times, edges)
        power = np.interp(at, times, values)
        total = np.concatenate(([0.0], np.cumsum(np.diff(at) * (power[1:] + power[:-1]) / 2)))[np.searchsorted(at, edges)]
    spent = np.diff(total)
    seen = np.diff(np.searchsorted(times, edges)) > 0
    spent[~seen | (edges[:-1] < times[0]) | (edges[1:] > times[-1])] = np.nan
    return np.asarray(spent, dtype=np.float64)


def _clean(times: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Only samples that are finite and come after all before them."""
    length = min(len(times), len(values))
    finite = np.isfinite(times[:length]) & np.isfinite(values[:length])
    times, values = times[:length][finite], values[:length][finite]
    later = np.concatenate((np.ones(min(1, len(times)), dtype=bool), times[1:] > np.maximum.accumulate(times)[:-1]))
    return times[later], values[later]


def _watched(watched: Sequence[Series], name: str, edges: Numbers) -> Numbers:
    """(N,) means of a watched series in the bins, NaN where there was no sample; empty where nobody watched it."""
    found = next((series for series in watched if series.name == name), None)
    if found is None:
        return np.empty(0)
    times, values = _clean(np.asarray(found.times_s, dtype=np.float64), np.asarray(found.values, dtype=np.float64))
    inside = (times >= edges[0]) & (times < edges[-1])
    place = np.searchsorted(edges, times[inside], side="right") - 1
    count = np.bincount(place, minlength=len(edges) - 1)
    total = np.bincount(place, weights=values[inside], minlength=len(edges) - 1)
    return np.asarray(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0), dtype=np.float64)


def _between(
    ends: Numbers, batch: int, totals: Sequence[Trace], window: Phase, start_s: float, stop_s: float
) -> tuple[float, float | None, float | None]:
    """(images per second, watts, joules per image) between two instants of the window."""
    edges = np.array([start_s, stop_s])
    images, length = float(_images(ends, batch, edges)[0]), stop_s - start_s
    joules = float(_joules(totals, window.start_s + edges)[0]) if totals else math.nan
    if not (math.isfinite(joules) and joules > 0):
        return images / length, None, None
    return images / length, joules / length, joules / images if images > 0 else None


# ---------------------------------------------------------------- where the steady state begins


def _levels(bins: _Bins) -> Numbers:
    """(N, 1 or 2): images per second and, where every bin has its power, watts; each over its median."""
    found = [bins.images / bins.width_s]
    if len(bins.joules) and np.all(np.isfinite(bins.joules)):
        found.append(bins.joules / bins.width_s)
    medians = [float(np.median(one)) for one in found]
    return np.column_stack([one / median for one, median in zip(found, medians, strict=True) if median > 0] or [found[0]])


def _changes(levels: Numbers) -> list[int]:
    """The bins at which a new level begins: least squares around piecewise constant means, a penalty for every change.

    Of running medians of three, so that a hiccup is not taken for a level; the bin that a step falls into may be one of its own.
    """
    count, kinds = levels.shape
    smooth = np.median(np.stack((levels[[0, *range(count - 1)]], levels, levels[[*range(1, count), count - 1]])), axis=0)
    scaled = smooth / np.maximum(_noise(levels), TOLERANCE / 8)
    sums = np.vstack((np.zeros(kinds), np.cumsum(scaled, axis=0)))
    squares = np.concatenate(([0.0], np.cumsum(np.sum(scaled**2, axis=1))))
    penalty = PENALTY * kinds * math.log(count)
    best, came = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=int)
    best[0] = -penalty
    for stop in range(1, count + 1):
        starts = np.arange(stop)
        inside = squares[stop] - squares[starts] - np.sum((sums[stop] - sums[starts]) ** 2, axis=1) / (stop - starts)
        costs = best[starts] + inside + penalty
        came[stop] = int(np.argmin(costs))
        best[stop] = costs[came[stop]]
    found, at = [], int(came[count])
    while at > 0:
        found.append(at)
        at = int(came[at])
    return _merged(levels, found[::-1])


def _noise(levels: Numbers) -> Numbers:
    """(kinds,) the long-run standard deviation, by what bins differ from their neighbours and from the next but one.

    Differences do not see levels. Of an AR(1) series their variances are 2 s^2 (1 - r) and 2 s^2 (1 - r^2), and the long-run
    variance is s^2 (1 + r) / (1 - r). Correlation is thus not taken for levels that change.
    """
    near, far = ((np.median(np.abs(levels[k:] - levels[:-k]), axis=0) * 1.4826) ** 2 for k in (1, 2))
    alike = np.clip(np.divide(far, near, out=np.ones_like(far), where=near > 0) - 1, 0.0, ALIKE)
    return np.asarray(np.sqrt(near / 2 * (1 + alike)) / (1 - alike), dtype=np.float64)


def _merged(levels: Numbers, changes: list[int]) -> list[int]:
    """Without the changes that matter to nobody: the least one first, while any is below the tolerance."""
    while changes:
        bounds = [0, *changes, len(levels)]
        means = np.array([np.mean(levels[a:b], axis=0) for a, b in itertools.pairwise(bounds)])
        steps = np.max(np.abs(np.diff(means, axis=0)), axis=1)
        least = int(np.argmin(steps))
        if steps[least] >= TOLERANCE:
            break
        changes = changes[:least] + changes[least + 1 :]
    return changes


def _steady(bins: _Bins, changes: list[int], temperature_c: Numbers) -> tuple[int | None, str]:
    """(the bin where the steady state begins, "") or (None, why there is none)."""
    levels = _levels(bins)
    count = len(levels)
    shortest = max(STEADY_BINS, math.ceil(STEADY * count))
    slope = _heating(temperature_c, bins.width_s)
    if slope is not None:
        return None, f"the device was still heating up by {slope:.1f} °C a minute at the end"
    last = changes[-1] if changes else 0
    for start in range(last, count - shortest + 1, max(1, shortest // 4)):
        if not _drifts(levels[start:], CLEAR if start == last else 0.0):  # trying again, chance is no excuse
            return start, ""
    for start in changes:  # up and down for good: the longest stretch of at least two full swings
        if count - start >= shortest and _swings(levels, [at for at in changes if at > start]) and not _unlike(levels[start:]):
            return start, ""
    if count - last < shortest:
        return None, f"the level still changed {(count - last) * bins.width_s:.0f} s before the end"
    return None, "throughput or power still drifted at the end"


def _unlike(levels: Numbers) -> bool:
    """The means of the two halves differ by more than the tolerance."""
    half = len(levels) // 2
    return bool(np.any(np.abs(np.mean(levels[half:], axis=0) - np.mean(levels[:half], axis=0)) > TOLERANCE))


def _drifts(levels: Numbers, errors: float) -> bool:
    """A slope adds up to more than the tolerance, and is above so many standard errors (widened for correlation)."""
    count = len(levels)
    time = np.arange(count) - (count - 1) / 2
    for one in levels.T:
        rise = float(time @ one / (time @ time))
        rest = one - np.mean(one) - rise * time
        spread = float(rest @ rest)
        alike = min(ALIKE, max(0.0, float(rest[1:] @ rest[:-1]) / spread)) if spread > 0 else 0.0
        error = math.sqrt(spread / (count - 2) / float(time @ time) * (1 + alike) / (1 - alike))
        if abs(rise) * count > TOLERANCE and abs(rise) > errors * error:
            return True
    return False


def _swings(levels: Numbers, changes: list[int]) -> bool:
    """At least two changes up and two down, in throughput."""
    ups = [float(np.mean(levels[at : at + BESIDE, 0]) - np.mean(levels[max(0, at - BESIDE) : at, 0])) for at in changes]
    return sum(up > 0 for up in ups) >= 2 and sum(up < 0 for up in ups) >= 2


def _heating(temperature_c: Numbers, width_s: float) -> float | None:
    """°C per minute over the last quarter, where that is one or more and adds up to more than a coarse sensor's step of 1 °C."""
    last = temperature_c[-max(6, len(temperature_c) // 4) :]
    time = width_s / 60 * np.arange(len(last))
    known = np.isfinite(last)
    if np.count_nonzero(known) < 5:
        return None
    slope = float(np.polyfit(time[known], last[known], 1)[0])
    return slope if slope >= HEATING_C_PER_MIN and slope * float(np.ptp(time[known])) > 1.0 else None


# ---------------------------------------------------------------- what it is


@dataclass(frozen=True, slots=True)
class _Steady:
    ips: Interval | None = None
    power_w: Interval | None = None
    energy_j: Interval | None = None


def _intervals(bins: _Bins, start: int) -> _Steady:
    """Means of six batches of consecutive bins and their t intervals; bins without power are left out of power and energy."""
    images, joules = bins.images[start:], bins.joules[start:]
    parts = np.array_split(np.arange(len(images)), BATCHES)
    ips = t_interval([float(np.mean(images[part])) / bins.width_s for part in parts])
    known = [part[np.isfinite(joules[part])] for part in parts] if len(joules) else []
    if not known or any(not len(part) or np.sum(joules[part]) <= 0 for part in known):
        return _Steady(ips)
    power = t_interval([float(np.mean(joules[part])) / bins.width_s for part in known])
    if any(np.sum(images[part]) <= 0 for part in known):
        return _Steady(ips, power)
    return _Steady(ips, power, t_interval([float(np.sum(joules[part]) / np.sum(images[part])) for part in known]))


def _doubts(steady: _Steady, first_ips: float, first_s: float, ratio: float | None, reason: str) -> list[Caveat]:
    if steady.ips is None:
        return [caveat("no_steady_state", reason)]
    high = steady.ips.value if steady.ips.high is None else steady.ips.high
    if ratio is None or high >= (1 - TOLERANCE) * first_ips:
        return []
    seen = f"{steady.ips.value:.4g} images/s, {100 * ratio:.0f} % of the first {first_s:.0f} s"
    return [caveat("steady_below_start", seen)]
