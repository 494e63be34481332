"""The leaf ``ade20k(path="...")``: a folder in the ADEChallengeData2016 layout as data to train and judge segmenters on.

    images/{training,validation}/*.jpg    annotations/{training,validation}/*.png    objectInfo150.txt (class names, where it is there)

The splits are the folder's own; the challenge's test images have no published labels, so there is no split ``test``.
Knows no model. Torch is imported when a split is asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgejoule.errors import DataError, SpecError
from edgejoule.plain import digest

if TYPE_CHECKING:
    from edgejoule.datasets.ade20k import Ade20k

NAMES = "objectInfo150.txt"
MOST_CLASSES = 254  # labels are bytes, and 255 is ignored
SPLITS = {"train": "training", "validation": "validation"}


@dataclass(frozen=True, slots=True)
class Ade20kSet:
    """``path`` is the folder that holds ``images`` and ``annotations``; label maps hold 1..``num_classes``, and 0 for unlabelled."""

    path: str
    num_classes: int = 150
    dataset: str = "ade20k"

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MOST_CLASSES:
            raise SpecError(f"ade20k(num_classes={self.num_classes}) does not fit: expected 1 to {MOST_CLASSES}")

    @property
    def kind(self) -> Literal["segmentation"]:
        return "segmentation"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label, from ``objectInfo150.txt`` where it names every class, else ``class 1`` and so on."""
        numbered = tuple(f"class {number}" for number in range(1, self.num_classes + 1))
        try:
            lines = (self._root / NAMES).read_text(encoding="utf-8", errors="replace").splitlines()
        except (OSError, ValueError):
            return numbered
        rows = [line.split("\t") for line in lines]
        names = {row[0].strip(): row[-1].strip() for row in rows if len(row) > 1}
        found = [names.get(str(number), "") for number in range(1, self.num_classes + 1)]
        return tuple(found) if all(found) and len(set(found)) == len(found) else numbered

    def probe(self) -> str | None:
        """None, or what is missing and how to get it."""
        for folder in self._folders():
            if not folder.is_dir():
                return f"no folder {folder}: unpack ADEChallengeData2016.zip there, or name the folder that holds images and annotations"
        return None

    def origin(self) -> str:
        """Sha256 over every label map's bytes and every image's name and size in bytes: copies are equal. Raises DataError."""
        found: list[list[list[str | int]]] = []
        for folder in self._folders():
            try:
                files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and file.is_file())
                if folder.parent.name == "annotations":
                    found.append([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])
                else:
                    found.append([[file.name, file.stat().st_size] for file in files])
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {folder} ({error}): expected ADE20K's layout there") from error
        return digest([self.num_classes, found])

    def split(self, name: Literal["train", "validation", "test"]) -> Ade20k:
        """Crops for ``train`` and whole images for ``validation``, at ADE20K's usual size of 512. Raises DataError, also for ``test``."""
        from edgejoule.datasets.ade20k import Ade20k

        if name not in SPLITS:
            raise DataError(f"ade20k has no split {name!r} with published labels: expected train or validation")
        folder: Literal["training", "validation"] = "training" if name == "train" else "validation"
        return Ade20k(self._root, folder, classes=self.num_classes)

    @property
    def _root(self) -> Path:
        return Path(self.path).expanduser()

    def _folders(self) -> list[Path]:
        return [self._root / kind / split for kind in ("images", "annotations") for split in SPLITS.values()]
