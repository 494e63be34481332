"""Peak memory of this process: resident set, in bytes, everything included (interpreter, runtime, weights, the pool of images).

Linux: the high-water mark ``VmHWM``, reset by writing 5 to /proc/self/clear_refs before the artifact is loaded, so that what
came before (imports are not undone: their pages stay resident and count) does not hide a smaller peak. Where it cannot be reset
the peak is since the process began, which a fresh process per trial makes nearly the same. Elsewhere ``ru_maxrss``, which some
kernels inherit from the parent. Accelerator memory that is not the host's is not seen.
"""

from __future__ import annotations

import sys
from pathlib import Path


def reset_peak() -> bool:
    """Set the high-water mark back to what is resident now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The largest resident set since ``reset_peak`` or the process's start, in bytes; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        words = line.split()
        if words[:1] == ["VmHWM:"] and len(words) == 3 and words[2] == "kB" and words[1].isdigit():
            return int(words[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
