"""Whether a recipe is worth it, in words: the verdict on a changed network beside the plain one that speaks most against it.

Records in, text or escaped HTML out. Decides nothing: ``rank.worth`` did.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgejoule.records import RankRow, Worth
from edgejoule.report.cells import Cell, esc

TITLE = "worth it?"
ORDER = ("yes", "not shown", "unknown", "no")
PILLS = {"yes": "kept", "no": "lost"}
HINT = "does a plain network, one without a recipe, do as well: at least as accurate, for no more?"


def words(row: RankRow) -> str:
    """``no: levit has +0.3 points for -12 % energy``; nothing for a row without a recipe."""
    found = row.worth
    return "" if found is None else f"{found.verdict}: {_reason(found, row.model)}"


def notes(rows: Sequence[RankRow]) -> tuple[str, ...]:
    """What the verdicts of one ranking are about, and which networks are not there to be compared; nothing without a recipe."""
    judged = [(row, row.worth) for row in rows if row.worth is not None]
    if not judged:
        return ()
    first = judged[0][1]
    count = f"{first.plain_models} plain model{'' if first.plain_models == 1 else 's'}" if first.plain_models else "no plain model"
    cost = "latency, because the energies are estimates" if first.cost == "latency" else "energy"
    said = [f"worth it?: against the {count} of this ranking (no recipe), by accuracy and {cost}; what was not run cannot be compared"]
    if not first.plain_models:
        said = ["worth it?: there is no plain model (no recipe) in this ranking to compare with"]
    elif alone := [row.model for row, found in judged if not found.own]:
        said.append(f"not in it without the recipe: {', '.join(alone)}")
    return tuple(said)


def cell(row: RankRow) -> Cell:
    """The verdict as a mark, and its reason below."""
    if row.worth is None:
        return Cell("")
    pill = f'<span class="{PILLS.get(row.worth.verdict, "open")}">{esc(row.worth.verdict)}</span>'
    return Cell(f'{pill}<small class="wrap">{esc(_reason(row.worth, row.model))}</small>', ORDER.index(row.worth.verdict))


def _reason(found: Worth, label: str) -> str:
    other = _short(found.beside, label)
    if found.points is None or found.cost_ratio is None:
        return f"{other} has {found.missing}" if other else found.missing
    points, change = found.points.value, 100.0 * (found.cost_ratio.value - 1.0)
    if found.verdict == "yes":
        gain = _gain(points, change, found.cost, other)
        return f"{gain}, no plain row costs as little" if found.cheapest else gain
    theirs = 100.0 * (1.0 / found.cost_ratio.value - 1.0)
    accuracy = f"{_points(-points)} points" if _points(points) else "the same accuracy"
    cost = f"{_percent(theirs)} % {found.cost}" if _percent(theirs) else f"the same {found.cost}"
    if found.verdict == "no":
        return f"{other} has {accuracy} for {cost}"
    return f"{other} may do as well, it has {accuracy} for {cost}; {found.missing} would decide"


def _gain(points: float, change: float, cost: str, other: str) -> str:
    """The changed network against the plain one: what it wins first, then what that costs."""
    accuracy, paid = f"{_points(points)} points", f"{_percent(change)} % {cost}"
    if not _points(points):
        return f"{paid} at the accuracy of {other}" if _percent(change) else f"as accurate as {other}, for as much {cost}"
    if not _percent(change):
        return f"{accuracy} at the {cost} of {other}"
    if points > 0.0 and change < 0.0:
        return f"{accuracy} and {paid} against {other}"
    return f"{accuracy} for {paid} against {other}" if points > 0.0 else f"{paid} for {accuracy} against {other}"


def _short(other: str, label: str) -> str:
    """The plain row's label, without its backend where that is the changed row's too."""
    name, at, backend = other.rpartition(" @ ")
    return name if at and label.rpartition(" @ ")[2] == backend else other


def _points(value: float) -> str:
    """With a sign and one digit; nothing where that is zero."""
    return "" if abs(value) < 0.05 else f"{value:+.1f}"


def _percent(value: float) -> str:
    """With a sign; a digit after the point only below one percent; nothing where that is zero."""
    return f"{value:+.0f}" if abs(value) >= 0.95 else _points(value)
