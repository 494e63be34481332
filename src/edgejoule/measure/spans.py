"""Which idle belongs to a window, and the window's energy from the samples near both. Pure: no clock, no sensor, no thread.

Windows cut a recording into stretches (at least one window is open) and gaps (none is). The gaps beside a window's stretch hold its
idle: what was declared as such, or else the gap itself where it is long enough. Knows not whether the user really idled there.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from edgejoule.caveats import caveat
from edgejoule.measure.energy import Energy, pad_s, window_energy
from edgejoule.records import Phase, Trace, floats

LEAST_IDLE_S = 1.0  # beyond the sensor's memory: a shorter pause that nobody declared is not taken for idle
MOST_IDLE_S = 10.0  # of a long one only what is nearest to the window
TOUCHES_S, TOUCHES = 1e-3, 0.01  # idle that ends this near (or this part of the window) is right beside it


@dataclass(slots=True, eq=False)
class Gap:
    """Time outside of all windows, with what ``idle()`` slept of it. ``stop_s`` is None while it lasts."""

    start_s: float
    stop_s: float | None = None
    idles: list[tuple[float, float]] = field(default_factory=list)

    def copy(self) -> Gap:
        return Gap(self.start_s, self.stop_s, list(self.idles))

    @property
    def settled_s(self) -> float:
        """From when on nothing more can come to the idle of the window before it."""
        return self.idles[0][1] if self.idles else math.inf if self.stop_s is None else self.stop_s


@dataclass(slots=True, eq=False)
class Stretch:
    """Time in which at least one window is open, and the gaps at both ends. ``after`` is None while it lasts."""

    before: Gap
    after: Gap | None = None


def idle_before(gap: Gap, memory_s: float) -> Phase | None:
    """The idle that is nearest to the gap's end."""
    stop = gap.start_s if gap.stop_s is None else gap.stop_s
    if gap.idles:
        return Phase("idle_before", *gap.idles[-1])
    long_enough = stop - gap.start_s >= LEAST_IDLE_S + memory_s
    return Phase("idle_before", max(gap.start_s, stop - MOST_IDLE_S - memory_s), stop) if long_enough else None


def idle_after(gap: Gap, seen_s: float, memory_s: float) -> Phase | None:
    """The idle that is nearest to the gap's begin, as far as the traces have seen it."""
    stop = seen_s if gap.stop_s is None else min(seen_s, gap.stop_s)
    if gap.idles:
        start, end = gap.idles[0]
        return Phase("idle_after", start, min(end, stop)) if start < stop else None
    long_enough = stop - gap.start_s >= LEAST_IDLE_S + memory_s
    return Phase("idle_after", gap.start_s, min(stop, gap.start_s + MOST_IDLE_S + memory_s)) if long_enough else None


def energy_between(traces: Sequence[Trace], window: Phase, before: Phase | None, after: Phase | None) -> Energy:
    """The window's energy from the samples around it and in the idle phases: what it costs does not grow with the recording.

    Only idle right beside the window may be integrated with it; idle further away (around a window that holds this one) still says
    how much the idle power is.
    """
    reach = max([pad_s(trace) for trace in traces], default=0.0)
    spans = [(window.start_s - reach, window.stop_s + reach), *((p.start_s, p.stop_s) for p in (before, after) if p is not None)]
    near = [_near(trace, spans) for trace in traces]
    if before is not None and after is not None and _frame(window, before, after, [trace for trace in traces if trace.total]):
        return window_energy(near, window, before, after)
    sides = [window_energy(near, window, before), window_energy(near, window, None, after)]
    known = [side for side in sides if side.idle_w is not None]
    best = _mean(known, window) if len(known) == 2 else (known or sides)[0]
    if best.energy_j is None or "unpadded" in [doubt.code for doubt in best.caveats]:
        return best
    if best.idle_w is None:
        seen = "no idle beside the window, so there is no energy above idle"
    else:
        blur = max(trace.period_s for trace in traces if trace.total) / (2 * (window.stop_s - window.start_s))
        seen = f"net energy is low by up to {100 * blur:.2g} % (the sensor is read now and then, and the edges are blurred by that)"
    return replace(best, caveats=(*best.caveats, caveat("unpadded", seen)))


def _frame(window: Phase, before: Phase, after: Phase, totals: Sequence[Trace]) -> bool:
    """Whether there is idle right beside the window on both sides, and enough of it: beyond the pad, something to take its power from."""
    slack = max(TOUCHES_S, TOUCHES * (window.stop_s - window.start_s))
    need = max([pad_s(trace) + 2 * trace.period_s + trace.offset_uncertainty_s for trace in totals], default=0.0)
    apart = max(window.start_s - before.stop_s, after.start_s - window.stop_s)
    return apart <= slack and min(before.stop_s - before.start_s, after.stop_s - after.start_s) > need


def _mean(sides: Sequence[Energy], window: Phase) -> Energy:
    """One window's energy above the mean of two idle levels."""
    first, second = sides
    if first.energy_j is None or first.idle_w is None or second.idle_w is None:
        return first
    level = (first.idle_w + second.idle_w) / 2
    net = first.energy_j - level * (window.stop_s - window.start_s)
    doubts = {(d.code, d.seen): d for side in sides for d in side.caveats if d.code != "negative_energy"}
    lost = () if net > 0 else (caveat("negative_energy", f"{net:.4g} J above an idle of {level:.4g} W"),)
    return replace(first, net_energy_j=net if net > 0 else None, idle_w=level, caveats=(*doubts.values(), *lost))


def _near(trace: Trace, spans: Sequence[tuple[float, float]]) -> Trace:
    """The trace's samples in some spans of the trial's clock, and one more at each end; what lies between them is left out."""
    times, values, done = floats(), floats(), 0
    for start, stop in sorted(spans):
        first = max(done, bisect_left(trace.times_s, start - trace.offset_s) - 1)
        done = max(first, bisect_right(trace.times_s, stop - trace.offset_s) + 1)
        times.extend(trace.times_s[first:done])
        values.extend(trace.values[first:done])
    return replace(trace, times_s=times, values=values)
