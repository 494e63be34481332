"""Detection and segmentation on any backbone with maps at strides 4, 8, 16 and 32: RetinaNet, Mask R-CNN, Semantic FPN.

The heads of EdgeViT's Tables 5 and 6, out of torchvision's parts. All number classes as their data sets do once made
contiguous: detectors say 1 to ``num_classes`` (0 is background), segmentation says 0 to ``num_classes`` - 1. Detectors take
images in 0..1 of any size and normalise them as the backbone expects; segmentation takes normalised images.
The maps are backbone.py's. Knows no data set, no loss schedule and no published accuracy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgejoule import torchvision
from edgejoule.errors import ModelError, SpecError, UnknownNameError
from edgejoule.zoo.backbone import STRIDES, FeatureMaps, feature_maps
from edgejoule.zoo.semantic_fpn import PYRAMID_CHANNELS, SemanticHead

torchvision.ensure()
from torchvision.models.detection import MaskRCNN, RetinaNet  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7  # noqa: E402


class Pyramid(nn.Module):
    """A backbone and a feature pyramid over its maps from ``first`` on (Lin et al., 2017), as torchvision's detectors take it.

    ``extra`` adds coarser levels: ``pool`` halves the last one (Mask R-CNN), ``convolve`` makes two by strided convolutions of the
    backbone's last map (RetinaNet).
    """

    def __init__(self, features: FeatureMaps, first: int = 0, extra: str = "") -> None:
        super().__init__()
        self.features = features
        self.first = first
        self.out_channels = PYRAMID_CHANNELS
        blocks: Any = None
        if extra == "pool":
            blocks = LastLevelMaxPool()
        elif extra == "convolve":
            blocks = LastLevelP6P7(features.channels[-1], PYRAMID_CHANNELS)
            # Where the backbone's last map has 256 channels too, torchvision guesses that the pyramid's map is meant instead.
            blocks.use_P5 = False
        self.pyramid = FeaturePyramidNetwork(list(features.channels[first:]), PYRAMID_CHANNELS, extra_blocks=blocks)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) -> name: (B, 256, h, w), finest first."""
        maps = self.features(images)[self.first :]
        levels: dict[str, torch.Tensor] = self.pyramid(OrderedDict((str(level), one) for level, one in enumerate(maps)))
        return levels


