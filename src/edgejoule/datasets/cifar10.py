"""CIFAR-10 in its original binary version (Krizhevsky 2009): data_batch_1.bin … test_batch.bin, batches.meta.txt. Downloads nothing.

    one record, 3073 bytes:   label 0..9 | 1024 red | 1024 green | 1024 blue, row by row, 32 x 32

Each image is read when it is asked for, by a plain read: the system's page cache serves all workers, so none holds a copy. (A memory map
would do the same, but a file that shrinks under a map kills the process instead of raising an error.)
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule.datasets.labelled import Split, is_folder, origin_of, place, split_of
from edgejoule.datasets.split import Part, Positions, cut
from edgejoule.errors import BadImageError, DataError

FOLDER = "cifar-10-batches-bin"
RECORD = 1 + 3 * 32 * 32  # bytes
CLASSES = 10
BATCHES = 5
ORIGINAL = 10_000  # records a batch of the original holds
VALIDATION = 0.1  # of the training file
HAD = "the file is cifar-10-binary.tar.gz, from the CIFAR page of the University of Toronto: unpack it there"


@dataclass(frozen=True, eq=False)
class Records:
    """The images of some files, one after the other."""

    folder: str
    files: tuple[str, ...]
    starts: tuple[int, ...]  # the first position of each file, and the end of the last: one longer than files
    labels: npt.NDArray[np.uint8]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, position: int) -> Any:
        from PIL import Image

        file, record = self._place(position)
        path = Path(self.folder) / file
        try:
            with path.open("rb") as stream:
                stream.seek(record * RECORD + 1)
                content = stream.read(RECORD - 1)
        except OSError as error:
            raise BadImageError(f"cannot read image {record} of {path} ({error.strerror or error}): unpack CIFAR-10 again") from error
        if len(content) < RECORD - 1:
            raise BadImageError(f"{path} ends before image {record}, which it had before: unpack CIFAR-10 again")
        planes = np.frombuffer(content, np.uint8).reshape(3, 32, 32)  # (C, H, W)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def key(self, position: int) -> str:
        file, record = self._place(position)
        return f"{file}/{record}"

    def _place(self, position: int) -> tuple[str, int]:
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.files[which], position - self.starts[which]


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 10 classes, 32 x 32 pixels. The test file tests; of the training images a tenth, by hash, validates.

    ``path`` is the unpacked folder; without it $EDGEJOULE_DATA/cifar-10-batches-bin, else data/cifar-10-batches-bin below the working
    directory. Fewer or smaller batches than the original's are taken as they are; of the original's, none may be missing.
    """

    path: str | None = None

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def dataset(self) -> str:
        return "cifar-10"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names in batches.meta.txt. Raises DataError where there are not ten."""
        file = self._folder() / "batches.meta.txt"
        try:
            names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(self.probe() or f"cannot read {file} ({error}): unpack CIFAR-10 again") from error
        if len(set(names)) != CLASSES or len(names) != CLASSES:
            raise DataError(f"{file} names {len(set(names))} classes: expected {CLASSES}, one a line; unpack CIFAR-10 again")
        return names

    def probe(self) -> str | None:
        folder = self._folder()
        return None if is_folder(folder) else f"no folder {folder} with CIFAR-10's binary version; {HAD}, or give path="

    def origin(self) -> str:
        """A hash of all records, the names and the rule of the split. Raises DataError."""
        files = (*self._training.files, *self._testing.files)
        hashes = [hashlib.sha256(_content(self._folder() / file)).hexdigest() for file in files]
        return origin_of(f"cifar10 {VALIDATION} {self.classes} {hashes}")

    def split(self, name: Part) -> Split:
        """Raises DataError for a file that is missing, not whole or has a label above 9; it is named."""
        if name == "test":
            return Split(self._testing, np.arange(len(self._testing), dtype=np.int64))
        return split_of(self.dataset, self._training, self._parts, name, VALIDATION)

    def _folder(self) -> Path:
        if self.path is not None:
            return place(self.path)
        return place(os.environ.get("EDGEJOULE_DATA") or "data") / FOLDER

    @functools.cached_property
    def _training(self) -> Records:
        folder, remedy = self._folder(), self.probe()
        if remedy:
            raise DataError(remedy)
        there = [n for n in range(1, BATCHES + 1) if (folder / f"data_batch_{n}.bin").exists()]
        records = _records(folder, [f"data_batch_{n}.bin" for n in range(1, max(there, default=1) + 1)])
        if len(there) < BATCHES and ORIGINAL in np.diff(records.starts):
            raise DataError(f"{folder} lacks data_batch_{len(there) + 1}.bin of the original's {BATCHES}: unpack CIFAR-10 again")
        return records

    @functools.cached_property
    def _testing(self) -> Records:
        if remedy := self.probe():
            raise DataError(remedy)
        return _records(self._folder(), ["test_batch.bin"])

    @functools.cached_property
    def _parts(self) -> dict[Part, Positions]:
        return cut((self._training.key(n) for n in range(len(self._training))), VALIDATION, 0.0)


def _records(folder: Path, files: list[str]) -> Records:
    """Checks the files and reads their labels."""
    starts, labels = [0], []
    for file in files:
        found = np.frombuffer(_content(folder / file), np.uint8).reshape(-1, RECORD)[:, 0].copy()  # (N,)
        if len(wrong := np.flatnonzero(found >= CLASSES)):
            raise DataError(
                f"{folder / file} has the label {found[wrong[0]]} at record {wrong[0]}: expected 0 to {CLASSES - 1}; "
                "it is another format (CIFAR-100?) or damaged"
            )
        labels.append(found)
        starts.append(starts[-1] + len(found))
    return Records(str(folder), tuple(files), tuple(starts), np.concatenate(labels))


def _content(path: Path) -> bytes:
    """A whole file of records, 30 MB in the original."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error}): {HAD}") from error
    if not content or len(content) % RECORD:
        raise DataError(f"{path} has {len(content)} bytes, which is no whole number of records of {RECORD}: unpack CIFAR-10 again")
    return content
