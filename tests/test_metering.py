"""Measuring anybody's code: exact energies from simulated sensors, what counts as idle, nesting, threads, and every misuse."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import MeterError, SpecError, UnknownNameError
from edgejoule.measure import metering, spans
from edgejoule.measure.energy import window_energy
from edgejoule.measure.metering import Metering, Window, meter
from edgejoule.records import Phase, Trace, floats
from tests.fakes.measuring import FakeClock

IDLE_W, LOAD_W = 5.0, 10.0


@dataclasses.dataclass
class Machine:
    """A clock, what was done when, and a sensor that sees it: exact, through a boxcar, or through an exponential filter."""

    filtered: str = ""
    averaging_s: float = 0.0
    period_s: float = 0.05
    grade: Any = "C"
    lag_s: float = 0.0  # by how much a snapshot is behind, as a stream's is
    clock: FakeClock = dataclasses.field(default_factory=FakeClock)
    spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    looks: int = 0
    cores: float | None = None
    hot: dict[str, str] = dataclasses.field(default_factory=dict)

    def work(self, seconds: float) -> None:
        start = self.clock.now
        self.clock.now += seconds
        self.spans.append((start, self.clock.now))

    def joules(self, at: Any) -> Any:
        return IDLE_W * at + sum(LOAD_W * np.clip(at - start, 0, stop - start) for start, stop in self.spans)

    def watts(self, at: Any) -> Any:
        w = self.averaging_s
        if self.filtered == "boxcar":
            return (self.joules(at) - self.joules(at - w)) / w
        risen = [np.where(at > t, 1 - np.exp(-np.maximum(at - t, 0) / w), 0) for span in self.spans for t in span]
        return IDLE_W + LOAD_W * sum(up - down for up, down in zip(risen[::2], risen[1::2], strict=True)) + 0 * at

    def probe(self) -> str | None:
        return None

    def doubts(self) -> dict[str, str]:
        return self.hot

    def start(self) -> None:
        self.began = self.clock.now

    def snapshot(self) -> tuple[Trace, ...]:
        self.looks += 1
        return self.seen(max(self.began, self.clock.now - self.lag_s))

    def stop(self) -> tuple[Trace, ...]:
        return self.seen(self.clock.now)

    def seen(self, until: float) -> tuple[Trace, ...]:
        count = math.floor((until - self.began) / self.period_s + 1e-9)
        at = self.began + self.period_s * np.arange(count + 1)
        at = np.append(at[at < until - 1e-6], until)  # and one fresh sample
        values = self.watts(at) if self.filtered else self.joules(at)
        quantity: Any = "power_w" if self.filtered else "energy_j"
        return (Trace("all", quantity, floats(at), floats(values), "sim", self.grade, "package", self.period_s, self.averaging_s),)

    def metering(self) -> Metering:
        return Metering(self, "sim", clock=self.clock, sleep=self.clock.sleep)


def codes(window: Any) -> list[str]:
    return [doubt.code for doubt in window.caveats]


def seen(window: Any, code: str) -> str:
    return next(doubt.seen for doubt in window.caveats if doubt.code == code)


# ---------------------------------------------------------------- figures


def test_a_window_between_two_idles_is_exact() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(2)
        with recording.window("inference", queries=100) as w:
            machine.work(3)
        recording.idle(2)
        during = (w.energy_j, w.net_energy_j, w.power_w, w.idle_w)
    assert during == pytest.approx((45.0, 30.0, 15.0, 5.0), rel=1e-6)
    assert (w.energy_j, w.net_energy_j, w.power_w, w.idle_w) == pytest.approx(during, rel=1e-9)
    assert w.duration_s == pytest.approx(3.0) and w.energy_per_query_j == pytest.approx(0.45)
    assert (w.grade, w.scope, w.caveats, w.error, w.name) == ("C", "package", (), None, "inference")
    assert str(w) == "inference: 45 J gross, 30 J above idle in 3 s (grade C, package)"
    w.queries = 10  # it is often known afterwards only
    assert w.energy_per_query_j == pytest.approx(4.5) and recording.windows == (w,)


@pytest.mark.parametrize("filtered", ["boxcar", "exponential"])
def test_what_no_idle_costs_lies_within_the_bound_that_is_stated(filtered: str) -> None:
    """measurement.md 1.4: net energy is low by w/2T (boxcar) to w/T (exponential); padded on both sides it is right."""
    w, duration = 0.4, 10.0
    found = {}
    for sides in ("both", "before", "after"):
        machine = Machine(filtered, averaging_s=w, period_s=0.05)
        with machine.metering() as recording:
            if sides != "after":
                recording.idle(5)
            with recording.window("all") as window:
                machine.work(duration)
            if sides != "before":
                recording.idle(5)
        found[sides] = window
    assert found["both"].net_energy_j == pytest.approx(100.0, rel=2e-3) and "unpadded" not in codes(found["both"])
    bias = found["before"].net_energy_j / 100 - 1
    assert -w / duration - 2e-3 <= bias <= -w / (2 * duration) + 2e-3
    assert bias == pytest.approx(-w / duration * (0.5 if filtered == "boxcar" else 1.0), abs=2e-3)
    assert "low by 2 to 4 %" in seen(found["before"], "unpadded")
    assert "unpadded" in codes(found["after"])


def test_without_any_idle_there_is_no_net_energy() -> None:
    machine = Machine()
    with machine.metering() as recording, recording.window("all") as w:
        machine.work(3)
    assert w.energy_j == pytest.approx(45.0) and w.net_energy_j is None and w.idle_w is None
    assert seen(w, "unpadded").startswith("no idle beside the window") and w.energy_per_query_j is None


def test_a_pause_that_nobody_declared_is_idle_where_it_is_long_enough() -> None:
    machine = Machine()
    with machine.metering() as recording:
        machine.work(20)  # loading, longer ago than what is looked at
        machine.clock.sleep(12)
        with recording.window("first") as first:
            machine.work(3)
        machine.clock.sleep(0.5)
        with recording.window("second") as second:
            machine.work(3)
        machine.clock.sleep(1.5)
    assert first.net_energy_j == pytest.approx(30.0) and first.idle_w == pytest.approx(5.0) and "unpadded" in codes(first)
    assert second.net_energy_j == pytest.approx(30.0) and "low by up to 0.83 %" in seen(second, "unpadded")


def test_what_was_declared_is_the_only_idle_there() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(2)
        machine.work(5)  # setting up, after the idle: not idle, and the idle does not touch the window
        with recording.window("one") as one:
            machine.work(3)
        recording.idle(2)
        with recording.window("two") as two:
            machine.work(3)
        recording.idle(2)
    assert one.idle_w == pytest.approx(5.0) and one.net_energy_j == pytest.approx(30.0) and "unpadded" in codes(one)
    assert two.idle_w == pytest.approx(5.0) and two.net_energy_j == pytest.approx(30.0) and not two.caveats


def test_two_idles_in_one_gap_belong_to_the_windows_they_touch() -> None:
    machine = Machine()
    with machine.metering() as recording:
        for name in ("one", "two"):
            recording.idle(2)
            with recording.window(name):
                machine.work(3)
            recording.idle(2)
            machine.work(5)  # setting up the next
    assert [w.net_energy_j for w in recording.windows] == pytest.approx([30.0, 30.0])
    assert [w.caveats for w in recording.windows] == [(), ()]


def test_idle_on_both_sides_of_a_nest_is_averaged() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(3)
        with recording.window("outer"):
            machine.work(1)
            with recording.window("inner") as inner:
                machine.work(2)
            machine.work(1)
        machine.work(3)
    assert inner.idle_w == pytest.approx(10.0) and inner.net_energy_j == pytest.approx(10.0) and inner.energy_j == pytest.approx(30.0)


def test_idle_that_drifts_is_said() -> None:
    machine = Machine()
    with machine.metering() as recording:
        machine.work(3)  # somebody else computes: 15 W of "idle"
        with recording.window("all") as w:
            machine.work(4)
        recording.idle(3)
    assert "idle_drift" in codes(w) and "15 W before, 5 W after" in seen(w, "idle_drift")


def test_a_window_that_draws_less_than_idle_has_no_net_energy() -> None:
    machine = Machine()
    with machine.metering() as recording:
        machine.work(3)
        with recording.window("outer"):
            with recording.window("inner") as inner:
                machine.clock.sleep(2)
            machine.work(1)
        machine.work(3)
    assert inner.net_energy_j is None and inner.energy_j == pytest.approx(10.0) and inner.idle_w == pytest.approx(15.0)
    assert codes(inner).count("negative_energy") == 1


def test_too_short_a_window_is_not_measured() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(2)
        with recording.window("blink", queries=1) as w:
            machine.work(0.1)
        recording.idle(2)
    assert w.energy_j is None and w.energy_per_query_j is None and "few_updates" in codes(w) and "not measured gross" in str(w)


@pytest.mark.parametrize("offset_s", [0.0, 1000.0])
def test_what_is_near_a_window_is_all_that_its_energy_needs(offset_s: float) -> None:
    """The rail beside the counter has the longer memory, and its clock is another: both are looked at as far as they must be."""
    at = np.arange(0.02, 60, 0.05)
    counter = Trace("all", "energy_j", floats(at), floats(10 * at), "sim", "C", "package", 0.05)
    power = Trace("all/power", "power_w", floats(at), floats(9 + 0.001 * (at % 1)), "sim", "C", "package", 0.05, 1.0, total=False)
    traces = [dataclasses.replace(trace, offset_s=offset_s) for trace in (counter, power)]
    phases = [Phase(name, start + offset_s, stop + offset_s) for name, start, stop in PHASES]
    alone = spans.energy_between(traces, phases[1], None, None)
    assert alone.energy_j == pytest.approx(100.0) and [doubt.code for doubt in alone.caveats] == ["counter_differs", "unpadded"]
    between = spans.energy_between(traces, phases[1], phases[0], phases[2])
    whole = window_energy(traces, phases[1], phases[0], phases[2])
    assert between == whole and between.idle_w == pytest.approx(10.0)


PHASES: tuple[tuple[Any, float, float], ...] = (("idle_before", 15.0, 20.0), ("window", 20.0, 30.0), ("idle_after", 30.0, 35.0))


def test_idle_lasts_as_long_as_the_sensor_needs() -> None:
    machine = Machine("boxcar", averaging_s=0.4)
    with machine.metering() as recording:
        recording.idle()
        with recording.window("all") as w:
            machine.work(20)
        recording.idle()
    assert machine.clock.sleeps == [5.0, 5.0] and "unpadded" not in codes(w) and w.net_energy_j == pytest.approx(200, rel=2e-3)


def test_what_the_device_says_while_hot_and_what_sampling_costs_is_kept() -> None:
    machine = Machine(cores=0.02)
    with machine.metering() as recording:
        with recording.window("hot") as hot:
            machine.hot = {"throttled": "0x40"}
            machine.work(3)
        machine.hot = {}
        with recording.window("cool") as cool:
            machine.work(3)
    assert seen(hot, "throttled") == "0x40" and "throttled" not in codes(cool)
    assert seen(cool, "sampler_costly") == "2 % of a core" and [c.code for c in recording.caveats] == ["sampler_costly"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["work", "sleep", "open", "close"]), st.integers(10, 60)), min_size=1, max_size=25))
def test_any_nest_of_windows_holds_what_was_spent_in_it(events: list[tuple[str, int]]) -> None:
    machine = Machine()
    stack: list[tuple[Window, float]] = []
    done: list[tuple[Window, float, float]] = []
    with machine.metering() as recording:
        for what, ticks in [*events, *[("close", 0)] * len(events)]:
            if what == "open":
                stack.append((recording.window("w").__enter__(), machine.clock.now))
            elif what == "close" and stack:
                window, start = stack.pop()
                window.__exit__(None, None, None)
                done.append((window, start, machine.clock.now))
            elif what != "close":
                (machine.work if what == "work" and stack else machine.clock.sleep)(machine.period_s * ticks)  # outside it idles
    for window, start, stop in done:
        assert "overlapping_windows" not in codes(window)
        if stop - start > 1e-6:
            gross = machine.joules(stop) - machine.joules(start)
            net = gross - IDLE_W * (stop - start)
            assert window.energy_j == pytest.approx(gross, rel=1e-6)
            assert window.net_energy_j is None or window.net_energy_j == pytest.approx(net, rel=1e-6)
            assert window.idle_w is None or window.idle_w == pytest.approx(IDLE_W, rel=1e-6)
        else:
            assert window.energy_j is None


# ---------------------------------------------------------------- nesting and threads


def test_the_outer_window_holds_the_inner_one_and_idle_is_outside_of_both() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(2)
        with recording.window("outer") as outer:
            machine.work(1)
            machine.clock.sleep(3)  # within a window: no idle, however quiet
            with recording.window("inner") as inner:
                machine.work(2)
            assert inner.net_energy_j == pytest.approx(20.0)  # the idle before is known already
        recording.idle(2)
    assert (outer.energy_j, outer.net_energy_j) == pytest.approx((60.0, 30.0)) and not outer.caveats
    assert (inner.energy_j, inner.net_energy_j, inner.idle_w) == pytest.approx((30.0, 20.0, 5.0)) and codes(inner) == ["unpadded"]
    assert inner.within == (outer,) and [w.name for w in recording.windows] == ["outer", "inner"]


def test_windows_that_overlap_without_being_nested_say_so() -> None:
    machine = Machine()
    with machine.metering() as recording:
        first, second, third = (recording.window(name) for name in ("first", "second", "third"))
        first.__enter__()
        machine.work(1)
        second.__enter__()
        machine.work(1)
        first.__exit__(None, None, None)
        machine.work(1)
        second.__exit__(None, None, None)
        with third:
            machine.work(2)
        recording.idle(1)
    assert seen(first, "overlapping_windows") == "by second" and seen(second, "overlapping_windows") == "by first"
    assert first.energy_j == pytest.approx(30.0) and second.energy_j == pytest.approx(30.0)
    assert "overlapping_windows" not in codes(third)


def test_windows_of_several_threads() -> None:
    machine = Machine()
    with machine.metering() as recording:
        inside, go = threading.Event(), threading.Event()

        def other() -> None:
            with recording.window("other"):
                inside.set()
                go.wait(10)

        thread = threading.Thread(target=other)
        with recording.window("mine"):  # a thread that was started in a window is not in it: the two are told apart by nobody
            thread.start()
            inside.wait(10)
            machine.work(2)
            with recording.window("nested"):
                machine.work(2)
            go.set()
            thread.join()
        alone = threading.Thread(target=lambda: recording.window("alone").__enter__().__exit__(None, None, None))
        alone.start()
        alone.join()
    mine, other_window, nested, last = recording.windows
    assert [w.name for w in recording.windows] == ["mine", "other", "nested", "alone"]
    assert seen(other_window, "overlapping_windows") == "by mine (and 1 more)" and seen(mine, "overlapping_windows") == "by other"
    assert seen(nested, "overlapping_windows") == "by other" and "overlapping_windows" not in codes(last)


def test_many_threads_at_once_lose_nothing() -> None:
    machine = Machine()
    with machine.metering() as recording:

        def many() -> None:
            for _ in range(100):
                with recording.window("w"):
                    pass

        threads = [threading.Thread(target=many) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recording.idle(1)
    assert len(recording.windows) == 400 and all(w.duration_s == 0 and w.energy_j is None for w in recording.windows)


def test_asyncio_tasks_are_told_apart() -> None:
    machine = Machine()

    async def task(recording: Metering, name: str) -> None:
        with recording.window(name):
            await asyncio.sleep(0)
            machine.work(1)

    async def main(recording: Metering) -> None:
        with recording.window("all"):
            await asyncio.gather(task(recording, "a"), task(recording, "b"))

    with machine.metering() as recording:
        asyncio.run(main(recording))
    whole, a, b = recording.windows
    assert "overlapping_windows" not in codes(whole) and a.within == b.within == (whole,)
    assert seen(a, "overlapping_windows") == "by b" and seen(b, "overlapping_windows") == "by a"


def test_idle_ends_where_another_thread_opens_a_window() -> None:
    machine = Machine()
    with machine.metering() as recording:

        def sleep(seconds: float) -> None:
            machine.clock.sleep(seconds / 2)
            thread = threading.Thread(target=lambda: recording.window("early").__enter__())
            thread.start()
            thread.join()
            machine.work(seconds / 2)

        recording._sleep = sleep
        recording.idle(4)
        machine.work(2)
        recording.windows[0].__exit__(None, None, None)
    early = recording.windows[0]
    assert early.energy_j == pytest.approx(60.0) and early.idle_w == pytest.approx(5.0)


# ---------------------------------------------------------------- misuse and misfortune


def test_figures_of_a_window_that_is_not_closed() -> None:
    machine = Machine()
    with machine.metering() as recording:
        lonely = recording.window("lonely")
        with recording.window("here") as w:
            machine.work(2)
            for name in ("energy_j", "net_energy_j", "power_w", "idle_w", "duration_s", "energy_per_query_j", "grade", "scope", "caveats"):
                with pytest.raises(MeterError, match="'here' is still open: read its figures after"):
                    getattr(w, name)
            assert str(w).startswith("here: the window 'here' is still open")
        with pytest.raises(MeterError, match="'lonely' was not opened"):
            _ = lonely.energy_j
        with pytest.raises(MeterError, match="'here' was already used"), w:
            pass
    assert w.energy_j == pytest.approx(30.0)


def test_a_window_outside_of_the_meter_s_block() -> None:
    recording = Machine().metering()
    with pytest.raises(MeterError, match="has not begun"), recording.window("early"):
        pass
    with pytest.raises(MeterError, match="has not begun"):
        recording.idle(1)
    with recording:
        left = recording.window("left open").__enter__()
    with pytest.raises(MeterError, match="'late' needs a meter that records, and sim has ended"), recording.window("late"):
        pass
    with pytest.raises(MeterError, match="for one with block"), recording:
        pass
    with pytest.raises(MeterError, match="still open"):
        _ = left.energy_j
    left.__exit__(None, None, None)
    assert left.energy_j is None and [w.name for w in recording.windows] == ["left open"]


def test_idle_inside_a_window_is_none() -> None:
    machine = Machine()
    with machine.metering() as recording:
        with recording.window("w"), pytest.raises(MeterError, match="inside the window 'w'"):
            recording.idle(1)
        for seconds in (0, -1, math.nan, math.inf):
            with pytest.raises(SpecError, match="is not a time"):
                recording.idle(seconds)
        for queries in (0, -1, math.nan, math.inf):
            with pytest.raises(SpecError, match="expected a number above 0"):
                recording.window("w", queries=queries)


def test_an_exception_ends_its_window_marks_it_and_goes_on() -> None:
    machine = Machine()
    with machine.metering() as recording:
        recording.idle(2)
        with pytest.raises(ZeroDivisionError), recording.window("outer"), recording.window("inner"):
            machine.work(2)
            _ = 1 / 0
        recording.idle(2)
        with recording.window("next") as w:
            machine.work(2)
    outer, inner, _ = recording.windows
    assert outer.error == inner.error == "ZeroDivisionError: division by zero" and w.error is None and w.within == ()
    assert outer.net_energy_j == pytest.approx(20.0)


class Silent:
    """A meter that says nothing before its end."""

    def __init__(self, machine: Machine, fails: bool = False) -> None:
        self.machine, self.fails = machine, fails

    def probe(self) -> str | None:
        return None

    def start(self) -> None:
        self.machine.start()

    def stop(self) -> tuple[Trace, ...]:
        if self.fails:
            raise MeterError("the wire came off")
        return self.machine.stop()


def test_a_meter_that_cannot_be_looked_at_gives_its_figures_at_the_end() -> None:
    machine = Machine()
    with Metering(Silent(machine), "silent", clock=machine.clock, sleep=machine.clock.sleep) as recording:
        recording.idle(2)
        with recording.window("w") as w:
            machine.work(2)
        assert w.duration_s == pytest.approx(2.0)
        with pytest.raises(MeterError, match="silent gives its figures at its end only"):
            _ = w.energy_j
    assert w.energy_j == pytest.approx(30.0) and w.net_energy_j == pytest.approx(20.0)


def test_a_meter_that_fails_at_its_end() -> None:
    machine = Machine()
    broken = functools.partial(Metering, Silent(machine, fails=True), "silent", clock=machine.clock)
    with pytest.raises(MeterError, match="the wire came off"), broken() as recording, recording.window("w") as w:
        machine.work(2)
    with pytest.raises(MeterError, match="ended in an error"):
        _ = w.energy_j
    assert "ended in an error" in str(w) and len(recording.windows) == 1
    with pytest.raises(ZeroDivisionError), broken():  # the first error is the one to report
        _ = 1 / 0


def test_a_stream_that_is_a_little_late_is_waited_for() -> None:
    machine = Machine(lag_s=0.1)
    with machine.metering() as recording:
        with recording.window("w") as w:
            machine.work(2)
        assert w.energy_j == pytest.approx(30.0) and machine.looks == 3
        machine.lag_s = 100.0
        with recording.window("later") as later:
            machine.work(2)
        assert later.energy_j is None and "few_updates" in codes(later)  # for now
    assert later.energy_j == pytest.approx(30.0)


def test_idle_that_a_stream_has_not_delivered_yet_still_comes() -> None:
    machine = Machine(lag_s=1.9)
    with machine.metering() as recording:
        recording.idle(2)
        with recording.window("w") as w:
            machine.work(3)
        recording.idle(2)
        assert w.net_energy_j == pytest.approx(30.0) and "unpadded" in codes(w)  # 0.1 s of the idle has come
        machine.lag_s = 1.0
        assert w.net_energy_j == pytest.approx(30.0) and not w.caveats
        machine.lag_s, looks = 0.0, machine.looks
        assert w.idle_w == pytest.approx(5.0) and w.power_w == pytest.approx(15.0) and machine.looks == looks + 1  # now it is final


def test_no_rail_is_no_energy() -> None:
    machine = Machine()
    machine.seen = lambda until: ()  # type: ignore[method-assign]
    with machine.metering() as recording, recording.window("w") as w:
        machine.work(1)
    assert w.energy_j is None and codes(w) == ["no_meter"]


# ---------------------------------------------------------------- the decorator and CUDA


def test_every_call_of_a_measured_function_is_a_window() -> None:
    machine = Machine()
    recording = machine.metering()

    @recording.measured(queries=4)
    def answer(seconds: float, *, factor: int = 1) -> str:
        """Doc."""
        machine.work(seconds * factor)
        return "42"

    assert (answer.__name__, answer.__doc__) == ("answer", "Doc.")
    with recording:
        assert answer(1, factor=2) == "42" and answer(3) == "42"
        recording.measured("partial")(functools.partial(machine.work, 1))()
    assert [w.name for w in recording.windows] == ["answer", "answer", "partial"]
    assert [w.energy_j for w in recording.windows] == pytest.approx([30.0, 45.0, 15.0])
    assert recording.windows[0].energy_per_query_j == pytest.approx(7.5)

    async def later() -> None: ...

    def items() -> Any:
        yield 1

    for function in (later, items):
        with pytest.raises(SpecError, match="returns before its work is done"):
            recording.measured()(function)


class FakeCuda:
    """Two GPUs with queued work: synchronising takes the time that it needs."""

    def __init__(self, machine: Machine, started: bool = True) -> None:
        self.machine, self.started, self.queued, self.waited, self.error = machine, started, 0.0, list[int](), ""

    def is_initialized(self) -> bool:
        return self.started

    def device_count(self) -> int:
        return 3

    def current_device(self) -> int:
        return 0

    def memory_reserved(self, index: int) -> int:
        return 1024 if index == 2 else 0

    def synchronize(self, index: int) -> None:
        self.waited.append(index)
        queued, self.queued = self.queued, 0.0
        self.machine.work(queued)
        if self.error:
            raise RuntimeError(self.error)


def test_cuda_is_waited_for_at_both_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    cuda = FakeCuda(machine)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    with machine.metering() as recording:
        cuda.queued = 1.0  # of before the window
        with recording.window("w") as w:
            cuda.queued = 3.0
    assert w.duration_s == pytest.approx(3.0) and w.energy_j == pytest.approx(45.0) and cuda.waited == [0, 2, 0, 2]


def test_what_the_gpu_says_late_is_the_window_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    cuda = FakeCuda(machine)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    with machine.metering() as recording:
        with pytest.raises(RuntimeError, match="illegal"), recording.window("w"):
            cuda.error = "illegal address"
            machine.work(2)
        cuda.error = ""
        with recording.window("next") as after:
            machine.work(2)
    assert recording.windows[0].error == "RuntimeError: illegal address" and after.error is None and after.within == ()


@pytest.mark.parametrize("torch", [None, types.SimpleNamespace(), types.SimpleNamespace(cuda=None), "cold"])
def test_cuda_that_is_not_in_use_is_left_alone(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    cold = FakeCuda(machine, started=False)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cold) if torch == "cold" else torch)
    with machine.metering() as recording, recording.window("w") as w:
        machine.work(1)
    assert w.energy_j is not None and not cold.waited


def test_measuring_imports_no_torch() -> None:
    code = (
        "import sys; from edgejoule.measure.metering import meter\n"
        "with meter('estimate') as m, m.window('w'): pass\n"
        "assert not {'torch', 'scipy', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- opening, and for real


def test_opening() -> None:
    for nothing in ("none", "", " "):
        with pytest.raises(MeterError, match="measures nothing"):
            meter(nothing)
    with pytest.raises(UnknownNameError, match="estimate"):
        meter("estimat")
    with pytest.raises(SpecError):
        meter("estimate(core_w=-1)")


def test_auto_says_what_it_took_and_for_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(device: str) -> tuple[str, str]:
        asked.append(device)
        return "estimate", "no sensor here covers it"

    monkeypatch.setattr(metering, "choose_meter", choose)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert (meter().spelling, meter().why) == ("estimate", "no sensor here covers it")
    meter(device="cuda")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=FakeCuda(Machine())))
    with meter("auto") as recording:
        with recording.window("w") as w:
            time.sleep(0.15)
        assert seen(w, "estimate") == "no sensor here covers it" and w.grade == "D" and "(an estimate, grade D, process)" in str(w)
    assert asked == ["cpu", "cpu", "cuda", "cuda"]


def test_the_estimate_for_real() -> None:
    with meter("estimate(core_w=10.0, idle_w=2.0, period_s=0.01)") as recording:
        recording.idle(0.4)
        with recording.window("busy", queries=2) as w:
            begin = time.process_time()
            while time.process_time() - begin < 0.5:
                sum(range(1000))
        recording.idle(0.4)
        assert w.energy_j is not None and recording.caveats is not None
    net, gross, per_query = w.net_energy_j, w.energy_j, w.energy_per_query_j
    assert net is not None and gross is not None and per_query == gross / 2
    assert net == pytest.approx(5.0, rel=0.2) and gross == pytest.approx(net + (w.idle_w or 0) * w.duration_s, rel=1e-6)
    assert codes(w)[0] == "estimate" and "estimate(core_w=10.0" in seen(w, "estimate") and w.scope == "process"


def test_a_replay_says_that_it_is_one_and_only_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "power.csv"
    path.write_text("time_s,power_w\n" + "".join(f"{0.01 * i},{5 + i % 2}\n" for i in range(50)))
    with meter(f"replay(path={str(path)!r})") as recording:
        with recording.window("w") as w:
            time.sleep(0.4)
        with pytest.raises(MeterError, match="at its end only"):
            _ = w.power_w
    assert w.power_w == pytest.approx(5.5, rel=0.05) and codes(w)[0] == "replayed"


def test_a_thousand_short_windows_cost_no_more_each_than_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window looks at does not grow with the recording, nor is the recording copied for each."""
    handled: list[int] = []
    measure = spans.window_energy

    def counting(traces: Any, *phases: Any) -> Any:
        handled.append(sum(len(trace.times_s) for trace in traces))
        return measure(traces, *phases)

    monkeypatch.setattr(spans, "window_energy", counting)
    for nested in (False, True):
        machine = Machine()
        with machine.metering() as recording:
            recording.idle(2)
            outer = recording.window("outer")
            if nested:
                outer.__enter__()
            for _ in range(1000):
                with recording.window("short") as w:
                    machine.work(0.5)
                assert w.duration_s == pytest.approx(0.5)
            if nested:
                outer.__exit__(None, None, None)
            recording.idle(2)
        handled.clear()
        inner = [w for w in recording.windows if w.name == "short"]
        assert [w.energy_j for w in inner] == pytest.approx([7.5] * 1000)
        assert machine.looks == 0 and len(machine.stop()[0].times_s) > 10_000
        assert max(handled) < 200 and len(handled) <= 2000
        handled.clear()
        assert all(w.power_w and w.caveats is not None and w.grade == "C" for w in inner) and not handled  # worked out once


def test_windows_that_are_read_while_it_records_are_looked_at_once_each() -> None:
    machine = Machine()
    with machine.metering() as recording:
        for _ in range(50):
            with recording.window("short"):
                machine.work(0.5)
        first = [w.energy_j for w in recording.windows[:-1]]
        assert machine.looks == 1  # one look covers them all
        again = [w.energy_j for w in recording.windows[:-1]]
        assert machine.looks == 1 and first == again == pytest.approx([7.5] * 49)
