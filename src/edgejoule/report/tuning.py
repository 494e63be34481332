"""What autotuning tried, as a table for a terminal: the winner first, losers with the reason. Races nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgejoule.records import Interval
from edgejoule.report import format as f
from edgejoule.report.table import Column, Table, terminal


class Choice(Protocol):
    @property
    def label(self) -> str: ...


class Tried(Protocol):
    """What ``tuning.Tried`` holds."""

    @property
    def choice(self) -> Choice: ...
    @property
    def verdict(self) -> str: ...
    @property
    def latency_s(self) -> float | None: ...
    @property
    def ratio(self) -> Interval | None: ...
    @property
    def top1_agreement(self) -> float | None: ...
    @property
    def drop_pct(self) -> float | None: ...


def tuning_table(model: str, device: str, tried: Sequence[Tried]) -> str:
    """A line for every choice: median latency, its ratio over the winner's in the same race with a 95 % interval, accuracy, verdict."""
    columns = (
        Column("how"),
        Column("latency", 1, True),
        Column("over the winner's", 1, True),
        Column("same top-1", 3, True),
        Column("verdict"),
    )
    rows = [
        (
            one.choice.label,
            f.scaled(one.latency_s, f.TIMES) if one.latency_s is not None else f.NONE,
            _ratio(one.ratio),
            f.NONE if one.top1_agreement is None else f"{one.top1_agreement:.0%}" + _drop(one.drop_pct),
            one.verdict,
        )
        for one in tried
    ]
    return terminal(Table(f"{model} on {device}: {len(rows)} ways tried", columns, tuple(rows)))


def _ratio(found: Interval | None) -> str:
    if found is None:
        return f.NONE
    bounds = "" if found.low is None or found.high is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{bounds}"


def _drop(drop_pct: float | None) -> str:
    return "" if drop_pct is None else f", {drop_pct:+.1f} points lost"
