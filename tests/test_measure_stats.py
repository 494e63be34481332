"""Intervals against known values, the plan of rounds, and what a summary keeps, leaves out and says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.plan import most_trials, needs_repeat, next_round, trial_key
from edgejoule.measure.protocols import profile
from edgejoule.measure.stats import half_width, percentile, ratio_interval, t_interval, variation
from edgejoule.measure.summary import summarise
from edgejoule.records import Accuracy, Phase, Protocol, Trace, Trial, Workload, floats
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
