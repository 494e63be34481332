"""Local WebDataset shards: tar files whose members ``KEY.jpg`` and ``KEY.cls`` are one sample. Needs the standard library and Pillow.

The headers of all shards are read once, in order; afterwards a sample is one read at a known place, so that order is the loop's own and
not the shards'. Knows no network: remote shards are copied first.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule.datasets.labelled import UNLABELLED, Names, Split, decode, folder_name, origin_of, place, shown, split_of
from edgejoule.datasets.shards import Shard, read_shard
from edgejoule.datasets.split import PARTS, Part, Positions, check_fractions, cut
from edgejoule.errors import BadImageError, DataError, SpecError

MOST_SHARDS = 1_000_000
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Where every sample lies."""

    shards: tuple[str, ...]
    shard: Integers  # (N,) which of shards
    offset: Integers  # (N,) of the image's first byte, -1 where the sample has no image
    size: Integers  # (N,) bytes of the image
    labels: Integers  # (N,) UNLABELLED where the sample has none
    keys: Names

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, position: int) -> Any:
        path, size = Path(self.shards[self.shard[position]]), int(self.size[position])
        name = f"{self.keys[position]} of {path}"
        if self.offset[position] < 0:
            raise BadImageError(f"the sample {shown(name)} has no image: mend the shard, or name the image's suffix with image=")
        try:
            with path.open("rb") as stream:
                stream.seek(int(self.offset[position]))
                content = stream.read(size)
        except OSError as error:
            raise BadImageError(f"cannot read {shown(name)} ({error.strerror or error}): copy the shard again") from error
        if len(content) < size:
            raise BadImageError(f"{path} ends before {shown(self.keys[position])}, which it had before: copy the shard again")
        return decode(content, name)

    def label(self, position: int) -> int:
        found = int(self.labels[position])
        if found == UNLABELLED:
            path = self.shards[self.shard[position]]
            raise BadImageError(f"the sample {shown(self.keys[position])} of {path} has no label that is one: mend the shard")
        return found

    def key(self, position: int) -> str:
        return shown(self.keys[position])


@dataclass(frozen=True)
class WebDataset:
    """Samples of local tar shards: ``path`` is a file, a glob or a brace pattern ("train-{000..009}.tar").

    ``image`` lists the suffixes an image may have, ``label`` names the part with the class: a whole number from 0, or one of the names.
    The names are ``names``, else the lines of a classes.txt beside the shards, else "0" to the largest label. ``test_path`` is a pattern of
    test shards; without it a share ``test`` of the samples is cut by hash, as the share ``validation`` is in any case. What is hashed is
    the shard's name and the sample's key: sharding anew cuts anew.
    """

    path: str
    image: str = "jpg;jpeg;png;webp"
    label: str = "cls"
    validation: float = 0.1
    test: float = 0.0
    test_path: str = ""
    names: tuple[str, ...] | list[str] = ()

    def __post_init__(self) -> None:
        check_fractions(self.validation, self.test)
        if self.test and self.test_path:
            raise SpecError("webdataset takes test= or test_path=, not both: the shards of test_path are the test split")
        if not all(isinstance(name, str) for name in self.names) or len(set(self.names)) < len(self.names):
            raise SpecError(f"names={self.names!r} does not fit: expected different texts, as in ('ant', 'bee')")
        object.__setattr__(self, "names", tuple(self.names))

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def dataset(self) -> str:
        return folder_name(place(self.path).parent)

    @property
    def classes(self) -> tuple[str, ...]:
        """Raises DataError."""
        if names := self._names:
            return names
        samples, _ = self._listing
        return tuple(str(label) for label in range(int(samples.labels.max()) + 1))

    def probe(self) -> str | None:
        try:
            for pattern in filter(None, (self.path, self.test_path)):
                shards_of(pattern)
        except DataError as error:
            return str(error)
        return None

    def origin(self) -> str:
        """A hash of all keys with sizes and labels, and of how they are split. Raises DataError."""
        samples, parts = self._listing
        columns = (samples.size, samples.labels, samples.keys.ends, *(parts[part] for part in PARTS))
        return origin_of(f"webdataset {self.classes}", samples.keys.content, *columns)

    def split(self, name: Part) -> Split:
        """Raises DataError for shards that are missing, remote, compressed or cut short, and where no sample has an image and a label."""
        samples, parts = self._listing
        share = {"train": 1.0, "validation": self.validation, "test": 1.0 if self.test_path else self.test}
        return split_of(self.dataset, samples, parts, name, share.get(name, 0))

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        file = Path(shards_of(self.path)[0]).parent / "classes.txt"
        if self.names or not file.is_file():
            return tuple(self.names)
        try:
            names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the class names in {file} ({error}): expected UTF-8 text, a name a line") from error
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(f"{file} names {twice[0]!r} twice: expected different names, one a line")
        return names

    @functools.cached_property
    def _listing(self) -> tuple[Samples, dict[Part, Positions]]:
        own, held = shards_of(self.path), shards_of(self.test_path) if self.test_path else []
        if both := {os.path.realpath(file) for file in own} & {os.path.realpath(file) for file in held}:
            raise DataError(f"{min(both)} is in both path and test_path: a test shard must not be trained on")
        suffixes = tuple(each.strip().lower().lstrip(".") for each in self.image.split(";") if each.strip())
        label = self.label.strip().lower().lstrip(".")
        read = [read_shard(file, suffixes, label, self._names) for file in (*own, *held)]
        keys = [f"{name}/{key}" for name, shard in zip(_short(own), read, strict=False) for key in shard.keys]
        cuts = cut(map(shown, keys), self.validation, self.test)
        count = len(keys)
        keys += [f"test:{name}/{key}" for name, shard in zip(_short(held), read[len(own) :], strict=True) for key in shard.keys]
        if held:
            cuts["test"] = np.arange(count, len(keys), dtype=np.int64)
        samples = _joined((*own, *held), read, Names.of(keys))
        _check(samples, read, suffixes, label)
        return samples, cuts


