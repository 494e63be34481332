"""Monsoon power monitors: PowerTool's CSV export, PyMonsoon's CSV, and what AOSP's monsoon.py prints.

PyMonsoon calls its stamps milliseconds and writes seconds, one stamp for all samples of a USB packet (its sampleEngine.py); numpy 2
makes it write ``np.float64(3.7)``. Its granularity above 1 does not decimate but keeps the first samples of each batch, which no
stamp gives away unless the rows are far from 5000 a second. AOSP's script prints amperes, no voltage and at most whole seconds, so
that it has to be named. ``.pt4`` and ``.pt5`` files are binary and not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import (
    CURRENT_UNITS,
    POWER_UNITS,
    TIME_UNITS,
    VOLTAGE_UNITS,
    Layout,
    Paced,
    Samples,
    factor,
    number,
    opening,
    plausible,
    table,
    unit_in,
)
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

HZ = 5000.0
RATE = 0.1  # rows a second may differ from 5000 by so much: packets get lost
POWERTOOL = {"power": POWER_UNITS, "current": CURRENT_UNITS, "voltage": VOLTAGE_UNITS}


@dataclass(frozen=True, slots=True)
class Monsoon:
    """One rail, ``main``: the Main channel's mean power, else volts times milliamperes. USB, Aux and maxima are not used."""

    @property
    def averaging_s(self) -> float:
        return 1 / HZ

    @property
    def grade(self) -> Grade:
        return "B"

    @property
    def scope(self) -> str:
        return "board-in"

    def recognises(self, head: Sequence[str]) -> bool:
        return bool(head) and (_binary(head) or _header(head[0]) is not None)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError for a binary file, a missing column or voltage, and stamps that no Monsoon can have made."""
        head, rest = opening(lines)
        if _binary(head):
            raise MeterError("this is a PowerTool file (.pt4 or .pt5), which is binary: export it as CSV from PowerTool (File, Export)")
        at = next((n for n, line in enumerate(head) if line.strip()), 0)
        first = head[at] if head else ""
        header = _header(first)
        if header is None:
            yield from _aosp(rest, first, hints, doubts)
            return
        for _ in range(at + 1):
            next(rest, None)
        columns, factors = _columns(header, hints)
        body = [line for line in head[at + 1 :] if line.strip()][:50]
        layout = Layout(header.delimiter, len(header.names), tuple(columns.values()), _decimal(header, body, hints))
        clock = _PacketClock(hints, doubts) if header.packets and hints.interval_s is None else None
        row = 1
        for values in table(rest, layout, doubts, at + 2):
            found = {role: values[:, n] * factors[role] for n, role in enumerate(columns)}
            stamps = found["time"]
            volts: Samples | float = found.get("voltage", hints.voltage_v or 0.0)
            watts = found["power"] if "power" in found else found["current"] * volts
            yield Block(stamps if clock is None else clock.times(stamps), {"main": plausible(watts, doubts, row)}, {})
            row += len(values)


@dataclass(frozen=True, slots=True)
class _Header:
    names: tuple[str, ...]  # as written, unquoted
    delimiter: str
    packets: bool  # PyMonsoon's: one stamp a USB packet


def _header(line: str) -> _Header | None:
    """The header of PowerTool or PyMonsoon, or None."""
    for delimiter in (",", ";", "\t"):
        names = tuple(name.strip().strip('"').strip() for name in line.rstrip(f"{delimiter} ").split(delimiter))
        lowered = [name.lower() for name in names]
        if "main(ma)" in lowered and lowered[0] in ("time(ms)", "time(s)"):
            return _Header(names, delimiter, True)
        if any(name.startswith("time") for name in lowered) and any(re.match(r"main (avg )?(power|current)\b", name) for name in lowered):
            return _Header(names, delimiter, False)
    return None


def _columns(header: _Header, hints: TraceHints) -> tuple[dict[str, int], dict[str, float]]:
    """Which column holds what, and what its numbers are worth in SI. PyMonsoon's time stays as it is written."""
    named = {"current": r"main\(ma\)", "voltage": r"main voltage ?\(v\)"} if header.packets else {}
    patterns = {role: named.get(role, rf"main (avg )?{role}\b") for role in POWERTOOL} | {"time": r"time\b"}
    found = {role: _one(header.names, pattern) for role, pattern in patterns.items()}
    if found["power"] is not None:
        found["current"] = found["voltage"] = None
    columns = {role: column for role, column in found.items() if column is not None}
    if "time" not in columns:
        raise MeterError(f"no column is called Time (s), there are {', '.join(header.names)}: export the file again with its time column")
    if "power" not in columns and "current" not in columns:
        raise MeterError(f"no column holds the Main channel's mean power or current, there are {', '.join(header.names)}: export them too")
    if "power" not in columns and "voltage" not in columns and hints.voltage_v is None:
        raise MeterError("the file holds the Main current and no voltage: add --voltage with the volts that were set")
    factors = {role: _worth(header.names[column], POWERTOOL[role], role) for role, column in columns.items() if role != "time"}
    time = 1.0 if header.packets else _worth(header.names[columns["time"]], TIME_UNITS, "time")
    return columns, factors | {"time": time}


