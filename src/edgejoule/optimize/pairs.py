"""Which norms and layer scales can be folded into which layers: read off the graph that ``torch.export`` gives, never guessed from names.

A norm is folded backwards where a convolution or linear layer feeds it and nothing else, and forwards where such layers alone read it;
between them may stand whatever commutes with a map of channels: views, transpositions, means over positions, dropout in eval mode.
Every parameter concerned must be used once. Knows no architecture; changes no module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgejoule.optimize.folding import affine_of_norm

_aten = torch.ops.aten
LAYER_SCALES: Mapping[str, str] = {"LayerScale": "gamma", "LayerScale2d": "gamma"}  # timm's class -> its parameter; forward is x * gamma
_LINEAR = (_aten.linear.default,)
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_PADDED_BY_NAME = (_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding)
_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
_SHAPED_LIKE = (_aten.reshape_as.default, _aten.view_as.default)  # the second argument lends its shape only
_VIEWS = (
    *_SHAPED_LIKE,
    *(_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints),
    *(_aten.unflatten.int, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
    *(_aten.contiguous.default, _aten.clone.default, _aten.detach.default, _aten.alias.default),
)


@dataclass(frozen=True, slots=True)
class Fold:
    """One map of channels and the layers that take it in; module names as in ``named_modules``."""

    source: str  # a batch norm or a layer scale
    layers: tuple[str, ...]
    backwards: bool  # into the one layer before it, else into all the layers after it
    is_norm: bool


def find_folds(module: nn.Module, program: torch.export.ExportedProgram) -> tuple[Fold, ...]:
    """What can be folded exactly, in an order in which each step is exact given those before it.

    ``program`` is the module's own export; its graph is rewritten along the way. Only standard layers (torch's, and timm's
    subclasses that keep their meaning) and norms whose removal leaves at most their activation are considered.
    """
    search = _Search(module, program)
    found = []
    for look in (search.backwards, search.forwards):
        for node in list(program.graph.nodes):
            fold = look(node)
            if fold is not None:
                found.append(fold)
                node.replace_all_uses_with(search.maps_of(node)[1])
                program.graph.erase_node(node)
    return tuple(found)


def bare_activation(norm: nn.Module) -> nn.Module | None:
    """What is left of a batch norm that has been folded: nothing (Identity) or its activation; None for an unknown kind of norm."""
    if type(norm).forward is _BatchNorm.forward or isinstance(norm, nn.SyncBatchNorm):
        return nn.Identity()
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):  # timm's BatchNormAct2d: act(drop(batch_norm(x)))
        return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act)
    return None


class _Search:
    """The graph and the names of its parameters."""

    def __init__(self, module: nn.Module, program: torch.export.ExportedProgram) -> None:
        self._module = module
        signature = program.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}  # placeholder -> "stem.conv.weight"

    def maps_of(self, node: Node) -> tuple[str, Node, int, bool, bool]:
        """Of a node that maps channels: (module, its input, the axis of channels, is it a norm, is its shift zero); else KeyError."""
        found = self._norm(node) or self._scale(node)
        if found is None:
            raise KeyError(node.name)
        return found

    def backwards(self, node: Node) -> Fold | None:
        found = self._norm(node) or self._scale(node)
        if found is None:
            return None
        name, before, axis, is_norm, _ = found
        layer = self._layer_before(before, axis)
        return None if layer is None else Fold(name, (layer,), True, is_norm)

    def forwards(self, node: Node) -> Fold | None:
        found = self._norm(node) or self._scale(node)
        if found is None:
            return None
        name, _, axis, is_norm, shiftless = found
        layers = self._layers_after(node, axis, shiftless)
        return Fold(name, layers, False, is_norm) if layers else None

    def _norm(self, node: Node) -> tuple[str, Node, int, bool, bool] | None:
        if node.target != _aten.batch_norm.default or node.args[5] is not False:
            return None
        before, statistics = node.args[0], node.args[3]
        name, field = self._owner(statistics)
        if field != "running_mean" or not self._once(statistics) or not isinstance(before, Node):
            return None
        norm = self._module.get_submodule(name)
        if not isinstance(norm, _BatchNorm) or norm.running_var is None or bare_activation(norm) is None or not self._own(node, norm):
            return None
        return name, before, 1, True, not bool(affine_of_norm(norm).shift.any())

    def _scale(self, node: Node) -> tuple[str, Node, int, bool, bool] | None:
        if node.target not in (_aten.mul.Tensor, _aten.mul_.Tensor):
            return None
        before, gamma = node.args[0], node.args[1]
        root = gamma  # where channels come first, gamma is reshaped to (1, C, 1, 1)
        while isinstance(root, Node) and root.target in _VIEWS and self._once(root):
            root = root.args[0]
        name, field = self._owner(root)
        if not isinstance(before, Node) or not isinstance(gamma, Node) or not self._once(root) or not field:
            return None
        module = self._module.get_submodule(name)
        if LAYER_SCALES.get(type(module).__name__) != field or len(module.state_dict()) != 1 or not self._own(node, module):
            return None
        shape, wide = _shape(gamma), _shape(before)
        axes = [axis + len(wide) - len(shape) for axis, side in enumerate(shape) if side > 1]
        return (name, before, axes[0], False, True) if len(axes) == 1 else None

    def _layer_before(self, node: Node, axis: int) -> str | None:
        while len(_readers(node)) == 1:
            if (layer := self._layer(node)) is not None:
                return layer if axis == _output_axis(node) else None
            source = node.args[0] if node.op == "call_function" and node.args else None
            if not isinstance(source, Node):
                return None
            entry = [a for a in range(len(_shape(source))) if _leaving(node, a) == axis]
            if not entry:
                return None
            node, axis = source, entry[0]
        return None

    def _layers_after(self, node: Node, axis: int, shiftless: bool) -> tuple[str, ...] | None:
        """All the layers that read a value, or None where anything else reads it, or one of them cannot take the map in."""
        found: list[str] = []
        for user in _readers(node):
            if user.op != "call_function" or not user.args or user.args[0] is not node:
                return None
            if (layer := self._layer(user)) is not None:
                if not _takes_affine(user, axis, shiftless):
                    return None
                found.append(layer)
                continue
            after = _leaving(user, axis)
            more = None if after is None else self._layers_after(user, after, shiftless)
            if more is None:
                return None
            found += more
        return tuple(found) or None

    def _layer(self, node: Node) -> str | None:
        """The name of the module that a node computes, if it is a layer whose parameters are its own and used here alone."""
        if node.target not in (*_LINEAR, *_CONVOLUTIONS, *_PADDED_BY_NAME, *_TRANSPOSED) or len(node.args) < 2 or node.kwargs:
            return None
        name, field = self._owner(node.args[1])
        if field != "weight" or not self._once(node.args[1]):
            return None
        layer = self._module.get_submodule(name)
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            return None
        bias = node.args[2] if len(node.args) > 2 else None
        if bias is None:
            return name if layer.bias is None and _reads_bias(layer) and self._own(node, layer) else None
        own = self._owner(bias) == (name, "bias") and self._once(bias)
        return name if own else None

    def _own(self, node: Node, module: nn.Module) -> bool:
        """Whether a module computes a node in its own forward, and no hook listens: elsewhere its replacement would not be read."""
        stack: Any = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0].partition("@")[0]  # "norm@1" is its second call
        return self._module.get_submodule(path) is module and not module._forward_hooks and not module._forward_pre_hooks

    def _owner(self, node: Any) -> tuple[str, str]:
        """("stem.conv", "weight") of a placeholder; ("", "") of anything else."""
        owner, _, field = self._names.get(node.name, "").rpartition(".") if isinstance(node, Node) else ("", "", "")
        return owner, field

    def _once(self, node: Any) -> bool:
        return isinstance(node, Node) and len(node.users) == 1


def _readers(node: Node) -> list[Node]:
    """The users of a value, without those that only want its shape."""
    return [user for user in node.users if user.target not in _SHAPED_LIKE or user.args[0] is node]


def _reads_bias(layer: nn.Module) -> bool:
    """Whether a bias given to a layer that has none would be used: torch's own forward and timm's layers use it."""
    return type(layer).__module__.startswith(("torch.nn.", "timm.layers."))


def _takes_affine(node: Node, axis: int, shiftless: bool) -> bool:
    """Whether ``fold_into_following`` is exact: channels where the layer mixes them, and a border that is no different."""
    shape = _shape(node.args[0])
    if node.target in _LINEAR:
        return axis == len(shape) - 1
    if node.target in _TRANSPOSED or len(shape) != len(_shape(node.args[1])):
        return False
    padding = node.args[4] if len(node.args) > 4 else 0
    if isinstance(padding, str):
        unpadded = padding == "valid" or set(_shape(node.args[1])[2:]) == {1}
    else:
        unpadded = not any(padding if isinstance(padding, (list, tuple)) else (padding,))
    return axis == 1 and (unpadded or shiftless)


def _output_axis(node: Node) -> int:
    """Where a layer puts its channels; -1 for a convolution of a single image without a batch axis."""
    rank = len(_shape(node))
    if node.target in _LINEAR:
        return rank - 1
    return 1 if rank == len(_shape(node.args[1])) else -1


def _leaving(node: Node, axis: int) -> int | None:
    """The axis of channels of a node's value, given that of its first argument; None where it does not commute with maps of channels."""
    rule = _COMMUTING.get(node.target)
    return None if rule is None or not isinstance(node.args[0], Node) else rule(node, axis)