def shards_of(pattern: str) -> list[str]:
    """The files that a pattern names, absolute, sorted within each part of a brace pattern. Raises DataError where one is not there."""
    if re.match(r"[a-z0-9+]+://|pipe:", pattern, re.IGNORECASE):
        raise DataError(f"the shards {pattern} are remote, and samples are read by position: copy them to a local folder and name that")
    found: dict[str, None] = {}
    for each in expand(str(place(pattern))):
        matches = [each] if os.path.isfile(each) or "\0" in each else sorted(filter(os.path.isfile, glob.glob(each)))  # noqa: PTH113, PTH207
        if not matches or "\0" in each:
            raise DataError(f"no shard {each!r}: expected tar files, named by a glob or as in train-{{000..009}}.tar")
        found |= dict.fromkeys(matches)
    return list(found)


def expand(pattern: str) -> list[str]:
    """A brace pattern as a shell expands it: ``{000..009}`` counts, keeping the width, ``{a,b}`` lists. Raises DataError for too many."""
    choices: list[Sequence[str]] = []
    count, end = 1, 0
    for found in re.finditer(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*,[^{}]*))\}", pattern):
        listed = found[3].split(",") if found[3] is not None else []
        count *= len(listed) or abs(int(found[2]) - int(found[1])) + 1
        if count > MOST_SHARDS:
            raise DataError(f"{pattern[:80]} stands for more than {MOST_SHARDS} shards: expected fewer")
        choices += [[pattern[end : found.start()]], listed or _counted(found[1], found[2])]
        end = found.end()
    return ["".join(parts) for parts in itertools.product(*choices, [pattern[end:]])]


def _counted(first: str, last: str) -> list[str]:
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _short(shards: Sequence[str]) -> list[str]:
    """The shards' paths below the folder that holds them all: a copy of that folder has the same."""
    root = os.path.commonpath([os.path.dirname(file) for file in shards]) if shards else ""  # noqa: PTH120
    return [os.path.relpath(file, root) for file in shards]


def _joined(shards: tuple[str, ...], read: Sequence[Shard], keys: Names) -> Samples:
    def column(name: str) -> Integers:
        return np.concatenate([np.asarray(getattr(shard, name), dtype=np.int64) for shard in read])

    which = np.repeat(np.arange(len(read), dtype=np.int64), [len(shard.keys) for shard in read])
    return Samples(shards, which, column("offsets"), column("sizes"), column("labels"), keys)


def _check(samples: Samples, read: Sequence[Shard], suffixes: Sequence[str], label: str) -> None:
    """Raises DataError where no sample at all is sound: then the options are wrong, not the samples."""
    there = ", ".join(sorted({suffix for shard in read for suffix in shard.suffixes})[:8]) or "no files"
    if not (samples.offset >= 0).any():
        raise DataError(f"no sample of {samples.shards[0]} … has an image {' or '.join(suffixes)}: it has {there}; name one with image=")
    if not (samples.labels >= 0).any():
        raise DataError(f"no sample of {samples.shards[0]} … has a class in {label}: it has {there}; name the part with label=")
