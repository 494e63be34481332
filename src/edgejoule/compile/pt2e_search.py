"""Which products of a network that PT2E quantised run in int8: all, or where that loses more than the budget, all but the worst.

The quantised graph itself is run in torch on held-out images, product by product switched back to what it was: its input before
quantisation and its float weights (``quantize.budget`` says which). torch computes with the quantiser's values in float32: a runtime
that scales by row is closer to float than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edgejoule.compile.quantize.budget import keep_budget
from edgejoule.compile.quantize.observe import batches
from edgejoule.compile.quantize.options import Chosen
from edgejoule.compile.quantize.score import Judge
from edgejoule.seams import Held

PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
INPUT, WEIGHTS = 0, 1
FLOAT = "edgejoule_float_"  # before a number: a product's own weights


def float_weights(prepared: Any) -> Mapping[str, torch.Tensor]:
    """Product -> its weights, read before ``convert_pt2e`` rounds them. ``prepared`` holds observers between weights and product."""
    found = {}
    for node in prepared.graph.nodes:
        source = node.args[WEIGHTS] if node.target in PRODUCTS else None
        while source is not None and source.op == "call_module":
            source = source.args[0]
        if source is not None and source.op == "get_attr":
            found[node.name] = _attribute(prepared, source.target).detach().clone()
    return found


def choose(
    module: Any, weights: Mapping[str, torch.Tensor], held: Held, batch: int, max_drop_pct: float, quantizer: str
) -> tuple[Any, Chosen]:
    """``module`` (converted) with what hurts put back to float, in place, and what was chosen. ``batch``: images a run takes."""
    switched = Switched(module, weights)
    judge = Judge(frozenset(switched.products), held, batch, max_drop_pct, switched.logits_of)
    ranges = "of every inference" if quantizer == "xnnpack" else "histogram"
    kept, chosen = keep_budget(list(switched.products), judge, lambda kept: kept, quantizer, ranges, switched.others)
    switched.settle(kept)
    return module, chosen


def notes(chosen: Chosen) -> Mapping[str, str]:
    """For ``CompileContext.note``: what -> chosen, in words."""
    return {**chosen.notes(), "held-out search": f"graphs run: {chosen.sessions}, on {chosen.held} images"}


def unquantize_others(module: Any) -> Any:
    """Only products read 8-bit tensors: the quantiser for x86 also takes factors, and what is added to a convolution. In place."""
    for node in module.graph.nodes:
        if node.target in PRODUCTS or "quantize" in str(node.target):
            continue
        for source in node.all_input_nodes:
            if _is_dequantized(source) and "quantize" in str(source.args[0].target):
                node.replace_input_with(source, source.args[0].args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class Switched:
    """A converted graph whose quantised products can be switched to float. ``others``: products that the quantiser left in float."""

    def __init__(self, module: Any, weights: Mapping[str, torch.Tensor]) -> None:
        self._module = module
        self._int8: dict[Any, tuple[Any, ...]] = {}
        self._float: dict[Any, tuple[Any, ...]] = {}
        self.others = 0
        for place, node in enumerate([node for node in module.graph.nodes if node.target in PRODUCTS]):
            if not (_is_dequantized(node.args[INPUT]) and _is_dequantized(node.args[WEIGHTS]) and node.name in weights):
                self.others += 1
                continue
            module.register_buffer(f"{FLOAT}{place}", weights[node.name], persistent=True)
            with module.graph.inserting_before(node):
                plain = module.graph.get_attr(f"{FLOAT}{place}")
                source = _unquantised(node.args[INPUT])
            self._int8[node] = node.args
            self._float[node] = (source, plain, *node.args[WEIGHTS + 1 :])
        self.products = {node.name: node for node in self._int8}

    def logits_of(self, kept: frozenset[str], images: Any, batch: int, exact: bool = False) -> Any:
        """(M, K) logits of images (M, C, H, W), where the ``kept`` products are in float. ``exact`` changes nothing here."""
        self._switch(kept)
        with torch.no_grad():
            found = [self._module(torch.from_numpy(np.ascontiguousarray(part))).numpy() for part in batches(images, batch)]
        return np.concatenate(found)[: len(images)]

    def settle(self, kept: frozenset[str]) -> None:
        """Leaves the graph so, without what nothing reads."""
        self._switch(kept)
        graph = self._module.graph
        graph.eliminate_dead_code()
        read = {node.target for node in graph.nodes if node.op == "get_attr"}
        for name in [name for name, _ in self._module.named_buffers(recurse=False) if name.startswith(FLOAT) and name not in read]:
            delattr(self._module, name)
        self._module.recompile()

    def _switch(self, kept: frozenset[str]) -> None:
        for node, args in self._int8.items():
            node.args = self._float[node] if node.name in kept else args
        self._module.recompile()


def _unquantised(node: Any) -> Any:
    """What was quantised; of a constant, of which its 8-bit values alone are left, those dequantised."""
    while _is_dequantized(node) and node.args[0].op == "call_function":
        node = node.args[0].args[0]
    return node


def _is_dequantized(node: Any) -> bool:
    return "dequantize" in str(getattr(node, "target", ""))


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
