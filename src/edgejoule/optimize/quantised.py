"""Linear layers and convolutions in the whole numbers that a runtime's int8 products take: weights kept as int8 (or two 4-bit ones a
byte), inputs rounded to int8 by numbers that training settled.

Their forward is spelt in torch's quantised operators (``quantized_decomposed``), which ``torch.export`` keeps, the ONNX exporter writes
as QuantizeLinear and DequantizeLinear, and PT2E's runtimes know. Run in torch, they compute in float32 with the rounded values.
Importing this file registers those operators. Knows no training and no runtime.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn
from torch.nn import functional

from edgejoule.optimize.packing import pack, unpack

LOWEST, HIGHEST = -128, 127  # of activations, int8
_quantised = torch.ops.quantized_decomposed


@dataclass(frozen=True, slots=True)
class Grid:
    """The values ``scale * (q - zero)`` for whole q in -128..127: an activation's, one grid for a whole tensor."""

    scale: float
    zero: int

    def __post_init__(self) -> None:
        if not (self.scale > 0.0 and LOWEST <= self.zero <= HIGHEST):
            raise ValueError(f"scale {self.scale} and zero {self.zero}: expected a positive scale and a zero in -128..127")


def on_grid(x: Tensor, scale: float, zero: int) -> Tensor:
    """x (...) float32 on the nearest values of a grid, clipped to its ends."""
    whole = _quantised.quantize_per_tensor.default(x, scale, zero, LOWEST, HIGHEST, torch.int8)
    found: Tensor = _quantised.dequantize_per_tensor.default(whole, scale, zero, LOWEST, HIGHEST, torch.int8)
    return found


class _Quantised(nn.Module):
    """What both kinds share. ``whole`` is int8 (O, ...), or with ``bits=4`` uint8 (O, ceil(n / 2)) of ``weight_shape``'s n numbers a row.

    ``scale`` (O,) float32: a weight is ``scale[o]`` times a whole number. All state is in tensors and plain attributes.
    """

    whole: Tensor
    scale: Tensor
    bias: Tensor | None

    def _keep(self, weight: Tensor, scale: Tensor, bias: Tensor | None, source: Grid, bits: int) -> None:
        self.bits, self.weight_shape = bits, tuple(weight.shape)
        self.input_scale, self.input_zero = source.scale, source.zero
        self.register_buffer("whole", pack(weight.flatten(1)) if bits == 4 else weight.to(torch.int8))
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def whole_weight(self) -> Tensor:
        """(O, ...) int8."""
        if self.bits != 4:
            return self.whole
        shape = self.weight_shape
        return unpack(self.whole, torch.Size(shape[1:]).numel()).reshape(shape)

    @property
    def weight(self) -> Tensor:
        """(O, ...) float32: what the layer multiplies by. Some networks ask a layer's weight for its type or shape."""
        zeros = torch.zeros_like(self.scale, dtype=torch.int64)  # (O,): some runtimes' readers insist on being told
        found: Tensor = _quantised.dequantize_per_channel.default(self.whole_weight(), self.scale, zeros, 0, -128, 127, torch.int8)
        return found


class QuantisedLinear(_Quantised):
    """(..., I) float32 -> (..., O) float32: the input on its grid times int8 weights, in float32 behind it."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, source: Grid, bits: int = 8) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._keep(weight, scale, bias, source, bits)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(on_grid(x, self.input_scale, self.input_zero), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self.bits}"


class QuantisedConv2d(_Quantised):
    """(B, I, H, W) float32 -> (B, O, H', W') float32 on a grid of its own, as runtimes with int8 convolutions give it.

    ``geometry``: stride, padding, dilation, each two numbers.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        source: Grid,
        target: Grid,
        geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        groups: int = 1,
        bits: int = 8,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = geometry
        self.groups, self.kernel_size = groups, tuple(weight.shape[2:])
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.output_scale, self.output_zero = target.scale, target.zero
        self._keep(weight, scale, bias, source, bits)

    def forward(self, x: Tensor) -> Tensor:
        x = on_grid(x, self.input_scale, self.input_zero)
        y = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return on_grid(y, self.output_scale, self.output_zero)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, groups={self.groups}, bits={self.bits}"
