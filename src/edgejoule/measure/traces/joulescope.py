"""Joulescope: the CSV export of samples (time, current, voltage) and the user interface's record of statistics.

A row of statistics is the mean since the row before, stamped at its end, beside the instrument's own running energy, which is
handed on so that the two can be compared. The export of samples has a header only where that was asked for: without one it must
be named (``--format joulescope``). JLS files are binary: ``pyjls`` or the user interface turn them into CSV.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import Layout, number, opening, plausible, table
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

SAMPLES = ("#time (s)", "current (a)", "voltage (v)")
STATISTICS = ("#time", "current", "voltage", "power", "charge", "energy")
BINARY = ("jlsfmt", "tagfmt")


@dataclass(frozen=True, slots=True)
class Joulescope:
    """One rail, ``input``. Volts times amperes of the samples; of statistics their own power, which is the mean of the product."""

    @property
    def averaging_s(self) -> float:
        return 1e-6

    @property
    def grade(self) -> Grade:
        return "B"

    @property
    def scope(self) -> str:
        return "board-in"

    def recognises(self, head: Sequence[str]) -> bool:
        return bool(head) and (_names(head[0]) in (SAMPLES, STATISTICS) or _binary(head[0]))

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError for a JLS file, and where neither header nor number of columns is one of the two kinds."""
        head, rest = opening(lines)
        at = next((n for n, line in enumerate(head) if line.strip()), 0)
        first = head[at] if head else ""
        if _binary(first):
            raise MeterError("this is a JLS file, which is binary: export it as CSV from the Joulescope UI, or with pyjls")
        names, skip = _names(first), at + 1
        if names not in (SAMPLES, STATISTICS):
            numeric = all(number(name) == number(name) for name in names)
            known = {len(kind): kind for kind in (SAMPLES, STATISTICS)}
            if not numeric or len(names) not in known:
                raise MeterError(
                    f"the file begins with {first[:60]!r}: expected '#time (s),current (A),voltage (V)' or rows of these three"
                )
            names, skip = known[len(names)], at
        statistics = names == STATISTICS
        layout = Layout(",", len(names), (0, 3, 5) if statistics else (0, 1, 2))
        for _ in range(skip):
            next(rest, None)
        row = 1
        for values in table(rest, layout, doubts, skip + 1):
            watts = plausible(values[:, 1] if statistics else values[:, 1] * values[:, 2], doubts, row)
            row += len(values)
            yield Block(values[:, 0], {"input": watts}, {"input": values[:, 2]} if statistics else {})


def _binary(line: str) -> bool:
    return any(mark in line[:64] for mark in BINARY)


def _names(line: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in line.split(","))
