"""What else went on in the machine during a window: swap, other programs, throttling, clocks, battery.

Two snapshots of /proc and /sys are compared, and the clocks that were watched are judged. Everything is optional: a system that
does not show a figure raises no doubt about it. A board's clock in /sys is what was asked for, not always what runs (a Raspberry
Pi's firmware throttles unseen): its flags are asked besides. ``root`` lets tests give a tree of files, ``ask`` the answers of the
two systems that speak through a program only. Reads only; sets no clock, no governor. Standard library only.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgejoule.caveats import caveat
from edgejoule.records import Caveat

SYSTEM = Path("/")
BUSY = 0.05  # of one core
TICKS_S = 0.03  # /proc/stat counts in ticks of 10 ms: three of them are no evidence
CLOCK_DROP = 0.95
PI_NOW = 0xF  # under-voltage, capped, throttled, soft limit: the low bits are now,
PI_SINCE = 16  # and the same ones this far up say that it has happened since boot
ASK_S = 2.0  # a program that has not answered by then is not waited for
PRESSURES = ("nominal", "moderate", "heavy", "trapping", "sleeping")  # macOS's levels of thermal pressure, from 0

Ask = Callable[[Sequence[str]], str]
Processes = dict[tuple[int, int], tuple[str, float]]  # {(pid, start tick): (name, CPU seconds so far)}


def ask_program(argv: Sequence[str]) -> str:
    """What a program prints; nothing where it is not there, fails or does not answer."""
    tool = shutil.which(argv[0])
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *argv[1:]], capture_output=True, timeout=ASK_S, check=False, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


@dataclass(frozen=True, slots=True)
class Conditions:
    """One look at the machine; a figure that it does not show is None or missing."""

    at_s: float
    own_cpu_s: float
    all_cpu_s: float | None = None
    swapped_pages: int | None = None
    throttle_counts: dict[str, int] = field(default_factory=dict)
    battery: str = ""
    pi_flags: int | None = None
    processes: Processes = field(default_factory=dict)


def look(
    root: Path = SYSTEM,
    clock: Callable[[], float] = time.perf_counter,
    own_cpu: Callable[[], float] = time.process_time,
    ask: Ask = ask_program,
) -> Conditions:
    """Read the machine's state now (a millisecond, and a twentieth of one per process): outside the metered part. Never raises."""
    return Conditions(
        at_s=clock(),
        own_cpu_s=own_cpu(),
        all_cpu_s=_all_cpu_s(root),
        swapped_pages=_swapped_pages(root),
        throttle_counts=_throttle_counts(root),
        battery=_battery(root),
        pi_flags=_pi_flags(root, ask),
        processes=_processes(root),
    )


def doubts(before: Conditions, after: Conditions, own_children_cpu_s: float = 0.0) -> list[Caveat]:
    """What happened between two looks that a result must not hide; the CPU time of children that are ours is no other program's."""
    found = _contention(before, after, own_children_cpu_s)
    if before.swapped_pages is not None and after.swapped_pages is not None and after.swapped_pages > before.swapped_pages:
        found.append(caveat("swap", f"{after.swapped_pages - before.swapped_pages} pages"))
    events = {name: count - before.throttle_counts.get(name, count) for name, count in after.throttle_counts.items()}
    counted = [f"{name} +{more}" for name, more in sorted(events.items()) if more > 0]
    if counted:
        found.append(caveat("throttled", ", ".join(counted[:4])))
    found += _pi_doubts(before.pi_flags, after.pi_flags)
    if after.battery:
        found.append(caveat("on_battery", after.battery))
    return found


