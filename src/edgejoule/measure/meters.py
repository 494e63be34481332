"""Opening a meter by its spelling, choosing one for a device, and saying what each one lacks.

``none`` is a spelling too: no meter, no energy, caveat ``no_meter``. Knows no leaf by name but those that are never chosen for
their quality: the last resort, and those that do not measure this machine, or of which only their owner knows what they measure.
"""

from __future__ import annotations

from typing import Any

from edgejoule import registry
from edgejoule.errors import EdgejouleError, MeterError
from edgejoule.measure.polled import PolledMeter
from edgejoule.measure.streamed import StreamedMeter
from edgejoule.seams import Meter

NONE = "none"
LAST_RESORT = "estimate"
NEVER = ("estimate", "replay", "odpm", "hwmon", "battery")
# Which scopes hold the processor that computes. A whole board holds both; a wall plug holds even more.
WHOLE = ("SoC", "module-in", "board-in", "wall")
COVERS = {"cpu": ("package", *WHOLE), "cuda": ("gpu", *WHOLE)}


def open_meter(spelling: str) -> Meter | None:
    """A fresh meter, ready for one use; a sensor comes wrapped in PolledMeter, a tool that streams lines in StreamedMeter.

    ``none`` (or nothing) is None.

    Raises UnknownNameError or SpecError for a spelling that names no meter.
    """
    if not spelling.strip() or registry.parse(spelling).name == NONE:
        return None
    leaf: Any = registry.create("meter", spelling)
    if callable(getattr(leaf, "read", None)):
        return PolledMeter(leaf, registry.canonical(spelling))
    if callable(getattr(leaf, "parser", None)):
        return StreamedMeter(leaf, registry.canonical(spelling))
    if not isinstance(leaf, Meter):
        raise MeterError(f"the meter {spelling} has neither read() nor start() and stop(): its package must provide a Sensor or a Meter")
    return leaf


def choose_meter(device: str = "cpu") -> tuple[str, str]:
    """The best meter that works here and whose scope covers ``device`` -> (spelling, one sentence saying which and why).

    Falls back to ``estimate``, grade D, and says so; what does not measure this machine is never chosen.
    """
    wanted = COVERS.get(device, WHOLE)
    usable: list[tuple[str, str, str]] = []
    for name in registry.names("meter"):
        if name in NEVER:
            continue
        try:
            leaf: Any = registry.create("meter", name)
            missing = leaf.probe()
        except EdgejouleError:  # one that needs options cannot be chosen unasked
            continue
        if missing is None and getattr(leaf, "scope", "") in wanted:
            usable.append((leaf.grade, name, leaf.scope))
    if usable:
        grade, name, scope = min(usable, key=lambda one: one[0])  # of one grade, the first in LEAVES
        return name, f"{name} measures the {scope} (grade {grade}), the best sensor here that covers the {device}"
    blind = "" if device == "cpu" else f" and does not see the {device} device at all"
    return (
        LAST_RESORT,
        f"no sensor here covers the {device} (edgejoule doctor says why), so energy is an estimate from CPU time (grade D){blind}",
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
