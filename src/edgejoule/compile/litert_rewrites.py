"""Rewriting an exported network before LiteRT's converter sees it: the same numbers, spelt in operators that XNNPACK takes.

LiteRT has no grouped transposed convolution: its converter writes one TRANSPOSE_CONV a channel, with a slice before each and a
concatenation behind all, and EdgeViT's local propagation becomes hundreds of operators. Where windows do not overlap (kernel equal to
stride, one channel a group) it is each pixel times its channel's kernel. XNNPACK takes no slice with a step and no padding by another
value than zero either: both have a spelling in views, slices and concatenations. What follows from weights alone is computed once.
Other transposed convolutions stay as they are, and so do slices of what is written into: a copy would lose the writing. Knows no file
and no quantiser; needs torch, nothing of LiteRT.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from edgejoule.compile.constants import compute_constants, looked_into, writes

aten = torch.ops.aten


def rewrite(module: Any) -> Any:
    """An exported network's torch.fx.GraphModule, changed in place and returned. Exact but for rounding."""
    spellings = {aten.conv_transpose2d.input: _spread, aten.slice.Tensor: _stepped, aten.pad.default: _padded}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in spellings:
            continue
        with module.graph.inserting_before(node):
            spelt = spellings[node.target](module, node, _arguments(node))
        if spelt is not None:
            spelt.meta.update(node.meta)
            node.replace_all_uses_with(spelt)
            module.graph.erase_node(node)
    return compute_constants(module)


def _spread(module: Any, node: Any, given: dict[str, Any]) -> Any:
    """(B, C, H, W) with kernels (C, 1, s, t) of strides s, t -> (B, C, H s, W t); None where windows overlap or channels mix."""
    shape, kernel = _shape(module, given["input"]), _shape(module, given["weight"])
    strides = (given["stride"][0], given["stride"][-1])
    bare = not any(given["padding"]) and not any(given["output_padding"]) and set(given["dilation"]) == {1}
    if len(shape) != 4 or not bare or kernel != (shape[1], 1, *strides) or given["groups"] != shape[1]:
        return None
    (batch, channels, height, width), (down, right) = shape, strides
    emit = module.graph.call_function
    pixels = emit(aten.reshape.default, (given["input"], [batch, channels, height, 1, width, 1]))
    kernels = emit(aten.reshape.default, (given["weight"], [1, channels, 1, down, 1, right]))
    spread = emit(aten.reshape.default, (emit(aten.mul.Tensor, (pixels, kernels)), [batch, channels, height * down, width * right]))
    if given["bias"] is None:
        return spread
    return emit(aten.add.Tensor, (spread, emit(aten.reshape.default, (given["bias"], [1, channels, 1, 1]))))


def _stepped(module: Any, node: Any, given: dict[str, Any]) -> Any:
    """Every ``step``-th entry: the first of each group of ``step``; None for a slice without a step."""
    x, step, shape = given["self"], given["step"], _shape(module, given["self"])
    axis = given["dim"] % len(shape)
    size, count = shape[axis], _shape(module, node)[axis]
    if step == 1 or count == 0:
        return None
    if looked_into(node) in {looked_into(other) for other in module.graph.nodes if writes(other)}:
        return None
    start = given["start"] or 0
    start = max(start + size, 0) if start < 0 else start
    stop, emit = start + count * step, module.graph.call_function
    if start or stop < size:
        x = emit(aten.slice.Tensor, (x, axis, start, min(stop, size)))
    if stop > size:  # the last group is not whole
        x = emit(aten.constant_pad_nd.default, (x, [*(0, 0) * (len(shape) - 1 - axis), 0, stop - size]))
    groups = emit(aten.reshape.default, (x, [math.prod(shape[:axis]), count, step, math.prod(shape[axis + 1 :])]))
    return emit(aten.reshape.default, (emit(aten.slice.Tensor, (groups, 2, 0, 1)), list(_shape(module, node))))


def _padded(module: Any, node: Any, given: dict[str, Any]) -> Any:
    """Constant padding by another value than zero, as concatenations; None for any other."""
    x, value, shape, emit = given["self"], given["value"], list(_shape(module, given["self"])), module.graph.call_function
    if given["mode"] != "constant" or not value or min(given["pad"]) < 0:
        return None
    dtype = node.meta["val"].dtype
    for back, (before, after) in enumerate(zip(given["pad"][::2], given["pad"][1::2], strict=True)):
        axis = len(shape) - 1 - back
        edge = functools.partial(_filled, module, shape, axis, value, dtype)
        parts = [*([edge(before)] if before else []), x, *([edge(after)] if after else [])]
        x = emit(aten.cat.default, (parts, axis)) if len(parts) > 1 else x
        shape[axis] += before + after
    return x


def _filled(module: Any, shape: list[int], axis: int, value: float, dtype: Any, size: int) -> Any:
    """``shape`` with another size along one axis, all of one value."""
    made = module.graph.call_function(aten.full.default, ([*shape[:axis], size, *shape[axis + 1 :]], value), {"dtype": dtype})
    made.meta["val"] = torch.empty(0)  # a tensor: see compute_constants
    return made


def _arguments(node: Any) -> dict[str, Any]:
    """An ATen operator's arguments by their names, with its own defaults for those not given."""
    wanted = node.target._schema.arguments
    defaults = {one.name: one.default_value for one in wanted if one.has_default_value()}
    return {**defaults, **{one.name: value for one, value in zip(wanted, node.args, strict=False)}, **node.kwargs}


def _shape(module: Any, node: Any) -> tuple[int, ...]:
    value = functools.reduce(getattr, node.target.split("."), module) if node.op == "get_attr" else node.meta["val"]
    return tuple(int(size) for size in value.shape)
