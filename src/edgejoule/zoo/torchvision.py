"""Makes torchvision importable beside a CPU-only torch, before timm asks for it. Knows no model.

The torchvision on the package index is a CUDA build. Beside a CPU torch its C++ operators do not load, and its import
stops at two operators that it only wants to describe. Declaring them is enough for all that timm uses of it; calling
them (box suppression in detection heads) still fails. On a machine where torchvision loads, nothing is done.
"""

from __future__ import annotations

import importlib
import sys
from typing import Literal

import torch

OPERATORS = ("nms", "qnms")  # qnms is new in torchvision 0.28
_SCHEMA = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the declarations live only as long as this object


def ensure() -> Literal["native", "shim"]:
    """Import torchvision, declaring the missing operators where its own library did not load.

    Raises ImportError where torchvision is not installed, and RuntimeError where it fails for another reason.
    """
    global _library
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return "shim" if _library else "native"
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(_SCHEMA.format(name=name))  # type: ignore[no-untyped-call]
    _library = library
    importlib.import_module("torchvision")
    return "shim"
