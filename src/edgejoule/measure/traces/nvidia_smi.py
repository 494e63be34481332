"""What ``nvidia-smi --query-gpu=timestamp,index,power.draw … --format=csv -lms 100`` prints. Grade C, scope: the GPU's board.

``power.draw.instant`` updates every 0.1 s and is preferred; ``power.draw`` (and ``power.draw.average``) is a mean over the last second
from Ampere on (arXiv 2312.02741). Stamps are local time to the millisecond. Rows of several GPUs belong to one sample until a GPU comes
again. Does not know the driver's XML (``-q -x``) nor ``dmon``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import POWER_UNITS, factor, number
from edgejoule.measure.traces.rows import MOST_W, Row, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

INSTANT, MEANS = "power.draw.instant", ("power.draw", "power.draw.average")
BURST, MOST_BURSTS = 0.1, 3  # a step so much shorter than the one before, again and again: several GPUs, each stamped by itself
KEYS = ("index", "uuid", "gpu_uuid", "pci.bus_id", "gpu_bus_id")  # what tells GPUs apart, best first
INSTANT_S, MEAN_OVER_S = 0.1, 1.0
EPOCH = datetime(1970, 1, 1)
STAMP = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d(\.\d{1,6})?")
HEADLESS = re.compile(STAMP.pattern + ",")
COLUMN = re.compile(r"([\w.]+)(?:\s*\[(\w+)\])?")
RAIL = re.compile(r"[\w:.-]{1,60}")
CELL = re.compile(r"([-+]?[\d.eE+-]+)\s*(\w*)")


@dataclass(frozen=True, slots=True)
class NvidiaSmi:
    """Comma-separated values with a header, units in the header (``power.draw [W]``) or in the cells (``56.12 W``)."""

    _instant: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)  # whether the file read last had it

    @property
    def averaging_s(self) -> float:
        """0.1 s where the file holds instant power, else the second of ``power.draw``."""
        return INSTANT_S if self._instant and all(self._instant) else MEAN_OVER_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "gpu"

    def recognises(self, head: Sequence[str]) -> bool:
        return any(_is_header(line) for line in head) or (bool(head) and all(HEADLESS.match(line) for line in head))

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        """All GPUs together."""
        return tuple(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError where there is no header, no power column, no unit, or GPUs that cannot be told apart."""
        yield from blocks(self._rows(lines, hints, doubts))

    def _rows(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Row]:
        header: _Header | None = None
        gathered: dict[str, float] = {}
        since = last = step_s = math.nan
        bursts = 0
        self._instant.clear()
        for count, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if _is_header(line):
                header = _Header(line, hints)
                continue
            if header is None:
                if HEADLESS.match(line):
                    raise MeterError("the file has no header, so its columns have no names: log again without noheader, or add that line")
                continue  # a shell's own words before the log
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) != header.width:
                doubts.add("bad_lines", f"line {count} has {len(cells)} values, where the header names {header.width}: {line[:60]!r}")
                continue
            if not header.column:
                self._instant.append(header.choose(cells) == INSTANT)
            rail, at = header.rail(cells), _seconds(cells, header, doubts, count)
            if not RAIL.fullmatch(rail):
                doubts.add("bad_lines", f"line {count} names no GPU: {line[:60]!r}")
                continue
            step_s, before_s = at - last, step_s
            last = at
            bursts += step_s < BURST * before_s
            if not header.keyed and hints.interval_s is None and (at == since or bursts > MOST_BURSTS):
                raise MeterError(
                    f"line {count} was stamped together with the one before, and no column tells GPUs apart: "
                    "add index to the query, and log again"
                )
            if rail in gathered:
                yield Row(since, gathered)
                gathered = {}
            if not gathered:
                since = at
            gathered[rail] = header.watts(cells, doubts, count)
        if gathered:
            yield Row(since, gathered)


class _Header:
    """Where the stamp, the GPU and the power stand."""

    def __init__(self, line: str, hints: TraceHints) -> None:
        found = [COLUMN.fullmatch(name.strip()) for name in line.split(",")]
        self._names = [match[1].lower() if match else "" for match in found]
        self._units = [match[2] if match else None for match in found]
        self._said = hints.power_unit
        self.width = len(self._names)
        self.stamp = self._names.index("timestamp") if "timestamp" in self._names else None
        key = next((name for name in KEYS if name in self._names), None)
        self._key = None if key is None else self._names.index(key)
        self._prefix = "gpu" if key == "index" else ""
        self._unit_in_cells = False
        self.column = ""  # the power column, once a row has shown which of them holds numbers

    @property
    def keyed(self) -> bool:
        return self._key is not None

    def rail(self, cells: Sequence[str]) -> str:
        return "gpu" if self._key is None else f"{self._prefix}{cells[self._key]}"

    def choose(self, cells: Sequence[str]) -> str:
        """The best power column that this first row has a number in; else the best there is."""
        there = [name for name in (INSTANT, *MEANS) if name in self._names]
        if not there:
            raise MeterError("the header names no power: add power.draw.instant (or power.draw) to the query, and log again")
        valid = [name for name in there if CELL.fullmatch(cells[self._names.index(name)])]
        self.column = (valid or there)[0]
        return self.column

    def watts(self, cells: Sequence[str], doubts: Doubts, line: int) -> float:
        text = cells[self._names.index(self.column)]
        match = CELL.fullmatch(text)
        value = number(match[1]) if match else math.nan
        if match and not math.isnan(value):
            unit = match[2] or self._units[self._names.index(self.column)] or self._said
            if not unit:
                raise MeterError(f"neither the header nor the cells give a unit of {self.column}: say it with --power-unit")
            value *= math.nan if match[2] and match[2] not in POWER_UNITS else factor(unit, POWER_UNITS, "power")
            value *= math.nan if self._unit_in_cells and not match[2] else 1.0  # 56.12 W, cut to 5
            self._unit_in_cells |= bool(match[2])
        if not 0 <= value < MOST_W:
            doubts.add("invalid_values", f"line {line} says {text!r} of {self.column}")
            return math.nan
        return value


def _is_header(line: str) -> bool:
    names = [name.strip().partition(" [")[0].lower() for name in line.split(",")]
    return any(name in (INSTANT, *MEANS) for name in names)


def _seconds(cells: Sequence[str], header: _Header, doubts: Doubts, line: int) -> float:
    """Seconds since 1970 as if local time were UTC; NaN where there is no stamp. A clock that is set back shows as time going back."""
    if header.stamp is None:
        return math.nan
    text = cells[header.stamp]
    try:
        if not STAMP.fullmatch(text):
            raise ValueError
        day, _, rest = text.replace("/", "-").partition(" ")
        whole, _, part = rest.partition(".")
        at = datetime.fromisoformat(f"{day}T{whole}")
    except ValueError:
        doubts.add("bad_lines", f"line {line} is stamped {text!r}, where 2023/07/14 10:12:46.483 was expected")
        return math.nan
    return (at - EPOCH).total_seconds() + (float(f"0.{part}") if part else 0.0)
