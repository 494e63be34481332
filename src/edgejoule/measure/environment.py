"""What must be equal before two trials may be compared (the fingerprint), and what was merely observed.

From /proc, /sys, ``platform`` and package metadata; well under 0.1 s, and never fails: what a system does not show is left
empty. The fingerprint covers processor (its make and instructions too), kernel, power mode, governor, usable cores, threads and package
versions; not load, temperatures, clocks or free memory. No host name: a container's changes at every start.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

from edgejoule.measure.gpu import first_visible
from edgejoule.plain import digest
from edgejoule.records import Device, Environment

RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt", "ai-edge-litert", "executorch", "ncnn", "MNN", "coremltools")
MEMORY_STEP = 2**28  # kernels reserve a little more or less: total memory is compared in steps of 256 MiB


def environment(threads: int, runtime: str = "", root: Path = Path("/")) -> Environment:
    """This machine and its software. ``runtime`` is a session's own word, as ``"onnxruntime 1.31.1"``, recorded beside it.

    The fingerprint does not depend on which runtime was used, so that backends on one machine can be compared: it covers the
    versions of all installed ones, so that a trial made before any of them was replaced is not taken for one made after.
    """
    device = Device(
        name=_device_name(root),
        cpu=_cpu(root),
        arch=platform.machine(),
        cores=_usable_cores(),
        memory_bytes=_memory_bytes(root),
        system=f"{platform.system()} {platform.release()}",
        accelerator=_accelerator(root),
        power_mode=_power_mode(),
        governor=_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    )
    versions = _versions()
    compared = {
        "device": (device.name, device.cpu, device.arch, device.cores, round(device.memory_bytes / MEMORY_STEP), device.system),
        "processor": _make(root),
        "state": (device.accelerator, device.power_mode, device.governor),
        "threads": threads,
        "versions": versions,
    }
    return Environment(device, threads, runtime, versions, digest(compared)[:16], _observed(root))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("edgejoule", "numpy", *RUNTIMES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device_name(root: Path) -> str:
    """A board's model name, or a computer's maker and product; the processor where nobody gave it a name."""
    if board := _text(root / "proc/device-tree/model"):
        return board
    dmi = root / "sys/class/dmi/id"
    product = " ".join(filter(None, (_text(dmi / "sys_vendor"), _text(dmi / "product_name"))))
    return product or _cpu(root)


def _cpu(root: Path) -> str:
    fields = _first_core(root)
    # ARM kernels give part numbers instead of a name; /proc/cpuinfo's "Hardware" names the chip on some.
    part = "ARM part {} variant {}".format(fields.get("CPU part", ""), fields.get("CPU variant", "")) if "CPU part" in fields else ""
    return fields.get("model name") or fields.get("Hardware") or part or platform.processor() or platform.machine()


def _make(root: Path) -> dict[str, str]:
    """What tells processors of one name apart: virtual machines call several generations by their maker's name."""
    fields = _first_core(root)
    known = ("cpu family", "model", "stepping", "CPU part", "CPU variant", "CPU revision", "flags", "Features")
    return {name: " ".join(sorted(fields[name].split())) for name in known if name in fields}


def _first_core(root: Path) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not show the affinity
        return os.cpu_count() or 1


def _memory_bytes(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        words = line.split()
        if words[:1] == ["MemTotal:"] and len(words) > 1 and words[1].isdigit():
            return int(words[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _accelerator(root: Path) -> str:
    """The name of the first NVIDIA GPU that CUDA sees; NVML is asked only where the kernel's driver is loaded."""
    if not (root / "proc/driver/nvidia/version").exists():
        return ""
    try:
        import pynvml
    except ImportError:
        return "NVIDIA"
    try:
        pynvml.nvmlInit()
        name = pynvml.nvmlDeviceGetName(first_visible(pynvml))
    except pynvml.NVMLError:
        return "NVIDIA"
    return name.decode() if isinstance(name, bytes) else str(name)


def _power_mode() -> str:
    """Jetson's power mode by name and number (``MAXN_SUPER (2)``): numbers alone move between releases."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return ""
    try:
        said = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=2, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("NV Power Mode:"):
            name = line.partition(":")[2].strip()
            return f"{name} ({following})" if following.isdigit() else name
    return "unknown"


def _observed(root: Path) -> dict[str, str]:
    seen: dict[str, str] = {}
    if hasattr(os, "getloadavg"):
        try:
            seen["load_1min"] = f"{os.getloadavg()[0]:.2f}"
        except OSError:
            seen["load_1min"] = "unknown"
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*"))[:8]:
        reading = _text(zone / "temp")
        if reading.lstrip("-").isdigit():
            seen[f"temperature_c.{_text(zone / 'type') or zone.name}"] = f"{int(reading) / 1000:.1f}"
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    limits = _text(cpufreq / "scaling_min_freq"), _text(cpufreq / "scaling_max_freq")
    if all(map(str.isdigit, limits)):
        seen["clock_limits_mhz"] = " to ".join(f"{int(limit) / 1000:.0f}" for limit in limits)
    if driver := _text(root / "proc/driver/nvidia/version").partition("\n")[0]:
        seen["nvidia_driver"] = driver
    for file in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))[:16]:
        reading = _text(file)
        if reading.isdigit():
            seen[f"clock_mhz.{file.parent.parent.name}"] = f"{int(reading) / 1000:.0f}"
    return seen


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\x00 \n\t")
    except OSError:  # what a system does not show stays empty
        return ""
