"""Which points no other point beats: least cost, most value. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from edgejoule.errors import RankError


def front(points: Sequence[tuple[float, float]]) -> tuple[bool, ...]:
    """For each ``(cost, value)``: does it lie on the Pareto front that minimises cost and maximises value? O(n log n).

    A point falls off the front when another one is at least as good in both and better in one. Ties follow from that: of points
    at one cost only the most valuable stay, of points of one value only the cheapest, and exact duplicates stay or fall together.
    Raises RankError for a coordinate that is not a finite number.
    """
    for cost, value in points:
        if not (math.isfinite(cost) and math.isfinite(value)):
            raise RankError(f"the point ({cost:g}, {value:g}) cannot be compared: both numbers must be finite")
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept = [False] * len(points)
    best = -math.inf
    for _, same_cost in itertools.groupby(order, key=lambda i: points[i][0]):
        indices = list(same_cost)
        top = points[indices[0]][1]
        if top <= best:
            continue
        for i in itertools.takewhile(lambda i: points[i][1] == top, indices):  # noqa: B023 -- consumed before `top` moves on
            kept[i] = True
        best = top
    return tuple(kept)
