"""USB testers: the Linux logger of FNIRSI meters (FNB48, FNB58, C1), and rd-usb's CSV export of RDTech meters (UM, TC series).

The FNIRSI logger stamps packets of four samples when they arrive, so stamps overlap: the meter takes 100 samples a second and time
is rebuilt from their number. Its energy is its own sum of the same samples. rd-usb polls about once a second; its meters count
milliwatt-hours. A file of several runs is refused, never added up. Knows no files of the makers' own Windows programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import ENERGY_UNITS, Layout, Paced, opening, plausible, table
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

PERIOD_S = 0.01
LOGGER = ("timestamp", "sample_in_packet", "voltage_V", "current_A")
ENERGY = "energy_Ws"  # an older logger wrote energy_Wh over the same watt-seconds: not used
RD_TIME, RD_POWER, RD_ENERGY = "unix time", "power (w)", "accumulated power (mwh)"


@dataclass(frozen=True, slots=True)
class Fnirsi:
    """One rail, ``input``: volts times amperes, or rd-usb's own power; and the file's own energy beside it."""

    @property
    def averaging_s(self) -> float:
        return PERIOD_S

    @property
    def grade(self) -> Grade:
        return "B"

    @property
    def scope(self) -> str:
        return "board-in"

    def recognises(self, head: Sequence[str]) -> bool:
        return bool(head) and (tuple(head[0].split()[:4]) == LOGGER or {RD_POWER, RD_ENERGY} <= set(_names(head[0])))

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError for another header, several runs in one file, and an rd-usb export without stamps or interval."""
        head, rest = opening(lines)
        at = next((n for n, line in enumerate(head) if line.strip()), 0)
        first = head[at] if head else ""
        for _ in range(at + 1):
            next(rest, None)
        if tuple(first.split()[:4]) == LOGGER:
            return _logger(rest, first.split(), at + 2, hints, doubts)
        if RD_POWER in _names(first):
            return _rd_usb(rest, _names(first), at + 2, hints, doubts)
        raise MeterError(
            f"the file begins with {first[:60]!r}: expected '{' '.join(LOGGER)} …' of the FNIRSI logger, or rd-usb's CSV export"
        )


def _logger(lines: Iterator[str], names: list[str], line: int, hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
    counted = ENERGY in names
    layout = Layout("", len(names), (0, 2, 3, *([names.index(ENERGY)] if counted else [])))
    paced = Paced(PERIOD_S) if hints.interval_s is None else None
    run = _OneRun(line)
    row = 1
    for values in table(run.only(lines), layout, doubts, line):
        if row == 1 and paced is not None:
            doubts.add("stamps_rebuilt", "the stamps are those of packets on arrival; a row was taken every 0.01 s")
        times = values[:, 0] if paced is None else paced.times(values[:, 0])
        watts = plausible(values[:, 1] * values[:, 2], doubts, row)
        row += len(values)
        yield Block(times, {"input": watts}, {"input": values[:, 3] * ENERGY_UNITS["Ws"]} if counted else {})


@dataclass(slots=True)
class _OneRun:
    """Lines of one run: the logger puts an empty line and its header before each, and files are appended to."""

    line: int
    _ended: list[int] = field(default_factory=list)

    def only(self, lines: Iterable[str]) -> Iterator[str]:
        for number, text in enumerate(lines, self.line):
            if not text.strip():
                self._ended.append(number)
            elif self._ended or text.startswith(LOGGER[0]):
                raise MeterError(f"another run begins at line {number}: split the file there, because runs are not added up")
            yield text


def _rd_usb(lines: Iterator[str], names: list[str], line: int, hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
    stamped = RD_TIME in names
    if not stamped and hints.interval_s is None:
        raise MeterError("the export has no column Unix time: export it with a newer rd-usb, or add --interval")
    wanted = [names.index(name) for name in (RD_POWER, RD_ENERGY, RD_TIME) if name in names]
    row = 1
    for values in table(lines, Layout(",", len(names), tuple(wanted)), doubts, line):
        watts = plausible(values[:, 0], doubts, row)
        row += len(values)
        counter = {"input": values[:, 1] * ENERGY_UNITS["mWh"]} if RD_ENERGY in names else {}
        yield Block(values[:, -1] if stamped else np.full(len(values), np.nan), {"input": watts}, counter)


def _names(line: str) -> list[str]:
    return [name.strip().strip('"').lower() for name in line.split(",")]
