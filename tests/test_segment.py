"""Inferences in synthetic power with known energy: found where they are, counted within 1 %, and refused where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import MeterError
from edgejoule.measure.background import Curve, running, runs, smooth
from edgejoule.measure.segment import Found, segmented
from edgejoule.measure.traced import curve_of
from tests.fakes.pulses import Pulses, Samples, Shape, counter_trace, power_trace, ramped, square, tailed, two_level

SHAPES: dict[str, Shape] = {"square": square, "two_level": two_level, "ramped": ramped, "tailed": tailed(0.08)}
NUISANCES: dict[str, dict[str, Any]] = {
    "none": {},
    "noise": {"noise_w": 0.02},
    "linear": {"linear_w": 0.3, "noise_w": 0.02},
    "linear, noiseless": {"linear_w": -0.6},
    "sine": {"sine_w": 0.15, "noise_w": 0.02},
    "jitter": {"jitter": 0.8, "noise_w": 0.02},
    "quantised": {"quantum_w": 0.05},
    "quantised noise": {"quantum_w": 0.05, "noise_w": 0.02},
    "missing": {"missing": 0.01, "noise_w": 0.01},
    "spikes": {"spikes": 4, "noise_w": 0.02},
    "all": {"noise_w": 0.015, "linear_w": 0.2, "sine_w": 0.1, "jitter": 0.5, "quantum_w": 0.01, "spikes": 3},
}


def plain(times: Samples, watts: Samples) -> Curve:
    curve = curve_of([power_trace(times, watts)], float(times[0]), float(times[-1]))
    assert curve is not None
    return curve


def of(pulses: Pulses) -> Curve:
    return plain(*pulses.samples())


def errors(found: Found, pulses: Pulses) -> Samples:
    return np.array([one.net_energy_j for one in found.segments]) / pulses.truth() - 1


def codes(found: Found) -> set[str]:
    return {doubt.code for doubt in found.caveats}


@pytest.mark.parametrize("nuisance", NUISANCES)
@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_region_is_counted_within_one_percent(shape: str, count: int, nuisance: str) -> None:
    for length in (0.02, 0.1):
        slow = max(1.5, 75 * length)
        pulses = Pulses(count, length, 1.5 * length, shape=SHAPES[shape], sine_s=slow, **NUISANCES[nuisance])
        found = segmented(of(pulses), count)
        assert np.max(np.abs(errors(found, pulses))) < 0.01
        for one, start in zip(found.segments, pulses.starts_s, strict=True):
            assert one.start_s <= start + 0.002
            assert one.stop_s >= start + 0.9 * length


def test_net_is_gross_less_the_background_under_it() -> None:
    pulses = Pulses(5, noise_w=0.01)
    found = segmented(of(pulses), 5)
    for one in found.segments:
        assert one.energy_j - one.net_energy_j == pytest.approx(1.0 * (one.stop_s - one.start_s), rel=0.01)
    mean, deviation = found.energies(net=True) or (0.0, 0.0)
    net = [one.net_energy_j for one in found.segments]
    assert [mean, deviation] == pytest.approx([np.mean(net), np.std(net, ddof=1)])
    assert segmented(of(Pulses(1)), 1).energies() is None


@pytest.mark.parametrize(
    ("count", "tail", "gap"), [(2, 0.5, 0.5), (5, 0.5, 1.0), (50, 0.5, 0.5), (5, 1.0, 2.0), (50, 0.5, 1.5), (50, 0.2, 1.5)]
)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_overlapping_tails_keep_their_sum(count: int, tail: float, gap: float, noise: float) -> None:
    pulses = Pulses(count, 0.03, 0.03 * gap, shape=tailed(tail), noise_w=noise, after_s=1.0)
    found = segmented(of(pulses), count)
    assert sum(one.net_energy_j for one in found.segments) == pytest.approx(float(np.sum(pulses.truth())), rel=0.01)
    if gap < 1.5 or tail > 0.2:
        assert "tails_overlap" in codes(found)
    for before, after in zip(found.segments[:-1], found.segments[1:], strict=True):
        assert before.stop_s <= after.start_s


@pytest.mark.parametrize(
    ("count", "tail", "gap", "noise"), [(50, 0.3, 1.5, 0.03), (50, 0.6, 3.0, 0.005), (5, 0.4, 2.0, 0.02), (50, 0.6, 2.0, 0.03)]
)
def test_tails_that_die_just_before_the_next_inference_do_not_lift_the_background(
    count: int, tail: float, gap: float, noise: float
) -> None:
    pulses = Pulses(count, 0.03, 0.03 * gap, shape=tailed(tail), noise_w=noise, after_s=1.0)
    found = segmented(of(pulses), count)
    assert sum(one.net_energy_j for one in found.segments) == pytest.approx(float(np.sum(pulses.truth())), rel=0.01)


def test_clean_traces_are_not_doubted() -> None:
    assert codes(segmented(of(Pulses(5, noise_w=0.02)), 5)) == set()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "asked"), [(1, 2), (5, 4), (5, 6), (50, 49), (50, 51)])
def test_a_wrong_number_is_refused(shape: str, count: int, asked: int) -> None:
    pulses = Pulses(count, shape=SHAPES[shape], noise_w=0.02, sine_w=0.05)
    with pytest.raises(MeterError, match=rf"found {count} regions above .* W .*expected {asked}: "):
        segmented(of(pulses), asked)


TIMES = np.arange(20_000) / 5000
NOISE = np.random.default_rng(1).standard_normal(20_000)
HOPELESS = {
    "noise": 5 + 0.1 * NOISE,
    "constant": np.full(20_000, 5.0),
    "zero": np.zeros(20_000),
    "all active": 5 + 0.3 * np.sin(700 * TIMES) + 0.1 * NOISE,
    "ramp": 5 + TIMES,
    "step": 5.0 + (TIMES > 2),
}


@pytest.mark.parametrize("what", HOPELESS)
@pytest.mark.parametrize("count", [1, 5, 50])
@pytest.mark.parametrize("k", [1.0, 6.0])
def test_what_holds_no_inference_is_refused(what: str, count: int, k: float) -> None:
    with pytest.raises(MeterError, match=f"expected {count}"):
        segmented(plain(TIMES, HOPELESS[what]), count, k)


def test_a_region_cut_off_by_the_trace_is_not_counted() -> None:
    times, watts = Pulses(5, noise_w=0.01, before_s=0.4).samples()
    late = times > 0.41
    found = segmented(plain(times[late], watts[late]), 4)
    assert len(found.segments) == 4
    with pytest.raises(MeterError, match=r"found 4 regions .* besides 1 cut off by an end of the trace"):
        segmented(plain(times[late], watts[late]), 5)


def test_short_and_coarse_ones() -> None:
    short = Pulses(5, length_s=0.003, gap_s=0.02)  # 15 samples
    with pytest.raises(MeterError):
        segmented(of(short), 5)
    coarse = Pulses(5, length_s=0.3, gap_s=0.5, rate_hz=100.0, before_s=2.0, after_s=2.0)
    assert "coarse_sampling" in codes(segmented(of(coarse), 5))
    lost = Pulses(5, length_s=0.1, gap_s=0.5, rate_hz=100.0, before_s=2.0, after_s=2.0)
    with pytest.raises(MeterError, match="expected 5"):
        segmented(of(lost), 5)


def test_a_long_lower_level_is_activity_not_drift() -> None:
    def long_foot(since_s: Samples, length_s: float) -> Samples:
        return np.where((since_s >= 0) & (since_s < length_s), np.where(since_s < length_s / 8, 1.0, 0.25), 0.0)

    pulses = Pulses(1, length_s=2.0, before_s=0.5, after_s=0.5, shape=long_foot, noise_w=0.02)
    assert np.max(np.abs(errors(segmented(of(pulses), 1), pulses))) < 0.01


def test_a_step_of_a_coarse_sensor_is_no_inference() -> None:
    times, watts = Pulses(5, quantum_w=0.1).samples()
    watts[500:540] += 0.1
    assert len(segmented(plain(times, watts), 5).segments) == 5


def test_a_few_noise_peaks_are_not_tied_together_to_a_region() -> None:
    pulses = Pulses(3, length_s=2.0, gap_s=2.0, before_s=5.0, after_s=5.0, noise_w=0.05)
    assert codes(segmented(of(pulses), 3)) == set()


def test_powers_of_no_device_are_refused() -> None:
    with pytest.raises(MeterError, match="unit"):
        segmented(plain(TIMES, np.where(TIMES > 2, 1e300, 1.0)), 1)


def test_what_hangs_on_the_threshold_is_said() -> None:
    faint = Pulses(5, length_s=0.1, gap_s=0.1, noise_w=0.25)  # eight deviations: lost at twice the threshold
    found = segmented(of(faint), 5)
    assert set(found.sensitivity) == {"3", "6", "12"}
    assert found.sensitivity["12"] is None
    assert "threshold_sensitive" in codes(found)
    clear = segmented(of(Pulses(5, noise_w=0.02)), 5).sensitivity
    assert all(value == pytest.approx(clear["6"], rel=0.005) for value in clear.values())


def test_a_counter_is_as_good_as_its_power() -> None:
    pulses = Pulses(5, noise_w=0.02, shape=two_level)
    times, watts = pulses.samples()
    curve = curve_of([counter_trace(times, watts)], 0.0, float(times[-1]))
    assert curve is not None
    assert np.max(np.abs(errors(segmented(curve, 5), pulses))) < 0.01


@pytest.mark.parametrize(("count", "k"), [(0, 6.0), (-3, 6.0), (5, 0.0), (5, -1.0), (5, float("nan")), (5, float("inf"))])
def test_senseless_questions_are_refused(count: int, k: float) -> None:
    with pytest.raises(MeterError, match="expected"):
        segmented(of(Pulses(5)), count, k)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12),
    length=st.floats(0.02, 0.08),
    gap=st.floats(1.0, 3.0),
    step=st.floats(0.5, 20.0),
    idle=st.floats(0.1, 10.0),
    noise=st.floats(0.0, 0.01),
    drift=st.floats(-0.2, 0.2),
    shape=st.sampled_from([square, two_level, ramped]),
    seed=st.integers(0, 2**16),
)
def test_any_pulses_are_counted_within_one_percent(
    count: int, length: float, gap: float, step: float, idle: float, noise: float, drift: float, shape: Shape, seed: int
) -> None:
    pulses = Pulses(
        count, length, gap * length, idle_w=idle, step_w=step, noise_w=noise * step, linear_w=drift * step, shape=shape, seed=seed
    )
    found = segmented(of(pulses), count)
    assert np.max(np.abs(errors(found, pulses))) < 0.01


@settings(max_examples=150, deadline=None)
@given(
    watts=st.lists(st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, 5.0, 1e-300, 1e300])), min_size=2, max_size=12),
    repeats=st.integers(1, 60),
    count=st.integers(1, 5),
    k=st.floats(0.01, 50),
)
def test_garbage_is_refused_or_its_energy_adds_up(watts: list[float], repeats: int, count: int, k: float) -> None:
    power = np.repeat(np.array(watts), repeats)
    if len(power) < 2:
        return
    curve = plain(np.arange(len(power)) / 5000, power)
    try:
        found = segmented(curve, count, k)
    except MeterError:
        return
    assert len(found.segments) == count
    for one in found.segments:
        assert np.isfinite(one.net_energy_j)
        assert one.stop_s > one.start_s
    for before, after in zip(found.segments[:-1], found.segments[1:], strict=True):
        assert before.stop_s <= after.start_s


@given(st.lists(st.booleans(), max_size=30))
def test_runs_are_where_it_is_true(flags: list[bool]) -> None:
    first, end = runs(np.array(flags, dtype=bool))
    rebuilt = np.zeros(len(flags), dtype=bool)
    for a, b in zip(first, end, strict=True):
        assert b > a
        rebuilt[a:b] = True
    assert rebuilt.tolist() == flags


@given(st.lists(st.floats(-10, 10), min_size=9, max_size=40), st.integers(1, 9))
def test_running_and_smooth_look_at_neighbours(values: list[float], width: int) -> None:
    array = np.array(values)
    assert running(array, width).tolist() == [min(values[i : i + width]) for i in range(len(values) - width + 1)]
    assert smooth(array, 3)[1:-1] == pytest.approx(np.convolve(array, np.ones(3) / 3, "valid"), abs=1e-9)
