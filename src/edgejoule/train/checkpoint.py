"""A training run on disk: one file, whole at any moment. Knows tensors and plain values, not what they are of.

It is written beside its place, flushed to the disk and renamed, so that a kill leaves the old one or the new one. It is read with
``weights_only=True``: it can hold no code. Its zip's checksums are verified first, which torch itself does not do.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgejoule.errors import OutputError, TrainingError

NAME = "checkpoint.pt"
FORMAT = 1


def save(folder: Path, key: str, content: Mapping[str, Any]) -> None:
    """Replaces the checkpoint in ``folder``. Raises OutputError where it cannot be written; the old one is whole then."""
    path, part = folder / NAME, folder / f"{NAME}.part"
    serialized = io.BytesIO()  # torch, writing to a full disk by itself, ends in an error that does not say so
    torch.save({"format": FORMAT, "key": key, "content": dict(content)}, serialized)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                stream.write(serialized.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        _sync_folder(folder)
    except OSError as error:
        raise OutputError(
            f"cannot write the checkpoint {path} ({error.strerror or error}): free some space and run again, training goes on"
            " from the last one that was written"
        ) from error


def load(folder: Path, key: str) -> dict[str, Any] | None:
    """What was saved under this key, tensors on the CPU; None where there is none.

    Raises TrainingError, naming the file to delete, for a damaged file, another version's or another run's.
    """
    path = folder / NAME
    try:
        if not path.exists():
            return None
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoint {path} ({error.strerror or error}): make it readable, or delete it") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise TrainingError(f"the checkpoint {path} is damaged ({reason}): delete it to begin anew") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not isinstance(stored.get("content"), dict):
        raise TrainingError(
            f"the checkpoint {path} was written by another version of edgejoule: finish with that one, or delete it to begin anew"
        )
    if stored.get("key") != key:
        raise TrainingError(
            f"the checkpoint {path} belongs to another run (another network, recipe, seed or data):"
            " name another folder, or delete it to begin anew"
        )
    return dict(stored["content"])


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk, where the system lets folders be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
