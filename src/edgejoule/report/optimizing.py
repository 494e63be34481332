"""What a recipe did to a network, as a table for a terminal: before, after, and what became of each number. Counts nothing."""

from __future__ import annotations

from edgejoule.records import Interval
from edgejoule.report import format as f
from edgejoule.report.table import Column, Table, terminal
from edgejoule.shrunk import Shrunk, Size


def shrunk_table(found: Shrunk) -> str:
    """Two lines, the network before and after its recipe, and one with the change."""
    columns = (
        Column("network"),
        Column("params M", 1, True),
        Column("MACs M", 1, True),
        Column("weights kB", 1, True),
        Column("top-1, test images", 1, True),
    )
    before, after = found.before, found.after
    changes = tuple(
        f"{100 * (now / was - 1):+.1f} %" if was else ""
        for was, now in ((before.params, after.params), (before.macs, after.macs), (before.bytes, after.bytes))
    )
    rows = (_row(before), _row(after), ("change", *changes, _points(before.top1, after.top1)))
    return terminal(Table(f"{after.label}", columns, rows))


def _row(one: Size) -> tuple[str, ...]:
    top1 = "no labelled data" if one.top1 is None else f.percent(one.top1)
    return one.label, f"{one.params / 1e6:.3f}", f"{one.macs / 1e6:.2f}", f"{one.bytes / 1e3:.1f}", top1


def _points(before: Interval | None, after: Interval | None) -> str:
    return "" if before is None or after is None else f"{100 * (after.value - before.value):+.2f} points"
