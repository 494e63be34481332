"""Twins-SVT-Tiny, a baseline of the EdgeViT paper: attention inside windows of 7 x 7, then to a strided convolution's summary, in turns.

Source: Chu et al., Twins, arXiv 2104.13840; the Tiny configuration is that of the EdgeViT authors' first commit. The class
is timm's. The authors' has 4,092,112 parameters, timm's 4,008,304: theirs builds a reduction convolution and its norm
in the last stage, where the ratio is 1 and nothing is reduced, and never uses them. The multiply-adds are the same.
Takes any image whose sides are multiples of 32. Knows no weights: none are published.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from edgejoule.zoo import torchvision

torchvision.ensure()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.twins import Twins  # noqa: E402

__all__: list[str] = []  # register_model adds the entry point


class PositionConv(nn.Module):
    """Positions from the content: x + depth-wise 3 x 3 convolution of x. ``fuse`` folds the identity into the kernel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.proj = nn.Sequential(conv)  # the name that timm and its checkpoints give it
        self.fused = False

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens of a map of ``size`` (H, W), N = H·W, to (B, N, C)."""
        image = x.transpose(1, 2).reshape(x.shape[0], -1, *size)  # (B, C, H, W)
        y: torch.Tensor = self.proj(image)
        y = y if self.fused else y + image
        return y.flatten(2).transpose(1, 2)  # (B, N, C)

    @torch.no_grad()
    def fuse(self) -> None:
        """Add 1 to each kernel's centre tap, which is the identity, and leave out the addition. A second call does nothing."""
        if not self.fused:
            cast(nn.Conv2d, self.proj[0]).weight[:, 0, 1, 1] += 1  # (C, 1, 3, 3)
            self.fused = True


class FusableTwins(Twins):  # type: ignore[misc]
    """timm's Twins with position convolutions that can be fused; the same parameters under the same names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        convs = [module for module in self.get_submodule("pos_block").modules() if isinstance(module, nn.Conv2d)]
        self.pos_block = nn.ModuleList(PositionConv(conv) for conv in convs)


default_cfgs = generate_default_cfgs(
    {
        "twins_svt_tiny": {
            "input_size": (3, 224, 224),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embeds.0.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def twins_svt_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Twins-SVT-Tiny: 4,008,304 parameters, 0.555 GMACs at 224; (B, 3, H, W) to logits (B, K).

    ``features_only=True`` gives maps of 36, 72, 144 and 288 channels at strides 4, 8, 16 and 32. timm's class has no
    gradient checkpointing, and raises AssertionError when asked for it.
    """
    configuration = {
        "patch_size": 4,
        "embed_dims": (36, 72, 144, 288),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratios": (4, 4, 4, 4),
        "depths": (2, 2, 4, 2),
        "wss": (7, 7, 7, 7),
        "sr_ratios": (8, 4, 2, 1),
    }
    feature_cfg = {"out_indices": options.pop("out_indices", 4), "feature_cls": "getter"}
    options = {**configuration, **options}
    module: torch.nn.Module = build_model_with_cfg(FusableTwins, "twins_svt_tiny", pretrained, feature_cfg=feature_cfg, **options)
    return module
