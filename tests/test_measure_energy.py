"""Joules of a window from raw traces, against loads whose energy is known exactly; the pitfalls of the field as tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.measure.energy import integrate, is_saturated, window_energy
from edgejoule.records import Phase, Trace, floats

IDLE, LOAD = 5.0, 15.0
FINE = 0.0005


def power_at(times: Any, start: float, stop: float, idle: float = IDLE, load: float = LOAD) -> Any:
    return np.where((times >= start) & (times < stop), load, idle)


def trace(times: Any, values: Any, quantity: Any = "power_w", averaging_s: float = 0.0, period_s: float = 0.02, **more: Any) -> Trace:
    return Trace("rail", quantity, floats(times), floats(values), "fake", "C", "board-in", period_s, averaging_s, **more)


def phases(start: float, stop: float, idle: float) -> tuple[Phase, Phase, Phase]:
    return Phase("window", start, stop), Phase("idle_before", start - idle, start), Phase("idle_after", stop, stop + idle)


def averaged(kind: str, w: float, start: float, stop: float, end: float, period: float = 0.02) -> Trace:
    """What a sensor that averages over ``w`` reports of a step from 5 to 15 W and back."""
    fine = np.arange(0, end, FINE)
    true = power_at(fine, start, stop)
    if kind == "boxcar":
        sums = np.concatenate(([0.0], np.cumsum(true)))
        n = round(w / FINE)
        at = np.arange(len(true)) + 1
        seen = (sums[at] - sums[np.maximum(at - n, 0)]) / np.minimum(at, n)
    else:
        seen, keep = np.empty_like(true), np.exp(-FINE / w)
        level = true[0]
        for i, watts in enumerate(true):
            level = keep * level + (1 - keep) * watts
            seen[i] = level
    step = round(period / FINE)
    return trace(fine[::step], seen[::step], averaging_s=w, period_s=period)


@pytest.mark.parametrize(("kind", "naive_bias"), [("boxcar", -0.5), ("exponential", -1.0)])
def test_padding_cures_an_averaging_sensor(kind: str, naive_bias: float) -> None:
    w, start, stop, end = 0.25, 5.0, 15.0, 20.0
    seen = averaged(kind, w, start, stop, end)
    window, before, after = phases(start, stop, 5.0)
    naive = integrate(seen, start, stop)
    assert naive is not None
    true_net = (LOAD - IDLE) * (stop - start)
    assert (naive - IDLE * 10) / true_net - 1 == pytest.approx(naive_bias * w / 10, rel=0.1)  # pitfall 1: -w/2T or -w/T
    cured = window_energy([seen], window, before, after)
    assert cured.net_energy_j == pytest.approx(true_net, rel=0.001)
    assert cured.energy_j == pytest.approx(LOAD * 10, rel=0.001) and not cured.caveats


def test_irregular_stamps_are_integrated_by_trapezoid_on_true_times() -> None:
    times = np.sort(np.random.default_rng(1).uniform(0, 10, 600))
    times[0], times[-1] = 0.0, 10.0
    ramp = trace(times, 2 + 3 * times)  # W
    assert integrate(ramp, 1.234, 7.891) == pytest.approx(2 * 6.657 + 1.5 * (7.891**2 - 1.234**2), rel=1e-9)  # pitfall 2


def test_a_counter_is_interpolated_at_the_edges() -> None:
    counter = trace([0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 30.0, 60.0], "energy_j")
    assert integrate(counter, 0.5, 2.5) == pytest.approx(45.0 - 5.0)


@pytest.mark.parametrize(("start", "stop"), [(-1.0, 2.0), (1.0, 4.0), (2.0, 2.0), (2.0, 1.0)])
def test_what_the_trace_does_not_cover_is_none(start: float, stop: float) -> None:
    assert integrate(trace([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], "energy_j"), start, stop) is None


@settings(max_examples=40, deadline=None)
@given(st.floats(0.6, 3), st.floats(0.1, 50), st.floats(1, 200), st.integers(0, 1000))
def test_counter_and_power_agree_and_offsets_do_not_matter(duration: float, idle: float, load: float, shift: int) -> None:
    start, stop = 2.0, 2.0 + duration
    times = np.arange(0, stop + 2, 0.01)
    joules = idle * times + load * np.clip(times - start, 0, duration)
    window, before, after = phases(start, stop, 1.9)
    counter = trace(times - shift, joules, "energy_j", period_s=0.01, offset_s=float(shift))
    energy = window_energy([counter], window, before, after)
    assert energy.energy_j == pytest.approx((idle + load) * duration, rel=1e-6)
    assert energy.net_energy_j == pytest.approx(load * duration, rel=1e-6) and energy.idle_w == pytest.approx(idle, rel=1e-6)
    samples = trace(times, power_at(times, start, stop, idle, idle + load), period_s=0.01)
    assert window_energy([samples], window, before, after).net_energy_j == pytest.approx(load * duration, rel=0.03)


def steady(quantity: str = "power_w", step: float = 0.02, end: float = 14.0, jitter: float = 0.1) -> tuple[Any, Any]:
    times = np.arange(0, end, step)
    watts = power_at(times, 2.0, 12.0) + jitter * np.sin(50 * times)
    return times, watts if quantity == "power_w" else np.concatenate(([0], np.cumsum(watts[1:] * step)))


def doubts(*traces: Trace) -> tuple[Any, set[str]]:
    energy = window_energy(traces, *phases(2.0, 12.0, 2.0))
    return energy, {doubt.code for doubt in energy.caveats}


def test_rails_outside_the_total_do_not_count_and_those_inside_add_up() -> None:
    times, watts = steady()
    one, part = trace(times, watts), trace(times, watts, total=False)
    assert doubts(one, part)[0].energy_j == pytest.approx(150, rel=0.01)  # pitfall 4
    both, found = doubts(one, one)
    assert both.energy_j == pytest.approx(300, rel=0.01) and both.idle_w == pytest.approx(10, rel=0.01) and not found
    nothing, found = doubts(part)
    assert nothing.energy_j is None and found == {"no_meter"}


def test_nothing_recorded_is_none_and_never_zero() -> None:
    energy, found = doubts()
    assert (energy.energy_j, energy.net_energy_j, energy.idle_w, energy.power_w) == (None,) * 4 and found == {"no_meter"}


def test_a_stuck_sensor_is_not_a_measurement() -> None:
    times, _ = steady()
    for values, quantity in ((np.full_like(times, 7.0), "power_w"), (np.zeros_like(times), "energy_j")):
        energy, found = doubts(trace(times, values, quantity))
        assert energy.energy_j is None and found == {"stuck_sensor"}


@pytest.mark.parametrize(("quantity", "since"), [("energy_j", 7.0), ("power_w", 1.5), ("power_w", 0.9)])
def test_a_sensor_that_gets_stuck_on_the_way_is_not_a_measurement(quantity: str, since: float) -> None:
    times, values = steady(quantity)
    frozen = np.where(times < since, values, values[np.searchsorted(times, since)])
    energy, found = doubts(trace(times, frozen, quantity))
    assert energy.energy_j is None and "stuck_sensor" in found


def test_a_coarse_sensor_of_a_steady_load_is_not_stuck() -> None:
    times, watts = steady(jitter=0.0)  # 5 W and 15 W exactly
    energy, found = doubts(trace(times, watts, averaging_s=0.1))
    assert energy.energy_j == pytest.approx(150, rel=0.01) and not found


def test_one_unmeasured_rail_leaves_the_sum_unmeasured() -> None:
    times, watts = steady()
    assert doubts(trace(times, watts), trace(times, np.zeros_like(times)))[0].energy_j is None


def test_too_few_updates() -> None:
    times, watts = steady(step=0.6)
    assert doubts(trace(times, watts, period_s=0.6))[0].energy_j is None
    energy, found = doubts(trace(*steady(), averaging_s=0.6))  # many samples of few independent means
    assert energy.energy_j is None and "few_updates" in found


def test_a_counter_s_updates_are_its_own_and_not_the_polls() -> None:
    times, joules = steady("energy_j", step=0.6)  # 16 polls in the window, a millisecond's counter
    energy, found = doubts(trace(times, joules, "energy_j", averaging_s=0.001, period_s=0.2))
    assert energy.energy_j == pytest.approx(150, rel=0.1) and not found
    times, joules = steady("energy_j")
    held = joules[np.arange(len(joules)) // 50 * 50]  # read at 50 Hz, moves once a second, and claims a millisecond
    assert doubts(trace(times, held, "energy_j", averaging_s=0.001))[1] == {"few_updates"}


def test_a_gap_is_told_and_an_end_too_early_leaves_none() -> None:
    times, watts = steady()
    keep = (times < 6) | (times > 6.5)
    energy, found = doubts(trace(times[keep], watts[keep]))
    assert energy.energy_j == pytest.approx(150, rel=0.01) and found == {"trace_gap"}
    cut = times < 11
    energy, found = doubts(trace(times[cut], watts[cut]))
    assert energy.energy_j is None and "trace_gap" in found


def test_idle_that_drifts_is_told_and_interpolated_in_time() -> None:
    times, watts = steady(jitter=0.0)
    energy, found = doubts(trace(times, watts + 0.05 * times))
    assert found == {"idle_drift"} and energy.net_energy_j == pytest.approx(100, rel=0.01)
    assert not doubts(trace(times, watts + 0.003 * times))[1]


@pytest.mark.parametrize("phase", np.linspace(0, 0.104, 14))
def test_a_counter_that_updates_now_and_then_does_not_drift(phase: float) -> None:
    times, joules = steady("energy_j", step=0.001, end=4.5, jitter=0.0)  # 2.5 s of window on a GPU's counter: 0.104 s, polled at 20 Hz
    at = np.arange(0, 6.0, 0.05)
    true = np.interp(np.floor((at - phase) / 0.104) * 0.104 + phase, np.append(times, 8.0), np.append(joules, joules[-1] + 3.5 * IDLE))
    window, before, after = phases(2.0, 4.5, 1.4)
    energy = window_energy([trace(at, true, "energy_j", averaging_s=0.1, period_s=0.05)], window, before, after)
    assert not energy.caveats and energy.net_energy_j == pytest.approx(25, rel=0.1)


def test_zero_or_negative_energy_is_not_reported() -> None:
    times, watts = steady()
    energy, found = doubts(trace(times, -watts))
    assert energy.energy_j is None and energy.power_w is None and found == {"negative_energy"}
    energy, found = doubts(trace(times, 20 - watts))  # busy draws less than idle
    assert energy.net_energy_j is None and energy.energy_j is not None and "negative_energy" in found


def test_without_idle_there_is_no_net_and_a_short_window_is_told() -> None:
    times, watts = steady()
    energy = window_energy([trace(times, watts)], Phase("window", 2.0, 12.0))
    assert energy.energy_j == pytest.approx(150, rel=0.01) and energy.net_energy_j is None and energy.idle_w is None
    slow = window_energy([trace(times, watts, averaging_s=0.3)], Phase("window", 2.0, 12.0))
    assert {doubt.code for doubt in slow.caveats} == {"short_window"}


def test_an_empty_trace_is_no_energy() -> None:
    energy, _ = doubts(dataclasses.replace(trace(*steady()), times_s=floats(), values=floats()))
    assert energy.energy_j is None


def test_a_counter_that_disagrees_with_the_power_beside_it_is_told() -> None:
    at = np.arange(0.0, 20.0, 0.05)
    counter = Trace("gpu", "energy_j", floats(at), floats(10.0 * at), "nvml", "C", "gpu", 0.05, 0.1)
    honest = Trace("gpu/power", "power_w", floats(at), floats(np.full(len(at), 10.2)), "nvml", "C", "gpu", 0.05, 0.1, total=False)
    lying = dataclasses.replace(honest, values=floats(np.full(len(at), 17.5)))  # zeus#181: 187 J counted, 327 J polled
    window, before, after = phases(5.0, 15.0, 5.0)
    assert "counter_differs" not in {doubt.code for doubt in window_energy([counter, honest], window, before, after).caveats}
    found = window_energy([counter, lying], window, before, after)
    told = next(doubt for doubt in found.caveats if doubt.code == "counter_differs")
    assert "110 J counted, 192.5 J integrated" in told.seen and found.energy_j == pytest.approx(100.0)


def test_samples_that_pile_up_at_the_top_are_told() -> None:
    watts = np.random.default_rng(0).normal(10.0, 1.0, 400)
    assert not is_saturated(watts)
    assert is_saturated(np.minimum(watts, 10.5))
    assert not is_saturated(np.minimum(10.0 + np.arange(400) / 10, 20.0))  # settles once, and stays
    assert not is_saturated(np.round(watts))  # a coarse sensor has few values


def test_without_padding_the_bias_of_the_net_energy_is_bounded_in_words() -> None:
    at = np.arange(0.0, 12.0, 0.05)
    seen = Trace("rail", "power_w", floats(at), floats(np.where((at > 1) & (at < 11), 15.0, 5.0)), "s", "C", "board-in", 0.05, 0.5)
    before = Phase("idle_before", 0.0, 0.9)
    found = window_energy([seen], Phase("window", 1.0, 11.0), before, None)
    assert "unpadded" not in {doubt.code for doubt in found.caveats}, "less idle than the sensor remembers gives no net at all"
    assert found.net_energy_j is None
    wide = dataclasses.replace(seen, averaging_s=0.1)
    told = {d.code: d.seen for d in window_energy([wide], Phase("window", 1.0, 11.0), before, None).caveats}
    assert "0.5 to 1 %" in told["unpadded"]


def test_a_meter_on_another_clock_is_padded_by_what_is_not_known() -> None:
    at = np.arange(0.0, 20.0, 0.01)
    true = np.where((at > 5.0) & (at < 15.0), 15.0, 5.0)
    late = Trace("wall", "power_w", floats(at + 0.2), floats(true), "plug", "B", "wall", 0.01, 0.01, offset_uncertainty_s=0.25)
    window, before, after = phases(5.0, 15.0, 5.0)
    found = window_energy([late], window, before, after)
    assert found.net_energy_j == pytest.approx(100.0, rel=0.01) and "clock_uncertain" not in {d.code for d in found.caveats}
    bare = window_energy([late], window)
    assert "clock_uncertain" in {d.code for d in bare.caveats}
