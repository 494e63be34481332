"""Pass: the network learns again, from labels and a teacher, what an earlier pass cost it. Changes weights only.

The teacher is a model of the catalog with its weights, or, where none is named, the network that the recipe began with. Knows no loop
and no data: ``context.fit`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from edgejoule import registry
from edgejoule.errors import SpecError
from edgejoule.optimize.recovery import check_length, recovered
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext


@dataclass(frozen=True)
class Distill:
    """``distill(epochs=5)`` or ``distill(teacher="NAME", weights="FILE", epochs=5)``.

    ``kind`` soft learns the teacher's probabilities (arXiv 1503.02531), hard its first answer (arXiv 2012.12877); ``alpha`` is the
    teacher's share of the loss; ``lr`` a factor of the training recipe's rate.
    """

    epochs: float = 5.0
    teacher: str = ""
    weights: str = "auto"
    kind: Literal["soft", "hard"] = "soft"
    alpha: float = 0.5
    temperature: float = 2.0
    lr: float = 0.5

    def __post_init__(self) -> None:
        check_length("distill", self.epochs, self.lr)
        if not 0.0 < self.alpha <= 1.0:
            raise SpecError(f"distill: alpha={self.alpha!r} does not fit, expected a number above 0 and at most 1")
        if not 0.01 <= self.temperature <= 1000.0:
            raise SpecError(f"distill: temperature={self.temperature!r} does not fit, expected a number from 0.01 to 1000")

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"training", "teacher"})

    @property
    def learns_from(self) -> str:
        """What the loop's own grammar calls this distillation."""
        options: dict[str, Any] = {"alpha": self.alpha}
        if self.kind == "soft":
            options["temperature"] = self.temperature
        if self.teacher:
            options |= {"teacher": self.teacher, "weights": self.weights}
        return str(registry.Call(self.kind, options))

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A trained copy in eval mode. Raises TrainingError and what the data raises."""
        return recovered("distill", module, spec, context, self.epochs, self.lr, self.learns_from), spec
