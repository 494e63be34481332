"""Measuring anybody's code: ``with edgejoule.meter() as meter:`` around it all, ``with meter.window("inference"):`` around a part.

One meter records from the outer block's begin to its end; windows are only pairs of instants, and every figure is worked out
when it is read. Energy above idle needs idle, and the only idle there is is the time outside of all windows: really idle
there, best by ``meter.idle()`` right before and right after a window. Knows no models, no repeats and no store; never imports torch.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from edgejoule import registry
from edgejoule.caveats import Doubts, caveat
from edgejoule.errors import EdgejouleError, MeterError, SpecError
from edgejoule.measure.cuda import synchronise, torch_cuda
from edgejoule.measure.energy import PAD, Energy
from edgejoule.measure.meters import NONE, choose_meter, open_meter
from edgejoule.measure.spans import LEAST_IDLE_S, Gap, Stretch, energy_between, idle_after, idle_before
from edgejoule.records import Caveat, Grade, Phase, Trace
from edgejoule.seams import Meter

COSTLY = 0.01  # of a core, spent on sampling
LATE = 4  # looks, a period apart, at a sensor that streams: its samples come a little after the window that they cover

Call = TypeVar("Call", bound=Callable[..., Any])
_WITHIN: ContextVar[tuple[Window, ...]] = ContextVar("edgejoule_windows", default=())  # those that this thread or task is in


def meter(spelling: str = "auto", device: str | None = None) -> Metering:
    """A meter for one ``with`` block: ``auto`` takes the best that works here and covers ``device``, else any meter's spelling.

    Without a ``device`` that is ``cuda`` where torch uses it already, else ``cpu``. Where no sensor covers it, ``auto`` is an
    estimate, grade D, and every figure says so. Raises MeterError for ``none``, SpecError or UnknownNameError for what names no meter.
    """
    why = ""
    if spelling == "auto":
        spelling, why = choose_meter(device or ("cuda" if torch_cuda() is not None else "cpu"))
    opened = open_meter(spelling)
    if opened is None:
        raise MeterError(f"the meter {spelling or NONE!r} measures nothing: name one, or auto (edgejoule doctor lists what works here)")
    return Metering(opened, registry.canonical(spelling), why)


@dataclass(frozen=True, slots=True)
class _Figures:
    energy: Energy
    grade: Grade
    scope: str
    caveats: tuple[Caveat, ...]
    final: bool  # no more idle can come to the window


class Metering:
    """What ``edgejoule.meter`` gives. ``meter`` records on ``clock``; ``spelling`` and ``why`` say which it is and why it was chosen.

    Windows may be nested, in one thread or one asyncio task: the outer one holds the inner one's energy, and the idle of both lies
    outside of the outer one. Windows may be opened in any thread; where two of them overlap without being nested, both carry the
    caveat ``overlapping_windows``, because no sensor tells them apart. Names may repeat; ``windows`` lists all, in order of opening.
    """

    def __init__(
        self,
        meter: Meter,
        spelling: str,
        why: str = "",
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.spelling = spelling
        self.why = why
        self._meter: Any = meter
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()  # around windows and gaps
        self._reading = threading.Lock()  # around the traces, taken first: a look at the sensor must not hold up another thread's window
        self._state = "new"  # then recording, then ended
        self._windows: list[Window] = []
        self._open: list[Window] = []
        self._gap = Gap(0.0)
        self._stretch: Stretch | None = None
        self._traces: tuple[Trace, ...] = ()
        self._seen_s = -math.inf  # the traces at hand cover all before

    def __enter__(self) -> Metering:
        """Start recording. Raises MeterError where the sensor cannot be read, or where this meter was used before."""
        if self._state != "new":
            raise MeterError(f"the meter {self.spelling} was already used: a meter is for one with block, open another")
        self._meter.start()
        self._state, self._gap = "recording", Gap(self._clock())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._reading:
            with self._lock:
                self._state = "ended"
                if not self._open:
                    self._gap.stop_s = self._clock()
            try:
                self._traces = self._meter.stop()
                self._seen_s = math.inf
            except EdgejouleError:
                if error is None:  # the first error is the one to report
                    raise

    def window(self, name: str, queries: float | None = None) -> Window:
        """A context manager around a part of your code that answers ``queries`` queries (images, requests), where that has a meaning."""
        return Window(self, name, queries)

    def idle(self, seconds: float | None = None) -> None:
        """Sleep, and count that as idle; without ``seconds`` as long as this sensor needs (twice its memory and one second).

        Where it was called between two windows only what it slept counts as idle there, and nothing else of that time.
        Raises MeterError while a window is open.
        """
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise SpecError(f"idle({seconds:g}) is not a time: expected seconds above 0")
        synchronise()
        with self._lock:
            self._check_recording("idle()")
            if self._open:
                raise MeterError(f"idle() inside the window {self._open[0].name!r}: idle lies outside of all windows, end them first")
            gap, start = self._gap, self._clock()
        try:
            self._sleep(LEAST_IDLE_S + 2 * self._memory_s() if seconds is None else seconds)
        finally:
            with self._lock:
                stop = self._clock() if gap.stop_s is None else gap.stop_s  # a window of another thread may have ended it
                if stop > start:
                    gap.idles.append((start, stop))

    def measured(self, name: str = "", queries: float | None = None) -> Callable[[Call], Call]:
        """A decorator: every call of the function is a window, named like the function unless ``name`` says otherwise."""

        def decorate(function: Call) -> Call:
            called = name or getattr(function, "__name__", "call")
            if any(ask(function) for ask in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
                raise SpecError(f"{called} returns before its work is done: put a with meter.window(...) inside it instead")

            @functools.wraps(function)
            def call(*args: Any, **named: Any) -> Any:
                with self.window(called, queries):
                    return function(*args, **named)

            return call  # type: ignore[return-value]

        return decorate

    @property
    def windows(self) -> tuple[Window, ...]:
        """All windows so far, open ones included, in order of opening."""
        return tuple(self._windows)

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        """Doubts about the recording as a whole: reads that failed, and what sampling costs."""
        return tuple(getattr(self._meter, "caveats", ())) + self._cost()

    def _cost(self) -> tuple[Caveat, ...]:
        cores = getattr(self._meter, "cores", None)
        return (caveat("sampler_costly", f"{100 * cores:.2g} % of a core"),) if cores is not None and cores > COSTLY else ()

    def _memory_s(self) -> float:
        return PAD * max(0.0, float(getattr(self._meter, "averaging_s", 0.0)))

    def _check_recording(self, what: str) -> None:
        if self._state != "recording":
            state = "has not begun" if self._state == "new" else "has ended"
            raise MeterError(f"{what} needs a meter that records, and {self.spelling} {state}: use it inside the meter's with block")

    def _begin(self, window: Window) -> tuple[float, Stretch]:
        with self._lock:
            self._check_recording(f"the window {window.name!r}")
            now = self._clock()
            if self._stretch is None:
                self._gap.stop_s = now
                self._stretch = Stretch(self._gap)
            for other in self._open:
                if other not in window.within:
                    window._overlaps(other)
                    other._overlaps(window)
            self._windows.append(window)
            self._open.append(window)
            return now, self._stretch

    def _end(self, window: Window) -> float:
        with self._lock:
            now = self._clock()
            self._open.remove(window)
            for other in self._open:
                if window in other.within:
                    window._overlaps(other)
                    other._overlaps(window)
            if not self._open and self._stretch is not None:
                self._gap = Gap(now, now if self._state == "ended" else None)
                self._stretch.after, self._stretch = self._gap, None
            return now

    def _said(self) -> dict[str, str]:
        """What the device says of itself while it is hot; a sensor that cannot say raises no doubt."""
        ask = getattr(self._meter, "doubts", None)
        with suppress(EdgejouleError):
            return dict(ask()) if callable(ask) else {}
        return {}

    def _recorded(self, stop_s: float, until_s: float) -> tuple[tuple[Trace, ...], float]:
        """The traces and what they cover: all before ``until_s`` where they can, and a window that ends at ``stop_s``."""
        with self._reading:
            if self._state == "ended" and self._seen_s < math.inf:
                raise MeterError(f"the meter {self.spelling} ended in an error, so there are no figures: check it with edgejoule doctor")
            if self._seen_s < until_s:
                look = getattr(self._meter, "snapshot", None)
                if not callable(look):
                    raise MeterError(f"the meter {self.spelling} gives its figures at its end only: read them after its with block")
                for _ in range(LATE):
                    self._traces = look()
                    totals = [trace for trace in self._traces if trace.total and trace.times_s]
                    self._seen_s = min([trace.times_s[-1] + trace.offset_s for trace in totals], default=-math.inf)
                    if self._seen_s >= stop_s or not totals:
                        break
                    self._sleep(max(trace.period_s for trace in totals))
            return self._traces, self._seen_s

    def _figures(self, window: Window, start_s: float, stop_s: float, stretch: Stretch) -> _Figures:
        with self._lock:
            first = stretch.before.copy()
            last = None if stretch.after is None else stretch.after.copy()
        settled = math.inf if last is None else max(stop_s, last.settled_s)
        traces, seen = self._recorded(stop_s, settled)
        totals = [trace for trace in traces if trace.total]
        memory = max([PAD * trace.averaging_s for trace in totals], default=0.0)
        before = idle_before(first, memory)
        after = None if last is None else idle_after(last, min(seen, self._clock()), memory)
        energy = energy_between(traces, Phase("window", start_s, stop_s), before, after)
        grade: Grade = max([trace.grade for trace in totals], default="D")
        labels = [caveat(*_model(self.spelling, self.why))] if totals and grade == "D" else []
        return _Figures(
            energy=energy,
            grade=grade,
            scope="+".join(sorted({trace.scope for trace in totals})),
            caveats=(*labels, *energy.caveats, *window._found.caveats(), *self._cost()),
            final=seen >= settled,
        )


class Window:
    """What ``meter.window`` gives: a part of the run. Its figures are worked out when they are read, once it is closed.

    Inside the meter's block ``net_energy_j`` and ``idle_w`` may still get better as more idle follows; after it they are final. What
    could not be measured is None, and ``caveats`` say why. An exception ends the window, leaves its text in ``error``, and goes on.
    CUDA is synchronised at both ends where torch uses it already; other accelerators are yours to wait for.
    Raises MeterError for figures of a window that was not closed, and where one is used twice or outside of the meter's block.
    """

    def __init__(self, metering: Metering, name: str, queries: float | None) -> None:
        self.name = name
        self.error: str | None = None
        self.within: tuple[Window, ...] = ()  # the windows around this one
        self._metering = metering
        self._queries: float | None = None
        self.queries = queries
        self._start_s: float | None = None
        self._stop_s: float | None = None
        self._stretch: Stretch | None = None
        self._found = Doubts()
        self._final: _Figures | None = None

    def __enter__(self) -> Window:
        if self._start_s is not None:
            raise MeterError(f"the window {self.name!r} was already used: open another one, names may repeat")
        self.within = _WITHIN.get()
        synchronise()
        self._start_s, self._stretch = self._metering._begin(self)
        _WITHIN.set((*self.within, self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            synchronise()
        except BaseException as late:  # what the GPU only says now: the window's own error, as one that came at once
            error = error or late
            raise
        finally:
            stop = self._metering._end(self)
            _WITHIN.set(tuple(window for window in _WITHIN.get() if window is not self))
            if error is not None:
                self.error = f"{type(error).__name__}: {error}"
            for code, seen in self._metering._said().items():
                self._found.add(code, seen)
            self._stop_s = stop  # last: whoever sees it may read all the rest

    def __str__(self) -> str:
        """One line; an estimate is called one."""
        try:
            joules, net, grade, scope = self.energy_j, self.net_energy_j, self.grade, self.scope
        except EdgejouleError as error:
            return f"{self.name}: {error}"
        figures = [f"{'not measured' if v is None else f'{v:.4g} J'} {what}" for v, what in ((joules, "gross"), (net, "above idle"))]
        label = "an estimate, grade D" if grade == "D" else f"grade {grade}"
        return f"{self.name}: {', '.join(figures)} in {self.duration_s:.4g} s ({label}, {scope})"

    @property
    def queries(self) -> float | None:
        """How many queries the window answered; may be set until the figure is read. Raises SpecError unless above 0."""
        return self._queries

    @queries.setter
    def queries(self, number: float | None) -> None:
        if number is not None and not (math.isfinite(number) and number > 0):
            raise SpecError(f"queries={number} in the window {self.name!r}: expected a number above 0")
        self._queries = number

    @property
    def duration_s(self) -> float:
        return self._edges()[1] - self._edges()[0]

    @property
    def energy_j(self) -> float | None:
        """Gross: all that the sensor saw."""
        return self._figures().energy.energy_j

    @property
    def net_energy_j(self) -> float | None:
        """Above the idle around the window; None without any. Caveat ``unpadded``: there was not enough of it on both sides."""
        return self._figures().energy.net_energy_j

    @property
    def power_w(self) -> float | None:
        """Mean, gross."""
        return self._figures().energy.power_w

    @property
    def idle_w(self) -> float | None:
        return self._figures().energy.idle_w

    @property
    def energy_per_query_j(self) -> float | None:
        """Gross; None where the window does not know its ``queries``."""
        joules = self.energy_j
        return None if joules is None or self._queries is None else joules / self._queries

    @property
    def grade(self) -> Grade:
        """A calibrated analyser … D a model: an estimate."""
        return self._figures().grade

    @property
    def scope(self) -> str:
        """What the sensor sees: package, gpu, module-in, process, …"""
        return self._figures().scope

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        return self._figures().caveats

    def _overlaps(self, other: Window) -> None:
        """Another one ran at the same time, not around this one nor inside it."""
        self._found.add("overlapping_windows", f"by {other.name}")

    def _edges(self) -> tuple[float, float]:
        if self._start_s is None or self._stop_s is None:
            state = "was not opened" if self._start_s is None else "is still open"
            raise MeterError(f"the window {self.name!r} {state}: read its figures after its with block")
        return self._start_s, self._stop_s

    def _figures(self) -> _Figures:
        if self._final is not None:
            return self._final
        start, stop = self._edges()
        assert self._stretch is not None
        figures = self._metering._figures(self, start, stop, self._stretch)
        self._final = figures if figures.final else None
        return figures


def _model(spelling: str, why: str) -> tuple[str, str]:
    """What to say of a figure of grade D: (caveat code, what was seen)."""
    return ("replayed", spelling) if spelling.partition("(")[0] == "replay" else ("estimate", why or spelling)
