"""A recording in, its energy out: of every rail between two instants, of the whole above idle, and of each inference in it.

A rail's energy is the plain trapezoid with interpolated edges, as anyone can check by hand. What lies outside the window on both
sides is idle, and the energy above it is taken as energy.py takes it. Inferences are found in the sum of the rails that add up
to the whole. Integrates what parses: doubts become caveats, and only what has no one meaning is refused. Reads no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.background import Curve
from edgejoule.measure.energy import FEWEST_UPDATES, GAP, STUCK, Energy, integrate, is_saturated, pad_s, samples, window_energy
from edgejoule.measure.recording import Recording
from edgejoule.measure.segment import Found, K, segmented
from edgejoule.records import Caveat, Phase, Trace, TraceEnergy

ENDS = 1.5  # periods: a rail that lacks more at an end of the window is told
CLOSURE = 0.01  # between a rail's power, integrated, and the file's own counter of it
FEWEST = 5  # samples of idle on a side, for it to count


@dataclass(frozen=True, slots=True)
class Traced:
    """The energy, and what it was seen in: the sum of the total rails in the window, and the inferences, where they were asked for."""

    energy: TraceEnergy
    curve: Curve | None
    found: Found | None


def trace_energy(
    recording: Recording, start_s: float | None = None, stop_s: float | None = None, segments: int | None = None, k: float = K
) -> TraceEnergy:
    """The energy of a recording between two instants, in seconds from its first sample; of all of it where they are None.

    Raises MeterError for a window outside the recording, and where not exactly ``segments`` inferences are found in it.
    """
    return traced(recording, start_s, stop_s, segments, k).energy


def traced(
    recording: Recording, start_s: float | None = None, stop_s: float | None = None, segments: int | None = None, k: float = K
) -> Traced:
    """As ``trace_energy``, with the curve behind it."""
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file's powers: what is not finite is None
        return _traced(recording, start_s, stop_s, segments, k)


def _traced(recording: Recording, start_s: float | None, stop_s: float | None, segments: int | None, k: float) -> Traced:
    start, stop = _window(recording, start_s, stop_s)
    rails, counters = _by_rail(recording.traces)
    doubts = [*recording.caveats]
    energy_j = {name: _joules(trace, start, stop) for name, trace in rails.items()}
    for name, trace in rails.items():
        doubts += _doubts(trace, start, stop, energy_j[name])
        doubts += _closure(trace, counters.get(name), start, stop)
    totals = [trace for trace in rails.values() if trace.total]
    if not totals:
        doubts.append(caveat("unknown_board", ", ".join(rails)))
    parts = [energy_j[trace.rail] for trace in totals]
    whole = math.fsum(part for part in parts if part is not None) if totals and None not in parts else None
    if whole is not None and whole <= 0:
        doubts.append(caveat("negative_energy", f"{whole:.4g} J in {stop - start:.3g} s"))
        whole = None
    above = _above_idle(totals, start, stop) if totals else Energy(None, None, None, None)
    doubts += above.caveats
    curve = curve_of(totals or (list(rails.values()) if len(rails) == 1 else []), start, stop)
    net, idle, found = above.net_energy_j, above.idle_w, None
    if segments is not None:
        if curve is None or not np.all(np.isfinite(curve.joules)):
            raise MeterError(f"cannot look for inferences in {', '.join(rails)}: expected rails that are known to add up to the whole")
        found = segmented(curve, segments, k)
        doubts += found.caveats
        if whole is not None:  # what lies outside the window may hold other inferences
            net, idle = _above_background(whole, curve, found)
    energy = _record(recording, rails, totals, (start, stop), energy_j)
    energy = dataclasses.replace(energy, total_energy_j=whole, net_energy_j=net if whole is not None else None, idle_w=idle)
    if found is not None:
        energy = dataclasses.replace(
            energy,
            segments=found.segments,
            segment_energy_j=found.energies(),
            segment_net_energy_j=found.energies(net=True),
            sensitivity=found.sensitivity,
        )
    return Traced(dataclasses.replace(energy, caveats=_distinct(doubts)), curve, found)


def curve_of(totals: Sequence[Trace], start_s: float, stop_s: float) -> Curve | None:
    """The sum of the rails in the window, on the stamps of the one with most samples; None where fewer than two are common.

    Power of a counter is the slope between its stamps, at their middles. Joules are added, not watts: no grid changes the energy.
    """
    if not totals:
        return None
    each = [_curve(trace) for trace in totals]
    grid = max((curve.times_s for curve in each), key=len)
    first = max(start_s, *(curve.times_s[0] for curve in each))
    last = min(stop_s, *(curve.times_s[-1] for curve in each))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) < 2:
        return None
    power, joules = np.zeros(len(grid)), np.zeros(len(grid))
    for curve in each:
        power += np.interp(grid, curve.times_s, curve.power_w)
        joules += np.interp(grid, curve.times_s, curve.joules)
    return Curve(grid, power, joules - joules[0])


def _curve(trace: Trace) -> Curve:
    times, values = samples(trace)
    if trace.quantity == "power_w":
        return Curve(times, values, np.concatenate(([0.0], np.cumsum(np.diff(times) * (values[1:] + values[:-1]) / 2))))
    middles = (times[1:] + times[:-1]) / 2
    return Curve(middles, np.diff(values) / np.diff(times), np.interp(middles, times, values))


def _window(recording: Recording, start_s: float | None, stop_s: float | None) -> tuple[float, float]:
    start, stop = 0.0 if start_s is None else start_s, recording.duration_s if stop_s is None else stop_s
    if not (math.isfinite(start) and math.isfinite(stop)):
        raise MeterError(f"--start {start:g} and --stop {stop:g}: expected seconds from the first sample")
    slack = 1e-6 * recording.duration_s  # of a number that was printed and typed again
    if start < -slack or stop > recording.duration_s + slack:
        end = f"{recording.duration_s:.9g}"
        raise MeterError(f"--start {start:g} and --stop {stop:g} leave the trace: expected seconds from its first sample, 0 to {end}")
    if start >= stop:
        raise MeterError(f"--start {start:g} is not before --stop {stop:g}: expected a window, in seconds from the first sample")
    return max(start, 0.0), min(stop, recording.duration_s)


def _by_rail(traces: Sequence[Trace]) -> tuple[dict[str, Trace], dict[str, Trace]]:
    """The trace that is integrated of each rail, its power where there is one, and the file's own counters beside those."""
    rails: dict[str, Trace] = {}
    counters: dict[str, Trace] = {}
    for trace in traces:  # a recording's powers come first, even those that became running integrals
        (counters if trace.rail in rails else rails)[trace.rail] = trace
    return rails, counters


