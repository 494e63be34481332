"""Smart plugs as JSON, one line a sample: Tasmota's telemetry and Shelly's status. Grade C, scope: the wall.

A plug averages over about a second and Tasmota prints whole watts, so that 5 W may be 4.5 or 5.5: for long windows and large loads. What
stands before the brace may be a stamp of the recorder's own (seconds since 1970, or a date); it is preferred. Tasmota's ``Time`` is local
time of one second's resolution; a change of the clock shows as time going back. Shelly's lines mostly have no stamp: give ``interval_s``.
A plug's own counter (kilowatt-hours, watt-hours) is kept beside its power. Does not know Kasa, nor Shelly's first generation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from edgejoule.caveats import Doubts
from edgejoule.measure.traces.reading import ENERGY_UNITS, number
from edgejoule.measure.traces.rows import MOST_W, Row, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

AVERAGING_S = 1.0
PLUG = "plug"
MOST_PHASES = 16
DATE = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?(Z|[+-]\d\d:\d\d)?")
UNIX = re.compile(r"\s*(\d{9,10}(?:\.\d+)?)(?![\w.])")  # at the very beginning: a topic may hold as many digits
EARLIEST_S = 5e8
COMPONENT = re.compile(r"(?:switch|pm1|cover|light|em1):(\d+)")
RESULT = ("params", "result")  # what Shelly's RPC wraps a status in


class _Twice:
    """Stands for the values of a key that comes twice in one object."""


Figures = tuple[dict[str, Any], dict[str, Any], Any]  # {rail: watts}, {rail: counter}, a stamp: values as the JSON has them


@dataclass(frozen=True, slots=True)
class Tasmota:
    """``{"Time":"2023-05-19T20:52:56","ENERGY":{"Total":514.153,"Power":56,…}}``, also in ``StatusSNS``; lists are one rail a phase."""

    @property
    def averaging_s(self) -> float:
        return AVERAGING_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "wall"

    def recognises(self, head: Sequence[str]) -> bool:
        return any(_tasmota(_object(line)) is not None for line in head)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return _plugs(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        yield from blocks(_rows(lines, _tasmota, "kWh", doubts))


@dataclass(frozen=True, slots=True)
class Shelly:
    """``{"apower":106.3,"aenergy":{"total":267.813},…}`` of the second generation on, also in ``switch:0``, ``result`` or ``params``."""

    @property
    def averaging_s(self) -> float:
        return AVERAGING_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "wall"

    def recognises(self, head: Sequence[str]) -> bool:
        return any(_shelly(_object(line)) is not None for line in head)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return _plugs(rails)

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        yield from blocks(_rows(lines, _shelly, "Wh", doubts))


def _plugs(rails: Sequence[str]) -> tuple[str, ...]:
    """Outlets or phases add up; a counter over all of them is none of them."""
    return tuple(rail for rail in rails if rail.startswith(PLUG))


def _rows(lines: Iterable[str], figures: Callable[[Any], Figures | None], unit: str, doubts: Doubts) -> Iterator[Row]:
    counters = _Counters(ENERGY_UNITS[unit], doubts)
    for count, line in enumerate(lines, 1):
        if not line.strip("\0 \t"):
            continue
        found = figures(_object(line))
        if found is None:
            if "{" not in line or _object(line) is None:  # other messages of a plug are whole objects
                doubts.add("bad_lines", f"line {count} is no JSON of a plug's: {line.strip()[:60]!r}")
            continue
        power, energy, stamp = found
        where = f"line {count}"
        watts = {rail: _valid(value, MOST_W, f"{where}: the power of {rail}", doubts) for rail, value in power.items()}
        yield Row(
            _seconds(line.partition("{")[0], stamp), watts, {rail: counters.joules(rail, value, where) for rail, value in energy.items()}
        )


class _Counters:
    """A plug's own counters in joules; one that goes back (reset, or damaged) is not valid from there on until it has caught up."""

    def __init__(self, unit_j: float, doubts: Doubts) -> None:
        self._unit_j, self._doubts = unit_j, doubts
        self._last: dict[str, float] = {}

    def joules(self, rail: str, value: Any, where: str) -> float:
        what = f"{where}: the counter of {rail}"
        found = _valid(value, 1e9, what, self._doubts) * self._unit_j
        if found < self._last.get(rail, 0.0):
            self._doubts.add("invalid_values", f"{what} goes back to {value!r}")
            return math.nan
        if not math.isnan(found):
            self._last[rail] = found
        return found


