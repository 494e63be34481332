"""EdgeViT's ablations (the paper's Table 4): the parts that replace released ones, and the ablated networks by name.

Each name is XXS with one part replaced. Where the replacement moves the network out of 0.50 to 0.61 GMACs, a second name ending in
``_05g`` has it back there, so that accuracy and energy compare at equal work, as in the paper. The authors' own ablation
files differ in details (they reduce keys by strided convolutions, and pool to 7 x 7); the options here change one thing at a time.
Knows no training; the complexity formula is edgevit_complexity.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from edgejoule import torchvision
from edgejoule.zoo.edgevit import (
    AttentionBlock,
    LocalAggregation,
    Parts,
    SparseAttention,
    attend,
    crop_to,
    map_of,
    pad_to,
    split_heads,
    tokens_of,
)
from edgejoule.zoo.edgevit_variants import CONFIG, create

torchvision.ensure()
from timm.layers import use_fused_attn  # noqa: E402
from timm.models import generate_default_cfgs, register_model  # noqa: E402

__all__ = ["ABLATIONS", "attention_part", "local_part"]  # timm adds the names that it registers

# name -> options of EdgeViT at XXS's widths, what it is, and MACs at 224 (the released XXS: 0.551 G)
ABLATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "edgevit_xxs_no_la": ({"local": "none"}, "no local aggregation"),
    "edgevit_xxs_no_la_05g": ({"local": "none", "depths": (2, 2, 5, 2)}, "no local aggregation, deeper: as much work as XXS"),
    "edgevit_xxs_lsa": ({"local": "lsa"}, "self-attention in 7 x 7 windows for local aggregation"),
    "edgevit_xxs_center": ({"delegate": "center"}, "the centre token is the delegate, as the paper says"),
    "edgevit_xxs_avg": ({"delegate": "avg"}, "the window's mean is the delegate"),
    "edgevit_xxs_max": ({"delegate": "max"}, "the window's maximum is the delegate"),
    "edgevit_xxs_no_lp": ({"propagate": "none"}, "no local propagation: every token attends to the delegates"),
    "edgevit_xxs_no_lp_05g": ({"propagate": "none", "rates": (8, 4, 2, 1)}, "no local propagation, fewer delegates: as much work as XXS"),
    "edgevit_xxs_bilinear": ({"propagate": "bilinear"}, "bilinear interpolation for the transposed convolution"),
}


def local_part(dim: int, num_heads: int, mlp_ratio: float, drop_path: float, parts: Parts) -> nn.Module:
    """What stands before the sparse attention: (B, C, H, W) -> (B, C, H, W)."""
    if parts.local == "none":
        return nn.Identity()
    if parts.local == "lsa":
        return AttentionBlock(dim, WindowAttention(dim, num_heads, parts.window), mlp_ratio, drop_path)
    return LocalAggregation(dim, mlp_ratio, drop_path)


def attention_part(dim: int, num_heads: int, rate: int, parts: Parts) -> nn.Module:
    """The attention between delegates, or of every token to the delegates: (B, C, H, W) -> (B, H W, C)."""
    choose = DELEGATES[parts.delegate]
    if parts.propagate == "none":
        return DelegateKeys(dim, num_heads, rate, choose)
    attention = ChosenDelegates(dim, num_heads, rate, choose) if parts.delegate != "top_left" else SparseAttention(dim, num_heads, rate)
    if parts.propagate == "bilinear":
        attention.propagate = BilinearPropagation(dim, rate)
    return attention


def top_left(x: torch.Tensor, rate: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, ceil(H / r), ceil(W / r)), as all four."""
    return x[:, :, ::rate, ::rate]


