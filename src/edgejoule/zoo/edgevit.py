"""EdgeViT (Pan et al., ECCV 2022, arXiv 2205.03436): local aggregation, sparse global attention, local propagation, four stages.

This is the released architecture; edgevit_variants.py names its sizes and says where the paper's text differs. Options replace parts
as in the paper's Table 4 (edgevit_ablations.py). Knows no names, no training, no weights.

Any input size works. Where a patch or window does not divide a map, patch embeddings pad zeros to the right and below, delegates stand
for windows cut off at the border, and propagation is cropped to the map; where everything divides (224 does), not one operation
differs from the released one. Sides below 32 pixels are legal too, but padding is then most of what the last stages see.
Two rewrites are exact and free: a picked token is normalised after picking (LayerNorm works on each token alone), and attention is fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edgejoule import torchvision
from edgejoule.errors import ModelError

torchvision.ensure()
from timm.layers import DropPath, Mlp, trunc_normal_, use_fused_attn  # noqa: E402
from timm.models._features import feature_take_indices  # noqa: E402

PATCHES = (4, 2, 2, 2)  # side of a stage's patches, in pixels of its input map


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H W, C) -> (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], height, width)


def pad_to(x: torch.Tensor, multiple: int, mode: str = "constant") -> torch.Tensor:
    """(..., H, W) grown to the right and below to multiples; the same tensor where nothing is missing."""
    right, below = -x.shape[-1] % multiple, -x.shape[-2] % multiple
    return nn.functional.pad(x, (0, right, 0, below), mode=mode) if right or below else x


def crop_to(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., H', W') -> (..., H, W), the top-left part; the same tensor where nothing is too much."""
    return x if tuple(x.shape[-2:]) == (height, width) else x[..., :height, :width]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, fused: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T scale) v of q (B, heads, N, D), k and v (B, heads, M, D), ``mask`` (B, 1, 1, M) of keys -> (B, N, heads D)."""
    if fused:
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (B, heads, N, D)
    else:
        scores = (q * scale) @ k.transpose(-2, -1)  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        x = scores.softmax(dim=-1) @ v  # (B, heads, N, D)
    return x.transpose(1, 2).flatten(2)


def split_heads(x: torch.Tensor, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """(B, N, parts C) -> as many of (B, heads, N, C / heads)."""
    x = x.reshape(x.shape[0], -1, parts, num_heads, x.shape[2] // (parts * num_heads))  # (B, N, parts, heads, D)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


@dataclass(frozen=True)
class Parts:
    """Which parts the blocks of stages 1 to 3 are made of; the defaults are the released ones. Raises ModelError for unknown parts."""

    local: Literal["conv", "lsa", "none"] = "conv"
    delegate: Literal["top_left", "center", "avg", "max"] = "top_left"
    propagate: Literal["deconv", "bilinear", "none"] = "deconv"
    window: int = 7  # side of LSA's windows, in tokens

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if (known := get_args(kind)) and getattr(self, name) not in known:
                raise ModelError(f"EdgeViT has no {name}={getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.window < 1:
            raise ModelError(f"a window has a side of at least one token, not {self.window}")


class ConditionalPosition(nn.Module):
    """x + dw3x3(x): positions from a token's neighbours. ``fuse`` folds the identity into the kernel's centre tap."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.fused = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out: torch.Tensor = self.conv(x)
        return out if self.fused else x + out

    def fuse(self) -> ConditionalPosition:
        """Fold the identity in, once; gives the module itself. A state dict saved afterwards belongs to a fused module."""
        if not self.fused:
            with torch.no_grad():
                self.conv.weight[:, 0, 1, 1] += 1.0
            self.fused = True
        return self


class PatchEmbedding(nn.Module):
    """Non-overlapping convolution and LayerNorm over channels (eps 1e-5)."""

    def __init__(self, in_dim: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Conv2d(in_dim, dim, patch, stride=patch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / p), ceil(W / p))."""
        x = self.proj(pad_to(x, self.patch))  # (B, C, h, w)
        tokens = self.norm(tokens_of(x))  # (B, h w, C)
        return map_of(tokens, *x.shape[-2:]).contiguous()


class LocalAggregation(nn.Module):
    """Convolutions that gather each window's content: no norm and no non-linearity stand between pw1, dw and pw2."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.position = ConditionalPosition(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pw1 = nn.Conv2d(dim, dim, 1)
        self.dw = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.pw2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), use_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.position(x)
        x = x + self.drop_path(self.pw2(self.dw(self.pw1(self.norm1(x)))))
        return cast(torch.Tensor, x + self.drop_path(self.mlp(self.norm2(x))))


