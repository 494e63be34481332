"""What labelled sets share: a split as some positions of a source, bytes or a file as an upright RGB picture, names packed for workers.

Knows no format of any set and no tensors. Everything here can be pickled and sent to a worker process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgejoule.datasets.split import RULE, Part, Positions, check_filled
from edgejoule.errors import BadImageError

UNLABELLED = -1  # a label that is missing or cannot be read: its image is a bad one


class Source(Protocol):
    """Labelled images by their position in the original set, from 0. Picklable, and small when pickled."""

    def __len__(self) -> int: ...
    def image(self, position: int) -> Any: ...  # PIL image, RGB, upright; raises BadImageError
    def label(self, position: int) -> int: ...  # raises BadImageError
    def key(self, position: int) -> str: ...


@dataclass(frozen=True, eq=False)
class Split:
    """Some images of a source: seams.LabelledImages. An index below 0 or beyond the end is an IndexError, as iteration needs."""

    source: Source
    positions: Positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = self._position(index)
        label = self.source.label(position)  # first: an image without a label need not be decoded
        return self.source.image(position), label

    def key(self, index: int) -> str:
        return self.source.key(self._position(index))

    def _position(self, index: int) -> int:
        if not 0 <= operator.index(index) < len(self.positions):
            raise IndexError(f"no image {index}: the split has {len(self.positions)}")
        return int(self.positions[index])


def split_of(dataset: str, source: Source, parts: dict[Part, Positions], part: Part, fraction: float) -> Split:
    """The split called ``part``. Raises DataError where it is empty although ``fraction`` asked for some, or is none of the three."""
    positions = parts.get(part, np.empty(0, np.int64))
    check_filled(dataset, part, positions, fraction)
    return Split(source, positions)


def origin_of(said: str, *columns: npt.NDArray[Any] | bytes) -> str:
    """A hash of some text, of the rule of splits, and of arrays and bytes, each with its length: none runs into the next."""
    hashed = hashlib.sha256(f"rule {RULE} {said}\n".encode("utf-8", "backslashreplace"))
    for column in columns:
        content = column if isinstance(column, bytes) else np.ascontiguousarray(column).astype(column.dtype.newbyteorder("<")).tobytes()
        hashed.update(f"{len(content)}\n".encode() + content)
    return hashed.hexdigest()


@dataclass(frozen=True, eq=False)
class Names:
    """Many texts in two buffers: a million Python strings would be copied into every worker as soon as it counts references."""

    content: bytes
    ends: npt.NDArray[np.int64]  # (N,)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        encoded = [os.fsencode(text) for text in texts]
        return cls(b"".join(encoded), np.cumsum([len(each) for each in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.content[start : int(self.ends[index])])

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def shown(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are no UTF-8 are written out (``\\xff``)."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file that is there
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def place(path: str) -> Path:
    """An absolute path; ``~`` is a home folder where there is one. Looks at no file."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:  # the home of a user who is none
        return Path(path).absolute()


def is_folder(path: Path) -> bool:
    """Of any path: pathlib raises for some that can not be, such as one of 5000 characters."""
    return os.path.isdir(path)  # noqa: PTH112


def folder_name(path: Path) -> str:
    """What a set in this folder is called in tables. Looks at no file."""
    return shown(Path(os.path.normpath(path.absolute())).name) or "data"


def decode(content: bytes | Path, name: str) -> Any:
    """An encoded image, or a file of one, as a PIL image: RGB, turned upright as its EXIF says.

    Grey, palette and CMYK images are converted, 16 bits a channel become 8, transparency is dropped, of an animation the first picture is
    taken. Raises BadImageError naming ``name``: missing, empty, damaged, truncated, too large, or with pixels of no fixed range.
    """
    from PIL import Image, ImageOps

    stream: Any = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with Image.open(stream) as image:
            upright: Any = image
            with contextlib.suppress(Exception):  # a damaged EXIF block; damaged pixels are noticed below
                upright = ImageOps.exif_transpose(image)
            return _rgb(upright)
    except Exception as error:  # Pillow's many decoders raise whatever damaged bytes lead them to
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"cannot read the image {shown(name)} ({said}): mend or remove it") from error


def _rgb(image: Any) -> Any:
    """Any mode -> RGB, by value rather than by clipping."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no fixed range")
    if image.mode.startswith("I"):  # 16 bits grey, which Pillow would clip
        wide = np.asarray(image).astype(np.int64)  # (H, W)
        return Image.fromarray((np.clip(wide, 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    picture = image.convert("RGB")
    picture.load()
    return picture
