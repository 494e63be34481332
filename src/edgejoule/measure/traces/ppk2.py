"""Nordic's Power Profiler Kit II: the CSV export of its application, 100 000 rows a second, current only.

The kit meters the current that it supplies or lets through, not the voltage: that must be said. Samples that the application
lost are left out of the export, which shows as a gap in the stamps. Knows no ``.ppk`` or ``.ppk2`` files: export those as CSV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import Layout, opening, plausible, table
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

TIME, CURRENT = "timestamp(ms)", "current(ua)"


@dataclass(frozen=True, slots=True)
class Ppk2:
    """``Timestamp(ms),Current(uA)`` and any columns of digital inputs after them. One rail, ``input``."""

    @property
    def averaging_s(self) -> float:
        return 1e-5

    @property
    def grade(self) -> Grade:
        return "B"

    @property
    def scope(self) -> str:
        return "board-in"

    def recognises(self, head: Sequence[str]) -> bool:
        return bool(head) and CURRENT in _names(head[0])

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError without a voltage, without stamps and interval, or where the header is another."""
        head, rest = opening(lines)
        at = next((n for n, line in enumerate(head) if line.strip()), 0)
        names = _names(head[at] if head else "")
        if names.count(CURRENT) != 1:
            raise MeterError("the file has no one column Current(uA): expected the Power Profiler's CSV export, its header included")
        if hints.voltage_v is None:
            raise MeterError("the Power Profiler does not record the voltage: add --voltage with the volts that it supplied")
        stamped = TIME in names
        if not stamped and hints.interval_s is None:
            raise MeterError("the export has no column Timestamp(ms): export it with stamps, or add --interval (0.00001 at full speed)")
        layout = Layout(",", len(names), (names.index(CURRENT), names.index(TIME)) if stamped else (names.index(CURRENT),))
        for _ in range(at + 1):
            next(rest, None)
        row = 1
        for values in table(rest, layout, doubts, at + 2):
            watts = plausible(values[:, 0] * 1e-6 * hints.voltage_v, doubts, row)
            row += len(values)
            yield Block(values[:, 1] * 1e-3 if stamped else np.full(len(values), np.nan), {"input": watts}, {})


def _names(line: str) -> list[str]:
    return [name.strip().strip('"').lower().replace("µ", "u") for name in line.rstrip(", ").split(",")]
