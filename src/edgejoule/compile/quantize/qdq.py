"""The quantised file: QuantizeLinear and DequantizeLinear around the products that shall run in int8, and around nothing else.

onnxruntime's own writer hands a tensor's dequantised value to all that read it, the residual stream too; here only the products
read it, and the stream stays float. Weights are int8 per output channel, biases int32 in the products' own scale. Chooses nothing.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.quantize.graph import Array, Graph, Product
from edgejoule.compile.quantize.ranges import Scale, weight_scale

MOST_BIAS = float(2**30)  # of int32, with room for the products that are added to it


@dataclass(frozen=True)
class Plan:
    """How products are quantised. ``given``: product -> tensor that is quantised behind it as well."""

    scales: Mapping[str, Scale]  # of activations, by tensor
    given: Mapping[str, str] = field(default_factory=dict)
    factors: Collection[str] = ()  # MatMul nodes of two activations that are quantised too
    weight_bits: int = 8
    clip_weights: bool = False
    int32_bias: bool = True

    def with_scales(self, scales: Mapping[str, Scale]) -> Plan:
        return dataclasses.replace(self, scales=scales)


def write(graph: Graph, plan: Plan, names: Collection[str], target: Path) -> None:
    """Writes the graph with the named products in int8. The graph itself is left alone."""
    import onnx

    writer = _Writer(graph.copy(), plan)
    for product in graph.products:
        if product.name in names:
            writer.quantize(product)
    for name in plan.factors:
        writer.quantize_factors(name)
    onnx.save(writer.finish(), target)


class _Writer:
    """Collects the nodes to add, by the tensor that they follow ("" for the beginning)."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self._graph = graph
        self._plan = plan
        self._behind: dict[str, list[Any]] = defaultdict(list)
        self._nodes = {node.name: node for node in graph.model.graph.node}
        self._weights: dict[tuple[str, int], Array] = {}  # (weight, axis) -> scales

    def quantize(self, product: Product) -> None:
        node = self._nodes[product.name]
        scale = self._plan.scales[product.source]
        node.input[0] = self._activation(product.source)
        weights = self._weight(product, scale)
        node.input[1] = f"{product.weight}_dequantized"
        if product.bias and self._plan.int32_bias:
            node.input[2] = self._bias(product, scale, weights)
        if (given := self._plan.given.get(product.name)) is not None:
            dequantized = self._activation(given)
            for reader in self._graph.consumers[given]:
                _replace(reader, given, dequantized)

    def quantize_factors(self, name: str) -> None:
        node = self._nodes[name]
        for place, tensor in enumerate(list(node.input)):
            node.input[place] = self._activation(tensor)

    def finish(self) -> Any:
        model = self._graph.model
        nodes = list(self._behind.get("", ()))
        for value in model.graph.input:
            nodes += self._behind.get(value.name, ())
        for node in model.graph.node:
            nodes.append(node)
            for name in node.output:
                nodes += self._behind.get(name, ())
        kept = [onnx_copy(node) for node in nodes]
        used = {name for node in kept for name in node.input}
        weights = [onnx_copy(tensor) for tensor in model.graph.initializer if tensor.name in used]
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(weights)
        return model

    def _activation(self, tensor: str) -> str:
        """The dequantised twin of an activation, made once."""
        dequantized = f"{tensor}_dequantized"
        if not any(node.output[0] == dequantized for node in self._behind[tensor]):
            scale = self._plan.scales[tensor]
            ends = (f"{tensor}_scale", f"{tensor}_zero_point")
            self._graph.set_array(ends[0], np.array(scale.scale, dtype=np.float32))
            self._graph.set_array(ends[1], np.array(scale.zero_point, dtype=scale.dtype))
            self._behind[tensor] += [
                _node("QuantizeLinear", [tensor, *ends], f"{tensor}_quantized"),
                _node("DequantizeLinear", [f"{tensor}_quantized", *ends], dequantized),
            ]
        return dequantized

    def _weight(self, product: Product, scale: Scale) -> Array:
        """Writes the weight in int8, and returns its scales (K,)."""
        key = (product.weight, product.out_axis)
        if key in self._weights:
            return self._weights[key]
        weight, most = self._graph.array(product.weight), 2 ** (self._plan.weight_bits - 1) - 1
        scales = weight_scale(weight, product.out_axis, self._plan.weight_bits, self._plan.clip_weights)
        if product.bias and self._plan.int32_bias:
            scales = _room_for_bias(scales, self._graph.array(product.bias), scale.scale)
        shape = [1] * weight.ndim
        shape[product.out_axis] = -1
        rounded = np.clip(np.rint(weight / scales.reshape(shape)), -most, most).astype(np.int8)
        name = product.weight
        self._graph.set_array(f"{name}_quantized", rounded)
        self._dequantize(f"{name}_quantized", scales, np.int8, product.out_axis, name)
        self._weights[key] = scales
        return scales

    def _bias(self, product: Product, scale: Scale, weights: Array) -> str:
        bias = self._graph.array(product.bias).astype(np.float64)
        scales = (weights.astype(np.float64) * scale.scale).astype(np.float32)
        name = f"{product.output}_bias"
        most = 2.0**31 - 1
        rounded = np.clip(np.rint(bias / np.maximum(scales, np.finfo(np.float32).tiny)), -most, most).astype(np.int32)
        self._graph.set_array(f"{name}_quantized", rounded)
        self._dequantize(f"{name}_quantized", scales, np.int32, 0, name)
        return f"{name}_dequantized"

    def _dequantize(self, source: str, scales: Array, dtype: Any, axis: int, name: str) -> None:
        ends = (f"{name}_scale", f"{name}_zero_point")
        self._graph.set_array(ends[0], scales)
        self._graph.set_array(ends[1], np.zeros(len(scales), dtype=dtype))
        self._behind[""].append(_node("DequantizeLinear", [source, *ends], f"{name}_dequantized", axis=axis))


def _room_for_bias(scales: Array, bias: Array, activation: float) -> Array:
    """A channel of tiny weights and a large bias gets a wider scale, so that the bias fits into int32."""
    return np.maximum(scales, (np.abs(bias) / (activation * MOST_BIAS)).astype(np.float32))


def _node(kind: str, inputs: list[str], output: str, **told: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **told)


def _replace(node: Any, before: str, after: str) -> None:
    for place, name in enumerate(node.input):
        if name == before:
            node.input[place] = after


def onnx_copy(message: Any) -> Any:
    """A protobuf message's copy: what a list of them held is gone when the list is cleared."""
    twin = type(message)()
    twin.CopyFrom(message)
    return twin
