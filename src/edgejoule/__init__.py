"""edgejoule: find, shrink, compile and measure Vision Transformers for edge devices, and rank them by accuracy per joule.

The public names are imported on first use, so that ``import edgejoule`` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "EdgejouleError": "edgejoule.errors",
    "Measurement": "edgejoule.records",
    "ModelSpec": "edgejoule.records",
    "Ranking": "edgejoule.records",
    "Trial": "edgejoule.records",
    "Store": "edgejoule.store",
    "Study": "edgejoule.study",
    "load_study": "edgejoule.study",
    "run_study": "edgejoule.study",
    "find_model": "edgejoule.catalog",
    "meter": "edgejoule.measure.metering",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgejoule' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
