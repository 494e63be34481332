"""Which heads a network has and what each of them owns: one adapter for each class of attention, in the table ``ADAPTERS``.

An adapter names the rows and columns that belong to each head, what must be zero to silence one, and the numbers to set once heads are
out. Where the class's own forward cannot take fewer heads, a class of pruned_attention.py stands in. Classes that the table does
not know are not found. Knows no importance and no data, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError
from edgejoule.optimize.copies import adopt
from edgejoule.optimize.groups import Cut, Group, blocks_of, reads, writes
from edgejoule.optimize.pruned_attention import (
    PaddedLayerNorm,
    PrunedCascade,
    PrunedCrossCovariance,
    PrunedLocalAttention,
    PrunedReducedAttention,
    PrunedRelPosAttention,
    PrunedSelfAttention,
)

T2T_HEADS = 4  # T2T-ViT-7 and -12 (Yuan et al., arXiv 2101.11986): a constant of the class, not of the block


def find_heads(root: nn.Module) -> tuple[Group, ...]:
    """A group for each attention block with two heads or more, in the network's order. Raises ModelError where a norm couples heads."""
    found = []
    for name, part in root.named_modules():
        adapter = ADAPTERS.get(f"{type(part).__module__}.{type(part).__qualname__}")
        if adapter is not None and (group := adapter(name, part)).units > 1:
            found.append(group)
    return tuple(found)


def _group(name: str, units: int, cuts: Sequence[Cut], readers: Sequence[Cut], settle: Callable[..., nn.Module | None]) -> Group:
    return Group(name, "heads", units, (*cuts, *readers), tuple(readers), settle)


def _one_each(heads: int) -> Tensor:
    """(H, 1): head h owns place h."""
    return blocks_of(heads, 1)


def _parts(heads: int, width: int, parts: int) -> Tensor:
    """(H, parts width): rows that are laid out (part, head, channel), as in most fused projections of q, k and v."""
    return torch.cat([blocks_of(heads, width, start=part * heads * width) for part in range(parts)], dim=1)


def _numbers(**per_head: int) -> Callable[[Any, Sequence[int]], None]:
    """Sets attributes to so many for each head that stays, and forgets biases kept from earlier calls."""

    def settle(module: Any, kept: Sequence[int]) -> None:
        for name, number in per_head.items():
            setattr(module, name, number * len(kept))
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}

    return settle


def _attention(name: str, block: Any) -> Group:
    """timm's Attention: (part, head, channel) rows, norms of q and k within a head, a gate that goes with it."""
    return _group(name, block.num_heads, *_tokens(name, block), _numbers(num_heads=1, attn_dim=block.head_dim))


def _relative(name: str, block: Any) -> Group:
    """RelPosAttention: its own bias is a table (T, H) or a perceptron with H outputs; of a shared one it takes its heads' part."""
    before = getattr(block, "heads", tuple(range(block.num_heads)))

    def settle(module: Any, kept: Sequence[int]) -> nn.Module:
        _settle_relative(module, kept)
        return adopt(PrunedRelPosAttention, module, num_heads=len(kept), heads=tuple(before[head] for head in kept))

    return _group(name, block.num_heads, *_tokens(name, block), settle)


def _replaced(name: str, block: Any) -> Group:
    """What window attention and token reduction put in the place of both: they take the number of heads from an attribute."""
    before = getattr(block, "heads", ()) or tuple(range(block.num_heads))  # of a bias that all blocks share

    def settle(module: Any, kept: Sequence[int]) -> None:
        _settle_relative(module, kept)
        module.num_heads, module.heads = len(kept), tuple(before[head] for head in kept)

    return _group(name, block.num_heads, *_tokens(name, block), settle)


def _tokens(name: str, block: Any) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
    """Cuts and readers of attention over all tokens, with or without q/k norm, gate, relative positions. ModelError for scale norm."""
    heads, width, bias, gate = block.num_heads, block.head_dim, getattr(block, "rel_pos", None), getattr(block, "gate", None)
    if not isinstance(getattr(block, "norm", None), (nn.Identity, type(None))):
        raise ModelError(f"{name} normalises all heads together (scale_norm): none can leave without a trace; prune another part")
    channels = blocks_of(heads, width)
    cuts = (*writes(block, "qkv", _parts(heads, width, 3)), *(() if gate is None else writes(block, "gate", channels)))
    if hasattr(bias, "relative_position_bias_table"):
        cuts += (Cut("rel_pos", "relative_position_bias_table", 1, _one_each(heads)),)
    elif bias is not None:
        cuts += writes(block, "rel_pos.mlp.fc2", _one_each(heads))
    return cuts, reads(block, "proj", channels)


