"""TNT-Tiny, a baseline of the EdgeViT paper: pixels attend inside each patch, patches attend to one another. Published for 224 x 224 only.

Source: Han et al., Transformer in Transformer, arXiv 2103.00112. The class is timm's, which has Small and Base; here is
only Tiny's configuration, which the authors' repository lacks. With it their class has 6,114,040 parameters, the
baseline table's number; timm's has 6,076,408: it leaves out a table of 196 x 192 zeros that their class holds and never uses.
Knows no weights: none are published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgejoule import torchvision

torchvision.ensure()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.tnt import TNT  # noqa: E402

__all__: list[str] = []  # register_model adds the entry point

default_cfgs = generate_default_cfgs(
    {
        "tnt_tiny": {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "pixel_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def tnt_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """TNT-Tiny: 6,076,408 parameters, 1.404 GMACs at 224; (B, 3, 224, 224) to logits (B, K).

    Outer width 192 in 3 heads, inner width 12 in 2, depth 12, MLP ratio 4, no bias on q, k, v. The number of inner heads
    is from the paper as remembered, and changes neither count. ``img_size`` makes it for another fixed size.
    ``features_only=True`` gives maps of 192 channels at stride 16, after the blocks ``out_indices`` (the last three).
    """
    configuration = {
        "patch_size": 16,
        "embed_dim": 192,
        "inner_dim": 12,
        "depth": 12,
        "num_heads_inner": 2,
        "num_heads_outer": 3,
        "qkv_bias": False,
    }
    feature_cfg = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    module: torch.nn.Module = build_model_with_cfg(TNT, "tnt_tiny", pretrained, feature_cfg=feature_cfg, **{**configuration, **options})
    return module
