"""Ctrl-C that never falls into the middle of an update: it waits until the loop says that it may come.

Knows signals only. Where signals cannot be caught (another thread than the main one, a caller's own handler) it does nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupt:
    """A context in which the first Ctrl-C raises KeyboardInterrupt only within ``allowed()``; a second one does not wait."""

    def __init__(self) -> None:
        self._allowed = self._pending = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._caught)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """A stretch that may be broken off anywhere: waiting for images, evaluating."""
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._allowed or self._pending:
            self._allowed = self._pending = False
            raise KeyboardInterrupt
        self._pending = True
