"""Pass: token merging. In every block, the r most similar pairs of patch tokens become one token each; nothing is trained.

Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461. Knows no training, no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgejoule.errors import SpecError
from edgejoule.optimize.token_blocks import MergingBlock, looks_at_all, rebuilt, relative
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext


@dataclass(frozen=True)
class MergeTokens:
    """``merge_tokens(r=8)``: r fewer tokens after every block, at most half of the patch tokens at once. r = 0 changes nothing.

    ``proportional``: a merged token counts in attention for all that it holds (log size on its logits). A head that averages the
    tokens weighs them by size, as the authors' networks with such heads do.
    """

    r: int = 8
    proportional: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 0:
            raise SpecError(f"merge_tokens(r={self.r!r}): expected how many tokens to merge in each block, a whole number from 0 on")
        if not isinstance(self.proportional, bool):
            raise SpecError(f"merge_tokens(proportional={self.proportional!r}): expected True or False")

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset()

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A merging copy in eval mode, and the spec as it is. Raises ModelError for a network whose tokens cannot be merged."""
        return rebuilt("merge_tokens", module, spec.name, MergingBlock, self._attributes), spec

    def _attributes(self, network: nn.Module, number: int) -> Mapping[str, Any]:
        restore = looks_at_all(network)
        return {"r": self.r, "proportional": self.proportional, "follow": restore or relative(network), "restore": restore}
