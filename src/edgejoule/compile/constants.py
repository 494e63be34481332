"""What of an exported network depends on no image is computed once: resampled position embeddings, those made of sines and cosines, and
what layers make of a table of the network's own. Exact. Knows no runtime."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.constant_folding import constant_fold, replace_node_with_constant


def compute_constants(module: Any) -> Any:
    """Replaces by its value what depends on no image, in place; the torch.fx.GraphModule.

    torch's folding starts at weights; what starts at ``arange`` or ``zeros`` does too once these are constants. Not where an operator
    writes into one of them, nor what is drawn at random.
    """
    fixed: set[Any] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    if fixed & {looked_into(node.args[0]) for node in module.graph.nodes if writes(node)}:
        return module
    for node in fixed:
        made = node.op == "call_function" and not node.all_input_nodes and isinstance(node.meta.get("val"), torch.Tensor)
        if made and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            replace_node_with_constant(module, node, node.target(*node.args, **node.kwargs))
    constant_fold(module)
    return module


def writes(node: Any) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable


def looked_into(node: Any) -> Any:
    """What a view shows, through views of views; what is no view, itself."""
    while node.op == "call_function" and (node.target is operator.getitem or _is_view(node.target)):
        node = node.args[0]
    return node


def _is_view(target: Any) -> bool:
    returns: Any = target._schema.returns if hasattr(target, "_schema") else ()
    return bool(returns) and returns[0].alias_info is not None
