"""What a sensor really does, found again from simulated ones; the experiment on a sensor of known lag; and what doctor says of it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import edgejoule.measure
from edgejoule.cli import app
from edgejoule.errors import MeterError, SpecError
from edgejoule.measure import calibrate as live
from edgejoule.measure.calibrate import calibrate, core_load, gpu_load
from edgejoule.measure.response import Response, response, update_period
from tests.fakes import simulated

IDLE, LOAD = 5.0, 15.0


def seen(
    kind: str, width: float, update: float | None, seed: int = 0, noise_w: float = 0.1, delay_s: float = 0.03, step_w: float = 0.04
) -> Response:
    """The response fitted to a sensor polled every 2 ms, its updates jittered by 4 %, with noise, quantised."""
    rng = np.random.default_rng(seed)
    edges = simulated.edges(rng)
    power = simulated.toggled(edges, IDLE, LOAD)
    at = simulated.polls(0.0, edges[-1] + 3.0, 0.002, rng, 0.0005)
    new = at if update is None else simulated.last_update(at, update, 0.013, rng, 0.04 * update)
    values = power.at(new - delay_s) if kind == "instant" else getattr(simulated, kind)(power, new - delay_s, width)
    updates, of = np.unique(new, return_inverse=True)
    values = values + rng.normal(0, noise_w, len(updates))[of]
    return response("in", at, simulated.quantised(values, step_w), edges)


# ---------------------------------------------------------------- the simulated sensors themselves


@pytest.mark.parametrize("kind", ["boxcar", "exponential"])
def test_the_simulated_filters_are_what_they_say(kind: str) -> None:
    step, width = 1e-4, 0.3
    fine = np.arange(0.0, 12.0, step)
    power = simulated.toggled([2.0, 3.1, 4.0, 4.05, 7.0, 9.0], IDLE, LOAD)
    true = power.at(fine)
    if kind == "boxcar":
        brute = np.convolve(true, np.full(round(width / step), step / width))[: len(true)]
    else:
        brute = np.empty_like(true)
        level = IDLE
        for i, watts in enumerate(true):
            brute[i] = level
            level += (watts - level) * step / width
    late = fine > 1.0
    assert np.allclose(getattr(simulated, kind)(power, fine, width)[late], brute[late], atol=0.01)
    assert power.joules(12.0) - power.joules(1.0) == pytest.approx(float(np.sum(true[late]) * step), abs=0.01)


# ---------------------------------------------------------------- from samples to a response


@pytest.mark.parametrize("update", [None, 0.02, 0.1])
@pytest.mark.parametrize("width", [0.05, 0.1, 0.42, 1.0])
@pytest.mark.parametrize("kind", ["boxcar", "exponential"])
def test_averaging_delay_and_update_period_are_found_again(kind: str, width: float, update: float | None) -> None:
    found = seen(kind, width, update)
    assert found.kind == kind and found.decided
    assert found.averaging_s is not None and found.averaging_s.value == pytest.approx(width, rel=0.1)
    assert found.delay_s is not None and found.delay_s.value == pytest.approx(0.03, abs=max(0.01, 0.03 * width))
    assert found.rise_s is not None and found.rise_s.value == pytest.approx(width * (0.8 if kind == "boxcar" else np.log(9)), rel=0.1)
    assert found.step_w.value == pytest.approx(10.0, rel=0.02) and found.idle_w == pytest.approx(5.0, abs=0.1)
    assert found.update_s is not None and found.every_read == (update is None)
    if update is not None:
        assert found.update_s.value == pytest.approx(update, rel=0.1)


def test_the_intervals_hold_what_they_promise() -> None:
    held = 0
    for seed in range(12):
        found = seen("exponential", 0.42, 0.1, seed)
        assert found.averaging_s is not None and found.averaging_s.low is not None and found.averaging_s.high is not None
        assert found.averaging_s.high - found.averaging_s.low < 0.1 * 0.42
        held += found.averaging_s.low <= 0.42 <= found.averaging_s.high
    assert held >= 9  # of 95 %, with slack for a dozen seeds


def test_a_sensor_that_observes_a_part_of_the_time_is_told_apart() -> None:
    found = seen("boxcar", 0.025, 0.1, delay_s=0.0)  # A100, H100
    assert found.update_s is not None and found.update_s.value == pytest.approx(0.1, rel=0.05)
    assert found.averaging_s is not None and found.averaging_s.high is not None and found.averaging_s.high < 0.04


def test_a_sensor_without_averaging_is_instant() -> None:
    found = seen("instant", 0.0, None)
    assert found.kind == "instant" and found.averaging_s is not None and found.averaging_s.value == 0.0


@pytest.mark.parametrize(("update", "step"), [(0.02, 1e-3), (0.1, 1e-3)])
def test_a_counters_granularity(update: float, step: float) -> None:
    rng = np.random.default_rng(0)
    edges = simulated.edges(rng)
    at = simulated.polls(0.0, edges[-1] + 3.0, 0.002, rng, 0.0005)
    joules = simulated.toggled(edges, IDLE, LOAD).joules(simulated.last_update(at, update, 0.0, rng, 0.04 * update))
    found = response("gpu", at, simulated.quantised(joules, step), edges, counter=True)
    assert found.kind == "counter" and found.update_s is not None and found.update_s.value == pytest.approx(update, rel=0.1)
    assert found.step_w.value == pytest.approx(10.0, rel=0.02) and found.averaging_s is None
    assert found.least_step_j is not None and found.least_step_j == pytest.approx(5.0 * update, rel=0.2)


def test_what_does_not_follow_the_load_has_no_step() -> None:
    rng = np.random.default_rng(1)
    edges = simulated.edges(rng)
    at = simulated.polls(0.0, edges[-1] + 3.0, 0.01)
    for values in (np.full(len(at), 7.0), rng.normal(7, 1, len(at)), 7 + np.cumsum(rng.normal(0, 0.02, len(at)))):
        assert response("in", at, values, edges).kind == "none"
    down = simulated.toggled(edges, LOAD, IDLE).at(at) + rng.normal(0, 0.1, len(at))
    assert response("in", at, down, edges).kind == "none"  # less power under load is no step up
    assert response("in", at, 7.0 * at, edges, counter=True).kind == "none"


def test_update_period_counts_updates_that_left_the_value_as_it_was() -> None:
    rng = np.random.default_rng(0)
    at = np.arange(0, 30, 0.005)
    level = rng.integers(0, 4, 400).astype(float)[np.floor(at / 0.1).astype(int)]  # every fourth update repeats the value
    found = update_period(at, level)
    assert found is not None and found.value == pytest.approx(0.1, rel=0.01)
    assert update_period(at, np.full(len(at), 1.0)) is None


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-100, 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), max_size=90), st.lists(numbers, max_size=8), st.booleans(), st.booleans())
def test_garbage_is_one_clear_error_or_finite(rows: Any, edges: Any, ordered: bool, counter: bool) -> None:
    found = np.array(sorted(set(rows)) if ordered else rows, dtype=np.float64).reshape(-1, 2)
    try:
        seen_ = response("x", found[:, 0], found[:, 1], sorted(edges) if ordered else edges, counter)
    except MeterError as error:
        assert "expected at least" in str(error)
        return
    assert np.isfinite(seen_.step_w.value) and np.isfinite(seen_.idle_w)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), numbers), min_size=60, max_size=200), st.booleans())
def test_garbled_values_under_a_good_pattern(rows: Any, counter: bool) -> None:
    found = np.array(sorted(set(rows)), dtype=np.float64)
    with contextlib.suppress(MeterError):
        seen_ = response("x", found[:, 0], found[:, 1], [2.0, 5.0, 9.0, 14.0], counter)
        assert np.isfinite(seen_.step_w.value) and np.isfinite(seen_.idle_w)


# ---------------------------------------------------------------- the experiment

LOADED: list[tuple[float, bool]] = []


@dataclass(frozen=True)
class Lagging:
    """Follows the load with an exponential filter of 0.15 s; ``averaging_s`` is what it is told to say of itself."""

    averaging_s: float = 0.3
    period_s: float = 0.02
    quantity = "power_w"
    grade = "C"
    scope = "board-in"

    def probe(self) -> str | None:
        return None

    def read(self) -> dict[str, float]:
        edges = [at for at, _ in LOADED]
        now = time.perf_counter()
        return {"in": float(simulated.exponential(simulated.toggled(edges, IDLE, LOAD), [now], 0.15)[0]) if edges else IDLE}


@dataclass(frozen=True)
class Stubborn(Lagging):
    """Without the option, and blind to the load."""

    grade = "B"

    def read(self) -> dict[str, float]:
        return {"in": 3.0}


@contextlib.contextmanager
def told() -> Iterator[live.Switch]:
    yield lambda on: LOADED.append((time.perf_counter(), on))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment in four seconds, with a load that only the fake sensor feels."""
    for name, value in {"CYCLES": 4, "PHASE_S": (0.2, 0.45), "LEAD_S": 0.2, "BLOCK_S": 0.1, "PAIRS": 2, "core_load": told}.items():
        monkeypatch.setattr(live, name, value)
    for name in ("Lagging", "Stubborn"):
        monkeypatch.setitem(edgejoule.measure.LEAVES, name.lower(), f"tests.test_calibrate:{name}")  # type: ignore[index]
    LOADED.clear()


