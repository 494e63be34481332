"""Four tiny networks for scikit-learn's digits at 32 px, registered with timm: small enough to train in a minute on two cores.

They are the smallest members of four families, with nothing published about them: a study of them stands on what it measures.
Knows names and numbers; the architectures are edgevit.py's and timm's.
"""

from __future__ import annotations

from typing import Any

from edgejoule import torchvision
from edgejoule.zoo.edgevit import EdgeViT

torchvision.ensure()
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.levit import Levit  # noqa: E402
from timm.models.tiny_vit import TinyVit  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

__all__ = ["CONFIG"]  # timm adds the names that it registers

CONFIG = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs(
    {
        "edgevit_digits": {**CONFIG, "first_conv": "stages.0.patch_embed.proj", "classifier": "head"},
        "vit_digits": {**CONFIG, "fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"},
        "tiny_vit_digits": {**CONFIG, "first_conv": "patch_embed.conv1.conv", "classifier": "head.fc"},
        "levit_digits": {**CONFIG, "fixed_input_size": True, "first_conv": "stem.conv1.linear", "classifier": "head.linear"},
    }
)


def edgevit_digits(pretrained: bool = False, **options: Any) -> Any:
    """EdgeViT-XXS made narrower: dims 24, 48, 96, 192, depths 1, 1, 2, 1; tokens 8x8, 4x4, 2x2, 1x1 at 32 px."""
    made = {"dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8), **options}
    return build_model_with_cfg(EdgeViT, "edgevit_digits", pretrained, **made)


def vit_digits(pretrained: bool = False, **options: Any) -> Any:
    """A plain ViT: patches of 8 px (4x4 tokens at 32 px, 2x2 pixels of the original scan each), width 96, depth 4, 4 heads."""
    made = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, **options}
    return build_model_with_cfg(VisionTransformer, "vit_digits", pretrained, **made)


def levit_digits(pretrained: bool = False, **options: Any) -> Any:
    """A LeViT without distillation head: stem of stride 8, widths 32, 64, 96, depths 2, 2, 2; tokens 4x4, 2x2, 1x1 at 32 px."""
    made = {
        "img_size": 32,
        "embed_dim": (32, 64, 96),
        "key_dim": 16,
        "depth": (2, 2, 2),
        "num_heads": (2, 4, 6),
        "stem_type": "s8",
        **options,
    }
    return build_model_with_cfg(Levit, "levit_digits", pretrained, **made)


def tiny_vit_digits(pretrained: bool = False, **options: Any) -> Any:
    """A TinyViT: widths 16, 32, 64, 96, depths 1, 1, 2, 1, windows 4, 4, 2, 1; maps 8x8, 4x4, 2x2, 1x1 at 32 px."""
    made = {
        "embed_dims": (16, 32, 64, 96),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 6),
        "window_sizes": (4, 4, 2, 1),
        **options,
    }
    return build_model_with_cfg(TinyVit, "tiny_vit_digits", pretrained, **made)


for _entry in (edgevit_digits, vit_digits, tiny_vit_digits, levit_digits):
    register_model(_entry)
