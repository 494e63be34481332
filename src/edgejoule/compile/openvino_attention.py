"""Attention whose queries, keys and values leave their linear layer in the order in which attention reads them.

Networks take them apart with reshapes, a transpose of five axes, slices and products with the scale: copies of all of them, before
every attention. Here the layer's output channels are put in the order (query, key, value) x (head, channel), with the scale in its
weights; one split is left, and transposes of (B, N, H, D) next to the products. Where what reaches the products is no such
rearrangement (convolved keys, rotary positions, quantised factors), the graph stays as it is. Knows no quantiser, runs nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgejoule.compile.openvino_import import import_openvino
from edgejoule.compile.openvino_restore import is_constant, is_weighted
from edgejoule.compile.openvino_weights import constant, permuted

Array = np.ndarray[Any, Any]
SHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
MOVES = SHAPING | {"Transpose", "Slice", "Split", "VariadicSplit", "Gather", "Multiply"}


@dataclass(frozen=True)
class Way:
    """How a factor of a product of activations comes from a linear layer."""

    root: Any  # output of the layer
    product: Any
    place: int  # which factor
    steps: tuple[Any, ...]  # outputs of the operators between them, the layer's side first
    channels: Array  # (H, D): which channel of the layer becomes which of the factor's
    transposed: bool  # the product reads (B, H, D, N), not (B, H, N, D)

    @property
    def scale(self) -> float:
        found = [_scalar(step.get_node()) for step in self.steps if step.get_node().get_type_name() == "Multiply"]
        return math.prod(value for value in found if value is not None)


def rewrite_attention(model: Any) -> int:
    """In place. Returns how many linear layers were put in attention's order."""
    groups: dict[str, list[Way]] = defaultdict(list)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and not is_weighted(node):
            for way in _ways(node):
                groups[way.root.get_node().get_friendly_name()].append(way)
    return sum(_rewrite(ways) for ways in groups.values())


def _ways(product: Any) -> Iterator[Way]:
    """Of its factors that are a linear layer's channels, moved and scaled only."""
    for place, word in enumerate(("transpose_a", "transpose_b")):
        steps, source = [], product.input_value(place)
        while (before := _before(source.get_node())) is not None:
            steps.append(source)
            source = before
        steps.reverse()
        if not steps or not _is_linear(source.get_node()):
            continue
        places = _moved(steps, source)
        for transposed in (False, True):
            channels = None if places is None else _channels(places.swapaxes(2, 3) if transposed else places, source)
            if channels is not None and not (transposed and (place == 0 or product.get_attributes()[word])):
                yield Way(source, product, place, tuple(steps), channels, transposed)


def _before(node: Any) -> Any:
    """The output that a step moves or scales by one number; None where it is no such step."""
    if node.get_type_name() not in MOVES:
        return None
    sources = [node.input_value(place) for place in range(node.get_input_size())]
    if node.get_type_name() == "Multiply":
        moving = [source for source in sources if not is_constant(source.get_node())]
        return moving[0] if len(moving) == 1 and _scalar(node) is not None else None
    if any(constant(source.get_node()) is None for source in sources[1:]):
        return None
    return None if is_constant(sources[0].get_node()) else sources[0]


def _scalar(node: Any) -> float | None:
    for place in (0, 1):
        values = constant(node.input_value(place).get_node())
        if values is not None and values.size == 1:
            return float(values.reshape(()))
    return None


def _is_linear(node: Any) -> bool:
    """(B, N, C) from a product with constant weights and, maybe, a constant bias."""
    product = _product_of(node)
    if product is None or len(product.shape) != 3 or product.input_value(0).get_node().get_type_name() == "Constant":
        return False
    alone = product is node or len(product.output(0).get_target_inputs()) == 1
    return alone and len(product.input_value(1).shape) == 2 and not product.get_attributes()["transpose_a"]


def _product_of(node: Any) -> Any:
    if node.get_type_name() == "Add" and constant(node.input_value(1).get_node()) is not None:
        bias, before = node.input_value(1), node.input_value(0).get_node()
        node = before if tuple(bias.shape)[-1:] == tuple(node.shape)[-1:] == (math.prod(bias.shape),) else node
    return node if node.get_type_name() == "MatMul" and is_weighted(node) else None


