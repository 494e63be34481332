"""A network that was trained for int8 (the pass ``qat``): its own rounding, spelt as each runtime's int8 kernels want it.

The exported graph holds quantised weights and the grids of activations already, so nothing is calibrated, searched or chosen here.
Every rewriting keeps what is computed: int8 activations become uint8 with the zero point moved by 128, weights are transposed where they
lie, biases (whole numbers of their product's steps already) become int32, a rectifier behind a grid that begins at zero
goes. Knows no calibration and no runtime's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.quantize.graph import Array, Graph, attributes
from edgejoule.compile.quantize.qdq import onnx_copy
from edgejoule.errors import BackendError

PRODUCTS = ("Gemm", "MatMul", "Conv")
SHIFT = 128  # from int8 to uint8
MOST_BIAS = float(2**30)  # of int32, with room for the products that are added to it


def is_learned(model: Any) -> bool:
    """Whether an ONNX file (onnx.ModelProto) comes quantised."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def refuse_float(model: Any, precision: str) -> None:
    """Raises BackendError where a network with learned rounding is to be compiled in float: it would not be that network."""
    if precision != "int8" and is_learned(model):
        raise BackendError(f"the network was trained for int8, not {precision}: ask for precision='int8'")


def for_kernels(source: Path, gemm: bool = False) -> tuple[Any, int] | None:
    """The file with its quantised layers as x86 runtimes take them, and how many there are; None where it comes in float.

    ``gemm``: linear layers of tokens become Gemm between two Reshapes, as onnxruntime, which joins a MatMul and the Add behind it to a
    Gemm in float, has its int8 kernel.
    """
    import onnx

    model = onnx.load(source)
    if not is_learned(model):
        return None
    graph = _Learned(onnx.shape_inference.infer_shapes(model))
    graph.fold_weights()
    graph.drop_rectifiers()
    for node in list(graph.graph.node):
        if node.op_type in PRODUCTS:
            graph.rewrite(node, gemm)
    graph.shift_activations()
    graph.clear()
    return graph.model, graph.layers


def note_of(layers: int) -> str:
    return f"learned (qat): {layers} layers"


