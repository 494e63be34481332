"""A tiny network of every family that passes must know, registered with timm so that a builder's spelling names it. Knows no test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgejoule.torchvision import ensure

ensure()
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.byobnet import ByobNet  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.edgenext import EdgeNeXt  # noqa: E402
from timm.models.efficientformer_v2 import EfficientFormerV2  # noqa: E402
from timm.models.efficientvit_mit import EfficientVit  # noqa: E402
from timm.models.efficientvit_msra import EfficientVitMsra  # noqa: E402
from timm.models.fastvit import FastVit  # noqa: E402
from timm.models.levit import Levit  # noqa: E402
from timm.models.mobilevit import model_cfgs as mobilevit_cfgs  # noqa: E402
from timm.models.pvt_v2 import PyramidVisionTransformerV2  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.tiny_vit import TinyVit  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.models.vision_transformer_relpos import VisionTransformerRelPos  # noqa: E402

from edgejoule.zoo.edgevit import EdgeViT  # noqa: E402

CLASSES = 10
EFFICIENT = {"embed_dim": (32, 48, 64), "key_dim": (8, 8, 8), "depth": (1, 2, 1), "num_heads": (4, 3, 4), "window_size": (2, 2, 2)}
STAGES = {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 1, 2)}
# name: (class, input side, options)
NETWORKS: Mapping[str, tuple[Any, int, Mapping[str, Any]]] = {
    "vit": (VisionTransformer, 32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}),
    "vit_modern": (
        VisionTransformer,
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
        | {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2, "class_token": True},
    ),
    "vit_pooled": (
        VisionTransformer,
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "class_token": False, "global_pool": "avg"},
    ),
    "vit_relpos": (VisionTransformerRelPos, 32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}),
    "deit": (VisionTransformer, 32, {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3}),
    "deit_distilled": (
        VisionTransformerDistilled,
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4},
    ),
    "swin": (
        SwinTransformer,
        32,
        {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "levit": (
        Levit,
        32,
        {"img_size": 32, "embed_dim": (32, 48, 64), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 3, 4), "stem_type": "s8"},
    ),
    "levit_conv": (
        Levit,
        32,
        {"img_size": 32, "embed_dim": (32, 48, 64), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (2, 3, 4), "stem_type": "s8"}
        | {"use_conv": True},
    ),
    "tiny_vit": (
        TinyVit,
        32,
        {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "window_sizes": (4, 4, 2, 1)},
    ),
    "mobilevit": (ByobNet, 64, {"model_cfg": mobilevit_cfgs["mobilevit_xxs"]}),
    "mobilevitv2": (ByobNet, 64, {"model_cfg": mobilevit_cfgs["mobilevitv2_050"]}),
    "efficientvit_mit": (
        EfficientVit,
        64,
        {"widths": (8, 16, 24, 32, 48), "depths": (1, 1, 1, 2, 1), "head_dim": 8, "head_widths": (64, 64)},
    ),
    "efficientvit_msra": (EfficientVitMsra, 64, {"img_size": 64, **EFFICIENT}),
    "pvt_v2": (
        PyramidVisionTransformerV2,
        64,
        {**STAGES, "num_heads": (2, 3, 4, 6), "sr_ratios": (8, 4, 2, 1), "mlp_ratios": (4, 4, 2, 2)},
    ),
    "edgenext": (EdgeNeXt, 64, {"dims": (16, 24, 32, 48), "depths": (2, 2, 2, 2), "heads": (4, 4, 4, 4)}),
    "fastvit": (
        FastVit,
        64,
        {"layers": (1, 1, 1, 2), "embed_dims": (16, 32, 64, 128), "mlp_ratios": (3, 3, 3, 3)}
        | {"token_mixers": ("repmixer", "repmixer", "repmixer", "attention")},
    ),
    "efficientformerv2": (EfficientFormerV2, 64, {**STAGES, "img_size": 64, "mlp_ratios": 2, "num_vit": 1}),
    "edgevit": (EdgeViT, 32, {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "heads": (1, 2, 3, 4)}),
}


def _config(side: int) -> dict[str, Any]:
    return {"input_size": (3, side, side), "num_classes": CLASSES, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


default_cfgs = generate_default_cfgs({f"tests_{name}": _config(side) for name, (_, side, _) in NETWORKS.items()})


def _make(name: str, pretrained: bool = False, **options: Any) -> Any:
    made, _, own = NETWORKS[name]
    return build_model_with_cfg(made, f"tests_{name}", pretrained, **{**own, **options})


def _register(name: str) -> None:
    def function(pretrained: bool = False, **options: Any) -> Any:
        return _make(name, pretrained, **options)

    function.__name__, function.__module__, function.__doc__ = f"tests_{name}", __name__, f"A tiny {name}."
    register_model(function)


__all__: list[str] = []  # timm adds the names that it registers
for _name in NETWORKS:
    _register(_name)

Build = Callable[..., Any]


def network(name: str) -> tuple[Any, Any]:
    """A live network in eval mode and its spec: logits of order 1, every branch of which takes part."""
    from edgejoule import zoo

    spec = zoo.spec_of_timm(f"tests_{name}")
    return zoo.build(zoo.identify(spec, weights="random")), spec


def images(spec: Any, n: int = 2) -> Any:
    """Photographs by a spec's preprocessing: (n, C, H, W) float32."""
    import torch

    from edgejoule import data

    return torch.from_numpy(data.normalise(data.crops(f"photos(n={n})", spec.preprocessing), spec.preprocessing))
