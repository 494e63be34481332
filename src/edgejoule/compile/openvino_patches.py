"""Patch embedding as one linear layer: a convolution whose kernel is its stride reads every pixel once, and is a matrix product.

Only where its output becomes tokens, (B, N, C) or (B, H, W, C): elsewhere the transpose would come twice. A quantiser of the images
moves behind the rearrangement, which moves values only. Knows no quantiser, runs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgejoule.compile.openvino_import import import_openvino
from edgejoule.compile.openvino_restore import is_constant
from edgejoule.compile.openvino_weights import constant, flattened, only_reader

Array = np.ndarray[Any, Any]


def rewrite_patches(model: Any) -> int:
    """In place. Returns how many convolutions became linear layers."""
    return sum(_rewrite(node) for node in model.get_ordered_ops() if node.get_type_name() == "Convolution" and _is_patches(node))


def _is_patches(node: Any) -> bool:
    told, kernel, images = node.get_attributes(), tuple(node.input_value(1).shape), tuple(node.input_value(0).shape)
    plain = not any(told["pads_begin"]) and not any(told["pads_end"]) and set(told["dilations"]) == {1}
    fits = len(kernel) == 4 and tuple(told["strides"]) == kernel[2:] and images[2] % kernel[2] == images[3] % kernel[3] == 0
    return plain and fits and math.prod(kernel[2:]) > 1 and is_constant(node.input_value(1).get_node())


def _rewrite(node: Any) -> int:
    bias, end = _tokens(node)
    weights = flattened(node.input_value(1).get_node())
    if end is None or weights is None:
        return 0
    op = import_openvino().opset13
    width, batch = node.shape[1], node.shape[0]
    product = op.matmul(_patches(op, node), weights, False, True)
    product.set_friendly_name(node.get_friendly_name())
    found = product
    if bias is not None:
        found = op.add(product, op.constant(bias.reshape(1, 1, width)))
    if len(end.shape) == 4:
        found = op.reshape(found, op.constant(np.array([batch, *node.shape[2:], width])), False)
    end.output(0).replace(found.output(0))
    return 1


def _patches(op: Any, node: Any) -> Any:
    """(B, C, H, W) -> (B, N, C * P * Q), quantised as the images were."""
    source, (height, width) = node.input_value(0), tuple(node.input_value(1).shape)[2:]
    batch, channels, high, wide = tuple(source.shape)
    before = source.get_node()
    quantised = before.get_type_name() == "FakeQuantize" and all(
        math.prod(port.shape) == 1 for port in (before.input_value(n) for n in range(1, 5))
    )
    images = before.input_value(0) if quantised else source
    split = op.reshape(images, op.constant(np.array([batch, channels, high // height, height, wide // width, width])), False)
    moved = op.transpose(split, op.constant(np.array([0, 2, 4, 1, 3, 5])))
    shape = [batch, (high // height) * (wide // width), channels * height * width]
    patches = op.reshape(moved, op.constant(np.array(shape)), False)
    if not quantised:
        return patches
    bounds = [op.constant(constant(before.input_value(n).get_node()).reshape(())) for n in range(1, 5)]
    return op.fake_quantize(patches, *bounds, before.get_attributes()["levels"])


def _tokens(node: Any) -> tuple[Array | None, Any]:
    """(bias (C,), the operator that gives tokens); (None, None) where the output goes on as (B, C, H, W)."""
    bias, last = None, node
    after = only_reader(last)
    if after is not None and after.get_type_name() == "Add":
        bias = constant(after.input_value(1).get_node())
        if bias is None or bias.size != node.shape[1]:
            return None, None
        last, after = after, only_reader(after)
    if after is not None and after.get_type_name() == "Reshape" and tuple(after.shape) == (*node.shape[:2], math.prod(node.shape[2:])):
        after, wanted = only_reader(after), [0, 2, 1]
    else:
        wanted = [0, 2, 3, 1]
    if after is None or after.get_type_name() != "Transpose":
        return None, None
    order = constant(after.input_value(1).get_node())
    return (bias, after) if order is not None and order.tolist() == wanted else (None, None)
