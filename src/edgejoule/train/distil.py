"""How a distillation is spelt: ``soft(teacher="NAME", alpha=0.5) | features(weight=1.0)``, checked without torch.

    hard(alpha=0.5)                     the student learns the teacher's answer beside the label     arXiv 2012.12877, eq. 3
    soft(alpha=0.5, temperature=1.0)    the student learns the teacher's probabilities               arXiv 1503.02531; 2012.12877, eq. 2
    features(weight=1.0, layers=1)      the student's maps become the teacher's                      arXiv 1412.6550
    attention(weight=1000.0, layers=0)  the student looks where the teacher looks                    arXiv 1612.03928

The parts of one spelling share one teacher: ``teacher`` and ``weights`` stand in any of them, once. So do, for hard and soft, ``heads``
(0: as many as the network has of its own; 1: one; 2: a second head, folded into the first at the end), ``cache_epochs`` (order and
augmentation repeat after so many epochs, whose teacher's answers are kept on disk: arXiv 2207.10666) and ``top_k`` (how many
probabilities of an image are kept). Knows no network: who builds the teacher hands it to ``open_distiller``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgejoule import registry
from edgejoule.errors import SpecError, TrainingError, UnknownNameError
from edgejoule.records import Preprocessing
from edgejoule.registry import Call

if TYPE_CHECKING:
    import torch

    from edgejoule.train.task import Distiller

Pairs: TypeAlias = "tuple[tuple[int, int], ...]"  # (of the student, of the teacher): places in the lists of their intermediate maps
MOST_EPOCHS, MOST_CLASSES = 100_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Hard:
    """``alpha`` times the cross-entropy with the teacher's first answer, taken from the weight of the label's loss."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _share("hard", self.alpha)


@dataclass(frozen=True, slots=True)
class Soft:
    """``alpha`` times KL(teacher || student) at a temperature, times its square, taken from the weight of the label's loss.

    ``average`` over images, as the equation says, or over ``elements`` as DeiT's released code does: that is K times less.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    average: Literal["images", "elements"] = "images"

    def __post_init__(self) -> None:
        _share("soft", self.alpha)
        if not 0.01 <= self.temperature <= 1000.0:
            raise SpecError(f"soft: temperature={self.temperature!r} does not fit, expected a number from 0.01 to 1000")


@dataclass(frozen=True, slots=True)
class Features:
    """``weight`` times the distance of the student's intermediate maps from the teacher's. ``layers``: see Attention."""

    weight: float = 1.0
    layers: int | list[Any] | tuple[Any, ...] = 1

    def __post_init__(self) -> None:
        _weight("features", self.weight)
        _layers("features", self.layers)


@dataclass(frozen=True, slots=True)
class Attention:
    """``weight`` times the distance of the spatial attention maps.

    ``layers``: how many, equally spaced in depth, the last one among them; 0 is up to 4, as both networks have; or pairs
    ``[[0, 2], [3, 11]]`` of a student's and a teacher's intermediate map, counted as timm's ``forward_intermediates`` does.
    """

    weight: float = 1000.0
    layers: int | list[Any] | tuple[Any, ...] = 0

    def __post_init__(self) -> None:
        _weight("attention", self.weight)
        _layers("attention", self.layers)


Part: TypeAlias = "Hard | Soft | Features | Attention"
PARTS: Mapping[str, type[Hard | Soft | Features | Attention]] = {"hard": Hard, "soft": Soft, "features": Features, "attention": Attention}


@dataclass(frozen=True, slots=True)
class Shared:
    """What the parts of one distillation have in common."""

    teacher: str = ""
    weights: str = "auto"
    heads: Literal[0, 1, 2] = 0
    cache_epochs: int = 0
    top_k: int = 100


OF_ANSWERS = ("heads", "cache_epochs", "top_k")  # options of parts that learn the teacher's answers


@dataclass(frozen=True, slots=True)
class Plan:
    """One distillation. ``str()`` gives its canonical spelling, defaults left out. ``weights``: auto, pretrained or a file."""

    parts: tuple[Part, ...]
    shared: Shared

    @property
    def hard(self) -> Hard | None:
        return next((part for part in self.parts if isinstance(part, Hard)), None)

    @property
    def soft(self) -> Soft | None:
        return next((part for part in self.parts if isinstance(part, Soft)), None)

    @property
    def answers(self) -> bool:
        """Whether the teacher's answers are learned, not only its maps."""
        return self.hard is not None or self.soft is not None

    @property
    def label_share(self) -> float:
        """The weight that is left to the label's own loss."""
        return max(0.0, 1.0 - sum(part.alpha for part in self.parts if isinstance(part, (Hard, Soft))))

    def __str__(self) -> str:
        shared = _said(self.shared)
        calls = []
        for part in self.parts:
            takes = shared if isinstance(part, (Hard, Soft)) else {key: shared[key] for key in shared if key not in OF_ANSWERS}
            calls.append(str(Call(type(part).__name__.lower(), {**_said(part), **takes})))
            shared = {key: shared[key] for key in shared if key not in takes}
        return " | ".join(calls)


