"""One place that turns any Sensor into a Meter: a thread that reads it at its period and keeps every raw sample.

Stamps are on the process's monotonic clock (``time.perf_counter``), halfway between before and after the read. A read that
fails now and then leaves a hole that the energy's checks can see; it is counted, never replaced by a value. Knows neither
windows nor energy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.records import Caveat, Trace, floats
from edgejoule.seams import Sensor


class PolledMeter:
    """Records one Sensor from ``start()`` to ``stop()``; one use each. ``spelling`` is the sensor's canonical spelling.

    An optional method ``total(rail) -> bool`` of the sensor says which rails add up to the whole (all, where it has none), an
    optional ``doubts() -> {caveat code: what was seen}`` what the device says of itself (throttling, power caps).
    """

    def __init__(self, sensor: Sensor, spelling: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sensor = sensor
        self._spelling = spelling
        self._clock = clock
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._times: dict[str, list[float]] = {}
        self._values: dict[str, list[float]] = {}
        self._reads = 0
        self._failed = 0
        self._reason = ""
        self._bug: BaseException | None = None

    @property
    def averaging_s(self) -> float:
        """The sensor's own averaging or update time, in seconds."""
        return self._sensor.averaging_s

    @property
    def period_s(self) -> float:
        return self._sensor.period_s

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        """Doubts about the recording, after ``stop()``: how many reads failed, and the last reason."""
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
        self._thread = threading.Thread(target=self._run, name=f"meter {self._spelling}", daemon=True)
        self._thread.start()

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
        return tuple(self._trace(rail) for rail in self._times)

    def _run(self) -> None:
        period_s = self._sensor.period_s
        due = self._clock() + period_s
        try:
            while not self._halt.wait(max(0.0, due - self._clock())):
                self._sample()
                # A late read skips the beats it missed: catching up would read the sensor in bursts.
                due = max(due + period_s, self._clock())
        except BaseException as error:  # carried to stop(): a thread's death must not look like a short trace
            self._bug = error

    def _sample(self) -> bool:
        self._reads += 1
        before = self._clock()
        try:
            values = self._sensor.read()
        except MeterError as error:
            self._failed += 1
            self._reason = str(error)
            return False
        stamp = (before + self._clock()) / 2
        for rail, value in values.items():
            self._times.setdefault(rail, []).append(stamp)
            self._values.setdefault(rail, []).append(value)
        return True

    def _trace(self, rail: str) -> Trace:
        sensor = self._sensor
        total = getattr(sensor, "total", None)
        return Trace(
            rail=rail,
            quantity=sensor.quantity,
            times_s=floats(self._times[rail]),
            values=floats(self._values[rail]),
            source=self._spelling,
            grade=sensor.grade,
            scope=sensor.scope,
            period_s=sensor.period_s,
            averaging_s=sensor.averaging_s,
            total=bool(total(rail)) if callable(total) else True,
        )
