"""Do two artifacts differ? Two sets of repeats in, the ratio with its interval and a verdict out. Pure, host only.

Two differ only if the interval of their ratio excludes 1 and the ratio is further from 1 than the same instrument's own repeatability
(measurement.md 1.6 and 1.8), of which an interval over repeats knows nothing. Repeats of one round are compared in pairs, so that a
drift of the machine meets both alike; repeats that share no rounds by Welch's t. Knows no store and measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.measure.plan import gross_j_per_image, is_rejected, median_latency_s
from edgejoule.measure.stats import LogRatio, interval_spread, paired_ratio, unpaired_ratio, welch_ratio
from edgejoule.records import Grade, Interval, Measurement, Trial, Workload
from edgejoule.scenarios import scenario

Figure = Literal["latency", "energy"]
LATENCY_FLOOR = 0.01
# By the instrument's grade; a model (D) tells its own assumptions apart, not two artifacts.
ENERGY_FLOORS: Mapping[Grade, float | None] = {"A": 0.01, "B": 0.02, "C": 0.03, "D": None}
FEWEST_PAIRS = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first over the second (``n`` pairs, or the smaller number of repeats), whether they differ, and one sentence that says why."""

    ratio: Interval
    differs: bool
    reason: str
    p_value: float | None = None  # two-sided, for a ratio of 1; None where no interval can be claimed


def least_difference(figure: Figure, grade: Grade = "C") -> float | None:
    """The relative difference below which two figures count as one, however narrow the interval; None where none can be told."""
    return LATENCY_FLOOR if figure == "latency" else ENERGY_FLOORS[grade]


def compare_values(
    ours: Sequence[float], theirs: Sequence[float], least: float | None, paired: bool = True, confidence: float = 0.95
) -> Verdict:
    """Two sets of repeats, in pairs (the i-th of both are of one round) or not; ``least`` as ``least_difference`` gives it.

    Raises MeterError where there is nothing to compare, a repeat is not positive, or pairs are not as many on both sides.
    """
    return _judged((paired_ratio if paired else unpaired_ratio)(ours, theirs), least, confidence)


def compare_trials(ours: Sequence[Trial], theirs: Sequence[Trial], figure: Figure = "latency", confidence: float = 0.95) -> Verdict:
    """Two artifacts from their stored trials, rejected ones left out; repeats of one number on one machine are pairs.

    All repeats are compared unpaired where fewer than half of the smaller set have a partner. Energy is gross, per image; latency per
    inference, so that batches must be equal. Raises MeterError where a side has no good repeat with that figure, and where the
    two must not be compared: another scenario, batch or protocol, or energies of another grade or scope.
    """
    kept, other = ([trial for trial in trials if not is_rejected(trial)] for trials in (ours, theirs))
    ways = [{_way(trial.workload, trial.protocol.name, figure) for trial in side} for side in (kept, other)]
    shared = ways[0] & ways[1]
    if all(ways) and not shared:
        raise MeterError(f"{min(ways[0])} and {min(ways[1])} are not comparable: measure both in one way")
    kept, other = ([trial for trial in trials if _way(trial.workload, trial.protocol.name, figure) in shared] for trials in (kept, other))
    mine, yours = _by_round(kept, figure), _by_round(other, figure)
    for found, trials in ((mine, ours), (yours, theirs)):
        if not found:
            raise MeterError(f"none of {len(trials)} repeats holds a good {figure}: measure that artifact again (for energy, with a meter)")
    grade = _common(*(_instrument(trials) for trials in (kept, other))) if figure == "energy" else "C"
    least = least_difference(figure, grade)
    rounds = sorted(set(mine) & set(yours))
    if len(rounds) >= FEWEST_PAIRS and 2 * len(rounds) >= min(len(mine), len(yours)):
        return compare_values([mine[key] for key in rounds], [yours[key] for key in rounds], least, True, confidence)
    return compare_values(list(mine.values()), list(yours.values()), least, False, confidence)


def compare_measurements(ours: Measurement, theirs: Measurement, figure: Figure = "latency", confidence: float = 0.95) -> Verdict:
    """Two artifacts from their summaries, whose intervals are 95 %: unpaired, because a summary has forgotten its rounds.

    The scatter of the repeats is had back from the intervals; that of a logarithm is its relative scatter, which is right to 1 % up
    to a scatter of 10 %. Raises MeterError as ``compare_trials`` does.
    """
    ways = [_way(one.workload, one.protocol, figure) for one in (ours, theirs)]
    if ways[0] != ways[1]:
        raise MeterError(f"{ways[0]} and {ways[1]} are not comparable: measure both in one way")
    mine, yours = _figure(ours, figure), _figure(theirs, figure)
    grade = _common((ours.grade, ours.scope), (theirs.grade, theirs.scope)) if figure == "energy" else "C"
    if mine.value <= 0 or yours.value <= 0:
        raise MeterError(f"cannot take the ratio of a {figure} that is zero or negative: expected positive values only")
    spreads = [interval_spread(one) for one in (mine, yours)]
    known = [spread for spread in spreads if spread is not None]
    counts = [mine.n, yours.n] if len(known) == 2 else [1, 1]
    value = math.log(mine.value) - math.log(yours.value)
    return _judged(welch_ratio(value, known if len(known) == 2 else [0.0, 0.0], counts), least_difference(figure, grade), confidence)


