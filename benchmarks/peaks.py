"""The rooflines that shares are of: this machine's best product of two square matrices in float32, bfloat16 and int8. Runs no network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

GEMM = 2048


def gemm_peaks(threads: int) -> dict[str, float]:
    """The best of several products of two square matrices, in 1e9 operations (2 a multiply-add) per second."""
    return {kind: 2e-9 * GEMM**3 / best_s(those) for kind, those in products(threads).items()}


def products(threads: int) -> dict[str, list[Callable[[], Any]]]:
    """What multiplies two matrices, by precision; of int8 by torch and by onnxruntime, of which the better one is the peak.

    Not there where the processor lacks the instructions, so that torch multiplies in a plain loop: that is a peak of nothing, and takes
    minutes.
    """
    import torch

    from edgejoule.compile.cpu import has_bf16, sums_exactly

    torch.set_num_threads(threads)
    found: dict[str, list[Callable[[], Any]]] = {"fp32": [_product(torch.mm, torch.float32)], "int8": [_onnx_product(threads)]}
    if has_bf16():
        found["bf16"] = [_product(torch.mm, torch.bfloat16)]
    if sums_exactly():
        found["int8"].append(_product(torch._int_mm, torch.int8))
    return found


def best_s(products: Sequence[Callable[[], Any]], runs: int = 8) -> float:
    """The least seconds of any of them."""
    best = math.inf
    for multiply in products:
        for _ in range(runs):
            began = time.perf_counter()
            multiply()
            best = min(best, time.perf_counter() - began)
    return best


def _product(multiply: Any, kind: Any) -> Callable[[], Any]:
    import torch

    one, other = (torch.randint(-9, 9, (GEMM, GEMM)).to(kind) for _ in range(2))
    return lambda: multiply(one, other)


def _onnx_product(threads: int) -> Callable[[], Any]:
    """onnxruntime's MatMulInteger: activations uint8, weights int8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 128, (GEMM, GEMM), dtype=np.uint8), rng.integers(-64, 64, (GEMM, GEMM), dtype=np.int8)
    ends = [helper.make_tensor_value_info(name, kind, [GEMM, GEMM]) for name, kind in (("a", TensorProto.UINT8), ("y", TensorProto.INT32))]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [numpy_helper.from_array(right, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": left})
