"""Pass: token pruning. After some blocks only the most important patch tokens go on, at static counts.

Sources: DynamicViT (Rao et al., NeurIPS 2021, arXiv 2106.02034) for where, how many, and the learned predictor; EViT (Liang et al.,
ICLR 2022, arXiv 2202.07800) for the class token's attention as importance. What is dropped is gone: no token is made of it.
Knows no training loop and no backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.copies import adopt
from edgejoule.optimize.predictor import LivingNorm, Predictor
from edgejoule.optimize.token_blocks import PruningBlock, looks_at_all, rebuilt, relative
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext

DISTILL = "soft(alpha=0.5)"


@dataclass(frozen=True)
class PruneTokens:
    """``prune_tokens(keep=0.7)``: before the k-th of ``layers``, ceil(keep^k * patches) patch tokens are left. keep = 1.0 drops none.

    ``layers``: block numbers from 0, ascending; 0 is three of them, at a quarter, a half and three quarters of the depth. ``criterion``:
    "attention", what the class token (without one: all tokens, on average) pays to a token in the block before, or "predictor",
    a small network that is trained for ``epochs``. With "attention", ``epochs`` train what is left of the network; 0 is no training.
    A head that averages the tokens averages those that are left.
    """

    keep: float = 0.7
    criterion: Literal["attention", "predictor"] = "attention"
    layers: int | Sequence[int] = 0
    epochs: float = 0

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise SpecError(
                f"prune_tokens(keep={self.keep!r}): expected the share of patch tokens that stay at each layer, above 0, at most 1"
            )
        if self.criterion not in ("attention", "predictor"):
            raise SpecError(f"prune_tokens(criterion={self.criterion!r}): expected 'attention' or 'predictor'")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int | float) or not 0 <= self.epochs < float("inf"):
            raise SpecError(f"prune_tokens(epochs={self.epochs!r}): expected a number of epochs from 0 on")
        if self.criterion == "predictor" and self.epochs == 0 and self.keep < 1:
            raise SpecError("prune_tokens(criterion='predictor', epochs=0): a predictor must be trained, so give epochs (the paper: 30)")
        if not isinstance(self.layers, int):
            object.__setattr__(self, "layers", tuple(self.layers))  # the grammar gives a list, which is not frozen
            if not _ascending(self.layers):
                raise SpecError(
                    f"prune_tokens(layers={list(self.layers)!r}): expected 0, or block numbers from 0 on, ascending, as [3, 6, 9]"
                )
        elif self.layers != 0 or isinstance(self.layers, bool):
            raise SpecError(f"prune_tokens(layers={self.layers!r}): expected 0, or a list of block numbers, as [3, 6, 9]")

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"training", "teacher"}) if self.epochs > 0 else frozenset()

    @property
    def learns_from(self) -> str:
        """The distillation that its training asks for."""
        return DISTILL if self.epochs > 0 else ""

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A pruning copy in eval mode, and the spec as it is. Raises ModelError for a network whose tokens cannot be dropped."""

        def attributes(network: nn.Module, number: int) -> Mapping[str, Any]:
            return self._attributes(network, number, self._shares(network, spec.name), context.seed)

        pruned = rebuilt("prune_tokens", module, spec.name, PruningBlock, attributes)
        if self._learns and looks_at_all(pruned):
            pruned.norm = _living(pruned, spec.name)
        if self.epochs > 0:
            if context.fit is None:
                raise SpecError(f"prune_tokens(epochs={self.epochs!r}) trains, and there is nothing to train with here: give epochs=0")
            pruned = context.fit(pruned, spec, epochs=self.epochs, distill=self.learns_from)
        pruned.eval()
        return pruned, spec

    @property
    def _learns(self) -> bool:
        return self.criterion == "predictor" and self.keep < 1

    def _shares(self, network: Any, model: str) -> dict[int, float]:
        """Block -> share of all patch tokens that come to it. Raises ModelError for blocks that the network does not have."""
        if self.keep == 1:
            return {}
        depth, lowest = len(network.blocks), 0 if self.criterion == "predictor" else 1
        if isinstance(self.layers, int):
            chosen = tuple(sorted({max(lowest, depth * quarter // 4) for quarter in (1, 2, 3)}))
        else:
            chosen = tuple(self.layers)
        if chosen[-1] >= depth or chosen[0] < lowest:
            raise ModelError(f"prune_tokens cannot work on {model}: layers are {list(chosen)}, expected some of {lowest} to {depth - 1}")
        return {number: self.keep**k for k, number in enumerate(chosen, start=1)}

    def _attributes(self, network: Any, number: int, before: Mapping[int, float], seed: int) -> Mapping[str, Any]:
        share, predictor = before.get(number, 0.0), None
        if self._learns and share:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + number)
                predictor = Predictor(int(network.num_features), share, len(before))
        return {
            "share_before": share if predictor is not None else 0.0,
            "share_after": 0.0 if self.criterion == "predictor" else before.get(number + 1, 0.0),
            "class_token": getattr(network, "cls_token", None) is not None,
            "follow": relative(network),
            "pooled": looks_at_all(network),
            "predictor": predictor,
        }


def _ascending(numbers: Sequence[Any]) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    return whole and len(numbers) > 0 and list(numbers) == sorted(set(numbers))


def _living(network: Any, model: str) -> nn.Module:
    """The norm behind the blocks in a form that knows which tokens live. Raises ModelError for other norms and heads."""
    norm = network.norm
    whole = getattr(network, "pool_include_prefix", False)
    if network.global_pool != "avg" or whole or not isinstance(norm, nn.LayerNorm | nn.Identity):
        raise ModelError(
            f"prune_tokens(criterion='predictor') cannot work on {model}: its head pools by {network.global_pool!r} after "
            f"{type(norm).__name__}, and masks are known for means of patch tokens after a layer norm only; choose criterion='attention'"
        )
    normalises = isinstance(norm, nn.LayerNorm)
    made: nn.Module = adopt(LivingNorm, norm, prefix=int(network.num_prefix_tokens), normalises=normalises)
    for name, value in (("eps", 0.0), ("weight", None), ("bias", None)):
        if not hasattr(made, name):
            setattr(made, name, value)
    return made
