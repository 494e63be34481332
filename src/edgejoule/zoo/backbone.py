"""The leaf ``backbone(name="edgevit_xxs", size=800)``: the part of a network that detectors and segmenters build on, without their heads.

It is what EdgeViT's Tables 7 and 8 measure: four maps at strides 4 to 32, at the input size of the dense task. Each map is
averaged over its positions, so that every map is computed and the result is small; the averages stand where a classifier's
logits would, and the rest of the pipeline needs to know no more. Knows no head (dense.py does) and no data set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from edgejoule.errors import ModelError, SpecError
from edgejoule.records import ModelSpec
from edgejoule.zoo.timm import TimmModel, preprocessing_of

LARGEST = 4096  # pixels a side


class PooledMaps(torch.nn.Module):
    """(B, C, H, W) -> (B, sum of the maps' channels): each map's average, in the order of the stages."""

    def __init__(self, maps: torch.nn.Module) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.mean(dim=(2, 3)) for one in self.maps(images)], dim=1)  # each map is (B, C_i, H_i, W_i)


@dataclass(frozen=True, slots=True)
class Backbone:
    """``name`` is any of timm's networks, or of ours, that gives feature maps; ``size`` is the side of the square image in pixels."""

    name: str
    size: int = 512

    def __post_init__(self) -> None:
        if not 32 <= self.size <= LARGEST:
            raise SpecError(f"backbone(size={self.size}) does not fit: expected 32 to {LARGEST} pixels")

    def build(self, num_classes: int = 0, **options: Any) -> torch.nn.Module:
        """The maps and their averages. ``num_classes`` is ignored: there is no classifier. Raises UnknownNameError and ModelError."""
        return PooledMaps(self._maps(out_indices=self._stages(), **options))

    def _maps(self, **options: Any) -> Any:
        leaf = TimmModel(self.name)
        # Networks whose windows or positions depend on the image's size must be told it; the others do not take the option.
        sized = {"img_size": self.size} if leaf.config().get("fixed_input_size") else {}
        try:
            return leaf.build(1000, features_only=True, **sized, **options)
        except NotImplementedError as error:
            raise ModelError(f"{self.name} gives no feature maps ({error}): expected a network with stages, such as edgevit_xxs") from error

    def _stages(self) -> tuple[int, ...]:
        """The maps at strides of 4 and more: no head of a pyramid looks at the stem's."""
        with torch.device("meta"):
            info = self._maps().feature_info
        return tuple(index for index, stride in zip(info.out_indices, info.reduction(), strict=True) if stride >= 4)

    def config(self) -> dict[str, Any]:
        """timm's configuration of the whole network: its weights fit the part. Raises UnknownNameError."""
        return TimmModel(self.name).config()

    def spec(self) -> ModelSpec:
        """A catalog row without published numbers, preprocessing as timm says but for the size."""
        with torch.device("meta"):
            channels: list[int] = self._maps(out_indices=self._stages()).feature_info.channels()
        preprocessing = preprocessing_of(self.config())
        return ModelSpec(
            name=f"{self.name}@{self.size}",
            family="backbone",
            builder=f'backbone(name="{self.name}", size={self.size})',
            preprocessing=replace(preprocessing, input_size=(preprocessing.input_size[0], self.size, self.size), crop_pct=1.0),
            num_classes=sum(channels),
            dataset="unknown",
            licence=str(self.config().get("license") or "unknown"),
        )
