"""The tensor mathematics of exact fusion: a per-channel affine map into the layer before or after it, and an identity into a kernel.

A layer is linear in its input, so ``layer(s x + t)`` and ``s layer(x) + t`` are the same layer with other weights. All sums are in
float64 and rounded once, to the layer's own type. Changes the layers it is given; knows no graph and no architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Layer: TypeAlias = nn.Linear | _ConvNd


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> scale x + shift`` on every channel, in float64."""

    scale: Tensor  # (C,)
    shift: Tensor  # (C,)


def affine_of_norm(norm: _BatchNorm) -> Affine:
    """What a batch norm computes in eval mode: gain (x - mean) / sqrt(var + eps) + bias (Ioffe and Szegedy 2015, algorithm 2).

    The norm must keep running statistics; gains and biases may be missing.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()  # (C,)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return Affine(scale, shift)


def affine_of_scale(gamma: Tensor) -> Affine:
    """A layer scale: ``gamma`` holds one factor a channel, in any shape such as (C,) or (C, 1, 1)."""
    scale = gamma.detach().double().flatten()
    return Affine(scale, torch.zeros_like(scale))


def fold_into_preceding(layer: Layer, affine: Affine) -> None:
    """``affine(layer(x))`` becomes ``layer(x)``, in place; a missing bias is added where it is needed."""
    weight = layer.weight.detach().double()  # (O, I/g, ...), a transposed convolution's (I, O/g, ...)
    if isinstance(layer, _ConvTransposeNd):
        groups, per_group = layer.groups, weight.shape[1]
        spread = weight.reshape(groups, -1, per_group, *weight.shape[2:])  # (g, I/g, O/g, ...)
        factor = affine.scale.reshape(groups, 1, per_group, *[1] * (weight.ndim - 2))
        weight = (spread * factor).reshape(weight.shape)
    else:
        weight = weight * affine.scale.reshape(-1, *[1] * (weight.ndim - 1))
    shift = affine.shift if layer.bias is None else layer.bias.detach().double() * affine.scale + affine.shift
    _set(layer, weight, shift if layer.bias is not None or bool(shift.any()) else None)


def fold_into_following(layer: Layer, affine: Affine) -> None:
    """``layer(affine(x))`` becomes ``layer(x)``, in place. Exact only where the layer pads nothing, or the shift is zero.

    Not for transposed convolutions, whose positions each see another part of the kernel.
    """
    assert not isinstance(layer, _ConvTransposeNd)
    weight = layer.weight.detach().double()  # (O, I/g, ...)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    spread = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # (g, O/g, I/g, K)
    extra = (spread * affine.shift.reshape(groups, 1, -1, 1)).sum((2, 3)).flatten()  # (O,)
    weight = (spread * affine.scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    shift = extra if layer.bias is None else layer.bias.detach().double() + extra
    _set(layer, weight, shift if layer.bias is not None or bool(extra.any()) else None)


def takes_identity(layer: nn.Module) -> bool:
    """Whether a kernel can hold the identity: a 2-D convolution from C to C channels that keeps every position."""
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return False
    centred = all(
        side % 2 == 1 and 2 * pad == step * (side - 1)
        for side, pad, step in zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    )
    return centred and layer.in_channels == layer.out_channels and set(layer.stride) == {1}


def add_identity(layer: nn.Conv2d) -> None:
    """``x + layer(x)`` becomes ``layer(x)``, in place: one on the centre tap of every channel's own kernel. See ``takes_identity``."""
    weight = layer.weight.detach().double().clone()  # (C, C/g, kh, kw)
    channels = torch.arange(weight.shape[0])
    weight[channels, channels % weight.shape[1], layer.kernel_size[0] // 2, layer.kernel_size[1] // 2] += 1.0
    _set(layer, weight, None if layer.bias is None else layer.bias.detach().double())


def _set(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """New parameters of the layer's own type; whether they train stays as it was."""
    old = layer.weight
    layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
