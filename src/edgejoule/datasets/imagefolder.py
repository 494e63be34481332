"""A folder of class folders, as ImageNet is laid out. Knows the layout and the file names; pixels only when asked for.

    root/ant/1.jpg  root/bee/2.png …                          cut into three by hash
    root/train/ant/…  root/val/ant/…  (root/test/ant/…)       the author's own splits

Made for millions of files: listing the folders tells files from folders, so that no file is touched before it is read; only ``origin``
asks for sizes. Hidden files and folders, and files that are no images by their suffix, are passed over.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule.data import SUFFIXES
from edgejoule.datasets.labelled import Names, Split, decode, folder_name, is_folder, place, shown, split_of
from edgejoule.datasets.split import RULE, Part, Positions, check_fractions, cut
from edgejoule.errors import DataError

SPLITS: dict[str, Part] = {"train": "train", "val": "validation", "validation": "validation", "valid": "validation", "test": "test"}
ENDINGS = tuple(SUFFIXES)


@dataclass(frozen=True, eq=False)
class Files:
    """The images below a folder, sorted."""

    root: str
    names: Names  # relative to root, with "/"
    labels: npt.NDArray[np.int32]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, position: int) -> Any:
        path = Path(self.root, self.names[position])
        return decode(path, str(path))

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def key(self, position: int) -> str:
        return shown(self.names[position])


@dataclass(frozen=True, eq=False)
class Listing:
    """What a scan of the folder finds."""

    classes: tuple[str, ...]
    files: Files
    parts: dict[Part, Positions]
    layout: str  # which folders made which splits: part of the origin
    fractions: dict[Part, float]  # of what was cut by hash; a split of the author's own has 1


@dataclass(frozen=True)
class ImageFolder:
    """Images in class folders; the classes are the folders' names, sorted.

    Class folders directly below ``path`` are cut by hash: about ``validation`` and ``test`` of the images, for good. Folders train/ and
    val/ (or validation/, valid/) and test/ are the author's own splits, and must have the same class folders. Where there is no test/,
    val/ *is* the test split, held out as ImageNet's is, so that a score compares with published ones; the validation split, by which
    things are chosen, is then cut from train/ by hash. What has no folder at all is cut from train/ too.
    """

    path: str
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        check_fractions(self.validation, self.test)

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def dataset(self) -> str:
        return folder_name(self._root())

    @property
    def classes(self) -> tuple[str, ...]:
        return self._listing.classes

    def probe(self) -> str | None:
        root = self._root()
        return None if is_folder(root) else f"no folder {root}: expected one that holds a folder of images for each class"

    def origin(self) -> str:
        """A hash of all names with sizes and of how they are split: no times, so that a copy is the same set.

        An image whose pixels were changed while its size was not is taken for the same. Raises DataError.
        """
        found = self._listing
        hashed = hashlib.sha256(f"imagefolder rule {RULE} {found.layout} {found.fractions}\n".encode())
        for name in found.files.names:
            try:
                size = os.stat(f"{found.files.root}/{name}").st_size  # noqa: PTH116 - a million Path objects would take seconds
            except OSError as error:
                raise DataError(f"cannot look at {found.files.root}/{shown(name)} ({error.strerror}): mend or remove it") from error
            hashed.update(b"%d " % size + os.fsencode(name) + b"\0")
        return hashed.hexdigest()

    def split(self, name: Part) -> Split:
        """Raises DataError where folders are missing, empty or do not agree."""
        found = self._listing
        return split_of(self.dataset, found.files, found.parts, name, found.fractions.get(name, 0))

    def _root(self) -> Path:
        return place(self.path)

    @functools.cached_property
    def _listing(self) -> Listing:
        if remedy := self.probe():
            raise DataError(remedy)
        root = str(self._root())
        folders, loose = _contents(root)
        if not folders:
            what = "only loose files" if loose else "nothing"
            raise DataError(f"{root} holds {what}: expected a folder of images for each class")
        homes = _own_splits(root, folders)
        if not homes:
            classes, names, labels = _classes(root, folders, "")
            fractions: dict[Part, float] = {"train": 1.0, "validation": self.validation, "test": self.test}
            return Listing(classes, Files(root, names, labels), cut(map(shown, names), self.validation, self.test), "classes", fractions)
        return self._own(root, homes)

    def _own(self, root: str, homes: dict[Part, str]) -> Listing:
        """The listing of train/, val/ and test/."""
        found = {part: _classes(f"{root}/{home}", _contents(f"{root}/{home}")[0], f"{home}/") for part, home in homes.items()}
        for part, home in homes.items():
            if odd := set(found[part][0]) ^ set(found["train"][0]):
                raise DataError(f"{root}: train/ and {home}/ do not have the same class folders ({_some(odd)}): add or remove them")
        if "test" not in found and "validation" in found:
            found["test"] = found.pop("validation")
        names = Names.of(name for part in found.values() for name in part[1])
        labels = np.concatenate([part[2] for part in found.values()])
        ends = np.cumsum([0, *(len(part[1]) for part in found.values())])
        parts: dict[Part, Positions] = {part: np.arange(ends[n], ends[n + 1]) for n, part in enumerate(found)}
        fractions: dict[Part, float] = dict.fromkeys(parts, 1.0)
        missing = {"validation": self.validation, "test": self.test}
        wanted = {part: 0.0 if part in found else share for part, share in missing.items()}
        own = parts["train"]
        cuts = cut((shown(names[position]) for position in own), wanted["validation"], wanted["test"])
        parts |= {part: own[inside] for part, inside in cuts.items() if part not in found or part == "train"}
        fractions |= {part: share for part, share in wanted.items() if part not in found}  # type: ignore[misc]
        layout = " ".join(f"{part}={home}" for part, home in homes.items())
        return Listing(found["train"][0], Files(root, names, labels), parts, layout, fractions)


def _own_splits(root: str, folders: list[str]) -> dict[Part, str]:
    """Which folder is which split, where all folders are called as splits are; else none, and they are classes."""
    beside = [name for name in folders if name not in SPLITS]
    if beside and "train" in folders and len(folders) - len(beside) > 1:
        raise DataError(f"{root} holds train/ and another split, and {_some(set(beside))} beside them: move what is no split elsewhere")
    if "train" not in folders or not set(folders) <= set(SPLITS) or not _contents(f"{root}/train")[0]:
        return {}
    homes: dict[Part, str] = {}
    for name in sorted(folders, key=lambda folder: tuple(SPLITS).index(folder)):
        if SPLITS[name] in homes:
            raise DataError(f"{root} has both {homes[SPLITS[name]]}/ and {name}/: keep the one that validates")
        homes[SPLITS[name]] = name
    return homes


def _classes(root: str, folders: list[str], prefix: str) -> tuple[tuple[str, ...], Names, npt.NDArray[np.int32]]:
    """Class names; files relative to the set's root, which is ``root`` without ``prefix``; labels."""
    if not folders:
        raise DataError(f"{root} holds no class folders: expected a folder of images for each class")
    counts, names = [], []
    for name in folders:
        if shown(name) != name:
            raise DataError(f"the class folder {root}/{shown(name)} has a name that is no UTF-8: rename it")
        files = sorted(_images(f"{root}/{name}"))
        if not files:
            raise DataError(f"the class folder {root}/{name} holds no images: fill or remove it")
        names += [f"{prefix}{name}/{file}" for file in files]
        counts.append(len(files))
    return tuple(folders), Names.of(names), np.repeat(np.arange(len(folders), dtype=np.int32), counts)


def _images(folder: str) -> Iterator[str]:
    """Image files at any depth, relative to ``folder``. A folder that links lead to twice is entered once."""
    entered: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        below = waiting.pop()
        if (identity := _identity(f"{folder}/{below}")) in entered:
            continue
        entered.add(identity)
        folders, files = _contents(f"{folder}/{below}")
        yield from (below + file for file in files if file.lower().endswith(ENDINGS))
        waiting += [f"{below}{inner}/" for inner in reversed(folders)]


def _identity(folder: str) -> tuple[int, int]:
    try:
        state = os.stat(folder)  # noqa: PTH116
    except OSError as error:
        raise DataError(f"cannot look at {shown(folder)} ({error.strerror}): expected a folder that may be read") from error
    return state.st_dev, state.st_ino


def _contents(folder: str) -> tuple[list[str], list[str]]:
    """The names of folders and of files in a folder, sorted, without hidden ones."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(f"cannot list {shown(folder)} ({error.strerror}): expected a folder that may be read") from error
    return sorted(folders), sorted(files)


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
