"""The polling thread: what it keeps, what it survives, what it refuses. Real time, as little of it as will do."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import pytest

from edgejoule.errors import MeterError
from edgejoule.measure.polled import PolledMeter


@dataclasses.dataclass
class Tally:
    """A counter that rises by itself, and fails at the reads named in ``fails``."""

    fails: Any = ()
    period_s: float = 0.005
    quantity: Any = "energy_j"
    averaging_s: float = 0.001
    grade: Any = "C"
    scope: str = "package"
    reads: Any = dataclasses.field(default_factory=itertools.count)

    def probe(self) -> str | None:
        return None

    def total(self, rail: str) -> bool:
        return rail == "all"

    def read(self) -> dict[str, float]:
        if next(self.reads) in self.fails:
            raise MeterError("the bus was busy")
        return {"all": time.perf_counter(), "part": 1.0}


def record(sensor: Any, seconds: float = 0.12) -> tuple[PolledMeter, Any]:
    meter = PolledMeter(sensor, "tally(a=1)")
    meter.start()
    time.sleep(seconds)
    return meter, meter.stop()


def test_every_rail_is_kept_with_stamps_of_the_process_s_clock() -> None:
    before = time.perf_counter()
    meter, traces = record(Tally())
    after = time.perf_counter()
    whole, part = traces
    assert (whole.rail, whole.total, part.rail, part.total) == ("all", True, "part", False)
    assert (whole.source, whole.grade, whole.scope, whole.period_s, whole.averaging_s) == ("tally(a=1)", "C", "package", 0.005, 0.001)
    assert before <= whole.times_s[0] and whole.times_s[-1] <= after and whole.times_s[-1] - whole.times_s[0] >= 0.12
    assert all(a < b for a, b in itertools.pairwise(whole.times_s))
    # The value is the time at which it was read: a stamp is halfway between before and after.
    assert sorted(abs(t - v) for t, v in zip(whole.times_s, whole.values, strict=True))[len(whole.values) // 2] < 1e-3
    assert len(whole.times_s) >= 10 and not meter.caveats


def test_a_read_that_fails_now_and_then_leaves_a_hole_and_a_caveat() -> None:
    meter, traces = record(Tally(fails={3, 4, 5}))
    (doubt,) = meter.caveats
    assert doubt.code == "trace_gap" and doubt.seen.startswith("3 of ") and "the bus was busy" in doubt.seen
    assert 1.0 not in traces[0].values and 0.0 not in traces[0].values


def test_a_first_read_may_fail_once_but_not_twice() -> None:
    record(Tally(fails={0}), 0.01)
    with pytest.raises(MeterError, match="could not be read: the bus was busy"):
        PolledMeter(Tally(fails={0, 1}), "tally").start()


def test_a_sensor_that_dies_is_an_error() -> None:
    with pytest.raises(MeterError, match="stopped answering"):
        record(Tally(fails=range(1, 10**6)))


def test_a_bug_in_a_sensor_is_not_a_short_trace() -> None:
    class Broken(Tally):
        def read(self) -> dict[str, float]:
            return {"all": 1 / (3 - next(self.reads))}

    with pytest.raises(ZeroDivisionError):
        record(Broken())


def test_one_use_each() -> None:
    meter, _ = record(Tally(), 0.01)
    with pytest.raises(MeterError, match="already started"):
        meter.start()
    with pytest.raises(MeterError, match="before it was started"):
        PolledMeter(Tally(), "tally").stop()


def test_what_the_device_says_is_passed_on() -> None:
    assert PolledMeter(Tally(), "tally").doubts() == {}
    hot = Tally()
    hot.doubts = lambda: {"throttled": "hot"}  # type: ignore[attr-defined]
    assert PolledMeter(hot, "tally").doubts() == {"throttled": "hot"}
