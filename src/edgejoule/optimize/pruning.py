"""What the passes that take units out have in common: their options, which units go, the surgery, and what is said where none can go.

Knows no architecture: groups are given to it. Copies first; the network that it is given is never changed. Trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.allocation import ALLOCATIONS, allocate, least_ratio
from edgejoule.optimize.copies import copied, forget_caches
from edgejoule.optimize.criteria import CRITERIA, IMAGES, ON_IMAGES, importance
from edgejoule.optimize.groups import Group, parameters_of, remove
from edgejoule.optimize.impossible import refuse
from edgejoule.records import ModelSpec
from edgejoule.seams import Held, PassContext


@dataclass(frozen=True, slots=True)
class Choice:
    """A pass's name and options, checked."""

    name: str
    kind: str  # of its units: heads, neurons
    ratio: float
    criterion: str
    allocation: str = "uniform"
    round_to: int = 1
    layers: Sequence[str] = ()  # the blocks that may lose units; none named: all

    def __post_init__(self) -> None:
        """Raises SpecError."""
        names_of(self.name, self.layers)
        check_ratio(self.name, self.ratio)
        check_name(self.name, "criterion", self.criterion, CRITERIA)
        check_name(self.name, "allocation", self.allocation, ALLOCATIONS)
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise SpecError(f"{self.name} has round_to={self.round_to!r}: expected a whole number from 1 on, such as 8")

    @property
    def needs(self) -> frozenset[Literal["calibration", "training", "teacher"]]:
        return needs_of(self.criterion)


def needs_of(criterion: str) -> frozenset[Literal["calibration", "training", "teacher"]]:
    """Images, where a criterion looks at the loss."""
    return frozenset({"calibration"}) if criterion in ON_IMAGES else frozenset()


def check_ratio(name: str, ratio: Any) -> None:
    """Raises SpecError unless it is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio) or not 0 <= ratio < 1:
        raise SpecError(f"{name} has ratio={ratio!r}: expected a share from 0 up to, but not, 1, such as 0.3")


def check_name(name: str, option: str, value: Any, known: Sequence[str]) -> None:
    """Raises SpecError unless the value is one of ``known``."""
    if value not in known:
        raise SpecError(f"{name} has {option}={value!r}: expected {' or '.join(map(repr, known))}")


def pruned(
    choice: Choice, find: Callable[[nn.Module], Sequence[Group]], module: nn.Module, spec: ModelSpec, context: PassContext
) -> nn.Module:
    """A copy in eval mode without the units that matter least. Raises ModelError where nothing can go, though something should."""
    refuse(choice.name, module, spec.name)
    try:
        twin = copied(module)
        groups = _named(choice, tuple(find(twin)))
        if not groups:
            raise ModelError(
                f"it has no block of two or more {choice.kind} that are known to be free to leave; leave the pass out of the recipe"
            )
        held = held_images(choice.name, choice.criterion, spec, context) if choice.ratio else None
        dropped = _dropped(choice, twin, groups, held, context.seed) if choice.ratio else {}
    except ModelError as error:
        raise ModelError(f"{choice.name} cannot work on {spec.name}: {error}") from error
    for group in groups:
        remove(twin, group, dropped.get(group.name, ()))
    forget_caches(twin)
    gone, units = sum(map(len, dropped.values())), sum(group.units for group in groups)
    context.notify(f"{choice.name}: {100 * gone / units:.0f} % of {units:,} {choice.kind} in {len(groups)} groups")
    return twin


def names_of(name: str, layers: Any) -> tuple[str, ...]:
    """The option ``layers`` as a tuple. Raises SpecError unless it is a list of names of blocks."""
    if not isinstance(layers, (list, tuple)) or not all(isinstance(one, str) and one for one in layers):
        raise SpecError(f"{name} has layers={layers!r}: expected names of blocks, as in ['blocks.0.attn']")
    return tuple(layers)


def _named(choice: Choice, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups that the choice is for. Raises ModelError for a name that is none of theirs."""
    there = {group.name: group for group in groups}
    for name in choice.layers:
        if groups and name not in there:
            raise ModelError(f"its blocks with {choice.kind} are {', '.join(there)}, and {name!r} is none of them")
    return tuple(there[name] for name in dict.fromkeys(choice.layers)) if choice.layers else groups


def held_images(name: str, criterion: str, spec: ModelSpec, context: PassContext) -> Held | None:
    """Training images for the criteria that look at the loss. Raises ModelError where the context has none."""
    if criterion not in ON_IMAGES:
        return None
    if context.data is None:
        raise ModelError(f"criterion={criterion!r} needs images, and there are none: use criterion='magnitude', or give it training data")
    context.notify(f"{name}: {criterion} on {IMAGES} images")
    return context.data(spec, IMAGES)


def _dropped(choice: Choice, root: nn.Module, groups: Sequence[Group], held: Held | None, seed: int) -> dict[str, tuple[int, ...]]:
    """{group: units}, never nothing at all."""
    with torch.no_grad():
        scores = {name: values.tolist() for name, values in importance(choice.criterion, root, groups, held, seed).items()}
    params = {group.name: parameters_of(root, group) for group in groups}
    dropped = allocate(scores, params, choice.ratio, choice.allocation, choice.round_to)
    if any(dropped.values()):
        return dropped
    smallest, kind = min(group.units for group in groups), choice.kind
    least = least_ratio(scores, params, choice.allocation, choice.round_to)
    if least is None:
        raise ModelError(f"blocks of {smallest} {kind} and more cannot shrink to a multiple of {choice.round_to}: lower round_to")
    raise ModelError(
        f"ratio={choice.ratio:g} would drop none of the {kind} in its {len(groups)} groups (the smallest has {smallest}): "
        f"ratio={least:g} is the lowest that drops one"
    )