def test_the_experiment_finds_a_sensors_lag_and_says_what_to_write(brief: None) -> None:
    heard: list[str] = []
    found = calibrate("lagging(period_s=0.03)", lambda line, done: heard.append(line))
    averaging = found.response.averaging_s
    assert found.response.kind == "exponential" and averaging is not None and averaging.value == pytest.approx(0.15, rel=0.2)
    assert found.write.startswith("lagging(averaging_s=0.1") and found.write.endswith(", period_s=0.03)")
    assert found.declared_averaging_s == 0.3 and found.write in found.says[-1]
    assert found.sampler is not None and found.sampler.with_w == pytest.approx(IDLE) and found.sampler.cores < 1
    assert len(LOADED) == 8 and LOADED[-1][1] is False and any("idle with and without" in line for line in heard)


def test_a_declared_averaging_time_that_is_right_needs_no_other_spelling(brief: None) -> None:
    found = calibrate("lagging(averaging_s=0.15)")
    assert found.write == "" and "is right" in found.says[-1]


def test_a_sensor_that_stands_still_is_told_apart(brief: None) -> None:
    found = calibrate("stubborn")
    assert found.response.kind == "none" and found.write == "" and "its figure never changed" in found.says[0]


def test_a_model_is_no_sensor(brief: None) -> None:
    found = calibrate("estimate")
    assert found.write == "" and "a model of grade D and no sensor" in found.says[0]
    assert found.response.kind == "none"  # the load runs in other processes