def _contention(before: Conditions, after: Conditions, own_children_cpu_s: float) -> list[Caveat]:
    """The CPU time of all others, and the name of the one who took most of it, where this process can see others at all."""
    duration = after.at_s - before.at_s
    if before.all_cpu_s is None or after.all_cpu_s is None or duration <= 0:
        return []
    others = (after.all_cpu_s - before.all_cpu_s) - (after.own_cpu_s - before.own_cpu_s) - own_children_cpu_s
    if others <= BUSY * duration + TICKS_S:
        return []
    seen = f"{100 * others / duration:.0f} % of one core during {duration:.3g} s"
    spent = [(cpu_s - before.processes.get(key, ("", 0.0))[1], key[0], name) for key, (name, cpu_s) in after.processes.items()]
    most = max((one for one in spent if one[1] != os.getpid()), default=(0.0, 0, ""))
    if before.processes and most[0] > TICKS_S:
        seen += f", most of it {most[2]} (process {most[1]}, {100 * most[0] / duration:.0f} %)"
    return [caveat("busy_machine", seen)]


def _pi_doubts(before: int | None, after: int | None) -> list[Caveat]:
    """Throttled, where a sticky bit was set between the looks or a bit stood at both; the bits set before are the past."""
    if before is None or after is None:
        return []
    if (after >> PI_SINCE & ~(before >> PI_SINCE) & PI_NOW) or before & after & PI_NOW:
        return [caveat("throttled", f"throttled={after:#x}, and {before:#x} before the window")]
    return [caveat("past_throttling", f"throttled={before:#x} before the window")] if before >> PI_SINCE & PI_NOW else []


def clock_doubts(hertz: list[float]) -> list[Caveat]:
    """Compare the thirds of a series of clock readings, in hertz; fewer than six readings give no verdict."""
    third = len(hertz) // 3
    if third < 2:
        return []
    first, last = statistics.median(hertz[:third]), statistics.median(hertz[-third:])
    if last >= CLOCK_DROP * first:
        return []
    return [caveat("clock_drop", f"{first / 1e9:.3g} GHz at first, {last / 1e9:.3g} GHz at last")]


def clock_low_doubts(hertz: Sequence[float], requested_hz: float | None) -> list[Caveat]:
    """Compare the median of a series of clock readings with the clock that was asked for (``requested_hz``), both in hertz."""
    if requested_hz is None or not len(hertz):
        return []
    typical = statistics.median(hertz)
    if typical >= CLOCK_DROP * requested_hz:
        return []
    return [caveat("clock_low", f"{typical / 1e9:.3g} GHz, where {requested_hz / 1e9:.3g} GHz was asked for")]


