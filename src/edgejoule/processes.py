"""What both sides of a worker need: its standard output kept for answers, its end with its parent, its group ended, its signal named.

Standard library only: boards import this. Knows no job and no protocol.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Any, TextIO


def take_stdout() -> TextIO:
    """Keep the real standard output for the protocol and send file descriptor 1 to standard error."""
    sys.stdout.flush()
    real = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return real


def die_with_parent() -> None:
    """On Linux: be killed with the run that asked, so that no orphan disturbs the next one's measurements."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process that was started in a session of its own with its whole group, even where it has ended: it may have left children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def signal_name(number: int) -> str:
    """``SIGSEGV``; of the one that the system ends greedy processes by, what it may mean."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name
