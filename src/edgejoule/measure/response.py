"""How a sensor answered a load that was switched on and off: update period, delay and averaging time, by least squares.

The load goes on, off, on, … at instants ``edges_s`` of random distance, so that a sensor that updates now and then is met in every
phase. Its answer is fitted by a boxcar of width w and by an exponential of time constant tau, seen after a delay at the sensor's own
updates; the better fit names the kind. Intervals are of 95 %, from the scatter between edges (sandwich covariance, one cluster an
edge). Pure numpy: no clock, no sensor. What it does not know: how accurate the watts are; whether the load itself rose at once (a
governor's slow clock looks like averaging); a counter's own filter beyond its updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgejoule.errors import MeterError
from edgejoule.records import Interval

LONGEST_S = 3.0  # averaging that is looked for
DELAYS_S = (-0.5, 2.0)
FEWEST_CHANGES, FEWEST_EDGES, FEWEST_SAMPLES = 30, 4, 50
CLEAR = 0.25  # of the variance that a step must explain
ALIKE = 1.01  # two fits whose misfit differs by less cannot be told apart
T95 = 2.2  # Student's t at 95 % for the dozen edges of a run
ROUNDS = 40
INSTANT_S = 1e-7  # two samples nearer than this are one
LARGEST = 1e12  # seconds, watts, joules: what is larger, or not a number, was not read
MIDDLE = {"boxcar": 0.5, "exponential": float(np.log(2.0)), "counter": 0.0}  # of the rise, in averaging times
RISE = {"boxcar": 0.8, "exponential": float(np.log(9.0)), "instant": 0.0}  # 10-90 %, in averaging times

Samples = npt.NDArray[np.float64]
Kind = Literal["boxcar", "exponential", "instant", "counter", "none"]


@dataclass(frozen=True, slots=True)
class Response:
    """What one rail did when the load was switched. None where it cannot be told; ``kind`` is ``none`` where there was no step."""

    rail: str
    kind: Kind
    idle_w: float
    step_w: Interval
    poll_s: float
    update_s: Interval | None
    every_read: bool  # a new value at every read: it updates at least as often as it was polled
    averaging_s: Interval | None  # boxcar: its width; exponential: its time constant
    delay_s: Interval | None
    rise_s: Interval | None  # from 10 to 90 % of a step
    least_step_j: float | None  # of a counter, the smallest move seen
    misfit: Mapping[str, float]  # {kind: root mean square of what it leaves unexplained, as a share of the step}
    decided: bool = True  # one kind fits clearly better than the other


def response(rail: str, times_s: Samples, values: Samples, edges_s: Sequence[float], counter: bool = False) -> Response:
    """How a rail answered a load that went on, off, on, … at ``edges_s``; times and values (N,), watts or a counter's joules.

    Raises MeterError for fewer than 4 edges or 50 usable samples, or edges that are not in order.
    """
    edges = np.asarray(edges_s, dtype=np.float64)
    if len(edges) < FEWEST_EDGES or not np.all(np.diff(edges) > 0) or not np.all(np.abs(edges) < LARGEST):
        raise MeterError(f"{len(edges)} edges are no load pattern: expected at least {FEWEST_EDGES}, in order of time")
    times, read = _usable(np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64))
    poll = float(np.median(np.diff(times)))
    update = update_period(times, read)
    every = update is not None and update.value < 1.5 * poll
    if counter:
        at, watts, spans = _counted(times, read)
        least = float(np.min(np.diff(read)[np.diff(read) > 0], initial=np.inf))
        fits = {"counter": _Fit(at, watts, edges, "counter", poll, spans)} if len(at) > FEWEST_CHANGES else {}
    else:
        at, kept = _seen_at(times, read, None if every else update)
        fits = {kind: _Fit(at, kept, edges, kind, poll) for kind in ("boxcar", "exponential")}
        watts, least = kept, np.inf
    best = min(fits.values(), key=lambda fit: fit.misfit, default=None)
    if best is None or best.explained < CLEAR or best.step.low is None or best.step.low <= 0:
        step = best.step if best is not None else Interval(0.0, None, None, 0)
        idle = best.base_w if best is not None else 0.0
        return Response(rail, "none", idle, step, poll, update, every, None, None, None, least if np.isfinite(least) else None, {})
    misfits = {kind: fit.misfit for kind, fit in fits.items()}
    decided = len(fits) == 1 or max(misfits.values()) > ALIKE * min(misfits.values())
    found = best if decided else fits["boxcar"]  # the longer of the two: it pads more
    kind: Kind = "instant" if found.width.value < poll and not counter else found.kind
    averaging = None if counter else (Interval(0.0, 0.0, poll, len(edges)) if kind == "instant" else found.width)
    rise = None if averaging is None else _scaled(averaging, RISE[kind])
    return Response(
        rail, kind, found.base_w, found.step, poll, update, every, averaging, found.delay, rise,
        least if np.isfinite(least) else None, misfits, decided or kind == "instant",
    )  # fmt: skip


def update_period(times_s: Samples, values: Samples) -> Interval | None:
    """The time between two new values, in seconds, from reads (N,) that come more often; None where too few values changed.

    Gaps of several updates (the value happened to stay the same) are counted as such where the polls are dense enough to tell.
    """
    at = _changes(times_s, values)
    if len(at) < FEWEST_CHANGES:
        return None
    gaps, poll = np.diff(at), float(np.median(np.diff(times_s)))
    short = float(np.quantile(gaps, 0.2))
    usual = gaps[gaps <= (1.5 if short > 4 * poll else 3.0) * short]
    period, counts = float(np.mean(usual)), np.ones(len(usual))
    if period > 4 * poll:
        many = np.rint(gaps / period)
        usual, counts = gaps[(many >= 1) & (many <= 5)], many[(many >= 1) & (many <= 5)]
        period = float(np.sum(usual) / np.sum(counts))
    half = T95 * float(np.std(usual - counts * period)) / float(np.sqrt(len(usual)))
    return Interval(period, max(0.0, period - half), period + half, len(usual))


def load_share(at_s: Samples, edges_s: Samples, kind: str, width_s: float) -> Samples:
    """A load of 1 between every even edge and the next one, through a boxcar or an exponential filter, at instants (N,) -> (N,)."""
    if kind == "boxcar":
        return (_on_s(at_s, edges_s) - _on_s(at_s - width_s, edges_s)) / width_s
    levels = np.zeros(len(edges_s))
    for i in range(1, len(edges_s)):
        target = float(i % 2)  # the level between edge i - 1 and edge i
        levels[i] = target + (levels[i - 1] - target) * np.exp(-(edges_s[i] - edges_s[i - 1]) / width_s)
    last = np.searchsorted(edges_s, at_s, side="right") - 1
    k = np.maximum(last, 0)
    target_now = np.where(last < 0, 0.0, (k + 1) % 2)
    fading = np.exp(-np.maximum(at_s - edges_s[k], 0.0) / width_s)
    return np.asarray(np.where(last < 0, 0.0, target_now + (levels[k] - target_now) * fading))


def _usable(times: Samples, values: Samples) -> tuple[Samples, Samples]:
    good = (np.abs(times) < LARGEST) & (np.abs(values) < LARGEST)
    times, values = times[good], values[good]
    forwards = np.append(True, times[1:] > np.maximum.accumulate(times)[:-1] + INSTANT_S) if len(times) else np.zeros(0, dtype=bool)
    if np.count_nonzero(forwards) < 50:
        raise MeterError(f"{np.count_nonzero(forwards)} samples are too few to see a load step: expected at least 50, so poll faster")
    return times[forwards], values[forwards]


def _changes(times: Samples, values: Samples) -> Samples:
    """When the value became another: halfway between the last read of the old one and the first of the new one."""
    new = np.flatnonzero(np.diff(values)) + 1
    return (times[new] + times[new - 1]) / 2


def _seen_at(times: Samples, values: Samples, update: Interval | None) -> tuple[Samples, Samples]:
    """The instants that held values speak for (their update, not their read), one sample for each."""
    if update is None:
        return times, values
    changes = _changes(times, values)
    gaps = np.diff(np.append(changes, times[-1] + update.value))
    ticks = gaps / np.maximum(1.0, np.rint(gaps / update.value))  # unseen updates lie evenly between two that were seen
    last = np.searchsorted(changes, times, side="right") - 1
    k = np.maximum(last, 0)
    at = np.where(last < 0, times, changes[k] + np.floor((times - changes[k]) / ticks[k] + 1e-9) * ticks[k])
    first = np.append(True, np.diff(at) > 1e-3 * update.value)
    return at[first], values[first]


def _counted(times: Samples, joules: Samples) -> tuple[Samples, Samples, Samples]:
    """A counter's moves -> the end of each (N,), the mean watts since the move before, and how long that was."""
    new = np.flatnonzero(np.diff(joules)) + 1
    at = (times[new] + times[new - 1]) / 2
    spans = np.diff(at)
    return at[1:], np.diff(joules[new]) / spans, spans


