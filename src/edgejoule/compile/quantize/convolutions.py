"""What is quantised behind a convolution, for runtimes that compute it in int8 only then (onnxruntime on processors).

A rectifier that follows is part of the quantiser: its output is what is rounded. A convolution whose values reach a division or a
product of activations unrounded (linear attention's denominators) stays float altogether. Knows no ranges.
"""

from __future__ import annotations

from edgejoule.compile.quantize.graph import Graph

DELICATE = frozenset({"MatMul", "Gemm", "Einsum", "Div", "Reciprocal", "Softmax", "Sqrt", "Pow", "Exp", "Log"})
CLOSING = frozenset({"LayerNormalization"})  # the way ends here: what follows has been brought to one scale


def given_by_convolutions(graph: Graph) -> tuple[dict[str, str], frozenset[str]]:
    """({convolution: tensor to quantise behind it}, convolutions that stay float)."""
    given, delicate = {}, set()
    for product in graph.products:
        if product.op != "Conv":
            continue
        if _reaches_delicate(graph, product.output) or product.output in graph.outputs:
            delicate.add(product.name)
        else:
            given[product.name] = _behind_rectifier(graph, product.output)
    return given, frozenset(delicate)


def _behind_rectifier(graph: Graph, tensor: str) -> str:
    readers = graph.consumers[tensor]
    if len(readers) == 1 and readers[0].output[0] not in graph.outputs and _rectifies(graph, readers[0]):
        return str(readers[0].output[0])
    return tensor


def _rectifies(graph: Graph, node: object) -> bool:
    if node.op_type == "Relu":  # type: ignore[attr-defined]
        return True
    if node.op_type != "Clip" or len(node.input) < 2:  # type: ignore[attr-defined]
        return False
    low = node.input[1]  # type: ignore[attr-defined]
    return graph.constant(low) and float(graph.array(low)) == 0.0


def _reaches_delicate(graph: Graph, tensor: str) -> bool:
    """Whether a way leads to a delicate operator, not through a weighted product or a norm."""
    pending, seen = [tensor], {tensor}
    while pending:
        for node in graph.consumers[pending.pop()]:
            if node.name in graph.product_of or node.op_type in CLOSING:
                continue
            if node.op_type in DELICATE:
                return True
            fresh = [output for output in node.output if output not in seen]
            seen.update(fresh)
            pending += fresh
    return False
