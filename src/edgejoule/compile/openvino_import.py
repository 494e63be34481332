"""OpenVINO, imported so that nothing is sent: its package reports every import to its vendor, from a thread, while we would measure.

It takes the absence of ``openvino_telemetry`` for a wish; so does NNCF. Nothing stays hidden from others after the import.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

REPORTER = "openvino_telemetry"


def import_openvino() -> Any:
    """The package. Raises ImportError, and OSError where a library of the system's is missing."""
    with without(REPORTER):
        import openvino
    return openvino


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
