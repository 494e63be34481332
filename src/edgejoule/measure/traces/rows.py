"""Rows that name their own rails, gathered into blocks; and the energies of intervals, added up to counters.

For loggers that print a few named figures per sample (text, JSON), where tables have columns. Knows no format and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import block
from edgejoule.seams import Block

ROWS = 16_384  # of a block
MOST_RAILS = 256
MOST_W = 1e6  # more is a damaged number, not a power


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: seconds from any origin (NaN without a stamp), watts and counters (joules) by rail; NaN where one is not valid."""

    time_s: float
    power_w: Mapping[str, float] = field(default_factory=dict)
    energy_j: Mapping[str, float] = field(default_factory=dict)


def blocks(rows: Iterable[Row]) -> Iterator[Block]:
    """Blocks of at most ROWS rows; NaN where a row lacks a rail. Raises MeterError for more rails than any instrument has."""
    walker, seen = iter(rows), set[str]()
    while some := list(islice(walker, ROWS)):
        power = dict.fromkeys(rail for row in some for rail in row.power_w)
        energy = dict.fromkeys(rail for row in some for rail in row.energy_j)
        seen.update(power, energy)
        if len(seen) > MOST_RAILS:
            raise MeterError(f"the file names more than {MOST_RAILS} rails: expected a few; cut the damaged part out of it")
        yield block(
            [row.time_s for row in some],
            {rail: [row.power_w.get(rail, math.nan) for row in some] for rail in power},
            {rail: [row.energy_j.get(rail, math.nan) for row in some] for rail in energy},
        )


class RunningJoules:
    """The energies of one interval after another, added up. An interval that is not known is bridged by the power around it."""

    def __init__(self) -> None:
        self._joules: dict[str, float] = {}
        self._watts: dict[str, float] = {}  # of the last interval that is known
        self._missing_s: dict[str, float] = {}  # since then

    def add(self, elapsed_s: float, joules: Mapping[str, float]) -> dict[str, float]:
        """The counters {rail: joules} after an interval of ``elapsed_s`` > 0 seconds; a rail that is NaN or missing in it is left out."""
        for rail in self._joules:
            if math.isnan(joules.get(rail, math.nan)):
                self._missing_s[rail] += elapsed_s
        known = {rail: value for rail, value in joules.items() if not math.isnan(value)}
        for rail, value in known.items():
            watts = value / elapsed_s
            bridged = self._missing_s.get(rail, 0.0) * (self._watts.get(rail, watts) + watts) / 2
            self._joules[rail] = self._joules.get(rail, 0.0) + bridged + value
            self._watts[rail], self._missing_s[rail] = watts, 0.0
        return {rail: self._joules[rail] for rail in known}

    def skip(self, gap_s: float) -> None:
        """Time that no interval covers."""
        for rail in self._missing_s:
            self._missing_s[rail] += gap_s
