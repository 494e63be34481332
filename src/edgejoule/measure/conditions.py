"""What else went on in the machine during a window: swap, other programs, throttling, clocks, battery.

Two snapshots of /proc and /sys are compared, and the processor's clock is watched where the kernel shows it. Everything is
optional: a system that does not show a figure raises no doubt about it (macOS shows none). ``root`` lets tests give a tree of
files. Reads only; sets no clock, no governor. Standard library only.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgejoule.caveats import caveat
from edgejoule.records import Caveat

SYSTEM = Path("/")
BUSY = 0.05  # of one core
TICKS_S = 0.03  # /proc/stat counts in ticks of 10 ms: three of them are no evidence
CLOCK_DROP = 0.95
CLOCK_PERIOD_S = 0.25
PI_NOW = 0xF  # under-voltage, capped, throttled, soft limit: the low bits are now, the high ones since boot


@dataclass(frozen=True, slots=True)
class Conditions:
    """One look at the machine; a figure that it does not show is None or missing."""

    at_s: float
    own_cpu_s: float
    all_cpu_s: float | None = None
    swapped_pages: int | None = None
    throttle_counts: dict[str, int] = field(default_factory=dict)
    battery: str = ""


def look(
    root: Path = SYSTEM, clock: Callable[[], float] = time.perf_counter, own_cpu: Callable[[], float] = time.process_time
) -> Conditions:
    """Read the machine's state now (about a millisecond). Never raises."""
    return Conditions(
        at_s=clock(),
        own_cpu_s=own_cpu(),
        all_cpu_s=_all_cpu_s(root),
        swapped_pages=_swapped_pages(root),
        throttle_counts=_throttle_counts(root),
        battery=_battery(root),
    )


def doubts(before: Conditions, after: Conditions) -> list[Caveat]:
    """What happened between two looks that a result must not hide."""
    found: list[Caveat] = []
    duration = after.at_s - before.at_s
    if before.all_cpu_s is not None and after.all_cpu_s is not None and duration > 0:
        others = (after.all_cpu_s - before.all_cpu_s) - (after.own_cpu_s - before.own_cpu_s)
        if others > BUSY * duration + TICKS_S:
            found.append(caveat("busy_machine", f"{100 * others / duration:.0f} % of one core during {duration:.3g} s"))
    if before.swapped_pages is not None and after.swapped_pages is not None and after.swapped_pages > before.swapped_pages:
        found.append(caveat("swap", f"{after.swapped_pages - before.swapped_pages} pages"))
    events = {name: count - before.throttle_counts.get(name, count) for name, count in after.throttle_counts.items()}
    counted = [f"{name} +{more}" for name, more in sorted(events.items()) if more > 0]
    if counted:
        found.append(caveat("throttled", ", ".join(counted[:4])))
    if after.battery:
        found.append(caveat("on_battery", after.battery))
    return found


class ClockWatch:
    """Reads the fastest core's clock four times a second while a window runs, where the kernel shows it; otherwise does nothing."""

    def __init__(self, root: Path = SYSTEM) -> None:
        self._files = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self.hertz: list[float] = []

    def start(self) -> None:
        if self._files:
            self._thread = threading.Thread(target=self._run, name="clock watch", daemon=True)
            self._thread.start()

    def stop(self) -> list[Caveat]:
        """The doubt ``clock_drop``, where the last third's median clock is below 95 % of the first third's."""
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
        return clock_doubts(self.hertz)

    def _run(self) -> None:
        while not self._halt.wait(CLOCK_PERIOD_S):
            clocks = [_number(file) for file in self._files]
            if known := [khz for khz in clocks if khz is not None]:
                self.hertz.append(1e3 * max(known))


def clock_doubts(hertz: list[float]) -> list[Caveat]:
    """Compare the thirds of a series of clock readings, in hertz; fewer than six readings give no verdict."""
    third = len(hertz) // 3
    if third < 2:
        return []
    first, last = statistics.median(hertz[:third]), statistics.median(hertz[-third:])
    if last >= CLOCK_DROP * first:
        return []
    return [caveat("clock_drop", f"{first / 1e9:.3g} GHz at first, {last / 1e9:.3g} GHz at last")]


def _all_cpu_s(root: Path) -> float | None:
    """CPU seconds spent by everybody since boot, time stolen by other virtual machines included, idling and waiting not."""
    line = _text(root / "proc/stat").partition("\n")[0].split()
    if len(line) < 5 or line[0] != "cpu":
        return None
    try:
        ticks = [int(word) for word in line[1:9]]  # user nice system idle iowait irq softirq steal; guest is part of user
    except ValueError:
        return None
    return (sum(ticks) - sum(ticks[3:5])) / _ticks_per_s()


def _ticks_per_s() -> int:
    try:
        return os.sysconf("SC_CLK_TCK")
    except (AttributeError, ValueError, OSError):
        return 100


def _swapped_pages(root: Path) -> int | None:
    counts = dict(line.split(" ", 1) for line in _text(root / "proc/vmstat").splitlines() if line.startswith(("pswpin ", "pswpout ")))
    try:
        return sum(int(count) for count in counts.values()) if counts else None
    except ValueError:
        return None


def _throttle_counts(root: Path) -> dict[str, int]:
    """Event counters of Intel's thermal throttling and of Jetson's over-current (oc1 under-voltage, oc2 average, oc3 instant)."""
    files = [
        *root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"),
        *root.glob("sys/class/hwmon/hwmon*/oc[0-9]_event_cnt"),
    ]
    counts = {f"{file.parent.parent.name}/{file.name}" if "cpu" in file.parts else file.name: _number(file) for file in files}
    return {name: int(count) for name, count in counts.items() if count is not None}


def flagged(root: Path = SYSTEM) -> dict[str, str]:
    """``{"throttled": ...}`` where a Raspberry Pi says that it is throttled now. To be asked while the load is hot: one small file."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    try:
        flags = int(text, 16) if text else 0
    except ValueError:
        return {}
    return {"throttled": f"throttled={flags:#x}"} if flags & PI_NOW else {}


def _battery(root: Path) -> str:
    """``'BAT0 is discharging'`` where a battery gives or takes current, else nothing."""
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if _text(supply / "type").strip() == "Battery" and _text(supply / "scope").strip() != "Device":  # not a mouse's
            status = _text(supply / "status").strip().lower()
            if status in ("discharging", "charging"):
                return f"{supply.name} is {status}"
    return ""


def _number(file: Path) -> float | None:
    try:
        return float(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a figure that this system does not show is an absence, and every caller treats it as one
        return ""
