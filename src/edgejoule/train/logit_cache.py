"""A teacher's answers on disk: the most probable classes of each image as it was augmented, so that later passes need no teacher.

TinyViT's fast pretraining (Wu et al., arXiv 2207.10666, 3.2). One file an epoch of the period, one record a position of its order:
the image's index, the micro-batch it was mixed in (its first position and its size), top-k classes and probabilities, and a checksum
over all of it and its own place. A record is whole or it is not there; what a killed process left half-written fails its checksum and
is made again. Each process writes its own positions of the same files. Knows no teacher and no augmentation: the header says in plain
values what the answers depend on, and another header is an error.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgejoule.errors import OutputError, TrainingError
from edgejoule.plain import digest
from edgejoule.train.task import Which

LAYOUT = 1  # of the records; raise it with any change of them
HEADER = "header.json"
Place = tuple[int, int]  # epoch of the period, position in its order


@dataclass(frozen=True, slots=True)
class Answers:
    """The k most probable classes of each image, best first. The rest of the probability is spread evenly over the other classes."""

    probabilities: torch.Tensor  # (B, k) float32
    classes: torch.Tensor  # (B, k) int64

    def first(self) -> torch.Tensor:
        """The teacher's first answers: (B,) int64."""
        return self.classes[:, 0]

    def dense(self, num_classes: int) -> torch.Tensor:
        """(B, K) float32 that sum to 1: half precision took a little away, which is put back in proportion."""
        others = num_classes - self.classes.shape[1]
        rest = (1.0 - self.probabilities.sum(1, keepdim=True)).clamp_min(0.0)  # (B, 1)
        found = (rest / others if others else rest * 0.0).repeat(1, num_classes)
        found = found.scatter(1, self.classes, self.probabilities)
        return found / found.sum(1, keepdim=True)


class LogitCache:
    """The records below one folder. Usable from several processes at once; one object belongs to one process."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], num_classes: int, top_k: int, period: int) -> None:
        """``folder`` may hold many caches: this one's is named by a hash of ``identity`` and the numbers here.

        Raises TrainingError for a header that is damaged or another's, OutputError where nothing can be written.
        """
        self._classes, self._k, self._period = num_classes, min(top_k, num_classes), period
        if self._k < 1 or period < 1:
            raise TrainingError(f"a cache keeps at least one class and one epoch, not {self._k} and {period}")
        code = "<u2" if num_classes <= 1 << 16 else "<u4"
        self._record = np.dtype(
            [
                ("sum", "<u4"),
                ("size", "<u4"),
                ("index", "<i8"),
                ("first", "<i8"),
                ("values", "<f2", (self._k,)),
                ("classes", code, (self._k,)),
            ]
        )
        about = {"layout": LAYOUT, "identity": dict(identity), "classes": num_classes, "top_k": self._k, "period": period}
        self.folder = folder / digest(about)[:24]
        _open_header(self.folder, about)
        self._files: dict[int, int] = {}

    def read(self, which: Which, first: int) -> Answers | None:
        """The answers for a micro-batch that begins at position ``first``; None where any is missing. (B,) each in ``which``."""
        size = len(which.index)
        rows = np.empty(size, self._record)
        for row, (place, index) in enumerate(zip(self._places(which), which.index.tolist(), strict=True)):
            record = self._one(place)
            if record is None or (record["index"], record["first"], record["size"]) != (index, first, size):
                return None
            rows[row] = record
        return self._answers(rows, which.index.device)

    def write(self, which: Which, first: int, probabilities: torch.Tensor) -> Answers:
        """Keep the largest of (B, K) probabilities. Gives what ``read`` will give, so that first and later passes learn the same.

        Raises OutputError where the disk is full or read-only.
        """
        values, classes = probabilities.float().topk(self._k, dim=1)  # (B, k), largest first
        rows = np.zeros(len(values), self._record)
        rows["values"], rows["classes"] = values.cpu().numpy(), classes.cpu().numpy()
        rows["index"], rows["first"], rows["size"] = which.index.cpu().numpy(), first, len(values)
        for row, place in zip(rows, self._places(which), strict=True):
            row["sum"] = _checksum(row, place)
            self._put(place, row.tobytes())
        return self._answers(rows, which.index.device)

    def close(self) -> None:
        """Closes the files; another read or write opens them anew."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _places(self, which: Which) -> Iterable[Place]:
        return zip((which.epoch % self._period).tolist(), which.position.tolist(), strict=True)

    def _one(self, place: Place) -> Any | None:
        try:
            found = os.pread(self._file(place[0]), self._record.itemsize, place[1] * self._record.itemsize)
        except OSError as error:
            raise TrainingError(f"cannot read the teacher's answers in {self.folder} ({error.strerror}): remove that folder") from error
        if len(found) < self._record.itemsize:
            return None
        record = np.frombuffer(found, self._record)[0]
        return record if record["size"] and record["sum"] == _checksum(record, place) else None

    def _put(self, place: Place, content: bytes) -> None:
        try:
            if os.pwrite(self._file(place[0]), content, place[1] * len(content)) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OutputError(
                f"cannot write the teacher's answers to {self.folder} ({error.strerror}): make room, or cache_epochs=0"
            ) from error

    def _file(self, epoch: int) -> int:
        if epoch not in self._files:
            self.close()  # epochs come one after another: one open file is enough
            self._files[epoch] = os.open(self.folder / f"epoch_{epoch:05d}.answers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self._files[epoch]

    def _answers(self, rows: npt.NDArray[Any], device: torch.device) -> Answers:
        values = torch.from_numpy(rows["values"].astype(np.float32)).to(device)
        return Answers(values, torch.from_numpy(rows["classes"].astype(np.int64)).to(device))


def _checksum(record: Any, place: Place) -> int:
    """CRC-32 of a record's place and of all of it but the checksum: zeros, a torn write and another place's record all fail."""
    return zlib.crc32(record.tobytes()[4:], zlib.crc32(np.array(place, "<i8").tobytes()))


def _open_header(folder: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, sort_keys=True, indent=1)
    path = folder / HEADER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        filled = any(folder.glob("*.answers"))  # asked before the header is: whoever wrote answers wrote a header first
        if not path.exists():
            if filled:
                raise TrainingError(f"{folder} holds answers of a teacher and no {HEADER}: remove the folder, they are made again")
            _write(path, text)
        found = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is damaged: remove its folder, the teacher's answers are made again") from error
    except OSError as error:
        raise OutputError(
            f"cannot keep a teacher's answers in {folder} ({error.strerror}): choose another folder, or cache_epochs=0"
        ) from error
    if found != text:
        raise TrainingError(f"{path} is damaged or of another run: remove its folder, the teacher's answers are made again")


def _write(path: Path, text: str) -> None:
    """In one step: another process sees all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".header-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)  # noqa: PTH105 - the name came from mkstemp
    except BaseException:
        os.unlink(name)  # noqa: PTH108
        raise
