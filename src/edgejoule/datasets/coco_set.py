"""The leaf ``coco(path="...")``: a folder in COCO's layout as data to train and judge detectors on.

    annotations/instances_{train2017,val2017}.json    {train2017,val2017}/*.jpg

The splits are the folder's own. COCO publishes no boxes for its test images, so there is no split ``test``.
Other sets in this format come in by their split names: ``coco(path="...", train="train", validation="val", dataset="mine")``.
Knows no model. Torch is imported when a split is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from edgejoule.datasets.coco_json import CocoAnnotations, read_annotations
from edgejoule.errors import DataError, SpecError
from edgejoule.plain import digest

if TYPE_CHECKING:
    from edgejoule.datasets.coco import CocoDetection


@dataclass(frozen=True, slots=True)
class CocoSet:
    """``path`` is the folder that holds ``annotations`` and the image folders; ``train`` and ``validation`` name the image folders.

    ``masks=False`` reads boxes only, for sets without segmentations.
    """

    path: str
    masks: bool = True
    train: str = "train2017"
    validation: str = "val2017"
    dataset: str = "coco"

    def __post_init__(self) -> None:
        if self.train == self.validation:
            raise SpecError(f"coco: train and validation are both {self.train!r}: expected two image folders, each with its annotations")

    @property
    def kind(self) -> Literal["detection"]:
        return "detection"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label - 1: labels are 1..K in the order of the category identities. Read from the validation split's annotations.

        Raises DataError.
        """
        return _annotations(self._annotation_file(self.validation)).category_names

    def probe(self) -> str | None:
        """None, or what is missing and how to get it."""
        root = Path(self.path).expanduser()
        for name in (self.train, self.validation):
            for needed in (self._annotation_file(name), root / name):
                if not needed.exists():
                    return f"no {needed}: unpack COCO's images and annotations there (cocodataset.org), or name the folder that holds them"
        if importlib.util.find_spec("pycocotools") is None:
            return "COCO masks and scores need pycocotools, which is not installed: pip install 'edgejoule[dense]'"
        return None

    def origin(self) -> str:
        """Sha256 over both annotation files' bytes and every image's name and size in bytes: copies are equal. Raises DataError."""
        found = []
        for name in (self.train, self.validation):
            folder = Path(self.path).expanduser() / name
            try:
                with self._annotation_file(name).open("rb") as stream:
                    annotations = _sha256(stream)
                with os.scandir(folder) as entries:
                    images = sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {folder} or its annotations ({error}): expected COCO's layout there") from error
            found.append([annotations, images])
        return digest([self.masks, found])

    def split(self, name: Literal["train", "validation", "test"]) -> CocoDetection:
        """Images as they are, with targets. Raises DataError for what is missing or malformed, and for ``test``."""
        from edgejoule.datasets.coco import CocoDetection

        folders = {"train": self.train, "validation": self.validation}
        if name not in folders:
            raise DataError(f"coco has no split {name!r} with published boxes: expected train or validation")
        annotations = _annotations(self._annotation_file(folders[name]))
        return CocoDetection(Path(self.path).expanduser() / folders[name], annotations, masks=self.masks)

    def _annotation_file(self, name: str) -> Path:
        return Path(self.path).expanduser() / "annotations" / f"instances_{name}.json"


def _sha256(stream: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := stream.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def _annotations(file: Path) -> CocoAnnotations:
    try:
        stat = file.stat()
    except (OSError, ValueError) as error:
        raise DataError(f"no annotation file {file} ({error}): expected COCO's instances_*.json") from error
    return _read_once(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read_once(file: Path, size: int, changed_ns: int) -> CocoAnnotations:
    """COCO's training annotations are 450 MB of JSON: read once for names and splits, and again only if the file has changed."""
    return read_annotations(file)
