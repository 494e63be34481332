"""What a compiled OpenVINO model executes, by its own runtime graph: operators after fusion, their precision, their device.

The graph names every node's ``layerType``, ``runtimePrecision`` and ``primitiveType``; with PERF_COUNT on and after an inference also
whether it was executed at all (reshapes in place are not). Only the CPU's graph was ever seen here; GPU and NPU write the same keys, by
OpenVINO's documentation. Runs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from edgejoule.records import Placement

NOT_OPERATORS = frozenset({"const", "constant", "input", "output", "parameter", "result"})
PRODUCTS = ("fullyconnected", "convolution")  # FullyConnectedQuantized, GroupConvolution, Deconvolution … contain one of them
SHORT = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8", "fp32": "fp32", "fp16": "fp16"}


def precision(compiled: Any, products: Collection[str]) -> str:
    """The precision that most weighted products run in; of a graph without any, the inference precision in force.

    ``products`` are the names of the weighted products in the file.
    """
    kinds = _precisions(compiled.get_runtime_model().get_ops(), products)
    return kinds.most_common(1)[0][0] if kinds else _stated(compiled)


def placement(compiled: Any, device: str, products: Collection[str]) -> Placement:
    """Of a model compiled with PERF_COUNT that has run once. ``device`` is OpenVINO's name: CPU, GPU, NPU; ``products`` as above."""
    nodes = [node for node in compiled.get_runtime_model().get_ops() if _layer(node) not in NOT_OPERATORS]
    executed = [node for node in nodes if _told(node, "execTimeMcs") != "not_executed"] or nodes
    devices = [str(found) for found in compiled.get_property("EXECUTION_DEVICES")]
    elsewhere = not all(found == device or found.startswith(f"{device}.") for found in devices)
    fallbacks = Counter(_told(node, "layerType") for node in executed if elsewhere or _on_host(node, device))
    return Placement(
        nodes=len(executed),
        delegated=len(executed) - fallbacks.total(),
        fallbacks=dict(fallbacks),
        precisions=dict(_precisions(executed, products)),
    )


def _precisions(nodes: Iterable[Any], products: Collection[str]) -> Counter[str]:
    """Of linear layers and convolutions, those in fused subgraphs included: a small MLP becomes one kernel."""
    found: Counter[str] = Counter()
    for node in nodes:
        if _is_weighted(node):
            found[_precision(node)] += 1
        elif _layer(node) == "subgraph":
            inside = sum(name in products for name in _told(node, "originalLayersNames").split(","))
            quantised = min(inside, _int8_matrices(node)) if _precision(node) == "int8" else 0
            found["int8"] += quantised
            found["fp32" if _precision(node) == "int8" else _precision(node)] += inside - quantised
    return +found


def _is_weighted(node: Any) -> bool:
    """A linear layer or convolution: a product of activations has no constant among its inputs."""
    layer = _layer(node)
    if layer in ("matmul", "gemm"):
        return any(map(_is_constant, _sources(node)))
    return any(word in layer for word in PRODUCTS)


def _int8_matrices(node: Any) -> int:
    return sum(_is_constant(source) and _told(source, "outputPrecisions").lower() in ("i8", "u8") for source in _sources(node))


def _sources(node: Any) -> list[Any]:
    return [node.input_value(place).get_node() for place in range(node.get_input_size())]


def _is_constant(node: Any) -> bool:
    return _layer(node) in ("const", "constant")


def _stated(compiled: Any) -> str:
    found = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    return SHORT.get(found, found)


def _on_host(node: Any, device: str) -> bool:
    """The GPU plugin runs some operators on the processor, and says so in the name of the kernel."""
    return device == "GPU" and "cpu" in _told(node, "primitiveType").lower()


def _precision(node: Any) -> str:
    """The kernel's own word ("brgemm_avx512_f32"); ``runtimePrecision`` would call a product of float32 with float16 weights float16."""
    kernel, found = _told(node, "primitiveType").lower().rpartition("_")[2], _told(node, "runtimePrecision").lower()
    return SHORT.get(kernel) or SHORT.get(found, found)


def _layer(node: Any) -> str:
    return _told(node, "layerType").lower()


def _told(node: Any, key: str) -> str:
    facts = node.get_rt_info()
    return str(facts[key].astype(str)) if key in facts else ""
