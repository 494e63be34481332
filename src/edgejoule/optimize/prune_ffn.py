"""Pass: structured pruning of hidden neurons. The least needed ones leave the feed-forward networks, and the layers become narrower.

What is left computes what the whole network would with those neurons' outputs at zero; accuracy has to be won back by training.
Knows no architecture (``neurons.py`` does) and trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from edgejoule.optimize.allocation import Allocation
from edgejoule.optimize.criteria import Criterion
from edgejoule.optimize.neurons import find_neurons
from edgejoule.optimize.pruning import Choice, pruned
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext


@dataclass(frozen=True)
class PruneFfn:
    """``prune_ffn(ratio=0.3)``: of each network's hidden neurons (``uniform``) or of all their parameters (``global``) that share goes.

    ``criterion``: see ``criteria.importance``; ``taylor`` and ``hessian`` need calibration images. ``round_to`` leaves a multiple of that
    many neurons in each block, because kernels work on so many at once: less may go than ``ratio`` says, never more.
    ``layers`` names the blocks that may lose neurons: none named, all may.
    """

    ratio: float = 0.3
    criterion: Criterion = "magnitude"
    allocation: Allocation = "uniform"
    round_to: int = 8
    layers: list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises SpecError for options that mean nothing."""
        self._choice()

    @property
    def needs(self) -> frozenset[Literal["calibration", "training", "teacher"]]:
        return self._choice().needs

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A narrower copy in eval mode, and the spec as it is. Raises ModelError where no neuron can go, though ``ratio`` is above 0."""
        return pruned(self._choice(), find_neurons, module, spec, context), spec

    def _choice(self) -> Choice:
        return Choice("prune_ffn", "neurons", self.ratio, self.criterion, self.allocation, self.round_to, self.layers)
