"""Attention of plain Vision Transformers, computed openly: biases and masks go in, keys and attention weights come out.

Known by name are timm's Attention (with q/k norm, norm before the projection and gate) and RelPosAttention, T2T-ViT's, and what these
become with fewer heads. ``opened`` makes the open form with the same children. Knows no blocks, no merging and no pruning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgejoule.errors import ModelError
from edgejoule.optimize.copies import adopt

KNOWN = (
    "timm.layers.attention.Attention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "edgejoule.zoo.t2t_vit.Attention",
    "edgejoule.optimize.pruned_attention.PrunedRelPosAttention",
    "edgejoule.optimize.pruned_attention.PrunedSelfAttention",
)
T2T_HEADS = 4  # a constant of that architecture, no attribute
PARTS = ("q_norm", "k_norm", "norm", "gate", "rel_pos", "attn_drop", "proj_drop")  # what not all of them have


class Attended(NamedTuple):
    """What attention gives beside its tokens."""

    x: Tensor  # (B, N, C)
    keys: Tensor  # (B, N, D), mean over the heads, as they meet the queries (after their norm)
    weights: Tensor | None  # (B, N, N) softmax over the last axis, mean over the heads; None unless asked for


class OpenAttention(nn.Module):
    """Multi-head self-attention whose parts can be had. Made by ``opened`` only.

    Attributes: ``num_heads``, ``head_dim``, ``scale``, ``fused_attn``, ``heads`` (which of a bias that all blocks share are its own; ()
    for all); children ``qkv``, ``proj`` and those of ``PARTS`` that the original had (None for the others).
    """

    num_heads: int
    head_dim: int
    scale: float
    fused_attn: bool
    heads: tuple[int, ...]
    qkv: nn.Linear
    proj: nn.Module

    def forward(self, x: Tensor, bias: Tensor | None = None, alive: Tensor | None = None, weights: bool = False) -> Attended:
        """``bias`` broadcasts to (B, h, N, N) and is added to the logits, relative positions included (see ``positions``).

        ``alive`` (B, N), 0 or 1: no token but itself attends to one with 0 (DynamicViT, equations 10 and 11). ``weights`` asks for them.
        """
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self._part("q_norm", query), self._part("k_norm", key)  # (B, h, N, D) each
        seen: Tensor | None = None
        dropout = getattr(self.attn_drop, "p", 0.0) if self.training else 0.0
        if self.fused_attn and alive is None and not weights:
            y = functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=self.scale)  # (B, h, N, D)
        else:
            logits = (query * self.scale) @ key.transpose(-2, -1)  # (B, h, N, N)
            logits = logits if bias is None else logits + bias
            shares = logits.softmax(dim=-1) if alive is None else masked_softmax(logits, alive)
            seen = shares.mean(dim=1) if weights else None
            y = self._part("attn_drop", shares) @ value
        y = self._part("norm", y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        gate: Any = self.gate
        if gate is not None:
            y = y * gate(x).sigmoid()
        return Attended(self._part("proj_drop", self.proj(y)), key.mean(dim=1), seen)

    def positions(self, shared: Tensor | None) -> Tensor | None:
        """(1, h, N, N) the bias of relative positions of the tokens of the whole image: its own, else the network's ``shared`` one."""
        own: Any = self.rel_pos
        if own is not None:
            bias: Tensor = own.get_bias()
            return bias
        return shared if shared is None or not self.heads else shared[:, list(self.heads)]

    def _part(self, name: str, x: Tensor) -> Tensor:
        part: Any = getattr(self, name)
        y: Tensor = x if part is None else part(x)
        return y


def masked_softmax(logits: Tensor, alive: Tensor) -> Tensor:
    """exp(P_ij) G_ij / sum_k exp(P_ik) G_ik, with G_ij = 1 where i = j, else D_j (DynamicViT, equations 10 and 11).

    ``logits`` P (B, h, N, N), ``alive`` D (B, N), 0 or 1. Gradients reach D also where it is 0, as they must for its predictor to learn.
    There they are not the formula's: its derivative, exp(P_ij) over the sum of the living, has no bound where a dead token is what all
    would look at (1e7 was seen, which clipping turns into noise). A dead token that came alive would get the share
    exp(P_ij) / (sum + exp(P_ij)) and take it from the others: that difference stands for the derivative.
    """
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)  # (N, N)
    lives = (alive > 0.5)[:, None, None, :]  # (B, 1, 1, N)
    seen = logits.masked_fill(~(lives | own), float("-inf"))
    shares = seen.softmax(dim=-1)
    with torch.no_grad():
        revived = (logits - seen.logsumexp(dim=-1, keepdim=True)).sigmoid()  # (B, h, N, N)
        slope = torch.where(lives, shares, revived).masked_fill(own, 0.0)
    moved = slope * (alive - alive.detach())[:, None, None, :]  # 0, but for its gradient
    return shares + moved - shares.detach() * moved.sum(dim=-1, keepdim=True)


def opened(attention: nn.Module, model: str) -> OpenAttention:
    """The open form of a block's attention with the same children and tensors. Raises ModelError for a class that it does not know."""
    if isinstance(attention, OpenAttention):
        return attention
    kind = f"{type(attention).__module__}.{type(attention).__name__}"
    if kind not in KNOWN:
        raise ModelError(
            f"{model} has attention of the class {kind}, whose keys cannot be had: token reduction knows timm's Attention and "
            "RelPosAttention only; leave it out of the recipe"
        )
    made: OpenAttention = adopt(OpenAttention, attention, num_heads=getattr(attention, "num_heads", T2T_HEADS))
    made.head_dim = made.qkv.out_features // (3 * made.num_heads)
    made.heads = tuple(getattr(attention, "heads", ()))
    for name in PARTS:
        if not hasattr(made, name):
            setattr(made, name, None)
    return made
