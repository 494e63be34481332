"""The measuring protocols, as one visible table of profiles, and the grammar that overrides a field of one.

``profile("standard(window_s=5, repeats_max=6)")`` is the standard with a shorter window. The numbers of ``standard`` and
``publish`` are those of the project's measuring reference (warm-up, idle, window, repeats), ``paper`` is E3P-ViT's
(arXiv 2511.23166: three trials of 1000 images), ``edgevit`` EdgeViT's (arXiv 2205.03436: 50 runs of one image), ``sustained`` what
``measure --sustain`` runs.
Knows no clock, no meter and no model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.records import Protocol
from edgejoule.registry import parse

PROFILES: dict[str, Protocol] = {
    "quick": Protocol(
        name="quick",
        warmup_s=0.5,
        warmup_inferences=5,
        warmup_cap_s=3.0,
        idle_s=1.0,
        window_s=2.0,
        window_inferences=5,
        repeats_min=3,
        repeats_max=3,
        latency_half_width=0.01,
        energy_half_width=0.02,
    ),
    "standard": Protocol(
        name="standard",
        warmup_s=3.0,
        warmup_inferences=10,
        warmup_cap_s=120.0,
        idle_s=10.0,
        window_s=10.0,
        window_inferences=50,
        repeats_min=5,
        repeats_max=20,
        latency_half_width=0.01,
        energy_half_width=0.02,
        cooldown_s=5.0,
        sensor_windows=100.0,
    ),
    "publish": Protocol(
        name="publish",
        warmup_s=3.0,
        warmup_inferences=10,
        warmup_cap_s=120.0,
        idle_s=10.0,
        window_s=60.0,
        window_inferences=1024,
        repeats_min=10,
        repeats_max=20,
        latency_half_width=0.01,
        energy_half_width=0.02,
        cooldown_s=5.0,
        sensor_windows=100.0,
    ),
    # A warm-up cap of 0 means that no steady state is sought: E3P makes two untimed inferences and starts.
    "paper": Protocol(
        name="paper",
        warmup_s=0.0,
        warmup_inferences=2,
        warmup_cap_s=0.0,
        idle_s=2.0,
        window_s=0.0,
        window_inferences=1,
        repeats_min=3,
        repeats_max=3,
        latency_half_width=0.01,
        energy_half_width=0.02,
        images=1000,
    ),
    # From cold and for long, to see where the device settles: no warm-up, one window.
    "sustained": Protocol(
        name="sustained",
        warmup_s=0.0,
        warmup_inferences=2,
        warmup_cap_s=0.0,
        idle_s=10.0,
        window_s=600.0,
        window_inferences=50,
        repeats_min=1,
        repeats_max=1,
        latency_half_width=0.01,
        energy_half_width=0.02,
    ),
    # EdgeViT's Table 2: the mean of 50 inferences of one image each, here in three processes.
    "edgevit": Protocol(
        name="edgevit",
        warmup_s=1.0,
        warmup_inferences=10,
        warmup_cap_s=20.0,
        idle_s=1.0,
        window_s=0.0,
        window_inferences=1,
        repeats_min=3,
        repeats_max=3,
        latency_half_width=0.01,
        energy_half_width=0.02,
        images=50,
    ),
}
WHOLE = ("warmup_inferences", "window_inferences", "repeats_min", "repeats_max", "images")
AT_LEAST_ONE = ("window_inferences", "repeats_min", "repeats_max", "images")


def profile(spelling: str) -> Protocol:
    """The protocol that a spelling names, its ``name`` the canonical spelling.

    Raises UnknownNameError for a profile that is not there, and SpecError for a field it has not or a value out of its range.
    """
    call = parse(spelling)
    if call.name not in PROFILES:
        raise UnknownNameError("profile", call.name, PROFILES, f"known: {', '.join(PROFILES)}")
    fields = [f.name for f in dataclasses.fields(Protocol) if f.name != "name"]
    for key, value in call.options.items():
        if key not in fields:
            raise SpecError(f"profile {call.name} has no field {key!r}: it has {', '.join(fields)}")
        _check(call.name, key, value)
    chosen = dataclasses.replace(PROFILES[call.name], name=str(call), **call.options)
    if chosen.repeats_max < chosen.repeats_min:
        raise SpecError(f"profile {call}: repeats_max={chosen.repeats_max} is below repeats_min={chosen.repeats_min}, raise it")
    return chosen


def base_name(protocol: Protocol) -> str:
    """``'quick'`` for ``quick(window_s=1)``: the profile that a protocol was made from."""
    return protocol.name.partition("(")[0]


def _check(name: str, key: str, value: Any) -> None:
    if value is None and key == "images":
        return
    kinds = (int,) if key in WHOLE else (int, float)
    least = 1 if key in AT_LEAST_ONE else 0
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < least:
        expected = "a whole number" if key in WHOLE else "a number"
        raise SpecError(f"profile {name}: {key}={value!r} does not fit, expected {expected} of at least {least}")
