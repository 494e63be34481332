"""Rewrites an exported network so that no tensor has more than four dimensions, losslessly, for runtimes that know no fifth.

Attention heads and windows are cut by view, permute, unbind of five or six dimensions. A view of that many is never made: the tensor
keeps the shape that it had, and the one that the network sees is remembered. A permutation of it moves one block of neighbouring
dimensions past another, and that needs four: (before, A, B, after); a part of it (unbind, select, chunk) is a slice of three. A slice with
a step becomes a view and a slice. Everything else stays as it was, so what the runtime's converter recognises it still recognises.
A BatchNorm behind a linear layer (LeViT's, over flattened tokens) goes into that layer's weights: pnnx loses track of the batch there.
What stays in more than four dimensions (einsum, 3-D convolution) is left for the converter to refuse by name. Knows no runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
MOST = 4  # dimensions, the batch counted
NOTHING = frozenset({"aten.alias", "aten.clone", "aten.contiguous", "aten.dropout", "aten.detach", "aten.detach_", "aten.lift_fresh_copy"})
VIEWS = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.unsqueeze", "aten.squeeze", "aten.flatten", "aten.unflatten"})
LIKE = ("aten.reshape_as", "aten.view_as")  # views as well
BY_ELEMENT = frozenset(
    f"aten.{name}" for name in ("add", "sub", "mul", "div", "relu", "gelu", "silu", "sigmoid", "hardswish", "exp", "tanh", "neg", "rsqrt")
)
ATTENTION = "aten.scaled_dot_product_attention"
PERMUTES = ("aten.permute", "aten.transpose")
PARTS = ("aten.unbind", "aten.chunk", "aten.split", "aten.split_with_sizes")


def rank4(program: Any) -> Any:
    """The module of an ExportedProgram of one input and one output, computing the same in tensors of four dimensions at most.

    Returns a torch.fx.GraphModule on the program's own weights; the program is not changed.
    """
    import torch

    module = _without_autocast(program.module(check_guards=False))
    writer = _Writer(module)
    for node in module.graph.nodes:
        writer.write(node)
    rewritten = torch.fx.GraphModule(module, writer.graph)
    rewritten.graph.eliminate_dead_code()
    rewritten.recompile()
    return rewritten.eval()


def _without_autocast(module: Any) -> Any:
    """Regions that a network keeps out of autocast (EfficientViT's attention) become part of the graph: nothing here is cast. In place."""
    import torch

    for region in [node for node in module.graph.nodes if node.target is torch.ops.higher_order.wrap_with_autocast]:
        _device, _dtype, enabled, _cached, body, *inputs = region.args
        if enabled:
            continue  # it would be cast
        graph = getattr(module, body.target).graph
        made = dict(zip((node for node in graph.nodes if node.op == "placeholder"), inputs, strict=True))
        with module.graph.inserting_before(region):
            for node in graph.nodes:
                if node.op not in ("placeholder", "output"):
                    made[node] = module.graph.node_copy(node, made.__getitem__)
        (results,) = graph.output_node().args
        for part in list(region.users):  # operator.getitem(region, place)
            part.replace_all_uses_with(made[results[part.args[1]]])
            module.graph.erase_node(part)
        module.graph.erase_node(region)
        if not body.users:
            module.graph.erase_node(body)
    return module


def swaps(shape: Sequence[int], order: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """A permutation as exchanges of neighbouring blocks: each (P, A, B, Q) means view so, exchange A and B, view back.

    ``order`` is torch.permute's. Dimensions of size 1 take no part, and neighbours that stay neighbours move as one.
    """
    wanted = [axis for axis in order if shape[axis] > 1]
    now = sorted(wanted)
    found = []
    for i in range(len(wanted)):
        j = now.index(wanted[i])
        if i == j:
            continue
        k = j  # now[j:k] moves past now[i:j]
        while k < len(now) and now[k] == wanted[i + k - j]:
            k += 1
        parts = now[:i], now[i:j], now[j:k], now[k:]
        before, first, second, after = (math.prod(shape[axis] for axis in part) for part in parts)
        found.append((before, first, second, after))
        now = parts[0] + parts[2] + parts[1] + parts[3]
    return found


class _Writer:
    """Writes one graph from another, node by node. A value's shape in the new graph may be another than the network sees."""

    def __init__(self, module: Any) -> None:
        import torch

        self.graph = torch.fx.Graph()
        self._module = module
        self._aten: Any = torch.ops.aten
        self._made: dict[Any, Any] = {}  # old node -> new node, or a list of them
        self._shape: dict[Any, Shape] = {}  # new node -> its own shape

    def write(self, node: Any) -> None:
        if node.op == "output":
            (result,) = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            self.graph.output(self._plain(result))
        elif node.op == "get_attr":
            self._keep(node, self.graph.node_copy(node), tuple(_attribute(self._module, node.target).shape))
        elif node.op == "placeholder":
            self._keep(node, self.graph.node_copy(node), _shape(node))
        elif node.op == "call_function" and _name(node) == "getitem" and isinstance(self._made[node.args[0]], list):
            self._made[node] = self._made[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            self._call(node, _name(node))
        elif node.op != "call_module":  # a guard of the exporter's, which has no result
            raise ValueError(f"an exported graph holds {node.op}")

    def _call(self, node: Any, name: str) -> None:
        rank = max((len(shape) for shape in _shapes(node)), default=0)
        if name in NOTHING or (name in VIEWS and rank > MOST):
            self._made[node] = self._made[node.args[0]]
        elif name in LIKE or (name in VIEWS and self._is_viewed(node.args[0])):
            self._made[node] = self._view(self._made[node.args[0]], _shape(node))
        elif name in PERMUTES and rank > MOST:
            self._made[node] = self._permuted(node, name)
        elif name in PARTS and rank > MOST:
            sizes = [shape[_axis(node)] for shape in _outputs(node)] if name != "aten.unbind" else [1] * len(_outputs(node))
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self._made[node] = [self._part(node, start, size) for start, size in zip(starts, sizes, strict=True)]
        elif name == "aten.select" and rank > MOST:
            self._made[node] = self._part(node, node.args[2] % _shape(node.args[0])[_axis(node)], 1)
        elif name == "aten.slice":
            self._slice(node, rank)
        elif name in BY_ELEMENT and rank > MOST:
            self._by_element(node)
        elif name == "aten.batch_norm" and (linear := _linear_before(node)) is not None:
            self._fold(node, linear)
        else:
            self._as_it_is(node)

    # ------------------------------------------------------------ the pieces

    def _keep(self, node: Any, new: Any, shape: Shape) -> None:
        self._made[node], self._shape[new] = new, shape

    def _emit(self, target: Any, shape: Shape, *args: Any) -> Any:
        new = self.graph.call_function(target, args)
        self._shape[new] = shape
        return new

    def _view(self, new: Any, shape: Shape) -> Any:
        return new if self._shape[new] == shape else self._emit(self._aten.reshape.default, shape, new, list(shape))

    def _is_viewed(self, node: Any) -> bool:
        """Whether the new graph holds it in another shape than the network sees."""
        return self._shape[self._made[node]] != _shape(node)

    def _plain(self, node: Any) -> Any:
        """The new node in the shape that the network sees."""
        new = self._made[node]
        return new if isinstance(new, list) or not _has_shape(node) else self._view(new, _shape(node))

    def _as_it_is(self, node: Any) -> None:
        import torch

        args, kwargs = (torch.fx.node.map_arg(some, self._plain) for some in (node.args, node.kwargs))
        new: Any = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        self._made[node] = new
        if _has_shape(node):
            self._shape[new] = _shape(node)

    def _permuted(self, node: Any, name: str) -> Any:
        shape = _shape(node.args[0])
        order = list(range(len(shape)))
        if name == "aten.permute":
            order = [axis % len(shape) for axis in node.args[1]]
        else:
            one, other = (axis % len(shape) for axis in node.args[1:3])
            order[one], order[other] = other, one
        new = self._made[node.args[0]]
        for before, first, second, after in swaps(shape, order):
            new = self._exchanged(new, before, first, second, after)
        return new

    def _fold(self, node: Any, linear: Any) -> None:
        """BatchNorm(linear(x)) as one linear layer: y (γ/σ) + β - μ γ/σ, with σ² = variance + ε (Ioffe and Szegedy 2015, algorithm 2)."""

        def value(of: Any) -> Any:
            return None if of is None else _attribute(self._module, of.target).detach().double()

        gamma, beta, mean, variance = (value(of) for of in node.args[1:5])
        weight, bias = value(linear.args[1]), value(linear.args[2]) if len(linear.args) > 2 else None
        scale = (variance + node.args[7]).rsqrt() * (1.0 if gamma is None else gamma)  # (K,)
        offset = ((0.0 if bias is None else bias) - mean) * scale + (0.0 if beta is None else beta)  # (K,)
        folded = []
        for name, tensor in (("weight", weight * scale[:, None]), ("bias", offset)):
            path = f"folded_{node.name}_{name}"
            self._module.register_buffer(path, tensor.to(_attribute(self._module, linear.args[1].target).dtype))
            folded.append(self.graph.get_attr(path))
        self._made[node] = self._emit(self._aten.linear.default, _shape(linear), self._plain(linear.args[0]), *folded)

    def _exchanged(self, new: Any, before: int, first: int, second: int, after: int) -> Any:
        if before > 1 and after > 1:
            view, order = (before, first, second, after), [0, 2, 1, 3]
        elif after > 1:
            view, order = (1, first, second, after), [0, 2, 1, 3]
        else:
            view, order = (1, before, first, second), [0, 1, 3, 2]
        return self._emit(self._aten.permute.default, tuple(view[axis] for axis in order), self._view(new, view), order)

    def _part(self, node: Any, start: int, size: int) -> Any:
        """``size`` of an axis' entries from ``start``; the axis as a part of the second of three dimensions, or of the third."""
        shape, axis, new = _shape(node.args[0]), _axis(node), self._made[node.args[0]]
        before, length, after = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        own = self._shape[new]
        view: Shape
        if before > 1:
            view, dim, unit = (1, before, length * after), 2, after
        elif len(own) > 1 and own[0] == 1 and own[1] % length == 0:  # as it lies: entries of the axis are whole channels
            view, dim, unit = own, 1, own[1] // length
        else:
            view, dim, unit = (1, length, after), 1, 1
        cut = (*view[:dim], size * unit, *view[dim + 1 :])
        return self._emit(self._aten.slice.Tensor, cut, self._view(new, view), dim, start * unit, (start + size) * unit)

    def _slice(self, node: Any, rank: int) -> None:
        shape, axis = _shape(node.args[0]), _axis(node)
        step = node.args[4] if len(node.args) > 4 else 1
        start, count = _start(node, shape[axis]), _shape(node)[axis]
        if count == shape[axis] and step == 1:
            self._made[node] = self._made[node.args[0]]
        elif step > 1 and count > 0:
            self._made[node] = self._stepped(node, start, step, count)
        elif rank > MOST:
            self._made[node] = self._part(node, start, count)
        else:
            self._as_it_is(node)

    def _stepped(self, node: Any, start: int, step: int, count: int) -> Any:
        """Every ``step``-th entry: the first of each group of ``step``, and apart from them the last where its group is not whole."""
        shape, axis = _shape(node.args[0]), _axis(node)
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        whole = count if start + count * step <= shape[axis] else count - 1
        flat = self._view(self._made[node.args[0]], (1, before, shape[axis] * after))
        parts = []
        if whole:
            groups = self._cut(flat, 2, start * after, (start + whole * step) * after)
            firsts = self._cut(self._view(groups, (1, before, whole, step * after)), 3, 0, after)
            parts.append(self._view(firsts, (1, before, whole * after)))
        if whole < count:
            last = (start + whole * step) * after
            parts.append(self._cut(flat, 2, last, last + after))
        if len(parts) == 1:
            return parts[0]
        return self._emit(self._aten.cat.default, (1, before, count * after), parts, 2)

    def _cut(self, new: Any, dim: int, start: int, stop: int) -> Any:
        shape = self._shape[new]
        if (start, stop) == (0, shape[dim]):
            return new
        cut = (*shape[:dim], stop - start, *shape[dim + 1 :])
        return self._emit(self._aten.slice.Tensor, cut, new, dim, start, stop)

    def _by_element(self, node: Any) -> None:
        """An operator on each element, with all tensors viewed in as few dimensions as their broadcasting allows."""
        import torch

        tensors = [arg for arg in node.args if isinstance(arg, torch.fx.Node)]
        merged = _merged([_shape(one) for one in tensors], _shape(node))
        if len(merged[-1]) > MOST:
            self._as_it_is(node)
            return
        views = {one: self._view(self._made[one], shape) for one, shape in zip(tensors, merged, strict=False)}
        args = torch.fx.node.map_arg(node.args, lambda one: views[one])
        new = self.graph.create_node("call_function", node.target, args, dict(node.kwargs))
        self._keep(node, new, merged[-1])


def _merged(shapes: Sequence[Shape], result: Shape) -> list[Shape]:
    """The shapes and the result's, neighbouring axes that broadcast alike made one; a leading 1 where there is room for it."""
    full = [(*(1,) * (len(result) - len(shape)), *shape) for shape in shapes]
    groups: list[list[int]] = []
    seen: list[tuple[bool, ...]] = []
    for axis, size in enumerate(result):
        if size == 1:
            continue
        pattern = tuple(shape[axis] == 1 for shape in full)
        if seen and seen[-1] == pattern:
            groups[-1].append(axis)
        else:
            groups.append([axis])
            seen.append(pattern)
    lead = (1,) * (len(groups) < MOST)
    return [(*lead, *(math.prod(shape[axis] for axis in group) for group in groups)) for shape in (*full, result)]


def _linear_before(node: Any) -> Any:
    """The linear layer whose flattened output a BatchNorm normalises in inference mode; None where something else stands there."""
    features, at = _shape(node)[-1], node.args[0]
    if len(_shape(node)) != 2 or node.args[5]:
        return None
    while at.op == "call_function" and _name(at) in VIEWS and _shape(at)[-1] == features:
        at = at.args[0]
    return at if at.op == "call_function" and _name(at) == "aten.linear" else None


def _name(node: Any) -> str:
    """``aten.view`` of aten.view.default."""
    target: Callable[..., Any] = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet) if packet is not None else target.__name__


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _has_shape(node: Any) -> bool:
    return hasattr(node.meta.get("val"), "shape")


def _shape(node: Any) -> Shape:
    return tuple(int(size) for size in node.meta["val"].shape)


def _outputs(node: Any) -> list[Shape]:
    return [tuple(one.shape) for one in node.meta["val"]]


def _shapes(node: Any) -> list[Shape]:
    import torch

    of: Mapping[Any, Any] = {one: one.meta.get("val") for one in (node, *node.all_input_nodes)}
    return [tuple(value.shape) for value in of.values() if isinstance(value, torch.Tensor)]


def _axis(node: Any) -> int:
    """The axis that unbind, select, slice (second argument), chunk or split (third) work on."""
    place = 2 if _name(node) in PARTS[1:] else 1
    given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(given) % len(_shape(node.args[0]))


def _start(node: Any, length: int) -> int:
    given = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    return int(min(max(given + length if given < 0 else given, 0), length))
