"""Where and how a run works: what is the same for all its stages, and the events by which they tell of progress.

Knows no stage and no record. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgejoule.errors import OutputError


@dataclass(frozen=True, slots=True)
class Event:
    """Progress: ``done`` of ``total`` steps of a stage, and one line of text."""

    stage: str
    text: str
    done: int = 0
    total: int = 0


Notify = Callable[[Event], None]


def default_cache() -> Path:
    """Where compiled files and cropped images are kept: $EDGEJOULE_CACHE, else the user's cache folder."""
    if folder := os.environ.get("EDGEJOULE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgejoule"


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and how a run works: what is the same for all its stages."""

    notify: Notify = lambda event: None
    cache: Path = field(default_factory=default_cache)
    seed: int = 0
    transport: str = "local"


def cores(threads: int) -> int:
    """The number of threads meant: as asked, or all the cores this process may use."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def writable(path: Path) -> Path:
    """The folder, made where it was missing. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path} ({error.strerror}): set EDGEJOULE_CACHE to one that you may write") from error
    return path
