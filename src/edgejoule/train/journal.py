"""What a training run says while it goes on: events with throughput and time left, and scalars for TensorBoard.

Knows numbers and names, not how they come about. Only the main process keeps a journal.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgejoule.bench import Event, Notify
from edgejoule.errors import OutputError
from edgejoule.records import Epoch

STAGE = "train"
FOLDER = "tensorboard"
BETWEEN_S = 0.5  # events


class Journal:
    """Tells of progress at most twice a second, and of every epoch. Speed and time left are of this sitting, evaluation not counted."""

    def __init__(self, notify: Notify, writer: Any, steps: int, batch: int, first: int) -> None:
        self._notify, self._writer, self._steps, self._batch = notify, writer, steps, batch
        self._first = first  # step that this sitting began with
        self._began = self._told = time.monotonic()
        self._epoch_told = -BETWEEN_S

    def due(self, step: int) -> bool:
        """It is time to tell of the step: half a second has passed, or it is the last one."""
        return step == self._steps or time.monotonic() - self._told >= BETWEEN_S

    def paused(self, seconds: float) -> None:
        """So many seconds were not spent training."""
        self._began += seconds

    def step(self, step: int, epochs_done: float, loss: float, lr: float) -> None:
        """``step`` steps are done, which is ``epochs_done`` epochs; the last one's loss and learning rate. Raises OutputError."""
        self._told = time.monotonic()
        seconds = max(self._told - self._began, 1e-9) / max(step - self._first, 1)
        speed = self._batch / seconds
        text = f"epoch {epochs_done:.2f} · loss {loss:.4f} · lr {lr:.2e} · {speed:.0f} images/s"
        self._notify(Event(STAGE, f"{text} · {_spelled(seconds * (self._steps - step))} left", step, self._steps))
        self._write(step, {"train/loss": loss, "train/lr": lr, "train/images_per_s": speed})

    def epoch(self, epoch: Epoch) -> None:
        """Raises OutputError."""
        scores = " · ".join(f"{name} {value:.4f}" for name, value in epoch.scores.items())
        now = time.monotonic()
        if epoch.step == self._steps or now - self._epoch_told >= BETWEEN_S:
            self._epoch_told = now
            self._notify(Event(STAGE, f"epoch {epoch.number} ended · training loss {epoch.loss:.4f}" + (f" · {scores}" if scores else "")))
        self._write(epoch.step, {f"val/{name}": value for name, value in epoch.scores.items()} | {"train/epoch_loss": epoch.loss})

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self._writer is not None:
            with _writing():
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, step)


@contextlib.contextmanager
def open_journal(folder: Path, notify: Notify, steps: int, batch: int, first: int) -> Iterator[Journal]:
    """A journal that goes on after step ``first``: what an earlier sitting wrote of later steps is purged. Raises OutputError."""
    writer = None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        notify(Event(STAGE, "no TensorBoard files are written: pip install tensorboard"))
    else:
        with _writing():
            writer = SummaryWriter(str(folder / FOLDER), purge_step=first + 1)
    try:
        yield Journal(notify, writer, steps, batch, first)
    finally:
        if writer is not None:
            with _writing():
                writer.close()


@contextlib.contextmanager
def silent_journal(steps: int, batch: int, first: int) -> Iterator[Journal]:
    """The journal of a process that is not the main one: says and writes nothing."""
    yield Journal(lambda event: None, None, steps, batch, first)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write TensorBoard's files ({error.strerror or error}): free some space and run again") from error


def _spelled(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{hours:.1f} h"