def _joules(trace: Trace, start_s: float, stop_s: float) -> float | None:
    """Between start and stop; a few periods that are missing at an end are not made up. None where more is missing, or not finite."""
    times, _ = samples(trace)
    first, last = max(start_s, float(times[0])), min(stop_s, float(times[-1]))
    if (first - start_s) + (stop_s - last) > GAP * trace.period_s:
        return None
    joules = integrate(trace, first, last)
    return joules if joules is not None and math.isfinite(joules) else None


def _covered_s(trace: Trace, start_s: float, stop_s: float) -> float:
    """How much of the window a rail's samples span."""
    times, _ = samples(trace)
    return float(min(stop_s, times[-1]) - max(start_s, times[0]))


def _above_idle(totals: Sequence[Trace], start_s: float, stop_s: float) -> Energy:
    """The total above the idle outside the window, where there is enough of that, and energy.py's doubts about it."""
    every = [samples(trace)[0] for trace in totals]
    first, last = max(float(times[0]) for times in every), min(float(times[-1]) for times in every)
    slack = GAP * max(trace.period_s for trace in totals)
    start = first if start_s < first <= start_s + slack else start_s
    stop = last if stop_s > last >= stop_s - slack else stop_s
    if not first <= start < stop <= last:
        return Energy(None, None, None, None)
    least = max(pad_s(trace) + (2 + FEWEST) * trace.period_s for trace in totals)
    before = Phase("idle_before", first, start) if start - first >= least else None
    after = Phase("idle_after", stop, last) if last - stop >= least else None
    return window_energy(totals, Phase("window", start, stop), before, after)


