"""Counts a network: parameters, multiply-adds, and bytes of activations. Runs it on the meta device: shapes only, no weights, no time.

One MAC is one multiply-add. Counted are convolutions, linear layers and attention's two matrix products, written out or
fused; not counted are normalisations, activations, poolings, softmax and additions, as in most papers. Published figures
made with a counter that adds normalisations lie one or two percent higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgejoule.errors import ModelError
from edgejoule.records import Cost

aten = torch.ops.aten
FLOAT32_BYTES = 4
Formula = Callable[[tuple[Any, ...], Any], int]


def _matmul(left: torch.Tensor, right: torch.Tensor) -> int:
    """(..., M, K) x (..., K, N): one MAC for each of the output's elements and each k."""
    return int(math.prod(left.shape) * right.shape[-1])


def _convolution(args: tuple[Any, ...], output: torch.Tensor) -> int:
    """input, weight, bias, stride, padding, dilation, transposed, …: weight (out, in/groups, kH, kW), transposed (in, out/groups, kH, kW).

    Forward, every output element takes one filter; transposed, every input element feeds one filter.
    """
    image, weight, transposed = args[0], args[1], args[6]
    positions = image if transposed else output
    return int(math.prod(positions.shape) * math.prod(weight.shape[1:]))


def _attention(args: tuple[Any, ...], output: torch.Tensor) -> int:
    """query (..., L, E), key (..., S, E), value (..., S, V): L·S·E for the scores and L·S·V for the weighted sum, in every head."""
    query, key, value = args[:3]
    heads_and_queries = math.prod(query.shape[:-1])
    return int(heads_and_queries * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


MACS: Mapping[Any, Formula] = {
    aten.convolution: _convolution,
    aten.mm: lambda args, output: _matmul(args[0], args[1]),
    aten.bmm: lambda args, output: _matmul(args[0], args[1]),
    aten.addmm: lambda args, output: _matmul(args[1], args[2]),
    aten.baddbmm: lambda args, output: _matmul(args[1], args[2]),
    aten.mv: lambda args, output: math.prod(args[0].shape),
    aten.dot: lambda args, output: math.prod(args[0].shape),
    aten.scaled_dot_product_attention: _attention,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs and the output elements of every operation in ``MACS``, after composite ones came apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        formula = MACS.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # a composite operation comes apart into ones that have a formula
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if formula is not None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            self.macs += formula(args, first)
            self.elements += math.prod(first.shape)
        return output


def count(module: torch.nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Parameters, MACs and activation bytes (float32 outputs of the counted operations) of one image, (1, C, H, W).

    Layers that keep their weights as whole numbers say how many as ``weight_shape``; those count as parameters, too.

    ``module`` may live on any device and stays as it is: the run uses stand-ins on the meta device for its tensors.
    Raises ModelError where the network cannot run without values, or not at this input size.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    image = torch.empty((1, *input_size), device="meta")  # (1, C, H, W)
    counter = _Counter()
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), counter:
            torch.func.functional_call(module, stand_ins, (image,))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, input_size))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot count {type(module).__name__} at {size} ({reason}): expected a network that runs on shapes alone"
        ) from error
    finally:
        module.train()  # some attention blocks keep biases between evaluations and let go of them only in training mode
        module.train(training)
    params = sum(parameter.numel() for parameter in module.parameters())
    params += sum(math.prod(getattr(part, "weight_shape", (0,))) for part in module.modules())  # whole numbers, kept in buffers
    return Cost(params=params, macs=counter.macs, activation_bytes=counter.elements * FLOAT32_BYTES, input_size=input_size)
