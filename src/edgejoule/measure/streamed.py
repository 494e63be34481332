"""One place that turns a program that prints samples (tegrastats, perf, powermetrics, adb) into a Meter.

Lines are stamped as they arrive, on the process's monotonic clock: the dates that such programs print are local time, mostly of
one second's resolution. A line without an end is never read: it may be cut. The child runs in a session of its own and is ended
with everything it started, at ``stop()``, when the meter is forgotten and when the interpreter exits; where this process is
killed, its next line ends it (SIGPIPE). Knows neither windows nor energy, and no program by name.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.child import Child
from edgejoule.records import Caveat, Trace, floats
from edgejoule.seams import Streamer

FIRST_S, FIRST_PERIODS = 5.0, 20.0  # how long a child may take until its first sample
LAST_S, LAST_PERIODS = 1.0, 5.0  # how long stop() waits for the sample that covers its own instant
COARSE = 0.01  # of all samples may arrive together with another


class StreamedMeter:
    """Records one Streamer from ``start()`` to ``stop()``; one use each. ``spelling`` is the leaf's canonical spelling."""

    is_program = True  # its CPU time is not this process's

    def __init__(self, leaf: Streamer, spelling: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._leaf = leaf
        self._spelling = spelling
        self._clock = clock
        self._samples = _Samples()
        self._child: Child | None = None
        self._stopped_s: float | None = None

    @property
    def averaging_s(self) -> float:
        """The instrument's own averaging or update time, in seconds."""
        return self._leaf.averaging_s

    @property
    def period_s(self) -> float:
        return self._leaf.period_s

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        """Doubts about the recording, after ``stop()``: a child that ended or fell silent, samples that came together."""
        held, found = self._samples, list[Caveat]()
        if self._child is not None and self._child.ended_early:
            found.append(caveat("trace_gap", f"after {held.count} samples {self._child.fate()}"))
        elif self._stopped_s is not None and held.last_s is not None and held.last_s < self._stopped_s:
            found.append(caveat("trace_gap", f"the last of {held.count} samples came {self._stopped_s - held.last_s:.3g} s before the end"))
        if held.together > COARSE * held.count:
            found.append(caveat("stamps_coarse", f"{held.together} of {held.count} samples arrived together with another"))
        return tuple(found)

    @property
    def cores(self) -> float | None:
        """CPU seconds per second, since the first sample, of the child and the thread that reads it; None where nobody knows."""
        return None if self._child is None else self._child.cores

    def probe(self) -> str | None:
        return self._leaf.probe()

    def doubts(self) -> Mapping[str, str]:
        """What the device says of itself now: {caveat code: what was seen}; empty where the leaf knows nothing."""
        ask = getattr(self._leaf, "doubts", None)
        return dict(ask()) if callable(ask) else {}

    def start(self) -> None:
        """Start the child and wait for its first sample, at most 5 s or 20 periods, so that one that says nothing is known at once.

        Raises MeterError with what the child said where none came, or where the meter was already used.
        """
        if self._child is not None:
            raise MeterError(f"the meter {self._spelling} was already started: a meter is for one use, open it again")
        parse, samples = self._leaf.parser(), self._samples
        cap_s = max(FIRST_S, FIRST_PERIODS * self._leaf.period_s)
        try:
            child = Child(self._leaf.argv(), lambda lines, at: samples.add(parse, lines, at), self._clock, _on_terminal(self._leaf))
        except MeterError as error:
            raise MeterError(f"the meter {self._spelling} could not be read: {error}") from error
        self._child = child
        weakref.finalize(self, child.close)
        try:
            child.wait(lambda: samples.count > 0, cap_s)
        except BaseException:
            child.close()
            raise
        if not samples.count:
            child.close()
            child.raise_bug()
            raise MeterError(f"the meter {self._spelling} could not be read: {child.fate(samples.nothing(cap_s))}")
        child.begin_accounts()

    def stop(self) -> tuple[Trace, ...]:
        """One trace per rail, the child ended. Raises MeterError where no sample came after the first, or it was never started."""
        child, samples = self._child, self._samples
        if child is None:
            raise MeterError(f"the meter {self._spelling} was stopped before it was started: call start() first")
        if self._stopped_s is None:
            now = self._clock()
            try:  # one more sample, so that the trace covers all that came before stop()
                child.wait(lambda: (samples.last_s or now) > now, max(LAST_S, LAST_PERIODS * self._leaf.period_s))
            finally:
                child.close()
            self._stopped_s = now
        child.raise_bug()
        if samples.count < 2:
            raise MeterError(f"the meter {self._spelling} stopped answering: {child.fate('printed no sample after its first')}")
        return self.snapshot()

    def snapshot(self) -> tuple[Trace, ...]:
        """One trace per rail of what was recorded so far; the recording goes on. For any thread; after ``stop()`` what that gave.

        Raises MeterError where the meter was never started.
        """
        if self._child is None:
            raise MeterError(f"the meter {self._spelling} has recorded nothing yet: call start() first")
        self._child.raise_bug()
        return tuple(self._trace(rail, times, values) for rail, (times, values) in self._samples.copy().items())

    def _trace(self, rail: str, times: Sequence[float], values: Sequence[float]) -> Trace:
        leaf = self._leaf
        total = getattr(leaf, "total", None)
        return Trace(
            rail=rail,
            quantity=leaf.quantity,
            times_s=floats(times),
            values=floats(values),
            source=self._spelling,
            grade=leaf.grade,
            scope=leaf.scope,
            period_s=leaf.period_s,
            averaging_s=leaf.averaging_s,
            offset_uncertainty_s=float(getattr(leaf, "stamp_uncertainty_s", 0.0)),
            total=bool(total(rail)) if callable(total) else True,
            systematic=float(getattr(leaf, "systematic", 0.0)),
        )


def probe_stream(leaf: Streamer) -> str | None:
    """None where the leaf's command prints a sample here, else one sentence: for a leaf's ``probe()``. Takes as long as ``start()``."""
    parse, samples = leaf.parser(), _Samples()
    cap_s = max(FIRST_S, FIRST_PERIODS * leaf.period_s)
    try:
        child = Child(leaf.argv(), lambda lines, at: samples.add(parse, lines, at), time.perf_counter, _on_terminal(leaf))
    except MeterError as error:
        return str(error)
    with contextlib.closing(child):
        child.wait(lambda: samples.count > 0, cap_s)
    child.raise_bug()
    return None if samples.count else child.fate(samples.nothing(cap_s))


def _on_terminal(leaf: Streamer) -> bool:
    return bool(getattr(leaf, "terminal", False)) and os.name == "posix"


class _Samples:
    """What has come so far: written by the reading thread, copied by the meter's."""

    def __init__(self) -> None:
        self.count = 0
        self.together = 0  # samples that arrived with a later one in the same breath
        self.last_s: float | None = None
        self._line = ""
        self._rails: dict[str, tuple[list[float], list[float]]] = {}

    def add(self, parse: Callable[[str], Mapping[str, float] | None], lines: Sequence[str], at_s: float) -> None:
        """Samples of lines that arrived together at ``at_s``: their times are spread evenly since the sample before."""
        found = [sample for sample in map(parse, lines) if sample]
        self._line = next((line for line in reversed(lines) if line.strip()), self._line)
        if not found or (self.last_s is not None and at_s <= self.last_s):
            return
        if self.last_s is None:
            found = found[-1:]
        self.together += len(found) - 1
        since = at_s if self.last_s is None else self.last_s
        for n, sample in enumerate(found, 1):
            stamp = since + (at_s - since) * n / len(found)
            for rail, value in sample.items():
                if not math.isfinite(value):
                    continue
                times, values = self._rails.setdefault(rail, ([], []))
                times.append(stamp)
                values.append(value)
        self.last_s = at_s
        self.count += len(found)

    def nothing(self, seconds: float) -> str:
        """In words: that no sample came, and what came instead."""
        return f"printed no sample in {seconds:g} s" + (f", its last line was {self._line.strip()[:80]!r}" if self._line else "")

    def copy(self) -> dict[str, tuple[list[float], list[float]]]:
        """The rails with as many times as values, though the reading thread may be between the two."""
        held = dict(self._rails)
        sizes = {rail: len(values) for rail, (_, values) in held.items()}
        return {rail: (times[: sizes[rail]], values[: sizes[rail]]) for rail, (times, values) in held.items() if sizes[rail]}