class _Learned:
    """The graph being rewritten. Constants are added under new names, for exporters share equal ones."""

    def __init__(self, model: Any) -> None:
        graph = Graph(model)
        self.model, self.graph = model, model.graph
        self.layers = 0
        self._arrays = {name: graph.array(name) for name in graph.initializers}
        self._producer, self._readers, self._outputs, self._shapes = graph.producer, graph.consumers, graph.outputs, graph.shapes

    def fold_weights(self) -> None:
        """Weights that the graph unpacks from 4 bits are unpacked now."""
        for node in list(self.graph.node):
            if node.op_type == "DequantizeLinear" and self._depends_on_weights_alone(node.input[0]):
                node.input[0] = self._add(f"{node.output[0]}_values", self._computed(node.input[0]))

    def drop_rectifiers(self) -> None:
        """A Relu of what no negative number can be in: behind a grid whose lowest value is zero."""
        for node in list(self.graph.node):
            before = self._producer.get(node.input[0]) if node.op_type == "Relu" else None
            if before is not None and before.op_type == "DequantizeLinear" and self._begins_at_zero(before):
                for reader in self._readers[node.output[0]]:
                    _replace(reader, node.output[0], node.input[0])
                    self._readers[node.input[0]].append(reader)
                if node.output[0] in self._outputs:
                    continue
                self.graph.node.remove(node)

    def rewrite(self, product: Any, gemm: bool) -> None:
        """Weights where the product reads them, and its bias in whole numbers."""
        weights, grid = self._dequantized(product.input[1]), self._producer.get(product.input[0])
        if weights is None or grid is None or grid.op_type != "DequantizeLinear":
            return
        self.layers += 1
        if product.op_type == "MatMul" and gemm:
            product = self._as_gemm(product, grid, weights)
        elif product.op_type == "MatMul":
            product.input[1] = self._transposed(product, weights)
        if len(product.input) == 3 and product.input[2] in self._arrays:
            self._round_bias(product, float(self._arrays[grid.input[1]]), self._arrays[weights.input[1]])

    def _as_gemm(self, product: Any, grid: Any, weights: Any) -> Any:
        """The Gemm of a MatMul of tokens (..., I) and the Add of a bias (O,) behind it, between two Reshapes."""
        from onnx import helper

        name, add = product.output[0], self._bias_behind(product)
        outcome = name if add is None else add.output[0]
        rounded = self._producer[grid.input[0]]
        width, wide = self._add(f"{name}_rows", np.array([-1, self._shapes[rounded.input[0]][-1]])), self._shapes[name]
        flat, whole, value = (f"{name}_{part}" for part in ("flat", "whole", "value"))
        bias = () if add is None else (next(each for each in add.input if each != name),)
        made = [
            helper.make_node("Reshape", [rounded.input[0], width], [flat], name=f"{flat}_node"),
            helper.make_node("QuantizeLinear", [flat, *rounded.input[1:]], [whole], name=f"{whole}_node"),
            helper.make_node("DequantizeLinear", [whole, *grid.input[1:]], [value], name=f"{value}_node"),
            helper.make_node("Gemm", [value, weights.output[0], *bias], [f"{name}_gemm"], name=f"{name}_gemm_node", transB=1),
            helper.make_node("Reshape", [f"{name}_gemm", self._add(f"{name}_shape", np.array(wide))], [outcome], name=f"{name}_wide_node"),
        ]
        for node in made:
            self._insert_before(product, node)
        for old in (product, add):
            if old is not None:
                self.graph.node.remove(old)
        return self._producer[f"{name}_gemm"]

    def _bias_behind(self, product: Any) -> Any:
        readers = self._readers[product.output[0]]
        add = readers[0] if len(readers) == 1 and product.output[0] not in self._outputs else None
        if add is None or add.op_type != "Add":
            return None
        return add if any(each in self._arrays and self._arrays[each].ndim == 1 for each in add.input) else None

    def _round_bias(self, product: Any, step: float, steps: Array) -> None:
        """The bias (O,) as int32 in the scale of the products that it is added to: ``step`` of the input times ``steps`` (O,)."""
        scale = (steps.astype(np.float64) * step).astype(np.float32)
        whole = np.rint(self._arrays[product.input[2]].astype(np.float64) / scale)
        if np.abs(whole).max() > MOST_BIAS:  # a channel of next to no weights: its product stays in float
            return
        name = f"{product.output[0]}_bias"
        values, scales = self._add(f"{name}_values", whole.astype(np.int32)), self._add(f"{name}_scale", scale)
        zero = self._add(f"{name}_zero", np.zeros(len(scale), np.int32))
        self._insert_before(product, _dequantize([values, scales, zero], f"{name}_dequantized", 0))
        product.input[2] = f"{name}_dequantized"

    def shift_activations(self) -> None:
        """int8 activations as uint8: the kernels of x86 are made for unsigned times signed. The values stay what they are."""
        for node in self.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[0] in self._arrays:
                continue
            zero = self._arrays.get(node.input[2]) if len(node.input) > 2 else None
            if zero is not None and zero.dtype == np.int8:
                moved = (zero.astype(np.int32) + SHIFT).astype(np.uint8)
                node.input[2] = self._add(f"{node.output[0]}_zero", moved)

    def clear(self) -> None:
        """Without constants, shapes and nodes that nothing needs any more."""
        needed, kept = set(self._outputs), []
        for node in reversed(self.graph.node):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        kept.reverse()
        constants = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        for field, values in ((self.graph.node, kept), (self.graph.initializer, constants)):
            copies = [onnx_copy(value) for value in values]
            del field[:]
            field.extend(copies)
        del self.graph.value_info[:]

    def _dequantized(self, name: str) -> Any:
        """The DequantizeLinear of weights (O, ...), also behind the Transpose of a MatMul; None for a product in float."""
        given = self._producer.get(name)
        if given is not None and given.op_type == "Transpose" and list(attributes(given).get("perm", ())) == [1, 0]:
            given = self._producer.get(given.input[0])
        is_weight = given is not None and given.op_type == "DequantizeLinear" and given.input[0] in self._arrays
        return given if is_weight else None

    def _transposed(self, product: Any, weights: Any) -> str:
        """Weights (O, I) as (I, O), where they lie."""
        name = product.output[0]
        values = self._add(f"{name}_values", np.ascontiguousarray(self._arrays[weights.input[0]].T))
        node = _dequantize([values, *weights.input[1:]], f"{name}_dequantized", 1)
        self._insert_before(product, node)
        return str(node.output[0])

    def _begins_at_zero(self, node: Any) -> bool:
        zero = self._arrays.get(node.input[2]) if len(node.input) > 2 else None
        return zero is not None and zero.size == 1 and bool(zero == np.iinfo(zero.dtype).min)

    def _depends_on_weights_alone(self, name: str) -> bool:
        node = self._producer.get(name)
        return node is not None and all(not each or each in self._arrays or self._depends_on_weights_alone(each) for each in node.input)

    def _computed(self, name: str) -> Array:
        """What a tensor made of constants holds."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        nodes, pending = [], [name]
        while pending:
            node = self._producer.get(pending.pop())
            if node is not None and node not in nodes:
                nodes.append(node)
                pending += node.input
        nodes.sort(key=lambda node: list(self.graph.node).index(node))
        used = {each for node in nodes for each in node.input}
        constants = [tensor for tensor in self.graph.initializer if tensor.name in used]
        output = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT8, None)
        graph = onnx.helper.make_graph(nodes, "weights", [], [output], constants)
        found: Array = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])).run(None, {})[0]
        return found

    def _add(self, name: str, values: Array) -> str:
        from onnx import numpy_helper

        if name not in self._arrays:
            self._arrays[name] = values
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, order="C"), name))
        return name

    def _insert_before(self, node: Any, new: Any) -> None:
        place = next(place for place, each in enumerate(self.graph.node) if each is node or each.output[0] == node.output[0])
        self.graph.node.insert(place, new)
        self._producer[new.output[0]] = self.graph.node[place]  # the list keeps a copy


def _dequantize(inputs: list[str], output: str, axis: int) -> Any:
    from onnx import helper

    return helper.make_node("DequantizeLinear", inputs, [output], name=f"{output}_node", axis=axis)


def _replace(node: Any, before: str, after: str) -> None:
    for place, name in enumerate(node.input):
        if name == before:
            node.input[place] = after