def holm(verdicts: Sequence[Verdict], confidence: float = 0.95) -> tuple[Verdict, ...]:
    """The verdicts, in their order, where several comparisons were made at once: the chance of any false one stays below 1 - confidence.

    Holm 1979, Scand. J. Statist. 6, 65: the k-th smallest p-value of m must be at most (1 - confidence) / (m - k + 1), and so must all
    before it. Ratios and intervals stay those of each comparison alone.
    """
    order = sorted(range(len(verdicts)), key=lambda i: _certain(verdicts[i]))
    found, holds = list(verdicts), True
    for place, i in enumerate(order):
        holds = holds and _certain(verdicts[i]) <= (1 - confidence) / (len(verdicts) - place)
        if verdicts[i].differs and not holds:
            found[i] = replace(verdicts[i], differs=False, reason=f"no longer certain among {len(verdicts)} comparisons (Holm)")
    return tuple(found)


def _judged(logs: LogRatio, least: float | None, confidence: float) -> Verdict:
    """Symmetric: the first over the second differs exactly where the second over the first does."""
    ratio, p_value = logs.interval(confidence), logs.p_value()
    away = max(ratio.value, 1 / ratio.value) - 1
    shown = f"{100 * (ratio.value - 1):+.1f} %"
    if least is None:
        return Verdict(
            replace(ratio, low=None, high=None), False, "the energies are estimates (grade D), which tell no two artifacts apart"
        )
    if ratio.low is None or ratio.high is None:
        return Verdict(ratio, False, f"{shown}, but one repeat has no interval: measure at least two of each")
    bounds = f"{100 * confidence:g} % interval {100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f} %"
    if ratio.low <= 1 <= ratio.high:
        return Verdict(ratio, False, f"{shown}, and the {bounds} holds 0", p_value)
    if away <= least:
        return Verdict(
            ratio, False, f"{shown} is within the {100 * least:g} % by which the instrument itself may be off from day to day", p_value
        )
    return Verdict(ratio, True, f"{shown}, {bounds}, beyond the {100 * least:g} % of the instrument", p_value)


def _certain(verdict: Verdict) -> float:
    return 1.0 if verdict.p_value is None else verdict.p_value


def _way(work: Workload, protocol: str, figure: Figure) -> str:
    """How it was measured: what two must have in common. Joules per image may be of other batches, but not of other idle."""
    how = f"{work.scenario}, batch {work.batch}" if figure == "latency" or scenario(work.scenario).hz else "back to back"
    return f"{how}{', end to end' if work.end_to_end else ''}, {protocol}"


def _by_round(trials: Sequence[Trial], figure: Figure) -> dict[tuple[object, ...], float]:
    """The figure by what makes two repeats a pair: number, machine, protocol, workload but for the images, meter."""
    found: dict[tuple[object, ...], float] = {}
    for trial in trials:
        value = median_latency_s(trial) if figure == "latency" else gross_j_per_image(trial)
        work = (trial.workload.scenario, trial.workload.batch, trial.workload.end_to_end)
        if value is not None:
            found[(trial.environment.fingerprint, trial.protocol.name, *work, trial.meter, trial.repeat)] = value
    return found


def _instrument(trials: Sequence[Trial]) -> tuple[Grade, str]:
    totals = [trace for trial in trials for trace in trial.traces if trace.total]
    return max((trace.grade for trace in totals), default="D"), "+".join(sorted({trace.scope for trace in totals}))


def _common(ours: tuple[Grade, str], theirs: tuple[Grade, str]) -> Grade:
    if ours != theirs:
        shown = [f"grade {grade}, scope {scope or 'none'}" for grade, scope in (ours, theirs)]
        raise MeterError(f"energies of {shown[0]} and of {shown[1]} are not comparable: measure both with one instrument")
    return ours[0]


def _figure(measured: Measurement, figure: Figure) -> Interval:
    found = measured.latency_s if figure == "latency" else measured.energy_j
    if found is None:
        raise MeterError(f"{measured.variant} has no energy to compare: measure it with a meter")
    return found
