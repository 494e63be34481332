"""T2T-ViT-7 and -12: images cut into overlapping windows three times, with linear-time attention between, then a plain transformer.

Source: Yuan et al., Tokens-to-Token ViT, arXiv 2101.11986, and the published configuration; the attention between the cuts is that
of Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, with positive random features that stay fixed.
Positions and random features are parameters without gradients, as in the authors' files: the published counts hold them.
Made for one image size (``img_size``), as positions are computed for it. Loads no weights: the published ones have
other names for the layers of the stem's MLPs, and want ``qk_scale=256**-0.5``.
"""

from __future__ import annotations

import math
from typing import Any

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

__all__: list[str] = []  # register_model adds the entry points

DIM, HEADS, MLP_RATIO = 256, 4, 2
TOKEN_DIM, FEATURES = 64, 32  # of the stem: width, and random features, half as many
STEM_DROP = 0.1
WINDOWS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding of the three cuts: 16 px a side for each last token


class Performer(nn.Module):
    """One-head attention in linear time, then an MLP; the values, not the input, are what the attention is added to (widths differ)."""

    def __init__(self, in_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * TOKEN_DIM)
        directions = torch.empty(FEATURES, TOKEN_DIM)
        self.w = nn.Parameter(nn.init.orthogonal_(directions) * math.sqrt(FEATURES), requires_grad=False)  # (M, D)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        self.norm2 = nn.LayerNorm(TOKEN_DIM)
        self.mlp = Mlp(TOKEN_DIM, TOKEN_DIM, drop=(0.0, STEM_DROP))
        self.drop = nn.Dropout(STEM_DROP)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, D)."""
        key, query, value = self.kqv(self.norm1(x)).chunk(3, dim=-1)  # (B, N, D) each
        x = value + self.drop(self.proj(self.attention(query, key, value)))
        y: torch.Tensor = x + self.mlp(self.norm2(x))
        return y

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Mean of the values (B, N, D), weighted by phi(q)·phi(k): sums over the keys come first, so no N x N matrix exists."""
        query, key = self._features(query), self._features(key)  # (B, N, M)
        summary = key.transpose(1, 2) @ value  # (B, M, D)
        weight = query @ key.sum(dim=1).unsqueeze(2)  # (B, N, 1)
        return query @ summary / (weight + 1e-8)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """phi(x) = exp(w x - |x|²/2) / sqrt(M), (B, N, D) to (B, N, M).

        On average over w ~ N(0, 1), whose rows are sqrt(D) long, phi(q)·phi(k) is exp(q·k) (Performers, lemma 1). The rows of
        T2T-ViT's w are sqrt(M) long, as in the authors' code, so that its attention is no estimate of softmax's.
        """
        half_square = x.square().sum(dim=-1, keepdim=True) / 2  # (B, N, 1)
        return torch.exp(functional.linear(x, self.w) - half_square) / math.sqrt(FEATURES)


class Stem(nn.Module):
    """Tokens to tokens: cut into overlapping windows, attend, lay out as a map again, twice; cut a last time and project."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.attention1 = Performer(in_chans * WINDOWS[0][0] ** 2)
        self.attention2 = Performer(TOKEN_DIM * WINDOWS[1][0] ** 2)
        self.project = nn.Linear(TOKEN_DIM * WINDOWS[2][0] ** 2, DIM)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, H/16·W/16, 256)."""
        for window, attention in zip(WINDOWS, (self.attention1, self.attention2), strict=False):
            kernel, stride, padding = window
            height, width = (_cut(side, window) for side in image.shape[2:])
            tokens = attention(functional.unfold(image, kernel, padding=padding, stride=stride).transpose(1, 2))  # (B, N, 64)
            image = tokens.transpose(1, 2).reshape(image.shape[0], -1, height, width)  # (B, 64, H', W')
        kernel, stride, padding = WINDOWS[2]
        y: torch.Tensor = self.project(functional.unfold(image, kernel, padding=padding, stride=stride).transpose(1, 2))
        return y


class Attention(nn.Module):
    """Multi-head attention without bias on q, k, v, and with a scale that can be set, which timm's cannot."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale or (DIM // HEADS) ** -0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, C)."""
        batch, tokens, dim = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, N, D)
        if self.fused_attn:
            x = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        else:
            x = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        y: torch.Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))
        return y