def requested_hz(root: Path = SYSTEM) -> float | None:
    """The fastest core's clock, where it was asked for: governor userspace, or performance; None where it is left to the system.

    With turbo on, the limit is a clock that nobody can hold; then the base clock counts, and where that is unknown, nothing.
    """
    asked = [_requested_khz(policy, root) for policy in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq")]
    known = [khz for khz in asked if khz is not None and khz > 0]
    return 1e3 * max(known) if asked and len(known) == len(asked) else None


def _requested_khz(policy: Path, root: Path) -> float | None:
    governor = _text(policy / "scaling_governor").strip()
    if governor == "userspace":
        return _number(policy / "scaling_setspeed")
    if governor != "performance":
        return None
    highest, base = _number(policy / "scaling_max_freq"), _number(policy / "base_frequency")
    cpu = root / "sys/devices/system/cpu"
    turbo = _text(cpu / "cpufreq/boost").strip() == "1" or _text(cpu / "intel_pstate/no_turbo").strip() == "0"
    if not turbo or highest is None:
        return highest
    return None if base is None else min(highest, base)


def _all_cpu_s(root: Path) -> float | None:
    """CPU seconds spent by everybody since boot, time stolen by other virtual machines included, idling and waiting not."""
    line = _text(root / "proc/stat").partition("\n")[0].split()
    if len(line) < 5 or line[0] != "cpu":
        return None
    try:
        ticks = [int(word) for word in line[1:9]]  # user nice system idle iowait irq softirq steal; guest is part of user
        return (sum(ticks) - sum(ticks[3:5])) / _ticks_per_s()
    except (ValueError, OverflowError):
        return None


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


def _processes(root: Path) -> Processes:
    """CPU time of every process, its children's left out: a child that ends hands over time from before the window too."""
    found: Processes = {}
    try:
        folders = [folder for folder in (root / "proc").iterdir() if folder.name.isdecimal()]
    except OSError:
        return found
    for folder in folders:
        head, _, tail = _text(folder / "stat").rpartition(")")  # a program's name may hold spaces and parentheses
        words = tail.split()
        try:
            found[int(folder.name), int(words[19])] = (head.partition("(")[2], (int(words[11]) + int(words[12])) / _ticks_per_s())
        except (ValueError, IndexError, OverflowError):  # ended since it was listed
            continue
    return found


def flagged(root: Path = SYSTEM, ask: Ask = ask_program, system: str = sys.platform) -> dict[str, str]:
    """``{"throttled": ...}`` where a Raspberry Pi or macOS says that it is throttled now; empty elsewhere.

    To be asked while the load is hot: one small file on a Pi, a program of some 10 ms on macOS and on a Pi without that file.
    """
    if system == "darwin" and root == SYSTEM:
        pressure = mac_pressure(ask(("notifyutil", "-g", "com.apple.system.thermalpressurelevel")))
        pressure = mac_limits(ask(("pmset", "-g", "therm"))) if pressure is None else pressure
        return {"throttled": pressure} if pressure else {}
    flags = _pi_flags(root, ask)
    return {"throttled": f"throttled={flags:#x}"} if flags is not None and flags & PI_NOW else {}


def mac_pressure(text: str) -> str | None:
    """``'thermal pressure heavy'`` from notifyutil's ``name level``; empty where nominal, None where it does not say."""
    words = text.split()
    if len(words) != 2 or words[1] not in map(str, range(len(PRESSURES))):
        return None
    level = int(words[1])
    return f"thermal pressure {PRESSURES[level]}" if level else ""


def mac_limits(text: str) -> str:
    """``'CPU_Speed_Limit = 28'`` from ``pmset -g therm``, where a limit is below 100 %; empty on Apple silicon, which has none there."""
    limits = re.findall(r"\b(CPU_(?:Speed|Scheduler)_Limit)\s*=\s*(\d{1,3})\b", text, re.ASCII)
    return ", ".join(f"{name} = {percent}" for name, percent in limits if 0 < int(percent) < 100)


def _pi_flags(root: Path, ask: Ask) -> int | None:
    """The firmware's bits of a Raspberry Pi, from the kernel's file or else from ``vcgencmd``; None on any other machine."""
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    if not text and _text(root / "proc/device-tree/model").startswith("Raspberry Pi"):
        text = ask(("vcgencmd", "get_throttled")).strip().removeprefix("throttled=")
    return int(text, 16) if re.fullmatch(r"(0x)?[0-9a-f]{1,8}", text, re.ASCII | re.IGNORECASE) else None


def charger(root: Path = SYSTEM) -> str:
    """``'USB_C is online'`` where a machine with a battery of its own is fed from outside, else nothing.

    For a meter that reads the battery: its figures are then not the machine's consumption (caveat ``charger``).
    """
    supplies = sorted(root.glob("sys/class/power_supply/*"))
    if not any(_own_battery(supply) for supply in supplies):
        return ""
    fed = [supply.name for supply in supplies if _feeds(supply)]
    return f"{', '.join(fed)} online" if fed else ""


def _own_battery(supply: Path) -> bool:
    return _text(supply / "type").strip() == "Battery" and _text(supply / "scope").strip() != "Device"  # not a mouse's


def _feeds(supply: Path) -> bool:
    kind, online = _text(supply / "type").strip(), _text(supply / "online").strip()
    return (kind in ("Mains", "Wireless") or kind.startswith("USB")) and online in ("1", "2")  # 2: at a voltage that can be set


def _battery(root: Path) -> str:
    """``'BAT0 is discharging'`` where a battery gives or takes current, else nothing."""
    for supply in sorted(root.glob("sys/class/power_supply/*")):
        if _own_battery(supply):
            status = _text(supply / "status").strip().lower()
            if status in ("discharging", "charging"):
                return f"{supply.name} is {status}"
    return ""


def _number(file: Path) -> float | None:
    try:
        value = float(_text(file))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # a figure that this system does not show is an absence, and every caller treats it as one
        return ""
