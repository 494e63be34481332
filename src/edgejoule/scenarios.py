"""How images come to a device: the scenarios, by one grammar, read by studies, by the command line and by the worker.

``single_stream``: the next image when the last is done, one at a time. ``offline``: the same in batches, for throughput.
``fixed_rate(hz=30)``: a camera; the device idles between frames, and a frame not done when the next one comes has missed its deadline.
``streams(n=4)``: n cameras at once, each with one image under way at any time and its own latency.
Knows no clock and no session. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.registry import parse

SLOWEST_HZ, FASTEST_HZ = 0.01, 10_000.0
MOST_STREAMS = 64
NAMES = ("single_stream", "offline", "fixed_rate", "streams")
OPTIONS = {"fixed_rate": "hz", "streams": "n"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario; ``hz``: the frame rate of ``fixed_rate``, ``n``: the cameras of ``streams``. ``str()`` gives the canonical spelling."""

    name: str
    hz: float | None = None
    n: int = 1

    def __str__(self) -> str:
        if self.name == "streams":
            return f"{self.name}(n={self.n})"
        return self.name if self.hz is None else f"{self.name}(hz={self.hz:g})"


def scenario(spelling: str, batch: int = 1) -> Scenario:
    """The scenario that a spelling names. Raises UnknownNameError or SpecError, also for a batch that it has no meaning with."""
    call = parse(spelling)
    if call.name not in NAMES:
        raise UnknownNameError("scenario", call.name, NAMES, f"known: {', '.join(NAMES)}")
    hz, n = call.options.get("hz"), call.options.get("n")
    if call.name == "fixed_rate" and (isinstance(hz, bool) or not isinstance(hz, (int, float)) or not SLOWEST_HZ <= hz <= FASTEST_HZ):
        raise SpecError(f"{spelling!r} needs the camera's frames per second, {SLOWEST_HZ:g} to {FASTEST_HZ:g}, as in fixed_rate(hz=30)")
    if call.name == "streams" and (isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_STREAMS):
        raise SpecError(f"{spelling!r} needs the number of cameras, 1 to {MOST_STREAMS}, as in streams(n=4)")
    if extra := [key for key in call.options if key != OPTIONS.get(call.name)]:
        takes = f"{OPTIONS[call.name]} only" if call.name in OPTIONS else "no options"
        raise SpecError(f"scenario {call.name} takes {takes}, found {', '.join(extra)}")
    if call.name != "offline" and batch != 1:
        raise SpecError(f'{call.name} is one image at a time, but the batch is {batch}: use scenario "offline" for batches')
    return Scenario(call.name, None if hz is None else float(hz), n or 1)