def _above_background(whole_j: float, curve: Curve, found: Found) -> tuple[float, float]:
    """Net joules of the window and the mean background, where the idle between the inferences is all there is."""
    level, times = found.background.power_w, curve.times_s
    under = float(np.sum(np.diff(times) * (level[1:] + level[:-1]) / 2))
    idle = under / float(times[-1] - times[0])
    return whole_j - under, idle


def _doubts(trace: Trace, start_s: float, stop_s: float, joules: float | None) -> list[Caveat]:
    """What one rail's samples in the window give away."""
    times, values = samples(trace)
    inside = (times >= start_s) & (times <= stop_s)
    held, steps, name = values[inside], np.diff(times[inside]), trace.rail
    doubts: list[Caveat] = []
    if joules is None:
        doubts.append(caveat("trace_gap", f"{name}: sampled from {times[0]:.4g} to {times[-1]:.4g} s only, or not finite"))
    elif (missing := max(times[0] - start_s, stop_s - times[-1])) > ENDS * trace.period_s:
        doubts.append(caveat("trace_gap", f"{name}: no sample in {missing:.3g} s at an end of the window"))
    if len(held) < FEWEST_UPDATES:
        doubts.append(caveat("few_updates", f"{name}: {len(held)} samples in {stop_s - start_s:.4g} s"))
    if len(steps) and (longest := float(np.max(steps))) > GAP * max(float(np.median(steps)), trace.period_s):
        doubts.append(caveat("trace_gap", f"{name}: {longest:.3g} s without a sample, where one came every {np.median(steps):.3g} s"))
    if trace.quantity == "power_w" and len(values) > STUCK and np.ptp(values) == 0 and (trace.total or values[0] != 0):
        doubts.append(caveat("stuck_sensor", f"{name}: {values[0]:.4g} W in all {len(values)} samples"))
    if trace.quantity == "power_w" and is_saturated(held):
        doubts.append(caveat("saturated", f"{name}: at {np.max(held):.4g} W again and again"))
    return doubts


def _closure(trace: Trace, counter: Trace | None, start_s: float, stop_s: float) -> list[Caveat]:
    """Whether the integrated power agrees with the file's own counter, as far as the steps of that can tell."""
    if counter is None:
        return []
    summed, counted = (_joules(one, start_s, stop_s) for one in (trace, counter))
    steps = np.abs(np.diff(samples(counter)[1]))
    if summed is None or counted is None or not np.any(steps):
        return []
    grain = float(np.min(steps[steps > 0]))
    if abs(summed - counted) <= CLOSURE * abs(counted) + grain:
        return []
    return [caveat("closure", f"{trace.rail}: {summed:.4g} J integrated from power, {counted:.4g} J by the file's own counter")]


def _record(
    recording: Recording, rails: dict[str, Trace], totals: Sequence[Trace], window: tuple[float, float], energy_j: dict[str, float | None]
) -> TraceEnergy:
    first = totals[0] if totals else next(iter(rails.values()))
    return TraceEnergy(
        format=recording.format,
        rails=tuple(rails),
        total_rails=tuple(trace.rail for trace in totals),
        samples=recording.samples,
        duration_s=recording.duration_s,
        period_s=first.period_s,
        start_s=window[0],
        stop_s=window[1],
        energy_j=energy_j,
        power_w={name: None if joules is None else joules / _covered_s(rails[name], *window) for name, joules in energy_j.items()},
        total_energy_j=None,
        net_energy_j=None,
        idle_w=None,
        grade=first.grade,
        scope=first.scope,
    )


def _distinct(doubts: Sequence[Caveat]) -> tuple[Caveat, ...]:
    """One of a code and a rail: energy.py sees some doubts too."""
    return tuple({(doubt.code, doubt.seen.partition(":")[0]): doubt for doubt in reversed(doubts)}.values())[::-1]
