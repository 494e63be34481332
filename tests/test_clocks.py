"""Two clocks brought together: by exchanged stamps, by a load pattern in the trace, and refused where neither is sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import MeterError
from edgejoule.measure.clocks import Offset, aligned, offset_by_exchange, offset_by_step
from edgejoule.measure.energy import integrate, window_energy
from edgejoule.records import Phase, Trace, floats
from tests.fakes import simulated


def exchanges(rng: Any, true_s: float, n: int = 20, ppm: float = 0.0, span_s: float = 60.0) -> list[tuple[float, float, float]]:
    """Asked, the remote's stamp, answered; the way there and the way back differ."""
    found = []
    for asked in np.sort(rng.uniform(1000, 1000 + span_s, n)):
        there, back = rng.exponential(0.004, 2) + 0.001
        at = asked + there
        found.append((asked, at - true_s - 1e-6 * ppm * (at - 1000), asked + there + back))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_least_round_trip_bounds_the_offset(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = offset_by_exchange(exchanges(rng, 12.345))
    assert abs(found.offset_s - 12.345) <= found.uncertainty_s < 0.01
    assert "least round trip of 20 exchanges" in found.how


def test_the_uncertainty_is_half_the_round_trip_that_won() -> None:
    found = offset_by_exchange([(0.0, 5.0, 0.1), (1.0, 6.0, 1.02), (2.0, 7.0, 2.4)])
    assert (found.offset_s, found.uncertainty_s) == (pytest.approx(-4.99), pytest.approx(0.01))


@pytest.mark.parametrize("seed", range(10))
def test_a_drift_over_the_run_is_seen_and_covered_at_both_ends(seed: int) -> None:
    span, ppm = 600.0, 100.0  # 60 ms over ten minutes
    samples = exchanges(np.random.default_rng(seed), 3.0, 60, ppm, span)
    found = offset_by_exchange(samples)
    assert "drift" in found.how
    for at in (samples[0][0], samples[-1][0]):
        assert abs(found.offset_s - (3.0 + 1e-6 * ppm * (at - 1000))) <= found.uncertainty_s < 0.05


@pytest.mark.parametrize(
    "bad", [[], [(0.0, 1.0, -0.1)], [(0.0, float("nan"), 1.0)], [(0.0, float("inf"), 1.0)], [(0.0, 1.0, 1e300)]], ids=str
)
def test_exchanges_that_say_nothing_are_refused(bad: Any) -> None:
    with pytest.raises(MeterError, match="give no offset"):
        offset_by_exchange(bad)


def pattern(edges: Any, until: float) -> tuple[Any, Any]:
    level = np.where(np.arange(len(edges)) % 2 == 0, 1.0, 0.0)
    return np.concatenate(([0.0], edges, [until])), np.concatenate(([0.0], level, [0.0]))


@pytest.mark.parametrize(("poll", "width"), [(0.002, 0.0), (0.02, 0.0), (0.1, 0.0), (0.1, 0.42), (1.0, 0.0)])
@pytest.mark.parametrize("true_s", [0.05, -3.3, 40.0])
def test_a_load_pattern_gives_the_offset_within_what_it_claims(poll: float, width: float, true_s: float) -> None:
    errors, claims = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        edges = simulated.edges(rng, 8)
        power = simulated.toggled(edges, 5, 15)
        at = simulated.polls(rng.uniform(0, poll), edges[-1] + 4, poll, rng, poll / 10)
        watts = (simulated.boxcar(power, at, width) if width else power.at(at)) + rng.normal(0, 0.3, len(at))
        found = offset_by_step(*pattern(edges, edges[-1] + 4), at - true_s, watts)
        errors.append(abs(found.offset_s - (true_s - width / 2)))  # the boxcar's own delay is part of it, as the docstring says
        claims.append(found.uncertainty_s)
    assert np.mean(np.array(errors) <= claims) >= 0.8 and max(claims) < 0.3 * max(poll, 0.01) + 0.05 * width
    assert np.median(errors) < 0.15 * poll


def test_a_load_of_even_beats_is_ambiguous_and_noise_is_no_pattern() -> None:
    edges = 2.0 + np.arange(16) * 1.0
    at = np.arange(0, 20, 0.02)
    watts = simulated.toggled(edges, 5, 15).at(at)
    load = pattern(edges, edges[-1] + 0.5)
    assert offset_by_step(*load, at - 1.0, watts).offset_s == pytest.approx(1.0, abs=0.01)  # the idle at the ends tells
    middle = (at > 4.3) & (at < 13.7)
    with pytest.raises(MeterError, match="several places"):
        offset_by_step(*load, at[middle], watts[middle])
    rng = np.random.default_rng(0)
    edges = simulated.edges(rng, 8)
    at = np.arange(0, edges[-1] + 4, 0.02)
    with pytest.raises(MeterError, match="not in the trace"):
        offset_by_step(*pattern(edges, edges[-1] + 4), at, rng.normal(5, 1, len(at)))
    with pytest.raises(MeterError, match="never changes"):
        offset_by_step(*pattern(edges, edges[-1] + 4), at, np.full(len(at), 5.0))


def remote(true_s: float, start: float, stop: float, power_w: tuple[float, float]) -> Trace:
    at = np.arange(0.0, 30.0, 0.02)
    watts = simulated.toggled([start, stop], *power_w).at(at)
    return Trace("in", "power_w", floats(at - true_s), floats(watts), "remote", "B", "board-in", 0.02, clock_id="meter")


def test_an_aligned_trace_keeps_its_samples_and_the_energy_falls_into_the_window() -> None:
    trace = remote(7.0, 10.0, 20.0, (5.0, 15.0))
    found = aligned(trace, Offset(7.0, 0.004, "test"))
    assert (found.offset_s, found.offset_uncertainty_s) == (7.0, 0.004) and found.times_s is trace.times_s and trace.offset_s == 0.0
    assert integrate(found, 12.0, 18.0) == pytest.approx(90.0, rel=1e-9) and integrate(trace, 12.0, 18.0) != pytest.approx(90.0, rel=0.01)


@pytest.mark.parametrize("wrong_s", [-0.05, 0.05])
def test_an_offset_that_is_wrong_within_its_uncertainty_does_not_move_the_net_energy(wrong_s: float) -> None:
    found = aligned(remote(7.0, 10.0, 20.0, (5.0, 15.0)), Offset(7.0 + wrong_s, 0.05, "test"))
    energy = window_energy([found], Phase("window", 10, 20), Phase("idle_before", 2, 10), Phase("idle_after", 20, 28))
    assert energy.net_energy_j == pytest.approx(100.0, rel=0.002)


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10, 10)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=12))
def test_garbled_exchanges_give_a_finite_offset_or_one_clear_error(samples: Any) -> None:
    try:
        found = offset_by_exchange(samples)
    except MeterError as error:
        assert "exchanges" in str(error)
    else:
        assert np.isfinite(found.offset_s) and found.uncertainty_s >= 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), max_size=40), st.lists(st.tuples(numbers, numbers), max_size=60), st.booleans())
def test_garbled_patterns_give_a_finite_offset_or_one_clear_error(load: Any, trace: Any, ordered: bool) -> None:
    arrays = [np.array(sorted(set(rows)) if ordered else rows, dtype=np.float64).reshape(-1, 2) for rows in (load, trace)]
    try:
        found = offset_by_step(arrays[0][:, 0], arrays[0][:, 1], arrays[1][:, 0], arrays[1][:, 1])
    except MeterError:
        return
    assert np.isfinite(found.offset_s) and np.isfinite(found.uncertainty_s)
