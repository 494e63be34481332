"""Networks built without weights and counted, each once: what the printed params and FLOPs stand against.

Knows which of our networks a printed name means. Builds on the meta device: no weights, no time. Imports torch only when asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from edgejoule import catalog
from edgejoule.bench import Event
from edgejoule.records import Cost, ModelSpec

if TYPE_CHECKING:
    import torch

BACKBONES = {  # printed name -> the name that dense heads take
    "PVTv2-B0": "pvt_v2_b0",
    "PVTv2-B1": "pvt_v2_b1",
    "PVTv1-Tiny": "pvt_v1_tiny",
    "ResNet18": "resnet18",
    "EdgeViT-XXS": "edgevit_xxs",
    "EdgeViT-XS": "edgevit_xs",
    "EdgeViT-S": "edgevit_s",
}
DEEP_STEM = {"resnet18": "resnet18_v1c"}  # the segmentation toolbox behind Table 6 takes the ResNet with three 3x3 convolutions as stem
SEGMENTED = (3, 512, 512)  # (C, H, W) of Table 6


class Spatial(Protocol):
    """One term of the complexity formula, in MACs; ``counted`` is None where the network does nothing of the kind."""

    @property
    def term(self) -> str: ...
    @property
    def formula(self) -> int: ...
    @property
    def counted(self) -> int | None: ...
    @property
    def why(self) -> str: ...


class Counts(Protocol):
    """Where counts come from: networks built here, or figures given by a test. Every method may raise an EdgejouleError."""

    def cost(self, label: str) -> Cost:
        """Params and MACs of a whole classifier, at its own input size."""
        ...

    def headless_params(self, label: str) -> int:
        """Params without the classifier."""
        ...

    def stages(self, label: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks and heads of each of an EdgeViT's stages."""
        ...

    def anatomy(self, label: str) -> Mapping[str, str]:
        """What an EdgeViT is made of: ``norms``, ``kernel``, ``delegate``, ``ffns`` (a block, by stage), ``propagation_norms``."""
        ...

    def spatial(self, label: str) -> Sequence[Spatial]:
        """The appendix's complexity formula beside the counted spatial operations of an EdgeViT."""
        ...

    def dense_params(self, head: str, label: str) -> int:
        """Params of a backbone under ``retinanet``, ``mask_rcnn`` or ``semantic_fpn``."""
        ...

    def segmenter_macs(self, label: str) -> int:
        """MACs of Semantic FPN at 512 x 512."""
        ...


class BuiltCounts:
    """Counts of networks that are built here. ``notify`` hears of each one; ``total`` is how many are expected."""

    def __init__(self, notify: Callable[[Event], None], total: int = 0) -> None:
        self._notify, self._total, self._done = notify, total, 0
        self._network = functools.cache(self._build)
        self._dense = functools.cache(self._build_dense)
        self._cost = functools.cache(self._count)

    def cost(self, label: str) -> Cost:
        return self._cost(label)

    def headless_params(self, label: str) -> int:
        from edgejoule import zoo

        self._tell(f"{label} without classifier")
        return params_of(zoo.build_meta(replace(spec_of(label), num_classes=0)))

    def stages(self, label: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        module: Any = self._network(label)
        return tuple(module.depths), tuple(module.heads)

    def anatomy(self, label: str) -> Mapping[str, str]:
        return anatomy_of(self._network(label))

    def spatial(self, label: str) -> Sequence[Spatial]:
        from edgejoule.zoo.edgevit_complexity import explain

        return explain(self._network(label))

    def dense_params(self, head: str, label: str) -> int:
        return params_of(self._dense(head, label))

    def segmenter_macs(self, label: str) -> int:
        from edgejoule.screen.cost import count

        return count(self._dense("semantic_fpn", label), SEGMENTED).macs

    def _count(self, label: str) -> Cost:
        from edgejoule.screen.cost import count

        return count(self._network(label), spec_of(label).preprocessing.input_size)

    def _build(self, label: str) -> torch.nn.Module:
        from edgejoule import zoo

        self._tell(label)
        return zoo.build_meta(spec_of(label))

    def _build_dense(self, head: str, label: str) -> torch.nn.Module:
        import torch

        from edgejoule.zoo import dense

        self._tell(f"{head} on {label}")
        backbone = BACKBONES[label]
        with torch.device("meta"):
            module: torch.nn.Module = getattr(dense, head)(DEEP_STEM.get(backbone, backbone) if head == "semantic_fpn" else backbone)
        return module.eval()

    def _tell(self, text: str) -> None:
        self._done += 1
        self._notify(Event("count", text, min(self._done, self._total), self._total))


def params_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def spec_of(label: str) -> ModelSpec:
    """The catalog's row of a printed name. Raises UnknownNameError."""
    return catalog.find_model(label)


def anatomy_of(module: Any) -> dict[str, str]:
    """Read off an EdgeViT's modules, not off its options: kinds of norm, the largest depth-wise kernel, FFNs of a block by stage."""
    kinds = {type(part).__name__ for part in module.modules()}
    kernels = [p.kernel_size[0] for p in module.modules() if type(p).__name__ == "Conv2d" and p.groups == p.in_channels > 1]
    ffns = [
        sum(type(part).__name__ == "Mlp" for part in stage.modules()) / depth
        for stage, depth in zip(module.stages, module.depths, strict=True)
    ]
    spreading = [part for part in module.modules() if type(part).__name__ == "LocalPropagation"]
    spread_norms = {type(part).__name__ for one in spreading for part in one.modules() if "Norm" in type(part).__name__}
    return {
        "norms": ", ".join(sorted(kind for kind in kinds if "Norm" in kind)),
        "kernel": str(max(kernels)),
        "delegate": str(module.parts.delegate),
        "ffns": ", ".join(f"{count:g}" for count in ffns),
        "propagation_norms": ", ".join(sorted(spread_norms)) or "none",
    }
