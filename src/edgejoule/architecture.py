"""What passes changed in a network, as plain values beside its tensors, and the network made of both again. No pickles, no training code.

A network that was optimised is written down as the difference from what its builder makes: for each module its class where it is
another one, the plain attributes, tensors and children that differ. ``restored`` applies that to a fresh network of the builder. Classes
may be torch's, timm's and ours only, and are made without calling them; attributes are numbers, texts and lists of such, so a description
is no code.
Host only: needs torch. Knows no pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError

PACKAGES = ("torch.nn.", "timm.", "edgejoule.")
CONFIGURATIONS = ("default_cfg", "pretrained_cfg")  # timm's: where weights came from, a path on some machine among it
INTERNAL = frozenset({*nn.Module().__dict__, "training", "_is_hf_initialized", *CONFIGURATIONS})
MOST_ELEMENTS = 1 << 33  # of one tensor that a description asks for
Description = dict[str, Any]  # {module path: {"class", "attributes", "deleted", "tensors", "children"}}, JSON values


def described(module: nn.Module, base: nn.Module) -> Description:
    """How ``module`` differs from ``base``, but for the values of tensors (see ``tensors_of``). Raises ModelError for what is not plain."""
    for name, part in module.named_modules():
        if any(getattr(part, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks")):
            raise ModelError(f"{name or 'the network'} carries a hook, which cannot be written down: a pass must put a module in its place")
    changes: Description = {}
    _compare("", module, base, changes)
    return changes


def tensors_of(module: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """All that must be kept of a network's tensors: its state, and the transient buffers that ``base`` does not make alike."""
    kept: dict[str, Tensor] = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    known, classes = dict(base.named_buffers()), {name: type(part) for name, part in base.named_modules()}
    for name, value in module.named_buffers():
        owner = name.rpartition(".")[0]
        same = name in known and _form("", known[name]) == _form("", value) and classes.get(owner) is type(module.get_submodule(owner))
        if name not in kept and not (same and torch.equal(known[name], value)):
            kept[name] = value
    return {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}