def parse(text: str) -> Plan:
    """The distillation that a spelling means. No torch.

    Raises SpecError for what makes no sense, UnknownNameError for a part that is none of hard, soft, features, attention.
    """
    found: list[Part] = []
    shared: dict[str, Any] = {}
    for call in registry.parse_recipe(text):
        if call.name not in PARTS:
            raise UnknownNameError("distillation", call.name, PARTS, f"known: {', '.join(PARTS)}")
        if any(isinstance(part, PARTS[call.name]) for part in found):
            raise SpecError(f"cannot read {text!r}: {call.name} is given twice")
        common = {key: value for key, value in call.options.items() if key in _names(Shared)}
        for key, value in common.items():
            if shared.setdefault(key, value) != value:
                raise SpecError(f"cannot read {text!r}: {key} is {shared[key]!r} and {value!r}; the parts share one, so give it once")
            if key in OF_ANSWERS and call.name not in ("hard", "soft"):
                raise SpecError(f"{call.name} has no option {key!r}: it is one of hard and soft, which learn the teacher's answers")
        own = {key: value for key, value in call.options.items() if key not in common}
        found.append(registry.construct("distillation", Call(call.name, own), PARTS[call.name]))
    plan = Plan(
        tuple(found), registry.construct("distillation", Call(found[0].__class__.__name__.lower() if found else "", shared), Shared)
    )
    _check(plan, text)
    return plan


def canonical(text: str, weights: bool = True) -> str:
    """One spelling for all that mean the same; the empty one is no distillation. Raises as ``parse`` does.

    Without ``weights`` it leaves out where the teacher's lie: what they are is another matter.
    """
    if not text.strip():
        return ""
    plan = parse(text)
    return str(plan if weights else dataclasses.replace(plan, shared=dataclasses.replace(plan.shared, weights="auto")))


def augmentation_of(recipe: Any) -> dict[str, Any]:
    """What of a recipe decides which images a network sees: part of the identity of cached answers."""
    names = "batch crop_scale crop_ratio hflip color_jitter rand_augment erasing mixup cutmix mix_prob mix_switch repeats"
    return {name: getattr(recipe, name) for name in names.split()}


def open_distiller(
    plan: Plan,
    teacher: torch.nn.Module,
    *,
    teacher_preprocessing: Preprocessing,
    teacher_weights: Literal["random", "pretrained", "file"],
    student_preprocessing: Preprocessing,
    num_classes: int,
    seed: int = 0,
    cache_folder: Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Distiller:
    """What turns a student's loss into a distilled one.

    ``identity`` holds all else that decides the teacher's answers, as plain values: the teacher's weights (a sha256), the data's
    origin, ``augmentation_of(recipe)``, the run's seed. It and ``cache_folder`` are needed where ``cache_epochs`` is not 0.
    Raises TrainingError for a teacher with random weights, or other classes than the student's where its answers are learned, and where
    a cache is damaged; OutputError where none can be written.
    """
    if teacher_weights == "random":
        raise TrainingError(
            f"the teacher {plan.shared.teacher} has random weights, which teach nothing: give weights='FILE' of a trained one, "
            "or weights='pretrained' where the hub or its cache has them"
        )
    if plan.shared.cache_epochs and (cache_folder is None or not identity):
        raise TrainingError("cached answers of a teacher need a folder and an identity: give cache_folder and identity")
    from edgejoule.train import distilling
    from edgejoule.train.teacher import Teacher

    classes = num_classes if plan.answers else None  # a teacher of maps alone may know other classes
    master = Teacher(teacher, plan.shared.teacher, teacher_preprocessing, student_preprocessing, classes)
    cache = distilling.open_cache(plan, num_classes, seed, cache_folder, identity or {}, student_preprocessing)
    return distilling.Distillation(plan, master, cache, seed)


def _check(plan: Plan, text: str) -> None:
    shared = plan.shared
    if not plan.parts:
        raise SpecError(f"cannot read {text!r}: expected hard, soft, features or attention, as in soft(teacher='NAME')")
    if not shared.teacher:
        raise SpecError(f"cannot read {text!r}: a distillation needs a teacher, as in soft(teacher='NAME')")
    if shared.weights in ("random", ""):
        raise SpecError("a teacher with random weights teaches nothing: weights is a file, 'pretrained' or 'auto'")
    if sum(part.alpha for part in plan.parts if isinstance(part, (Hard, Soft))) > 1.0 + 1e-9:
        raise SpecError(f"cannot read {text!r}: the alphas of hard and soft may not be more than 1 together")
    for key, least, most in (("cache_epochs", 0, MOST_EPOCHS), ("top_k", 1, MOST_CLASSES)):
        if not least <= getattr(shared, key) <= most:
            raise SpecError(f"{key}={getattr(shared, key)} does not fit, expected a whole number from {least} to {most}")
    if shared.cache_epochs and len(plan.parts) > sum(isinstance(part, (Hard, Soft)) for part in plan.parts):
        raise SpecError("answers can be cached, maps cannot: take features and attention out, or cache_epochs")


def _share(name: str, alpha: float) -> None:
    if not 0.0 < alpha <= 1.0:
        raise SpecError(f"{name}: alpha={alpha!r} does not fit, expected a number above 0 and at most 1")


def _weight(name: str, weight: float) -> None:
    if not 0.0 < weight <= 1e9:
        raise SpecError(f"{name}: weight={weight!r} does not fit, expected a number above 0 and at most 1e9")


def _layers(name: str, layers: Any) -> None:
    if isinstance(layers, int):
        if not 0 <= layers <= 1000:
            raise SpecError(f"{name}: layers={layers!r} does not fit, expected a whole number from 0 to 1000, or pairs")
    elif not layers or not all(_is_pair(pair) for pair in layers):
        raise SpecError(f"{name}: layers={layers!r} does not fit, expected a whole number, or pairs such as [[0, 2], [3, 11]]")


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(index) is int for index in value)


def _names(record: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(record))


def _said(record: Any) -> dict[str, Any]:
    """The options of a record that are not its defaults, in one form: numbers as floats where they are, pairs as lists."""
    said: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value != field.default:
            said[field.name] = value
            if isinstance(value, (list, tuple)):
                said[field.name] = [list(pair) for pair in value]
            elif isinstance(field.default, float):
                said[field.name] = float(value)
    return said
