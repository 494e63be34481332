"""A reproduction as text: every check side by side, then every disagreement once more in full. Rendering computes nothing.

Knows the records of a reproduction by their shape, and the tables of table.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol

from edgejoule.report import format as f
from edgejoule.report import table as t
from edgejoule.report.table import Column, Table

WIDTH = 140  # columns of a reproduction that is printed into a file or a pipe
MARKS = {"agrees": "agrees", "agrees within rounding": "within rounding", "disagrees": "DISAGREES", "not recoverable": "not recoverable"}
PLURALS = {
    "agrees": "agree",
    "agrees within rounding": "agree within rounding",
    "disagrees": "disagree",
    "not recoverable": "not recoverable",
}


class Check(Protocol):
    """One printed number or sentence beside what its own sources give."""

    @property
    def place(self) -> str: ...
    @property
    def claim(self) -> str: ...
    @property
    def printed(self) -> str: ...
    @property
    def recomputed(self) -> str: ...
    @property
    def tolerance(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def note(self) -> str: ...


class Listing(Protocol):
    """A table of figures without a printed counterpart."""

    @property
    def title(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rows(self) -> Sequence[tuple[str, ...]]: ...
    @property
    def notes(self) -> Sequence[str]: ...


class Section(Protocol):
    """A titled part with its checks and listings."""

    @property
    def title(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def checks(self) -> Sequence[Check]: ...
    @property
    def listings(self) -> Sequence[Listing]: ...


class Reproduction(Protocol):
    """A paper's sections, and its disagreements once more."""

    @property
    def title(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def sections(self) -> Sequence[Section]: ...
    @property
    def disagreements(self) -> Sequence[Check]: ...
    @property
    def counts(self) -> Mapping[str, int]: ...


class BesideRow(Protocol):
    """One model's figure here and in print."""

    @property
    def model(self) -> str: ...
    @property
    def here(self) -> float | None: ...
    @property
    def paper(self) -> float: ...
    @property
    def ratio(self) -> float | None: ...


class Beside(Protocol):
    """Figures measured here beside a printed column."""

    @property
    def table(self) -> str: ...
    @property
    def column(self) -> str: ...
    @property
    def rows(self) -> Sequence[BesideRow]: ...
    @property
    def n(self) -> int: ...
    @property
    def spearman(self) -> float | None: ...
    @property
    def kendall(self) -> float | None: ...
    @property
    def unmatched(self) -> Sequence[str]: ...
    @property
    def label(self) -> str: ...


def reproduction(found: Reproduction, width: int | None = None) -> str:
    """For a terminal of ``width`` columns (140 where not given): sections with checks and listings, then the summary."""
    width = width or WIDTH
    head = f"{f.clean(found.title)}\n{f.clean(found.source)}\n\n"
    body = "\n".join(t.terminal(table, width, color=False) for section in found.sections for table in section_tables(section))
    return head + body + "\n" + summary(found, width)


def markdown(found: Reproduction) -> str:
    """The same as Markdown."""
    body = "".join(t.markdown(table) for section in found.sections for table in section_tables(section))
    return f"# {found.title}\n\n{found.source}\n\n{body}{summary(found, 10_000)}"


def section_tables(section: Section) -> tuple[Table, ...]:
    """A section's checks as one table, notes below it, then its listings."""
    tables = [_checks_table(section)] if section.checks else []
    for i, listing in enumerate(section.listings):
        title = f"{section.title}: {listing.title}" if not section.checks and i == 0 else listing.title
        tables.append(_listing_table(title, listing))
    return tuple(tables)


def summary(found: Reproduction, width: int = WIDTH) -> str:
    """How many checks of each verdict, and every disagreement in full, numbered."""
    counts = ", ".join(f"{count} {PLURALS[verdict]}" for verdict, count in found.counts.items())
    lines = [f"{sum(found.counts.values())} checks: {counts}", f"Disagreements: {len(found.disagreements)}"]
    for number, check in enumerate(found.disagreements, 1):
        why = f" ({check.note})" if check.note else ""
        text = f"{number:3}. {check.place}, {check.claim}: printed {check.printed}, recomputed {check.recomputed}{why}"
        lines += textwrap.wrap(f.clean(text), width, subsequent_indent="     ", break_long_words=False)
    return t.printable("\n".join(lines) + "\n")


def beside(found: Beside, width: int | None = None) -> str:
    """Figures measured here beside the printed column, their ratio, and the rank correlations."""
    columns = (Column("model"), Column("here", right=True), Column("paper", right=True), Column("here / paper", right=True))
    rows = tuple((r.model, f.plain_number(r.here), f"{r.paper:g}", f.plain_number(r.ratio)) for r in found.rows)
    notes = [rank_correlation(found)]
    if found.unmatched:
        notes.append(f"not in the printed table: {', '.join(found.unmatched)}")
    return t.terminal(Table(f"{found.column} beside {found.table}", columns, rows, found.label, tuple(notes)), width)


def rank_correlation(found: Beside) -> str:
    """How far both columns put the models in one order, as a sentence."""
    return f"order of {found.n} model{'' if found.n == 1 else 's'}: Spearman {_tau(found.spearman)}, Kendall tau-b {_tau(found.kendall)}"


def _checks_table(section: Section) -> Table:
    columns = (
        Column("where", 1),
        Column("claim", wrap=True),
        Column("printed", wrap=True),
        Column("recomputed", wrap=True),
        Column("verdict"),
        Column("tolerance", 2, wrap=True),
    )
    rows = tuple((c.place, c.claim, c.printed, c.recomputed, MARKS[c.verdict], c.tolerance) for c in section.checks)
    notes = tuple(f"{check.claim}: {check.note}" for check in section.checks if check.note)
    return Table(section.title, columns, rows, section.about, notes)


def _listing_table(title: str, listing: Listing) -> Table:
    columns = tuple(Column(name, wrap=i > 0 and _long(listing, i)) for i, name in enumerate(listing.columns))
    return Table(title, columns, tuple(listing.rows), notes=tuple(listing.notes))


def _long(listing: Listing, i: int) -> bool:
    return max((len(row[i]) for row in listing.rows), default=0) > t.WRAPPED


def _tau(value: float | None) -> str:
    return f.NONE if value is None else f"{value:.3f}"