def _settle_relative(module: Any, kept: Sequence[int]) -> None:
    if (bias := module.rel_pos) is not None:
        bias.bias_shape = (*bias.bias_shape[:2], len(kept))
        if hasattr(bias, "num_heads"):
            bias.num_heads = len(kept)


def _swin(name: str, block: Any) -> Group:
    """WindowAttention: a table (T, H) of biases."""
    heads = block.num_heads
    width = block.proj.in_features // heads
    table = Cut("", "relative_position_bias_table", 1, _one_each(heads))
    cuts = (*writes(block, "qkv", _parts(heads, width, 3)), table)
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, width)), _numbers(num_heads=1))


def _levit(name: str, block: Any) -> Group:
    """LeViT's Attention, linear or convolutional: rows (head, [key, key, value]), biases (H, N)."""
    heads, key, value = block.num_heads, block.key_dim, block.val_dim
    cuts = (*writes(block, "qkv", blocks_of(heads, 2 * key + value)), Cut("", "attention_biases", 0, _one_each(heads)))
    settle = _numbers(num_heads=1, key_attn_dim=key, val_attn_dim=value)
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, value)), settle)


def _levit_downsample(name: str, block: Any) -> Group:
    """LeViT's AttentionDownsample: queries by themselves, rows (head, [key, value]) of the others."""
    heads, key, value = block.num_heads, block.key_dim, block.val_dim
    cuts = (
        *writes(block, "kv", blocks_of(heads, key + value)),
        *writes(block, "q", blocks_of(heads, key)),
        Cut("", "attention_biases", 0, _one_each(heads)),
    )
    settle = _numbers(num_heads=1, key_attn_dim=key, val_attn_dim=value)
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, value)), settle)


def _tiny_vit(name: str, block: Any) -> Group:
    """TinyViT's Attention: LeViT's rows, with a norm before them."""
    heads, key, value = block.num_heads, block.key_dim, block.val_dim
    cuts = (*writes(block, "qkv", blocks_of(heads, 2 * key + value)), Cut("", "attention_biases", 0, _one_each(heads)))
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, value)), _numbers(num_heads=1, out_dim=value))


def _separable(name: str, block: Any) -> Group:
    """MobileViTv2's LinearSelfAttention has one head: its units are that head's channels.

    A unit owns a row of the keys, one of the values and a column of the projection; the one query row scores positions for all.
    """
    channels = block.embed_dim
    rows = torch.cat([blocks_of(channels, 1, start=1), blocks_of(channels, 1, start=1 + channels)], dim=1)  # (C, 2)
    return _group(name, channels, writes(block, "qkv_proj", rows), reads(block, "out_proj", _one_each(channels)), _numbers(embed_dim=1))


def _multi_scale(name: str, block: Any) -> Group:
    """EfficientViT (MIT)'s LiteMLA: rows (head, [q, k, v]) at the map's own scale, from which each further scale's are aggregated.

    A head leaves at all scales. The projection reads (scale, head, channel).
    """
    width, scales = block.dim, len(block.aggreg)
    heads = block.qkv.conv.out_channels // (3 * width)
    rows = blocks_of(heads, 3 * width)
    cuts = [*writes(block, "qkv", rows)]
    for scale in range(scales):
        cuts += [*writes(block, f"aggreg.{scale}.0", rows), *writes(block, f"aggreg.{scale}.1", rows)]

    def settle(module: Any, kept: Sequence[int]) -> None:
        for aggregate in module.aggreg:
            mix = aggregate[1]  # within each of q, k and v of each head
            mix.groups, mix.in_channels = 3 * len(kept), mix.weight.shape[1] * 3 * len(kept)

    return _group(name, heads, cuts, reads(block, "proj", _parts(heads, width, 1 + scales)), settle)


def _cascade(name: str, block: Any) -> Group:
    """EfficientViT (MSRA)'s CascadedGroupAttention: each head has layers of its own, and hands its output to the next one.

    So a head is silent only where its values are zero: weights and shifts of those rows are readers, beside the projection.
    """
    heads, key, value = len(block.qkvs), block.key_dim, block.val_dim
    cuts: list[Cut] = [Cut("", "attention_biases", 0, _one_each(heads))]
    readers: list[Cut] = []
    for head in range(heads):
        cuts += writes(block, f"qkvs.{head}", blocks_of(1, 2 * key), owner=head)
        cuts += writes(block, f"dws.{head}", blocks_of(1, key), owner=head)
        for cut in writes(block, f"qkvs.{head}", blocks_of(1, value, start=2 * key), owner=head):
            (readers if cut.tensor in ("weight", "bias") else cuts).append(cut)
    readers += reads(block, "proj", blocks_of(heads, value))
    chunks = getattr(block, "chunks", tuple(range(heads)))

    def settle(module: Any, kept: Sequence[int]) -> nn.Module:
        new = adopt(PrunedCascade, module, num_heads=len(kept), chunks=tuple(chunks[head] for head in kept))
        new.all_chunks = getattr(module, "all_chunks", heads)
        new.qkvs, new.dws = (nn.ModuleList(layers[head] for head in kept) for layers in (module.qkvs, module.dws))
        new.qkvs.training = new.dws.training = module.training
        return new

    return _group(name, heads, cuts, readers, settle)


