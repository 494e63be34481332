"""Any table of numbers, one sample a line: columns and units as the user says, or as the header's names say without doubt.

Two units that are both plausible are asked about, never chosen: what a column's numbers look like is only quoted. Knows no
instrument, so that its grade and scope are the user's to say: ``--format 'csv(grade="B", scope="board-in")'``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

UNITS = {"time": TIME_UNITS, "power": POWER_UNITS, "voltage": VOLTAGE_UNITS, "current": CURRENT_UNITS}
ROLES = {
    "time": frozenset(("time", "timestamp", "timestamps", "t", "elapsed")),
    "power": frozenset(("power", "p", "watts", "watt", "milliwatts")),
    "voltage": frozenset(("voltage", "u", "v", "volts", "vbus")),
    "current": frozenset(("current", "i", "amps", "amperes")),
}
NOT_MEAN = frozenset(("max", "min", "peak", "std", "limit", "cap", "accumulated", "factor", "apparent", "reactive", "state"))
FOREIGN = ("main avg", "main(ma)", "sample_in_packet", "power.draw", "accumulated power", "#time")  # headers of the other formats
THOUSANDS = re.compile(r"[1-9]\d{0,2}(,\d{3})+")
DELIMITERS = (",", ";", "\t", "")


@dataclass(frozen=True, slots=True)
class Csv:
    """A rail for each column of power; or one, ``power``, of volts times amperes."""

    grade: Grade = "C"
    scope: str = "unknown"
    averaging_s: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.averaging_s) and self.averaging_s >= 0):
            raise ValueError(f"averaging_s={self.averaging_s} is not 0 or above")

    def recognises(self, head: Sequence[str]) -> bool:
        if any(mark in line.lower() for mark in FOREIGN for line in head[:3]):
            return False
        try:
            plan = _plan(head, TraceHints())
        except MeterError:
            return False
        return sum(1 for line in head[plan.skip :] if plan.readable(line)) >= 2

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rails) if len(rails) == 1 else ()

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError where a column is missing or twice, a unit is not known, or neither stamps nor an interval are."""
        head, rest = opening(lines)
        plan = _plan(head, hints)
        for _ in range(plan.skip):
            next(rest, None)
        row = 1
        for values in table(rest, plan.layout, doubts, plan.skip + 1):
            found = {role: values[:, n] * worth for n, (role, worth) in enumerate(plan.factors.items())}
            times = found.pop("time", np.full(len(values), np.nan))
            if "current" in found:
                volts: Samples | float = found.get("voltage", hints.voltage_v or 0.0)
                found = {"power": found["current"] * volts}
            yield Block(times, {rail: plausible(watts, doubts, row, signed=False) for rail, watts in found.items()}, {})
            row += len(values)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How to read a table. ``factors``: {"time" | "voltage" | "current" | a column of power: its unit in SI}, in the layout's order."""

    skip: int  # lines before the first row
    layout: Layout
    factors: Mapping[str, float]

    def readable(self, line: str) -> bool:
        parts = self.layout.split(line)
        return len(parts) == self.layout.width and all(
            number(parts[n], self.layout.decimal) == number(parts[n], self.layout.decimal) for n in self.layout.columns
        )


@dataclass(frozen=True, slots=True)
class _Header:
    """``names`` are numbers from 1 where the table has no header."""

    at: int  # line in the file, from 0
    skip: int
    delimiter: str
    names: tuple[str, ...]


def _plan(head: Sequence[str], hints: TraceHints) -> _Plan:
    wanted = [name for name in (hints.time_col, hints.voltage_col, hints.current_col) if name]
    header = _header(head, wanted, hints.power_col)
    roles = _roles(header.names, hints)
    body = [line for line in head[header.skip :] if line.strip()][:50]
    layout = Layout(header.delimiter, len(header.names), tuple(roles.values()))
    rows = [cells for line in body if len(cells := layout.split(line)) == layout.width]
    decimal = _decimal(header.delimiter, [cells[column] for cells in rows for column in layout.columns], hints)
    layout = Layout(header.delimiter, len(header.names), tuple(roles.values()), decimal)
    factors = {role: _factor(role, header.names[column], [cells[column] for cells in rows], hints) for role, column in roles.items()}
    return _Plan(header.skip, layout, factors)


def _header(head: Sequence[str], wanted: Sequence[str], power: str) -> _Header:
    """The line that names the wanted columns; else one that stands over a row of as many fields; else one that speaks of power."""
    over, alone = list[_Header](), list[_Header]()
    for at, line in enumerate(head):
        for delimiter in DELIMITERS:
            names = _names(line, delimiter)
            if delimiter and len(names) < 2:
                continue
            found = _Header(at, at + 1, delimiter, names)
            called = (*wanted, *_split(power, names))
            if called and not any(map(_is_number, names)) and all(_named(names, name) for name in called):
                return found
            below = next((text for text in head[at + 1 :] if text.strip()), "")
            if names and not any(map(_is_number, names)):
                guesses = over if _fits(below, delimiter, len(names)) else alone
                guesses += [found] if guesses is over or any(_able(names, role) for role in ("power", "current")) else []
    if over or alone:
        return max(over or alone, key=lambda guess: (len(guess.names), -guess.at))
    first = next((at for at, line in enumerate(head) if line.strip()), None)
    if first is None:
        raise MeterError("the file holds no line: expected a table with a header")
    return _headless(head, first)


