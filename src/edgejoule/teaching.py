"""What training and optimising share: labelled data and recipes by their spellings, and a teacher with its weights, ready for the loop.

Knows no loop, no store and no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule import registry
from edgejoule.catalog import find_model
from edgejoule.errors import DataError, SpecError, TrainingError
from edgejoule.plain import encode
from edgejoule.records import ModelSpec

if TYPE_CHECKING:
    from edgejoule.seams import LabelledData
    from edgejoule.train.recipe import Recipe

BEGAN = "the network that the recipe began with"


def open_data(text: str) -> LabelledData:
    """The labelled set that a spelling names. Raises SpecError for the spelling, DataError where it cannot be read here."""
    found: LabelledData = registry.create("data", text)
    if missing := found.probe():
        raise DataError(f"{registry.canonical(text)} cannot be used here: {missing}")
    return found


def find_recipe(text: str, kind: str = "") -> Recipe:
    """A training recipe by its spelling, of a kind of data where one is given. Raises SpecError and UnknownNameError."""
    from edgejoule.train import recipes

    recipe = recipes.find(text)
    if kind and recipe.kind != kind:
        raise SpecError(f"the recipe {recipe.name} is for {recipe.kind}, and the data is a {kind} set: name one that fits")
    return recipe


def canonical_recipe(text: str) -> str:
    """One spelling for all that mean the same."""
    from edgejoule.train import recipes

    return recipes.canonical(text)


def check_distillation(text: str) -> None:
    """Raises SpecError and UnknownNameError for a distillation that cannot be read or names a teacher that is not there."""
    from edgejoule.train import distil

    plan = distil.parse(text if _names_teacher(text) else with_teacher(text, BEGAN, ()))
    if plan.shared.teacher != BEGAN:
        find_model(plan.shared.teacher)


def teacher_id(text: str) -> str:
    """What determines the weights of a distillation's teacher, "" where it names none.

    Raises UnknownNameError and ModelError for a teacher or a file that is not there.
    """
    from edgejoule import zoo
    from edgejoule.train import distil

    if not text or not _names_teacher(text):
        return ""
    shared = distil.parse(text).shared
    return zoo.identify(find_model(shared.teacher), 0, shared.weights).weights_id


def with_teacher(text: str, teacher: str, trained: Sequence[tuple[str, str]]) -> str:
    """A distillation's spelling with its teacher: ``teacher`` where it names none (and that is not empty).

    The teacher's weights are those of ``trained`` (model, file), where it stands there and the spelling asks for no others.
    """
    calls = []
    if text and teacher and not _names_teacher(text):
        first, *others = registry.parse_recipe(text)
        text = " | ".join(map(str, (registry.Call(first.name, {**first.options, "teacher": teacher}), *others)))
    for call in registry.parse_recipe(text):
        named = call.options.get("teacher")
        if trained and isinstance(named, str) and call.options.get("weights", "auto") == "auto":
            builder = find_model(named).builder
            file = next((file for model, file in trained if find_model(model).builder == builder), None)
            call = registry.Call(call.name, {**call.options, "weights": file}) if file else call
        calls.append(str(call))
    return " | ".join(calls)


def distiller(text: str, spec: ModelSpec, seed: int, start: tuple[Any, ModelSpec], random: bool) -> Any:
    """Learning from the teacher that a spelling names, else from ``start``; ``random`` weights of that teach nothing."""
    from edgejoule.train import distil

    if _names_teacher(text):
        return named_distiller(text, spec, seed)
    from edgejoule.optimize.copies import copied

    plan = distil.parse(with_teacher(text, BEGAN, ()))
    module, its = copied(start[0]), start[1]  # a teacher's parameters stop learning, and the recipe still needs its own
    if random:
        raise TrainingError(
            f"{its.name} has random weights, which teach nothing: name a trained teacher, as in distill(teacher=..., weights=...), "
            "or give the model's own weights with --weights"
        )
    return distil.open_distiller(
        plan,
        module,
        teacher_preprocessing=its.preprocessing,
        teacher_weights="file",
        student_preprocessing=spec.preprocessing,
        num_classes=spec.num_classes,
        seed=seed,
    )


def named_distiller(
    text: str, spec: ModelSpec, seed: int, recipe: Recipe | None = None, origin: str = "", cache: Path | None = None
) -> Any:
    """Learning from a teacher of any family and input size, which must know the student's classes. ``cache`` is for kept answers."""
    from edgejoule import zoo
    from edgejoule.train import distil

    plan = distil.parse(text)
    found, classes = find_model(plan.shared.teacher), spec.num_classes
    known = found.num_classes if plan.shared.weights in ("auto", "pretrained") else classes
    its = replace(found, num_classes=known, dataset=spec.dataset, published=None)
    teacher, kind, identity = zoo.for_training(its, 0, plan.shared.weights)
    if kind != "random" and not _same_weights(teacher, zoo.for_training(its, 1, plan.shared.weights)[0]):
        raise TrainingError(
            f"the weights of the teacher {plan.shared.teacher} do not fill all of it (is its head for other classes?), "
            "and what is random teaches nothing: fine-tune it on this data first"
        )
    return distil.open_distiller(
        plan,
        teacher,
        teacher_preprocessing=its.preprocessing,
        teacher_weights=kind,  # type: ignore[arg-type]  # one of three words
        student_preprocessing=spec.preprocessing,
        num_classes=classes,
        seed=seed,
        cache_folder=cache,
        identity={
            "teacher": identity,
            "builder": its.builder,
            "origin": origin,
            "preprocessing": encode(spec.preprocessing),
            "augmentation": distil.augmentation_of(recipe) if recipe is not None else {},
            "seed": seed,
        },
    )


def _names_teacher(text: str) -> bool:
    return any("teacher" in call.options for call in registry.parse_recipe(text))


def _same_weights(one: Any, other: Any) -> bool:
    """Two networks made with two seeds are equal exactly where every tensor came from the file."""
    import torch

    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, its) for mine, its in pairs)
