"""A recipe ``a | b(c=1)``: its passes, applied in order to one network. Knows no pass, no backend and no training.

The module that goes in is never changed. What a pass needs and this version cannot give is said before any work.
"""

from __future__ import annotations

from typing import Any

from edgejoule import registry
from edgejoule.errors import EdgejouleError, ModelError, SpecError
from edgejoule.records import ModelSpec
from edgejoule.seams import Pass, PassContext


def passes(recipe: str) -> tuple[tuple[str, Pass], ...]:
    """The passes of a recipe with their canonical spellings, in order; none for an empty one.

    Raises SpecError for a spelling that cannot be read, a pass that is not there, and options that it does not take.
    """
    return tuple((str(call), registry.create("pass", str(call))) for call in registry.parse_recipe(recipe))


# (earlier, later, why the later one cannot follow); "*" is any pass
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("qat", "*", "the network is quantised by then, and whatever changes it afterwards undoes that: put qat last"),
    ("merge_tokens", "resize", "how many tokens are merged was fixed for the old size: resize first"),
    ("prune_tokens", "resize", "how many tokens stay was fixed for the old size: resize first"),
    ("window_attention", "resize", "the windows were laid out on the old grid: resize first"),
    ("merge_tokens", "window_attention", "windows need every token in its place on the grid: use one or the other"),
    ("prune_tokens", "window_attention", "windows need every token in its place on the grid: use one or the other"),
    ("window_attention", "merge_tokens", "windows need every token in its place on the grid: use one or the other"),
    ("window_attention", "prune_tokens", "windows need every token in its place on the grid: use one or the other"),
    ("merge_tokens", "merge_tokens", "the blocks merge already: give one merge_tokens a larger r"),
    ("prune_tokens", "prune_tokens", "tokens are dropped already: give one prune_tokens a smaller keep"),
    ("merge_tokens", "prune_tokens", "both shorten the same sequence: use one or the other"),
    ("prune_tokens", "merge_tokens", "both shorten the same sequence: use one or the other"),
    ("merge_tokens", "prune_heads", "its attention computes other things by then: prune first"),
    ("prune_tokens", "prune_heads", "its attention computes other things by then: prune first"),
    ("window_attention", "prune_heads", "its attention computes other things by then: prune first"),
    ("prune_weights", "prune_heads", "taking rows and columns out breaks the pattern of the zeros: prune structures first"),
    ("prune_weights", "prune_ffn", "taking rows and columns out breaks the pattern of the zeros: prune structures first"),
    ("prune_weights", "fuse", "folding fills the zeros that norms are folded into: fuse first"),
    ("prune_weights", "resize", "resizing is for the whole network: resize first"),
)


def check(recipe: str, provided: frozenset[str] = frozenset({"calibration"})) -> None:
    """Raises SpecError unless every pass is there, may stand where it stands, and needs nothing but what is ``provided``.

    That is of calibration, training and teacher.
    """
    found = passes(recipe)
    for text, one in found:
        if missing := sorted(one.needs - provided):
            what = " and ".join(missing)
            raise SpecError(
                f"the pass {text} needs {what}, and there is no labelled data: name it with --data, or in a study's table [train]"
            )
    check_order(recipe)


def check_order(recipe: str) -> None:
    """Raises SpecError where a pass stands behind one that it cannot follow."""
    names = [call.name for call in registry.parse_recipe(recipe)]
    for place, later in enumerate(names):
        for earlier in names[:place]:
            for first, then, why in REFUSED:
                if first == earlier and then in (later, "*"):
                    raise SpecError(f"{later} cannot follow {earlier}: {why}")


def is_exact(recipe: str) -> bool:
    """Whether every pass gives the same answers as before, so that the recipe's network is its model's: a pass says so as ``exact``."""
    return all(getattr(one, "exact", False) for _, one in passes(recipe))


def apply(recipe: str, module: Any, spec: ModelSpec, context: PassContext) -> tuple[Any, ModelSpec]:
    """The network after all passes of a recipe, in eval mode. Raises ModelError where a pass fails on it, SpecError as ``check`` does."""
    for text, one in passes(recipe):
        try:
            module, spec = one(module, spec, context)
        except EdgejouleError:
            raise
        except Exception as error:  # a third party's pass may raise anything: name it, and other variants go on
            said = " ".join(str(error).split())[:300]
            raise ModelError(f"the pass {text} raised {type(error).__name__} on {spec.name}: {said}; leave it out of the recipe") from error
    module.eval()  # its result is not used: some networks' own train() returns nothing
    return module, spec
