"""Progress for people, on stderr: a bar on a terminal, plain lines when not. Knows events, not what they are about."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgejoule.bench import Event


class Progress:
    """A context in which ``notify`` shows events. Ctrl-C leaves with exit code 130 and says what is kept.

    What other code prints meanwhile (a user's model, a library) goes to stderr: stdout is for results.
    """

    def __init__(self, kept: str = "") -> None:
        self._kept = kept
        self._stdout = contextlib.redirect_stdout(sys.stderr)
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        self._stdout.__enter__()
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.fields[stage]:8}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
            rest = (TimeRemainingColumn(), TextColumn("{task.description}"))
            # Drawn seldom: the energy that drawing takes would be measured too.
            self._bar = Bar(*columns, *rest, console=Console(stderr=True), refresh_per_second=2)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._stdout.__exit__(kind, error, trace)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            print(f"stopped{self._kept and '; ' + self._kept}: run the same command again to go on", file=sys.stderr)
            raise SystemExit(130) from error

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def notify(self, event: Event) -> None:
        if not event.total:
            self.say(f"{event.stage:8} {event.text}")
        elif self._bar is None:
            print(f"{event.stage:8} {event.done}/{event.total} {self._clock()} {event.text}", file=sys.stderr, flush=True)
        else:
            if event.stage not in self._tasks:
                self._tasks[event.stage] = self._bar.add_task("", stage=event.stage, total=event.total)
            self._bar.update(self._tasks[event.stage], completed=event.done, total=event.total, description=event.text)

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._began)
        return f"[{seconds // 60}:{seconds % 60:02}]"
