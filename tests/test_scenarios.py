"""The scenarios' grammar, and a camera's window on a clock that moves only when somebody works or sleeps."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgejoule.errors import BackendError, SpecError, UnknownNameError
from edgejoule.measure.summary import summarise
from edgejoule.measure.trial import run_trial
from edgejoule.measure.window import Timed, run_frames, run_streams, run_submitted
from edgejoule.records import Workload
from edgejoule.scenarios import Scenario, scenario
from tests.fakes.measuring import FakeClock, FakeMeter, FakeSession, artifact, bench, crops, job


def test_a_spelling_names_a_scenario() -> None:
    assert scenario("single_stream") == Scenario("single_stream")
    assert scenario("offline", batch=8).hz is None
    assert scenario("fixed_rate(hz=30)") == Scenario("fixed_rate", 30.0)
    assert scenario("streams(n=4)").n == 4 and str(scenario("streams( n = 4 )")) == "streams(n=4)" and scenario("offline").n == 1
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
        ("streams", 1, "the number of cameras, 1 to 64"),
        ("streams(n=0)", 1, "the number of cameras"),
        ("streams(n=True)", 1, "the number of cameras"),
        ("streams(n=2, hz=30)", 1, "takes n only, found hz"),
        ("streams(n=2)", 4, "one image at a time"),
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


# ---------------------------------------------------------------- several cameras at once


class Lanes:
    """A session whose inference takes as long as its image says, in any number of threads; and the same by callback."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def infer(self, image: tuple[str, float]) -> dict[str, str]:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(image[1])
        with self.lock:
            self.at_once -= 1
            self.seen.append(image)
        return {"logits": image[0]}

    def submit(self, image: tuple[str, float], done: Callable[[Any], None]) -> None:
        threading.Thread(target=lambda: done(self.infer(image))).start()


def at_once(way: str, lanes: Lanes, n: int = 3, at_least: int = 12, duration_s: float = 0.0) -> Timed:
    pool = [(name, 0.02 if name == "c" else 0.005) for name in "abcdef"]
    if way == "threads":
        return run_streams(lanes.infer, pool, duration_s, at_least, n, time.perf_counter)
    return run_submitted(lanes.submit, pool, duration_s, at_least, n, time.perf_counter)


@pytest.mark.parametrize("way", ["threads", "callbacks"])
def test_cameras_run_at_once_and_each_has_its_own_latencies(way: str) -> None:
    lanes = Lanes()
    timed = at_once(way, lanes)
    assert lanes.most == 3 and len(timed.latencies_s) == len(timed.cameras) == len(lanes.seen) >= 12
    assert set(timed.cameras) == {0.0, 1.0, 2.0}
    for camera in range(3):
        mine = [latency for latency, of in zip(timed.latencies_s, timed.cameras, strict=True) if of == camera]
        assert all(latency >= 0.004 for latency in mine)
        assert sum(mine) <= timed.stop_s - timed.start_s + 1e-9, "one image under way at any time"


@pytest.mark.parametrize("way", ["threads", "callbacks"])
def test_the_window_of_cameras_lasts_until_both_time_and_number_are_reached(way: str) -> None:
    timed = at_once(way, Lanes(), at_least=1, duration_s=0.1)
    assert timed.stop_s - timed.start_s >= 0.1 and len(timed.latencies_s) > 10
    assert at_once(way, Lanes(), at_least=30).latencies_s.__len__() >= 30


def test_a_camera_that_fails_ends_the_window() -> None:
    lanes = Lanes()

    def infer(image: tuple[str, float]) -> Any:
        if len(lanes.seen) > 4:
            raise BackendError("the device is gone")
        return lanes.infer(image)

    with pytest.raises(BackendError, match="the device is gone"):
        run_streams(infer, [("a", 0.001)] * 6, 60.0, 1, 3, time.perf_counter)

    def submit(image: tuple[str, float], done: Callable[[Any], None]) -> None:
        done(BackendError("the device is gone") if len(lanes.seen) > 4 else lanes.infer(image))

    with pytest.raises(BackendError, match="the device is gone"):
        run_submitted(submit, [("a", 0.001)] * 6, 60.0, 1, 3, time.perf_counter)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_cameras_through_a_real_runtime(backend: str, tmp_path: Path) -> None:
    from edgejoule import compiling, zoo
    from edgejoule.bench import Bench
    from edgejoule.study import measure_one
    from edgejoule.study_file import MeasurePlan

    plan = MeasurePlan(
        profile="quick(window_s=0.2, repeats_max=3, warmup_s=0.1, idle_s=0.1)", scenario="streams(n=2)", meter="none", threads=2
    )
    bench = Bench(cache=tmp_path)
    (made,) = compiling.compile_model(zoo.spec_of_timm("test_vit"), (backend,), plan, "random", bench)
    found, trials = measure_one(made, plan, None, bench)
    assert len(found.cameras) == 2 and sum(one.inferences for one in found.cameras) == found.inferences
    assert all(one.median_s > 0 for one in found.cameras) and found.throughput_ips.value > 0
    assert len(trials[0].cameras) == len(trials[0].latencies_s)


def test_of_one_artifact_measured_in_two_ways_each_is_shown_as_asked(tmp_path: Path) -> None:
    from edgejoule import compiling, zoo
    from edgejoule.bench import Bench
    from edgejoule.study import measure_one
    from edgejoule.study_file import MeasurePlan

    profile = "quick(window_s=0.05, window_inferences=2, warmup_s=0.02, warmup_cap_s=0.05, idle_s=0.0, repeats_min=1, repeats_max=1)"
    made = tmp_path / "measured"
    one, two = (MeasurePlan(profile=profile, meter="none", threads=threads) for threads in (1, 2))
    cameras = MeasurePlan(profile=profile, meter="none", threads=1, scenario="streams(n=2)")
    bench = Bench(cache=tmp_path / "cache")
    (artifact,) = compiling.compile_model(zoo.spec_of_timm("test_vit"), ("onnxruntime",), one, "random", bench)
    first, _ = measure_one(artifact, one, made, bench)
    for other in (two, cameras):
        measure_one(artifact, other, made, bench)
    again, trials = measure_one(artifact, one, made, bench)
    assert again == first and [trial.environment.threads for trial in trials] == [1]
