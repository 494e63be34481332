"""Figures measured here beside a printed column, model by model, and whether both put the models in one order.

Knows names through the catalog. Knows no store: whoever has measurements hands over one number for each model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgejoule.catalog import find_model
from edgejoule.errors import RankError, SpecError, UnknownNameError
from edgejoule.reproduce.published import keyed, published_table

DENSE = {"edgevit_table7": "_coco", "edgevit_table8": "_ade20k"}  # how the catalog names a backbone at a dense task's size
BY_BACKBONE = ("edgevit_table5", "edgevit_table6")


@dataclass(frozen=True, slots=True)
class BesideRow:
    """One model, in the unit of the printed column. ``here`` is None where it was not measured; ``ratio`` is here over paper."""

    model: str
    here: float | None
    paper: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Beside:
    """The rows in the table's order, and rank correlations over the ``n`` models that have both figures (None below three)."""

    table: str
    column: str
    rows: tuple[BesideRow, ...]
    n: int
    spearman: float | None
    kendall: float | None
    unmatched: tuple[str, ...] = ()  # names given that no row of the table has
    label: str = ""  # how the figures here were measured


def beside(figures: Mapping[str, float], table: str = "edgevit_table2", column: str = "cpu_latency_mean_ms") -> Beside:
    """Figures by model name, in the unit of ``column``, beside that column. Names match through the catalog and its aliases.

    In Tables 7 and 8 a row answers to its own printed name and to the catalog's backbone at that size (``edgevit_xxs_coco``), never to
    the classifier at 224 pixels. Spearman's rho and Kendall's tau-b, ties discounted.
    Raises UnknownNameError for a table or column, RankError for a figure that is not a positive number or for two names of one model.
    """
    rows = keyed(published_table(table), "backbone" if table in BY_BACKBONE else "model")
    columns = list(next(iter(rows.values())))
    if column not in columns:
        raise UnknownNameError("column", column, columns, f"{table} has {', '.join(columns)}")
    here: dict[str, float] = {}
    named: dict[str, str] = {}
    for name, value in figures.items():
        if not (math.isfinite(value) and value > 0.0):
            raise RankError(f"{name} has the figure {value:g}, which no printed one can be compared with: give a positive number")
        if (key := _key(name, table) if name in rows else identity(name)) in here:
            raise RankError(f"{named[key]} and {name} are one model: give one figure for it")
        here[key], named[key] = value, name
    found, matched = [], set()
    for label, row in rows.items():
        if row[column]:
            key = _key(label, table)
            matched.add(key)
            value_here, paper = here.get(key), float(row[column])
            found.append(BesideRow(label, value_here, paper, None if value_here is None else value_here / paper))
    pairs = [(row.here, row.paper) for row in found if row.here is not None]
    unmatched = tuple(name for key, name in named.items() if key not in matched)
    return Beside(table, column, tuple(found), len(pairs), *_correlations(pairs), unmatched)


def _key(label: str, table: str) -> str:
    """What a printed row stands for: in the dense tables, its backbone at that task's size."""
    return identity(label) + DENSE.get(table, "")


def identity(label: str) -> str:
    """What a printed or written name stands for: the catalog's own name of that model, or the name folded where it has none."""
    try:
        return find_model(label).name
    except SpecError:
        return label.strip().casefold().replace("-", "_").replace(" ", "_")


def _correlations(pairs: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    if len(pairs) < 3:
        return None, None
    from edgejoule.rank.agreement import kendall_tau_b

    left, right = ([pair[i] for pair in pairs] for i in (0, 1))
    return _pearson(_ranks(left), _ranks(right)), kendall_tau_b(left, right)


def _ranks(values: list[float]) -> list[float]:
    """Places from 1, equal values sharing the mean of theirs."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2.0 for value in values]


def _pearson(x: list[float], y: list[float]) -> float | None:
    """Of ranks this is Spearman's rho; None where one list is all one value."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / math.sqrt(sxx * syy) if sxx and syy else None
