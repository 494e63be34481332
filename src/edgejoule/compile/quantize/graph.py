"""What there is to quantise in an ONNX graph: its weighted products, and the norms whose output they alone read.

A cleaned graph has every linear layer as Gemm (or MatMul without bias), batch norms folded, shapes inferred. Knows no ranges and
writes no Q/DQ.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_COPIED = 1 << 14  # values of a constant

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Product:
    """A Gemm, MatMul or Conv of an activation with a constant weight."""

    name: str  # of the node
    op: str
    source: str  # the activation
    weight: str
    bias: str  # "" where there is none
    output: str
    out_axis: int  # of the weight: its output channels
    in_axis: int  # of the weight: its input channels (of one group)
    source_axis: int  # of the activation: its channels
    groups: int = 1


class Graph:
    """An ONNX model with what is looked up often. Edits go through its methods; ``copy`` first where the original is still needed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.initializers: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.producer: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in dict.fromkeys(node.input):
                self.consumers[name].append(node)
        self.shapes = dict(_shapes(model.graph))
        self.products = tuple(found for node in model.graph.node if (found := self._product(node)) is not None)
        self.product_of = {product.name: product for product in self.products}

    def copy(self) -> Graph:
        return Graph(copy.deepcopy(self.model))

    def array(self, name: str) -> Array:
        """An initializer's values, as a new array."""
        from onnx import numpy_helper

        return np.array(numpy_helper.to_array(self.initializers[name]))

    def set_array(self, name: str, values: Array) -> None:
        """Replaces an initializer's values, or adds one."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.asarray(values, order="C"), name)  # ascontiguousarray would make a scalar scale (1,)
        if name in self.initializers:
            self.initializers[name].CopyFrom(tensor)
        else:
            self.model.graph.initializer.append(tensor)
            self.initializers[name] = self.model.graph.initializer[-1]

    def node(self, name: str) -> Any:
        return next(node for node in self.model.graph.node if node.name == name)

    def constant(self, name: str) -> bool:
        return name in self.initializers

    def _product(self, node: Any) -> Product | None:
        if node.op_type not in ("Gemm", "MatMul", "Conv") or not self.constant(node.input[1]) or self.constant(node.input[0]):
            return None
        bias = node.input[2] if len(node.input) > 2 else ""
        if bias and not self.constant(bias):
            return None
        told = attributes(node)
        weight = self.initializers[node.input[1]]
        if weight.data_type != 1:  # TensorProto.FLOAT
            return None
        source, name, output = node.input[0], node.input[1], node.output[0]
        if node.op_type == "Conv":
            return Product(node.name, "Conv", source, name, bias, output, 0, 1, 1, told.get("group", 1))
        if len(weight.dims) != 2:
            return None
        if node.op_type == "MatMul":
            return Product(node.name, "MatMul", source, name, "", output, 1, 0, len(self.shapes.get(source, ())) - 1)
        plain = told.get("transA", 0) == 0 and told.get("alpha", 1.0) == 1.0 and told.get("beta", 1.0) == 1.0
        out_axis = 0 if told.get("transB", 0) else 1
        bias_fits = not bias or tuple(self.initializers[bias].dims) == (weight.dims[out_axis],)
        return Product(node.name, "Gemm", source, name, bias, output, out_axis, 1 - out_axis, 1) if plain and bias_fits else None


def clean(source: Path, folder: Path) -> Graph:
    """The graph after onnxruntime's own preparation: constants folded, batch norms in their convolutions, MatMul + Add as Gemm."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "clean.onnx"
    quant_pre_process(str(source), str(path), skip_symbolic_shape=True)  # shapes are static: onnx infers them all
    model = onnx.load(path)
    taken: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{place}"
        taken.add(node.name)
    _rename(model)
    _unshare(model)
    return Graph(model)


def _rename(model: Any) -> None:
    """Names that onnxruntime gave to its own constants (gemm_...): it would give them again, and refuse the file for that."""
    given = {tensor.name: f"kept_{tensor.name}" for tensor in model.graph.initializer if tensor.name.startswith("gemm_")}
    for tensor in model.graph.initializer:
        tensor.name = given.get(tensor.name, tensor.name)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = given.get(name, name)


def _unshare(model: Any) -> None:
    """Every reader gets its own copy of a small constant: exporters keep equal ones (gains of 1, biases of 0) once."""
    small = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == 1 and math.prod(tensor.dims) <= MOST_COPIED}
    taken: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in taken and name in small:
                node.input[place] = f"{name}_of_{node.name}_{place}"
                twin = model.graph.initializer.add()
                twin.CopyFrom(small[name])
                twin.name = node.input[place]
            taken.add(name)


def attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _shapes(graph: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            yield value.name, tuple(dim.dim_value for dim in dims)