def _reduced(name: str, block: Any) -> Group:
    """PVT's attention, both versions, and Twins': queries, then (part, head, channel) rows of keys and values from a smaller map."""
    heads = block.heads if hasattr(block, "heads") else block.num_heads
    width = block.q.out_features // heads
    cuts = (*writes(block, "q", blocks_of(heads, width)), *writes(block, "kv", _parts(heads, width, 2)))

    def settle(module: nn.Module, kept: Sequence[int]) -> nn.Module:
        number = "heads" if hasattr(module, "heads") else "num_heads"
        return adopt(PrunedReducedAttention, module, **{"num_heads": len(kept), number: len(kept)})

    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, width)), settle)


def _local(name: str, block: Any) -> Group:
    """Twins' attention in windows: (part, head, channel) rows."""
    heads = block.num_heads
    width = block.proj.in_features // heads
    cuts, readers = writes(block, "qkv", _parts(heads, width, 3)), reads(block, "proj", blocks_of(heads, width))
    return _group(name, heads, cuts, readers, lambda module, kept: adopt(PrunedLocalAttention, module, num_heads=len(kept)))


def _multi_query(name: str, block: Any) -> Group:
    """MobileNetV4's MultiQueryAttention2d: all heads share keys and values, so a head owns queries and its part of the projection."""
    heads = block.num_heads
    cuts, readers = writes(block, "query.proj", blocks_of(heads, block.key_dim)), reads(block, "output", blocks_of(heads, block.value_dim))
    return _group(name, heads, cuts, readers, _numbers(num_heads=1))


def _cross_covariance(name: str, block: Any) -> Group:
    """EdgeNeXt's CrossCovarianceAttn: a temperature (H, 1, 1)."""
    heads = block.num_heads
    width = block.proj.in_features // heads
    cuts = (*writes(block, "qkv", _parts(heads, width, 3)), Cut("", "temperature", 0, _one_each(heads)))
    readers = reads(block, "proj", blocks_of(heads, width))
    return _group(name, heads, cuts, readers, lambda module, kept: adopt(PrunedCrossCovariance, module, num_heads=len(kept)))


def _plain(name: str, block: Any) -> Group:
    """FastViT's and T2T-ViT's attention: (part, head, channel) rows, nothing else."""
    heads = getattr(block, "num_heads", T2T_HEADS)
    width = block.proj.in_features // heads
    cuts, readers = writes(block, "qkv", _parts(heads, width, 3)), reads(block, "proj", blocks_of(heads, width))
    return _group(name, heads, cuts, readers, lambda module, kept: adopt(PrunedSelfAttention, module, num_heads=len(kept)))


def _talking(name: str, block: Any) -> Group:
    """EfficientFormerV2's Attention2d and Attention2dDownsample. ``v_local`` takes each value channel alone.

    Talking heads mix scores before the softmax and weights after it: head h is the h-th of each mixture's inputs and outputs. Readers
    are the columns of both mixtures and of the projection.
    """
    heads, key, value = block.num_heads, block.key_dim, block.d
    cuts, readers = [Cut("", "attention_biases", 0, _one_each(heads))], [*reads(block, "proj", blocks_of(heads, value))]
    for path, width in (("q.proj" if hasattr(block.q, "proj") else "q", key), ("k", key), ("v", value), ("v_local", value)):
        cuts += writes(block, path, blocks_of(heads, width))
    for path in ("talking_head1", "talking_head2"):
        if hasattr(block, path):
            cuts += writes(block, path, _one_each(heads))
            readers += reads(block, path, _one_each(heads))
    return _group(name, heads, cuts, readers, _numbers(num_heads=1, dh=value))