def _on_s(at: Samples, edges: Samples) -> Samples:
    """Seconds of load up to each instant."""
    ends = np.append(edges, max(edges[-1], float(at.max(initial=0.0))) + 1.0)
    on = np.diff(ends) * (np.arange(len(edges)) % 2 == 0)
    return np.interp(at, ends, np.concatenate(([0.0], np.cumsum(on))))


def _scaled(interval: Interval, factor: float) -> Interval:
    low, high = (None if end is None else end * factor for end in (interval.low, interval.high))
    return Interval(interval.value * factor, low, high, interval.n)


class _Fit:
    """base + step x load_share(at - delay), least squares: the two linear ones in closed form, width and delay by a narrowing grid."""

    def __init__(self, at: Samples, watts: Samples, edges: Samples, kind: Kind, poll: float, spans: Samples | None = None) -> None:
        self._at, self._watts, self._edges, self.kind, self._spans = at, watts, edges, kind, spans
        self._weights = np.full(len(at), 1 / len(at)) if spans is None else spans / np.sum(spans)
        width, delay = self._searched(poll)
        self.base_w, step, self.explained = self._linear(width, delay)
        rest = watts - self.base_w - step * self._share(width, delay)
        self.misfit = float(np.sqrt(np.sum(self._weights * rest**2))) / max(abs(step), 1e-12)
        errors = self._errors(step, width, delay, rest)
        floor = poll / np.sqrt(len(edges))
        halves = [T95 * errors[0], *(float(np.hypot(T95 * error, floor)) for error in errors[1:])]
        self.step, self.width, self.delay = (
            Interval(value, value - half, value + half, len(edges)) for value, half in zip((step, width, delay), halves, strict=True)
        )

    def _share(self, width: float, delay: float) -> Samples:
        at = self._at - delay
        if self._spans is not None:
            return (_on_s(at, self._edges) - _on_s(at - self._spans, self._edges)) / self._spans
        return load_share(at, self._edges, self.kind, width)

    def _linear(self, width: float, delay: float) -> tuple[float, float, float]:
        """-> base and step in watts, and the share of the variance that they explain."""
        share, weights = self._share(width, delay), self._weights
        # sums and no BLAS: its threads spin beside a busy neighbour, which makes a fit of a second take a minute
        mean, level = float(np.sum(weights * share)), float(np.sum(weights * self._watts))
        spread = float(np.sum(weights * (share - mean) ** 2))
        total = float(np.sum(weights * (self._watts - level) ** 2))
        both = float(np.sum(weights * (share - mean) * (self._watts - level)))
        if spread <= 1e-12 or total <= 1e-20 * level**2:  # rounding, not variance
            return level, 0.0, 0.0
        step = both / spread
        return level - step * mean, step, both * step / total  # of a step down too, so that it is not taken for a late step up

    def _searched(self, poll: float) -> tuple[float, float]:
        """Width and delay: a coarse grid, then finer ones around the best. A counter has no width but its own spans.

        Searched over the middle of the rise, not its begin: of the middle the data are sure whatever the width.
        """
        widths = np.geomspace(poll / 4, LONGEST_S, 18) if self._spans is None else np.array([poll])
        middles = np.arange(DELAYS_S[0], DELAYS_S[1] + LONGEST_S / 2, 0.04)
        best = max(itertools.product(widths, middles), key=self._closeness)
        by, reach = float(widths[-1] / widths[-2]) if len(widths) > 1 else 1.0, 0.04
        for _ in range(ROUNDS):
            around = np.clip(best[0] * by ** np.array([0.0, -1.0, -0.5, 0.5, 1.0]), widths[0], widths[-1])
            grid = itertools.product(around, best[1] + reach * np.array([0.0, -1.0, -0.5, 0.5, 1.0]))
            found = max(grid, key=self._closeness)
            if found == best or max(abs(found[1] - best[1]) / reach, abs(np.log(found[0] / best[0])) / max(np.log(by), 1e-9)) < 0.9:
                by, reach = by**0.6, reach * 0.6
            best = found
        return float(best[0]), float(best[1] - MIDDLE[self.kind] * best[0])

    def _closeness(self, one: tuple[float, float]) -> float:
        return self._linear(one[0], one[1] - MIDDLE[self.kind] * one[0])[2]

    def _errors(self, step: float, width: float, delay: float, rest: Samples) -> list[float]:
        """Standard errors of step, width and delay: the scatter of what is left, summed edge by edge."""
        small = 0.02 * width
        columns = [np.ones(len(self._at)), self._share(width, delay)]
        if self._spans is None:
            columns.append(step * (self._share(width + small, delay) - self._share(width - small, delay)) / (2 * small))
        columns.append(step * (self._share(width, delay + small) - self._share(width, delay - small)) / (2 * small))
        slopes = np.stack(columns, axis=1) * np.sqrt(self._weights)[:, None]
        parts = slopes * (rest * np.sqrt(self._weights))[:, None]
        middles = (self._edges[1:] + self._edges[:-1]) / 2
        groups = np.searchsorted(middles, self._at - delay)
        summed = np.stack([np.bincount(groups, parts[:, k], minlength=len(self._edges)) for k in range(parts.shape[1])], axis=1)
        bread = np.linalg.pinv(slopes.T @ slopes)
        covariance = bread @ (summed.T @ summed) @ bread * len(self._edges) / (len(self._edges) - 1)
        errors = [float(error) for error in np.sqrt(np.maximum(np.diag(covariance), 0.0))]
        return errors[1:] if self._spans is None else [errors[1], 0.0, errors[2]]
