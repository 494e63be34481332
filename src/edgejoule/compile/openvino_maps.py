"""Attention over maps of channels, (B, H, D, N), written over tokens, (B, H, N, D): fewer copies, and one kernel where there is a softmax.

A convolution's output lies in memory with its channels last. Networks that take heads apart from maps (LeViT, EfficientViT) and transpose
them afterwards are given two copies by OpenVINO's processor plugin, to (B, C, P, Q) and to (B, H, N, D); behind the channels it is one.
Where values are multiplied by transposed probabilities, V P^T, P V^T is written, which the plugin runs with its softmax as one kernel.
Quantised factors, and factors that are no map's channels, leave the graph as it is. Knows no quantiser, runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgejoule.compile.openvino_import import import_openvino
from edgejoule.compile.openvino_weights import constant, only_reader

LAST_TWO_SWAPPED = [0, 1, 3, 2]


@dataclass(frozen=True)
class Attention:
    """The operators of one attention over maps."""

    queries: Any  # outputs, (B, H, D, M), and of keys and values (B, H, D, N)
    keys: Any
    values: Any
    between: tuple[Any, ...]  # the operators between product of queries and keys and softmax, the product's side first
    softmax: Any
    end: Any  # reshapes (B, H, D, M) to (B, C, P, Q)


def rewrite_maps(model: Any) -> int:
    """In place. Returns how many attentions and transposes were written over tokens."""
    parts: dict[str, list[Any]] = {}
    attentions = [attention for node in model.get_ordered_ops() if node.get_type_name() == "Softmax" and (attention := _attention(node))]
    for attention in attentions:
        _rewrite(attention, parts)
    return len(attentions) + sum(_rewrite_transpose(node, parts) for node in model.get_ordered_ops())


def _attention(softmax: Any) -> Attention | None:
    if len(softmax.shape) != 4 or softmax.get_attributes()["axis"] not in (-1, 3):
        return None
    values, end = _after(softmax)
    between = []
    node = softmax.input_value(0).get_node()
    while node.get_type_name() in ("Add", "Multiply") and constant(node.input_value(1).get_node()) is not None and _is_read_once(node):
        between.append(node)
        node = node.input_value(0).get_node()
    if values is None or node.get_type_name() != "MatMul" or not _is_read_once(node) or node.get_attributes()["transpose_b"]:
        return None
    queries, keys = node.input_value(0), node.input_value(1)
    if not node.get_attributes()["transpose_a"]:
        queries = _swapped(queries.get_node())
    if queries is None or not all(map(_parts_of, (queries, keys, values))):
        return None
    return Attention(queries, keys, values, tuple(reversed(between)), softmax, end)


def _after(softmax: Any) -> tuple[Any, Any]:
    """(values, the reshape to a map) behind the probabilities; (None, None) where anything else is done with them."""
    last, product = softmax, only_reader(softmax)
    if product is not None and _swapped(product) is not None:
        last, product = product, only_reader(product)
    if product is None or product.get_type_name() != "MatMul" or product.get_attributes()["transpose_a"]:
        return None, None
    on_the_right = product.input_value(1).get_node().get_name() == last.get_name()
    if not on_the_right or product.get_attributes()["transpose_b"] != (last is softmax):
        return None, None
    end = only_reader(product)
    return (product.input_value(0), end) if end is not None and _is_map(end, product.shape) else (None, None)


def _folded(shape: Any) -> tuple[int, int]:
    """(B, H, D, N) -> (B, H * D)."""
    return shape[0], shape[1] * shape[2]


def _swapped(node: Any) -> Any:
    """What a transpose of the last two of four axes takes."""
    if node.get_type_name() != "Transpose":
        return None
    order = constant(node.input_value(1).get_node())
    return node.input_value(0) if order is not None and order.ravel().tolist() == LAST_TWO_SWAPPED else None


def _parts_of(factor: Any) -> Any:
    """The reshape of a map (B, C, P, Q) to (B, H, D, P * Q) that ``factor`` is, or of which it is some channels; else None."""
    node = factor.get_node()
    if node.get_type_name() in ("Split", "VariadicSplit"):
        axis = constant(node.input_value(1).get_node())
        if axis is None or int(axis.reshape(())) not in (2, -2):
            return None
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Reshape" or len(node.shape) != 4:
        return None
    shape = tuple(node.input_value(0).shape)
    folded = _folded(node.shape)
    return node if len(shape) == 4 and shape[:2] == folded and math.prod(shape[2:]) == node.shape[3] else None


def _rewrite(attention: Attention, parts: dict[str, list[Any]]) -> None:
    op = import_openvino().opset13
    queries, keys, values = (_heads(op, factor, parts) for factor in (attention.queries, attention.keys, attention.values))
    scores = op.matmul(queries, keys, False, True)
    for node in attention.between:
        scores = (op.add if node.get_type_name() == "Add" else op.multiply)(scores, _of_rank_4(op, node.input_value(1)))
        scores.set_friendly_name(node.get_friendly_name())
    found = op.matmul(op.softmax(scores, -1), values, False, False)
    attention.end.output(0).replace(_map(op, found, attention.end.shape))


def _rewrite_transpose(node: Any, parts: dict[str, list[Any]]) -> int:
    """Of a map's heads to tokens, or of tokens to a map's heads."""
    source = _swapped(node)
    if source is None:
        return 0
    op, end = import_openvino().opset13, only_reader(node)
    if _parts_of(source) is not None and _is_turned_only(source.get_node()):
        node.output(0).replace(_heads(op, source, parts).output(0))
    elif end is not None and _is_map(end, node.shape):
        end.output(0).replace(_map(op, source, end.shape))
    else:
        return 0
    return 1


def _is_turned_only(node: Any) -> bool:
    """Whether all that reads a map's heads transposes them: else they would be copied twice. What was rewritten before reads no more."""
    return all(_swapped(target.get_node()) is not None for output in node.outputs() for target in output.get_target_inputs())


