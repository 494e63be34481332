"""What ``perf stat -a -e power/energy-pkg/`` prints: a total and its time, or a line per interval (``-I``), as text or CSV (``-x,``).

Grade C, scope: the processor package, as RAPL (perf reads the same counters). Only package domains add up: cores and gpu are parts of
the package, psys contains it, ram lies beside it. Joules of intervals become a counter, which is exact; a total becomes one of two points.
Numbers are in the locale of whoever ran perf: the digits of a report tell a decimal comma from a thousands separator, or it is refused.
``<not counted>`` and ``<not supported>`` are absent, never 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces.reading import number
from edgejoule.measure.traces.rows import MOST_W, Row, RunningJoules, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

UPDATE_S = 0.001  # of RAPL's counters
WHOLE_FIRST = 1.5  # times the second interval: a first one that is longer began before the file did
ABSENT = ("<not counted>", "<not supported>")
EVENT = re.compile(r"power/energy-(\w+)/")
TEXT = re.compile(
    r"(?:(?P<stamp>[\d.,]+)\s+)?(?:(?P<part>[SDNC]\d+(?:-[A-Z]+\d+)*)\s+(?P<count>\d+)\s+)?"
    r"(?P<value>-?[\d.,]+(?=\s+Joules)|<not \w+>)\s+(?:Joules\s+)?power/energy-(?P<event>\w+)/"
)
PART = re.compile(r"[SDNC]\d+(?:-[A-Z]+\d+)*")
ELAPSED = re.compile(r"([\d.,]+)(?:\s+\+-\s+[\d.,]+)?\s+seconds time elapsed")
SEPARATORS = ",;\t|:"
LONGEST_S = 1e9


@dataclass(frozen=True, slots=True)
class Figure:
    """One event of a report or interval, as it is written. ``value`` is None where the event was not counted."""

    rail: str  # pkg, or S0-D0/pkg
    value: str | None
    stamp: str | None  # seconds since perf began, at the end of the interval
    decimal: str  # the decimal sign, where the line gives it away, else ""


@dataclass(frozen=True, slots=True)
class Perf:
    """Text or CSV of one ``perf stat``."""

    @property
    def averaging_s(self) -> float:
        return UPDATE_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "package"

    def recognises(self, head: Sequence[str]) -> bool:
        try:
            return any(figure(line) is not None for line in head)
        except MeterError:  # it is perf's, and read() says what is wrong with it
            return True

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        return tuple(rail for rail in rails if is_package(rail))

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Raises MeterError for a number of two readings, a total without its time (``interval_s`` gives it), or several reports."""
        yield from blocks(_from_the_start(_rows(lines, hints, doubts)))


def is_package(rail: str) -> bool:
    """Whether a rail is one of those that add up to the whole."""
    return rail.rpartition("/")[2] == "pkg"


def figure(line: str) -> Figure | None:
    """A line of text or CSV about an energy event; None for any other. A line that is cut or garbled is another."""
    event = EVENT.search(line)
    if event is None:
        return None
    before = line[: event.start()]
    separator = next((s for s in SEPARATORS if before.rstrip(" ").endswith(s)), "")
    if separator:
        return _csv(before.rstrip(" ")[:-1].split(separator), event[1], separator)
    match = TEXT.match(line.strip())
    if match is None:
        return None
    if match["count"] == "0":  # --per-core shows each core, though one counts for all
        return Figure("", None, None, "")
    rail = f"{match['part']}/{match['event']}" if match["part"] else match["event"]
    return Figure(rail, None if match["value"] in ABSENT else match["value"], match["stamp"], _sign(match["stamp"] or ""))


