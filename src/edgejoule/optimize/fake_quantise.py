"""Linear layers and convolutions as they train for int8: weights and activations rounded in the forward, with learned step sizes.

LSQ (Esser et al. 2020, arXiv:1902.08153) for weights, one step a row, symmetric; LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576) for
activations, one step and one offset a tensor. Rounding passes gradients straight through. What is learned is the clipping bound, that
is Qp times the step: it is of the size of what it clips, so that Adam, whose updates are as large for every parameter, moves it as fast
as a weight, where a bare step would jump by percents. Its gradient is scaled so that plain SGD moves the step exactly as LSQ does.
For the last fifth of the training the bounds stand still. Knows no network and no data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgejoule.optimize.quantised import HIGHEST, LOWEST, Grid, QuantisedConv2d, QuantisedLinear

LEVELS = HIGHEST - LOWEST  # of an activation, less one: the Qp of an unsigned grid
FROZEN = 0.2  # of a training, at its end
LEAST_ROW = 1e-3  # of the largest weight: the bound of a row of next to none, whose bias must fit into 2^30 of its steps
TINY = 1e-8
CLIPS = tuple(1.0 - 0.025 * place for place in range(25))  # 1.0, 0.975, … 0.4 of the largest value


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Scale(torch.autograd.Function):
    """The value as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _rounded(x: Tensor) -> Tensor:
    found: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return found


def _scaled(x: Tensor, factor: float) -> Tensor:
    found: Tensor = _Scale.apply(x, factor)  # type: ignore[no-untyped-call]
    return found


def fake_quantise(x: Tensor, step: Tensor, zero: Tensor | float, lowest: int, highest: int) -> Tensor:
    """x on the grid ``step * (q - zero)``, q whole in lowest..highest; ``step`` and ``zero`` broadcast with x.

    The gradient of the step is LSQ's equation 3: round(x / s) - x / s within the grid, and outside the end that x is clipped to, less
    the zero point. The zero point's is LSQ+'s: none within, minus the step outside. x's is 1 within, 0 outside.
    """
    whole = (_rounded(x * step.reciprocal()) + zero).clamp(lowest, highest)
    return (whole - zero) * step


class _Learned(nn.Module):
    """Bounds that training may move, until ``begin_step`` says that its last fifth has begun."""

    def begin_step(self, step: int, steps: int) -> None:
        """Without a gradient no optimiser moves a parameter, by momentum or decay neither."""
        learns = step < (1.0 - FROZEN) * steps
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters(recurse=False)}