def _headless(head: Sequence[str], first: int) -> _Header:
    for delimiter in DELIMITERS:
        cells = _names(head[first], delimiter)
        if _numeric(cells) and (len(cells) > 1 or not delimiter):
            return _Header(first, first, delimiter, tuple(str(n + 1) for n in range(len(cells))))
    raise MeterError(f"no header stands over rows of numbers in the file's first {len(head)} lines ({head[first][:60]!r} is the first)")


def _names(line: str, delimiter: str) -> tuple[str, ...]:
    text = line.strip().removeprefix("#").strip()
    if delimiter and text.endswith(delimiter):
        text = text[: -len(delimiter)]
    return tuple(name.strip('"').strip() for name in Layout(delimiter, 0, ()).split(text))


def _numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(_is_number(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    return not math.isnan(number(cell)) or not math.isnan(number(cell, ","))


def _fits(line: str, delimiter: str, width: int) -> bool:
    cells = Layout(delimiter, width, ()).split(line)
    return len(cells) == width and any(_is_number(cell) for cell in cells)


def _split(power: str, names: Sequence[str]) -> list[str]:
    return [power] if power in names else [name.strip() for name in power.split(",") if name.strip()]


def _named(names: Sequence[str], wanted: str) -> list[int]:
    """Where a column is: by its exact name, else without regard to case."""
    exact = [n for n, name in enumerate(names) if name == wanted]
    return exact or [n for n, name in enumerate(names) if name.lower() == wanted.lower()]


def _index(names: Sequence[str], wanted: str) -> list[int]:
    """Where a column is: by its name, else by its number from 1."""
    number = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 6 else 0
    return _named(names, wanted) or ([number - 1] if 1 <= number <= len(names) else [])


def _column(names: Sequence[str], wanted: str, option: str) -> int:
    found = _index(names, wanted)
    if len(found) != 1:
        how = "no column is" if not found else f"{len(found)} columns are"
        raise MeterError(f"{how} called {wanted!r}, there are {', '.join(names)[:500]}: name one of them with {option}")
    return found[0]


def _roles(names: Sequence[str], hints: TraceHints) -> dict[str, int]:
    """Which column is the time, and which are power, or voltage and current."""
    roles: dict[str, int] = {}
    if hints.interval_s is None:
        roles["time"] = (
            _column(names, hints.time_col, "--time-col") if hints.time_col else _only(names, "time", "--time-col, or --interval")
        )
    if hints.power_col:
        for name in _split(hints.power_col, names):
            if name in UNITS and name != "power":
                raise MeterError(f"a column of power is called {name!r}: rename it in the file, or name another with --power-col")
            roles[name] = _column(names, name, "--power-col")
        return roles
    if not (hints.current_col or hints.voltage_col) and _able(names, "power"):
        column = _only(names, "power", "--power-col")
        return roles | {names[column]: column}
    roles["current"] = _column(names, hints.current_col, "--current-col") if hints.current_col else _current(names)
    if hints.voltage_col:
        roles["voltage"] = _column(names, hints.voltage_col, "--voltage-col")
    elif hints.voltage_v is None:
        roles["voltage"] = _only(names, "voltage", "--voltage-col, or --voltage with the volts")
    return roles


def _current(names: Sequence[str]) -> int:
    if not _able(names, "current"):
        raise MeterError(
            f"no column can be told to be power, or current, there are {', '.join(names)[:500]}: "
            "name it with --power-col, or --voltage-col and --current-col"
        )
    return _only(names, "current", "--current-col")


def _able(names: Sequence[str], role: str) -> list[int]:
    """The columns whose names speak of a role and of a mean, not of an extreme or a limit."""
    found = []
    for n, name in enumerate(names):
        words = set(re.findall(r"[a-z]+", name.lower()))
        if words & ROLES[role] and not words & (NOT_MEAN - {"min"} if role == "time" else NOT_MEAN):
            found.append(n)
    return found


def _only(names: Sequence[str], role: str, option: str) -> int:
    found = _able(names, role)
    if len(found) == 1:
        return found[0]
    which = f"{' and '.join(names[n] for n in found)} may both be" if found else "no column can be told to be"
    raise MeterError(f"{which} the {role}, there are {', '.join(names)[:500]}: name it with {option}")


def _factor(role: str, name: str, cells: Sequence[str], hints: TraceHints) -> float:
    kind = role if role in UNITS else "power"
    said = {"time": hints.time_unit, "power": hints.power_unit, "voltage": hints.voltage_unit, "current": hints.current_unit}[kind]
    unit = said or unit_in(name, UNITS[kind])
    if unit:
        return factor(unit, UNITS[kind], kind)
    if kind == "time" and cells and not any(map(_is_number, cells)):
        raise MeterError(f"the column {name!r} holds {cells[0][:40]!r}, which is no number of seconds: name another, or add --interval")
    likely = [text for text in ("W", "mW") if kind == "power"] or list(UNITS[kind])[:3]
    seen = f", and its values begin {', '.join(cells[:3])}" if cells else ""
    raise MeterError(f"the column {name!r} does not say its unit{seen}: add --{kind}-unit ({', '.join(likely)}, …)")


def _decimal(delimiter: str, cells: Sequence[str], hints: TraceHints) -> str:
    """The decimal point. Raises MeterError where commas may as well part thousands."""
    if hints.decimal not in ("", ".", ","):
        raise MeterError(f"the decimal point is {hints.decimal!r}: expected '.' or ',' after --decimal")
    commas = [cell for cell in cells if "," in cell]
    if hints.decimal or not commas:
        return hints.decimal or "."
    if all(THOUSANDS.fullmatch(cell) for cell in commas):
        raise MeterError(f"the comma in {commas[0]!r} may be a decimal point or part thousands: add --decimal ',' or --decimal '.'")
    return ","
