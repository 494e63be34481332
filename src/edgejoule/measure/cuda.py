"""Waiting for the GPUs that a program uses through torch, so that queued work falls into the window that it belongs to.

Never imports torch, and makes no context on a GPU that the program leaves alone. Knows no sensor; other accelerators are not waited for.
"""

from __future__ import annotations

import sys
from typing import Any


def torch_cuda() -> Any:
    """``torch.cuda`` where the program uses it already; None where it does not."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    ask = getattr(cuda, "is_initialized", None)
    return cuda if callable(ask) and ask() else None


def synchronise() -> None:
    """Wait for every GPU that torch has memory on, and for the current one. What the GPU has to complain of is raised as torch has it."""
    cuda = torch_cuda()
    if cuda is not None:
        for index in range(cuda.device_count()):
            if index == cuda.current_device() or cuda.memory_reserved(index):
                cuda.synchronize(index)
