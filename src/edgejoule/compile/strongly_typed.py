"""ONNX whose own types are the precision that it runs in: what a strongly typed builder (TensorRT 10 and 11) is handed.

Half precision is written by onnxruntime's converter. Normalisation, powers and reductions stay in float32 whole chains long, because
their sums of squares leave half precision's range: the same ViT lost 66 points of top-1 without that. Softmax does not: its kernels
subtract the maximum and sum in float32 anyway, and casts around it would keep attention from being fused. int8 is symmetric, its
zero points 0 and its biases float, because that is all that TensorRT reads. bfloat16 is not offered: ONNX has no bfloat16 convolution
before opset 22, which TensorRT 10.3 (JetPack 6) cannot read. Needs onnx and onnxruntime, on the host only. Knows no runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

Float = Literal["fp32", "fp16"]
IN_FLOAT32 = (
    *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "LpNormalization", "BatchNormalization"),
    *("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "CumSum"),
    *("Pow", "Sqrt", "Reciprocal", "Exp", "Log", "LogSoftmax", "Range"),
)
LARGEST = 65504.0  # of half precision
MARGIN = 4  # other images reach further than those that were seen
PRODUCTS = ("Conv", "Gemm", "MatMul")
THROUGH = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity")  # between a weight and its product


def write_strongly_typed(source: Path, target: Path, floats: Float, images: Any = None) -> Mapping[str, str]:
    """Writes ``source`` (float32 ONNX, with or without Q/DQ) to ``target`` in ``floats``; inputs and outputs stay float32.

    Returns its products with weights: {name of the operator: "int8" or ``floats``}. ``images`` (B, C, H, W) are real ones: what comes
    near the end of half precision's range on them stays in float32. Raises BackendError for values that are not finite, for Q/DQ that
    is not symmetric int8, and where ONNX's checker refuses the result; OSError where it cannot be written.
    """
    try:
        import onnx

        model = onnx.load(source)
        _check_quantization(model)
        _keep_biases_float(model)
        _name_nodes(model)
        if floats == "fp16":
            model = _halved(model, set() if images is None else _too_large(copy.deepcopy(model), images))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, target)
        return products(model)
    except (BackendError, OSError):
        raise
    except Exception as error:
        raise BackendError(f"the ONNX file cannot be written in {floats} ({reason(error)}): use precision='fp32'") from error


def _name_nodes(model: Any) -> None:
    """Gives every operator a name of its own: they are chosen, and found again in an engine, by name."""
    seen: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{position}_edgejoule"
        seen.add(node.name)


def products(model: Any) -> dict[str, str]:
    """Linear and convolution operators, by name, and the precision that their types say: int8 where both operands are dequantised."""
    import onnx

    short = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    made = {output: node for node in model.graph.node for output in node.output}
    constants = {weight.name: weight.data_type for weight in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and (kind := _weight(node.input[1], made, constants)) is not None:
            operands = [made[name].op_type if name in made else "" for name in node.input[:2]]
            found[node.name] = "int8" if operands == ["DequantizeLinear"] * 2 else short.get(kind, "other")
    return found


def _weight(name: str, made: Mapping[str, Any], constants: Mapping[str, int]) -> int | None:
    """The type of the constant that a tensor comes from; None for an activation."""
    while name not in constants:
        if name not in made or made[name].op_type not in THROUGH:
            return None
        name = made[name].input[0]
    return constants[name]


# ---------------------------------------------------------------- what TensorRT reads of quantisation


def _check_quantization(model: Any) -> None:
    """Raises BackendError unless every Q/DQ is of constant scale, int8 and zero point 0 (int32 biases aside)."""
    import onnx
    from onnx import numpy_helper

    constants = {weight.name: weight for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if any(name not in constants for name in node.input[1:] if name):
            raise BackendError(f"the scale of {node.name} is computed, expected a constant: quantise statically for TensorRT")
        zero = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        kind = zero.data_type if zero is not None else onnx.TensorProto.INT8
        if kind not in (onnx.TensorProto.INT8, onnx.TensorProto.INT32) or (zero is not None and numpy_helper.to_array(zero).any()):
            raise BackendError(f"{node.name} is not symmetric int8, which is all that TensorRT reads: quantise with activations='s8'")


def _keep_biases_float(model: Any) -> None:
    """Writes int32 biases, which TensorRT cannot dequantise, as the float32 numbers that they stand for."""
    import onnx
    from onnx import numpy_helper

    constants = {weight.name: weight for weight in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        bias = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if bias is None or bias.data_type != onnx.TensorProto.INT32:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(bias) * numpy_helper.to_array(constants[node.input[1]])  # the scale is () or (channels,)
        model.graph.initializer.append(numpy_helper.from_array(values.astype("float32"), node.output[0]))
    _replace(model.graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    _replace(model.graph.initializer, [weight for weight in model.graph.initializer if weight.name in used])


def _replace(held: Any, wanted: list[Any]) -> None:
    del held[:]
    held.extend(wanted)


# ---------------------------------------------------------------- half precision


def _halved(model: Any, large: set[str]) -> Any:
    """``large`` names the tensors that half precision cannot hold: who makes and who reads them stays in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    del model.graph.value_info[:]  # some exporters list constants there, which the converter would cast
    kept = sorted({*DEFAULT_OP_BLOCK_LIST, *IN_FLOAT32} - {"Min", "Max"})
    nodes = [node.name for node in model.graph.node if large & {*node.input, *node.output}]
    halved = convert_float_to_float16(model, keep_io_types=True, op_block_list=kept, node_block_list=nodes)
    _join_float32_chains(halved)
    OnnxModel(halved).topological_sort()
    return halved


def _join_float32_chains(model: Any) -> None:
    """Between two operators that stay in float32 nothing is rounded to half; a tensor that two of them read is cast once.

    The converter writes x -> Cast to half -> Cast to float32 there, once for every reader and under one name.
    """
    graph = model.graph
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    same = {}
    for name, node in casts.items():
        first = casts.get(node.input[0])
        if name.endswith("_cast_to_fp32") and first is not None and first.input[0].endswith("_cast_to_fp16"):
            same[name] = first.input[0]
    nodes = [node for node in graph.node if node.output[0] not in same]
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = same.get(name, name)
    used = {name for node in nodes for name in node.input} | {port.name for port in graph.output}
    once: dict[str, Any] = {}
    for node in nodes:
        if node.op_type != "Cast" or node.output[0] in used:
            once.setdefault(node.output[0], node)
    _replace(graph.node, list(once.values()))
    del graph.value_info[:]  # inferred again by whoever reads the file: types of tensors that are gone would be refused


def _too_large(model: Any, images: Any) -> set[str]:
    """The tensors whose magnitude on ``images`` comes near half precision's largest; the graph is changed to find them.

    Seen in float32: on a CPU half precision is computed in float32, and would not show what a GPU loses. Raises BackendError.
    """
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    graph = model.graph
    del graph.value_info[:]  # may name tensors that are long gone
    typed = onnx.shape_inference.infer_shapes(model).graph.value_info
    names = [value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    del graph.output[:]
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}/magnitude"]))
        graph.node.append(helper.make_node("ReduceMax", [f"{name}/magnitude"], [f"{name}/largest"], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(f"{name}/largest", TensorProto.FLOAT, []))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    largest = session.run(None, {graph.input[0].name: np.ascontiguousarray(images)})
    if not np.isfinite(largest).all():
        raise BackendError("the network's own values are not finite on real images: check its weights")
    return {name for name, value in zip(names, largest, strict=True) if value > LARGEST / MARGIN}
