"""Intervals against known values, the plan of rounds, and what a summary keeps, leaves out and says."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.plan import most_trials, needs_repeat, next_round, trial_key
from edgejoule.measure.protocols import profile
from edgejoule.measure.stats import (
    Outlying,
    Uncertainty,
    block_bootstrap,
    effective_sample_size,
    half_width,
    interval_spread,
    outlying,
    percentile,
    ratio_interval,
    sequential_interval,
    t_interval,
    total_uncertainty,
    unpaired_ratio,
    unpaired_ratio_interval,
    variation,
    with_and_without,
)
from edgejoule.measure.summary import summarise
from edgejoule.records import Accuracy, Interval, Phase, Protocol, Trace, Trial, Workload, floats
from tests.samples import artifact
from tests.samples import trial as sample_trial

QUICK = profile("quick")


def repeat(n: int, latency_s: float = 0.01, watts: float = 10.0, protocol: Protocol = QUICK, **more: object) -> Trial:
    """The n-th repeat: 200 inferences of a steady latency at so many watts, 2 W idle, sampled at 20 Hz."""
    window = 200 * latency_s
    phases = (Phase("idle_before", 0.0, 1.0), Phase("window", 1.0, 1.0 + window), Phase("idle_after", 1.0 + window, 2.0 + window))
    times = np.arange(0, 2.0 + window + 0.01, 0.01)
    joules = 2 * times + (watts - 2) * np.clip(times - 1, 0, window)
    trace = Trace("package-0", "energy_j", floats(times), floats(joules), "rapl", "C", "package", 0.01)
    fields = {"phases": phases, "latencies_s": floats([latency_s] * 200), "traces": (trace,), "caveats": (), "protocol": protocol} | more
    return dataclasses.replace(sample_trial(repeat=n), **fields)


def test_the_t_interval_of_a_known_sample() -> None:
    found = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445105 * math.sqrt(2.5) / math.sqrt(5)
    assert found.value == 3 and found.n == 5
    assert found.low == pytest.approx(3 - half) and found.high == pytest.approx(3 + half)
    assert half_width(found) == pytest.approx(half / 3)
    assert (t_interval([7.0]).low, t_interval([7.0]).high, t_interval([7.0]).n) == (None, None, 1)
    with pytest.raises(MeterError):
        t_interval([])
    with pytest.raises(MeterError):
        t_interval([1.0, float("nan")])


def test_the_t_interval_covers_as_promised() -> None:
    rng = np.random.default_rng(0)
    hits = sum(i.low <= 1.0 <= i.high for i in (t_interval(rng.normal(1, 0.05, 5).tolist()) for _ in range(2000)))  # type: ignore[operator]
    assert 0.93 < hits / 2000 < 0.97  # a bootstrap of five covers 0.82


def test_repeats_whose_number_the_interval_decided_have_a_wider_one() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sequential_interval(values) == t_interval(values, 0.965) and sequential_interval([1.0]) == t_interval([1.0])


def test_the_ratio_of_paired_repeats_takes_their_common_drift_out() -> None:
    base = [10.0, 12.0, 15.0, 11.0]
    found = ratio_interval([1.1 * b for b in base], base)
    assert found.value == pytest.approx(1.1) and found.low == pytest.approx(1.1) and found.high == pytest.approx(1.1)
    for wrong in ([1.0, 2.0], [0.0, 1.0, 1.0, 1.0]):
        with pytest.raises(MeterError):
            ratio_interval(wrong, base)


def test_percentiles_and_variation() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2 and percentile([0.0, 10.0], 90) == 9
    assert variation([9.0, 11.0]) == pytest.approx(math.sqrt(2) / 10) and variation([1.0]) is None


# ---------------------------------------------------------------- ratios, outliers, uncertainty


def test_an_unpaired_ratio_is_welch_on_logarithms() -> None:
    ours, theirs = [1.10, 1.12, 1.08, 1.11], [1.0, 1.2, 0.9, 1.1, 1.05, 0.95]
    found = unpaired_ratio_interval(ours, theirs)
    known = scipy.stats.ttest_ind(np.log(ours), np.log(theirs), equal_var=False)
    bounds = known.confidence_interval()
    assert found.n == 4 and found.value == pytest.approx(math.exp(np.mean(np.log(ours)) - np.mean(np.log(theirs))))
    assert found.low == pytest.approx(math.exp(bounds.low)) and found.high == pytest.approx(math.exp(bounds.high))
    assert unpaired_ratio(ours, theirs).p_value() == pytest.approx(known.pvalue)
    assert unpaired_ratio_interval([1.0], [1.0, 2.0]).low is None and unpaired_ratio([1.0], [1.0, 2.0]).p_value() is None
    same = unpaired_ratio_interval([2.0, 2.0], [1.0, 1.0])
    assert (same.low, same.value, same.high) == pytest.approx((2, 2, 2)) and unpaired_ratio([2.0, 2.0], [1.0, 1.0]).p_value() == 0
    assert interval_spread(t_interval(ours)) == pytest.approx(variation(ours)) and interval_spread(t_interval([1.0])) is None


def test_outliers_are_flagged_and_never_deleted() -> None:
    values = [10.0, 10.1, 9.9, 10.05, 9.95, 10.0, 10.1, 9.9, 10.35, 30.0]
    found = outlying(values)
    assert found.far == (9,) and found.extreme == (9,) and found.mild == (8, 9)
    both = with_and_without(values)
    assert both.all == t_interval(values) and both.without == t_interval(values[:9]) and both.left_out == 1
    assert outlying([1.0] * 9 + [5.0]) == Outlying((), (), ())  # most are equal: there is no scale to be far off by
    assert with_and_without([1.0, 2.0]).left_out == 0


def test_random_and_systematic_stay_apart_and_only_the_total_joins_them() -> None:
    assert total_uncertainty(0.03, 0.04) == Uncertainty(0.03, 0.04, pytest.approx(0.05))
    for unknown in (None, 0.0):  # nobody stated one: a repeatable reading is not a right one
        assert total_uncertainty(0.03, unknown) == Uncertainty(0.03, None, None)
    assert total_uncertainty(None, 0.04).total is None
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(MeterError):
            total_uncertainty(0.01, wrong)


# ---------------------------------------------------------------- within one run


def autoregressive(n: int, rho: float, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    noise = np.random.default_rng(seed).normal(size=n) * math.sqrt(1 - rho**2)
    return np.asarray(scipy.signal.lfilter([1], [1, -rho], noise), dtype=np.float64)


def test_effective_samples_of_known_series() -> None:
    assert effective_sample_size(np.random.default_rng(0).normal(size=20_000)) == pytest.approx(20_000, rel=0.1)  # type: ignore[arg-type]
    for rho in (0.5, 0.9, 0.98):  # tau = (1 + rho) / (1 - rho)
        found = effective_sample_size(autoregressive(200_000, rho, 1))  # type: ignore[arg-type]
        assert found == pytest.approx(200_000 * (1 - rho) / (1 + rho), rel=0.15)
    assert effective_sample_size([7.0] * 50) == 50 and effective_sample_size([1.0, 2.0]) == 2
    assert effective_sample_size(list(range(1000))) < 10  # a trend
    assert effective_sample_size([1.0, 2.0] * 100) == 200  # never more than there are
    assert effective_sample_size([1e308, -1e308, 1e308, 5.0] * 9) <= 36


def test_a_percentile_of_independent_samples_has_the_order_statistics_interval_at_least() -> None:
    values = np.random.default_rng(3).normal(size=1000).tolist()
    found = block_bootstrap(values, 50)
    assert found.value == percentile(values, 50) and 700 < found.n <= 1000
    width = found.high - found.low  # type: ignore[operator]
    assert width == pytest.approx(2 * 1.96 * math.sqrt(math.pi / 2 / 1000), rel=0.35)
    assert block_bootstrap([3.0] * 500, 90) == Interval(3.0, 3.0, 3.0, 500)


def test_an_autocorrelated_series_has_a_wider_interval() -> None:
    still, wandering = np.random.default_rng(4).normal(size=20_000), autoregressive(20_000, 0.95, 4)
    narrow, wide = (block_bootstrap(values.tolist(), 50, resamples=500) for values in (still, wandering))
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)  # type: ignore[operator]
    assert ratio == pytest.approx(math.sqrt(1.95 / 0.05), rel=0.4) and wide.n < 1000


def test_the_seed_decides_the_resamples() -> None:
    values = autoregressive(3000, 0.97, 8).tolist()
    found = [block_bootstrap(values, 50, seed=seed, resamples=200) for seed in (0, 0, 1, 2)]
    assert found[0].low is not None and found[0] == found[1] and len(set(found)) > 1


def test_too_few_effective_samples_have_no_bounds() -> None:
    thousand = np.random.default_rng(5).normal(size=1000).tolist()
    assert block_bootstrap(thousand, 99).high is not None and block_bootstrap(thousand[:300], 99).high is None
    assert block_bootstrap(thousand[:20], 50).low is None and block_bootstrap([1.0], 50) == Interval(1.0, None, None, 1)
    assert block_bootstrap(autoregressive(1000, 0.99, 6).tolist(), 50).low is None
    assert block_bootstrap([i + 0.1 * value for i, value in enumerate(thousand)], 50).low is None  # a trend


def test_the_block_bootstrap_covers_as_promised() -> None:
    truth = scipy.stats.norm.ppf(0.9)
    given = [block_bootstrap(autoregressive(3000, 0.9, seed)[1000:].tolist(), 90, resamples=300) for seed in range(150)]
    bounds = [found for found in given if found.low is not None and found.high is not None]
    hits = sum(found.low <= truth <= found.high for found in bounds)  # type: ignore[operator]
    assert len(bounds) > 130 and hits / len(bounds) > 0.9  # independent resampling covers 0.55


def test_a_million_samples_are_bounded_in_memory() -> None:
    values = autoregressive(1_000_000, 0.999, 7)
    tracemalloc.start()
    found = block_bootstrap(values, 50, resamples=500)  # type: ignore[arg-type]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.low is not None and 300 < found.n < 800 and peak < 600e6


def test_what_is_no_sample_or_percent_is_refused() -> None:
    for values, percent in (([], 50), ([float("nan")], 50), ([1.0], 0), ([1.0], 100), ([1.0], float("nan"))):
        with pytest.raises(MeterError):
            block_bootstrap(values, percent)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=120), st.sampled_from([1, 50, 90, 99]))
def test_any_series_has_a_size_and_bounds_around_its_percentile(values: list[float], percent: float) -> None:
    assert 1 <= effective_sample_size(values) <= len(values)
    found = block_bootstrap(values, percent, resamples=50)
    assert found.n <= len(values)
    if found.low is not None and found.high is not None:
        assert min(values) <= found.low <= found.value <= found.high <= max(values)
    flags = outlying(values)
    assert set(flags.extreme) <= set(flags.mild) and len(flags.far) <= len(values) / 2


# ---------------------------------------------------------------- the plan


def test_quick_is_three_rounds_of_everything_in_a_seeded_random_order() -> None:
    labels = tuple("abcdefgh")
    trials: dict[str, list[Trial]] = {}
    rounds = []
    while order := next_round(trials, labels, QUICK, seed=1):
        assert sorted(order) == sorted(labels)
        rounds.append(order)
        for label in order:
            trials.setdefault(label, []).append(repeat(len(rounds)))
    assert len(rounds) == 3 and len(set(rounds)) == 3
    assert next_round({}, labels, QUICK, seed=1) == rounds[0] != next_round({}, labels, QUICK, seed=2)


def test_standard_stops_when_narrow_and_at_the_cap() -> None:
    standard = profile("standard(repeats_max=7)")
    narrow = [repeat(n, 0.01 * (1 + 0.001 * (-1) ** n), protocol=standard) for n in range(5)]
    wide = [repeat(n, 0.01 * (1 + 0.05 * (-1) ** n), protocol=standard) for n in range(7)]
    assert next_round({"narrow": narrow, "wide": wide[:5]}, ("narrow", "wide"), standard, 0) == ("wide",)
    assert next_round({"narrow": narrow[:4]}, ("narrow",), standard, 0) == ("narrow",)
    assert next_round({"wide": wide}, ("wide",), standard, 0) == ()
    hungry = [repeat(n, watts=10 + n, protocol=standard) for n in range(5)]  # the latency is narrow, the energy is not
    assert needs_repeat(hungry, standard)
    between = [repeat(n, watts=10 * (1 + 0.0202 * (-1) ** n), protocol=standard) for n in range(6)]  # +-2.3 %: enough on board, not off it
    outside = [dataclasses.replace(t, traces=tuple(dataclasses.replace(trace, grade="B") for trace in t.traces)) for t in between]
    assert not needs_repeat(between, standard) and needs_repeat(outside, standard)


def test_rejected_repeats_are_replaced_but_not_for_ever() -> None:
    good = [repeat(n) for n in range(3)]
    bad = [repeat(n, caveats=(caveat("drift", "x"),)) for n in range(5)]
    assert not needs_repeat(good, QUICK)
    assert needs_repeat([*good[:2], bad[0]], QUICK) and not needs_repeat([*good, bad[0]], QUICK)
    assert needs_repeat(bad[:4], QUICK) and not needs_repeat(bad, QUICK)
    assert most_trials(QUICK) == 5


def test_a_key_is_made_of_all_that_matters() -> None:
    base = ("sha", Workload(), QUICK, "env", "rapl", 0)
    keys = {trial_key(*base)}
    changes = ("other", Workload("offline", 8), profile("standard"), "env2", "estimate", 1)
    for i, change in enumerate(changes):
        keys.add(trial_key(*(*base[:i], change, *base[i + 1 :])))  # type: ignore[arg-type]
    assert len(keys) == 7 and trial_key(*base) in keys


# ---------------------------------------------------------------- the summary


def codes(found: object) -> dict[str, object]:
    return {doubt.code: doubt for doubt in found.caveats}  # type: ignore[attr-defined]


def test_a_summary_is_medians_per_repeat_and_intervals_over_repeats() -> None:
    found = summarise([repeat(n, lat) for n, lat in enumerate((0.009, 0.010, 0.011))], artifact())
    assert found.latency_s.value == pytest.approx(0.010) and found.latency_s.n == found.repeats == 3
    assert found.latency_s.low == pytest.approx(0.010 - 4.30265 * 0.001 / math.sqrt(3), rel=1e-4)
    assert found.energy_j and found.energy_j.value == pytest.approx(0.1, rel=1e-3) and found.energy_j.low is not None
    assert found.net_energy_j and found.net_energy_j.value == pytest.approx(0.08, rel=1e-3)
    assert found.power_w and found.power_w.value == pytest.approx(10, rel=1e-3) and found.idle_w == pytest.approx(2, rel=1e-3)
    assert found.inferences_per_wh == pytest.approx(36000, rel=1e-3)
    assert found.throughput_ips.value == pytest.approx((1 / 0.009 + 100 + 1 / 0.011) / 3)
    assert found.p90_s == pytest.approx(0.011) and found.p99_s is None and found.inferences == 600
    assert (found.grade, found.scope, found.meter, found.protocol) == ("C", "package", "rapl", "quick")
    assert set(codes(found)) == {"quick_profile", "weights_random", "repeats_vary"}


def test_energy_is_per_image_and_p99_needs_a_thousand() -> None:
    trials = [repeat(n, workload=Workload("offline", 8)) for n in range(5)]
    found = summarise(trials, artifact())
    assert found.energy_j and found.energy_j.value == pytest.approx(0.1 / 8, rel=1e-3)
    assert found.throughput_ips.value == pytest.approx(800) and found.latency_s.value == pytest.approx(0.01)
    assert found.p99_s == pytest.approx(0.01) and found.inferences == 1000


def test_a_rejected_repeat_is_left_out_and_counted() -> None:
    trials = [repeat(0), repeat(1), repeat(2, 0.02, caveats=(caveat("drift", "30 %"),))]
    found = summarise(trials, artifact())
    drift = codes(found)["drift"]
    assert found.latency_s.value == pytest.approx(0.01) and found.repeats == 2
    assert drift.severity == "note" and "1 of 3 repeats, left out" in drift.seen  # type: ignore[attr-defined]
    assert "few_repeats" in codes(found)
    spoilt = summarise([dataclasses.replace(t, caveats=trials[2].caveats) for t in trials], artifact())
    assert spoilt.repeats == 3 and codes(spoilt)["drift"].severity == "reject"  # type: ignore[attr-defined]


def test_an_estimate_claims_no_interval() -> None:
    trials = []
    for n in range(3):
        trial = repeat(n, watts=10 + n)
        trace = dataclasses.replace(trial.traces[0], grade="D", scope="process")
        trials.append(dataclasses.replace(trial, meter="estimate", traces=(trace,)))
    found = summarise(trials, artifact(), Accuracy("imagenet-1k", "validation", 0.8, "published", "a table"))
    assert found.grade == "D" and found.energy_j and (found.energy_j.low, found.energy_j.high) == (None, None)
    assert found.latency_s.low is not None and {"estimate", "accuracy_published"} <= set(codes(found))


def test_no_meter_is_no_energy() -> None:
    doubt = (caveat("no_meter", "measured without a meter"),)
    found = summarise([repeat(n, meter="none", traces=(), caveats=doubt) for n in range(3)], artifact())
    assert (found.energy_j, found.net_energy_j, found.power_w, found.idle_w, found.inferences_per_wh) == (None,) * 5
    assert [d.code for d in found.caveats].count("no_meter") == 1


def test_sequential_and_cap() -> None:
    standard = profile("standard(repeats_max=7)")
    found = summarise([repeat(n, 0.01 * (1 + 0.02 * (-1) ** n), protocol=standard) for n in range(7)], artifact())
    assert {"sequential", "cap_reached"} <= set(codes(found)) and "latency" in codes(found)["cap_reached"].seen  # type: ignore[attr-defined]
    calm = summarise([repeat(n, protocol=standard) for n in range(5)], artifact())
    assert not {"sequential", "cap_reached"} & set(codes(calm))


def test_what_cannot_be_compared_is_refused() -> None:
    other = repeat(1, environment=dataclasses.replace(repeat(1).environment, fingerprint="else"))
    for trials in ([], [repeat(0), other], [repeat(0, phases=())]):
        with pytest.raises(MeterError):
            summarise(trials, artifact())
