"""UniFormer-Tiny, a baseline of the EdgeViT paper: convolutional blocks on the two large maps, full attention on the two small ones.

Source: Li et al., UniFormer, arXiv 2201.09450, in the EdgeViT authors' configuration: blocks 2, 2, 5, 2, widths 36 to 288, heads of 36
channels, patches that do not overlap instead of a convolutional stem. It is none of UniFormer's own published variants.
Their class has 3,917,620 parameters, this one 3,915,028: theirs holds two layer scales in each attention block, switched off.
Takes any image whose sides are 32 px or more. Knows no weights: none are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from edgejoule import torchvision
from edgejoule.errors import ModelError
from edgejoule.zoo.edgevit import ConditionalPosition

torchvision.ensure()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.layers import Attention, DropPath, Mlp, calculate_drop_path_rates, get_device_dtype, trunc_normal_  # noqa: E402
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model  # noqa: E402
from timm.models._features import feature_take_indices  # noqa: E402

__all__: list[str] = []  # register_model adds the entry point

DIMS, DEPTHS = (36, 72, 144, 288), (2, 2, 5, 2)
HEAD_DIM, MLP_RATIO = 36, 4
PATCHES = (4, 2, 2, 2)  # side of a stage's patches on the map before it
CONVOLUTIONAL = 2  # the stages before this one have no attention


class LocalBlock(nn.Module):
    """The relation of neighbours: 1 x 1, depth-wise 5 x 5, 1 x 1 convolutions where attention would be; BatchNorm before each branch."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = ConditionalPosition(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, use_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = self.pos_embed(x)
        x = x + self.drop_path(self.conv2(self.attn(self.conv1(self.norm1(x)))))
        y: torch.Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class GlobalBlock(nn.Module):
    """The relation of all to all: multi-head attention over every place of the map; LayerNorm before each branch."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = ConditionalPosition(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=dim // HEAD_DIM, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        x = self.pos_embed(x)
        shape = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.transpose(1, 2).reshape(shape)


class Stage(nn.Module):
    """Patches of the map before, normalised, then the blocks."""

    def __init__(self, in_dim: int, index: int, drop_rates: Sequence[float]) -> None:
        super().__init__()
        kind = LocalBlock if index < CONVOLUTIONAL else GlobalBlock
        self.proj = nn.Conv2d(in_dim, DIMS[index], PATCHES[index], PATCHES[index])
        self.norm = nn.LayerNorm(DIMS[index])
        self.blocks = nn.ModuleList(kind(DIMS[index], rate) for rate in drop_rates)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C', H', W') to (B, C, H'/P, W'/P) for patches of side P."""
        x = self.proj(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()  # over the channels of each place
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class UniFormer(nn.Module):
    """UniFormer-Tiny with timm's model API. ``global_pool`` is "avg", or "" for the map itself, which has no classes."""

    def __init__(
        self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes, self.global_pool = num_classes, _pooling(global_pool, num_classes)
        self.num_features = self.head_hidden_size = DIMS[-1]
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(DIMS)]
        rates = calculate_drop_path_rates(drop_path_rate, list(DEPTHS), stagewise=True)
        self.stages = nn.ModuleList(Stage(DIMS[i - 1] if i else in_chans, i, rates[i]) for i in range(len(DIMS)))
        self.norm: nn.Module = nn.BatchNorm2d(DIMS[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Nothing by name: there are no position tables and no class token."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only each block's input and compute the rest again in the backward pass.

        BatchNorm's running statistics then see every batch twice in the first two stages.
        """
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes``; 0 takes it away. Raises ModelError for another pooling, and for classes without pooling."""
        self.num_classes = num_classes
        self.global_pool = _pooling(self.global_pool if global_pool is None else global_pool, num_classes)
        place = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **place) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the last normalised map (B, 288, H/32, W/32)."""
        for stage in self.stages:
            x = stage(x)
        y: torch.Tensor = self.norm(x)
        return y

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The map (B, 288, H, W) to logits (B, K), or to what the classifier gets, (B, 288)."""
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W), sides of 32 px or more, to logits (B, K)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The stages' maps, (B, C, H/4, W/4) to (B, C, H/32, W/32); without ``intermediates_only``, behind the last normalised map.

        ``indices`` are stages (None: all); ``norm`` normalises the last map. ``output_fmt`` must be NCHW (ModelError).
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt is {output_fmt!r}, expected NCHW: the maps of a pyramid have no other form here")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps, end = [], x
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            end = self.norm(x) if i == len(DIMS) - 1 else x
            if i in wanted:
                maps.append(end if norm else x)
        return maps if intermediates_only else (end, maps)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps ``indices`` do not need: later stages, the head and, if told, the final norm."""
        wanted: list[int]
        wanted, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = DIMS[last]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return wanted


def _pooling(kind: str, num_classes: int) -> str:
    """The same word, if it is a known one."""
    if kind not in ("avg", ""):
        raise ModelError(f"UniFormer pools by 'avg' or not at all (''), not by {kind!r}")
    if not kind and num_classes:
        raise ModelError(f"UniFormer has no {num_classes} classes for a map: pool by 'avg', or ask for num_classes=0")
    return kind


def _initialise(module: nn.Module) -> None:
    """Truncated normal, deviation 0.02, for linear layers; PyTorch's own for convolutions."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        "uniformer_tiny": {
            "input_size": (3, 224, 224),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stages.0.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def uniformer_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """UniFormer-Tiny: 3,915,028 parameters, 0.605 GMACs at 224; (B, 3, H, W) to logits (B, K).

    ``features_only=True`` gives maps of 36, 72, 144 and 288 channels at strides 4, 8, 16 and 32.
    """
    feature_cfg = {"out_indices": options.pop("out_indices", 4), "feature_cls": "getter"}
    module: nn.Module = build_model_with_cfg(UniFormer, "uniformer_tiny", pretrained, feature_cfg=feature_cfg, **options)
    return module
