"""Scope "all": every operator that onnxruntime's own quantiser knows, by its min-max ranges. The careless way, to compare with.

Not safe for Vision Transformers: softmax, GELU, LayerNorm inputs and the residual stream are rounded too. Chooses nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from edgejoule.compile.quantize.graph import Graph
from edgejoule.compile.quantize.observe import batches
from edgejoule.compile.quantize.options import Options


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, entry: str, images: Any, batch: int) -> None:
        self._parts = ({entry: part} for part in batches(images, batch))

    def get_next(self) -> Any:
        return next(self._parts, None)


def quantize(graph: Graph, images: Any, batch: int, options: Options, folder: Path, target: Path) -> None:
    source, signed = folder / "whole.onnx", options.activations == "s8"
    onnx.save(graph.model, source)
    quantize_static(
        str(source),
        str(target),
        _Batches(graph.model.graph.input[0].name, images, batch),
        per_channel=True,
        reduce_range=options.weight_bits == 7,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        extra_options={"ActivationSymmetric": signed, "QuantizeBias": options.bias == "int32"},
    )
