"""What is watched beside the power while a window runs: clocks four times a second and temperatures once, in one thread.

The clock is the fastest core's, as /sys shows it; a board whose firmware throttles unseen (Raspberry Pi) goes on showing the clock
that was asked for. The temperature is the hottest zone's. Of a GPU, clock and temperature come from NVML, and only if asked for.
What the machine does not show gives no series. Reading costs: on the power that is being measured (``cores`` says how much), and
on some kernels it wakes the cores that it asks about. Judges nothing. Standard library only; NVML if asked for.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgejoule.measure.gpu import clock_doubts, clock_reasons, first_visible
from edgejoule.measure.temperature import hottest_c
from edgejoule.records import Series, floats

SYSTEM = Path("/")
PERIOD_S = 0.25
SLOW = 4  # temperatures are read at every fourth look: they move slowly, and a zone may take its chip a millisecond to answer
REASONS = "gpu_reasons"
SM_CLOCK, GPU_SENSOR = 1, 0  # NVML_CLOCK_SM, NVML_TEMPERATURE_GPU

Reading = Callable[[], float | None]


class Watch:
    """Reads clocks every ``period_s``, temperatures every fourth time, from ``start()`` to ``stop()``; one use each. Raises nothing.

    ``root`` is where /sys lies, ``clock`` the trial's own, ``gpu`` whether the first GPU that CUDA sees is watched too.
    """

    def __init__(
        self,
        root: Path = SYSTEM,
        clock: Callable[[], float] = time.perf_counter,
        gpu: bool = False,
        period_s: float = PERIOD_S,
    ) -> None:
        self._clock, self._period_s = clock, period_s
        self._watched = _readings(root, gpu)
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._times: dict[str, list[float]] = {}
        self._values: dict[str, list[float]] = {}
        self._looks = 0
        self._spent_s = self._lasted_s = 0.0

    @property
    def cores(self) -> float:
        """CPU seconds that watching took, per second, after ``stop()``: 0.01 is one hundredth of a core."""
        return self._spent_s / self._lasted_s if self._lasted_s > 0 else 0.0

    def start(self) -> None:
        """Look once, then go on in a thread; neither, where the machine shows nothing."""
        if self._watched and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def stop(self) -> tuple[Series, ...]:
        """One series for all that was seen at least once: clock, temperature, gpu_clock, gpu_reasons, gpu_temperature, in this order."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
        return tuple(
            Series(name, unit, floats(self._times[name]), floats(self._values[name]))
            for name, (unit, _) in self._watched.items()
            if name in self._times
        )

    def _run(self) -> None:
        began, began_cpu = time.perf_counter(), time.thread_time()
        while True:
            self._look()
            if self._halt.wait(self._period_s):
                break
        self._spent_s = time.thread_time() - began_cpu
        self._lasted_s = time.perf_counter() - began

    def _look(self) -> None:
        slow = self._looks % SLOW == 0
        self._looks += 1
        for name, (unit, read) in self._watched.items():
            if unit == "C" and not slow:
                continue
            before = self._clock()
            value = read()
            if value is not None:
                self._times.setdefault(name, []).append((before + self._clock()) / 2)
                self._values.setdefault(name, []).append(value)


def open_gpu() -> tuple[Any, Any] | None:
    """(NVML, handle of the first GPU that CUDA sees); None where there is no GPU, driver or package."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml, first_visible(nvml)
    except Exception:  # NVMLError stands in a module that may be missing; whatever it is, there is no GPU to watch
        return None


def _readings(root: Path, gpu: bool) -> dict[str, tuple[str, Reading]]:
    """{name: (unit, how to read it)} of all that this machine may show."""
    found: dict[str, tuple[str, Reading]] = {}
    # Cores that share a clock share a folder: on many boards four names are one file.
    files = sorted({file.resolve() for file in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")})
    if files:
        found["clock"] = ("Hz", lambda: _fastest_hz(files))
    if any(root.glob("sys/class/thermal/thermal_zone*")):
        found["temperature"] = ("C", lambda: hottest_c(root))
    opened = open_gpu() if gpu else None
    if opened is not None:
        nvml, handle = opened
        found["gpu_clock"] = ("Hz", lambda: _asked(lambda: 1e6 * float(nvml.nvmlDeviceGetClockInfo(handle, SM_CLOCK))))
        found[REASONS] = ("bits", lambda: _asked(lambda: clock_reasons(nvml, handle)))
        found["gpu_temperature"] = ("C", lambda: _asked(lambda: float(nvml.nvmlDeviceGetTemperature(handle, GPU_SENSOR))))
    return found


def gpu_doubts(watched: Sequence[Series]) -> dict[str, str]:
    """{caveat code: what was seen} of a GPU's clock at any look: throttled, or held by a power cap."""
    bits = 0
    for series in watched:
        if series.name == REASONS:
            for value in series.values:
                bits |= int(value)
    return clock_doubts(bits)


def _fastest_hz(files: list[Path]) -> float | None:
    return max((1e3 * khz for file in files if (khz := _khz(file)) is not None), default=None)


def _khz(file: Path) -> int | None:
    """0 is what a core that is switched off shows: an absence."""
    try:
        khz = int(file.read_bytes())
    except (OSError, ValueError):
        return None
    return khz if 0 < khz < 10**8 else None


def _asked(ask: Callable[[], float | None]) -> float | None:
    try:
        return ask()
    except Exception:  # NVML's own class of errors; a figure that the board does not show is an absence
        return None
