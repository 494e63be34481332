"""Logs of SPEC's PTDaemon as MLPerf Power keeps them (``spl.txt``): one line a second of a calibrated analyser. Grade A, scope: the wall.

    Time,01-10-2023 20:46:01.787,Watts,23.850000,Volts,247.920000,Amps,0.198110,PF,0.485500,Mark,notset

Whether 01-10 is the first of October or the tenth of January, the line does not say. Within one date that cannot matter: only the time
of day moves. At midnight the reading is chosen by which the two dates are neighbours; where neither or both are, the file is refused.
Further channels (``Ch1,Watts,…``) are rails of their own beside the whole. Negative figures are the analyser's word for "not valid".
``Uncertainty`` lines are passed over: what they hold is of the reading, not of the load.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import number
from edgejoule.measure.traces.rows import MOST_W, Row, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

WALL = "wall"
DAY_S = 86_400
STAMP = re.compile(r"(\d\d)-(\d\d)-(\d{4}) (\d\d):(\d\d):(\d\d(?:\.\d+)?)")
START = re.compile(r"Time,\d\d-\d\d-\d{4} \d\d:\d\d:\d\d(\.\d+)?,Watts,")
CHANNEL = re.compile(r"Ch\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PtDaemon:
    """Key,value pairs, one sample a line. An analyser averages over the second between two lines."""

    @property
    def averaging_s(self) -> float:
        return 1.0

    @property
    def grade(self) -> Grade:
        return "A"

    @property
    def scope(self) -> str:
        return "wall"

    def recognises(self, head: Sequence[str]) -> bool:
        return any(START.match(line.strip()) for line in head)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return (WALL,) if WALL in rails else ()

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError where the dates of two lines cannot be told apart as neighbours."""
        yield from blocks(_rows(lines, doubts))


def _rows(lines: Iterable[str], doubts: Doubts) -> Iterator[Row]:
    calendar = _Calendar()
    for count, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split(",")]
        if cells[0] != "Time":
            if cells != [""] and cells[0] != "Uncertainty":
                doubts.add("bad_lines", f"line {count} does not begin with Time: {line[:60]!r}")
            continue
        match = STAMP.fullmatch(cells[1]) if len(cells) > 2 else None
        if match is None or cells[2] != "Watts" or len(cells) < 5:
            doubts.add("bad_lines", f"line {count} holds no time or no watts: {line[:60]!r}")
            continue
        at = calendar.seconds(match, count)
        if at is None:
            doubts.add("bad_lines", f"line {count} is stamped {cells[1]!r}, which is no date and time")
            continue
        yield Row(at, _watts(cells[2:], doubts, count))


def _watts(cells: Sequence[str], doubts: Doubts, line: int) -> dict[str, float]:
    """{rail: watts} of one line; a rail that comes twice is NaN."""
    rail, found = WALL, dict[str, float]()
    for key, text in itertools.pairwise(cells[:-1]):  # the last one may be cut, and never is a figure of watts
        if CHANNEL.fullmatch(key):
            rail = key.lower()
        if key != "Watts":
            continue
        value = number(text)
        if not 0 <= value < MOST_W:
            doubts.add("invalid_values", f"line {line} says {text!r} watts")
            value = math.nan
        if rail in found:
            doubts.add("duplicate_rail", f"line {line} gives the watts of {rail} twice")
            value = math.nan
        found[rail] = value
    return found


class _Calendar:
    """Seconds since the first line's midnight, from dates whose order of day and month is found out when one changes."""

    def __init__(self) -> None:
        self._date = ""
        self._days = 0
        self._day_first: bool | None = None

    def seconds(self, match: re.Match[str], line: int) -> float | None:
        """None for what is no date and time. Raises MeterError where a date does not follow the last one."""
        text, hour, minute, second = match[0].partition(" ")[0], int(match[4]), int(match[5]), float(match[6])
        if hour > 23 or minute > 59 or second >= 61 or not any(_day(text, first) for first in (True, False)):
            return None
        if self._date and text != self._date:
            self._turn(text, line)
        self._date = text
        return self._days * DAY_S + hour * 3600 + minute * 60 + second

    def _turn(self, text: str, line: int) -> None:
        orders = (True, False) if self._day_first is None else (self._day_first,)
        following = [first for first in orders if _follows(_day(self._date, first), _day(text, first))]
        if len(following) != 1:
            raise MeterError(
                f"in line {line} the date turns from {self._date} to {text}, which is not the next day in one reading of day and month: "
                "split the file there, or give --interval after mending the dates"
            )
        self._day_first = following[0]
        self._days += 1


def _day(text: str, day_first: bool) -> date | None:
    one, two, year = (int(part) for part in text.split("-"))
    try:
        return date(year, two, one) if day_first else date(year, one, two)
    except ValueError:
        return None


def _follows(first: date | None, second: date | None) -> bool:
    return first is not None and second is not None and (second - first).days == 1
