"""What torch executes when it runs a network: every operator as it is dispatched, with its device and its types. Slow: never timed.

Views cost nothing and are not counted. A product's weights are the operand that was there before the run: it is neither the images nor
the result of an operator. What a fused kernel does inside is one operator here; code that calls kernels past torch's dispatcher
(AOTInductor) is not seen. Knows no backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from edgejoule.compile.torch_program import SHORT, float32_products
from edgejoule.records import Placement

# name -> (position of the weights, which of a GPU's switches governs it)
PRODUCTS = {
    "linear": ((1,), "matmul"),
    "addmm": ((1, 2), "matmul"),
    "mm": ((0, 1), "matmul"),
    "matmul": ((0, 1), "matmul"),
    "bmm": ((0, 1), "matmul"),
    "baddbmm": ((1, 2), "matmul"),
    "conv1d": ((1,), "conv"),
    "conv2d": ((1,), "conv"),
    "convolution": ((1,), "conv"),
    "_convolution": ((1,), "conv"),
    "cudnn_convolution": ((1,), "conv"),
    "mkldnn_convolution": ((1,), "conv"),
}


@dataclass
class _Seen:
    """What one run executed: ``made`` are the storages of its images and results."""

    device: str
    made: set[int] = field(default_factory=set)
    nodes: int = 0
    elsewhere: Counter[str] = field(default_factory=Counter)
    precisions: Counter[str] = field(default_factory=Counter)
    alive: list[Any] = field(default_factory=list)  # of tensors without storage, so that no other takes their identity over


def audit(run: Callable[[Any], Any], images: Any, device: str) -> Placement:
    """Runs ``run(images)``, a tensor (B, C, H, W), and says what was executed; ``device`` is the one that was asked for (cpu, cuda)."""
    import torch
    from torch.utils import _python_dispatch

    mode: Any = _python_dispatch.TorchDispatchMode
    seen, products = _Seen(device, {_storage(images)}), float32_products()

    class Watch(mode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [_storage(one) for one in _tensors(args)]
            out = func(*args, **(kwargs or {}))
            results = list(_tensors((out,)))
            seen.alive += [one for one in results if one.is_mkldnn]
            shared = bool(results) and _storage(results[0]) in given  # reshape, contiguous and to() copy only where they must
            views = shared and (func.is_view or func._schema.name == "aten::lift_fresh")
            if views and _storage(results[0]) not in seen.made:
                return out  # a view of a weight is a weight
            if not views and results:
                _count(seen, func._schema.name.partition("::")[2], args, results[0], products)
            seen.made.update(_storage(one) for one in results)
            return out

    with torch.inference_mode(), Watch():
        run(images)
    return Placement(seen.nodes, seen.nodes - sum(seen.elsewhere.values()), dict(seen.elsewhere), dict(seen.precisions))


def _count(seen: _Seen, name: str, args: Any, result: Any, products: dict[str, str]) -> None:
    if name.startswith("empty"):  # memory, not work
        return
    seen.nodes += 1
    if result.device.type != seen.device:
        seen.elsewhere[name] += 1
    if name not in PRODUCTS:
        return
    places, switch = PRODUCTS[name]
    weights = [args[place] for place in places if len(args) > place and _storage(args[place]) not in seen.made]
    if weights:
        kind = SHORT.get(str(weights[0].dtype).removeprefix("torch."), str(weights[0].dtype))
        seen.precisions[products[switch] if kind == "fp32" and result.device.type == "cuda" else kind] += 1


def _tensors(values: Any) -> Iterator[Any]:
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _storage(tensor: Any) -> int:
    """Opaque tensors (oneDNN's own blocks) have no storage: they are told apart as objects."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (NotImplementedError, RuntimeError):
        return id(tensor)
