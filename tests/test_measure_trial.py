"""The order of events, exactly: a session, a meter and a clock that never waits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgejoule.errors import ArtifactError, MeterError, SpecError
from edgejoule.measure.energy import window_energy
from edgejoule.measure.protocols import profile
from edgejoule.measure.trial import run_trial, window_size
from edgejoule.records import Trial
from tests.fakes.measuring import PLAIN, FakeClock, FakeMeter, FakeSession, artifact, bench, crops, job


def codes(trial: Trial) -> set[str]:
    return {doubt.code for doubt in trial.caveats}


def test_events_come_in_order_and_on_one_clock(tmp_path: Path) -> None:
    clock, said = FakeClock(), list[str]()
    session = FakeSession(clock)
    meter = FakeMeter(clock, session)

    def load() -> FakeSession:
        clock.now += 0.3
        return session

    trial = run_trial(load, artifact(), crops(), job(), meter, bench=bench(clock, tmp_path, said))
    assert said == [phase.name for phase in trial.phases] == ["load", "first", "warmup", "idle_before", "window", "idle_after"]
    assert trial.load_s == pytest.approx(0.3) and trial.first_inference_s == pytest.approx(0.01)
    for one, following in zip(trial.phases, trial.phases[1:], strict=False):
        assert one.stop_s == following.start_s  # the fake clock stands still between phases
    window = trial.phase("window")
    assert window is not None and window.stop_s - window.start_s == pytest.approx(2.0, abs=0.011)
    assert len(trial.latencies_s) == pytest.approx(200, abs=1)
    assert sum(trial.latencies_s) == pytest.approx(window.stop_s - window.start_s)
    assert clock.sleeps == [1.0, 1.0]
    assert not session.closed  # whoever opened it closes it, after the trial is safe
    before, after = trial.phase("idle_before"), trial.phase("idle_after")
    assert before and after and meter.events == [("start", before.start_s), ("stop", after.stop_s)]
    assert not codes(trial)


def test_the_warm_up_lasts_until_steady(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock, cost=lambda n: max(0.01, 0.03 - n * 0.0003))  # reaches its pace after 67 inferences, 1.3 s
    trial = run_trial(lambda: session, artifact(), crops(), job(), None, bench=bench(clock, tmp_path))
    warm = trial.phase("warmup")
    assert warm is not None and 1.2 < warm.stop_s - warm.start_s < 3.0
    assert max(trial.latencies_s) == pytest.approx(0.01) and codes(trial) == {"no_meter"}


def test_a_session_that_never_settles_is_measured_and_labelled(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock, cost=lambda n: 0.01 * 1.01 ** min(n, 600))
    trial = run_trial(lambda: session, artifact(), crops(), job(), None, bench=bench(clock, tmp_path))
    warm = trial.phase("warmup")
    assert "no_steady_state" in codes(trial) and warm is not None and warm.stop_s - warm.start_s == pytest.approx(3.0, abs=0.3)
    assert "drift" in codes(trial)


def test_energy_of_the_trial_is_the_load_s(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)
    meter = FakeMeter(clock, session)
    trial = run_trial(lambda: session, artifact(), crops(), job(), meter, bench=bench(clock, tmp_path))
    window = trial.phase("window")
    assert window is not None
    energy = window_energy(trial.traces, window, trial.phase("idle_before"), trial.phase("idle_after"))
    assert energy.energy_j == pytest.approx(15 * sum(trial.latencies_s), rel=1e-6)
    assert energy.net_energy_j == pytest.approx(10 * sum(trial.latencies_s), rel=1e-6)
    assert energy.idle_w == pytest.approx(5) and energy.power_w == pytest.approx(15) and not energy.caveats


def test_a_slow_sensor_gets_longer_idle_and_a_longer_window(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock, cost=lambda n: 0.1)
    meter = FakeMeter(clock, session, averaging_s=0.2)
    wanted = dataclasses.replace(PLAIN, sensor_windows=100.0)
    trial = run_trial(lambda: session, artifact(), crops(), job(wanted), meter, bench=bench(clock, tmp_path))
    window = trial.phase("window")
    assert clock.sleeps == [3.0, 2.0]  # one second of clean idle beyond five averaging times, and the warm-up forgotten before
    assert window is not None and window.stop_s - window.start_s == pytest.approx(20.0, abs=0.11)


def test_no_window_is_too_short_for_its_sensor(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)
    trial = run_trial(lambda: session, artifact(), crops(), job(), FakeMeter(clock, session, averaging_s=0.1), bench=bench(clock, tmp_path))
    window = trial.phase("window")
    assert window is not None and (window.stop_s - window.start_s) / 0.104 >= 21  # a GPU's counter that claims 0.1 s
    assert window_size(profile("quick"), 1, 1.0) == (25.0, 5) and window_size(profile("quick"), 1, 0.001) == (2.0, 5)


def test_images_fix_the_window_by_count(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)
    trial = run_trial(lambda: session, artifact(), crops(), job(profile("paper")), None, bench=bench(clock, tmp_path))
    assert len(trial.latencies_s) == 1000 and len(session.seen) == 1003  # and one first and two for warming up
    assert "no_steady_state" not in codes(trial)
    assert window_size(profile("paper"), batch=64) == (0.0, 16)


def test_batches_cycle_normalised_images(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)
    run_trial(lambda: session, artifact(3), crops(7), job(batch=3), None, bench=bench(clock, tmp_path))
    shapes = {seen[:2] for seen in session.seen}
    assert shapes == {((3, 3, 8, 8), "float32")}
    assert len({seen[2] for seen in session.seen}) == 2 and abs(session.seen[0][2]) < 1  # two distinct batches, normalised


def test_end_to_end_normalises_inside_the_window(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)

    def slow(images: np.ndarray, preprocessing: object) -> np.ndarray:
        clock.now += 0.004
        return images.astype(np.float32)

    inside = run_trial(lambda: session, artifact(), crops(), job(end_to_end=True), None, slow, bench(clock, tmp_path))
    outside = run_trial(lambda: session, artifact(), crops(), job(), None, slow, bench(clock, tmp_path))
    assert np.median(inside.latencies_s) == pytest.approx(0.014) and np.median(outside.latencies_s) == pytest.approx(0.010)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)
    stream = dataclasses.replace(job(), workload=dataclasses.replace(job().workload, batch=2))
    for wrong, error in ((job(None), SpecError), (job(batch=2), ArtifactError), (stream, SpecError)):
        with pytest.raises(error):
            run_trial(lambda: session, artifact(), crops(), wrong, None, bench=bench(clock, tmp_path))


def test_a_failing_session_stops_the_meter(tmp_path: Path) -> None:
    clock = FakeClock()

    def cost(n: int) -> float:
        if n == 120:
            raise MeterError("the runtime died")
        return 0.01

    session = FakeSession(clock, cost)
    meter = FakeMeter(clock, session)
    with pytest.raises(MeterError, match="the runtime died"):
        run_trial(lambda: session, artifact(), crops(), job(), meter, bench=bench(clock, tmp_path))
    assert [name for name, _ in meter.events] == ["start", "stop"]


def test_a_meter_s_own_doubts_reach_the_trial(tmp_path: Path) -> None:
    clock = FakeClock()
    session = FakeSession(clock)

    class Hot(FakeMeter):
        def doubts(self) -> dict[str, str]:
            return {"throttled": "too hot"}

    trial = run_trial(lambda: session, artifact(), crops(), job(), Hot(clock, session), bench=bench(clock, tmp_path))
    assert codes(trial) == {"throttled"}