def _moved(steps: list[Any], root: Any) -> Array | None:
    """The flat places of ``root``'s values, where the steps take them."""
    places: Array = np.arange(math.prod(root.shape)).reshape(tuple(root.shape))
    for step in steps:
        node, kind = step.get_node(), step.get_node().get_type_name()
        told = [constant(node.input_value(place).get_node()) for place in range(1, node.get_input_size())]
        if kind in SHAPING:
            places = places.reshape(tuple(step.shape))
        elif kind == "Transpose":
            places = places.transpose(told[0])
        elif kind == "Gather":
            places = np.take(places, told[0], axis=int(told[1].reshape(())))
        elif kind in ("Split", "VariadicSplit"):
            axis, widths = int(told[0].reshape(())), [output.shape[int(told[0].reshape(()))] for output in node.outputs()]
            places = np.split(places, np.cumsum(widths)[:-1], axis=axis)[step.get_index()]
        elif kind == "Slice":
            axes = told[3] if len(told) > 3 else np.arange(len(told[0]))
            for axis, start, stop, stride in zip(axes, *told[:3], strict=True):
                index: list[Any] = [slice(None)] * places.ndim
                index[int(axis)] = slice(int(start), int(stop), int(stride))
                places = places[tuple(index)]
        if tuple(places.shape) != tuple(step.shape):
            return None  # not understood
    return places if places.ndim == 4 else None


def _channels(places: Array, root: Any) -> Array | None:
    """(H, D) channels of the (B, N, C) root that ``places`` (B, H, N, D) are; None where they are anything else."""
    batch, tokens, width = tuple(root.shape)
    if (places.shape[0], places.shape[2]) != (batch, tokens):
        return None
    rows = np.arange(batch).reshape(-1, 1, 1, 1) * tokens + np.arange(tokens).reshape(1, 1, -1, 1)
    channels = places[0, :, 0, :]
    return channels if np.array_equal(places, rows * width + channels[None, :, None, :]) else None


def _rewrite(ways: list[Way]) -> int:
    root = ways[0].root
    order = np.concatenate([way.channels.ravel() for way in ways])
    if not np.array_equal(np.sort(order), np.arange(root.shape[2])) or not _alone(ways):
        return 0
    factor = np.concatenate([np.full(way.channels.size, way.scale) for way in ways])
    if not _reorder(root.get_node(), order, None if (factor == 1).all() else factor):
        return 0
    op = import_openvino().opset13
    widths = [way.channels.size for way in ways]
    parts = op.variadic_split(root, op.constant(np.int64(2)), op.constant(np.array(widths))).outputs() if len(ways) > 1 else [root]
    for way, part in zip(ways, parts, strict=True):
        _attach(op, way, part)
    return 1


def _alone(ways: list[Way]) -> bool:
    """Whether nothing else reads the layer, or what is on the ways."""
    on_the_way = {step.get_node().get_friendly_name() for way in ways for step in way.steps}
    ends = {(way.product.get_friendly_name(), way.place) for way in ways}
    outputs = [ways[0].root, *(output for way in ways for step in way.steps for output in step.get_node().outputs())]
    targets = [target for output in outputs for target in output.get_target_inputs()]
    return all(
        target.get_node().get_friendly_name() in on_the_way or (target.get_node().get_friendly_name(), target.get_index()) in ends
        for target in targets
    )


def _reorder(linear: Any, order: Array, factor: Array | None) -> bool:
    """In place: the layer's output channels, each times its factor. False where its weights cannot be written so."""
    product = _product_of(linear)
    axis = 0 if product.get_attributes()["transpose_b"] else 1
    weights = permuted(product.input_value(1).get_node(), axis, order, factor)
    if weights is None:
        return False
    product.input(1).replace_source_output(weights.output(0))
    if linear.get_type_name() == "Add":
        bias = constant(linear.input_value(1).get_node())
        changed = permuted(linear.input_value(1).get_node(), bias.ndim - 1, order, factor)
        linear.input(1).replace_source_output(changed.output(0))
    return True


def _attach(op: Any, way: Way, part: Any) -> None:
    """(B, N, H * D) to where the way ended."""
    batch, tokens = way.root.shape[0], way.root.shape[1]
    heads = op.reshape(part, op.constant(np.array([batch, tokens, *way.channels.shape])), False)
    factor = op.transpose(heads, op.constant(np.array([0, 2, 1, 3]))).output(0)
    way.product.input(way.place).replace_source_output(factor)
    if way.transposed:
        way.product.set_attribute("transpose_b", True)  # keys come as (B, H, N, D) now