def center(x: torch.Tensor, rate: int) -> torch.Tensor:
    """Of four tokens in a row the third, of two the second: an even window has no middle. Beyond the border, the nearest token."""
    return pad_to(x, rate, "replicate")[:, :, rate // 2 :: rate, rate // 2 :: rate]


def average(x: torch.Tensor, rate: int) -> torch.Tensor:
    """The mean of each window, of what is left where the border cuts it off."""
    return nn.functional.avg_pool2d(x, rate, ceil_mode=True)


def maximum(x: torch.Tensor, rate: int) -> torch.Tensor:
    """The maximum of each window, channel by channel."""
    return nn.functional.max_pool2d(x, rate, ceil_mode=True)


Choice = Callable[[torch.Tensor, int], torch.Tensor]
DELEGATES: dict[str, Choice] = {"top_left": top_left, "center": center, "avg": average, "max": maximum}


class ChosenDelegates(SparseAttention):
    """Sparse attention between other delegates than the top-left tokens."""

    def __init__(self, dim: int, num_heads: int, rate: int, choose: Choice) -> None:
        super().__init__(dim, num_heads, rate)
        self.choose = choose

    def delegates(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, n, C), normalised: before pooling, since a mean of normalised tokens is not a normalised mean."""
        if self.choose is center:
            return cast(torch.Tensor, self.norm(tokens_of(center(x, self.rate))))
        return tokens_of(self.choose(map_of(self.norm(tokens_of(x)), *x.shape[-2:]), self.rate))


class DelegateKeys(nn.Module):
    """Every token asks, delegates are keys and values alone, as in pyramid transformers with spatial reduction.

    This is what remains without propagation: tokens that are no delegates would otherwise learn nothing from far away.
    """

    def __init__(self, dim: int, num_heads: int, rate: int, choose: Choice) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rate, self.choose = num_heads, dim // num_heads, rate, choose
        self.scale = self.head_dim**-0.5
        self.fused_attn: bool = use_fused_attn()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), not yet normalised -> tokens (B, H W, C)."""
        tokens = self.norm(tokens_of(x))  # (B, N, C)
        keys = tokens_of(self.choose(map_of(tokens, *x.shape[-2:]), self.rate))  # (B, n, C)
        (q,) = split_heads(self.q(tokens), 1, self.num_heads)
        k, v = split_heads(self.kv(keys), 2, self.num_heads)
        return cast(torch.Tensor, self.proj(attend(q, k, v, self.scale, self.fused_attn)))


class BilinearPropagation(nn.Module):
    """Interpolation in the place of the transposed convolution; the LayerNorm stays. No weights of its own but that norm's."""

    def __init__(self, dim: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Delegates (B, h w, C) -> tokens (B, H W, C). Onto whole windows, so that a delegate stays with its own whatever the size."""
        rows, columns = -(-height // self.rate), -(-width // self.rate)
        x = map_of(x, rows, columns)  # (B, C, h, w)
        x = nn.functional.interpolate(
            x, size=(rows * self.rate, columns * self.rate), mode="bilinear", align_corners=False
        )  # (B, C, h r, w r)
        return cast(torch.Tensor, self.norm(tokens_of(crop_to(x, height, width))))


class WindowAttention(nn.Module):
    """Self-attention inside windows (LSA, an ablation). Cut-off windows are padded, and the padding is masked."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window = num_heads, dim // num_heads, window
        self.scale = self.head_dim**-0.5
        self.fused_attn: bool = use_fused_attn()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), not yet normalised -> tokens (B, H W, C)."""
        height, width = x.shape[-2:]
        x = pad_to(map_of(self.norm(tokens_of(x)), height, width), self.window)  # (B, C, hT, wT), T the window's side
        rows, columns = x.shape[-2] // self.window, x.shape[-1] // self.window
        tokens = self._windows(x)  # (B h w, T T, C)
        mask = None
        if x.shape[-2:] != (height, width):
            real = pad_to(torch.ones(1, 1, height, width, device=x.device), self.window)  # (1, 1, hT, wT)
            mask = (self._windows(real) > 0).permute(0, 2, 1).unsqueeze(1).repeat(x.shape[0], 1, 1, 1)  # (B h w, 1, 1, T T)
        q, k, v = split_heads(self.qkv(tokens), 3, self.num_heads)
        out = self.proj(attend(q, k, v, self.scale, self.fused_attn, mask))  # (B h w, T T, C)
        out = out.reshape(-1, rows, columns, self.window, self.window, out.shape[-1])  # (B, h, w, T, T, C)
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, hT, wT)
        return tokens_of(crop_to(out, height, width))

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, hT, wT) -> (B h w, T T, C)."""
        side, (channels, height, width) = self.window, x.shape[1:]
        x = x.reshape(-1, channels, height // side, side, width // side, side)  # (B, C, h, T, w, T)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def _register(name: str, options: dict[str, Any], what: str) -> None:
    def build(pretrained: bool = False, **more: Any) -> Any:
        return create(name, pretrained, {**options, **more})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"EdgeViT-XXS, {what}."
    register_model(build)


default_cfgs = generate_default_cfgs(dict.fromkeys(ABLATIONS, CONFIG))  # timm looks for it here, by this name
for _name, (_options, _what) in ABLATIONS.items():
    _register(_name, _options, _what)
