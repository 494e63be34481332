"""Pass: single weights to zero, at the shapes they had: the smallest of each layer, or two of every four. A smaller file, not a faster one.

A runtime multiplies by zero as by anything else, unless it has a kernel for that pattern: reports say "size only". Depth-wise convolutions,
what reads the image and what gives the classes stay dense: few weights, and all of them needed. Trains nothing; each layer that was
thinned carries its pattern as ``sparsity``, and training keeps its zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.copies import copied
from edgejoule.optimize.criteria import CRITERIA, Criterion, weight_importance
from edgejoule.optimize.impossible import refuse
from edgejoule.optimize.pruning import check_name, check_ratio, held_images, needs_of
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext

PATTERNS = ("unstructured", "2:4")
STEMS = ("stem", "patch_embed", "tokens_to_token")  # children of the network under which everything reads the image
HEADS = ("head", "head_dist", "classifier", "fc")  # where the layers that give the classes are


@dataclass(frozen=True)
class PruneWeights:
    """``prune_weights(ratio=0.5)``: that share of each layer's weights is zero. ``pattern="2:4"``: two of every four along the input axis.

    ``criterion``: what "smallest" means, see ``criteria.importance``; ``taylor`` and ``hessian`` need calibration images.
    """

    ratio: float = 0.5
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    criterion: Criterion = "magnitude"

    def __post_init__(self) -> None:
        """Raises SpecError for options that mean nothing."""
        check_ratio("prune_weights", self.ratio)
        check_name("prune_weights", "pattern", self.pattern, PATTERNS)
        check_name("prune_weights", "criterion", self.criterion, CRITERIA)
        if self.pattern == "2:4" and self.ratio != 0.5:
            raise SpecError(f"prune_weights has ratio={self.ratio!r}, and the pattern 2:4 is a half by itself: leave the ratio out")

    @property
    def needs(self) -> frozenset[Literal["calibration", "training", "teacher"]]:
        return needs_of(self.criterion)

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A copy with zeros in eval mode, and the spec as it is. Raises ModelError where no layer takes the pattern."""
        refuse("prune_weights", module, spec.name)
        try:
            twin = copied(module)
            layers = dict(self._layers(twin, spec))
            if not layers:
                raise ModelError("it has no layer that takes the pattern; leave the pass out of the recipe")
            zeros = self._zero(twin, layers, spec, context) if self.ratio else 0
        except ModelError as error:
            raise ModelError(f"prune_weights cannot work on {spec.name}: {error}") from error
        total = sum(parameter.numel() for parameter in twin.parameters())
        context.notify(f"prune_weights: {zeros:,} of {total:,} parameters are zeros, in {len(layers)} layers")
        return twin, spec

    def _layers(self, root: nn.Module, spec: ModelSpec) -> Iterator[tuple[str, Any]]:
        for name, layer in prunable(root, spec):
            if self.pattern != "2:4" or layer.weight.shape[1] % 4 == 0:  # a kernel for 2:4 takes no others
                yield name, layer

    def _zero(self, root: nn.Module, layers: dict[str, Any], spec: ModelSpec, context: PassContext) -> int:
        """Sets the zeros, in place; how many there are."""
        held = held_images("prune_weights", self.criterion, spec, context)
        scores = weight_importance(self.criterion, root, [f"{name}.weight" for name in layers], held, context.seed)
        zeros = 0
        for name, layer in layers.items():
            score = scores[f"{name}.weight"].masked_fill(layer.weight.detach() == 0, -1.0)  # what is zero stays so
            keep = two_of_four(score) if self.pattern == "2:4" else largest(score, self.ratio)
            with torch.no_grad():
                layer.weight.masked_fill_(~keep, 0.0)
            layer.sparsity = "2:4" if self.pattern == "2:4" else f"{self.ratio:g}"
            zeros += int((layer.weight == 0).sum())
        if zeros == 0:
            raise ModelError(f"ratio={self.ratio:g} is less than one weight of any of its layers: raise it")
        return zeros


def largest(scores: Tensor, ratio: float) -> Tensor:
    """A mask of the scores' shape: true but for the lowest share ``ratio`` (rounded down; of equal ones the first go)."""
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[scores.flatten().argsort(stable=True)[: int(ratio * scores.numel() + 1e-9)]] = False
    return keep.reshape(scores.shape)


def two_of_four(scores: Tensor) -> Tensor:
    """A mask (O, I, ...), I a multiple of 4: true for the two highest scores among each four neighbours along the input axis I."""
    last = scores.movedim(1, -1)  # (O, ..., I)
    fours = last.reshape(*last.shape[:-1], -1, 4)
    chosen = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    keep = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, chosen, True)
    return keep.reshape(last.shape).movedim(-1, 1)


def prunable(root: nn.Module, spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    """The linear layers and convolutions that may hold zeros, with their names: see the head of the file for what is left out."""
    channels = spec.preprocessing.input_size[0]
    heads = _heads(root, spec.num_classes)
    seen: set[int] = set()
    for name, layer in root.named_modules():
        if not isinstance(layer, (nn.Linear, _ConvNd)) or isinstance(layer, _ConvTransposeNd) or id(layer.weight) in seen:
            continue
        seen.add(id(layer.weight))
        of_image = name.split(".")[0] in STEMS or (isinstance(layer, _ConvNd) and layer.in_channels == channels)
        depthwise = isinstance(layer, _ConvNd) and layer.weight.shape[1] == 1 and layer.groups > 1
        if not of_image and not depthwise and layer not in heads:
            yield name, layer


def _heads(root: nn.Module, classes: int) -> set[nn.Module]:
    """The layers that give the classes: as wide as these, under what timm's ``get_classifier`` names or under a head's usual name."""
    if classes < 1:
        return set()
    named = [getattr(root, name, None) for name in HEADS]
    get_classifier = getattr(root, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    roots = [part for part in (*named, *(found if isinstance(found, (tuple, list)) else (found,))) if isinstance(part, nn.Module)]
    return {
        layer for part in roots for layer in part.modules() if isinstance(layer, (nn.Linear, _ConvNd)) and layer.weight.shape[0] == classes
    }
