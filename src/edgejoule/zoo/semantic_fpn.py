"""The Semantic FPN head (Kirillov et al., Panoptic Feature Pyramid Networks, 2019, section 3.1): a class for each pixel. Knows no backbone.

As PVT, and after it EdgeViT, set it up: 256 channels in the pyramid, 128 in the head, batch norm, 0.1 dropout. Multiply-adds
of Table 6 count this head at a quarter of the image's side; the last enlargement is interpolation and costs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

PYRAMID_CHANNELS, HEAD_CHANNELS, DROPOUT = 256, 128, 0.1


class SemanticHead(nn.Module):
    """Pyramid maps (B, 256, H_i, W_i), finest first, to logits (B, K, H_0, W_0) of ``num_classes`` K."""

    def __init__(self, num_classes: int, levels: int = 4) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(steps=max(1, level)) for level in range(levels))
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classify = nn.Conv2d(HEAD_CHANNELS, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = [tuple(one.shape[-2:]) for one in maps]
        total = torch.zeros((), dtype=maps[0].dtype, device=maps[0].device)
        for level, (convolutions, features) in enumerate(zip(self.levels, maps, strict=True)):
            for step, convolution in enumerate(convolutions.children()):
                features = convolution(features)  # (B, 128, h, w)
                finer = sizes[max(0, level - step - 1)]  # not always twice as large: 33 pixels halve to 17
                if features.shape[-2:] != finer:
                    features = functional.interpolate(features, size=finer, mode="bilinear", align_corners=False)
            total = total + features
        logits: torch.Tensor = self.classify(self.dropout(total))
        return logits


def _level(steps: int) -> nn.Sequential:
    """As many 3x3 convolutions as the level is halvings away from the finest, at least one."""
    layers = []
    for step in range(steps):
        convolution = nn.Conv2d(PYRAMID_CHANNELS if step == 0 else HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(HEAD_CHANNELS), nn.ReLU(inplace=True)))
    return nn.Sequential(*layers)
