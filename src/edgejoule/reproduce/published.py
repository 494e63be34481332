"""The printed tables that come with the package, cell by cell as text: a number keeps the digits it was printed with.

Standard library only. Knows file names and columns, not what a column means.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import io
from collections.abc import Mapping, Sequence

from edgejoule.errors import UnknownNameError
from edgejoule.reproduce.checks import Span, as_printed

Row = Mapping[str, str]
Tables = Mapping[str, Sequence[Row]]
NAMES = tuple(f"edgevit_table{n}" for n in range(1, 9))


@functools.cache
def _text(name: str) -> str:
    return importlib.resources.files("edgejoule").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")


def published_table(name: str) -> list[dict[str, str]]:
    """The rows of a printed table as dicts of text, errors of the paper kept. ``edgevit_table1`` … ``edgevit_table8``.

    Column names carry their units. Raises UnknownNameError.
    """
    if name not in NAMES:
        raise UnknownNameError("published table", name, NAMES, f"known: {', '.join(NAMES)}")
    return list(csv.DictReader(io.StringIO(_text(name))))


def edgevit_tables() -> dict[str, list[dict[str, str]]]:
    """All tables of EdgeViT (arXiv 2205.03436) under short names: ``table1`` … ``table8``."""
    return {name.partition("_")[2]: published_table(name) for name in NAMES}


def keyed(rows: Sequence[Row], key: str = "model") -> dict[str, Row]:
    """The rows by the text of one column, in their order."""
    return {row[key]: row for row in rows}


def column(rows: Sequence[Row], name: str, key: str = "model") -> dict[str, Span]:
    """A column as spans by model; empty cells are left out.

    All cells share the most decimals seen, because the files drop a trailing zero that the paper prints. For columns of one kind of
    measurement only; ``cell`` is for columns of mixed precision.
    """
    cells = {row[key]: row[name] for row in rows if row[name]}
    decimals = max((len(text.partition(".")[2]) for text in cells.values()), default=0)
    return {model: as_printed(text, decimals) for model, text in cells.items()}


def cell(row: Row, name: str) -> Span:
    """One cell as it stands, its own digits."""
    return as_printed(row[name])