def _csv(cells: Sequence[str], event: str, separator: str) -> Figure | None:
    """[stamp,] [S0, count,] value, Joules: what stands before the event."""
    fields = [cell.strip() for cell in cells]
    if len(fields) < 2 or "summary" in fields or not (fields[-1] == "Joules" or fields[-2] in ABSENT):
        return None
    value, ahead = fields[-2], fields[:-2]
    part = next((cell for cell in ahead if PART.fullmatch(cell)), "")
    if part:
        at = ahead.index(part)
        if ahead[at + 1 :] == ["0"]:
            return Figure("", None, None, "")
        if len(ahead) != at + 2 or not ahead[at + 1].isdigit():
            return None
        ahead = ahead[:at]
    if len(ahead) > 1 or (separator == "," and ahead and "." not in ahead[0]):
        raise MeterError(
            f"perf wrote decimal commas into comma-separated values ({','.join(fields[:3])} …): run it again with LC_ALL=C, or with -x;"
        )
    decimal = "." if separator == "," else _sign(ahead[0] if ahead else "")
    return Figure(f"{part}/{event}" if part else event, None if value in ABSENT else value, ahead[0] if ahead else None, decimal)


def _sign(text: str) -> str:
    """The decimal sign of a number with so many digits behind it that none of them can be a thousands separator, else ""."""
    match = re.fullmatch(r"[\d.,]*?\d([.,])(?:\d{4,}|\d{1,2})", text)
    return match[1] if match else ""


def value_of(text: str, decimal: str) -> float:
    """A number whose other sign separates thousands; NaN where it is none. Raises MeterError for 2,306 where nobody knows the sign."""
    decimal = decimal or _sign(text) or ("." if "," not in text else "")
    if not decimal:
        if not re.fullmatch(r"\d{1,3}(,\d{3}){2,}", text):
            raise MeterError(
                f"{text!r} may be thousands or a decimal comma: say which with --decimal, or run perf again with LC_ALL=C and -x,"
            )
        decimal = "."
    other = "," if decimal == "." else "."
    whole, _, part = text.partition(decimal)
    if other in whole and not re.fullmatch(rf"\d{{1,3}}({re.escape(other)}\d{{3}})+", whole):
        return math.nan
    return number(f"{whole.replace(other, '')}.{part}" if part else whole.replace(other, ""))


def _seconds(text: str, decimal: str) -> float:
    """A stamp or an elapsed time, which perf always writes with decimals; NaN where it is none."""
    seconds = value_of(text, decimal) if not decimal or decimal in text else math.nan
    return seconds if seconds < LONGEST_S else math.nan


def _rows(lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Row]:
    report, intervals = _Report(hints, doubts), IntervalSums(doubts)
    for count, line in enumerate(lines, 1):
        elapsed = ELAPSED.search(line)
        if elapsed:
            report.close(elapsed[1], count)
            continue
        found = figure(line)
        if found is None:
            if "Joules" in line:
                doubts.add("bad_lines", f"line {count} is no figure of perf's: {line.strip()[:60]!r}")
        elif found.rail and found.stamp is None:
            report.add(found, count)
        elif found.rail:
            yield from intervals.add(found, hints.decimal, f"line {count}")
    yield from intervals.close()
    if not intervals.begun:
        yield from report.rows()


