"""A recording's energy: rails, totals, windows with idle around them, the file's own counter, and every doubt."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import MeterError
from edgejoule.measure.recording import Recording
from edgejoule.measure.traced import curve_of, trace_energy
from edgejoule.plain import encode
from edgejoule.records import Trace, TraceEnergy, floats
from tests.fakes.pulses import Pulses, counter_trace, power_trace, two_level

RNG = np.random.default_rng(0)
STAMPS = np.arange(1001) / 100.0  # 10 s at 100 Hz
LOAD = np.where((STAMPS >= 4) & (STAMPS < 6), 15.0, 5.0) + 0.01 * RNG.standard_normal(1001)


def recording(*traces: Trace) -> Recording:
    last = max(trace.times_s[-1] for trace in traces)
    return Recording("csv", traces, len(traces[0].times_s), last, ())


def codes(found: TraceEnergy) -> set[str]:
    return {doubt.code for doubt in found.caveats}


def test_the_whole_trace_by_hand() -> None:
    trace = power_trace(np.array([0.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0, 5.0]))
    found = trace_energy(recording(trace))
    assert found.energy_j == {"all": pytest.approx(2 + 3 + 8)}
    assert found.total_energy_j == pytest.approx(13)
    assert found.power_w == {"all": pytest.approx(13 / 4)}
    assert (found.start_s, found.stop_s, found.duration_s) == (0.0, 4.0, 4.0)
    assert (found.net_energy_j, found.idle_w, found.segments) == (None, None, ())
    assert "few_updates" in codes(found)


def test_edges_between_samples_are_interpolated() -> None:
    trace = power_trace(np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 2.0]))
    assert trace_energy(recording(trace), 0.5, 1.5).total_energy_j == pytest.approx(0.75 + 1.0)


def test_what_lies_outside_the_window_is_idle() -> None:
    found = trace_energy(recording(power_trace(STAMPS, LOAD)), 3.995, 5.995)
    assert found.idle_w == pytest.approx(5.0, rel=0.002)
    assert found.net_energy_j == pytest.approx(20.0, rel=0.005)
    assert found.total_energy_j == pytest.approx(30.0, rel=0.01)
    assert not codes(found)


def test_an_averaging_sensor_is_padded() -> None:
    smeared = np.convolve(np.concatenate((np.full(49, 5.0), LOAD)), np.ones(50) / 50, "valid")  # the last half second
    found = trace_energy(recording(power_trace(STAMPS, smeared, averaging_s=0.5)), 3.995, 5.995)
    assert found.net_energy_j is None or found.net_energy_j == pytest.approx(20.0, rel=0.01)
    wide = trace_energy(recording(power_trace(STAMPS, smeared, averaging_s=0.1)), 3.995, 5.995)
    assert wide.net_energy_j == pytest.approx(20.0, rel=0.01)
    assert wide.total_energy_j == pytest.approx(30.0 - 2.5, rel=0.02)  # gross stays the plain trapezoid


def test_idle_is_interpolated_between_the_sides() -> None:
    found = trace_energy(recording(power_trace(STAMPS, LOAD + 0.1 * STAMPS)), 3.995, 5.995)
    assert found.idle_w == pytest.approx(5.5, rel=0.003)
    assert found.net_energy_j == pytest.approx(20.0, rel=0.005)
    assert "idle_drift" in codes(found)


@pytest.mark.parametrize(("start", "stop"), [(0.01, 9.99), (0.0, 10.0), (None, None)])
def test_too_little_idle_gives_no_net(start: float | None, stop: float | None) -> None:
    found = trace_energy(recording(power_trace(STAMPS, LOAD)), start, stop)
    assert (found.net_energy_j, found.idle_w) == (None, None)
    assert found.total_energy_j is not None


@pytest.mark.parametrize("window", [(5.0, 5.0), (6.0, 5.0), (-1.0, 5.0), (1.0, 11.0), (float("nan"), 5.0), (1.0, float("inf"))])
def test_senseless_windows_are_refused(window: tuple[float, float]) -> None:
    with pytest.raises(MeterError, match=r"--start .* --stop .*expected"):
        trace_energy(recording(power_trace(STAMPS, LOAD)), *window)


def test_only_totals_add_up() -> None:
    rails = [power_trace(STAMPS, LOAD, "VDD_IN"), power_trace(STAMPS, LOAD / 2, "VDD_SOC", total=False)]
    found = trace_energy(recording(*rails))
    assert (found.rails, found.total_rails) == (("VDD_IN", "VDD_SOC"), ("VDD_IN",))
    assert found.total_energy_j == found.energy_j["VDD_IN"]
    both = trace_energy(recording(power_trace(STAMPS, LOAD, "a"), power_trace(STAMPS, LOAD / 2, "b")))
    assert both.total_energy_j == pytest.approx(1.5 * (both.energy_j["a"] or 0))


def test_no_totals_no_total() -> None:
    rails = [power_trace(STAMPS, LOAD, name, total=False) for name in ("a", "b")]
    found = trace_energy(recording(*rails))
    assert "unknown_board" in codes(found)
    assert found.total_energy_j is None
    assert found.energy_j["a"] == pytest.approx(70, rel=0.01)
    with pytest.raises(MeterError, match="add up to the whole"):
        trace_energy(recording(*rails), segments=1)


def test_the_files_own_counter_is_compared_never_added() -> None:
    power, counter = power_trace(STAMPS, LOAD), counter_trace(STAMPS, LOAD, total=False)
    agreeing = trace_energy(recording(power, counter))
    assert agreeing.rails == ("all",)
    assert "closure" not in codes(agreeing)
    assert agreeing.total_energy_j == pytest.approx(70, rel=0.01)
    off = trace_energy(recording(power, counter_trace(STAMPS, 1.05 * LOAD, total=False)))
    assert "closure" in codes(off)
    assert off.total_energy_j == agreeing.total_energy_j
    coarse = dataclasses.replace(counter, values=floats(np.floor(np.array(counter.values) / 36) * 36))
    assert "closure" not in codes(trace_energy(recording(power, coarse)))


def test_a_running_integral_of_power_is_integrated_beside_its_counter() -> None:
    converted, counter = counter_trace(STAMPS, LOAD), counter_trace(STAMPS, 1.05 * LOAD, total=False)
    found = trace_energy(recording(converted, counter), 3.995, 5.995)
    assert found.total_energy_j == pytest.approx(30, rel=0.01)
    assert found.net_energy_j == pytest.approx(20, rel=0.01)
    assert "closure" in codes(found)


def test_doubts_about_the_samples() -> None:
    torn = (STAMPS < 4.2) | (STAMPS > 4.9)
    assert "trace_gap" in codes(trace_energy(recording(power_trace(STAMPS[torn], LOAD[torn]))))
    assert "stuck_sensor" in codes(trace_energy(recording(power_trace(STAMPS, np.full(1001, 5.0)))))
    assert "stuck_sensor" not in codes(trace_energy(recording(power_trace(STAMPS, LOAD), power_trace(STAMPS, 0 * LOAD, "NC", total=False))))
    noisy = 5 + RNG.standard_normal(1001)
    assert "saturated" in codes(trace_energy(recording(power_trace(STAMPS, np.minimum(noisy, 5.2)))))
    for power in (-LOAD, 0 * LOAD):
        found = trace_energy(recording(power_trace(STAMPS, power)))
        assert "negative_energy" in codes(found)
        assert found.total_energy_j is None
        assert found.energy_j["all"] is not None


def test_a_rail_that_does_not_cover_the_window_has_no_energy() -> None:
    late = STAMPS > 5
    rails = (power_trace(STAMPS, LOAD, "a"), power_trace(STAMPS[late], LOAD[late], "b"))
    found = trace_energy(recording(*rails))
    assert found.energy_j["b"] is None
    assert found.total_energy_j is None
    assert "trace_gap" in codes(found)
    little = STAMPS > 0.025
    rails = (power_trace(STAMPS, LOAD, "a"), power_trace(STAMPS[little], LOAD[little], "b"))
    assert trace_energy(recording(*rails)).total_energy_j == pytest.approx(140, rel=0.01)


def test_segments_in_the_sum_of_rails_with_other_stamps() -> None:
    pulses = Pulses(5, noise_w=0.01, shape=two_level)
    times, watts = pulses.samples()
    slow = np.arange(0, times[-1], 1 / 3000)
    rails = (power_trace(times, 0.7 * watts, "a"), power_trace(slow, 0.3 * np.interp(slow, times, watts), "b"))
    found = trace_energy(recording(*rails), segments=5)
    assert [one.net_energy_j for one in found.segments] == pytest.approx(pulses.truth(), rel=0.01)
    assert found.segment_net_energy_j == pytest.approx((float(np.mean(pulses.truth())), 0), rel=0.01, abs=2e-4)
    assert found.idle_w == pytest.approx(1.0, rel=0.005)
    assert found.net_energy_j == pytest.approx(float(np.sum(pulses.truth())), rel=0.02)
    curve = curve_of(rails, 0.0, float(times[-1]))
    assert curve is not None
    assert curve.joules[-1] == pytest.approx(sum(value or 0 for value in found.energy_j.values()), rel=1e-3)


def test_segments_are_looked_for_in_the_window_only() -> None:
    pulses = Pulses(8, noise_w=0.01)
    whole = recording(power_trace(*pulses.samples()))
    found = trace_energy(whole, pulses.starts_s[3] - 0.015, pulses.duration_s, segments=5)
    assert found.segments[0].start_s == pytest.approx(pulses.starts_s[3], abs=0.004)
    with pytest.raises(MeterError, match="found 8 regions"):
        trace_energy(whole, segments=5)


def test_single_inferences_have_no_deviation() -> None:
    found = trace_energy(recording(power_trace(*Pulses(1).samples())), segments=1)
    assert (len(found.segments), found.segment_energy_j) == (1, None)


@settings(max_examples=150, deadline=None)
@given(
    watts=st.lists(st.one_of(st.floats(-1e5, 1e5), st.sampled_from([0.0, -1.0, 1e300, -1e308])), min_size=2, max_size=80),
    counter=st.booleans(),
    window=st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2)),
    segments=st.one_of(st.none(), st.integers(1, 3)),
    averaging=st.sampled_from([0.0, 0.001, 1.0]),
)
def test_garbage_gives_numbers_or_one_sentence(
    watts: list[float], counter: bool, window: tuple[float, float], segments: int | None, averaging: float
) -> None:
    times = np.arange(len(watts)) / 1000
    with np.errstate(all="ignore"):
        trace = (counter_trace if counter else power_trace)(times, np.array(watts), averaging_s=averaging)
    last = times[-1]
    try:
        found = trace_energy(recording(trace), window[0] * last, window[1] * last, segments)
    except MeterError:
        return
    json.dumps(encode(found), allow_nan=False)
    assert found.total_energy_j is None or found.total_energy_j > 0
