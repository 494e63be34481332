"""What Hugging Face ``datasets`` reads: a folder made by save_to_disk, a folder of Parquet or Arrow files, or a name on the hub.

``datasets`` finds, downloads and opens; here its rows become labelled images. Knows no format of a file. Needs ``edgejoule[data]``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule.datasets.labelled import UNLABELLED, Split, decode, folder_name, is_folder, origin_of, place, split_of
from edgejoule.datasets.split import PARTS, Part, Positions, check_fractions, cut
from edgejoule.errors import BadImageError, DataError

MISSING = "huggingface needs the library datasets, which is not installed: pip install 'edgejoule[data]'"
VALIDATIONS = ("validation", "valid", "val", "dev")
MOST_CLASSES = 100_000
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one or several of the set's own splits, one after the other. Undecoded: an image is a file's bytes, or its path."""

    tables: tuple[Any, ...]  # datasets.Dataset, mapped from disk in every process
    names: tuple[str, ...]  # the splits'
    starts: tuple[int, ...]  # first position of each, and the end of the last
    labels: Integers  # (N,)
    column: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, position: int) -> Any:
        which, row = self._place(position)
        try:
            found = self.tables[which][row][self.column]
        except Exception as error:  # whatever the library and its many parts raise
            raise BadImageError(
                f"cannot read row {self.key(position)} ({type(error).__name__}: {error}): download the set again"
            ) from error
        if isinstance(found, Mapping) and found.get("bytes"):
            return decode(found["bytes"], f"of row {self.key(position)}")
        if isinstance(found, Mapping) and found.get("path"):
            return decode(Path(found["path"]), found["path"])
        raise BadImageError(f"row {self.key(position)} has no image in {self.column!r}: mend the set")

    def label(self, position: int) -> int:
        found = int(self.labels[position])
        if found < 0:
            raise BadImageError(f"row {self.key(position)} has no label: mend the set")
        return found

    def key(self, position: int) -> str:
        which, row = self._place(position)
        return f"{self.names[which]}/{row}"

    def _place(self, position: int) -> tuple[int, int]:
        which = int(np.searchsorted(self.starts, position, side="right")) - 1
        return which, position - self.starts[which]


@dataclass(frozen=True)
class HuggingFace:
    """A set of the library ``datasets`` with a column of images and one of labels: classes, whole numbers from 0, or texts.

    ``path`` is a folder, or a name on the hub with its configuration ``config``. The set's own splits are used: train, test, and
    validation (valid, val, dev). Where no test split has labels, the validation split *is* the test split, as ImageNet's is: a score then
    compares with published ones. What is lacking is cut from train by a hash of the row's number: shares ``validation`` and ``test``.
    Classes are the column's own names; else "0" to the largest number; else the texts, sorted.
    """

    path: str
    image: str = "image"
    label: str = "label"
    config: str | None = None
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        check_fractions(self.validation, self.test)

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def dataset(self) -> str:
        folder = place(self.path)
        return folder_name(folder) if is_folder(folder) else self.path

    @property
    def classes(self) -> tuple[str, ...]:
        return self._opened[1]

    def probe(self) -> str | None:
        from importlib.util import find_spec

        if not find_spec("datasets"):
            return MISSING
        if self.path.startswith(("/", ".", "~")) and not is_folder(place(self.path)):
            return f"no folder {self.path}: expected one that save_to_disk made, one of Parquet files, or a name on the hub"
        return None

    def origin(self) -> str:
        """A hash of labels, classes, sizes of the images and how they are split; not of where the set lies or how it was made.

        An image whose pixels were changed while its size was not is taken for the same. Raises DataError.
        """
        rows, classes, parts, _ = self._opened
        sizes = [_sizes(table, self.image) for table in rows.tables]
        return origin_of(f"huggingface {classes} {rows.names}", rows.labels, *sizes, *(parts[part] for part in PARTS))

    def split(self, name: Part) -> Split:
        """Raises DataError where the set cannot be opened or lacks the columns."""
        rows, _, parts, fractions = self._opened
        return split_of(self.dataset, rows, parts, name, fractions.get(name, 0))

    @functools.cached_property
    def _opened(self) -> tuple[Rows, tuple[str, ...], dict[Part, Positions], dict[Part, float]]:
        if remedy := self.probe():
            raise DataError(remedy)
        homes, tables = _own_splits(_load(self.path, self.config), self.path)
        tables = {name: _checked(table, self.image, self.label, f"{self.path}, split {name}") for name, table in tables.items()}
        classes, labels = _classes([tables[home] for home in homes.values()], self.label)
        by_part = dict(zip(homes, labels, strict=True))
        if "test" in homes and (by_part["test"] < 0).all():  # a challenge's: its labels are not published
            del homes["test"], by_part["test"]
        if "test" not in homes and "validation" in homes:
            homes["test"], by_part["test"] = homes.pop("validation"), by_part.pop("validation")
        starts = tuple(int(end) for end in np.cumsum([0, *map(len, by_part.values())]))
        rows = Rows(
            tuple(tables[home] for home in homes.values()), tuple(homes.values()), starts, np.concatenate([*by_part.values()]), self.image
        )
        shares: dict[Part, float] = {"validation": self.validation, "test": self.test}
        fractions: dict[Part, float] = {**shares, "train": 1.0, **dict.fromkeys(homes, 1.0)}
        own = {part: np.arange(starts[n], starts[n + 1], dtype=np.int64) for n, part in enumerate(homes)}
        cuts = cut(map(rows.key, own["train"].tolist()), *(0.0 if part in homes else share for part, share in shares.items()))
        return (
            rows,
            classes,
            {part: own[part] if part in homes and part != "train" else own["train"][cuts[part]] for part in cuts},
            fractions,
        )


