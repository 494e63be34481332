"""Opening a meter by its spelling, choosing one for a device, and saying what each one lacks.

``none`` is a spelling too: no meter, no energy, caveat ``no_meter``. Knows no leaf by name but the two that are never chosen
for their quality: ``estimate`` (the last resort) and ``replay`` (never chosen).
"""

from __future__ import annotations

from typing import Any

from edgejoule import registry
from edgejoule.errors import EdgejouleError, MeterError
from edgejoule.measure.polled import PolledMeter
from edgejoule.seams import Meter

NONE = "none"
LAST_RESORT = "estimate"
NEVER = ("estimate", "replay")
# Which scopes hold the processor that computes. A whole board holds both; a wall plug holds even more.
WHOLE = ("SoC", "module-in", "board-in", "wall")
COVERS = {"cpu": ("package", *WHOLE), "cuda": ("gpu", *WHOLE)}


def open_meter(spelling: str) -> Meter | None:
    """A fresh meter, ready for one use; a sensor comes wrapped in PolledMeter. ``none`` (or nothing) is None.

    Raises UnknownNameError or SpecError for a spelling that names no meter.
    """
    if not spelling.strip() or registry.parse(spelling).name == NONE:
        return None
    leaf: Any = registry.create("meter", spelling)
    if callable(getattr(leaf, "read", None)):
        return PolledMeter(leaf, registry.canonical(spelling))
    if not isinstance(leaf, Meter):
        raise MeterError(f"the meter {spelling} has neither read() nor start() and stop(): its package must provide a Sensor or a Meter")
    return leaf


def choose_meter(device: str = "cpu") -> tuple[str, str]:
    """The best meter that works here and whose scope covers ``device`` -> (spelling, one sentence saying which and why).

    Falls back to ``estimate``, grade D, and says what the others lack; a replay is never chosen.
    """
    wanted = COVERS.get(device, WHOLE)
    usable: list[tuple[str, str, str]] = []
    lacking: list[str] = []
    for name in registry.names("meter"):
        if name in NEVER:
            continue
        try:
            leaf: Any = registry.create("meter", name)
            missing = leaf.probe()
        except EdgejouleError as error:  # one that needs options cannot be chosen unasked
            lacking.append(f"{name}: {error}")
            continue
        if missing is not None:
            lacking.append(f"{name}: {missing}")
        elif getattr(leaf, "scope", "") not in wanted:
            lacking.append(f"{name}: measures {getattr(leaf, 'scope', 'something else')}, not the {device}")
        else:
            usable.append((leaf.grade, name, leaf.scope))
    if usable:
        grade, name, scope = min(usable)
        return name, f"{name} measures the {scope} (grade {grade}), the best sensor here that covers the {device}"
    blind = "" if device == "cpu" else f" and does not see the {device} device at all"
    return (
        LAST_RESORT,
        f"no sensor here covers the {device} ({'; '.join(lacking)}), so energy is an estimate from CPU time (grade D){blind}",
    )


def survey() -> list[dict[str, Any]]:
    """A row per known meter: ``{name, ok, remedy}``, the remedy empty where it works."""
    rows: list[dict[str, Any]] = []
    for name in registry.names("meter"):
        try:
            remedy = registry.create("meter", name).probe()
        except EdgejouleError as error:
            remedy = str(error)
        rows.append({"name": name, "ok": remedy is None, "remedy": remedy or ""})
    return rows
