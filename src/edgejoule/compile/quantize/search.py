"""Putting products back to float until the budget is met, with few files run. Pure but for the function that scores a set.

The products stand in the order of what each costs. The shortest prefix that meets the budget is found by doubling and halving;
then those of it that were not needed go back to int8, many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgejoule.compile.quantize.score import Score

MOST_RUNS = 14  # files that one search may run
LARGEST_SHARE = 0.5  # of the products that may go back: beyond it, the file is no int8 file


@dataclass(frozen=True)
class Found:
    kept_float: frozenset[str]
    score: Score
    runs: int


def unquantize(
    ranked: Sequence[str],
    start: Score,
    score: Callable[[frozenset[str]], Score],
    within: Callable[[Score], bool],
    runs: int = MOST_RUNS,
    others: int = 0,
) -> Found:
    """``ranked`` products, worst first; ``score`` of a set of them in float; ``start`` is the score of none.
    ``others``: products that are float already and never were candidates; they count in the share that may be.

    Where no allowed set meets the budget, the one with the least drop (of equal ones the smaller) is returned.
    """
    tried: dict[int, Score] = {0: start}
    most = int((len(ranked) + others) * LARGEST_SHARE) - others
    if most < 1:
        return Found(frozenset(), start, 0)

    def prefix(length: int) -> Score:
        if length not in tried:
            tried[length] = score(frozenset(ranked[:length]))
        return tried[length]

    length = 1
    while not within(prefix(length)) and length < most and len(tried) <= runs:
        length = min(2 * length, most)
    if not within(prefix(length)):
        best = min(tried, key=lambda n: (tried[n].drop_pct, n))
        return Found(frozenset(ranked[:best]), tried[best], len(tried) - 1)
    short = max((n for n in tried if n < length), default=0)
    while length - short > 1 and len(tried) <= runs:
        middle = (short + length) // 2
        short, length = (short, middle) if within(prefix(middle)) else (middle, length)
    used = len(tried) - 1
    kept, current, spent = _prune(list(ranked[: length - 1]), frozenset(ranked[:length]), tried[length], score, within, runs - used)
    return Found(kept, current, used + spent)


def _prune(
    doubtful: list[str],
    kept: frozenset[str],
    current: Score,
    score: Callable[[frozenset[str]], Score],
    within: Callable[[Score], bool],
    runs: int,
) -> tuple[frozenset[str], Score, int]:
    """Takes out of ``kept`` what was not needed: all the doubtful at once, then halves of them, and so on down to single ones."""
    spent, size = 0, len(doubtful)
    while size >= 1:
        parts = [doubtful[start : start + size] for start in range(0, len(doubtful), size)]
        for part in reversed(parts):  # the cheapest first
            if spent >= runs:
                return kept, current, spent
            less = score(kept.difference(part))
            spent += 1
            if within(less):
                kept, current = kept.difference(part), less
                doubtful = [name for name in doubtful if name not in part]
        size //= 2
    return kept, current, spent
