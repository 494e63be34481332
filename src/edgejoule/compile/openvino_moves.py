"""Quantisers moved in front of what only moves values, so that bytes are moved, not floats, and the quantiser joins the norm before it.

Window attention rearranges its tokens between a norm and a linear layer; NNCF quantises (and smooths, by a product along the channels)
right at the layer. Both give the same values before the rearrangement, as long as the channels stay the last axis. Runs nothing.
"""

from __future__ import annotations

import math
from typing import Any

from edgejoule.compile.openvino_import import import_openvino
from edgejoule.compile.openvino_restore import is_weighted
from edgejoule.compile.openvino_weights import constant

MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze"})


def rewrite_moves(model: Any) -> int:
    """In place. Returns how many quantisers moved."""
    return sum(_rewrite(node) for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize")


def _rewrite(quantiser: Any) -> int:
    if any(math.prod(quantiser.input_value(place).shape) != 1 for place in range(1, 5)) or not _feeds_linear(quantiser):
        return 0
    source, smoothing = quantiser.input_value(0), None
    if (node := source.get_node()).get_type_name() == "Multiply" and _readers(node) == 1:
        smoothing = constant(node.input_value(1).get_node())
        if smoothing is None or smoothing.size not in (1, node.shape[-1]) or smoothing.shape[-1] != smoothing.size:
            return 0
        source = node.input_value(0)
    last, first, transposes = source.get_node(), None, 0
    while (node := source.get_node()).get_type_name() in MOVES and _readers(node) == 1 and _keeps_channels(node):
        first, source = node, node.input_value(0)
        transposes += node.get_type_name() == "Transpose"
    if first is None or not transposes:  # a reshape copies nothing
        return 0
    op, value = import_openvino().opset13, source
    if smoothing is not None:
        value = op.multiply(value, op.constant(smoothing.reshape([1] * (len(source.shape) - 1) + [-1]))).output(0)
    bounds = [op.constant(constant(quantiser.input_value(place).get_node()).reshape(())) for place in range(1, 5)]
    moved = op.fake_quantize(value, *bounds, quantiser.get_attributes()["levels"])
    moved.set_friendly_name(quantiser.get_friendly_name())
    first.input(0).replace_source_output(moved.output(0))
    quantiser.output(0).replace(last.output(0))
    return 1


def _feeds_linear(quantiser: Any) -> bool:
    """Products of activations are fused with the transposes before them: their quantisers stay."""
    readers = [target.get_node() for target in quantiser.output(0).get_target_inputs()]
    return all(reader.get_type_name() == "MatMul" and is_weighted(reader) for reader in readers)


def _readers(node: Any) -> int:
    return sum(len(output.get_target_inputs()) for output in node.outputs())


def _keeps_channels(node: Any) -> bool:
    before, after = tuple(node.input_value(0).shape), tuple(node.shape)
    if node.get_type_name() == "Transpose":
        order = constant(node.input_value(1).get_node())
        return order is not None and bool(order.ravel()[-1] == len(before) - 1)
    return len(before) > 1 and len(after) > 1 and before[-1] == after[-1]