def _through_view(node: Node, axis: int) -> int | None:
    """The axis must survive whole: as many elements before it as there were."""
    before, after = _shape(node.args[0]), _shape(node)
    if before[axis] == 1:
        return None  # one channel could be any of the axes of one
    fitting = (a for a, side in enumerate(after) if side == before[axis] and math.prod(after[:a]) == math.prod(before[:axis]))
    return next(fitting, None)


def _through_permute(node: Node, axis: int) -> int | None:
    rank = len(_shape(node))
    order: Any = node.args[1]
    return [place % rank for place in order].index(axis)


def _through_transpose(node: Node, axis: int) -> int | None:
    rank = len(_shape(node))
    first, second = (int(place) % rank for place in node.args[1:3])  # type: ignore[arg-type]
    return {first: second, second: first}.get(axis, axis)


def _through_mean(node: Node, axis: int) -> int | None:
    rank = len(_shape(node.args[0]))
    places: Any = node.args[1]
    gone = {place % rank for place in ([places] if isinstance(places, int) else places or range(rank))}
    if axis in gone:
        return None
    kept = len(node.args) > 2 and bool(node.args[2])
    return axis if kept else axis - sum(place < axis for place in gone)


def _through_pool(node: Node, axis: int) -> int | None:
    """Adaptive average pooling: means over the last axes."""
    spatial = len(_shape(node)) - 2
    return axis if spatial > 0 and axis == 1 else None


def _through_dropout(node: Node, axis: int) -> int | None:
    return axis if node.args[2] is False else None


def _through_pick(node: Node, axis: int) -> int | None:
    """One index, or a slice, of another axis than the channels'."""
    rank = len(_shape(node.args[0]))
    place = int(node.args[1]) % rank if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if place == axis:
        return None
    return axis - (node.target == _aten.select.int and place < axis)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(int(side) for side in value.shape) if isinstance(value, Tensor) else ()


_COMMUTING: Mapping[Any, Callable[[Node, int], int | None]] = {
    **dict.fromkeys(_VIEWS, _through_view),
    _aten.permute.default: _through_permute,
    _aten.transpose.int: _through_transpose,
    _aten.mean.dim: _through_mean,
    _aten.adaptive_avg_pool1d.default: _through_pool,
    _aten.adaptive_avg_pool2d.default: _through_pool,
    _aten.adaptive_avg_pool3d.default: _through_pool,
    _aten.dropout.default: _through_dropout,
    _aten.feature_dropout.default: _through_dropout,
    _aten.slice.Tensor: _through_pick,
    _aten.select.int: _through_pick,
}
