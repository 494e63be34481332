"""PVTv1-Tiny, a pyramid of transformers whose attention looks at a strided convolution's summary of the map.

Source: Wang et al., Pyramid Vision Transformer, arXiv 2102.12122, and the published configuration. The EdgeViT paper has it under
RetinaNet and Semantic FPN only: ``features_only=True`` gives its four maps, without class token, final norm and
classifier. Learned positions are resampled for other sizes than the one it was made for.
Knows no weights, no detector and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from edgejoule import torchvision
from edgejoule.errors import ModelError

torchvision.ensure()
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, get_device_dtype, trunc_normal_, use_fused_attn  # noqa: E402
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model  # noqa: E402
from timm.models._features import feature_take_indices  # noqa: E402

__all__: list[str] = []  # register_model adds the entry point

DIMS, DEPTHS, HEADS = (64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8)
MLP_RATIOS, REDUCTIONS = (8, 8, 4, 4), (8, 4, 2, 1)
PATCHES = (4, 2, 2, 2)  # side of a stage's patches on the map before it


class ReducedAttention(nn.Module):
    """Every token asks; keys and values are the map after a convolution whose kernel and stride are ``reduction`` (none at 1)."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) tokens of a map of ``grid`` (H, W) to (B, N, C); a class token may stand in front where nothing is reduced."""
        batch, tokens, dim = x.shape
        query = self.q(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)  # (B, h, N, D)
        source = x if self.sr is None else self._reduce(x, grid)  # (B, S, C)
        key, value = self.kv(source).reshape(batch, -1, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, S, D)
        if self.fused_attn:
            x = functional.scaled_dot_product_attention(query, key, value)
        else:
            x = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        y: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return y

    def _reduce(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, H·W, C) to (B, (H/r)·(W/r), C); rows and columns that do not fill a window are left out."""
        assert self.sr is not None and self.norm is not None
        image = x.transpose(1, 2).reshape(x.shape[0], -1, *grid)  # (B, C, H, W)
        y: torch.Tensor = self.norm(self.sr(image).flatten(2).transpose(1, 2))
        return y


class Block(nn.Module):
    """Attention and MLP, each normalised before, skipped around, and dropped at random in training."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReducedAttention(dim, heads, reduction)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, dim * mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, C) to (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        y: torch.Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class Stage(nn.Module):
    """Patches of the map before, learned positions, blocks. With a class token: one more token, in front, with a position of its own."""

    def __init__(self, in_dim: int, index: int, grid: tuple[int, int], drop_rates: Sequence[float], class_token: bool) -> None:
        super().__init__()
        dim = DIMS[index]
        self.grid = grid  # (H, W) of the map that the positions were made for
        self.proj = nn.Conv2d(in_dim, dim, PATCHES[index], PATCHES[index])
        self.norm = nn.LayerNorm(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + int(class_token), dim))
        self.blocks = nn.ModuleList(Block(dim, HEADS[index], MLP_RATIOS[index], REDUCTIONS[index], rate) for rate in drop_rates)
        self.grad_checkpointing = False

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C', H', W') to tokens (B, N, C), the class token among them, and to the map (B, C, H, W) without it."""
        x = self.proj(image)  # (B, C, H, W)
        grid = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))  # (B, H·W, C)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + H·W, C)
        x = x + self._positions(grid)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing and self.training else block(x, grid)
        places = x if self.cls_token is None else x[:, 1:]  # (B, H·W, C)
        return x, places.transpose(1, 2).reshape(x.shape[0], -1, *grid)

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """(1, N, C), bilinear between the learned ones for another grid; the class token's is taken as it is."""
        if grid == self.grid:
            return self.pos_embed
        front = 0 if self.cls_token is None else 1
        table = self.pos_embed[:, front:].transpose(1, 2).reshape(1, -1, *self.grid)  # (1, C, H, W)
        table = functional.interpolate(table, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :front], table.flatten(2).transpose(1, 2)], dim=1)

    def drop_class_token(self) -> None:
        """Forget the class token and its position, as dense prediction does."""
        if self.cls_token is not None:
            self.cls_token = None
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:].clone())


