"""Which norms may be folded: those whose affine output reaches products with weights only, whatever moves it there.

A channel's way is followed through operators that move or average values and mix no channels. Knows no scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgejoule.compile.quantize.graph import Graph, Product, attributes

MOVES = (
    "Identity",
    "Reshape",
    "Transpose",
    "Slice",
    "Split",
    "Gather",
    "Concat",
    "Squeeze",
    "Unsqueeze",
    "Pad",
    "ReduceMean",
    "GlobalAveragePool",
)


@dataclass(frozen=True)
class Norm:
    """A per-channel gain and shift, and all the products that read what it gives."""

    name: str
    gain: str  # initializers
    shift: str
    channels: int
    products: tuple[Product, ...]
    shiftable: bool  # no zero padding on the way, so that a constant may be added to a channel


def find_norms(graph: Graph) -> tuple[Norm, ...]:
    """LayerNormalization with its own gain and shift, and Mul and Add by constants that are a decomposed norm's."""
    found = []
    for node in graph.model.graph.node:
        told = _affine(graph, node)
        if told is None:
            continue
        name, gain, shift, output, axis = told
        way = _Way(graph)
        if way.follow(output, axis) and way.products:
            channels = graph.shapes[output][axis]
            found.append(Norm(name, gain, shift, channels, tuple(way.products.values()), way.shiftable))
    return tuple(found)


def _affine(graph: Graph, node: Any) -> tuple[str, str, str, str, int] | None:
    """(name, gain, shift, output, channel axis) of a norm's affine part; None for any other node."""
    output = node.output[0]
    shape = graph.shapes.get(output, ())
    if node.op_type == "LayerNormalization" and len(node.input) == 3:
        gain, shift, axis = node.input[1], node.input[2], len(shape) - 1
        last = attributes(node).get("axis", -1) in (-1, axis)
    elif node.op_type == "Add" and len(parts := [n for n in node.input if not graph.constant(n)]) == 1:
        before = graph.producer.get(parts[0])
        if before is None or before.op_type != "Mul" or len(graph.consumers[parts[0]]) != 1 or parts[0] in graph.outputs:
            return None
        gains, shifts = [n for n in before.input if graph.constant(n)], [n for n in node.input if graph.constant(n)]
        if len(gains) != 1:
            return None
        gain, shift, last = gains[0], shifts[0], True
        axis = _channel_axis(graph, gain, shape)
        if axis < 0 or axis != _channel_axis(graph, shift, shape):
            return None
    else:
        return None
    alone = all(graph.constant(n) and len(graph.consumers[n]) == 1 for n in (gain, shift))
    return (node.name, gain, shift, output, axis) if last and alone and shape else None


def _channel_axis(graph: Graph, name: str, shape: tuple[int, ...]) -> int:
    """The one axis of ``shape`` along which a constant varies and that it covers; -1 where there is no such axis."""
    dims = tuple(graph.initializers[name].dims)
    wide = [place - len(dims) + len(shape) for place, dim in enumerate(dims) if dim > 1]
    return wide[0] if len(wide) == 1 and math.prod(dims) == shape[wide[0]] else -1


class _Way:
    """Follows a tensor's channels to all that reads them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._seen: dict[str, int] = {}  # tensor -> channel axis
        self.products: dict[str, Product] = {}
        self.shiftable = True

    def follow(self, tensor: str, axis: int) -> bool:
        """True where every reader, near or far, is a product that contracts the channels."""
        pending, concats = [(tensor, axis)], []
        while pending:
            name, axis = pending.pop()
            if self._seen.setdefault(name, axis) != axis or name in self._graph.outputs:
                return False
            for node in self._graph.consumers[name]:
                product = self._graph.product_of.get(node.name)
                if product is not None and self._contracts(product, name, axis):
                    self.products[product.name] = product
                    continue
                if (there := _moved(self._graph, node, name, axis)) is None:
                    return False
                self.shiftable &= node.op_type != "Pad" or self._graph.shapes[name] == self._graph.shapes[node.output[0]]
                if node.op_type == "Concat":
                    concats.append(node)
                pending += [(output, there) for output in node.output if output not in self._seen]
        return all(part in self._seen for node in concats for part in node.input)

    def _contracts(self, product: Product, name: str, axis: int) -> bool:
        alone = len(self._graph.consumers[product.weight]) == 1 and (not product.bias or len(self._graph.consumers[product.bias]) == 1)
        if product.op == "Conv":
            self.shiftable &= not any(attributes(self._graph.node(product.name)).get("pads", ()))
        return product.source == name and product.source_axis == axis and product.groups == 1 and alone


def _moved(graph: Graph, node: Any, name: str, axis: int) -> int | None:
    """The channels' axis after an operator that only moves or averages values; None for any other."""
    before, after = graph.shapes.get(name), graph.shapes.get(node.output[0])
    if node.op_type not in MOVES or before is None or after is None or (node.op_type != "Concat" and node.input[0] != name):
        return None
    told = attributes(node)
    if node.op_type == "Transpose":
        return list(told["perm"]).index(axis)
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        return next((there for there in _same_place(before, after, axis)), None)
    if node.op_type == "Gather":
        chosen = told.get("axis", 0) % len(before)
        index_rank = len(graph.shapes.get(node.input[1], graph.initializers[node.input[1]].dims if graph.constant(node.input[1]) else ()))
        return None if chosen == axis else axis + (index_rank - 1 if axis > chosen else 0)
    if node.op_type == "ReduceMean" and len(before) != len(after):
        return _reduced(before, after, axis)
    if before[axis] != after[axis]:
        return None
    if node.op_type in ("Concat", "Split"):
        return None if told.get("axis", 0) % len(before) == axis else axis
    if node.op_type == "Slice":
        return None if _reorders(graph, node, axis, len(before)) else axis
    if node.op_type == "Pad":
        filled = node.input[2] if len(node.input) > 2 else ""
        zero = not filled or (graph.constant(filled) and not graph.array(filled).any())
        return axis if zero and told.get("mode", b"constant") == b"constant" else None
    return axis


def _same_place(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> Iterator[int]:
    """Axes of ``after`` that hold exactly what ``axis`` of ``before`` held: as many values, with as many before them."""
    for there, dim in enumerate(after):
        if dim == before[axis] and math.prod(after[:there]) == math.prod(before[:axis]):
            yield there


def _reduced(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Means over all axes but the batch and the channels, without keeping them: (B, N, D) -> (B, D), (B, C, H, W) -> (B, C)."""
    return 1 if len(after) == 2 and len(before) > 2 and after == (before[0], before[axis]) and axis > 0 else None


def _reorders(graph: Graph, node: Any, axis: int, rank: int) -> bool:
    """Whether a Slice touches the channels, as far as can be told."""
    if len(node.input) < 4 or not graph.constant(node.input[3]):
        return True
    return axis in [int(n) % rank for n in graph.array(node.input[3]).ravel()]