def test_a_replay_is_told_apart(brief: None, tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("time_s,power_w\n" + "".join(f"{0.01 * i},{5 + i % 3}\n" for i in range(300)))
    found = calibrate(f"replay(path={str(path)!r})")
    assert "plays a recording back" in found.says[0] and found.sampler is None


def verdict(found: Response, leaf: Any, spelling: str = "lagging", declared: float = 0.02) -> tuple[str, tuple[str, ...]]:
    trace = edgejoule.records.Trace(
        "in", "power_w", edgejoule.records.floats(), edgejoule.records.floats(), "x", "C", "board-in", 0.02, declared
    )
    return live._verdict(spelling, leaf, trace, found, "2 cores")


class Plain:
    """A leaf that takes no option."""


def test_what_is_said_of_a_leaf_without_the_option_and_of_a_part_time_sensor() -> None:
    write, says = verdict(seen("boxcar", 0.42, 0.02), Plain(), "rapl")
    assert write == "" and "counts on 0.02 s, 0.42 s was seen, and it has no option averaging_s" in says[-1] and "longer" in says[-1]
    _, says = verdict(seen("boxcar", 0.025, 0.1), Plain(), declared=0.1)
    assert any("observes no more than" in said and "padding does not cure" in said for said in says) and "is right" in says[-1]
    assert not any("observes" in said for kind in ("boxcar", "exponential") for said in verdict(seen(kind, 0.1, 0.1), Plain())[1])
    write, says = verdict(seen("instant", 0.0, None), Lagging())
    assert write == "" and "No averaging was seen" in says[-1]


def test_meters_that_cannot_be_calibrated_say_so(brief: None, tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="no meter to calibrate"):
        calibrate("none")
    with pytest.raises(MeterError, match="does not work here"):
        calibrate(f"rapl(root={str(tmp_path / 'no')!r})")
    with pytest.raises(SpecError):
        calibrate("tachometer")


def test_the_load_leaves_no_process_and_no_setting_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "usable_cores", lambda: 1)
    before = dict(os.environ)
    with core_load() as switch:
        switch(True)
        (worker,) = multiprocessing.active_children()
        switch(False)
    assert dict(os.environ) == before and not worker.is_alive() and not multiprocessing.active_children()


def test_a_gpus_load_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MeterError, match="needs torch"), gpu_load():
        pass


# ---------------------------------------------------------------- doctor


def test_doctor_calibrates_and_says_what_to_write(brief: None) -> None:
    done = CliRunner().invoke(app, ["doctor", "--calibrate", "--meter", "lagging"])
    assert done.exit_code == 0, done.output
    for words in ("averages over", "exponential", "rise 10 to 90 %", "the sampler costs", "Write lagging(averaging_s=0.1"):
        assert words in done.stdout
    assert "load on and off, 4 of 4" in done.stderr


def test_doctors_json_is_one_value(brief: None) -> None:
    done = CliRunner().invoke(app, ["doctor", "--calibrate", "--meter", "estimate", "--json"])
    found = json.loads(done.stdout)
    assert found["meter"] == "estimate" and found["response"]["kind"] == "none" and "no sensor" in found["says"][0]