def _tasmota(top: Any) -> Figures | None:
    status = _get(top, "StatusSNS") or top
    energy = _get(status, "ENERGY")
    power = energy if isinstance(energy, _Twice) else _get(energy, "Power")
    if power is None:
        return None
    rails = _phases(power)
    total = _get(energy, "Total")
    counters = _phases(total) if isinstance(total, list) == isinstance(power, list) else {"all": total}
    return rails, {} if total is None else counters, _get(status, "Time")


def _phases(value: Any) -> dict[str, Any]:
    if not isinstance(value, list):
        return {PLUG: value}
    return {f"{PLUG}{n}": one for n, one in enumerate(value[:MOST_PHASES])}


def _shelly(top: Any) -> Figures | None:
    status = next((inner for key in RESULT if isinstance(inner := _get(top, key), dict)), top)
    if not isinstance(status, dict):
        return None
    found = {f"{PLUG}{match[1]}": part for key, part in status.items() if (match := COMPONENT.fullmatch(key))}
    outlets = {rail: part for rail, part in found.items() if isinstance(part, _Twice) or _get(part, "apower") is not None}
    if "apower" in status:
        outlets[PLUG] = status
    if not outlets:
        return None
    power = {rail: part if isinstance(part, _Twice) else part["apower"] for rail, part in outlets.items()}
    totals = {rail: _get(_get(part, "aenergy"), "total") for rail, part in outlets.items()}
    stamp = _get(_get(status, "sys"), "unixtime") or _get(status, "ts")
    return power, {rail: value for rail, value in totals.items() if value is not None}, stamp


def _get(inside: Any, key: str) -> Any:
    return inside.get(key) if isinstance(inside, dict) else None


def _object(line: str) -> Any:
    """The object of a line, from its first brace on; None where there is none. A key that comes twice has a ``_Twice``."""
    at = line.find("{")
    if at < 0:
        return None
    try:
        return json.loads(line[at:].strip("\0 \t"), object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None


def _pairs(pairs: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _Twice() if key in found else value
    return found


def _valid(value: Any, most: float, what: str, doubts: Doubts) -> float:
    """A number from 0 to ``most``; else NaN and a doubt."""
    if isinstance(value, _Twice):
        doubts.add("duplicate_rail", f"{what} comes twice")
        return math.nan
    fit = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < most
    if not fit:
        doubts.add("invalid_values", f"{what} is {str(value)[:20]!r}")
    return float(value) if fit else math.nan


def _seconds(prefix: str, stamp: Any) -> float:
    """Seconds since 1970 by the recorder's stamp before the brace, else the plug's own; NaN where neither is one."""
    own = float(stamp) if isinstance(stamp, int | float) and not isinstance(stamp, bool) and EARLIEST_S < stamp < 1e11 else math.nan
    for text in (prefix, stamp if isinstance(stamp, str) else ""):
        date = DATE.search(text)
        if date:
            return _date_s(date)
        unix = UNIX.match(text)
        if unix and number(unix[1]) > EARLIEST_S:
            return number(unix[1])
    return own


def _date_s(match: re.Match[str]) -> float:
    """Local time counts as if it were UTC: only differences matter."""
    try:
        at = datetime.fromisoformat(match[1].replace(" ", "T") + (match[3] or "+00:00").replace("Z", "+00:00"))
    except ValueError:
        return math.nan
    whole = (at - datetime(1970, 1, 1, tzinfo=timezone.utc)).total_seconds()
    return whole + (float(f"0.{match[2]}") if match[2] else 0.0)
