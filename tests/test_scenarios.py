"""The scenarios' grammar, and a camera's window on a clock that moves only when somebody works or sleeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.measure.summary import summarise
from edgejoule.measure.trial import run_trial
from edgejoule.measure.window import Timed, run_frames
from edgejoule.records import Workload
from edgejoule.scenarios import Scenario, scenario
from tests.fakes.measuring import FakeClock, FakeMeter, FakeSession, artifact, bench, crops, job


def test_a_spelling_names_a_scenario() -> None:
    assert scenario("single_stream") == Scenario("single_stream")
    assert scenario("offline", batch=8).hz is None
    assert scenario("fixed_rate(hz=30)") == Scenario("fixed_rate", 30.0)
    assert str(scenario("fixed_rate(hz=30.0)")) == str(scenario("fixed_rate(hz=30)")) == "fixed_rate(hz=30)"


@pytest.mark.parametrize(
    ("spelling", "batch", "said"),
    [
        ("fixed_rate", 1, "frames per second"),
        ("fixed_rate(hz=0)", 1, "frames per second"),
        ("fixed_rate(hz=1e-9)", 1, "0.01 to 10000"),
        ("fixed_rate(hz=1e12)", 1, "frames per second"),
        ("fixed_rate(hz=True)", 1, "frames per second"),
        ("fixed_rate(hz=30, drop=1)", 1, "takes hz only, found drop"),
        ("fixed_rate(hz=30)", 4, "one image at a time, but the batch is 4"),
        ("single_stream", 2, "one image at a time, but the batch is 2"),
        ("single_stream(hz=30)", 1, "takes no options"),
        ("multi", 1, "no scenario is called 'multi'"),
    ],
)
def test_what_has_no_meaning_is_refused(spelling: str, batch: int, said: str) -> None:
    with pytest.raises((SpecError, UnknownNameError), match=said):
        scenario(spelling, batch)


def frames(costs: list[float], hz: float = 10.0, duration_s: float = 1.0, at_least: int = 1) -> tuple[FakeClock, Timed]:
    clock = FakeClock()
    calls = iter(range(10_000))

    def infer(images: object) -> None:
        clock.now += costs[next(calls) % len(costs)]

    return clock, run_frames(infer, ["a", "b", "c"], duration_s, at_least, hz, clock, clock.sleep)


def test_a_device_that_keeps_up_misses_nothing_and_idles_between() -> None:
    clock, timed = frames([0.03])
    assert (timed.frames_due, timed.deadlines_missed, len(timed.latencies_s)) == (10, 0, 10)
    assert timed.stop_s - timed.start_s == pytest.approx(1.0), "whole periods: the idle after the last frame is part of it"
    assert list(timed.latencies_s) == pytest.approx([0.03] * 10)
    assert sum(clock.sleeps) == pytest.approx(0.7)


def test_one_slow_frame_misses_its_deadline_and_delays_the_next() -> None:
    _, timed = frames([0.03, 0.03, 0.12, 0.03, 0.03, 0.03, 0.03, 0.03, 0.03, 0.03])
    assert (timed.frames_due, timed.deadlines_missed) == (10, 1)
    assert list(timed.latencies_s)[2:5] == pytest.approx([0.12, 0.05, 0.03]), "the next frame waits, and its wait counts"


def test_a_device_too_slow_drops_frames_and_takes_the_newest() -> None:
    _, timed = frames([0.25], duration_s=2.0)
    done = len(timed.latencies_s)
    assert timed.frames_due is not None and timed.frames_due >= 20
    assert timed.deadlines_missed == timed.frames_due, "none is done in time"
    assert done == 8 and max(timed.latencies_s) <= 0.25 + 0.1, "it never falls further behind than one frame"


def test_the_least_number_of_inferences_holds() -> None:
    _, timed = frames([0.01], duration_s=0.2, at_least=7)
    assert timed.frames_due == len(timed.latencies_s) == 7


def test_a_trial_at_a_frame_rate_has_watts_with_the_idle_and_late_frames(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock, cost=lambda n: 0.15 if n % 10 == 0 else 0.03)
    wanted = dataclasses.replace(job(), workload=Workload("fixed_rate(hz=10)"))
    trial = run_trial(lambda: session, artifact(), crops(), wanted, FakeMeter(clock, session), bench=bench(clock, tmp_path))
    found = summarise([trial], artifact())
    slow = sum(latency > 0.1 for latency in trial.latencies_s)
    due, frames_done = trial.frames_due, len(trial.latencies_s)
    window = trial.phase("window")
    assert window is not None and found.frames_due == due == 20 and slow == 2
    duration_s = window.stop_s - window.start_s
    assert duration_s == pytest.approx(2.05), "the last frame was slow, and the window waited for it"
    assert found.deadlines_missed == slow
    busy_s = sum(stop - start for start, stop in session.spans if start >= window.start_s)
    assert found.power_w is not None and found.power_w.value == pytest.approx(5 + 10 * busy_s / duration_s, rel=1e-3)
    assert found.energy_j is not None and found.energy_j.value == pytest.approx((5 * duration_s + 10 * busy_s) / frames_done, rel=1e-3)
    told = next(doubt for doubt in found.caveats if doubt.code == "deadlines_missed")
    assert f"{slow} of {due} frames" in told.seen
