"""Verdicts: an interval that excludes 1 is not enough, what must not be compared is refused, and several at once cost certainty."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.compare import Verdict, compare_measurements, compare_trials, compare_values, holm, least_difference
from edgejoule.measure.stats import ratio_interval, t_interval, unpaired_ratio_interval
from edgejoule.measure.summary import summarise
from edgejoule.records import Grade, Interval, Phase, Trace, Trial, Workload, floats
from tests.samples import artifact
from tests.samples import trial as sample_trial


def repeats(latencies_s: list[float], watts: float = 10.0, grade: Grade = "C", **more: object) -> list[Trial]:
    """One repeat for each latency, 200 inferences at so many watts, with two seconds of 2 W idle around them."""
    found = []
    for n, latency in enumerate(latencies_s):
        length = 200 * latency
        phases = (Phase("idle_before", 0.0, 1.0), Phase("window", 1.0, 1.0 + length), Phase("idle_after", 1.0 + length, 2.0 + length))
        times = np.arange(0, 2.0 + length + 0.01, 0.01)
        joules = 2 * times + (watts - 2) * np.clip(times - 1, 0, length)
        trace = Trace("package-0", "energy_j", floats(times), floats(joules), "rapl", grade, "package", 0.01)
        fields = {"phases": phases, "latencies_s": floats([latency] * 200), "traces": (trace,), "caveats": ()} | more
        found.append(dataclasses.replace(sample_trial(repeat=n), **fields))
    return found


def test_both_the_interval_and_the_instrument_must_tell_them_apart() -> None:
    base = [1.0, 1.001, 0.999, 1.0005, 0.9995]
    far, near, noisy = [1.05 * b for b in base], [1.005 * b for b in base], [1.3, 0.8, 1.4, 0.9, 1.0]
    found = compare_values(far, base, 0.01)
    assert found.differs and found.ratio == ratio_interval(far, base) and found.p_value is not None and "+5.0 %" in found.reason
    within = compare_values(near, base, 0.01)
    assert not within.differs and within.ratio.low is not None and within.ratio.low > 1 and "within the 1 %" in within.reason
    wide = compare_values(noisy, base, 0.01)
    assert not wide.differs and "holds 0" in wide.reason and wide.p_value is not None and wide.p_value > 0.05
    assert compare_values(far, base, 0.03).differs and not compare_values(far, base, 0.06).differs
    less = [0.9705 * b for b in base]  # 2.95 % less, of which the other is 3.04 % more
    assert compare_values(less, base, 0.03).differs and compare_values(base, less, 0.03).differs
    assert compare_values([1.1], [1.0], 0.01).ratio == Interval(pytest.approx(1.1), None, None, 1)
    assert "at least two" in compare_values([1.1], [1.0], 0.01).reason


@given(st.lists(st.tuples(st.floats(0.9, 1.1), st.floats(0.9, 1.1)), min_size=2, max_size=8), st.sampled_from([0.01, 0.03]), st.booleans())
def test_a_verdict_does_not_depend_on_who_comes_first(pairs: list[tuple[float, float]], least: float, paired: bool) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    here, there = compare_values(ours, theirs, least, paired), compare_values(theirs, ours, least, paired)
    if abs(max(here.ratio.value, there.ratio.value) - 1 - least) > 1e-9 and min(abs(here.ratio.low - 1), abs(here.ratio.high - 1)) > 1e-9:  # type: ignore[operator]
        assert here.differs == there.differs
    assert here.ratio.value == pytest.approx(1 / there.ratio.value)


def test_floors_follow_the_instrument() -> None:
    assert [least_difference("energy", grade) for grade in ("A", "B", "C", "D")] == [0.01, 0.02, 0.03, None]
    assert [least_difference("latency", grade) for grade in ("A", "D")] == [0.01, 0.01]
    watts = {
        grade: compare_trials(repeats([0.01] * 5, 10.25, grade), repeats([0.01] * 5, 10.0, grade), "energy") for grade in ("A", "B", "C")
    }
    assert [found.differs for found in watts.values()] == [True, True, False]


def test_estimates_never_differ() -> None:
    found = compare_trials(repeats([0.01] * 5, 30.0, "D"), repeats([0.01] * 5, 10.0, "D"), "energy")
    assert not found.differs and found.ratio.low is None and found.ratio.value == pytest.approx(3, rel=0.01) and "grade D" in found.reason
    assert compare_trials(repeats([0.02] * 5, 30.0, "D"), repeats([0.01] * 5, 10.0, "D"), "latency").differs


def test_rounds_are_pairs_and_take_the_common_drift_out() -> None:
    drift = [0.010, 0.012, 0.015, 0.011, 0.009]
    ours, theirs = repeats([1.05 * t for t in drift]), repeats(drift)
    paired = compare_trials(ours, theirs)
    assert paired.differs and paired.ratio.n == 5 and paired.ratio.low == pytest.approx(1.05)
    shifted = [dataclasses.replace(trial, repeat=trial.repeat + 10) for trial in theirs]
    apart = compare_trials(ours, shifted)
    assert not apart.differs and apart.ratio == unpaired_ratio_interval([1.05 * t for t in drift], drift)
    elsewhere = [dataclasses.replace(t, environment=dataclasses.replace(t.environment, fingerprint="other")) for t in theirs]
    assert compare_trials(ours, elsewhere).ratio == apart.ratio
    longer = compare_trials(repeats([1.05 * t for t in drift] + [0.02] * 8), theirs)  # of sequential stopping: five rounds were shared
    assert longer.ratio == paired.ratio


def test_rejected_repeats_are_left_out() -> None:
    ours, theirs = repeats([0.011] * 5), repeats([0.010] * 5)
    spoilt = [dataclasses.replace(repeats([0.05] * 3)[2], caveats=(caveat("drift", "x"),)), *(t for t in ours if t.repeat != 2)]
    found = compare_trials(spoilt, theirs)
    assert found.ratio.value == pytest.approx(1.1) and found.ratio.n == 4
    with pytest.raises(MeterError, match="holds a good latency"):
        compare_trials([dataclasses.replace(t, caveats=(caveat("drift", "x"),)) for t in ours], theirs)


def test_what_must_not_be_compared_is_refused() -> None:
    ours = repeats([0.011] * 3)
    with pytest.raises(MeterError, match="one instrument"):
        compare_trials(ours, repeats([0.01] * 3, 10.0, "B"), "energy")
    with pytest.raises(MeterError, match="holds a good energy"):
        compare_trials(ours, repeats([0.01] * 3, traces=()), "energy")
    with pytest.raises(MeterError, match=r"batch 1, .* and offline, batch 8, .* are not comparable"):
        compare_trials(ours, repeats([0.01] * 3, workload=Workload("offline", 8)))
    assert compare_trials(ours, repeats([0.02] * 3, workload=Workload("offline", 8)), "energy").ratio.n == 3  # joules per image
    for wrong in ([], [0.0, 1.0], [1.0]):
        with pytest.raises(MeterError):
            compare_values([1.0, 2.0], wrong, 0.01)


def test_summaries_are_compared_without_their_rounds() -> None:
    fast, slow = ([base * (1 + 0.004 * x) for x in (-1, 0.3, 1, -0.5, 0.2)] for base in (0.010, 0.011))
    ours, theirs = (summarise(repeats(values), artifact()) for values in (slow, fast))
    found, whole = compare_measurements(ours, theirs), unpaired_ratio_interval(slow, fast)
    assert found.differs and found.ratio.n == 5 and found.ratio.value == pytest.approx(whole.value, rel=1e-4)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((whole.low, whole.high), rel=1e-4)
    joules = compare_measurements(ours, theirs, "energy")
    assert joules.differs and joules.ratio.value == pytest.approx(1.1, rel=1e-2)
    single = dataclasses.replace(ours, latency_s=t_interval([0.011]))
    assert not compare_measurements(single, theirs).differs
    with pytest.raises(MeterError, match="no energy"):
        compare_measurements(dataclasses.replace(ours, energy_j=None), theirs, "energy")
    with pytest.raises(MeterError, match="one instrument"):
        compare_measurements(dataclasses.replace(ours, scope="wall"), theirs, "energy")
    for other in (Workload("offline", 8), Workload("streams(n=4)"), Workload(end_to_end=True)):
        with pytest.raises(MeterError, match="in one way"):
            compare_measurements(dataclasses.replace(ours, workload=other), theirs)
    with pytest.raises(MeterError, match="in one way"):
        compare_measurements(dataclasses.replace(ours, protocol="e3p"), theirs)
    assert compare_measurements(dataclasses.replace(ours, workload=Workload("offline", 8)), theirs, "energy").differs


def test_holm_takes_back_what_many_comparisons_make_uncertain() -> None:
    def said(p_value: float | None, differs: bool = True) -> Verdict:
        return Verdict(Interval(1.1, 1.05, 1.15, 5), differs, "why", p_value)

    alone = [said(0.03), said(0.001), said(0.02), said(0.9, False), said(None, False)]
    found = holm(alone)
    assert [verdict.differs for verdict in found] == [False, True, False, False, False]
    assert "5 comparisons" in found[0].reason and found[1] == alone[1] and found[3] == alone[3]
    assert [v.differs for v in holm([said(0.012), said(0.024), said(0.04)])] == [True, True, True]  # 0.05 / 3, / 2, / 1
    assert [v.differs for v in holm([said(0.012), said(0.026), said(0.04)])] == [True, False, False]  # and nothing after one that fails
    assert holm([]) == ()


def test_equal_artifacts_are_rarely_told_apart() -> None:
    rng = np.random.default_rng(0)
    found = [compare_values(*rng.lognormal(0, 0.02, (2, 5)).tolist(), 0.01) for _ in range(600)]
    alike = sum(verdict.ratio.low <= 1 <= verdict.ratio.high for verdict in found)  # type: ignore[operator]
    assert 0.92 < alike / 600 < 0.98 and sum(verdict.differs for verdict in found) / 600 < 0.07


def test_repeats_of_another_scenario_are_never_compared() -> None:
    ours = repeats([0.010, 0.0101, 0.0099, 0.010, 0.0102])
    theirs = [dataclasses.replace(one, workload=Workload("fixed_rate(hz=30)")) for one in ours]
    with pytest.raises(MeterError, match=r"single_stream, batch 1, .* and fixed_rate\(hz=30\), batch 1, .* are not comparable"):
        compare_trials(ours, theirs)
    assert compare_trials(ours, [*theirs, *ours]).ratio.n == 5
