"""Raw traces and a window in, joules out: gross, above idle, and every reason to doubt them. Pure numpy: no clock, no sensor.

Power is integrated by trapezoid on the true sample times with interpolated edges; a counter by its interpolated difference.
A sensor that averages over w smears a step; so does a poll every p. Integrating from ``pad`` before the window to ``pad``
after it, pad >= 5 w, and taking idle off again conserves the area (the edge bias, -w/2T for a boxcar and -w/T for an
exponential filter, vanishes), which is what is done wherever the idle before and after is long enough. What happens in that
pad beyond idle (a clock that ramps down slowly) is thus charged to the window. Does not know images or repeats.
What cannot be measured is None, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgejoule.caveats import caveat
from edgejoule.records import Caveat, Phase, Trace

PAD = 5.0  # averaging times on each side: an exponential filter has forgotten all but 0.7 %
FEWEST_UPDATES = 20
FEWEST_READS = 5  # of a counter, within the window
GAP = 5.0  # median periods
STUCK = 10.0  # update times without a change
IDLE_DRIFT_W, IDLE_DRIFT = 0.05, 0.03
CLOCK_S, CLOCK = 0.05, 0.01  # how well two clocks must agree: the smaller of 50 ms and 1 % of the window
COUNTER = 0.05  # between a counter and the integrated power beside it
BESIDE = "/power"  # a rail's power, recorded beside its counter
PILED, DISTINCT, VISITS = 0.2, 20, 5  # a fifth of the samples at the very top, where they otherwise take twenty values
AMPLE = 100.0  # averaging times: a window this long needs no padding (bias <= 0.5 % boxcar, 1 % exponential)

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Energy:
    """A window's energy over all rails that add up to the whole; None where it could not be measured (``caveats`` say why)."""

    energy_j: float | None  # gross
    net_energy_j: float | None  # above idle
    idle_w: float | None
    power_w: float | None  # mean over the window, gross
    caveats: tuple[Caveat, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rail:
    energy_j: float | None
    net_j: float | None
    idle_w: float | None
    before_w: float | None = None
    after_w: float | None = None
    blur_w: float = 0.0  # by how much the two may differ because the sensor updates now and then
    caveats: tuple[Caveat, ...] = ()


def samples(trace: Trace) -> tuple[Samples, Samples]:
    """Times on the trial's clock in seconds and values in SI, both (N,), without a copy of the values."""
    times = np.frombuffer(trace.times_s, dtype=np.float64) if len(trace.times_s) else np.empty(0)
    values = np.frombuffer(trace.values, dtype=np.float64) if len(trace.values) else np.empty(0)
    return times + trace.offset_s, values


def integrate(trace: Trace, start_s: float, stop_s: float) -> float | None:
    """Joules of one rail between two instants of the trial's clock; None where the trace does not cover them."""
    times, values = samples(trace)
    if len(times) < 2 or times[0] > start_s or times[-1] < stop_s or stop_s <= start_s:
        return None
    if trace.quantity == "energy_j":
        first, last = np.interp([start_s, stop_s], times, values)
        return float(last - first)
    inside = (times > start_s) & (times < stop_s)
    at = np.concatenate(([start_s], times[inside], [stop_s]))
    power = np.interp(at, times, values)
    return float(np.sum(np.diff(at) * (power[1:] + power[:-1]) / 2))


def pad_s(trace: Trace) -> float:
    """How far beyond the window's edges this rail must be integrated: its memory, or two polls, and what its clock may be off by."""
    return max(PAD * trace.averaging_s, 2 * trace.period_s) + trace.offset_uncertainty_s


def window_energy(traces: Sequence[Trace], window: Phase, before: Phase | None = None, after: Phase | None = None) -> Energy:
    """The energy of a window from the rails with ``total=True``, with the idle phases around it for the net figure.

    No traces give an empty Energy with the caveat ``no_meter``. One rail that cannot be measured leaves the sum unmeasured.
    """
    totals = [trace for trace in traces if trace.total]
    if not totals:
        seen = "no meter recorded" if not traces else "none of the recorded rails is part of the total"
        return Energy(None, None, None, None, (caveat("no_meter", seen),))
    rails = [_rail(trace, window, before, after) for trace in totals]
    doubts = [doubt for rail in rails for doubt in rail.caveats]
    gross, net, idle = _sum([r.energy_j for r in rails]), _sum([r.net_j for r in rails]), _sum([r.idle_w for r in rails])
    doubts += [found for trace in totals for found in counter_doubts(trace, traces, window)]
    doubts += _idle_drift(_sum([r.before_w for r in rails]), _sum([r.after_w for r in rails]), sum(r.blur_w for r in rails))
    if gross is not None and gross <= 0:
        doubts.append(caveat("negative_energy", f"{gross:.4g} J in {window.stop_s - window.start_s:.3g} s"))
        gross = net = None
    if net is not None and net <= 0:
        doubts.append(caveat("negative_energy", f"{net:.4g} J above an idle of {idle:.4g} W"))
        net = None
    power = None if gross is None else gross / (window.stop_s - window.start_s)
    return Energy(gross, net, idle, power, tuple(_distinct(doubts)))


def _rail(trace: Trace, window: Phase, before: Phase | None, after: Phase | None) -> _Rail:
    duration = window.stop_s - window.start_s
    doubts, unmeasured = _check(trace, window)
    pad = pad_s(trace)
    before_w = _idle_w(trace, before)
    after_w = _idle_w(trace, after)
    known = [w for w in (before_w, after_w) if w is not None]
    idle_w = float(np.mean(known)) if known else None
    gross = integrate(trace, window.start_s, window.stop_s)
    net = None if gross is None or idle_w is None else gross - idle_w * duration
    padded = None
    if before is not None and after is not None and before_w is not None and after_w is not None:
        if min(before.stop_s - before.start_s, after.stop_s - after.start_s) >= pad:
            padded = integrate(trace, window.start_s - pad, window.stop_s + pad)
        if padded is not None:
            mean_w = _idle_at((window.start_s + window.stop_s) / 2, before, after, before_w, after_w)
            idle_w, net = mean_w, padded - mean_w * (duration + 2 * pad)
            gross = net + mean_w * duration
    if padded is None:
        doubts += _unpadded(trace, duration, net is not None)
    if unmeasured or gross is None:
        if gross is None and not unmeasured:
            doubts.append(caveat("trace_gap", f"{trace.rail}: the samples do not cover the window"))
        return _Rail(None, None, None, caveats=tuple(doubts))
    return _Rail(gross, net, idle_w, before_w, after_w, _idle_blur_w(trace, before, after, idle_w), tuple(doubts))


def _unpadded(trace: Trace, duration_s: float, has_net: bool) -> list[Caveat]:
    """What is wrong with an energy that was not integrated into the idle on both sides."""
    memory_s, blind_s = trace.averaging_s, trace.offset_uncertainty_s
    doubts: list[Caveat] = []
    if duration_s < AMPLE * memory_s:
        doubts.append(caveat("short_window", f"{trace.rail}: {duration_s:.3g} s, and the sensor averages over {memory_s:g} s"))
    if has_net and memory_s > 0:
        bias = [100 * memory_s / duration_s / part for part in (2, 1)]  # boxcar, exponential
        seen = f"{trace.rail}: net energy is low by {bias[0]:.2g} to {bias[1]:.2g} % ({memory_s:g} s of averaging in {duration_s:.3g} s)"
        doubts.append(caveat("unpadded", seen))
    if blind_s > min(CLOCK_S, CLOCK * duration_s):
        doubts.append(caveat("clock_uncertain", f"{trace.rail}: +-{1e3 * blind_s:.3g} ms in a window of {duration_s:.3g} s"))
    return doubts


def _check(trace: Trace, window: Phase) -> tuple[list[Caveat], bool]:
    """The doubts about one rail in the window, and whether they leave its energy unmeasured."""
    times, values = samples(trace)
    duration = window.stop_s - window.start_s
    inside = (times >= window.start_s) & (times <= window.stop_s)
    held = values[inside]
    counter = trace.quantity == "energy_j"
    updates = _updates(held, duration, trace.averaging_s, counter)
    doubts: list[Caveat] = []
    frozen_s = _frozen_s(trace, times[inside], held) if counter else _unmoved_s(trace, times, values, window)
    if frozen_s is not None:
        return [caveat("stuck_sensor", f"{trace.rail} did not change for {frozen_s:.3g} s")], True
    around = (times >= window.start_s - pad_s(trace)) & (times <= window.stop_s + pad_s(trace))
    steps = np.diff(times[around])
    if len(steps) and (longest := float(np.max(steps))) > GAP * max(float(np.median(steps)), trace.period_s):
        doubts.append(caveat("trace_gap", f"{trace.rail}: {longest:.3g} s without a sample, where one came every {np.median(steps):.3g} s"))
    if not counter and is_saturated(held):
        doubts.append(caveat("saturated", f"{trace.rail}: at {np.max(held):.4g} W again and again"))
    if updates < FEWEST_UPDATES - 0.5:  # half an update: a window of exactly 20 may begin or end on one
        doubts.append(caveat("few_updates", f"{trace.rail}: {updates:.0f} updates in {duration:.3g} s"))
        return doubts, True
    return doubts, False


def counter_doubts(counter: Trace, traces: Sequence[Trace], window: Phase) -> list[Caveat]:
    """Whether a counter agrees with the power recorded beside it (rail ``<rail>/power``), integrated over the same padded window."""
    beside = next((t for t in traces if t.rail == counter.rail + BESIDE and t.quantity == "power_w"), None)
    if counter.quantity != "energy_j" or beside is None:
        return []
    pad = max(pad_s(counter), pad_s(beside))
    both = [integrate(trace, window.start_s - pad, window.stop_s + pad) for trace in (counter, beside)]
    counted, summed = both
    if counted is None or summed is None or counted <= 0 or abs(summed / counted - 1) <= COUNTER:
        return []
    return [caveat("counter_differs", f"{counter.rail}: {counted:.4g} J counted, {summed:.4g} J integrated from power")]


def is_saturated(watts: Samples) -> bool:
    """Whether samples pile up at the top of the sensor's range: a fifth of them, come back to again and again, the others varying."""
    if len(watts) < DISTINCT or len(np.unique(watts)) < DISTINCT:
        return False
    top = watts == watts.max()
    visits = np.count_nonzero(top[1:] & ~top[:-1])  # a filter that settles arrives once
    return bool(np.count_nonzero(top) > PILED * len(watts) and visits >= VISITS)


def _updates(held: Samples, duration_s: float, averaging_s: float, counter: bool) -> float:
    """How many independent updates a window holds: of power, no more than were read; of a counter, all that it made between reads.

    A counter that has moved at every read is taken at its word about how often it updates; otherwise its moves are counted.
    """
    word = duration_s / averaging_s if averaging_s > 0 else np.inf
    if not counter:
        return min(float(len(held)), word)
    moves = int(np.count_nonzero(np.diff(held)))
    return word if moves == len(held) - 1 and len(held) >= FEWEST_READS else float(moves)


def _frozen_s(trace: Trace, times: Samples, joules: Samples) -> float | None:
    """How long a counter stood still, where that is ten times as long as it ever should: its own word, its polls, its median move."""
    if len(joules) < STUCK:
        return None
    moves = np.flatnonzero(np.diff(joules))
    still = times[np.append(moves, len(joules) - 1)] - times[np.append(0, moves + 1)]
    longest = float(np.max(still))
    usual = float(np.median(np.diff(times[moves]))) if len(moves) > 1 else 0.0
    return longest if not len(moves) or longest > STUCK * max(trace.averaging_s, trace.period_s, usual) else None


def _unmoved_s(trace: Trace, times: Samples, watts: Samples, window: Phase) -> float | None:
    """How long power stayed the same, where it did so through the window and the sensor's memory before or after it.

    A coarse sensor may well hold one value of a steady load, but not of the idle beside it too.
    """
    for start, stop in ((window.start_s - pad_s(trace), window.stop_s), (window.start_s, window.stop_s + pad_s(trace))):
        seen = (times >= start) & (times <= stop)
        if not np.any(seen) or np.ptp(watts[seen]) > 0:
            continue
        length = float(np.ptp(times[seen]))
        if np.count_nonzero(seen) >= STUCK and length > STUCK * max(trace.averaging_s, trace.period_s):
            return length
    return None


def _idle_w(trace: Trace, phase: Phase | None) -> float | None:
    """Mean watts of an idle phase, once the sensor has forgotten the load before it; None where too little is left.

    Two polls are cut off at each end (the interpolation of the poll that straddles an edge mixes idle with load), and what the clock
    may be off by.
    """
    if phase is None:
        return None
    edge, blind = 2 * trace.period_s, trace.offset_uncertainty_s
    start, stop = phase.start_s + max(PAD * trace.averaging_s, edge) + blind, phase.stop_s - edge - blind
    joules = integrate(trace, start, stop)
    return None if joules is None else joules / (stop - start)


def _idle_at(at_s: float, before: Phase, after: Phase, before_w: float, after_w: float) -> float:
    """Idle watts interpolated in time between the middles of the two idle phases."""
    first, last = (before.start_s + before.stop_s) / 2, (after.start_s + after.stop_s) / 2
    return float(np.interp(at_s, [first, last], [before_w, after_w]))


def _idle_blur_w(trace: Trace, before: Phase | None, after: Phase | None, idle_w: float | None) -> float:
    """A counter that updates every u is off by up to u at each end of an idle phase: two of them differ by as much as 2 u / length."""
    if trace.quantity != "energy_j" or before is None or after is None or idle_w is None:
        return 0.0
    lengths = [phase.stop_s - phase.start_s - PAD * trace.averaging_s for phase in (before, after)]
    return 2 * trace.averaging_s / min(lengths) * abs(idle_w) if min(lengths) > 0 else 0.0


def _idle_drift(before_w: float | None, after_w: float | None, blur_w: float = 0.0) -> list[Caveat]:
    if before_w is None or after_w is None:
        return []
    allowed = max(IDLE_DRIFT * abs(before_w + after_w) / 2, IDLE_DRIFT_W, blur_w)
    if abs(after_w - before_w) <= allowed:
        return []
    return [caveat("idle_drift", f"{before_w:.3g} W before, {after_w:.3g} W after")]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _distinct(doubts: Sequence[Caveat]) -> list[Caveat]:
    return list({(doubt.code, doubt.seen): doubt for doubt in doubts}.values())
