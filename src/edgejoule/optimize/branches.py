"""Parallel branches into one layer: the rewrites that networks bring along, and the identity of residual convolutions into their kernels.

A module may know its own exact rewrite, ``fuse()``, ``reparameterize()`` or ``switch_to_deploy()`` (timm's three names, and ours);
each is tried on a copy and kept only if it computes the same. ``RESIDUALS`` holds the rewrites of modules that bring none.
Changes the network that it is given. Knows no graph; batch norms in a row with one layer are left to pairs.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgejoule.optimize.folding import add_identity, takes_identity

VERBS = ("fuse", "reparameterize", "switch_to_deploy")
EXACT = 1e-6  # relative: float32 weights, float64 arithmetic


@dataclass
class Merged:
    """What became of the blocks that know a rewrite, by module name."""

    blocks: list[str] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # their own rewrite fails, or computes something else


def merge_branches(root: nn.Module, images: Tensor) -> Merged:
    """Rewrite, in place, every block below ``root`` that knows how; ``images`` (B, C, H, W) show each block its real inputs."""
    merged = Merged()
    calls = _calls(root, images)
    with torch.random.fork_rng(devices=[]):  # constructors of the new layers draw numbers
        _descend(root, root, "", calls, merged)
    return merged


def merge_residuals(root: nn.Module) -> list[str]:
    """Rewrite, in place, the modules of ``RESIDUALS`` below ``root`` whose convolution can hold the identity; their names."""
    found = []
    for name, part in list(root.named_modules()):
        rewrite = RESIDUALS.get(f"{type(part).__module__}.{type(part).__qualname__}")
        rewritten = None if rewrite is None or part is root else rewrite(part)
        if rewritten is not None:
            rewritten.eval()
            replace(root, part, rewritten)
            found.append(name)
    return found


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands below ``root``."""
    for part in root.modules():
        for name, child in list(part._modules.items()):
            if child is old:
                part._modules[name] = new