def _from_the_start(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, and before them the beginning of the first interval: 0 s, unless that interval is longer than the next (a lost head)."""
    first, second = next(rows, None), next(rows, None)
    if first is None:
        return
    if second is not None and 0 < first.time_s <= WHOLE_FIRST * (second.time_s - first.time_s):
        yield Row(0.0, energy_j={rail: 0.0 for rail, joules in first.energy_j.items() if not math.isnan(joules)})
    yield from (first,) if second is None else (first, second)
    yield from rows


class _Report:
    """Totals of one run and how long it took."""

    def __init__(self, hints: TraceHints, doubts: Doubts) -> None:
        self._hints, self._doubts = hints, doubts
        self._figures: dict[str, Figure] = {}
        self._closed = ""

    def add(self, found: Figure, line: int) -> None:
        if self._closed:
            raise MeterError(f"line {line} begins a second report of perf's, and the time between the two is unknown: split the file")
        if found.value is None or found.rail in self._figures:
            twice = found.rail in self._figures
            self._doubts.add(
                "duplicate_rail" if twice else "invalid_values", f"line {line}: {found.rail} " + ("again" if twice else "not counted")
            )
            self._figures[found.rail] = Figure(found.rail, None, None, "")
        else:
            self._figures[found.rail] = found

    def close(self, elapsed: str, line: int) -> None:
        if self._figures and not self._closed:
            self._closed = elapsed

    def rows(self) -> Iterator[Row]:
        """Two: the beginning and the end. Raises MeterError where nobody knows how long it took."""
        known = {rail: f for rail, f in self._figures.items() if f.value is not None}
        if not known:
            return
        if not self._closed and self._hints.interval_s is None:
            raise MeterError("the file has joules but no elapsed time: give --interval with the seconds that perf ran")
        texts = [self._closed, *(f.value or "" for f in known.values())]
        decimal = (
            self._hints.decimal or next((f.decimal for f in known.values() if f.decimal), "") or next(filter(None, map(_sign, texts)), "")
        )
        elapsed_s = _seconds(self._closed, decimal) if self._closed else self._hints.interval_s or math.nan
        if not elapsed_s > 0:
            raise MeterError(f"perf ran for {self._closed!r} seconds: expected more than 0, look at the file")
        joules = {rail: _joules(f, decimal, elapsed_s, self._doubts, rail) for rail, f in known.items()}
        yield Row(0.0, energy_j={rail: 0.0 for rail, value in joules.items() if not math.isnan(value)})
        yield Row(elapsed_s, energy_j=joules)


class IntervalSums:
    """Counters from the lines of ``perf stat -I``: a row once the stamp changes, or once all of ``events`` have come.

    They begin at the first stamp; whether its interval is a whole one, the next will tell.
    """

    def __init__(self, doubts: Doubts, events: int = 0) -> None:
        self._doubts, self._events = doubts, events
        self._stamp, self._at_s, self._before_s, self._latest_s = "", 0.0, 0.0, 0.0
        self._joules: dict[str, float] = {}
        self._sums = RunningJoules()
        self.begun = False

    def add(self, found: Figure, decimal: str, where: str) -> Iterator[Row]:
        """Raises MeterError for a number of two readings."""
        if found.stamp != self._stamp:
            yield from self.close()
            at_s = _seconds(found.stamp or "", decimal or found.decimal)
            if math.isnan(at_s):
                self._doubts.add("bad_lines", f"{where} is stamped {found.stamp!r}")
                return
            self._stamp, self._before_s, self._at_s = found.stamp or "", self._at_s, at_s
        span_s = self._at_s - self._before_s
        if found.rail in self._joules:
            self._doubts.add("duplicate_rail", f"{where} gives {found.rail} twice at {found.stamp} s")
            self._joules[found.rail] = math.nan
        else:
            self._joules[found.rail] = _joules(found, decimal or found.decimal, span_s, self._doubts, where)
        if len(self._joules) == self._events:
            yield from self.close()

    def close(self) -> Iterator[Row]:
        """The interval so far, if any. One that does not come after those before is a row of NaN, and adds nothing."""
        if not self._joules:
            return
        span_s, new_s = self._at_s - self._before_s, self._at_s - self._latest_s
        rails = list(self._joules)
        if span_s > 0 and new_s > 0:
            share = min(1.0, new_s / span_s)  # after a restart, what lies before the last good stamp is not counted twice
            counters = self._sums.add(min(span_s, new_s), {rail: share * value for rail, value in self._joules.items()})
            yield Row(self._at_s, energy_j={rail: counters.get(rail, math.nan) for rail in rails})
            self._latest_s = self._at_s
        else:
            yield Row(self._at_s, energy_j=dict.fromkeys(rails, math.nan))
        self.begun = True
        self._stamp, self._joules = "", {}


def _joules(found: Figure, decimal: str, span_s: float, doubts: Doubts, where: str) -> float:
    """NaN, and a doubt, for what was not counted, is negative or more than any machine draws."""
    value = math.nan if found.value is None else value_of(found.value, decimal)
    if not 0 <= value <= (MOST_W * span_s if span_s > 0 else math.inf):
        doubts.add("invalid_values", f"{where}: {found.rail} {'was not counted' if found.value is None else f'is {found.value!r} J'}")
        return math.nan
    return value
