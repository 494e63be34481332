"""Which layers of a network train for int8, and which stay in float: read off the graph that ``torch.export`` gives, not from names.

Linear layers and convolutions do, but for what takes the images (stem, patch embedding), what gives the logits (head), convolutions
whose values reach a denominator or a root unrounded (linear attention), and layers whose weights another module reads. Residual
sums, norms, softmax, GELU and products of activations stay in float. Knows no ranges; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from edgejoule.errors import ModelError

_aten = torch.ops.aten
_PRODUCTS = (_aten.linear.default, _aten.conv1d.default, _aten.conv2d.default, _aten.conv2d.padding, _aten.conv3d.default)
_RECTIFIERS = (_aten.relu.default, _aten.relu_.default)
_CLAMPS = (_aten.hardtanh.default, _aten.hardtanh_.default, _aten.clamp.default, _aten.clamp_.default)
# what these give has been brought to one scale
_CLOSING = (_aten.layer_norm.default, _aten.group_norm.default, _aten.rms_norm.default, _aten.softmax.int, _aten.sigmoid.default)
_DELICATE = (
    *(_aten.reciprocal.default, _aten.sqrt.default, _aten.rsqrt.default, _aten.exp.default, _aten.log.default),
    *(_aten.pow.Tensor_Scalar, _aten.linalg_vector_norm.default),
)
_DIVISIONS = (_aten.div.Tensor, _aten.div_.Tensor)
STEM, HEAD, DELICATE, FOREIGN = "takes the images", "gives the logits", "reaches a denominator or a root", "is of another kind"


@dataclass
class Found:
    """Paths of layers, in the graph's order. ``convolutions``: is the output rectified, and nothing else made of it?"""

    linears: list[str] = field(default_factory=list)
    convolutions: dict[str, bool] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # why it stays in float

    def within(self, places: tuple[str, ...]) -> Found:
        """Those that stand at one of the paths or below it; all where none is named."""

        def there(path: str) -> bool:
            return not places or any(path == place or path.startswith(f"{place}.") for place in places)

        kept = {path: rectified for path, rectified in self.convolutions.items() if there(path)}
        away = {path: "is not among the layers named" for path in (*self.linears, *self.convolutions) if not there(path)}
        return Found([path for path in self.linears if there(path)], kept, {**self.left, **away})


def find_layers(module: nn.Module, images: Tensor, called: str) -> Found:
    """``images`` (B, C, H, W) of the network's size. Raises ModelError where torch.export refuses it; ``called`` is its name there."""
    with torch.no_grad():
        try:
            program = torch.export.export(module, (images,), strict=False)
        except Exception as error:  # the exporter raises whatever its many parts raise
            line = (str(error).splitlines() or [""])[0][:200]
            raise ModelError(f"torch.export refuses {called} ({line}): its forward must not depend on the values of tensors") from error
    names: Mapping[str, str] = program.graph_signature.inputs_to_parameters
    products: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        weight = names.get(node.args[1].name, "") if node.target in _PRODUCTS and isinstance(node.args[1], Node) else ""
        if weight:
            products.setdefault(weight.rpartition(".")[0], []).append(node)
    weighted = {node for nodes in products.values() for node in nodes}
    images_in = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    first, last = _nearest(images_in, weighted, ahead=True), _nearest(_output(program).all_input_nodes, weighted, ahead=False)
    found = Found()
    for path, nodes in products.items():
        layer = module.get_submodule(path)
        why = STEM if first & set(nodes) else HEAD if last & set(nodes) else _hindrance(layer, path, nodes, weighted)
        if why is not None:
            found.left[path] = why
        elif isinstance(layer, nn.Linear):
            found.linears.append(path)
        else:
            found.convolutions[path] = len(nodes) == 1 and _rectified(nodes[0])
    return found


def _hindrance(layer: nn.Module, path: str, nodes: list[Node], weighted: set[Node]) -> str | None:
    own = all(_path_of(node) == path for node in nodes)
    if type(layer) is nn.Conv2d:
        if not own or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            return FOREIGN
        return DELICATE if _reaches_delicate(nodes, weighted) else None
    return None if own and isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward else FOREIGN


def _path_of(node: Node) -> str:
    """The module in whose own forward a node is computed."""
    stack: Any = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0]).partition("@")[0]  # "norm@1" is its second call


def _output(program: Any) -> Node:
    found: Node = next(node for node in program.graph.nodes if node.op == "output")
    return found


def _nearest(start: Iterable[Node], weighted: set[Node], ahead: bool) -> set[Node]:
    """The products that are met first on the ways from some nodes, forwards or backwards."""
    pending, seen, found = list(start), set(start), set()
    while pending:
        node = pending.pop()
        if node in weighted and (not ahead or node not in start):
            found.add(node)
            continue
        for other in node.users if ahead else node.all_input_nodes:
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return found


def _rectified(node: Node) -> bool:
    """Whether a ReLU, or a clipping that begins at zero, alone reads what a node gives."""
    if len(node.users) != 1:
        return False
    reader = next(iter(node.users))
    return reader.target in _RECTIFIERS or (reader.target in _CLAMPS and bool(reader.args[1:2] in ((0,), (0.0,))))


def _reaches_delicate(nodes: Iterable[Node], weighted: set[Node]) -> bool:
    """Whether a way leads to a denominator or a root, not through a product with weights, a norm or a softmax."""
    pending, seen = list(nodes), set(nodes)
    while pending:
        node = pending.pop()
        for reader in node.users:
            if reader in seen or reader in weighted or reader.target in _CLOSING:
                continue
            if any(map(_is_delicate, _within(reader))):
                return True
            seen.add(reader)
            pending.append(reader)
    return False


def _is_delicate(node: Node) -> bool:
    return node.target in _DELICATE or (node.target in _DIVISIONS and isinstance(node.args[1], Node))


def _within(node: Node) -> list[Node]:
    """The node itself; of a part with a graph of its own (what a network computes without autocast), the nodes of that."""
    graphs = [source for source in node.all_input_nodes if source.op == "get_attr" and isinstance(node.target, HigherOrderOperator)]
    parts = [getattr(node.graph.owning_module, str(source.target), None) for source in graphs]
    return [node, *(each for part in parts if isinstance(part, GraphModule) for each in part.graph.nodes)]
