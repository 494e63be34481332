"""One place that turns any Sensor into a Meter: a thread that reads it at its period and keeps every raw sample.

Stamps are on the process's monotonic clock (``time.perf_counter``), halfway between before and after the read. A read that
fails now and then leaves a hole that the energy's checks can see; it is counted, never replaced by a value. Knows neither
windows nor energy.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.records import Caveat, Floats, Trace, floats
from edgejoule.seams import Sensor


@dataclass(slots=True)
class _Kept:
    """One sensor's samples so far: {rail: (times in seconds, values in SI)}, 16 bytes a sample."""

    sensor: Sensor
    beside: bool = False  # recorded to be compared with, and never part of the total
    rails: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)

    def take(self, clock: Callable[[], float]) -> None:
        """Read once. Raises MeterError, and then keeps nothing."""
        before = clock()
        values = {rail: float(value) for rail, value in self.sensor.read().items()}
        stamp = (before + clock()) / 2
        for rail, value in values.items():
            if not math.isfinite(value):
                raise MeterError(f"the rail {rail} read {value}: expected a finite number")
        for rail, value in values.items():
            times, kept = self.rails.setdefault(rail, (floats(), floats()))
            if not times or stamp > times[-1]:  # two reads within one tick of a coarse clock are one sample
                times.append(stamp)
                kept.append(value)

    def traces(self, source: str) -> tuple[Trace, ...]:
        """A trace per rail, of copies: an array that numpy looks into cannot grow."""
        sensor: Any = self.sensor
        total = getattr(sensor, "total", None)
        return tuple(
            Trace(
                rail=rail,
                quantity=sensor.quantity,
                times_s=times[:],
                values=values[:],
                source=source,
                grade=sensor.grade,
                scope=sensor.scope,
                period_s=sensor.period_s,
                averaging_s=sensor.averaging_s,
                offset_uncertainty_s=float(getattr(sensor, "stamp_uncertainty_s", 0.0)),
                total=not self.beside and (bool(total(rail)) if callable(total) else True),
                systematic=float(getattr(sensor, "systematic", 0.0)),
            )
            for rail, (times, values) in self.rails.items()
        )


class PolledMeter:
    """Records one Sensor from ``start()`` to ``stop()``; one use each. ``spelling`` is the sensor's canonical spelling.

    What a sensor may have besides: ``total(rail) -> bool`` says which rails add up to the whole (all, where it has none);
    ``doubts() -> {caveat code: what was seen}`` what the device says of itself (throttling, power caps); ``beside() -> Sensor | None``
    a second sensor of the same thing, read along at the same beat and recorded with ``total=False``; ``systematic`` its relative
    error by its own word; ``stamp_uncertainty_s`` by how much a reading may be older or newer than its stamp.
    """

    def __init__(self, sensor: Sensor, spelling: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sensor = sensor
        self._spelling = spelling
        self._clock = clock
        self._kept = [_Kept(sensor)]
        self._lock = threading.Lock()  # around every read: sensors keep counts, and stamps must increase
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._reads = 0
        self._failed = 0
        self._reason = ""
        self._bug: BaseException | None = None
        self._cores: float | None = None

    @property
    def averaging_s(self) -> float:
        """The sensor's own averaging or update time, in seconds."""
        return self._sensor.averaging_s

    @property
    def period_s(self) -> float:
        return self._sensor.period_s

    @property
    def stamp_uncertainty_s(self) -> float:
        """By how much a reading may be older or newer than its stamp."""
        return float(getattr(self._sensor, "stamp_uncertainty_s", 0.0))

    @property
    def cores(self) -> float | None:
        """CPU seconds of the reading thread per second, up to its last read; None until it has read. Valid during and after."""
        return self._cores

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        """Doubts about the recording so far: how many reads failed, and the last reason."""
        if not self._failed:
            return ()
        return (caveat("trace_gap", f"{self._failed} of {self._reads} reads failed, the last one because {self._reason}"),)

    def probe(self) -> str | None:
        return self._sensor.probe()

    def doubts(self) -> Mapping[str, str]:
        """What the device says of itself now: {caveat code: what was seen}; empty where the sensor knows nothing."""
        ask = getattr(self._sensor, "doubts", None)
        return dict(ask()) if callable(ask) else {}

    def start(self) -> None:
        """Read once, so that a sensor that cannot be read is known at once, then go on in a thread.

        Raises MeterError where even the second try fails, or where the meter was already used.
        """
        if self._thread is not None:
            raise MeterError(f"the meter {self._spelling} was already started: a meter is for one use, open it again")
        if not self._sample() and not self._sample():
            raise MeterError(f"the meter {self._spelling} could not be read: {self._reason}")
        beside = getattr(self._sensor, "beside", None)
        if callable(beside) and (second := beside()) is not None:
            self._kept.append(_Kept(second, beside=True))
        self._thread = threading.Thread(target=self._run, name=f"meter {self._spelling}", daemon=True)
        self._thread.start()

    def snapshot(self) -> tuple[Trace, ...]:
        """All that was recorded so far and one fresh sample; the recording goes on. For any thread; after ``stop()`` what that gave.

        Raises MeterError where the meter was never started.
        """
        if self._thread is None:
            raise MeterError(f"the meter {self._spelling} has recorded nothing yet: call start() first")
        if not self._halt.is_set():
            self._sample()
        if self._bug is not None:
            raise self._bug
        return self._traces()

    def stop(self) -> tuple[Trace, ...]:
        """One trace per rail. Raises MeterError where the sensor stopped answering altogether, or was never started."""
        if self._thread is None:
            raise MeterError(f"the meter {self._spelling} was stopped before it was started: call start() first")
        self._halt.set()
        self._thread.join()
        if self._bug is not None:
            raise self._bug
        last = self._sample()  # so that the trace covers all that came before stop()
        if not last and self._failed >= self._reads - 1:
            raise MeterError(f"the meter {self._spelling} stopped answering: {self._reason}")
        return self._traces()

    def _traces(self) -> tuple[Trace, ...]:
        with self._lock:
            return tuple(trace for kept in self._kept for trace in kept.traces(self._spelling))

    def _run(self) -> None:
        period_s = self._sensor.period_s
        begin, spent = self._clock(), time.thread_time()
        due = begin + period_s
        try:
            while not self._halt.wait(max(0.0, due - self._clock())):
                self._sample()
                now = self._clock()
                self._cores = (time.thread_time() - spent) / max(now - begin, 1e-9)
                # A late read skips the beats it missed: catching up would read the sensor in bursts.
                due = max(due + period_s, now)
        except BaseException as error:  # carried to stop(): a thread's death must not look like a short trace
            self._bug = error

    def _sample(self) -> bool:
        """Read the sensor, and the one beside it, which may fail without a word: its own trace shows the hole."""
        with self._lock:
            self._reads += 1
            done = True
            for kept in self._kept:
                try:
                    kept.take(self._clock)
                except MeterError as error:
                    if not kept.beside:
                        self._failed, self._reason, done = self._failed + 1, str(error), False
            return done
