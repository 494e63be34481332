"""NNCF as the quantiser: its ranges and its bias correction, on a graph that ``smoothing`` may have edited.

Its own SmoothQuant stays off, because it leaves a multiplication before every product where folding into the norm leaves none. Only
what it found is taken over, and ``qdq`` writes the file: NNCF's own keeps weights and biases in float, and onnxruntime then multiplies
in float. Needs the nncf package. Chooses nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from edgejoule.compile.export import quiet
from edgejoule.compile.quantize.graph import Graph
from edgejoule.compile.quantize.observe import batches
from edgejoule.compile.quantize.ranges import Scale
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError


def quantize(graph: Graph, names: Collection[str], images: Any, batch: int, signed: bool) -> tuple[Graph, dict[str, Scale]]:
    """A copy with corrected biases, and the scales of what the named nodes read. Raises BackendError where nncf is missing or fails."""
    try:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters
    except ImportError as error:
        raise BackendError(f"nncf cannot be imported ({reason(error)}): pip install nncf, or use quantizer='onnxruntime'") from error
    entry = graph.model.graph.input[0].name
    parts = [{entry: part} for part in batches(images, batch)]
    others = [node.name for node in graph.model.graph.node if node.name not in names]
    try:
        with quiet():
            made = nncf.quantize(
                graph.copy().model,
                nncf.Dataset(parts),
                preset=nncf.QuantizationPreset.PERFORMANCE if signed else nncf.QuantizationPreset.MIXED,  # mixed: asymmetric activations
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(parts),
                ignored_scope=nncf.IgnoredScope(names=others, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
                ),
            )
    except Exception as error:
        raise BackendError(f"nncf cannot quantise the network ({reason(error)}): use quantizer='onnxruntime'") from error
    found, corrected = Graph(made), graph.copy()
    for product in graph.products:
        if product.bias and found.constant(product.bias):
            corrected.set_array(product.bias, found.array(product.bias))
    return corrected, _scales(found, names)


def _scales(made: Graph, names: Collection[str]) -> dict[str, Scale]:
    found = {}
    for node in made.model.graph.node:
        for name in node.input[:2] if node.name in names else ():
            back = made.producer.get(name)
            forth = made.producer.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
            if back is None or forth is None or made.constant(forth.input[0]):
                continue
            scale, zero = made.array(back.input[1]), made.array(back.input[2])
            found[forth.input[0]] = Scale(float(scale.ravel()[0]), int(zero.ravel()[0]), zero.dtype == np.int8)
    return found
