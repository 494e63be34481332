"""Small pieces of the page: escaped text, cells with the number that sorts them, tables whose headers are buttons. Knows no record
but Interval."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from edgejoule.records import Interval
from edgejoule.report import format as f

BOUNDS = "small figures in brackets are 95 % intervals over repeats"


@dataclass(frozen=True, slots=True)
class Cell:
    """Finished HTML and what it sorts by: a number, text, or None (last in any order)."""

    markup: str
    value: float | str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """A column's title, an explanation shown on hover, whether its numbers stand right, and whether it stays when the rest scrolls."""

    title: str
    hint: str = ""
    right: bool = False
    pin: bool = False

    @property
    def css(self) -> str:
        names = " ".join(filter(None, ("right" if self.right else "", "pin" if self.pin else "")))
        return f' class="{names}"' if names else ""


def esc(text: object) -> str:
    """Text that came from outside, harmless in HTML and in attributes."""
    return html.escape(f.clean(str(text)), quote=True)


def text_cell(text: object) -> Cell:
    return Cell(esc(text), str(text))


def number_cell(text: str, value: float | None, sub: str = "") -> Cell:
    small = f"<small>{esc(sub)}</small>" if sub else ""
    return Cell(f'<span class="num">{esc(text)}</span>{small}', value)


def interval_cell(interval: Interval | None, unit: str = "", factor: float = 1.0, grade: str = "") -> Cell:
    """Value and unit above, the 95 % interval below."""
    if interval is None:
        return Cell(f.NONE)
    value, _, bounds = f.measure(interval, unit, factor, grade).partition(" [")
    return number_cell(value, interval.value, f"[{bounds}" if bounds else "")


def accuracy_cell(top1_pct: float | None, kind: str, top1: Interval | None = None, seeds: int | None = None, below: str = "") -> Cell:
    """A top-1 in percent above, its interval, where it comes from and ``below`` under it."""
    if top1_pct is None:
        return Cell(f.NONE)
    figure, _, bounds = f.top1(top1_pct, "", top1).partition(" [")
    lines = (f"[{bounds}" if bounds else "", ", ".join(filter(None, (f.accuracy_origin(kind, seeds), below))))
    small = "".join(f"<small>{esc(line)}</small>" for line in lines if line)
    return Cell(f'<span class="num">{esc(figure)}</span>{small}', top1_pct)


def percent_cell(interval: Interval | None) -> Cell:
    """A fraction as percent above, its 95 % interval below."""
    if interval is None:
        return Cell(f.NONE)
    value, _, bounds = f.percent(interval).partition(" [")
    return number_cell(value, interval.value, f"[{bounds}" if bounds else "")


def label_cell(label: str, note: str = "") -> Cell:
    """``name @ backend`` as the name with its backend below."""
    name, at, backend = label.rpartition(" @ ")
    if not at:
        name, backend = label, ""
    below = " · ".join(filter(None, (backend, note)))
    return Cell(f'<span class="model">{esc(name)}</span>' + (f"<small>{esc(below)}</small>" if below else ""), label)


def table(heads: Sequence[Head], rows: Sequence[Sequence[Cell]], caption: str, sorted_by: int | None = None, best: bool = False) -> str:
    """A table that sorts by any column. ``caption`` is read to those who do not see it; ``best`` marks the first row."""
    head = "".join(_head(one, "ascending" if i == sorted_by else "none") for i, one in enumerate(heads))
    body = "".join(_row(heads, row, best and i == 0) for i, row in enumerate(rows))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table class="sortable">'
        f"<caption>{esc(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def section(title: str, body: str, about: str = "", anchor: str = "") -> str:
    """A titled part of the page; nothing where there is nothing to show."""
    if not body:
        return ""
    name = f' id="{esc(anchor)}"' if anchor else ""
    intro = f'<p class="about">{about}</p>' if about else ""
    return f"<section{name}><h2>{esc(title)}</h2>{intro}{body}</section>"


def _head(head: Head, order: str) -> str:
    hint = f' title="{esc(head.hint)}"' if head.hint else ""
    return f'<th scope="col" aria-sort="{order}"{head.css}><button type="button"{hint}>{esc(head.title)}</button></th>'


def _row(heads: Sequence[Head], cells: Sequence[Cell], best: bool) -> str:
    tags = []
    for head, cell in zip(heads, cells, strict=True):
        value = "" if cell.value is None else f' data-v="{esc(cell.value)}"'
        tags.append(f"<td{head.css}{value}>{cell.markup}</td>")
    return ('<tr class="best">' if best else "<tr>") + "".join(tags) + "</tr>"
