"""Pass: structured pruning of attention heads. The least needed ones leave, with their queries, keys, values and share of the projection.

What is left computes what the whole network would with those heads' outputs at zero; accuracy has to be won back by training.
Knows no architecture (``heads.py`` does) and trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from edgejoule.optimize.allocation import Allocation
from edgejoule.optimize.criteria import Criterion
from edgejoule.optimize.pruning import Choice, pruned
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext


@dataclass(frozen=True)
class PruneHeads:
    """``prune_heads(ratio=0.3)``: that share goes of each block's heads (``uniform``, rounded down) or of their parameters (``global``).

    ``criterion``: see ``criteria.importance``; ``taylor`` and ``hessian`` need calibration images. ``round_to`` leaves a multiple of that
    many heads in each block. ``layers`` names the blocks that may lose heads: none named, all may.
    """

    ratio: float = 0.3
    criterion: Criterion = "magnitude"
    allocation: Allocation = "uniform"
    round_to: int = 1
    layers: list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises SpecError for options that mean nothing."""
        self._choice()

    @property
    def needs(self) -> frozenset[Literal["calibration", "training", "teacher"]]:
        return self._choice().needs

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A copy with fewer heads in eval mode, and the spec as it is. Raises ModelError where none can go, though ``ratio`` is above 0."""
        from edgejoule.optimize.heads import find_heads  # imports timm, which checking a recipe does without

        return pruned(self._choice(), find_heads, module, spec, context), spec

    def _choice(self) -> Choice:
        return Choice("prune_heads", "heads", self.ratio, self.criterion, self.allocation, self.round_to, self.layers)
