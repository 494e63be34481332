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


def check(recipe: str, provided: frozenset[str] = frozenset()) -> None:
    """Raises SpecError unless every pass is there and needs nothing but what is ``provided`` (calibration, training, teacher)."""
    for text, one in passes(recipe):
        if missing := sorted(one.needs - provided):
            raise SpecError(f"the pass {text} needs {' and '.join(missing)}, which this verb does not provide: leave it out of the recipe")


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
