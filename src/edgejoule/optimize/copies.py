"""Copies of networks for passes to work on, and blocks of another class made from what a copy holds. Knows no architecture."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError

PLAIN = (bool, int, float, str, tuple, list, type(None))  # what attributes of a network that is saved may be
M = TypeVar("M", bound=nn.Module)


def copied(module: nn.Module, called: str = "it") -> nn.Module:
    """A deep copy in eval mode, also of a network that keeps results of its parameters between calls (attention biases).

    Raises ModelError, in which it is ``called`` so, for a network that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            for kept in value.values() if isinstance(value, dict) else (value,):
                if isinstance(kept, Tensor) and kept.grad_fn is not None:  # which torch refuses to copy
                    memo[id(kept)] = kept.detach().clone()
    try:
        with torch.inference_mode(False):  # whoever calls: gradients may be asked for
            twin = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError, ValueError, AttributeError, copy.Error) as error:
        said = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"{called} cannot be copied ({said}): let it keep no locks, open files or tensors with a history of gradients"
        ) from error
    forget_caches(twin)
    return twin


def forget_caches(module: nn.Module) -> None:
    """Attention blocks that keep biases between evaluations let go of them in training mode only."""
    module.train()
    module.eval()  # not in one breath: some networks' train() gives None


def adopt(kind: type[M], block: nn.Module, **attributes: Any) -> M:
    """A ``kind`` with the children, tensors and plain attributes of a block, which must not be used any more; ``attributes`` are set."""
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    for name, value in vars(block).items():
        if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            getattr(new, name).update(value)
        elif isinstance(value, PLAIN) and not name.startswith("_"):
            setattr(new, name, copy.copy(value))
    for name, value in attributes.items():
        setattr(new, name, value)
    return new
