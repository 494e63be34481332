"""Attention with fewer heads than its width tells: stands in where a family's own forward takes the number of heads from C.

Each class computes what the block that it replaces computes, has the same children under the same names, and keeps what differs in
plain attributes: ``num_heads`` heads of ``head_dim`` channels, no longer C together. ``copies.adopt`` makes one from the block.
Knows no importance and no surgery; ``heads.py`` says which class stands in for which block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgejoule.torchvision import ensure

ensure()
from timm.models.efficientvit_msra import CascadedGroupAttention  # noqa: E402


def attend(block: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v of q (B, H, N, D), k and v (B, H, M, D), bias (1, H, N, M) -> (B, N, H D)."""
    drop = getattr(block, "attn_drop", None)
    if block.fused_attn:
        p = drop.p if drop is not None and block.training else 0.0
        x = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=block.scale)  # (B, H, N, D)
    else:
        scores = (q * block.scale) @ k.transpose(-2, -1)  # (B, H, N, M)
        scores = (scores if bias is None else scores + bias).softmax(dim=-1)
        x = (scores if drop is None else drop(scores)) @ v  # (B, H, N, D)
    return x.transpose(1, 2).flatten(2)


def heads_of(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts H D) -> as many of (B, H, N, D)."""
    x = x.reshape(*x.shape[:2], parts, num_heads, -1)  # (B, N, parts, H, D)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def _dropped(block: nn.Module, x: Tensor) -> Tensor:
    """With the block's dropout, where it has one."""
    drop = getattr(block, "proj_drop", None)
    return x if drop is None else cast(Tensor, drop(x))