def _load(path: str, config: str | None) -> Any:
    """A DatasetDict or Dataset. Raises DataError."""
    import datasets

    folder = place(path)
    try:
        if (there := is_folder(folder)) and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder) if there else path, config)
    except Exception as error:  # the library raises what its file systems, formats and the network raise
        said = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(
            f"datasets cannot open {path} ({said}): expected a folder that save_to_disk made, Parquet files, or a name on the hub"
        ) from error


def _own_splits(found: Any, path: str) -> tuple[dict[Part, str], dict[str, Any]]:
    """Which of the set's own splits is which of ours."""
    tables: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {"train": found}
    homes: dict[Part, str] = {}
    if "train" in tables or len(tables) == 1:
        homes["train"] = "train" if "train" in tables else next(iter(tables))
    else:
        raise DataError(f"{path} has the splits {', '.join(tables) or 'none'}, and none is called train: expected train, validation, test")
    if named := next((name for name in VALIDATIONS if name in tables and name != homes["train"]), None):
        homes["validation"] = named
    if "test" in tables and homes["train"] != "test":
        homes["test"] = "test"
    return homes, {name: tables[name] for name in homes.values()}


def _checked(table: Any, image: str, label: str, where: str) -> Any:
    """The table with images left undecoded. Raises DataError where a column is missing or holds something else."""
    import datasets

    for column in (image, label):
        if column not in table.features:
            raise DataError(f"{where}, has no column {column!r}: it has {', '.join(table.features)}; name it with image= or label=")
    if not isinstance(table.features[image], datasets.Image):
        raise DataError(f"{where}: the column {image!r} holds {table.features[image]}, not images; name another with image=")
    return table.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)).with_format(None)


def _classes(tables: list[Any], label: str) -> tuple[tuple[str, ...], list[Integers]]:
    """Names, and each table's labels as whole numbers, UNLABELLED where there is none."""
    import pyarrow  # type: ignore[import-untyped]

    feature = tables[0].features[label]
    if len({str(table.features[label]) for table in tables}) > 1:
        raise DataError(f"the splits disagree about what {label!r} holds: expected the same classes in all")
    columns = [_column(table, label, 0, len(table)) for table in tables]
    kind, names = columns[0].type, tuple(getattr(feature, "names", None) or ())
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        texts = [column.to_pylist() for column in columns]
        names = tuple(sorted({text for column in texts for text in column if text}))
        number = {name: n for n, name in enumerate(names)}
        labels = [np.array([number.get(text, UNLABELLED) for text in column], dtype=np.int64) for column in texts]
    elif pyarrow.types.is_integer(kind):
        labels = [column.cast(pyarrow.int64(), safe=False).fill_null(UNLABELLED).to_numpy() for column in columns]
    else:
        raise DataError(f"the column {label!r} holds {kind}: expected classes, whole numbers or texts; name another with label=")
    top = max((int(column.max()) for column in labels if len(column)), default=UNLABELLED)
    names = names or tuple(map(str, range(min(top, MOST_CLASSES) + 1)))
    if not 0 <= top < len(names):
        raise DataError(f"the largest label in {label!r} is {top}: expected 0 to {max(len(names), 1) - 1}; name another column with label=")
    return names, labels


def _column(table: Any, name: str, start: int, stop: int) -> Any:
    """A piece of a column as pyarrow holds it, undecoded and, where rows lie in order, not copied. Raises DataError."""
    import pyarrow

    try:
        read = table.select_columns([name]).with_format("arrow")[start:stop][name]
    except Exception as error:  # whatever the library and its many parts raise
        raise DataError(f"cannot read the column {name!r} ({type(error).__name__}: {error}): download or save the set again") from error
    return read if isinstance(read, pyarrow.ChunkedArray) else pyarrow.chunked_array([read])


def _sizes(table: Any, image: str) -> Integers:
    """How many bytes each image has, from the offsets alone; of an image that is a path, what its file has; else -1."""
    import pyarrow.compute  # type: ignore[import-untyped]

    sizes = [np.empty(0, np.int64)]
    for start in range(0, len(table), 10_000):
        for chunk in _column(table, image, start, start + 10_000).chunks:  # struct of bytes and path; joined, they would be copied
            content, path = (chunk.flatten()[chunk.type.get_field_index(name)] for name in ("bytes", "path"))
            lengths = pyarrow.compute.binary_length(content).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            for row in np.flatnonzero(lengths < 0).tolist():
                lengths[row] = _file_size(path[row].as_py())
            sizes.append(lengths)
    return np.concatenate(sizes)


def _file_size(path: str | None) -> int:
    try:
        return Path(path).stat().st_size if path else -1
    except OSError:
        return -1