class ContiguousRetinaNet(RetinaNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's RetinaNet with labels 1 to ``num_classes`` outside and no output spent on a background class inside."""

    def compute_loss(self, targets: list[dict[str, torch.Tensor]], head_outputs: Any, anchors: Any) -> Any:
        _require_labels(targets, self.head.classification_head.num_classes)
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        return super().compute_loss(shifted, head_outputs, anchors)

    def postprocess_detections(self, *arguments: Any) -> list[dict[str, torch.Tensor]]:
        detections = super().postprocess_detections(*arguments)
        return [{**found, "labels": found["labels"] + 1} for found in detections]


class ContiguousMaskRCNN(MaskRCNN):  # type: ignore[misc]
    """torchvision's Mask R-CNN, which numbers classes so already: refuses labels that it would take for background."""

    def forward(self, images: Any, targets: list[dict[str, torch.Tensor]] | None = None) -> Any:
        _require_labels(targets or [], self.roi_heads.mask_predictor.mask_fcn_logits.out_channels - 1)
        return super().forward(images, targets)


def _require_labels(targets: Sequence[Mapping[str, torch.Tensor]], num_classes: int) -> None:
    for target in targets:
        wrong = target["labels"][(target["labels"] < 1) | (target["labels"] > num_classes)]
        if len(wrong):
            raise ModelError(
                f"an object has a label of {int(wrong[0])}; expected 1 to {num_classes}: number the classes contiguously from 1"
            )


def retinanet(backbone: str | nn.Module, num_classes: int = 80, **options: Any) -> nn.Module:
    """RetinaNet (Lin et al., 2017): pyramid levels 3 to 7 of 256 channels, 9 anchors, four convolutions in each head, no norm.

    Training: ``module(images, targets) -> losses``; evaluation: ``module(images) -> [{boxes, labels, scores}]``, boxes in pixels of the
    given image. ``images`` are a list of (3, H, W) or a batch, in 0..1; each target has ``boxes`` (N, 4) and ``labels`` (N,) from 1.
    ``options`` go to torchvision's class: ``min_size=800, max_size=1333, score_thresh, ...``. Raises UnknownNameError, ModelError.
    """
    features = feature_maps(backbone)
    module: nn.Module = ContiguousRetinaNet(
        Pyramid(features, first=1, extra="convolve"),
        num_classes,
        **{"image_mean": list(features.mean), "image_std": list(features.std), **options},
    )
    return module


def mask_rcnn(backbone: str | nn.Module, num_classes: int = 80, **options: Any) -> nn.Module:
    """Mask R-CNN (He et al., 2017): pyramid levels 2 to 6 of 256 channels, 3 anchors, two linear layers of 1024, four mask convolutions.

    Called as ``retinanet``; targets and results have ``masks`` too: (N, H, W) uint8 given, (N, 1, H, W) in 0..1 found.
    ``num_classes`` counts no background. ``options`` go to torchvision's class. Raises UnknownNameError, ModelError.
    """
    features = feature_maps(backbone)
    module: nn.Module = ContiguousMaskRCNN(
        Pyramid(features, extra="pool"),
        num_classes + 1,
        **{"image_mean": list(features.mean), "image_std": list(features.std), **options},
    )
    return module


class SemanticFPN(nn.Module):
    """Normalised images (B, 3, H, W) to logits (B, K, H, W)."""

    def __init__(self, features: FeatureMaps, num_classes: int) -> None:
        super().__init__()
        self.backbone = Pyramid(features)
        self.head = SemanticHead(num_classes, levels=len(STRIDES))
        self.mean, self.std = features.mean, features.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.head(list(self.backbone(images).values()))  # (B, K, H/4, W/4)
        return functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def semantic_fpn(backbone: str | nn.Module, num_classes: int = 150) -> SemanticFPN:
    """Semantic FPN: ``module(images)`` gives logits for each pixel, classes from 0 to ``num_classes`` - 1.

    ``images`` (B, 3, H, W) are normalised with the module's ``mean`` and ``std``; any size of 32 pixels and more. Table 6's ResNet18
    is ``resnet18_v1c``. Raises UnknownNameError, ModelError.
    """
    return SemanticFPN(feature_maps(backbone), num_classes)


HEADS: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {
    "detection": {"retinanet": retinanet, "mask_rcnn": mask_rcnn},
    "segmentation": {"semantic_fpn": semantic_fpn},
}


def head_of(kind: str, name: str) -> Callable[..., nn.Module]:
    """What builds the head ``name`` for a task of ``kind`` ("detection", "segmentation"). Raises UnknownNameError for either."""
    if kind not in HEADS:
        raise UnknownNameError("kind of dense task", kind, HEADS, f"known: {', '.join(HEADS)}")
    if name not in HEADS[kind]:
        raise UnknownNameError(f"{kind} head", name, HEADS[kind], f"known: {', '.join(HEADS[kind])}")
    return HEADS[kind][name]


def build_head(name: str, backbone: str | nn.Module, num_classes: int, **options: Any) -> nn.Module:
    """A network of the head ``name`` on a backbone: ``retinanet``, ``mask_rcnn`` or ``semantic_fpn``, called as those are.

    Raises UnknownNameError for the head or the backbone, ModelError for a backbone without the maps, SpecError for options that the
    head does not take.
    """
    known = {head: builder for heads in HEADS.values() for head, builder in heads.items()}
    if name not in known:
        raise UnknownNameError("head", name, known, f"known: {', '.join(known)}")
    features = feature_maps(backbone)
    try:
        return known[name](features, num_classes, **options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"cannot build {name} with {', '.join(options) or 'no options'} ({error}): give options that it takes") from error