def restored(base: nn.Module, changes: Description, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network again, in eval mode; ``base`` is used up. Raises ModelError for a description or tensors that do not fit."""
    try:
        root, asked = _changed("", base, changes), _asked(changes)
        if lost := asked - set(tensors):
            raise ModelError(f"the values of {', '.join(sorted(lost)[:3])} of an optimised network are not in its file: optimise again")
        if strange := set(changes) - {name for name, _ in root.named_modules()}:
            raise ModelError(f"the description of an optimised network names {min(strange)}, which it does not have: optimise again")
        transient = {name for name, _ in root.named_buffers()} - set(root.state_dict())
        with torch.no_grad():
            for name in transient & set(tensors):
                owner, _, own = name.rpartition(".")
                root.get_submodule(owner).register_buffer(own, tensors[name].clone(), persistent=False)
        root.load_state_dict({name: value for name, value in tensors.items() if name not in transient})
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, RecursionError, OverflowError) as error:
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"the description of an optimised network does not fit ({said}): optimise again") from error
    root.eval()  # its result is not used: some networks' own eval() returns nothing
    return root


def _asked(changes: Description) -> set[str]:
    """The tensors that a description makes room for."""
    return {
        f"{path}.{name}" if path else name
        for path, entry in changes.items()
        for name, form in entry.get("tensors", {}).items()
        if form is not None
    }


# ---------------------------------------------------------------- writing


def _compare(path: str, module: nn.Module, base: nn.Module | None, changes: Description) -> None:
    known = base if base is not None and type(base) is type(module) else None
    entry: dict[str, Any] = {}
    if known is None:
        entry["class"] = _class_name(path, type(module))
    if attributes := _attributes(path, module, known):
        entry["attributes"] = attributes
    if known is not None and (gone := sorted(set(_own(known)) - set(_own(module)))):
        entry["deleted"] = gone
    mine, theirs = _tensors(module), _tensors(known) if known is not None else {}
    if mine != theirs:
        entry["tensors"] = {name: mine.get(name) for name in {**theirs, **mine} if name not in theirs or mine.get(name) != theirs[name]}
        if gone := sorted(set(theirs) - set(mine)):
            entry["tensors"] = {name: value for name, value in entry["tensors"].items() if name in mine}
            entry["without"] = gone
    children = [[name, child is not None] for name, child in module._modules.items()]
    if known is None or children != [[name, child is not None] for name, child in known._modules.items()]:
        entry["children"] = children
    if entry:
        changes[path] = entry
    for name, child in module._modules.items():
        if child is not None:
            _compare(f"{path}.{name}" if path else name, child, base._modules.get(name) if base is not None else None, changes)


def _class_name(path: str, kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not name.startswith(PACKAGES) or "<" in name:
        raise ModelError(f"{path or 'the network'} is a {name}, which cannot be written down: expected a class of torch, timm or edgejoule")
    return name


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in INTERNAL}


def _attributes(path: str, module: nn.Module, known: nn.Module | None) -> dict[str, Any]:
    before = _own(known) if known is not None else {}
    found = {}
    for name, value in _own(module).items():
        if isinstance(value, Tensor):
            continue  # neither parameter nor buffer: left over from a rewrite; whoever needs it is caught when what was saved is compared
        same = name in before and type(before[name]) is type(value) and _alike(before[name], value)
        if not same:
            found[name] = _plain(f"{path}.{name}", value)
    return found


def _alike(one: Any, other: Any) -> bool:
    """Whether two attributes mean the same. What is no plain value was put there by the same constructor, and does not change."""
    try:
        plain = _plain("", one), _plain("", other)
    except ModelError:
        return True
    return bool(plain[0] == plain[1])


def _plain(path: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_plain(path, item) for item in value]}
    if isinstance(value, list):
        return [_plain(path, item) for item in value]
    if isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values()):
        return {"dict": []}  # a cache of what was computed
    if isinstance(value, dict):
        return {"dict": [[_plain(path, key), _plain(path, item)] for key, item in value.items()]}
    raise ModelError(f"{path} is a {type(value).__name__}, which cannot be written down: a pass may set numbers, texts and lists of such")


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Every tensor of its own: kind, shape and type, or None for one that is not there (a layer without bias)."""
    found: dict[str, Any] = {name: None if value is None else _form("parameter", value) for name, value in module._parameters.items()}
    for name, value in module._buffers.items():
        kind = "transient" if name in module._non_persistent_buffers_set else "buffer"
        found[name] = None if value is None else _form(kind, value)
    return found


def _form(kind: str, value: Tensor) -> list[Any]:
    return [kind, list(value.shape), str(value.dtype).removeprefix("torch.")]


# ---------------------------------------------------------------- reading


def _changed(path: str, module: nn.Module | None, changes: Description) -> nn.Module:
    entry = changes.get(path, {})
    if "class" in entry:
        fresh = _instance(entry["class"])
        fresh._modules = dict(module._modules) if module is not None else {}
        module = fresh
    if module is None:
        raise ModelError(f"the description of an optimised network says nothing of {path}: optimise again")
    for name, value in entry.get("attributes", {}).items():
        if name in INTERNAL or not name.isidentifier() or callable(getattr(type(module), name, None)):
            raise ModelError(f"{path}.{name} is no attribute that a description may set: optimise again")
        module.__dict__[name] = _value(value)
    for name in entry.get("deleted", ()):
        module.__dict__.pop(name, None)
    for name in entry.get("without", ()):
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    for name, form in entry.get("tensors", {}).items():
        _allocate(module, name, form)
    if "children" in entry:
        module._modules = {name: module._modules.get(name) if there else None for name, there in entry["children"]}
        there = {name for name, present in entry["children"] if present}
    else:
        there = {name for name, child in module._modules.items() if child is not None}
    for name in there:
        module._modules[name] = _changed(f"{path}.{name}" if path else name, module._modules[name], changes)
    return module


def _instance(name: str) -> nn.Module:
    """An empty module of a class that may be named, its constructor not called. Raises ModelError."""
    place, _, own = str(name).rpartition(".")
    kind: Any = None
    if str(name).startswith(PACKAGES):
        try:
            kind = getattr(importlib.import_module(place), own, None)
        except ImportError:
            kind = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ModelError(f"a description of an optimised network names the class {name}, which is not here: install what made it")
    made: nn.Module = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def _allocate(module: nn.Module, name: str, form: Any) -> None:
    """A tensor of the described kind, shape and type, its values still to be read."""
    for place in (module._parameters, module._buffers):
        place.pop(name, None)
    module.__dict__.pop(name, None)
    if form is None:
        module.register_parameter(name, None)
        return
    kind, shape, dtype = form
    count = 1
    for side in shape:
        count *= int(side)
    if not 0 <= count <= MOST_ELEMENTS or any(int(side) < 0 for side in shape):
        raise ModelError(f"a description of an optimised network asks for a tensor {name} of shape {shape}: optimise again")
    type_ = getattr(torch, dtype)
    if not isinstance(type_, torch.dtype):
        raise ModelError(f"a description of an optimised network names the type {dtype}: optimise again")
    value = torch.empty(shape, dtype=type_)
    if kind == "parameter":
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    elif kind in ("buffer", "transient"):
        module.register_buffer(name, value, persistent=kind == "buffer")
    else:
        raise ModelError(f"a description of an optimised network names a tensor of kind {kind!r}: optimise again")


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {"tuple"}:
            return tuple(_value(item) for item in value["tuple"])
        if set(value) == {"dict"}:
            return {_value(key): _value(item) for key, item in value["dict"]}
        raise ModelError("a description of an optimised network holds what is no plain value: optimise again")
    return value
