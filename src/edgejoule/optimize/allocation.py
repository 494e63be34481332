"""Which units go: from every group its share, or from all groups together the least needed ones. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Allocation = Literal["uniform", "global"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
LEAST = 8  # a global choice leaves an eighth of each group: without one, whole blocks would go first and nothing pass them


def allocate(
    scores: Mapping[str, Sequence[float]], params_per_unit: Mapping[str, int], ratio: float, how: str = "uniform", round_to: int = 1
) -> dict[str, tuple[int, ...]]:
    """{group: units to drop, ascending}, the lowest scores first. ``scores`` are (U,) a group, ``ratio`` is in [0, 1).

    - ``uniform``: of each group's units the share ``ratio``, rounded down; at least one stays.
    - ``global``: of all groups' parameters (units times ``params_per_unit``) at most the share ``ratio``. Scores are divided by
      their group's mean before groups are compared. At least one unit and an eighth of each group stay.

    What stays of a group is then rounded up to a multiple of ``round_to``, at most to all: less goes than was asked, never more.
    """
    rows = {name: [float(value) for value in values] for name, values in scores.items()}
    if how == "uniform":
        counts = {name: min(_share(ratio, len(row)), len(row) - 1) for name, row in rows.items()}
    else:
        counts = _global_counts(rows, params_per_unit, ratio)
    dropped = {}
    for name, row in rows.items():
        kept = min(len(row), math.ceil((len(row) - counts[name]) / round_to) * round_to)
        dropped[name] = tuple(sorted(_order(row)[: len(row) - kept]))
    return dropped


def least_ratio(scores: Mapping[str, Sequence[float]], params_per_unit: Mapping[str, int], how: str, round_to: int) -> float | None:
    """The lowest ratio, in steps of 0.01, that drops a unit; None where none does."""
    for percent in range(1, 100):
        if any(allocate(scores, params_per_unit, percent / 100, how, round_to).values()):
            return percent / 100
    return None


def _share(ratio: float, units: int) -> int:
    return math.floor(ratio * units + 1e-9)  # 0.29 of 100 is 28.999… in floating point


def _order(row: Sequence[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda unit: (row[unit], unit))


def _global_counts(rows: Mapping[str, Sequence[float]], params_per_unit: Mapping[str, int], ratio: float) -> dict[str, int]:
    """How many units of each group go. A group's own go from the lowest score on, so a number says which."""
    budget = ratio * sum(len(row) * params_per_unit[name] for name, row in rows.items()) + 1e-9
    room = {name: len(row) - max(1, math.ceil(len(row) / LEAST)) for name, row in rows.items()}
    means = {name: sum(row) / max(1, len(row)) or 1.0 for name, row in rows.items()}
    queue = sorted(
        (row[unit] / means[name], place, rank, name)
        for place, (name, row) in enumerate(rows.items())
        for rank, unit in enumerate(_order(row)[: max(0, room[name])])
    )
    counts = dict.fromkeys(rows, 0)
    for _, _, _, name in queue:
        if params_per_unit[name] > budget:
            break
        budget -= params_per_unit[name]
        counts[name] += 1
    return counts
