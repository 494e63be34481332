"""LiteRT's converter and quantiser, run in the worker environment ``litert``: an exported program in, model.tflite out.

    {"program": .pt2, "shape": [B, C, H, W], "recipe": "float" | "dynamic" | "static" | "integer", "target": .tflite}

and, of int8, {"calibration": .npy, "held": .npy, "labels": .npy | None, "max_drop_pct": points}; ``dynamic`` calibrates nothing. Products
with weights are quantised (linear, convolution), weights per output channel; what lies between them stays float, and so do products
without which the budget would be missed (``quantize.budget``). Only the recipe ``integer``, for accelerators that know nothing else,
quantises every operator. Knows no backend, delegate or artifact.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.litert_graph import WEIGHTED
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

SIGNATURE, ENTRY = "serving_default", "args_0"  # litert-torch's names for the one function and its one argument
BITS = 8
LINEAR = ("FULLY_CONNECTED", "CONV_2D")
PRODUCTS = {"dynamic": LINEAR, "static": (*LINEAR, "DEPTHWISE_CONV_2D"), "integer": tuple(sorted(WEIGHTED))}
RANGES = {"dynamic": "each row's own, at run time", "static": "minmax", "integer": "minmax"}
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
        quantised, notes = _quantise(content, job)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(
            f"ai-edge-quantizer cannot quantise the network ({reason(error)}): use precision='fp32' or mode='dynamic'"
        ) from error
    target.write_bytes(quantised)
    return {"chosen": {"quantisation": SAID[recipe], **notes}}


def _convert(program: str, shape: tuple[int, ...]) -> bytes:
    import litert_torch
    import torch

    from edgejoule.compile.litert_rewrites import rewrite

    module = rewrite(torch.export.load(program).module(check_guards=False))
    converted = litert_torch.convert(module, (torch.zeros(shape),))
    content: bytes = converted.model_content()
    return content


def _quantise(content: bytes, job: Mapping[str, Any]) -> tuple[bytes, Mapping[str, str]]:
    """The file, and what was chosen. ``integer`` is judged as well, but nothing of it can be put back to float."""
    from edgejoule.compile.litert_search import find_products, logits_of
    from edgejoule.compile.quantize import held
    from edgejoule.compile.quantize.budget import keep_budget
    from edgejoule.compile.quantize.score import Judge

    recipe, batch = job["recipe"], job["shape"][0]
    products = find_products(content, PRODUCTS[recipe])
    write = _writer(content, recipe, job.get("calibration"), batch, products.candidates)
    judge = Judge(content, held.load(job), batch, job["max_drop_pct"], logits_of)
    apart, search = sum(products.others.values()), recipe != "integer"
    made, chosen = keep_budget(list(products.candidates), judge, write, "ai-edge-quantizer", RANGES[recipe], apart, search)
    notes = {**chosen.notes(), "held-out search": f"files run: {chosen.sessions}, on {chosen.held} images"}
    if products.others:
        notes["always in float"] = ", ".join(f"{count} {kind}" for kind, count in products.others.items())
    return made, notes


def _writer(
    content: bytes, recipe: str, calibration: str | None, batch: int, scopes: Mapping[str, Iterable[tuple[str, str]]]
) -> Callable[[frozenset[str]], bytes]:
    """A function of the products that stay in float, which gives the file. Calibrates once, for all products."""
    from ai_edge_quantizer.quantizer import Quantizer

    ranges = None
    if calibration is not None:
        everything = Quantizer(bytearray(content), _recipe(recipe, ()))
        ranges = everything.calibrate({SIGNATURE: _batches(calibration, batch)}, num_threads=1)

    def write(kept: frozenset[str]) -> bytes:
        rules = _recipe(recipe, [use for name in sorted(kept) for use in scopes[name]])
        made = Quantizer(bytearray(content), rules).quantize(copy.deepcopy(ranges), enable_progress_report=False)
        return bytes(made.quantized_model)

    return write


def _recipe(name: str, kept: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """``kept``: (operator, scope) of what stays in float. A rule's pattern is searched for in an operator's scope; the last one counts."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    rules = RecipeManager()
    if name == "integer":
        rules.add_static_config(".*", TFLOperationName.ALL_SUPPORTED, BITS, BITS)
        for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            rules.add_quantization_config(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    for product in PRODUCTS[name] if name != "integer" else ():
        operator = TFLOperationName(product)
        if name == "dynamic":
            rules.add_dynamic_config(".*", operator, BITS)
        else:
            rules.add_static_config(".*", operator, activation_num_bits=BITS, weight_num_bits=BITS)
    for product, scope in kept:
        exactly = rf"\A{re.escape(scope)}\Z"
        rules.add_quantization_config(exactly, TFLOperationName(product), algorithm_key=AlgorithmName.NO_QUANTIZE)
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