def _one(names: Sequence[str], pattern: str) -> int | None:
    found = [column for column, name in enumerate(names) if re.match(pattern, name.lower())]
    if len(found) > 1:
        raise MeterError(f"the columns {', '.join(names[column] for column in found)} say the same: leave one of them in the file")
    return found[0] if found else None


def _worth(name: str, units: dict[str, float], what: str) -> float:
    unit = unit_in(name, units)
    if not unit:
        raise MeterError(f"the column {name!r} names no known unit of {what}: read the file with --format csv and the columns' units")
    return factor(unit, units, what)


def _decimal(header: _Header, body: Sequence[str], hints: TraceHints) -> str:
    if hints.decimal or header.delimiter == ",":
        return hints.decimal or "."
    return "," if any("," in line for line in body) else "."


def _binary(head: Sequence[str]) -> bool:
    return any("Power Tool" in line and ("\0" in line or "\ufffd" in line) for line in head[:3])


class _PacketClock:
    """Seconds of PyMonsoon's rows: their number over 5000, moved on where the stamps show that samples were lost."""

    def __init__(self, hints: TraceHints, doubts: Doubts) -> None:
        self._unit, self._doubts = hints.time_unit, doubts
        self._second = 0.0  # what a stamp of 1 is worth; 0 until known
        self._last = np.nan
        self._paced = Paced(1 / HZ)

    def times(self, stamps: Samples) -> Samples:
        """For (N,) stamps as written. Only the first row of a packet shows when it came, and the first packet of all may be cut."""
        known = np.isfinite(stamps)
        before = np.concatenate(([self._last], stamps[:-1]))
        starts = np.where(known & np.isfinite(before) & (stamps != before), stamps, np.nan)
        if np.any(known):
            self._last = float(stamps[known][-1])
        if not self._second:
            self._second = self._infer(starts)
        return self._paced.times(starts * self._second)

    def _infer(self, starts: Samples) -> float:
        moved = np.flatnonzero(np.isfinite(starts))
        back = np.flatnonzero(np.diff(starts[moved]) < 0)
        moved = moved[: back[0] + 1] if len(back) else moved  # the clock will say that time goes back
        span = float(starts[moved[-1]] - starts[moved[0]]) if len(moved) > 1 else 0.0
        if span <= 0:
            raise MeterError("the stamps do not show how fast the rows came: give --interval (0.0002 where nothing was left out)")
        rate = float(moved[-1] - moved[0]) / span  # rows for a stamp of 1
        said = {self._unit: factor(self._unit, TIME_UNITS, "time")} if self._unit else {"s": 1.0, "ms": 1e-3}
        for unit, seconds in said.items():
            if abs(rate / seconds / HZ - 1) <= RATE:
                self._doubts.add("stamps_rebuilt", "the stamps are those of USB packets; a row was taken every 0.0002 s")
                if unit == "s" and not self._unit:
                    self._doubts.add(
                        "unit_inferred", f"the stamps count seconds, whatever the header says: 1 of them holds {rate:.0f} rows"
                    )
                return seconds
        raise MeterError(
            f"a stamp of 1 holds {rate:.4g} rows, where 5000 a second were expected: if PyMonsoon's granularity was above 1, rows are "
            "missing and no energy is right; give --interval if you know that the rows are evenly spaced"
        )


def _aosp(lines: Iterator[str], first: str, hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
    """monsoon.py's lines: amperes, after whole seconds with --timestamp, before the USB channel's or a running mean."""
    cells = [number(text) for text in first.split()]
    if not 1 <= len(cells) <= 3 or any(cell != cell for cell in cells):
        raise MeterError(f"the file begins with {first[:60]!r}: expected PowerTool's or PyMonsoon's header, or the numbers of monsoon.py")
    stamped = len(cells) > 1 and "." not in first.split()[0]
    if hints.voltage_v is None or hints.interval_s is None:
        raise MeterError(
            "monsoon.py prints amperes, and neither volts nor the samples' times: "
            "add --voltage with the volts set, and --interval (one over its --hz)"
        )
    row = 1
    for values in table(lines, Layout("", len(cells), (1 if stamped else 0,)), doubts):
        watts = plausible(values[:, 0] * hints.voltage_v, doubts, row)
        row += len(values)
        yield Block(np.full(len(values), np.nan), {"main": watts}, {})
