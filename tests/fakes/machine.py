"""A machine that can be told what to show: trees of /sys and /proc, programs that answer, a GPU's driver, and a long run that throttles."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgejoule.records import Phase, Series, Trace, floats

CPU = "sys/devices/system/cpu"
PI_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def cpufreq(root: Path, cpu: int, **files: object) -> None:
    put(root, {f"{CPU}/cpu{cpu}/cpufreq/{name}": f"{value}\n" for name, value in files.items()})


def zone(root: Path, number: int, celsius: float, kind: str = "cpu-thermal") -> None:
    folder = f"sys/class/thermal/thermal_zone{number}"
    put(root, {f"{folder}/type": f"{kind}\n", f"{folder}/temp": f"{round(1000 * celsius)}\n"})


def supply(root: Path, name: str, **files: str) -> None:
    put(root, {f"sys/class/power_supply/{name}/{key}": f"{value}\n" for key, value in files.items()})


def process(root: Path, number: int, name: str, ticks: int, began: int = 7) -> None:
    """/proc/N/stat with user ticks; system ticks are 0."""
    fields = ["S", "1", "1", "1", "0", "-1", "4194304", "0", "0", "0", "0", str(ticks), "0", "99", "99", "20", "0", "1", "0", str(began)]
    put(root, {f"proc/{number}/stat": f"{number} ({name}) {' '.join(fields)} 0 0\n"})


class Programs:
    """Answers to programs by their name, and what was asked."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, list[tuple[str, ...]]()

    def __call__(self, argv: Sequence[str]) -> str:
        self.asked.append(tuple(argv))
        return self.answers.get(argv[0], "")


class NvmlError(Exception):
    pass


def nvml(**answers: Any) -> types.SimpleNamespace:
    """A module ``pynvml``: what is not among the answers raises, as a board does that does not support it."""

    def missing(*arguments: object) -> Any:
        raise NvmlError("Not Supported")

    names = ("ClockInfo", "Temperature", "ComputeRunningProcesses", "GraphicsRunningProcesses")
    functions: dict[str, Any] = {
        f"nvmlDeviceGet{name}": (lambda *a, made=answers[name]: made) if name in answers else missing for name in names
    }
    init = missing if answers.get("broken") else lambda: None
    return types.SimpleNamespace(NVMLError=NvmlError, nvmlInit=init, nvmlDeviceGetHandleByIndex=lambda i: f"gpu{i}", **functions)


Curve = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


def long_run(
    ips: Curve,
    seconds: float = 600.0,
    watts: Curve | None = None,
    celsius: Curve | None = None,
    noise: float = 0.01,
    seed: int = 0,
    counter: bool = False,
    start_s: float = 1000.0,
) -> tuple[Any, Phase, tuple[Trace, ...], tuple[Series, ...]]:
    """(latencies, window, traces, watched) of a run whose speed, power and temperature are functions of the time in it."""
    rng, spent, at = np.random.default_rng(seed), list[float](), 0.0
    while at < seconds:
        speed = float(ips(np.array([at]))[0]) * float(np.exp(rng.normal(0, noise)))
        spent.append(1 / speed)
        at += 1 / speed
    window = Phase("window", start_s, start_s + at)
    traces: tuple[Trace, ...] = ()
    if watts is not None:
        times = np.arange(-2.0, at + 2.0, 0.1)
        power = watts(np.clip(times, 0, at)) * (1 + rng.normal(0, noise, len(times)))
        values = np.concatenate(([0.0], np.cumsum(np.diff(times) * power[1:]))) if counter else power
        quantity: Any = "energy_j" if counter else "power_w"
        traces = (Trace("board", quantity, floats(start_s + times), floats(values), "fake", "C", "board-in", 0.1),)
    ticks = np.arange(0.0, at, 1.0)
    watched = (Series("clock", "Hz", floats(start_s + ticks), floats(6e7 * ips(ticks))),)
    if celsius is not None:
        watched += (Series("temperature", "C", floats(start_s + ticks), floats(np.round(celsius(ticks)))),)
    return floats(spent), window, traces, watched
