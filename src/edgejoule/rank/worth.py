"""Is a changed network worth it, or does a plain one of the same ranking do as well? Pure: entries in, one ``Worth`` a recipe.

Knows accuracy, cost and their intervals. Knows no plain network that was not run, and not which images two rows got wrong together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgejoule.rank.table import Entry
from edgejoule.records import Interval, Worth

ESTIMATED = "D"  # the grade of energies that are a model's, without bounds
EXACT = frozenset({"fuse"})  # passes that leave the function as it is: a published accuracy stays the network's own
Cost = Literal["energy", "latency"]
Standing = Literal["beats", "open", "unknown", "excluded"]
Verdict = Literal["yes", "no", "not shown", "unknown"]
VERDICTS: tuple[tuple[Standing, Verdict], ...] = (("beats", "no"), ("open", "not shown"), ("unknown", "unknown"), ("excluded", "yes"))
MOST = 700.0  # the exponential of more is no number


def worth(entries: Sequence[Entry], grade: str = "") -> dict[str, Worth]:
    """A verdict for every entry with a recipe, by its label, against the entries without one. The order of the entries does not matter.

    The entries are one ranking's: same data set, device, workload, protocol, grade and scope. The cost is energy per image; where the
    grade says that energies are estimates it is latency, which was measured. A plain entry *beats* one with a recipe where its accuracy
    is at least as high and its cost no higher, both beyond the 95 % intervals of the differences; it is *excluded* where either is
    refuted; else it is *open*.

    - ``no``: some plain entry beats it; the nearest of them stands beside it.
    - ``not shown``: none beats it, some are open; the nearest of these, and what would narrow the interval that leaves it open.
    - ``unknown``: an accuracy or cost that could decide is not there, or no plain entry has both. Published accuracies are not compared
      with measured ones, and the published accuracy of a network says nothing about it after a pass that is not in ``EXACT``.
    - ``yes``: every plain entry is excluded; the nearest stands beside it. It says nothing of plain networks that were not run.

    Nearest: the smallest ``sqrt(((a1 - a2) / A)^2 + ((ln c1 - ln c2) / C)^2)``, accuracies a in points, costs c, A and C the ranges of a
    and of ln c over all entries that have both (an axis without a range counts as 0); ties by label.

    A figure without an interval is taken as it stands where others stated it (published accuracy, a table without a grade); a measured
    one without an interval excludes and beats nothing.
    """
    cost: Cost = "latency" if grade == ESTIMATED else "energy"
    points = [_point(entry, cost, measured=bool(grade)) for entry in entries]
    plain = sorted((point for point in points if not point.entry.recipe), key=lambda point: point.entry.model)
    scale = _scale(points)
    return {point.entry.model: _worth(point, plain, scale, cost) for point in points if point.entry.recipe}


@dataclass(frozen=True, slots=True)
class _Point:
    """An entry on the plane. ``top1`` in percent, ``log_cost`` the natural logarithm; bounds are infinite where none can be claimed."""

    entry: Entry
    top1: Interval | None
    log_cost: Interval | None


def _point(entry: Entry, cost: Cost, measured: bool) -> _Point:
    top1 = None
    if entry.top1_pct is not None and math.isfinite(entry.top1_pct):
        bounds = entry.top1 or Interval(entry.top1_pct, None, None, 1)
        top1 = _bounded(entry.top1_pct, bounds.low, bounds.high, entry.accuracy == "measured", bounds.n)
    paid = entry.energy_mj if cost == "energy" else entry.latency_ms
    if paid is None or not (math.isfinite(paid.value) and paid.value > 0.0):
        return _Point(entry, top1, None)
    low, high = (None if bound is None else math.log(bound) if bound > 0.0 else -math.inf for bound in (paid.low, paid.high))
    return _Point(entry, top1, _bounded(math.log(paid.value), low, high, measured, paid.n))


def _bounded(value: float, low: float | None, high: float | None, measured: bool, n: int) -> Interval:
    """Bounds for every figure: a missing one is infinite where it was measured, and the value itself where others stated it."""
    least, most = (-math.inf, math.inf) if measured else (value, value)
    return Interval(value, least if low is None else min(low, value), most if high is None else max(high, value), n)


def difference(one: Interval, other: Interval) -> Interval:
    """One less the other, with the interval of the difference of two independent estimates from their own intervals.

    ``d - sqrt((x - x_low)^2 + (y_high - y)^2)`` to ``d + sqrt((x_high - x)^2 + (y - y_low)^2)``: Newcombe 1998, "Interval estimation for
    the difference between independent proportions", method 10, which holds for other estimates too (Zou and Donner 2008, "MOVER"). Where
    both were judged on the same images it is wider than a paired one. A bound that is None counts as the value itself.
    """
    d = one.value - other.value
    low = d - math.hypot(one.value - _low(one), _high(other) - other.value)
    high = d + math.hypot(_high(one) - one.value, other.value - _low(other))
    return Interval(d, low, high, min(one.n, other.n))


def _worth(mine: _Point, plain: Sequence[_Point], scale: tuple[float, float], cost: Cost) -> Worth:
    known = Worth("unknown", cost, own=_own(mine, plain, scale), plain_models=len({_name(point.entry) for point in plain}))
    if missing := _lacking(mine, cost) or ("" if plain else "no plain network in this ranking"):
        return replace(known, missing=missing)
    near = sorted(plain, key=lambda point: (not _beside(point, mine), _distance(point, mine, scale), point.entry.model))
    standings = [_standing(point, mine) for point in near]
    standing, verdict = next(one for one in VERDICTS if one[0] in standings)
    nearest = near[standings.index(standing)]
    if not _beside(nearest, mine):
        lacks = _lacking(nearest, cost) or f"no {mine.entry.accuracy} accuracy"
        return replace(known, beside=nearest.entry.model, missing=lacks)
    points, ratio = _figures(mine, nearest)
    return replace(
        known,
        verdict=verdict,
        beside=nearest.entry.model,
        points=points,
        cost_ratio=ratio,
        missing=_deciding(nearest, mine) if verdict == "not shown" else "",
        cheapest=all(point.log_cost.value > mine.log_cost.value for point in plain if point.log_cost and mine.log_cost),
    )


def _lacking(point: _Point, cost: Cost) -> str:
    """What keeps an entry off the plane; nothing where it is on it."""
    entry = point.entry
    if point.top1 is None:
        return "no accuracy"
    if entry.accuracy == "published" and not all(part.split("(")[0].strip() in EXACT for part in entry.recipe.split("|") if part):
        return "no accuracy of its own, the published one is the network's before the recipe"
    return f"no {cost}" if point.log_cost is None else ""


def _beside(other: _Point, mine: _Point) -> bool:
    """Whether the two can be set beside one another on both axes."""
    known = other.top1 and other.log_cost and mine.top1 and mine.log_cost
    return bool(known) and {other.entry.accuracy, mine.entry.accuracy} != {"published", "measured"}


def _standing(other: _Point, mine: _Point) -> Standing:
    """Whether a plain entry beats one with a recipe."""
    dearer = difference(other.log_cost, mine.log_cost) if other.log_cost and mine.log_cost else None
    if dearer and _low(dearer) > 0.0:
        return "excluded"
    if not (_beside(other, mine) and dearer and other.top1 and mine.top1):
        return "unknown"
    better = difference(other.top1, mine.top1)
    if _high(better) < 0.0:
        return "excluded"
    return "beats" if _low(better) >= 0.0 and _high(dearer) <= 0.0 else "open"


def _deciding(other: _Point, mine: _Point) -> str:
    """What narrows the intervals that leave a plain entry open. Either axis may decide: one refuted excludes it."""
    assert other.top1 and mine.top1 and other.log_cost and mine.log_cost
    better, dearer = difference(other.top1, mine.top1), difference(other.log_cost, mine.log_cost)
    images = "more seeds" if other.entry.seeds or mine.entry.seeds else "more images"
    accuracy = "an interval of the accuracy" if math.isinf(_low(better)) else images
    return " or ".join(filter(None, (accuracy if _low(better) < 0.0 else "", "more repeats" if _high(dearer) > 0.0 else "")))


def _figures(mine: _Point, other: _Point) -> tuple[Interval, Interval]:
    """Accuracy less the other's in points, and cost over the other's."""
    assert other.top1 and mine.top1 and other.log_cost and mine.log_cost
    ratio = difference(mine.log_cost, other.log_cost)
    low, high = (None if math.isinf(bound) else math.exp(min(bound, MOST)) for bound in (_low(ratio), _high(ratio)))
    return _shown(difference(mine.top1, other.top1)), _shown(Interval(math.exp(min(ratio.value, MOST)), low, high, ratio.n))


def _shown(found: Interval) -> Interval:
    """Without bounds where there are none to claim: infinite ones, and those of two figures that were taken as they stand."""
    low, high = (None if bound is None or math.isinf(bound) or found.low == found.high else bound for bound in (found.low, found.high))
    return Interval(found.value, low, high, found.n)


def _own(mine: _Point, plain: Sequence[_Point], scale: tuple[float, float]) -> str:
    """The same network without the recipe: on the same backend where it is there, else the nearest."""
    same = [point for point in plain if _name(point.entry) == _name(mine.entry)]
    place = [(point.entry.backend != mine.entry.backend, _distance(point, mine, scale), point.entry.model) for point in same]
    return min(place)[2] if place else ""


def _scale(points: Sequence[_Point]) -> tuple[float, float]:
    """The ranges of accuracy and of the logarithm of the cost; 0 where there is none."""
    top1 = [point.top1.value for point in points if point.top1 and point.log_cost]
    log_cost = [point.log_cost.value for point in points if point.top1 and point.log_cost]
    return (max(top1) - min(top1), max(log_cost) - min(log_cost)) if top1 else (0.0, 0.0)


def _distance(one: _Point, other: _Point, scale: tuple[float, float]) -> float:
    """Infinite where one of the two is not on the plane."""
    if not (one.top1 and one.log_cost and other.top1 and other.log_cost):
        return math.inf
    parts = (one.top1.value - other.top1.value, one.log_cost.value - other.log_cost.value)
    return math.hypot(*(part / extent if extent > 0.0 else 0.0 for part, extent in zip(parts, scale, strict=True)))


def _name(entry: Entry) -> str:
    return entry.name or entry.model


def _low(found: Interval) -> float:
    return found.value if found.low is None else found.low


def _high(found: Interval) -> float:
    return found.value if found.high is None else found.high
