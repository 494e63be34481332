"""How much each product costs when it alone is quantised: one float graph with a switch for every product.

The switched graph computes with the quantiser's values in float32 (fake quantisation), so that one session answers for all products;
no candidate file is written. Errors of single products add up in squares while they are small, which is what the ranking assumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.quantize.graph import Array, Graph, Product
from edgejoule.compile.quantize.observe import session_options
from edgejoule.compile.quantize.qdq import Plan
from edgejoule.compile.quantize.ranges import weight_scale
from edgejoule.compile.quantize.score import relative_error

IMAGES = 8  # held-out images that the ranking looks at


def rank(graph: Graph, plan: Plan, names: Collection[str], images: Any, batch: int, folder: Path) -> list[tuple[str, float]]:
    """[(product, relative error of the logits when it alone is quantised)], the worst first; ties in the graph's order."""
    products = [product for product in graph.products if product.name in names]
    run = _switched(graph, plan, products, folder)
    parts = [np.ascontiguousarray(images[np.arange(i, i + batch) % len(images)]) for i in range(0, min(IMAGES, len(images)), batch)]
    off = np.zeros(len(products), dtype=bool)
    wanted = np.concatenate([run(part, off) for part in parts])
    found = []
    for place, product in enumerate(products):
        on = off.copy()
        on[place] = True
        found.append((product.name, relative_error(np.concatenate([run(part, on) for part in parts]), wanted)))
    return sorted(found, key=lambda pair: -pair[1])


def _switched(graph: Graph, plan: Plan, products: list[Product], folder: Path) -> Callable[[Any, Array], Array]:
    """(images, switches (P,)) -> logits."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    edited = graph.copy()
    nodes = {node.name: node for node in edited.model.graph.node}
    for place, product in enumerate(products):
        node, scale, switch = nodes[product.name], plan.scales[product.source], f"switch_{place}"
        edited.model.graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, []))
        weight = edited.array(product.weight)
        most, shape = 2 ** (plan.weight_bits - 1) - 1, [1] * weight.ndim
        shape[product.out_axis] = -1
        steps = weight_scale(weight, product.out_axis, plan.weight_bits, plan.clip_weights).reshape(shape)
        edited.set_array(f"{switch}_weight", (np.clip(np.rint(weight / steps), -most, most) * steps).astype(np.float32))
        edited.set_array(f"{switch}_scale", np.array(scale.scale, dtype=np.float32))
        edited.set_array(f"{switch}_zero", np.array(scale.zero_point, dtype=scale.dtype))
        added = [
            helper.make_node("QuantizeLinear", [product.source, f"{switch}_scale", f"{switch}_zero"], [f"{switch}_q"]),
            helper.make_node("DequantizeLinear", [f"{switch}_q", f"{switch}_scale", f"{switch}_zero"], [f"{switch}_dq"]),
            helper.make_node("Where", [switch, f"{switch}_dq", product.source], [f"{switch}_x"]),
            helper.make_node("Where", [switch, f"{switch}_weight", product.weight], [f"{switch}_w"]),
        ]
        node.input[0], node.input[1] = f"{switch}_x", f"{switch}_w"
        at = next(n for n, other in enumerate(edited.model.graph.node) if other.name == product.name)
        for one in reversed(added):
            edited.model.graph.node.insert(at, one)
    path = folder / "switched.onnx"
    onnx.save(edited.model, path)
    options = session_options(onnxruntime)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return lambda images, on: session.run(None, {entry: images, **{f"switch_{n}": np.array(x) for n, x in enumerate(on)}})[0]
