"""Makes torchvision importable and its detectors runnable beside a CPU-only torch, before timm asks for it. Knows no model.

The torchvision on the package index is a CUDA build. Beside a CPU torch its C++ operators do not load, and its import
stops at two operators that it only wants to describe. Here they are declared, and the two that detectors call get
implementations in torch alone (torchvision_operators.py) behind the same names. Others, as deformable convolution and
quantised boxes, still say that they are missing. On a machine where torchvision's library loads, nothing is done.
"""

from __future__ import annotations

import importlib
import sys
from typing import Literal

import torch

from edgejoule import torchvision_operators as operators

_SCHEMAS = {"nms": operators.NMS_SCHEMA, "qnms": operators.QNMS_SCHEMA, "roi_align": operators.ROI_ALIGN_SCHEMA}
# What the import needs and what detectors call. qnms is new in torchvision 0.28 and stays a declaration.
# Suppression has no gradient; region pooling is made of operators that have one, so it needs none of its own.
_IMPLEMENTATIONS = {"nms": (operators.nms, "CompositeExplicitAutograd"), "roi_align": (operators.roi_align, "CompositeImplicitAutograd")}
_library: torch.library.Library | None = None  # declarations and implementations live only as long as this object


def ensure() -> Literal["native", "shim"]:
    """Import torchvision, giving it the missing operators where its own library did not load.

    Raises ImportError where torchvision is not installed, and RuntimeError where it fails for another reason.
    """
    if _library is not None:
        return "shim"
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        library = _declare()
        importlib.import_module("torchvision")
    else:
        if importlib.import_module("torchvision.extension")._has_ops():
            return "native"
        library = _declare()  # somebody else's declarations let it be imported
    _implement(library)
    return "shim"


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]
    return library


def _implement(library: torch.library.Library) -> None:
    """Give the declared operators their code, and tell torchvision's two functions, and only them, that theirs are there."""
    global _library
    for name, (function, dispatch) in _IMPLEMENTATIONS.items():
        library.impl(name, function, dispatch)  # type: ignore[no-untyped-call]
    for name in ("boxes", "roi_align"):
        calling = vars(importlib.import_module(f"torchvision.ops.{name}"))
        calling.update({"_assert_has_ops": lambda: None, "_has_ops": lambda: True})
    _library = library