class Block(nn.Module):
    """Attention and MLP, each normalised before, skipped around, and dropped at random in training."""

    def __init__(self, scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention(scale)
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = Mlp(DIM, MLP_RATIO * DIM)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) to (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        y: torch.Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return y


class T2TViT(nn.Module):
    """T2T-ViT with timm's model API. ``global_pool``: "token" (as published), "avg" over the other tokens, or "" for all tokens.

    ``qk_scale`` multiplies q·k in the blocks; None is one over the root of a head's width, 64^-0.5.
    """

    def __init__(
        self,
        depth: int = 7,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.global_pool = num_classes, _pooling(global_pool)
        self.num_features = self.head_hidden_size = DIM
        self.num_prefix_tokens = 1
        self.feature_info = [{"num_chs": DIM, "reduction": 16, "module": f"blocks.{i}"} for i in range(depth)]
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.grid = (_windows(self.img_size[0]), _windows(self.img_size[1]))
        self.grad_checkpointing = False
        self.tokens_to_token = Stem(in_chans)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(sinusoids(1 + self.grid[0] * self.grid[1], DIM), requires_grad=False)  # (1, 1 + N, C)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(Block(qk_scale, rate) for rate in rates)
        self.norm: nn.Module = nn.LayerNorm(DIM)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(DIM, num_classes) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not shrink."""
        return {"cls_token", "pos_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only each block's input and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for ``num_classes``; 0 takes it away. Raises ModelError for a pooling that it does not know."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else _pooling(global_pool)
        self.head = nn.Linear(DIM, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to normalised tokens (B, 1 + H/16·W/16, 256), the class token first. Raises ModelError for another image size."""
        x = self._embed(x)
        for block in self.blocks:
            x = self._advance(block, x)
        y: torch.Tensor = self.norm(x)
        return y

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to the first block's tokens (B, 1 + N, C)."""
        if tuple(x.shape[2:]) != self.img_size:
            found, made = ("x".join(map(str, size)) for size in (x.shape[2:], self.img_size))
            raise ModelError(f"T2T-ViT got images of {found}, but its positions are made for {made}: build it with img_size")
        tokens: torch.Tensor = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.tokens_to_token(x)], dim=1)
        return tokens + self.pos_embed

    def _advance(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(block, x) if self.grad_checkpointing and self.training else block(x)
        return y

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, N, 256) to logits (B, K), or to what the classifier gets, (B, 256)."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) of the size it was made for, to logits (B, K)."""
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
        """Maps (B, 256, H/16, W/16) after the blocks ``indices`` (None: all); without ``intermediates_only``, behind the last tokens.

        ``norm`` puts the final norm on each. ``output_fmt`` must be NCHW (ModelError). Raises ModelError for another image size.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"output_fmt is {output_fmt!r}, expected NCHW: maps have no other form here")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, maps = self._embed(x), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._advance(block, x)
            if i in wanted:
                places = (self.norm(x) if norm else x)[:, 1:]  # (B, N, C)
                maps.append(places.transpose(1, 2).reshape(x.shape[0], DIM, *self.grid))
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps ``indices`` do not need: later blocks and, if told, the final norm and the head."""
        wanted: list[int]
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


def _cut(side: int, window: tuple[int, int, int]) -> int:
    """How many windows (kernel, stride, padding) lie along a side."""
    kernel, stride, padding = window
    return (side + 2 * padding - kernel) // stride + 1


def _windows(side: int) -> int:
    """Tokens along a side of so many pixels, after all cuts: a sixteenth, rounded up."""
    for window in WINDOWS:
        side = _cut(side, window)
    return side


def sinusoids(positions: int, dim: int) -> torch.Tensor:
    """(1, P, C): sin in the even channels, cos in the odd, of p / 10000^(2i/C) (Vaswani et al., arXiv 1706.03762, 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (C/2,)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates  # (P, C/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, positions, dim).to(torch.get_default_dtype())


def _pooling(kind: str) -> str:
    """The same word, if it is a known one."""
    if kind not in ("token", "avg", ""):
        raise ModelError(f"T2T-ViT pools by 'token', by 'avg' or not at all (''), not by {kind!r}")
    return kind


def _initialise(module: nn.Module) -> None:
    """Truncated normal, deviation 0.02, for linear layers; random features and positions stay as they are."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": None,
            "classifier": "head",
            "license": "bsd-3-clause-clear",
        }
        for name in ("t2t_vit_7", "t2t_vit_12")
    }
)


def _build(name: str, depth: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    feature_cfg = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
    module: nn.Module = build_model_with_cfg(T2TViT, name, pretrained, feature_cfg=feature_cfg, depth=depth, **options)
    return module


@register_model  # type: ignore[untyped-decorator]
def t2t_vit_7(pretrained: bool = False, **options: Any) -> nn.Module:
    """T2T-ViT-7: 4,310,222 parameters, 1.147 GMACs at 224; (B, 3, H, W) to logits (B, K)."""
    return _build("t2t_vit_7", 7, pretrained, options)


@register_model  # type: ignore[untyped-decorator]
def t2t_vit_12(pretrained: bool = False, **options: Any) -> nn.Module:
    """T2T-ViT-12: 6,941,902 parameters, 1.763 GMACs at 224; (B, 3, H, W) to logits (B, K)."""
    return _build("t2t_vit_12", 12, pretrained, options)
