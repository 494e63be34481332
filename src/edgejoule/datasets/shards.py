"""The headers of one tar shard, as WebDataset groups members into samples. Knows no images and no splits."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from edgejoule.datasets.labelled import UNLABELLED, shown
from edgejoule.errors import DataError

MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)  # as webdataset: the suffix begins at the first dot of the file's name
BLOCK = 512  # bytes of a tar header, and of the zeros that end a tar file
LONGEST_LABEL = 4096  # bytes
MOST_CLASSES = 100_000  # where no names say how many there are
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@dataclass(slots=True)
class Shard:
    """Lists of one length: a sample each, in the order of the file."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # -1: no image
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)  # all there are


def read_shard(path: str, images: Sequence[str], label: str, names: Sequence[str]) -> Shard:
    """The samples of a shard. ``images``: suffixes of an image, the first that a sample has counts; ``label``: suffix of its class.

    Neighbouring members of one key are a sample. A label that is missing or no class is UNLABELLED. Raises DataError where the file is
    missing, compressed, no tar file, damaged or cut short, or has a key twice: webdataset would make two halves of one sample.
    """
    found = Shard()
    seen: set[str] = set()
    rank = {suffix: number for number, suffix in enumerate(images)}
    best = len(images)
    try:
        with Path(path).open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all, which is gigabytes for ImageNet
                parts = MEMBER.fullmatch(member.name) if member.isreg() and not member.issparse() else None
                if parts is None:
                    continue
                key, suffix = parts[1], parts[2].lower()
                if not found.keys or found.keys[-1] != key:
                    if key in seen:
                        raise DataError(f"{path} has the sample {shown(key)} twice: write the shard with its samples' parts side by side")
                    seen.add(key)
                    best = len(images)
                    _append(found, key)
                found.suffixes.add(suffix)
                if rank.get(suffix, best) < best:
                    best = rank[suffix]
                    found.offsets[-1], found.sizes[-1] = member.offset_data, member.size
                elif suffix == label:
                    reader = tar.extractfile(member)
                    found.labels[-1] = _label(reader.read(LONGEST_LABEL) if reader else b"", names)
            _check_end(path, stream, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        with_what = "is compressed" if _compressed(path) else f"cannot be read ({str(error) or type(error).__name__})"
        raise DataError(f"the shard {path} {with_what}: expected a whole tar file, not compressed; unpack or copy it again") from error
    return found


def _append(shard: Shard, key: str) -> None:
    shard.keys.append(key)
    shard.offsets.append(-1)
    shard.sizes.append(0)
    shard.labels.append(UNLABELLED)


def _label(content: bytes, names: Sequence[str]) -> int:
    """A class's name, or its number as text."""
    text = content.decode("utf-8", "replace").strip()
    if text in names:
        return names.index(text)
    if not re.fullmatch(r"[0-9]{1,6}", text):
        return UNLABELLED
    return int(text) if int(text) < (len(names) or MOST_CLASSES) else UNLABELLED


def _check_end(path: str, stream: BinaryIO, offset: int) -> None:
    """tarfile takes the first header that it cannot read for the end. A whole tar file ends with blocks of zeros."""
    stream.seek(offset)
    if stream.read(BLOCK) != bytes(BLOCK):
        raise DataError(f"the shard {path} is damaged or cut short at byte {offset}: expected a whole tar file; copy it again")


def _compressed(path: str) -> bool:
    try:
        with Path(path).open("rb") as stream:
            return stream.read(6).startswith(COMPRESSED)
    except OSError:
        return False