def _edgevit(name: str, block: Any) -> Group:
    """EdgeViT's SparseAttention. What is propagated is normalised over all heads: a silent head's channels must be zeros there.

    So its values (weights and biases) and the propagation's biases are readers, beside the projection; and once it is out, the norm
    counts its channels as zeros (PaddedLayerNorm).
    """
    heads = block.num_heads
    width = block.head_dim
    channels, propagate = blocks_of(heads, width), block.propagate
    cuts = [*writes(block, "qkv", _parts(heads, width, 2))]
    readers = [*writes(block, "qkv", channels + 2 * heads * width), *reads(block, "proj", channels)]
    if propagate is None:
        return _group(name, heads, cuts, readers, _numbers(num_heads=1))
    cuts += [Cut("propagate.norm", tensor, 0, channels) for tensor in ("weight", "bias")]
    if getattr(propagate, "conv", None) is not None:
        cuts.append(Cut("propagate.conv", "weight", 0, channels))
        readers.append(Cut("propagate.conv", "bias", 0, channels))
    elif hasattr(propagate, "taps"):
        cuts.append(Cut("propagate", "taps", 3, channels))  # (1, r, 1, r, C)
        readers.append(Cut("propagate", "bias", 0, channels))
    norm = propagate.norm
    full = norm.width if isinstance(norm, PaddedLayerNorm) else norm.weight.shape[0]

    def settle(module: Any, kept: Sequence[int]) -> None:
        module.num_heads = len(kept)
        module.propagate.norm = adopt(PaddedLayerNorm, module.propagate.norm, width=full)

    return _group(name, heads, cuts, readers, settle)


def _delegate_keys(name: str, block: Any) -> Group:
    """EdgeViT's ablation without propagation: queries, then (part, head, channel) rows of keys and values."""
    heads, width = block.num_heads, block.head_dim
    cuts = (*writes(block, "q", blocks_of(heads, width)), *writes(block, "kv", _parts(heads, width, 2)))
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, width)), _numbers(num_heads=1))


def _windowed(name: str, block: Any) -> Group:
    """EdgeViT's ablation with attention in windows, and TNT's outer and inner attention with ``qk`` and ``v`` apart."""
    heads = block.num_heads
    if not hasattr(block, "qk"):
        width = block.head_dim
        cuts = writes(block, "qkv", _parts(heads, width, 3))
    else:
        width = block.proj.in_features // heads
        cuts = (*writes(block, "qk", _parts(heads, block.head_dim, 2)), *writes(block, "v", blocks_of(heads, width)))
    return _group(name, heads, cuts, reads(block, "proj", blocks_of(heads, width)), _numbers(num_heads=1))


_OURS = "edgejoule.optimize.pruned_attention"
ADAPTERS: Mapping[str, Callable[[str, nn.Module], Group]] = {
    "timm.layers.attention.Attention": _attention,
    "timm.models.vision_transformer_relpos.RelPosAttention": _relative,
    f"{_OURS}.PrunedRelPosAttention": _relative,
    "edgejoule.optimize.windows.WindowedAttention": _replaced,
    "edgejoule.optimize.token_attention.OpenAttention": _replaced,
    "timm.models.swin_transformer.WindowAttention": _swin,
    "timm.models.levit.Attention": _levit,
    "timm.models.levit.AttentionDownsample": _levit_downsample,
    "timm.models.tiny_vit.Attention": _tiny_vit,
    "timm.models.mobilevit.LinearSelfAttention": _separable,
    "timm.models.efficientvit_mit.LiteMLA": _multi_scale,
    "timm.models.efficientvit_msra.CascadedGroupAttention": _cascade,
    f"{_OURS}.PrunedCascade": _cascade,
    "timm.models.pvt_v2.Attention": _reduced,
    "timm.models.twins.GlobalSubSampleAttn": _reduced,
    "timm.models.twins.LocallyGroupedAttn": _local,
    f"{_OURS}.PrunedLocalAttention": _local,
    "timm.layers.attention2d.MultiQueryAttention2d": _multi_query,
    "edgejoule.zoo.pvt_v1.ReducedAttention": _reduced,
    f"{_OURS}.PrunedReducedAttention": _reduced,
    "timm.models.edgenext.CrossCovarianceAttn": _cross_covariance,
    f"{_OURS}.PrunedCrossCovariance": _cross_covariance,
    "timm.models.fastvit.Attention": _plain,
    "edgejoule.zoo.t2t_vit.Attention": _plain,
    f"{_OURS}.PrunedSelfAttention": _plain,
    "timm.models.efficientformer_v2.Attention2d": _talking,
    "timm.models.efficientformer_v2.Attention2dDownsample": _talking,
    "edgejoule.zoo.edgevit.SparseAttention": _edgevit,
    "edgejoule.zoo.edgevit_ablations.ChosenDelegates": _edgevit,
    "edgejoule.zoo.edgevit_ablations.DelegateKeys": _delegate_keys,
    "edgejoule.zoo.edgevit_ablations.WindowAttention": _windowed,
    "timm.models.tnt.Attention": _windowed,
}
