"""Twins-SVT-Tiny, a baseline of the EdgeViT paper: attention inside windows of 7 x 7, then to a strided convolution's summary, in turns.

Source: Chu et al., Twins, arXiv 2104.13840; the Tiny configuration is that of the EdgeViT authors' first commit. The class
is timm's. The authors' has 4,092,112 parameters, timm's 4,008,304: theirs builds a reduction convolution and its norm
in the last stage, where the ratio is 1 and nothing is reduced, and never uses them. The multiply-adds are the same.
Takes any image whose sides are multiples of 32. Knows no weights: none are published.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from edgejoule import torchvision

torchvision.ensure()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.twins import Twins  # noqa: E402

__all__: list[str] = []  # register_model adds the entry point

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
    module: nn.Module = build_model_with_cfg(Twins, "twins_svt_tiny", pretrained, feature_cfg=feature_cfg, **options)
    return module