class PrunedSelfAttention(nn.Module):
    """Plain attention over tokens or over the places of a map (T2T-ViT, FastViT)."""

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), or (B, C, H, W) -> (B, C, H, W)."""
        tokens = x if x.dim() == 3 else x.flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = heads_of(self.qkv(tokens), 3, self.num_heads)
        y: Tensor = _dropped(self, self.proj(attend(self, q, k, v)))  # (B, N, C)
        return y if x.dim() == 3 else y.transpose(1, 2).reshape(x.shape)


class PrunedRelPosAttention(nn.Module):
    """Attention with a bias for each head and pair of tokens, its own or one that all blocks share: of that it takes ``heads``."""

    num_heads: int
    heads: tuple[int, ...]  # which of the unpruned block's heads are left
    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    rel_pos: Any  # RelPosBias, RelPosMlp or None
    proj: nn.Linear
    proj_drop: nn.Module

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); the shared bias is (1, all heads, N, N)."""
        q, k, v = heads_of(self.qkv(x), 3, self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if shared_rel_pos is None else shared_rel_pos[:, list(self.heads)]  # (1, H, N, N)
        if self.rel_pos is not None:
            bias = self.rel_pos.get_bias()
        return cast(Tensor, self.proj_drop(self.proj(attend(self, q, k, v, bias))))


class PrunedReducedAttention(nn.Module):
    """Every token asks, keys and values are a smaller map: by a strided convolution, by pooling, or all of it (PVT, PVTv2, Twins)."""

    num_heads: int
    q: nn.Linear
    kv: nn.Linear
    proj: nn.Linear
    sr: nn.Conv2d | None
    norm: nn.Module | None

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> Tensor:
        """(B, N, C) tokens of a map of ``feat_size`` (H, W) -> (B, N, C)."""
        (q,) = heads_of(self.q(x), 1, self.num_heads)  # (B, h, N, D)
        k, v = heads_of(self.kv(self._reduced(x, feat_size)), 2, self.num_heads)  # (B, h, M, D)
        return _dropped(self, self.proj(attend(self, q, k, v)))

    def _reduced(self, x: Tensor, feat_size: Sequence[int]) -> Tensor:
        """(B, H W, C) -> (B, M, C)."""
        if self.sr is None or self.norm is None:
            return x
        image = x.transpose(1, 2).reshape(x.shape[0], -1, *feat_size)  # (B, C, H, W)
        pool, act = getattr(self, "pool", None), getattr(self, "act", None)
        image = self.sr(image if pool is None else pool(image))  # (B, C, h, w)
        tokens = self.norm(image.flatten(2).transpose(1, 2))  # (B, M, C)
        return cast(Tensor, tokens if act is None else act(tokens))


class PrunedLocalAttention(nn.Module):
    """Attention within windows of ``ws`` x ``ws`` places; those that the border cuts off are filled up with zeros (Twins)."""

    num_heads: int
    ws: int
    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N, C) tokens of a map of ``size`` (H, W) -> (B, N, C)."""
        (batch, tokens, channels), (height, width), side = x.shape, size, self.ws
        image = x.reshape(batch, height, width, channels)
        image = functional.pad(image, (0, 0, 0, -width % side, 0, -height % side))  # (B, r S, c S, C)
        rows, columns = image.shape[1] // side, image.shape[2] // side
        windows = image.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)  # (B, r, c, S, S, C)
        q, k, v = heads_of(self.qkv(windows.reshape(-1, side * side, channels)), 3, self.num_heads)  # (B r c, h, S S, D)
        y = attend(self, q, k, v).reshape(batch, rows, columns, side, side, -1)  # (B, r, c, S, S, h D)
        y = y.transpose(2, 3).reshape(batch, rows * side, columns * side, -1)[:, :height, :width]  # (B, H, W, h D)
        return _dropped(self, self.proj(y.reshape(batch, tokens, -1)))


class PrunedCrossCovariance(nn.Module):
    """Attention of channels to channels within a head, with a temperature each (EdgeNeXt)."""

    num_heads: int
    temperature: Tensor  # (H, 1, 1)
    qkv: nn.Linear
    attn_drop: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (part.transpose(2, 3) for part in heads_of(self.qkv(x), 3, self.num_heads))  # (B, H, D, N)
        scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(2, 3) * self.temperature
        attn = self.attn_drop(scores.softmax(dim=-1))  # (B, H, D, D)
        y = (attn @ v).permute(0, 3, 1, 2).flatten(2)  # (B, N, H D)
        return cast(Tensor, self.proj_drop(self.proj(y)))


class PrunedCascade(CascadedGroupAttention):  # type: ignore[misc]
    """EfficientViT's cascade (Liu et al., arXiv 2305.07027) without some heads: ``chunks`` are the kept heads' inputs.

    A head adds the output of the head before it to its own chunk of the input; where that head is out, it takes its chunk alone.
    Biases are laid out in every call: there is no cache to forget.
    """

    chunks: tuple[int, ...]  # of ``all_chunks`` that the input is cut into, ascending
    all_chunks: int
    attention_bias_cache: dict[str, Tensor] = {}  # noqa: RUF012  # never filled: timm's methods ask whether it is empty

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """(H, N, N) for the kept heads, on the biases' own device."""
        return cast(Tensor, self.attention_biases[:, self.attention_bias_idxs])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        inputs, biases = x.chunk(self.all_chunks, dim=1), self.get_attention_biases(x.device)
        outputs: dict[int, Tensor] = {}
        for head, (chunk, qkv, dws) in enumerate(zip(self.chunks, self.qkvs, self.dws, strict=True)):
            feat = inputs[chunk] + outputs[chunk - 1] if chunk - 1 in outputs else inputs[chunk]  # (B, C / chunks, H, W)
            q, k, v = qkv(feat).split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = dws(q).flatten(2), k.flatten(2), v.flatten(2)  # (B, D, N)
            attn = ((q * self.scale).transpose(1, 2) @ k + biases[head]).softmax(dim=-1)  # (B, N, N)
            outputs[chunk] = (v @ attn.transpose(1, 2)).unflatten(2, x.shape[2:])  # (B, V, H, W)
        return cast(Tensor, self.proj(torch.cat(list(outputs.values()), dim=1)))


class PaddedLayerNorm(nn.Module):
    """LayerNorm over ``width`` channels of which all but the first are gone and count as zeros, in mean and variance.

    So heads can leave between an attention and a norm over all of them (EdgeViT's local propagation) without a trace.
    """

    weight: Tensor
    bias: Tensor
    width: int
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), C <= width."""
        channels = self.weight.shape[0]
        x = functional.layer_norm(functional.pad(x, (0, self.width - channels)), (self.width,), eps=self.eps)
        return x[..., :channels] * self.weight + self.bias
