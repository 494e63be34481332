"""Attention of plain Vision Transformers within windows, as in Swin (Liu et al., ICCV 2021) and ViTDet (Li et al., ECCV 2022).

Patches attend to the patches of their window and to the prefix tokens (class, distillation, registers); prefix tokens attend to
everything, so that the class token still sees the whole image. With a shift, windows are cut from the grid rolled by half a window, and
patches on different sides of the seam do not see each other (Swin, §3.2). Products of tokens fall from N^2 to N (P + w^2) for windows
of w^2 patches and P prefix tokens. Takes over the parts of the attention that it replaces, under their names. Knows no network.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edgejoule.errors import ModelError

MASKED = -1e4  # added to scores; exp of it is 0 in every float format, and float16 holds it


def dividing(grid: tuple[int, int]) -> tuple[int, ...]:
    """The sides of square windows that tile a grid, ascending."""
    return tuple(size for size in range(1, min(grid) + 1) if not grid[0] % size and not grid[1] % size)


def seams(grid: tuple[int, int], size: int, shifts: tuple[int, int]) -> Tensor:
    """(W, w^2, w^2) float32: 0, or ``MASKED`` between patches that only rolling brought into one window."""
    rows = torch.arange(grid[0]) >= grid[0] - shifts[0]  # of the rolled grid: came round from the other end
    columns = torch.arange(grid[1]) >= grid[1] - shifts[1]
    side = rows.long().unsqueeze(1) * 2 + columns.long()  # (h, w)
    side = side.reshape(grid[0] // size, size, grid[1] // size, size).transpose(1, 2).reshape(-1, size * size)  # (W, w^2)
    return torch.where(side.unsqueeze(1) == side.unsqueeze(2), 0.0, MASKED)


class WindowedAttention(nn.Module):
    """Stands for timm's ``Attention`` and ``RelPosAttention``, also with heads pruned. Patches come in rows of ``grid``.

    ``shift``, in patches, is left out along an axis that has one window only. Raises ModelError where windows do not tile the grid.
    """

    mask: Tensor | None
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    gate: Any
    rel_pos: Any
    proj: Any
    proj_drop: Any

    def __init__(self, attention: nn.Module, grid: tuple[int, int], size: int, shift: int, prefix: int) -> None:
        super().__init__()
        for name, part in attention.named_children():
            self.add_module(name, part)
        for name, default in (("norm", nn.Identity()), ("gate", None), ("rel_pos", None)):
            if name not in self._modules:
                self.add_module(name, default)
        source: Any = attention
        self.num_heads: int = source.num_heads
        self.head_dim: int = source.head_dim
        self.scale: float = source.scale
        self.heads: tuple[int, ...] = tuple(getattr(source, "heads", ()))  # that pruning left of the shared biases'; all where empty
        self.size, self.shift, self.prefix = size, shift, prefix
        self.register_buffer("mask", None)
        self.set_grid(grid)
        self.train(attention.training)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Patches by rows and columns from now on; the mask is made again."""
        if self.size not in dividing(grid):
            named = ", ".join(map(str, dividing(grid)))
            raise ModelError(f"windows of {self.size}x{self.size} patches do not tile {grid[0]}x{grid[1]}: sides that do are {named}")
        self.grid = (int(grid[0]), int(grid[1]))
        self.shifts = tuple(self.shift if side > self.size else 0 for side in grid)
        mask = None
        if any(self.shifts):
            plain = torch.nn.functional.pad(seams(self.grid, self.size, self.shifts), (self.prefix, 0))  # type: ignore[arg-type]
            mask = plain.unsqueeze(1).to(next(self.parameters()))  # (W, 1, w^2, P + w^2)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, P + N, C) -> (B, P + N, C). ``shared_rel_pos`` (1, heads, P + N, P + N) are biases; other masks are refused."""
        if attn_mask is not None or is_causal:
            raise ModelError("attention within windows takes no mask: leave window_attention out for networks that are called with one")
        bias = shared_rel_pos[:, list(self.heads)] if shared_rel_pos is not None and self.heads else shared_rel_pos
        if self.rel_pos is not None:
            bias = self.rel_pos.get_bias()  # (1, heads, P + N, P + N)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x)  # (B, P + N, 3 heads D)
        out = self._patches(qkv, bias)  # (B, N, heads D)
        if self.prefix:
            out = torch.cat((self._prefix(qkv, bias), out), dim=1)  # (B, P + N, heads D)
        out = self.norm(out)
        if gate is not None:
            out = out * gate
        return cast(Tensor, self.proj_drop(self.proj(out)))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3 heads D) -> queries, keys and values (B, heads, T, D); queries and keys not yet normalised."""
        q, k, v = qkv.reshape(qkv.shape[0], qkv.shape[1], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """(B, heads, T, D) and (B, heads, S, D) twice -> (B, T, heads D)."""
        dropout = self.attn_drop.p if self.training else 0.0
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=bias, dropout_p=dropout, scale=self.scale)
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], self.num_heads * self.head_dim)

    def _prefix(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """The prefix tokens' answers from all tokens: (B, P + N, 3 heads D) -> (B, P, heads D)."""
        q, k, v = self._heads(qkv)
        return self._attend(q[:, :, : self.prefix], k, v, bias[:, :, : self.prefix] if bias is not None else None)

    def _patches(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """The patches' answers from their windows and the prefix: (B, P + N, 3 heads D) -> (B, N, heads D)."""
        batch, area, prefix = qkv.shape[0], self.size**2, self.prefix
        tokens = self._windows(qkv[:, prefix:])  # (B, W, w^2, 3 heads D)
        if prefix:
            shared = qkv[:, None, :prefix].expand(-1, tokens.shape[1], -1, -1)  # (B, W, P, 3 heads D)
            tokens = torch.cat((shared, tokens), dim=2)
        q, k, v = self._heads(tokens.reshape(-1, prefix + area, tokens.shape[3]))  # (B W, heads, P + w^2, D)
        out = self._attend(q[:, :, prefix:], k, v, self._bias(bias, batch))  # (B W, w^2, heads D)
        return self._tokens(out, batch)

    def _bias(self, bias: Tensor | None, batch: int) -> Tensor | None:
        """What is added to the scores (B W, heads, w^2, P + w^2): positions, the same in every window, and the seams."""
        if bias is not None:
            columns = torch.arange(self.size, device=bias.device)
            window = (columns.unsqueeze(1) * self.grid[1] + columns).flatten() + self.prefix  # (w^2,) places of the first window's patches
            keys = torch.cat((torch.arange(self.prefix, device=bias.device), window))
            bias = bias.index_select(2, window).index_select(3, keys)  # (1, heads, w^2, P + w^2)
        mask = self.mask
        if mask is None:
            return bias
        mask = mask.repeat(batch, 1, 1, 1)  # (B W, 1, w^2, P + w^2)
        return mask if bias is None else mask + bias

    def _windows(self, x: Tensor) -> Tensor:
        """(B, N, K) -> (B, W, w^2, K), windows in rows of the rolled grid."""
        (high, wide), size, channels = self.grid, self.size, x.shape[2]
        if any(self.shifts):
            x = x.reshape(-1, high, wide, channels).roll((-self.shifts[0], -self.shifts[1]), (1, 2))
        x = x.reshape(-1, high // size, size, wide // size, size * channels).transpose(2, 3)  # (B, W_h, W_w, w, w K)
        return x.reshape(x.shape[0], -1, size * size, channels)

    def _tokens(self, x: Tensor, batch: int) -> Tensor:
        """(B W, w^2, K) -> (B, N, K): ``_windows`` undone."""
        (high, wide), size, channels = self.grid, self.size, x.shape[2]
        x = x.reshape(batch, high // size, wide // size, size, size * channels).transpose(2, 3)  # (B, W_h, w, W_w, w K)
        if any(self.shifts):
            x = x.reshape(batch, high, wide, channels).roll(tuple(self.shifts), (1, 2))
        return x.reshape(batch, high * wide, channels)