class PyramidVisionTransformer(nn.Module):
    """PVTv1-Tiny with timm's model API. ``global_pool``: "token" (as published), "avg" over the other tokens, or "" for all tokens."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.global_pool = num_classes, _pooling(global_pool)
        self.num_features = self.head_hidden_size = DIMS[-1]
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(DIMS)]
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        rates = calculate_drop_path_rates(drop_path_rate, list(DEPTHS), stagewise=True)
        stages = []
        for i in range(4):
            grid = (height // 2 ** (i + 2), width // 2 ** (i + 2))
            stages.append(Stage(DIMS[i - 1] if i else in_chans, i, grid, rates[i], class_token=i == 3))
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.LayerNorm(DIMS[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not shrink."""
        return {name for name, _ in self.named_parameters() if name.endswith(("pos_embed", "cls_token"))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only each block's input and compute the rest again in the backward pass."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes``; 0 takes it away. Raises ModelError for a pooling that it does not know."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else _pooling(global_pool)
        place = get_device_dtype(self)
        self.head = nn.Linear(self.num_features, num_classes, **place) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the last stage's normalised tokens (B, 1 + H/32·W/32, 512), the class token first."""
        tokens = x
        for stage in self.stages:
            tokens, x = stage(x)
        y: torch.Tensor = self.norm(tokens)
        return y

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, N, 512) to logits (B, K), or to what the classifier gets, (B, 512)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
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
        """The stages' maps, (B, C, H/4, W/4) to (B, C, H/32, W/32); without ``intermediates_only``, behind the last tokens.

        ``indices`` are stages (None: all); ``norm`` normalises the last map. ``output_fmt`` must be NCHW (ModelError).
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt is {output_fmt!r}, expected NCHW: the maps of a pyramid have no other form here")
        wanted, last = feature_take_indices(len(self.stages), indices)
        maps, tokens = [], x
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            tokens, x = stage(x)
            is_end = i == len(DIMS) - 1
            tokens = self.norm(tokens) if is_end else tokens
            if i in wanted:
                maps.append(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous() if norm and is_end else x)
        return maps if intermediates_only else (tokens, maps)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps ``indices`` do not need: later stages, the class token, the head and, if told, the final norm."""
        wanted: list[int]
        wanted, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = DIMS[last]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            for stage in self.stages:
                cast(Stage, stage).drop_class_token()
            self.reset_classifier(0, "")
        return wanted


def _pooling(kind: str) -> str:
    """The same word, if it is a known one."""
    if kind not in ("token", "avg", ""):
        raise ModelError(f"PVT pools by 'token', by 'avg' or not at all (''), not by {kind!r}")
    return kind


def _initialise(module: nn.Module) -> None:
    """Truncated normal, deviation 0.02, for linear layers, positions and class token; PyTorch's own for convolutions."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Stage):
        trunc_normal_(module.pos_embed, std=0.02)
        if module.cls_token is not None:
            trunc_normal_(module.cls_token, std=0.02)


default_cfgs = generate_default_cfgs(
    {
        "pvt_v1_tiny": {
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
def pvt_v1_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """PVTv1-Tiny: 13,229,288 parameters, 1.933 GMACs at 224; (B, 3, H, W) to logits (B, K).

    ``features_only=True`` gives maps of 64, 128, 320 and 512 channels at strides 4, 8, 16 and 32.
    """
    feature_cfg = {"out_indices": options.pop("out_indices", 4), "feature_cls": "getter"}
    module: nn.Module = build_model_with_cfg(PyramidVisionTransformer, "pvt_v1_tiny", pretrained, feature_cfg=feature_cfg, **options)
    return module
