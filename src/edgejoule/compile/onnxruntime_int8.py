"""An ONNX file in int8 for ONNX Runtime: quantised, kept clear of a kernel that overflows, and compared with itself unoptimised.

ONNX Runtime turns DequantizeLinear -> Softmax -> QuantizeLinear into one operator, QLinearSoftmax, whose float32 sums overflow where
attention is nearly uniform (docs/decisions/0009): ``widen_softmax`` keeps such files out of its reach, and ``compare_with_plain``
catches whatever else optimising may corrupt. Runs on a host: needs onnx and onnxruntime. Knows no leaf.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.onnxruntime_sessions import open_session
from edgejoule.errors import BackendError

# QLinearSoftmax of D values holds exp(max) = FLT_MAX / (D e^5) and multiplies it by 1 / scale: that overflows below this scale times 1 / D.
OVERFLOW = math.exp(-5)
MARGIN = 1.01
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Expand", "Tile")
# Optimised against plain, on logits: other roundings move them by less than quantising itself did, or by little.
LEAST_APART = 0.05
COMPARED = 8  # images


def quantize_dynamic(source: Path, target: Path) -> None:
    """Weights in int8, activations quantised as they come: linear layers per channel, convolutions of one group per tensor.

    ONNX Runtime's ConvInteger takes unsigned weights and one scale for all channels, which grouped convolutions do not survive: they
    stay in float. Ranges are of a whole batch, so an image's logits depend a little on its companions. Raises what onnxruntime raises.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="edgejoule-dynamic-") as folder:
        clean, linear = Path(folder) / "clean.onnx", Path(folder) / "linear.onnx"
        quant_pre_process(str(source), str(clean), skip_symbolic_shape=True)
        model = _without_shapes(clean)
        grouped = [node.name for node in model.graph.node if node.op_type == "Conv" and _attribute(node, "group", 1) > 1]
        quantize(clean, linear, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        _without_shapes(linear)
        quantize(linear, target, op_types_to_quantize=["Conv"], weight_type=QuantType.QUInt8, nodes_to_exclude=grouped)
        onnx.save(_without_shapes(target), target)


def widen_softmax(model: Any) -> int:
    """Gives a softmax between Q/DQ an output scale at which QLinearSoftmax does not overflow; how many had a smaller one.

    ``model`` is an onnx.ModelProto with static shapes, changed in place. Costs at most log2(255 / 147) = 0.8 of the eight bits.
    """
    import onnx
    from onnx import numpy_helper

    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*inferred.value_info, *inferred.output)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    widened = 0
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax" and _is_dequantized(model.graph, node.input[0])]:
        shape = shapes.get(softmax.output[0])
        least = OVERFLOW * MARGIN / max(shape[_attribute(softmax, "axis", -1)], 1) if shape else 1 / 255
        for node in list(_quantizers(model.graph, softmax.output[0])):
            scale = numpy_helper.to_array(constants[node.input[1]]) if node.input[1] in constants else None
            if scale is None or scale.min() >= least:
                continue
            wider = f"{node.output[0]}_edgejoule_scale"
            model.graph.initializer.append(numpy_helper.from_array(np.maximum(scale, np.float32(least)), wider))
            for reader in [node, *_readers(model.graph, node.output[0])]:
                if reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    reader.input[1] = wider
            widened += 1
    return widened


def compare_with_plain(source: Path, target: Path, images: Any, batch: int) -> float:
    """How far the optimised file is from the same one unoptimised: ||difference|| / ||logits||, the median over images (N, C, H, W).

    Raises BackendError where that is more than quantising cost (against the float32 ``source``) and more than 0.05.
    """
    count = -(-min(len(images), max(COMPARED, batch)) // batch) * batch
    sample = np.ascontiguousarray(np.resize(images, (count, *images.shape[1:])))
    exact = _logits(source, sample, batch, plain=False)
    plain = _logits(target, sample, batch, plain=True)
    apart = _distance(_logits(target, sample, batch, plain=False), plain)
    cost = _distance(plain, exact)
    if not apart <= max(cost, LEAST_APART):  # not a number is no agreement either
        raise BackendError(
            f"onnxruntime's optimisations change this int8 file's logits by {apart:.2g} of their norm, where quantising cost {cost:.2g}: "
            "use scope='linear', another backend or precision='fp32'"
        )
    return apart


def _logits(path: Path, images: Any, batch: int, *, plain: bool) -> Any:
    session = open_session(path, "cpu", 0, int8=True, plain=plain)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + batch]})[0] for i in range(0, len(images), batch)])  # (N, K)


def _distance(logits: Any, wanted: Any) -> float:
    apart = np.linalg.norm(logits - wanted, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), 1e-12)  # (N,)
    return float(np.median(apart))


def _quantizers(graph: Any, name: str) -> Iterator[Any]:
    """The QuantizeLinear nodes that read a tensor, also behind operators that only move values, past which onnxruntime pulls them."""
    for node in _readers(graph, name):
        if node.op_type == "QuantizeLinear":
            yield node
        elif node.op_type in MOVES:
            for output in node.output:
                yield from _quantizers(graph, output)


def _is_dequantized(graph: Any, name: str) -> bool:
    writer = next((node for node in graph.node if name in node.output), None)
    if writer is not None and writer.op_type in MOVES:
        return _is_dequantized(graph, writer.input[0])
    return writer is not None and writer.op_type == "DequantizeLinear"


def _readers(graph: Any, name: str) -> list[Any]:
    return [node for node in graph.node if name in node.input]


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def _without_shapes(path: Path) -> Any:
    """Rewrites a file without its inferred shapes: onnxruntime's tools change shapes (Gemm to MatMul) and then refuse the old ones."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)
    return model