def _map(op: Any, heads: Any, shape: Any) -> Any:
    """(B, H, N, D) as a map (B, H * D, P, Q), an output, with its channels last in memory."""
    batch, width, height, breadth = tuple(shape)
    tokens = op.reshape(op.transpose(heads, _of(op, 0, 2, 1, 3)), _of(op, batch, height, breadth, width), False)
    return op.transpose(tokens, _of(op, 0, 3, 1, 2)).output(0)


def _is_map(end: Any, shape: Any) -> bool:
    """Whether an operator reshapes heads (B, H, D, N) to a map (B, H * D, P, Q)."""
    return end.get_type_name() == "Reshape" and len(end.shape) == 4 and tuple(end.shape)[:2] == _folded(shape)


def _heads(op: Any, factor: Any, parts: dict[str, list[Any]]) -> Any:
    """(B, H, D, N) as (B, H, N, D), from the map that it comes from. ``parts``: outputs of splits that were made already, by name."""
    view, node = _parts_of(factor), factor.get_node()
    batch, heads, width, tokens = tuple(view.shape)
    name = node.get_friendly_name()
    if name not in parts:
        rows = op.transpose(view.input_value(0), _of(op, 0, 2, 3, 1))  # (B, P, Q, C): as a convolution's output lies in memory
        apart = op.reshape(rows, _of(op, batch, tokens, heads, width), False)
        if node.get_output_size() > 1:
            widths = [output.shape[2] for output in node.outputs()]
            apart = op.variadic_split(apart, op.constant(np.int64(3)), _of(op, *widths))
        parts[name] = list(apart.outputs())
    return op.transpose(parts[name][factor.get_index()], _of(op, 0, 2, 1, 3))


def _of_rank_4(op: Any, source: Any) -> Any:
    """The plugin's kernel adds masks of four axes only."""
    values = constant(source.get_node())
    return op.constant(values.reshape((1,) * (4 - values.ndim) + values.shape) if values.size > 1 else values)


def _of(op: Any, *values: int) -> Any:
    return op.constant(np.array(values))


def _is_read_once(node: Any) -> bool:
    return len(node.output(0).get_target_inputs()) == 1
