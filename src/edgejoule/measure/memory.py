"""Memory of this process, in bytes: resident and proportional peaks, what was swapped out, and what the GPU's driver counts.

Resident set, everything included (interpreter, runtime, weights, the pool of images). Linux: the high-water mark ``VmHWM``, reset
by writing 5 to /proc/self/clear_refs before the artifact is loaded, so that what came before (imports are not undone: their pages
stay resident and count) does not hide a smaller peak. Where it cannot be reset the peak is since the process began, which a fresh
process per trial makes nearly the same. Elsewhere ``ru_maxrss``, which some kernels inherit from the parent.

Proportional set (PSS): pages shared with others count by their share. The kernel keeps no high-water mark of it, and a reading of
smaps_rollup walks the process's whole page tables under the lock that page faults need, about a millisecond: so it is sampled
while the artifact is loaded, first used and warmed up, where memory peaks, and never in the metered window, whose latencies and
energy it would change. A peak between two samples is not seen.

GPU: what NVML says of this process, now. It knows the host's process numbers, so that in a container the process may not be found;
Jetson's GPU shares the board's memory, which NVML does not count and the resident set does, in part. Both are an absence, not 0.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from edgejoule.measure.watch import open_gpu
from edgejoule.records import Memory

SELF = Path("/proc/self")
PERIOD_S = 0.05
SHARE = 0.05  # of one core, at most: in a process of many pages a reading takes longer, and is made less often
LARGEST = 2**60  # bytes: above that a figure is the driver's way to say that it has none


def reset_peak() -> bool:
    """Set the high-water mark back to what is resident now; False where the system does not allow it."""
    try:
        (SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The largest resident set since ``reset_peak`` or the process's start, in bytes; 0 where the system does not say."""
    peak = _field(SELF / "status", "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def swapped_bytes(folder: Path = SELF) -> int | None:
    """What of this process is swapped out now; None where the system does not say."""
    return _field(folder / "status", "VmSwap")


def pss_bytes(folder: Path = SELF) -> int | None:
    """The proportional set now; None where the system does not say (before Linux 4.14, and elsewhere)."""
    return _field(folder / "smaps_rollup", "Pss")


class PssWatch:
    """The largest proportional set between ``start()`` and ``stop()``, read every 50 ms by a thread; one use each. Raises nothing.

    For loading, first inference and warm-up only, see above. Never takes more than a twentieth of a core.
    """

    def __init__(self, folder: Path = SELF, period_s: float = PERIOD_S) -> None:
        self._folder, self._period_s = folder, period_s
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._peak: int | None = None
        self.reads = 0

    def start(self) -> None:
        if self._thread is None and pss_bytes(self._folder) is not None:
            self._thread = threading.Thread(target=self._run, name="pss watch", daemon=True)
            self._thread.start()

    def stop(self) -> int | None:
        """The peak in bytes, a last reading included; None where the system does not say. A second call returns it again."""
        if self._thread is not None and not self._halt.is_set():
            self._halt.set()
            self._thread.join()
            self._read()
        return self._peak

    def _run(self) -> None:
        rest_s = 0.0
        while not self._halt.wait(rest_s):
            began = time.thread_time()
            self._read()
            rest_s = max(self._period_s, (time.thread_time() - began) / SHARE)

    def _read(self) -> None:
        pss = pss_bytes(self._folder)
        if pss is not None:
            self.reads += 1
            self._peak = pss if self._peak is None else max(self._peak, pss)


def gpu_bytes(process: int | None = None) -> int | None:
    """Bytes that this process (or the one named) holds on the first GPU that CUDA sees; None where NVML does not say.

    A process that both computes and draws stands in two lists with the same figure.
    """
    opened = open_gpu()
    if opened is None:
        return None
    nvml, handle = opened
    wanted = os.getpid() if process is None else process
    found = []
    for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        found += [used for one in _running(nvml, handle, name) if one.pid == wanted and (used := _used(one)) is not None]
    return max(found, default=None)


def measured(pss_peak: int | None, cuda: bool) -> Memory:
    """All that is known at the end of a trial: ``pss_peak`` from ``PssWatch.stop()``; the GPU is asked only where ``cuda``."""
    return Memory(
        rss_bytes=peak_bytes() or None,
        pss_bytes=pss_peak,
        gpu_bytes=gpu_bytes() if cuda else None,
        swap_bytes=swapped_bytes(),
    )


def _running(nvml: Any, handle: Any, name: str) -> list[Any]:
    try:
        return list(getattr(nvml, name)(handle))
    except Exception:  # NVML's own class of errors: not supported by this board or driver
        return []


def _used(process: Any) -> int | None:
    used = process.usedGpuMemory
    return int(used) if isinstance(used, int) and 0 < used < LARGEST else None


def _field(file: Path, name: str) -> int | None:
    """Bytes of a line ``name:   123 kB``; None where the file or the line is missing or says something else."""
    try:
        text = file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [f"{name}:"]:
            return int(words[1]) * 1024 if len(words) == 3 and words[2] == "kB" and words[1].isdecimal() and len(words[1]) < 16 else None
    return None
