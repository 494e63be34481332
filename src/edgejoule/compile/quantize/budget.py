"""Which products run in int8: all, or where that loses more than the budget allows, all but those that hurt most. For any runtime.

A candidate is known by the products that stay in float. One run on held-out images where the budget is met at once; else each product is
quantised alone and run on a few images, and ``search.unquantize`` puts the worst back. Knows no quantiser, and where a smoothing and
ranges are to be chosen first, ``choose`` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edgejoule.compile.quantize.options import Chosen
from edgejoule.compile.quantize.score import Judge
from edgejoule.compile.quantize.search import unquantize


def keep_budget(
    names: Sequence[str],
    judge: Judge,
    file_of: Callable[[frozenset[str]], Any],
    quantizer: str,
    ranges: str,
    others: int = 0,
    search: bool = True,
) -> tuple[Any, Chosen]:
    """``file_of`` of the products that stay in float, so that the budget is met; where none meets it, the one with the least drop.

    ``names``: the candidates, in the graph's order. ``file_of`` -> what the judge runs. ``others``: products that always stay in float.
    Raises what ``file_of`` and the judge raise.
    """
    kept: frozenset[str] = frozenset()
    made = file_of(kept)
    score = judge.score(made)
    if search and names and not judge.within(score):
        found = unquantize(_rank(names, judge, file_of), score, lambda kept: judge.score(file_of(kept)), judge.within, others=others)
        kept, score = found.kept_float, found.score
        made = file_of(kept) if kept else made
    return made, Chosen(
        quantizer=quantizer,
        smoothing="off",
        ranges=ranges,
        quantized=len(names) - len(kept),
        products=len(names) + others,
        kept_float=tuple(name for name in names if name in kept),
        error=score.error,
        drop_pct=score.drop_pct,
        drop_kind=judge.kind,
        held=len(judge.images),
        sessions=judge.runs,
        within_budget=judge.within(score),
    )


def _rank(names: Sequence[str], judge: Judge, file_of: Callable[[frozenset[str]], Any]) -> list[str]:
    """The worst first: by the logits' error when a product alone is quantised; ties in the graph's order."""
    every = frozenset(names)
    error = {name: judge.glance(file_of(every - {name})) for name in names}
    return sorted(names, key=lambda name: -error[name])
