"""A table of text, and its three faces: terminal (any width), Markdown, CSV. Knows no record."""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgejoule.report.format import clean

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200  # columns, where the output is a file or a pipe
GAP = 2  # between columns: one of padding and one that rich puts between them
WRAPPED = 30  # columns that wrapped text needs at least
BOUNDS = re.compile(r" \[[^\[\]]*\]")  # the interval behind a number


@dataclass(frozen=True, slots=True)
class Column:
    """``keep`` 0 is shown at any width; of the others the highest number goes first on a narrow terminal. ``wrap`` may break lines."""

    title: str
    keep: int = 0
    right: bool = False
    wrap: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, columns, rows of finished text, and lines below. ``strong`` are the rows that stand out."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    subtitle: str = ""
    notes: tuple[str, ...] = ()
    strong: frozenset[int] = frozenset()


def terminal(table: Table, width: int | None = None, color: bool | None = None) -> str:
    """The table for a terminal of ``width`` columns (asked of it where not given), in colour only on a terminal.

    Where the width does not do, columns are left out and named, then the intervals; where even that does not fit, each row becomes a list.
    """
    from rich.console import Console
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    color = is_terminal if color is None else color
    width = width or (shutil.get_terminal_size((80, 24)).columns if is_terminal else WIDE)
    out = io.StringIO()
    console = Console(file=out, width=max(width, 20), force_terminal=color, no_color=not color, highlight=False, emoji=False, markup=False)
    console.print(Text(clean(table.title), style="bold"))
    if table.subtitle:
        console.print(Text(clean(table.subtitle), style="dim"))
    shown = _fitting(table, width)
    if short := not _suffices(table, shown):  # rather lose intervals than what the table is about
        without = _fitting(_without_bounds(table), width)
        if short := without is not None and (shown is None or _suffices(table, without)):
            table, shown = _without_bounds(table), without
    if not table.rows:
        console.print(Text("(none)"))
    elif shown is None:
        _print_list(console, table)
    else:
        _print_grid(console, table, shown)
        dropped = (["intervals"] if short else []) + [column.title for i, column in enumerate(table.columns) if i not in shown]
        if dropped:
            console.print(Text(f"not shown for want of width: {', '.join(dropped)} (--json has them)", style="dim"))
    for note in table.notes:
        console.print(Text(clean(note)))
    return printable("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n")


def markdown(table: Table) -> str:
    """A Markdown table with its heading and notes; what Markdown would read as markup is escaped."""
    lines = [f"## {_escaped(table.title)}", ""]
    if table.subtitle:
        lines += [_escaped(table.subtitle), ""]
    lines.append("| " + " | ".join(_escaped(column.title) for column in table.columns) + " |")
    lines.append("|" + "|".join("--:" if column.right else "---" for column in table.columns) + "|")
    for i, row in enumerate(table.rows):
        cells = [_escaped(cell) for cell in row]
        lines.append("| " + " | ".join(f"**{cell}**" if i in table.strong and j <= 1 else cell for j, cell in enumerate(cells)) + " |")
    if table.notes:
        lines += ["", *(f"- {_escaped(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n\n"


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a header; None is an empty cell, floats keep all their digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return out.getvalue()


def _fitting(table: Table, width: int) -> list[int] | None:
    """Indices of the columns that fit, or None where the necessary ones do not."""
    from rich.cells import cell_len

    widths = [max([cell_len(c.title), *(cell_len(row[i]) for row in table.rows)]) for i, c in enumerate(table.columns)]
    widths = [min(needed, WRAPPED) if c.wrap else needed for needed, c in zip(widths, table.columns, strict=True)]
    shown: list[int] = []
    for i in sorted(range(len(table.columns)), key=lambda i: (table.columns[i].keep, i)):
        if sum(widths[j] + GAP for j in (*shown, i)) <= width:
            shown.append(i)
        elif table.columns[i].keep == 0:
            return None
    return sorted(shown)


def _suffices(table: Table, shown: list[int] | None) -> bool:
    """Whether the columns that matter most are among those shown."""
    return shown is not None and all(i in shown for i, column in enumerate(table.columns) if column.keep <= 1)


def _without_bounds(table: Table) -> Table:
    cut = [[BOUNDS.sub("", cell) if c.right else cell for cell, c in zip(row, table.columns, strict=True)] for row in table.rows]
    return replace(table, rows=tuple(map(tuple, cut)))


def _print_grid(console: Console, table: Table, shown: list[int]) -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), header_style="bold")
    for i in shown:
        column = table.columns[i]
        grid.add_column(Text(column.title), justify="right" if column.right else "left", no_wrap=not column.wrap, overflow="fold")
    for n, row in enumerate(table.rows):
        grid.add_row(*(Text(clean(row[i])) for i in shown), style="bold green" if n in table.strong else None)
    console.print(grid)


def _print_list(console: Console, table: Table) -> None:
    from rich.text import Text

    for n, row in enumerate(table.rows):
        console.print()
        for column, cell in zip(table.columns, row, strict=True):
            if cell:
                console.print(Text(f"{column.title}: {clean(cell)}", style="bold" if n in table.strong else ""))
    console.print()


def _escaped(text: str) -> str:
    escaped = clean(text).replace("\\", "\\\\")
    for mark in "|`*_<>[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def printable(text: str) -> str:
    """What the terminal's encoding can show: an ASCII terminal gets question marks, not a traceback."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
