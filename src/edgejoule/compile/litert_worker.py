"""LiteRT's converter and quantiser, run in the worker environment ``litert``: an exported program in, model.tflite out.

    {"program": .pt2, "shape": [B, C, H, W], "recipe": "float" | "dynamic" | "static" | "integer", "calibration": .npy, "target": .tflite}

Products with weights are quantised (linear, convolution), weights per output channel; what lies between them stays float. Only the recipe
``integer``, for accelerators that know nothing else, quantises every operator. Knows no backend, delegate or artifact.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

SIGNATURE, ENTRY = "serving_default", "args_0"  # litert-torch's names for the one function and its one argument
BITS = 8
PRODUCTS = {"dynamic": ("FULLY_CONNECTED", "CONV_2D"), "static": ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")}
SAID = {
    "dynamic": "int8 weights per channel, activations row by row at run time; linear and convolution, depthwise convolution stays float",
    "static": "int8 weights per channel, activations asymmetric by calibration; linear and convolution, everything between stays float",
    "integer": "int8 everywhere, as the accelerator demands: weights per channel, activations asymmetric by calibration",
}


def work(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Writes the target; {"chosen": {what: chosen}}. Raises BackendError where the network cannot be converted or quantised."""
    target, recipe = Path(job["target"]), job["recipe"]
    try:
        content = _convert(job["program"], tuple(job["shape"]))
    except Exception as error:
        raise BackendError(f"litert-torch cannot convert the network ({reason(error)}): use another backend") from error
    if recipe == "float":
        target.write_bytes(content)
        return {"chosen": {}}
    try:
        quantised = _quantise(content, recipe, job.get("calibration"), tuple(job["shape"]))
    except Exception as error:
        raise BackendError(
            f"ai-edge-quantizer cannot quantise the network ({reason(error)}): use precision='fp32' or mode='dynamic'"
        ) from error
    target.write_bytes(quantised)
    return {"chosen": {"quantisation": SAID[recipe]}}


def _convert(program: str, shape: tuple[int, ...]) -> bytes:
    import litert_torch
    import torch
    from torch._inductor.constant_folding import constant_fold

    module = torch.export.load(program).module(check_guards=False)
    # What follows from weights alone (a position embedding resampled to this size) is computed once: the converter knows no resampling.
    constant_fold(module)
    converted = litert_torch.convert(module, (torch.zeros(shape),))
    content: bytes = converted.model_content()
    return content


def _quantise(content: bytes, recipe: str, calibration: str | None, shape: tuple[int, ...]) -> bytes:
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(bytearray(content), _recipe(recipe))
    ranges = None
    if calibration is not None:
        ranges = quantizer.calibrate({SIGNATURE: _batches(calibration, shape[0])}, num_threads=1)
    return bytes(quantizer.quantize(ranges, enable_progress_report=False).quantized_model)


def _recipe(name: str) -> list[dict[str, Any]]:
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    rules = RecipeManager()
    if name == "integer":
        rules.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, BITS, BITS)
        for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            rules.add_quantization_config(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    for product in PRODUCTS.get(name, ()):
        operator = TFLOperationName(product)
        if name == "dynamic":
            rules.add_dynamic_config(".*", operator, BITS)
        else:
            rules.add_static_config(".*", operator, activation_num_bits=BITS, weight_num_bits=BITS)
    found: list[dict[str, Any]] = rules.get_quantization_recipe()
    return found


def _batches(path: str, batch: int) -> Iterable[Mapping[str, Any]]:
    return list(_each(path, batch))


def _each(path: str, batch: int) -> Iterator[Mapping[str, Any]]:
    """The calibration images in batches of the network's own size, the last one filled up by repeating."""
    import numpy as np

    images = np.load(path)  # (N, C, H, W) float32
    for start in range(0, len(images), batch):
        yield {ENTRY: np.ascontiguousarray(images[np.arange(start, start + batch) % len(images)])}


if __name__ == "__main__":
    sys.exit(environments.answer(work))
