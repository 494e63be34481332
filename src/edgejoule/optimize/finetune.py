"""Pass: the network learns again from labels alone what an earlier pass cost it. Changes weights only.

Knows no loop and no data: ``context.fit`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgejoule.optimize.recovery import check_length, recovered
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext


@dataclass(frozen=True)
class Finetune:
    """``finetune(epochs=5)``: by the training recipe that the study or ``--train`` names, its rate times ``lr``."""

    epochs: float = 5.0
    lr: float = 0.5

    def __post_init__(self) -> None:
        check_length("finetune", self.epochs, self.lr)

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"training"})

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A trained copy in eval mode. Raises TrainingError and what the data raises."""
        return recovered("finetune", module, spec, context, self.epochs, self.lr, ""), spec
