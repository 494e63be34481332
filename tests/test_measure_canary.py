"""The canary: cries where a clock says that the work takes longer, and not because somebody else is busy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from edgejoule.measure import canary


class Scripted:
    """A clock under which every run of the work takes what the script says next; the last one for ever."""

    def __init__(self, spent: Iterator[float]) -> None:
        self.spent, self.now, self.running, self.runs = spent, 0.0, False, 0

    def __call__(self) -> float:
        if self.running:
            self.now += next(self.spent)
            self.runs += 1
        self.running = not self.running
        return self.now


def timed(*phases: tuple[int, float], cold_s: float = 0.0) -> tuple[float, int]:
    def script() -> Iterator[float]:
        for runs, spent in phases:
            for _ in range(runs):
                yield spent

    clock = Scripted(script())
    return canary.best_s(clock, cold_s), clock.runs


def test_it_cries_where_the_processor_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    cold, runs = timed((10**6, 50e-6))
    assert cold == pytest.approx(50e-6) and runs == canary.PATIENCE + 1
    warm, runs = timed((10**6, 56e-6), cold_s=cold)
    assert runs == canary.MOST  # it does not give up before it says so
    (doubt,) = canary.doubts(cold, warm)
    assert doubt.code == "canary_slow" and doubt.severity == "reject" and "1.12 times" in doubt.seen
    warm, runs = timed((10**6, 54e-6), cold_s=cold)
    assert canary.doubts(cold, warm) == [] and runs == canary.PATIENCE + 1


def test_interrupted_runs_and_a_clock_that_ramps_up_are_no_throttling() -> None:
    assert timed((300, 90e-6), (1, 50e-6), (10**6, 90e-6))[0] == pytest.approx(50e-6)  # one quiet moment is enough
    ramp = [(50, 200e-6), (50, 150e-6), (50, 100e-6), (10**6, 50e-6)]
    assert timed(*ramp)[0] == pytest.approx(50e-6)
    late = [(canary.MOST - 10, 90e-6), (10**6, 50e-6)]
    assert canary.doubts(50e-6, timed(*late, cold_s=50e-6)[0]) == []


@pytest.mark.parametrize(("cold", "warm"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, float("nan")), (1.0, 0.0), (1.0, 1.1)])
def test_no_verdict_without_two_times(cold: float, warm: float) -> None:
    assert canary.doubts(cold, warm) == []


def test_a_clock_that_stands_still_ends_it() -> None:
    assert canary.best_s(lambda: 5.0) == 0.0


def test_the_work_is_the_same_every_time_and_stays_finite() -> None:
    one, two = canary._arrays(), canary._arrays()
    for data, room in (one, two):
        canary._work(data, room)
        assert data.ctypes.data % canary.PAGE == 0 and room.ctypes.data % canary.PAGE == canary.PAGE // 2
    assert (one[1] == two[1]).all() and one[1].min() > 0.5 and one[1].max() < 6.0


def test_a_busy_machine_is_rarely_taken_for_throttling() -> None:
    """Beside two busy programs, at least half of ten pairs raise no doubt; on a quiet machine it is all of them."""
    cold = [canary.best_s() for _ in range(10)]
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.3)
        cries = sum(bool(canary.doubts(one, canary.best_s(cold_s=one))) for one in cold)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert cries <= 5
