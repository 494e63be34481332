"""Every error that a user can cause or mend. Each message is one sentence: what happened, what was expected, what to do.

    EdgejouleError
    ├── SpecError            a spelling in the grammar: "name(key=value)", or a recipe "a | b"
    │   └── UnknownNameError   a leaf or model that is not there; offers the nearest names
    ├── StudyError           a study file: names the file, the line and the key
    ├── ModelError           a network that cannot be built, loaded or exported
    ├── DataError            images that are missing or cannot be read
    │   └── BadImageError      one image that cannot be decoded: training may skip it and count it
    ├── TrainingError        a training run that cannot begin, resume or go on
    ├── ArtifactError        a compiled file that is missing, damaged or not ours
    ├── BackendError         a runtime that is missing or refuses a model
    ├── MeterError           a sensor that is missing, may not be read, or lies
    ├── TransportError       a device that cannot be reached
    │   └── AgentError         the worker died or answered nonsense
    ├── StoreError           a results file that cannot be opened, read or written
    ├── RankError            numbers that the asked-for ranking has no meaning for
    └── OutputError          a folder or file that cannot be written: read-only, full disk

Only ``cli.py`` catches ``EdgejouleError`` for good (exit code 2); ``study.py`` turns one model's error into a row that says why.
No foreign exception leaves a leaf: each leaf maps its library's exceptions to these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class EdgejouleError(Exception):
    """The root: catch this one to catch every error that a user can mend."""


class SpecError(EdgejouleError):
    """A string that the grammar cannot read, or arguments that a leaf does not take."""


class UnknownNameError(SpecError):
    """A name that is not in a table. ``nearest`` holds the closest names there are."""

    def __init__(self, kind: str, name: str, known: Iterable[str], advice: str = "") -> None:
        self.nearest = tuple(difflib.get_close_matches(name, list(known), n=3, cutoff=0.5))
        offer = f"did you mean {' or '.join(self.nearest)}?" if self.nearest else ""
        super().__init__(f"no {kind} is called {name!r}" + (f": {offer}" if offer else "") + (f" ({advice})" if advice else ""))


class StudyError(EdgejouleError):
    """A malformed study file."""


class ModelError(EdgejouleError):
    """A network that cannot be built, loaded or exported."""


class DataError(EdgejouleError):
    """Images that are missing or cannot be read."""


class BadImageError(DataError):
    """One image that cannot be decoded, or whose label is none."""


class TrainingError(EdgejouleError):
    """A training run that cannot begin, resume or go on: a loss that is no number, a checkpoint of another run."""


class ArtifactError(EdgejouleError):
    """A compiled file that is missing, damaged or not ours."""


class BackendError(EdgejouleError):
    """A runtime that is missing or refuses a model."""


class MeterError(EdgejouleError):
    """A sensor that is missing, may not be read, or lies."""


class TransportError(EdgejouleError):
    """A device that cannot be reached."""


class AgentError(TransportError):
    """The worker died, or answered nonsense."""


class StoreError(EdgejouleError):
    """A results file that cannot be opened, read or written."""


class RankError(EdgejouleError):
    """Numbers that the asked-for ranking has no meaning for."""


class OutputError(EdgejouleError):
    """A folder or file that cannot be written."""


OF_ONE_MODEL = (ModelError, BackendError, ArtifactError, AgentError, SpecError)  # the rest of a study goes on without that model


def rebuild(said: Any) -> EdgejouleError:
    """The error that a worker reported, as our own class by that name; one that is not ours is an AgentError."""
    if not isinstance(said, Mapping) or not isinstance(said.get("kind"), str):
        return AgentError(f"the worker failed without saying why: {str(said)[:200]}")
    message = str(said.get("message", ""))
    kind = globals().get(said["kind"])
    if kind is UnknownNameError:  # made of the names that were known there; its sentence is already whole
        return SpecError(message)
    if isinstance(kind, type) and issubclass(kind, EdgejouleError):
        return kind(message)
    return AgentError(f"the worker failed with {said['kind']}: {message}")
