"""What each pass costs and saves layer by layer: as a table for a terminal, and as a self-contained page, a plot for each pass.

Records in, text out. Runs no network; knows the order of the layers by their names and the order of the rows only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgejoule.records import Interval
from edgejoule.report import format as f
from edgejoule.report.cells import esc
from edgejoule.report.page import page, write_page
from edgejoule.report.table import Column, Table, terminal
from edgejoule.shrunk import LayerCost

ABOUT = (
    "Each line changes one layer alone. Lost: percentage points of top-1, or of agreement with the unchanged network. Saved: shares of the "
    "whole network's. What several layers lose together is not the sum of what each loses."
)


def sensitivity_table(rows: Sequence[LayerCost], width: int | None = None, color: bool | None = None) -> str:
    """A line for every layer and pass, layers in the network's order, then the passes; ``width`` and ``color`` as ``terminal`` has them."""
    images = {row.n_images for row in rows}
    columns = (
        Column("layer"),
        Column("pass"),
        Column("points lost", 0, True),
        Column("MACs saved", 0, True),
        Column("bytes saved", 2, True),
        Column("time saved", 1, True),
        Column("images", 4, True),
        Column("note", 3, wrap=True),
    )
    cells = [_cells(row) for row in in_order(rows)]
    empty = {5} if all(row.saved_time is None for row in rows) else set()
    empty |= {6} if len(images) < 2 else set()
    empty |= {7} if not any(row.note for row in rows) else set()
    kept = [i for i in range(len(columns)) if i not in empty]
    table = Table(
        title=f"Sensitivity: {_counted(rows)}",
        columns=tuple(columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in cells),
        notes=(ABOUT,),
    )
    return terminal(table, width, color)


def write_plot(path: Path | str, rows: Sequence[LayerCost], title: str) -> Path:
    """Writes the page, whole or not at all. Raises OutputError where it cannot be written."""
    return write_page(path, render(rows, title))


def render(rows: Sequence[LayerCost], title: str) -> str:
    """The whole page as text: for each pass the points lost over the layers, and below them bars of the MACs saved."""
    return page(title, _counted(rows), _body(rows), _data(rows), "sensitivity.js")


def in_order(rows: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
    """By layer, then by pass. Parts of the network (``stem``, ``blocks``, ``head``) in the order in which the rows first name them; within
    a part numbers count as numbers, so that ``blocks.10`` follows ``blocks.9``."""
    parts = list(dict.fromkeys(_part(row.layer) for row in rows))
    return tuple(sorted(rows, key=lambda row: (parts.index(_part(row.layer)), _natural(row.layer), _natural(row.what))))


def _part(layer: str) -> str:
    return layer.split(".")[0]


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """``blocks.10.attn`` as words and numbers that can be compared."""
    return tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece)


def _cells(row: LayerCost) -> tuple[str, ...]:
    return (
        row.layer,
        row.what,
        _points(row.drop_points),
        _share(row.saved_macs),
        _share(row.saved_bytes),
        f.percent(row.saved_time),
        str(row.n_images),
        row.note,
    )


def _points(known: Interval) -> str:
    """``+0.8 [0.1, 1.5]``: lost, in percentage points."""
    text = f.points(Interval(known.value / 100.0, _hundredth(known.low), _hundredth(known.high), known.n)).replace(" points", "")
    return text.replace("-0.0", "+0.0", 1) if float(text.partition(" [")[0]) == 0.0 else text


def _share(share: float) -> str:
    return f"{100.0 * share:.2f} %" if abs(share) < 0.1 else f"{100.0 * share:.1f} %"


def _hundredth(value: float | None) -> float | None:
    return None if value is None else value / 100.0


def _counted(rows: Sequence[LayerCost]) -> str:
    """``12 layers, 2 passes, 360 images``."""
    layers, passes = len({row.layer for row in rows}), len({row.what for row in rows})
    images = sorted({row.n_images for row in rows})
    shown = "" if not images else f", {images[0]} images" if len(images) == 1 else f", {images[0]} to {images[-1]} images"
    return f"{layers} layer{'' if layers == 1 else 's'}, {passes} pass{'' if passes == 1 else 'es'}{shown}"


def _body(rows: Sequence[LayerCost]) -> str:
    if not rows:
        return '<div class="hero"><p>No layer was tried.</p></div>'
    about = f'<p class="about">{esc(ABOUT)} Bars on the dots are 95 % intervals, and all plots share their scales.</p>'
    figures = "".join(
        f'<figure style="margin-bottom:1rem"><figcaption>{esc(what)} <small>{esc(_extremes(rows, what))}</small></figcaption>'
        f'<div class="plot" style="height:27rem" data-pass="{number}"></div></figure>'
        for number, what in enumerate(_passes(rows))
    )
    lines = "\n".join(esc(line) for line in sensitivity_table(rows, 200, False).splitlines())
    return f"{about}{figures}<details><summary>All figures</summary><pre>{lines}</pre></details>"


def _extremes(rows: Sequence[LayerCost], what: str) -> str:
    """Which layer loses least and which most."""
    mine = [row for row in in_order(rows) if row.what == what]
    least, most = (best(mine, key=lambda row: row.drop_points.value) for best in (min, max))
    return f"least lost by {least.layer} ({_points(least.drop_points)} points), most by {most.layer} ({_points(most.drop_points)} points)"


def _passes(rows: Sequence[LayerCost]) -> list[str]:
    return sorted({row.what for row in rows}, key=_natural)


def _data(rows: Sequence[LayerCost]) -> dict[str, Any]:
    ordered = in_order(rows)
    return {"passes": [[_bar(row) for row in ordered if row.what == what] for what in _passes(rows)]}


def _bar(row: LayerCost) -> dict[str, Any]:
    drop = row.drop_points
    hover = (
        row.layer,
        f"lost {_points(drop)} points, {row.n_images} images",
        f"MACs saved {_share(row.saved_macs)}",
        f"bytes saved {_share(row.saved_bytes)}",
        "" if row.saved_time is None else f"time saved {f.percent(row.saved_time)}",
        row.note,
    )
    shown = [f.clean(line) for line in hover if line]
    return {"layer": f.clean(row.layer), "drop": [drop.value, drop.low, drop.high], "macs": 100.0 * row.saved_macs, "hover": shown}