class LocalPropagation(nn.Module):
    """Spreads each delegate over its window by a depth-wise transposed convolution; LayerNorm (eps 1e-5) on the result.

    Kernel and stride are the window's side, so each token gets one product. ``fuse`` writes just that: runtimes have no fast path for
    such a convolution (it took a quarter of XXS's time in OpenVINO, for 0.05 % of its MACs).
    """

    def __init__(self, dim: int, rate: int) -> None:
        super().__init__()
        self.rate = rate
        self.conv: nn.ConvTranspose2d | None = nn.ConvTranspose2d(dim, dim, rate, stride=rate, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Delegates (B, n, C), n = ceil(H / r) ceil(W / r) -> tokens (B, H W, C)."""
        rows, columns = -(-height // self.rate), -(-width // self.rate)
        if self.conv is not None:
            x = tokens_of(crop_to(self.conv(map_of(x, rows, columns)), height, width))  # (B, H W, C)
        else:
            x = x.reshape(-1, rows, 1, columns, 1, x.shape[-1]) * self.taps + self.bias  # (B, h, r, w, r, C)
            x = x.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2)  # (B, H W, C)
        return cast(torch.Tensor, self.norm(x))

    def fuse(self) -> LocalPropagation:
        """Taps (r, 1, r, C) in the place of the convolution, once; gives the module itself."""
        if self.conv is not None:
            assert self.conv.bias is not None
            self.taps = nn.Parameter(self.conv.weight.detach()[:, 0].permute(1, 2, 0).unsqueeze(1).contiguous())
            self.bias = nn.Parameter(self.conv.bias.detach().clone())
            self.conv = None
        return self


class SparseAttention(nn.Module):
    """Delegates attend to one another, what they learn is propagated, then projected at full resolution. Rate 1: plain attention."""

    def __init__(self, dim: int, num_heads: int, rate: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rate = num_heads, dim // num_heads, rate
        self.scale = self.head_dim**-0.5
        self.fused_attn: bool = use_fused_attn()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.propagate: nn.Module | None = LocalPropagation(dim, rate) if rate > 1 else None
        self.proj = nn.Linear(dim, dim)

    def delegates(self, x: torch.Tensor) -> torch.Tensor:
        """The top-left token of each window, normalised: (B, C, H, W) -> (B, n, C), n = ceil(H / r) ceil(W / r)."""
        return cast(torch.Tensor, self.norm(tokens_of(x[:, :, :: self.rate, :: self.rate])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), not yet normalised -> tokens (B, H W, C)."""
        height, width = x.shape[-2:]
        q, k, v = split_heads(self.qkv(self.delegates(x)), 3, self.num_heads)
        out = attend(q, k, v, self.scale, self.fused_attn)  # (B, n, C)
        if self.propagate is not None:
            out = self.propagate(out, height, width)  # (B, N, C)
        return cast(torch.Tensor, self.proj(out))


class AttentionBlock(nn.Module):
    """Positions, attention (sparse or windowed; it normalises by itself) and the feed-forward network, on tokens."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.position = ConditionalPosition(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.position(x)
        tokens = tokens_of(x) + self.drop_path(self.attn(x))  # (B, N, C)
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return map_of(tokens, *x.shape[-2:])


class Block(nn.Module):
    """The local-global-local bottleneck: ``local`` (absent where the rate is 1), then ``sparse``. One drop path rate for its branches."""

    def __init__(self, dim: int, num_heads: int, rate: int, mlp_ratio: float, drop_path: float, parts: Parts) -> None:
        super().__init__()
        local: nn.Module = nn.Identity()
        attn: nn.Module = SparseAttention(dim, num_heads, rate)
        if rate > 1 and parts == Parts():
            local = LocalAggregation(dim, mlp_ratio, drop_path)
        elif rate > 1:
            from edgejoule.zoo import edgevit_ablations

            local = edgevit_ablations.local_part(dim, num_heads, mlp_ratio, drop_path, parts)
            attn = edgevit_ablations.attention_part(dim, num_heads, rate, parts)
        self.local = local
        self.sparse = AttentionBlock(dim, attn, mlp_ratio, drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return cast(torch.Tensor, self.sparse(self.local(x)))


class Stage(nn.Module):
    """A patch embedding and blocks of one width. Checkpointed blocks run twice in training, so BatchNorm sees each batch twice."""

    def __init__(self, patch_embed: PatchEmbedding, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) -> (B, C, ceil(H / p), ceil(W / p))."""
        x = self.patch_embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x


class EdgeViT(nn.Module):
    """The network, with timm's model API: images (B, in_chans, H, W) -> logits (B, num_classes).

    ``dims``, ``depths``, ``heads`` and ``rates`` (sides of the delegates' windows, in tokens) have one entry for each of four stages.
    A stage of rate 1 has neither local aggregation nor propagation. ``local``, ``delegate``, ``propagate`` and ``window``
    are those of ``Parts``: the paper's ablations. ``global_pool=""`` keeps the map: logits are (B, num_classes, h, w).
    Raises ModelError for options that make no network.
    """

    def __init__(
        self,
        dims: Sequence[int] = (36, 72, 144, 288),
        depths: Sequence[int] = (1, 1, 3, 2),
        heads: Sequence[int] = (1, 2, 4, 8),
        rates: Sequence[int] = (4, 2, 2, 1),
        mlp_ratio: float = 4.0,
        local: Literal["conv", "lsa", "none"] = "conv",
        delegate: Literal["top_left", "center", "avg", "max"] = "top_left",
        propagate: Literal["deconv", "bilinear", "none"] = "deconv",
        window: int = 7,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(heads) == len(rates) == len(PATCHES):
            raise ModelError("EdgeViT has four stages: give dims, depths, heads and rates of four entries each")
        if min(*dims, *depths, *heads, *rates) < 1 or any(dim % head for dim, head in zip(dims, heads, strict=True)):
            raise ModelError(f"dims {tuple(dims)} must be multiples of heads {tuple(heads)}, and depths and rates at least 1")
        self.dims, self.depths, self.heads, self.rates = tuple(dims), tuple(depths), tuple(heads), tuple(rates)
        self.parts = Parts(local, delegate, propagate, window)
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)]
        last = max(sum(depths) - 1, 1)
        drop_paths = iter([drop_path_rate * i / last for i in range(sum(depths))])
        stages = []
        for in_dim, dim, depth, head, rate, patch in zip((in_chans, *dims), dims, depths, heads, rates, PATCHES, strict=False):
            blocks = [Block(dim, head, rate, mlp_ratio, path, self.parts) for path in itertools.islice(drop_paths, depth)]
            stages.append(Stage(PatchEmbedding(in_dim, dim, patch), blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = nn.BatchNorm2d(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes, global_pool)
        self.apply(_initialise)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H / 32), ceil(W / 32))."""
        return cast(torch.Tensor, self.norm(self.stages(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, C, h, w) -> (B, num_classes), or (B, C) before the head; without pooling the positions stay, (B, ·, h, w)."""
        x = x.mean(dim=(2, 3)) if self.global_pool else x.permute(0, 2, 3, 1)  # (B, C) or (B, h, w, C)
        x = self.head_drop(x)
        x = x if pre_logits else self.head(x)  # (B, K) or (B, h, w, K)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
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
        """timm's: (final features, [maps (B, C_i, h_i, w_i) of the chosen stages]); ``norm`` normalises the last stage's."""
        if output_fmt != "NCHW":
            raise ModelError(f"EdgeViT's intermediate maps are NCHW, not {output_fmt}: ask for NCHW")
        taken, last = feature_take_indices(len(self.stages), indices)
        maps = []
        for i, stage in enumerate(list(self.stages)[: last + 1 if stop_early else None]):
            x = stage(x)  # (B, C_i, h_i, w_i)
            final = self.norm(x) if i == len(self.dims) - 1 else x
            if i in taken:
                maps.append(final if norm else x)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """timm's: drop the stages after the last one in ``indices``, the norm with them, and the head."""
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = nn.Sequential(*list(self.stages)[: last + 1])
        if cut:
            self.num_features = self.head_hidden_size = self.dims[last]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut or prune_head:
            self.reset_classifier(0, "")
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, drawn afresh, and perhaps another pooling. Raises ModelError for a pooling that is neither ``avg`` nor empty."""
        if global_pool not in (None, "avg", ""):
            raise ModelError(f"EdgeViT pools by 'avg' or not at all (''), not by {global_pool!r}")
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        like = next(self.stages.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype).train(self.training)
            _initialise(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass: less memory, more time, the same gradients."""
        for stage in self.stages:
            cast(Stage, stage).grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """No name: 1-D parameters (norms, biases) are spared by shape, and the positional convolutions decay as the released ones do."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: by stage, or by block."""
        by_block = [(r"^stages\.(\d+)\.patch_embed", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else by_block}


def _initialise(module: nn.Module) -> None:
    """Linear: truncated normal of 0.02; norms already are 1 and 0, and convolutions keep torch's own draw, as in the released code."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
