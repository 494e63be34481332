"""The polling thread: what it keeps, what it survives, what it refuses. Real time, as little of it as will do."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule.errors import MeterError
from edgejoule.measure.meters import open_meter
from edgejoule.measure.polled import PolledMeter
from tests.fakes.measuring import write_domain


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
        return rail.startswith("all")

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


def test_a_snapshot_holds_all_up_to_now_and_the_recording_goes_on() -> None:
    meter = PolledMeter(Tally(period_s=0.002), "tally")
    with pytest.raises(MeterError, match="recorded nothing yet"):
        meter.snapshot()
    meter.start()
    looks: list[Any] = []

    def look() -> None:
        for _ in range(40):
            asked = time.perf_counter()
            found = meter.snapshot()[0]
            held = np.frombuffer(found.times_s)  # who looks into a snapshot must not stop the recording from growing
            looks.append((asked, found, held))
            time.sleep(0.001)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = meter.stop()[0]
    assert len(looks) == 120 and all(found.times_s[-1] >= asked for asked, found, _ in looks)
    assert all(list(last.times_s[: len(found.times_s)]) == list(found.times_s) for _, found, _ in looks)
    assert all(a < b for a, b in itertools.pairwise(last.times_s)) and all(a <= b for a, b in itertools.pairwise(last.values))
    assert meter.snapshot()[0] == last and not meter.caveats


def test_nobody_reads_a_sensor_while_it_is_being_read() -> None:
    class Exclusive(Tally):
        inside = False

        def read(self) -> dict[str, float]:
            assert not self.inside
            self.inside = True
            time.sleep(0.002)
            self.inside = False
            return super().read()

    meter = PolledMeter(Exclusive(period_s=0.002), "tally")
    meter.start()
    for _ in range(20):
        meter.snapshot()
    assert len(meter.stop()[0].times_s) >= 20


def test_a_snapshot_with_a_sensor_that_fails_is_what_there_is() -> None:
    meter = PolledMeter(Tally(fails=range(2, 10**6), period_s=10.0), "tally")
    meter.start()
    first, second = meter.snapshot()[0], meter.snapshot()[0]
    assert len(first.times_s) == 2 and first == second and meter.caveats[0].seen.startswith("1 of 3")


def test_what_sampling_costs_is_measured_in_the_reading_thread() -> None:
    class Burning(Tally):
        def read(self) -> dict[str, float]:
            until = time.thread_time() + 0.01
            while time.thread_time() < until:
                pass
            return super().read()

    meter = PolledMeter(Burning(period_s=0.02), "tally")
    assert meter.cores is None
    meter.start()
    assert meter.cores is None  # the first read is not the thread's
    time.sleep(0.4)
    during = meter.cores
    meter.stop()
    assert during is not None and meter.cores is not None and 0.1 < during < 0.9 and 0.1 < meter.cores < 0.9
    lazy, _ = record(Tally(period_s=0.02), 0.4)
    assert lazy.cores is not None and 0 < lazy.cores < meter.cores


@pytest.mark.parametrize("spelling", ["estimate(period_s=0.05)", "rapl(root={root!r})"])
def test_the_cheap_sensors_cost_little_at_20_hz(spelling: str, tmp_path: Path) -> None:
    write_domain(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    meter: Any = open_meter(spelling.format(root=str(tmp_path)))
    meter.start()
    time.sleep(0.5)
    meter.stop()
    assert 0 < meter.cores < 0.2  # well below 0.01 on a machine that does nothing else


@dataclasses.dataclass
class Watts(Tally):
    """The same thing as a Tally sees, as power."""

    quantity: Any = "power_w"
    averaging_s: float = 1.0
    systematic: float = 0.05
    stamp_uncertainty_s: float = 0.1

    def read(self) -> dict[str, float]:
        if next(self.reads) in self.fails:
            raise MeterError("no power")
        return {"all/power": 1.0}


@dataclasses.dataclass
class Pair(Tally):
    second: Any = None

    def beside(self) -> Any:
        return self.second


def test_a_second_sensor_is_recorded_beside_and_never_part_of_the_total() -> None:
    meter, traces = record(Pair(second=Watts()))
    whole, _, power = traces
    assert (power.rail, power.quantity, power.total, power.averaging_s) == ("all/power", "power_w", False, 1.0)
    assert (power.systematic, power.offset_uncertainty_s, power.source) == (0.05, 0.1, "tally(a=1)")
    assert (whole.systematic, whole.offset_uncertainty_s) == (0.0, 0.0) and whole.total
    assert len(power.times_s) >= len(whole.times_s) - 1 and not meter.caveats
    assert len(record(Pair(second=None), 0.01)[1]) == 2


def test_a_sensor_beside_may_fail_and_the_total_goes_on() -> None:
    meter, traces = record(Pair(second=Watts(fails=range(2, 10**6))))
    assert len(traces[2].times_s) == 2 < len(traces[0].times_s) and not meter.caveats  # its own trace shows the hole
    assert len(record(Pair(second=Watts(fails=range(10**6))), 0.02)[1]) == 2


@pytest.mark.parametrize("nonsense", [math.nan, math.inf])
def test_a_number_that_is_none_is_a_failed_read(nonsense: float) -> None:
    class Odd(Tally):
        def read(self) -> dict[str, float]:
            return super().read() | ({"part": nonsense} if next(self.reads) == 5 else {})

    meter, traces = record(Odd())
    assert meter.caveats[0].seen.startswith("1 of ") and "expected a finite number" in meter.caveats[0].seen
    assert len(traces[0].times_s) == len(traces[1].times_s) and all(math.isfinite(v) for v in traces[1].values)


def test_a_slow_read_skips_beats_and_never_bursts() -> None:
    class Slow(Tally):
        def read(self) -> dict[str, float]:
            time.sleep(0.03)
            return super().read()

    _, traces = record(Slow(period_s=0.005), 0.2)
    assert all(b - a > 0.025 for a, b in itertools.pairwise(traces[0].times_s))


def test_two_reads_within_one_tick_of_a_coarse_clock_are_one_sample() -> None:
    meter = PolledMeter(Tally(), "tally", clock=lambda: 7.0)
    meter.start()
    assert [list(t.times_s) for t in (*meter.snapshot(), *meter.stop())] == [[7.0]] * 4