def distance(found: Any, expected: Any) -> float:
    """Relative distance of outputs, |found - expected| / |expected|, the worst over all tensors in them (tuples, lists, dicts)."""
    if isinstance(expected, Mapping):
        return max((distance(found[key], expected[key]) for key in expected), default=0.0)
    if isinstance(expected, (tuple, list)):
        return max((distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return 0.0
    if found.shape != expected.shape:
        return float("inf")
    error = float((found.double() - expected.double()).norm()) / max(float(expected.double().norm()), 1e-30)
    return error if error == error else float("inf")  # not a number: both are broken, and nothing is shown


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(root: nn.Module, images: Tensor) -> dict[nn.Module, Call]:
    """The arguments with which each block that knows a rewrite is called."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args, kwargs)

    hooks = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in root.modules() if part is not root and _verb(part)]
    try:
        if hooks:
            with torch.no_grad():
                root(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _descend(root: nn.Module, parent: nn.Module, prefix: str, calls: Mapping[nn.Module, Call], merged: Merged) -> None:
    for name, child in list(parent.named_children()):
        path, current = f"{prefix}{name}", child
        if child in calls:
            rewritten = _rewritten(child, calls[child])
            if rewritten is None:
                merged.left.append(path)
            elif not _same(rewritten, child):  # some come out as they went in: nothing in them to merge, or done before
                (merged.residuals if _is_residual(child) else merged.blocks).append(path)
                replace(root, child, rewritten)
                current = rewritten
        _descend(root, current, f"{path}.", calls, merged)


def _verb(part: nn.Module) -> str | None:
    """The name of a block's own rewrite; None where there is none, it has been done, or one layer and one norm are all there is."""
    verb = next((verb for verb in VERBS if callable(getattr(part, verb, None))), None)
    done = getattr(part, "reparam_conv", None) is not None or any(
        getattr(part, flag, False) is True for flag in ("inference_mode", "deploy")
    )
    if verb is None or done:
        return None
    layers, norms = _layers(part)
    return None if layers <= 1 and norms == 1 else verb


def _is_residual(part: nn.Module) -> bool:
    return _layers(part) == (1, 0)


def _layers(part: nn.Module) -> tuple[int, int]:
    """How many layers with weights, and how many batch norms."""
    parts = list(part.modules())
    return sum(isinstance(m, (_ConvNd, nn.Linear)) for m in parts), sum(isinstance(m, _BatchNorm) for m in parts)


def _rewritten(part: nn.Module, call: Call) -> nn.Module | None:
    """The block by its own rewrite, computed in float64; None where that fails or gives something else."""
    dtype = next((p.dtype for p in part.parameters()), torch.float32)
    verb = _verb(part)
    assert verb is not None
    twin = copy.deepcopy(part).double()
    try:
        made = getattr(twin, verb)()
        new = (made if isinstance(made, nn.Module) else twin).to(dtype)
        new.eval()  # not in one breath: some networks' eval() gives None
        with torch.no_grad():
            expected = _run(copy.deepcopy(part).double(), call)
            found = _run(copy.deepcopy(new).double(), call)
    except (AttributeError, TypeError, ValueError, IndexError, KeyError, AssertionError, NotImplementedError, RuntimeError):
        return None  # reported as left: the network is right without it, only slower
    return new if distance(found, expected) <= EXACT else None


def _same(new: nn.Module, old: nn.Module) -> bool:
    """Whether two blocks hold the same tensors under the same names."""
    found, known = new.state_dict(), old.state_dict()
    return found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in found)


def _run(part: nn.Module, call: Call) -> Any:
    args, kwargs = call
    return part(*(_doubled(value) for value in args), **{name: _doubled(value) for name, value in kwargs.items()})


def _doubled(value: Any) -> Any:
    """A float64 copy, because some blocks change their input."""
    return value.detach().double().clone() if isinstance(value, Tensor) and value.is_floating_point() else value


class PositionConv(nn.Module):
    """A convolution over tokens laid out as a map, identity included; the first ``ahead`` tokens (a class token) pass by."""

    def __init__(self, conv: nn.Conv2d, ahead: int) -> None:
        super().__init__()
        self.proj = conv
        self.ahead = ahead

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # (B, ahead + H W, C) -> the same
        tokens = x[:, self.ahead :]
        shape = (tokens.shape[0], tokens.shape[2], *size)
        tokens = self.proj(tokens.transpose(1, 2).reshape(shape)).flatten(2).transpose(1, 2)  # (B, H W, C)
        return torch.cat((x[:, : self.ahead], tokens), dim=1) if self.ahead else tokens


def _with_identity(conv: Any) -> nn.Conv2d | None:
    if not takes_identity(conv):
        return None
    new: nn.Conv2d = copy.deepcopy(conv)
    add_identity(new)
    return new


def _twins(part: Any) -> nn.Module | None:
    conv = _with_identity(part.proj[0]) if len(part.proj) == 1 and part.stride == 1 else None
    return None if conv is None else PositionConv(conv, ahead=0)


def _coat(part: Any) -> nn.Module | None:
    conv = _with_identity(part.proj)
    return None if conv is None else PositionConv(conv, ahead=1)


def _davit(part: Any) -> nn.Module | None:
    return _with_identity(part.proj) if isinstance(part.act, nn.Identity) else None


def _efficientvit_msra(part: Any) -> nn.Module | None:
    """x + m(x), where m is a depth-wise convolution once its norm has been folded."""
    parts = [m for m in part.m.modules() if not isinstance(m, nn.Identity) and m is not part.m]
    chain = isinstance(part.m, nn.Sequential) and len(parts) == 1
    return _with_identity(parts[0]) if chain else None


RESIDUALS: Mapping[str, Callable[[Any], nn.Module | None]] = {
    "timm.models.twins.PosConv": _twins,
    "timm.models.coat.ConvPosEnc": _coat,
    "timm.models.davit.ConvPosEnc": _davit,
    "timm.models.efficientvit_msra.ResidualDrop": _efficientvit_msra,
}
