"""Which pass cannot work on which family, and why: the one table. A pass asks ``refuse`` first; the contract tests read the same table.

A family is a network's architecture, by the module of its class (``family_of``). Knows no pass's working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgejoule.errors import ModelError

BYOB = {"MobileVitBlock": "mobilevit", "MobileVitV2Block": "mobilevitv2"}  # both are timm's ByobNet

# pass -> family -> why; ``REST`` is every family that the pass does not name in its own table of adapters
REST = "*"
IMPOSSIBLE: Mapping[str, Mapping[str, str]] = {
    "prune_heads": {},
    "prune_ffn": {},
    "prune_weights": {},
    "resize": {},
    "window_attention": {},
    "merge_tokens": {},
    "prune_tokens": {},
    "qat": {},
}


def family_of(module: Any) -> str:
    """The architecture of a network: vision_transformer, deit, swin_transformer, levit, mobilevit, edgevit, …"""
    name = type(module).__module__.rpartition(".")[2]
    if name == "byobnet":
        return next((BYOB[type(part).__name__] for part in module.modules() if type(part).__name__ in BYOB), name)
    return name


def reason(name: str, module: Any) -> str | None:
    """Why a pass cannot work on a network; None where nothing speaks against it."""
    table = IMPOSSIBLE.get(name, {})
    return table.get(family_of(module), table.get(REST))


def refuse(name: str, module: Any, model: str) -> None:
    """Raises ModelError with the reason where the pass ``name`` cannot work on the network that is called ``model``."""
    if (why := reason(name, module)) is not None:
        raise ModelError(f"{name} cannot work on {model}: {why}; leave it out of the recipe")
