"""OpenVINO, imported so that nothing is sent and started so that signals still work.

Its package reports every import to its vendor, from a thread, while we would measure. It takes the absence of ``openvino_telemetry`` for a
wish; so does NNCF. Nothing stays hidden from others after the import.

Its CPU plugin gives the thread a stack for signal handlers and puts the former one back at its end. Of two plugins that end in the order in
which they began, the later one puts back the earlier one's, which is unmapped: from then on Ctrl-C, or a child's end where somebody
listens for it, kills the process by SIGSEGV without a word. So a process has one ``core`` for its whole life, and the stack that it had.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

REPORTER = "openvino_telemetry"


def import_openvino() -> Any:
    """The package. Raises ImportError, and OSError where a library of the system's is missing."""
    with without(REPORTER):
        import openvino
    return openvino


@cache
def core() -> Any:
    """The process's one ``openvino.Core``. Raises what ``import_openvino`` does, and RuntimeError where OpenVINO does not start."""
    made = import_openvino().Core()
    with signal_stack_kept(), contextlib.suppress(RuntimeError):  # a package without the CPU plugin runs on other devices
        made.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin is loaded when it is first asked
    return made


class _Stack(ctypes.Structure):
    """``stack_t`` of sigaltstack(2) on Linux."""

    _fields_: ClassVar = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """On Linux: this thread's stack for signal handlers is the same afterwards, whatever plugins began and ended inside."""
    if sys.platform != "linux":
        yield
        return
    sigaltstack, before = ctypes.CDLL(None).sigaltstack, _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Imports inside find no such package."""
    before = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        if before is not None:
            sys.modules[package] = before
