"""How images come to a device: the scenarios, by one grammar, read by studies, by the command line and by the worker.

``single_stream``: the next image when the last is done, one at a time. ``offline``: the same in batches, for throughput.
``fixed_rate(hz=30)``: a camera; the device idles between frames, and a frame not done when the next one comes has missed its deadline.
Knows no clock and no session. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.registry import parse

SLOWEST_HZ, FASTEST_HZ = 0.01, 10_000.0
NAMES = ("single_stream", "offline", "fixed_rate")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario; ``hz`` is the frame rate of ``fixed_rate``, None for the others. ``str()`` gives the canonical spelling."""

    name: str
    hz: float | None = None

    def __str__(self) -> str:
        return self.name if self.hz is None else f"{self.name}(hz={self.hz:g})"


def scenario(spelling: str, batch: int = 1) -> Scenario:
    """The scenario that a spelling names. Raises UnknownNameError or SpecError, also for a batch that it has no meaning with."""
    call = parse(spelling)
    if call.name not in NAMES:
        raise UnknownNameError("scenario", call.name, NAMES, f"known: {', '.join(NAMES)}")
    hz = call.options.get("hz")
    if call.name == "fixed_rate":
        if isinstance(hz, bool) or not isinstance(hz, (int, float)) or not SLOWEST_HZ <= hz <= FASTEST_HZ:
            raise SpecError(f"{spelling!r} needs the camera's frames per second, {SLOWEST_HZ:g} to {FASTEST_HZ:g}, as in fixed_rate(hz=30)")
    elif call.options:
        raise SpecError(f"scenario {call.name} takes no options, found {', '.join(call.options)}")
    if extra := [key for key in call.options if key != "hz"]:
        raise SpecError(f"scenario fixed_rate takes hz only, found {', '.join(extra)}")
    if call.name != "offline" and batch != 1:
        raise SpecError(f'{call.name} is one image at a time, but the batch is {batch}: use scenario "offline" for batches')
    return Scenario(call.name, None if hz is None else float(hz))
