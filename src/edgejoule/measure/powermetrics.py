"""Apple's ``powermetrics`` running beside the work. Grade D, scope: the SoC. Needs root.

Apple calls the figures estimates and warns against comparing machines by them. Each sample is the mean power of the interval just ended,
so that power times its time, added up, is exact. The combined power is the whole; CPU, GPU and ANE are its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgejoule.caveats import Doubts
from edgejoule.measure.streamed import probe_stream
from edgejoule.measure.traces.powermetrics import CALM, TextReader, joules
from edgejoule.measure.traces.rows import RunningJoules
from edgejoule.records import Grade

LEAST_S = 0.05
SAMPLERS = "cpu_power,gpu_power,ane_power,thermal"


@dataclass(frozen=True, slots=True)
class Powermetrics:
    """A sample every ``period_s`` seconds. ``sudo=True`` asks for root without a password; ``command`` is the tool's path."""

    period_s: float = 0.2
    sudo: bool = False
    command: str = "powermetrics"
    _seen: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.period_s >= LEAST_S:
            raise ValueError(f"period_s={self.period_s:g} is below {LEAST_S:g} s")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j"

    @property
    def averaging_s(self) -> float:
        """A sample is the mean of its period."""
        return self.period_s

    @property
    def grade(self) -> Grade:
        return "D"

    @property
    def scope(self) -> str:
        return "SoC"

    def total(self, rail: str) -> bool:
        return rail == "combined"

    def probe(self) -> str | None:
        said = probe_stream(self)
        return (
            None if said is None else f"{said.rstrip(' .')} (powermetrics is part of macOS on Apple silicon and needs root, or sudo=True)"
        )

    def argv(self) -> Sequence[str]:
        root = ["sudo", "-n"] if self.sudo else []
        return [*root, self.command, "--samplers", SAMPLERS, "-i", f"{1e3 * self.period_s:.0f}", "--buffer-size", "1"]

    def parser(self) -> Callable[[str], Mapping[str, float] | None]:
        """{rail: joules since the first sample began}, once the combined power of a sample has come."""
        doubts = Doubts()
        reader, sums = TextReader(doubts, early=True), RunningJoules()
        self._seen.clear()

        def parse(line: str) -> Mapping[str, float] | None:
            sample = reader.feed(line)
            if reader.pressure not in CALM:
                self._seen["throttled"] = f"thermal pressure {reader.pressure}"
            if sample is None:
                return None
            self._seen.update({doubt.code: doubt.seen for doubt in doubts.caveats()})
            counters = sums.add(sample.elapsed_s, joules(sample))
            return {rail: value for rail, value in counters.items() if not math.isnan(value)} or None

        return parse

    def doubts(self) -> dict[str, str]:
        """Thermal pressure since the recording began, and figures that were not valid."""
        return self._seen.copy()
