"""Structured surgery: units (a head, a hidden neuron) that can leave a network without a trace, and how they are taken out or silenced.

A ``Group`` is all units of one block; a ``Cut`` says which slices of one tensor belong to each unit. Taking units out must give what the
network computes with their readers set to zero: that is what a family's adapter promises and what the tests compare. Pure tensor surgery:
knows no architecture (``heads.py`` and ``neurons.py`` do), no importance and no data. Changes the modules that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgejoule.errors import ModelError

STATISTICS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Cut:
    """Along ``axis`` of a tensor, unit u owns the places ``index[u]``. The layer's path is seen from the group's module ("" is itself).

    Where each unit has layers to itself, ``owner`` is the one unit whose layer this is: ``index`` has one row, and ``remove`` leaves
    the tensor to the group's ``settle``, which drops the whole layer.
    """

    layer: str
    tensor: str
    axis: int
    index: Tensor  # (U, n) int64; (1, n) with an owner
    owner: int | None = None

    def places(self, units: Sequence[int]) -> Tensor:
        """(m,) all that some units own."""
        if self.owner is None:
            return self.index[list(units)].flatten()
        return self.index[0] if self.owner in units else self.index[0, :0]


@dataclass(frozen=True, eq=False)
class Group:
    """The units of one block. ``readers`` are the cuts, some of ``cuts``, that let a unit be seen outside: zeros there silence it.

    ``settle(module, kept)`` sets the block's own numbers (num_heads, …) once units are out; it may return another module to stand in
    its place. ``kept`` are the units that stay, ascending.
    """

    name: str  # of the block's module in its network
    kind: Literal["heads", "neurons"]
    units: int
    cuts: tuple[Cut, ...]
    readers: tuple[Cut, ...]
    settle: Callable[[nn.Module, Sequence[int]], nn.Module | None] = field(default=lambda module, kept: None)


def blocks_of(units: int, width: int, start: int = 0, stride: int | None = None) -> Tensor:
    """(U, width): unit u owns ``width`` places from ``start + u * stride`` on (stride: the width itself, where it is left out)."""
    step = width if stride is None else stride
    return start + torch.arange(units).reshape(-1, 1) * step + torch.arange(width).reshape(1, -1)


def layers_within(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers with weights below a module or the module itself: linear, convolution, norm; in their order."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, _ConvNd, _BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            yield name, part


def writes(root: nn.Module, path: str, index: Tensor, owner: int | None = None) -> tuple[Cut, ...]:
    """The cuts of what gives the units: output channels of the one layer at ``path`` (or in the container there), and of its norms."""
    layers = layers_within(_at(root, path))
    return tuple(Cut(_join(path, name), tensor, 0, index, owner) for name, part in layers for tensor in _tensors(part))


def reads(root: nn.Module, path: str, index: Tensor) -> tuple[Cut, ...]:
    """The cut of what takes the units in: input channels of the one linear layer or ungrouped convolution at ``path``."""
    found = [name for name, part in layers_within(_at(root, path)) if isinstance(part, (nn.Linear, _ConvNd))]
    if len(found) != 1:
        raise ModelError(f"{path or 'the block'} holds {len(found)} layers, and one takes its input: it has no adapter for pruning")
    return (Cut(_join(path, found[0]), "weight", 1, index),)


def silence(root: nn.Module, group: Group, dropped: Sequence[int]) -> None:
    """Sets the readers of some units to zero, in place: the network as if the units were out, at its old shapes."""
    with torch.no_grad():
        for cut in group.readers:
            values = _at(_at(root, group.name), cut.layer).get_parameter(cut.tensor)
            values.index_fill_(cut.axis, cut.places(dropped).to(values.device), 0.0)


def remove(root: nn.Module, group: Group, dropped: Sequence[int]) -> None:
    """Takes some units out, in place. Raises ModelError where none would stay."""
    out = set(dropped)
    kept = [unit for unit in range(group.units) if unit not in out]
    if not kept:
        raise ModelError(f"all {group.units} {group.kind} of {group.name} would go: prune less")
    if len(kept) == group.units:
        return
    block = _at(root, group.name)
    places: dict[tuple[str, str, int], list[Tensor]] = {}
    for cut in group.cuts:
        if cut.owner is None:
            places.setdefault((cut.layer, cut.tensor, cut.axis), []).append(cut.places(sorted(out)))
    for (layer, tensor, axis), owned in places.items():
        part = _at(block, layer)
        _keep(part, tensor, axis, torch.cat(owned))
        _resize(part)
    replacement = group.settle(block, kept)
    if replacement is not None:
        parent, _, name = group.name.rpartition(".")
        setattr(_at(root, parent), name, replacement)


def parameters_of(root: nn.Module, group: Group) -> int:
    """How many parameters one unit of a group owns; the mean, rounded down, where units differ (kernels of a cascade's heads)."""
    block = _at(root, group.name)
    total = 0
    for cut in group.cuts:
        values = getattr(_at(block, cut.layer), cut.tensor)
        if isinstance(values, nn.Parameter):
            total += cut.index.numel() * values.numel() // values.shape[cut.axis]
    return total // group.units


def sums(root: nn.Module, group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """(U,) the sum over a unit's parameters of ``values``, which hold a tensor for each of the root's parameters by name."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for cut in group.cuts:
        name = _join(_join(group.name, cut.layer), cut.tensor)
        if name not in values:
            continue  # running statistics are no parameters
        taken = values[name].detach().double().cpu().movedim(cut.axis, 0)[cut.index].flatten(1).sum(1)  # (U,), or (1,) with an owner
        if cut.owner is None:
            total += taken
        else:
            total[cut.owner] += taken[0]
    return total


def _keep(part: nn.Module, tensor: str, axis: int, dropped: Tensor) -> None:
    """The tensor without the dropped places; other cuts of the same tensor and axis were put together before."""
    old = getattr(part, tensor)
    stays = torch.ones(old.shape[axis], dtype=torch.bool)
    stays[dropped] = False
    values = old.detach().index_select(axis, torch.nonzero(stays).flatten().to(old.device)).clone()
    if isinstance(old, nn.Parameter):
        setattr(part, tensor, nn.Parameter(values, requires_grad=old.requires_grad))
    else:
        part.register_buffer(tensor, values, persistent=tensor not in part._non_persistent_buffers_set)


def _resize(part: nn.Module) -> None:
    """A standard layer's own account of its shape, after its tensors. A depth-wise convolution has as many groups as channels."""
    if isinstance(part, nn.Linear):
        part.out_features, part.in_features = part.weight.shape
    elif isinstance(part, _ConvNd):
        if part.groups > 1 and part.groups == part.in_channels:
            part.groups = part.weight.shape[0] // (part.out_channels // part.in_channels)
        part.out_channels, part.in_channels = part.weight.shape[0], part.weight.shape[1] * part.groups
    elif isinstance(part, _BatchNorm):
        part.num_features = len(part.weight if part.weight is not None else part.running_mean)


def _tensors(part: nn.Module) -> tuple[str, ...]:
    if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
        raise ModelError("a norm over all units couples them: none can leave without a trace")
    return tuple(name for name in STATISTICS if isinstance(getattr(part, name, None), Tensor))


def _at(root: nn.Module, path: str) -> Any:
    return root.get_submodule(path)


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)