class LearnedGrid(_Learned):
    """An activation's rounding to int8: ``width`` () from the lowest value to the highest, ``low`` () the lowest.

    ``rectified`` keeps the lowest value at zero: what is below is clipped, which is a ReLU. The zero point is the offset in steps,
    rounded straight-through, so that zero itself is always on the grid, as padding needs.
    """

    width: Tensor
    low: Tensor

    def __init__(self, low: float, high: float, rectified: bool = False) -> None:
        super().__init__()
        self.rectified = rectified
        low, high = 0.0 if rectified else min(low, 0.0), max(high, 0.0)
        self.width = nn.Parameter(torch.tensor(max(high - low, TINY)))
        if not rectified:
            self.low = nn.Parameter(torch.tensor(low))

    def step_and_zero(self, features: int = 1) -> tuple[Tensor, Tensor | float]:
        """The step () and the zero point () in whole steps; ``features`` is N of LSQ's gradient scale 1 / sqrt(N Qp)."""
        scale = 1.0 / math.sqrt(features * LEVELS)
        step = _scaled(self.width, scale * LEVELS**2).abs().clamp(min=TINY) / LEVELS
        if self.rectified:
            return step, float(LOWEST)
        return step, _rounded(LOWEST - _scaled(self.low, scale) / step).clamp(LOWEST, HIGHEST)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) float32 -> the same shape."""
        return fake_quantise(x.float(), *self.step_and_zero(x[0].numel()), LOWEST, HIGHEST)

    @torch.no_grad()
    def settled(self) -> Grid:
        step, zero = self.step_and_zero()
        return Grid(float(step), int(zero))


class LearnedRows(_Learned):
    """Weights' rounding to ``-most..most``, one step for each row: ``bound`` (O,) is the largest weight that is not clipped."""

    bound: Tensor

    def __init__(self, weight: Tensor, most: int) -> None:
        super().__init__()
        self.most = most
        self.bound = nn.Parameter(least_bounds(weight.detach().flatten(1), most))

    def step(self, numbers: int = 1) -> Tensor:
        """(O,); ``numbers`` is N of LSQ's gradient scale: the weights that share a step."""
        scale = self.most**2 / math.sqrt(numbers * self.most)
        return _scaled(self.bound, scale).abs().clamp(min=TINY) / self.most

    def forward(self, weight: Tensor) -> Tensor:
        """(O, ...) -> the same shape."""
        step = self.step(weight[0].numel()).reshape(-1, *[1] * (weight.ndim - 1))
        return fake_quantise(weight.float(), step, 0.0, -self.most, self.most)

    @torch.no_grad()
    def settled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The whole weights (O, ...) int8 and their steps (O,)."""
        step = self.step()
        rows = step.reciprocal().reshape(-1, *[1] * (weight.ndim - 1))
        return (weight.float() * rows).round().clamp(-self.most, self.most).to(torch.int8), step


def whole_bias(bias: Tensor | None, source: LearnedGrid, rows: LearnedRows) -> Tensor | None:
    """The bias (O,) in whole steps of the products that it is added to (input step times row's step), as int8 kernels add it."""
    if bias is None:
        return None
    unit = (source.step_and_zero()[0] * rows.step()).detach()  # (O,)
    return _rounded(bias.float() / unit) * unit


class FakeQuantisedLinear(nn.Module):
    """(..., I) -> (..., O), as the linear layer that it stands for, between rounded numbers. Its parameters keep their names."""

    def __init__(self, layer: nn.Linear, most: int, source: LearnedGrid) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.source, self.rows = source, LearnedRows(layer.weight, most)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.source(x), self.rows(self.weight), whole_bias(self.bias, self.source, self.rows))

    def deployed(self, bits: int) -> nn.Module:
        bias = whole_bias(self.bias, self.source, self.rows)
        return QuantisedLinear(*self.rows.settled(self.weight), bias, self.source.settled(), bits)


class FakeQuantisedConv2d(nn.Module):
    """(B, I, H, W) -> (B, O, H', W'), as the convolution that it stands for, between rounded numbers; its output is rounded too."""

    def __init__(self, layer: nn.Conv2d, most: int, source: LearnedGrid, target: LearnedGrid) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups
        self.weight, self.bias = layer.weight, layer.bias
        self.source, self.target, self.rows = source, target, LearnedRows(layer.weight, most)

    def forward(self, x: Tensor) -> Tensor:
        bias = whole_bias(self.bias, self.source, self.rows)
        y = functional.conv2d(self.source(x), self.rows(self.weight), bias, self.stride, self.padding, self.dilation, self.groups)
        found: Tensor = self.target(y)
        return found

    def deployed(self, bits: int) -> nn.Module:
        geometry: Any = (self.stride, self.padding, self.dilation)
        weight, scale = self.rows.settled(self.weight)
        bias = whole_bias(self.bias, self.source, self.rows)
        return QuantisedConv2d(weight, scale, bias, self.source.settled(), self.target.settled(), geometry, self.groups, bits)


def least_bounds(rows: Tensor, most: int) -> Tensor:
    """(O,): for each row of (O, n) the clipping bound, of some fractions of its largest value, that loses least when rounded."""
    largest = rows.abs().amax(1)  # (O,)
    largest = largest.clamp(min=max(LEAST_ROW * float(largest.max()), TINY))
    losses = []
    for clip in CLIPS:
        step = (clip * largest / most).unsqueeze(1)
        losses.append((fake_quantise(rows, step, 0.0, -most, most) - rows).square().sum(1))
    return torch.tensor(CLIPS).to(largest)[torch.stack(losses).argmin(0)] * largest


def least_range(values: Tensor, low: float, high: float) -> tuple[float, float]:
    """Of fractions of low..high, which both ends shrink by alike, the one whose grid loses least on a sample of values (n,)."""

    def loss(clip: float) -> float:
        step, zero = LearnedGrid(clip * low, clip * high).step_and_zero()
        return float((fake_quantise(values, step, zero, LOWEST, HIGHEST) - values).square().sum())

    with torch.no_grad():
        best = min(CLIPS, key=loss)
    return best * low, best * high
