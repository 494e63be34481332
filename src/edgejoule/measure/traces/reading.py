"""What the trace formats share: units, numbers that are or are not there, blocks of rows, tables of numbers, rebuilt stamps.

A table is read by numpy's own parser, a chunk at a time; only where that fails, line by line. Knows no format and no file.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import numpy.typing as npt

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.seams import Block

Samples = npt.NDArray[np.float64]
CHUNK = 65_536  # lines handled at once: some megabytes
PIECE = 1024  # lines of a chunk tried again where the whole of it fails
BAD = 0.05  # of all rows: with more that cannot be read, the file is not what it seems
JUDGED = 10_000  # rows after which that is judged before the end
CUT_OFF = 100  # lines that tell how short an honest line may be
MOST_W = 1e6  # more is a damaged number, not a power
NOISE_W, NOISE, SENTINEL_W = 1e-3, 0.1, -1.0  # below zero by less than this, absolute or of the largest sample around, is noise about zero

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
POWER_UNITS = {"W": 1.0, "mW": 1e-3, "uW": 1e-6, "kW": 1e3}
VOLTAGE_UNITS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6}
CURRENT_UNITS = {"A": 1.0, "mA": 1e-3, "uA": 1e-6, "nA": 1e-9}
ENERGY_UNITS = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "Wh": 3600.0, "mWh": 3.6, "kWh": 3.6e6, "Ws": 1.0}
WORDS = {"seconds": "s", "second": "s", "secs": "s", "sec": "s", "milliseconds": "ms", "msec": "ms", "microseconds": "us", "usec": "us"}
WORDS |= {"watts": "W", "watt": "W", "milliwatts": "mW", "milliwatt": "mW", "microwatts": "uW", "volts": "V", "volt": "V"}
WORDS |= {"millivolts": "mV", "amps": "A", "amp": "A", "amperes": "A", "milliamps": "mA", "microamps": "uA", "minutes": "min", "hours": "h"}
MISSING = frozenset(("", "nan", "-nan", "inf", "-inf", "+inf", "n/a", "[n/a]", "na", "-", "none", "null", "[not supported]"))
WRAPPED = re.compile(r"np\.float\d+\(([^()]*)\)")  # repr() of a numpy 2 number


def chunks(lines: Iterable[str], size: int = CHUNK) -> Iterator[list[str]]:
    """Lists of at most ``size`` lines."""
    walker = iter(lines)
    while some := list(islice(walker, size)):
        yield some


def opening(lines: Iterable[str], most: int = 200) -> tuple[list[str], Iterator[str]]:
    """The first lines, and all lines: to find a header without losing what follows."""
    walker = iter(lines)
    first = list(islice(walker, most))
    return first, chain(first, walker)


def number(text: str, decimal: str = ".") -> float:
    """A finite number, or NaN: never a guess. With ``decimal=","`` a comma is the point and a point is refused."""
    text = text.strip()
    if decimal == ",":
        if "." in text:
            return math.nan
        text = text.replace(",", ".")
    if "_" in text:  # Python reads 1_000; no instrument writes it
        return math.nan
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def factor(unit: str, table: Mapping[str, float], what: str) -> float:
    """What a unit is worth in SI. Micro may be written u, µ or μ. Raises MeterError naming the units there are."""
    plain = _plain(unit)
    if plain not in table:
        raise MeterError(f"no unit of {what} is called {unit!r}: expected one of {', '.join(table)}")
    return table[plain]


def unit_in(name: str, table: Mapping[str, float]) -> str:
    """The unit that a column's name states (``P[W]``, ``Power (mW)``, ``time_ms``), or "" where none or no clear one.

    All-lowercase spellings are taken for the unit (mw is mW); ``MW`` or ``MA`` may be mega or milli, and is left open.
    """
    bracketed = re.search(r"[(\[]([^()\[\]]*)[)\]]\s*$", name)
    text = _plain(bracketed[1] if bracketed else re.split(r"[\s_/.-]+", name.strip())[-1])
    if text in table:
        return text
    lowered = {unit.lower(): unit for unit in table} if text == text.lower() else {}
    word = WORDS.get(text.lower(), "")
    return lowered.get(text, word if word in table else "")


def _plain(unit: str) -> str:
    return unit.strip().replace("µ", "u").replace("μ", "u")


def block(times_s: Sequence[float], power_w: Mapping[str, Sequence[float]], energy_j: Mapping[str, Sequence[float]] | None = None) -> Block:
    """A block of float64 arrays from sequences of one length."""
    as_arrays = {rail: np.asarray(values, dtype=np.float64) for rail, values in power_w.items()}
    counters = {rail: np.asarray(values, dtype=np.float64) for rail, values in (energy_j or {}).items()}
    return Block(np.asarray(times_s, dtype=np.float64), as_arrays, counters)


# ---------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table's lines are cut: ``width`` fields, of which ``columns`` hold the numbers that are wanted. "" is any white space."""

    delimiter: str
    width: int
    columns: tuple[int, ...]
    decimal: str = "."

    def split(self, line: str) -> list[str]:
        """The fields of a line, stripped; one delimiter at its end more than there are fields is no field."""
        if not self.delimiter:
            return line.split()
        parts = line.split(self.delimiter)
        if '"' in line:
            with contextlib.suppress(csv.Error):
                parts = next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True), [])
        if len(parts) == self.width + 1 and not parts[-1].strip():
            parts.pop()
        return [part.strip() for part in parts]


def table(lines: Iterable[str], layout: Layout, doubts: Doubts, line: int = 1) -> Iterator[Samples]:
    """Arrays (N, C) of the layout's C columns, one row per line with content; ``line`` is the first line's number in the file.

    A line that cannot be read is a row of NaN (``bad_lines``), a number that is missing or not finite is NaN (``invalid_values``),
    and so is a last line that was cut off within its last number. Raises MeterError where more than 5 % of the rows cannot be read.
    """
    rows = 0
    walker = chunks(lines)
    some = next(walker, None)
    while some is not None:
        ahead = next(walker, None)
        cut = ahead is None and _cut_off(some, layout)
        values = _parsed(some[:-1] if cut else some, layout, doubts, line)
        if cut:
            doubts.add("bad_lines", f"line {line + len(some) - 1}, the last one, is cut off: {some[-1][:60]!r}")
            values = np.concatenate((values, np.full((1, len(layout.columns)), np.nan)))
        rows += len(values)
        if rows >= JUDGED or ahead is None:
            _judge(rows, doubts)
        yield values
        line += len(some)
        some = ahead


def _judge(rows: int, doubts: Doubts) -> None:
    bad = doubts.count("bad_lines")
    if bad > 2 and bad > BAD * rows:
        first = next(doubt.seen for doubt in doubts.caveats() if doubt.code == "bad_lines")
        raise MeterError(
            f"{bad} of {rows} rows cannot be read ({first}): the file is not what it seems, "
            "name the format with --format, or the columns, --decimal and the units"
        )


def _cut_off(lines: list[str], layout: Layout) -> bool:
    """The last line is shorter than every other one, and its last number, which might be half a number, is wanted."""
    last = lines[-1].strip()
    if len(lines) < CUT_OFF or layout.width - 1 not in layout.columns or not last or (layout.delimiter and last.endswith(layout.delimiter)):
        return False
    return len(last) < min((len(text) for line in lines[:-1] if (text := line.strip())), default=0)


def _parsed(lines: list[str], layout: Layout, doubts: Doubts, first: int) -> Samples:
    if lines and "np.float" in lines[0]:
        lines = _unwrapped("\n".join(lines)).split("\n")
    values = _fast(lines, layout)
    if values is None and len(lines) > PIECE:
        pieces = [_parsed(lines[at : at + PIECE], layout, doubts, first + at) for at in range(0, len(lines), PIECE)]
        return np.concatenate(pieces)
    if values is None:
        return _slow(lines, layout, doubts, first)
    wrong = ~np.isfinite(values)
    if np.any(wrong):
        rows = np.flatnonzero(wrong.any(axis=1))
        doubts.add("invalid_values", f"line {first + int(rows[0])}: {lines[rows[0]][:60]!r}", len(rows))
        values[wrong] = np.nan
    return values


def _unwrapped(text: str) -> str:
    """Numbers without numpy's name around them; the slow way where a bracket is missing."""
    if text.count("np.float64(") == text.count(")") == text.count("("):
        return text.replace("np.float64(", "").replace(")", "")
    return WRAPPED.sub(r"\1", text)


def _fast(lines: list[str], layout: Layout) -> Samples | None:
    """All lines at once, or None where one of them is not exactly as the layout says."""
    if layout.delimiter:
        counts = set(map(str.count, lines, repeat(layout.delimiter)))
        if not counts <= {layout.width - 1, layout.width}:
            return None
        if layout.width in counts and not all(
            line.rstrip().endswith(layout.delimiter) for line in lines if line.count(layout.delimiter) == layout.width
        ):
            return None
    elif {len(line.split()) for line in lines} != {layout.width}:
        return None
    if '"' in lines[0] and layout.decimal == ".":
        lines = "\n".join(lines).replace('"', "").split("\n")
    if layout.decimal == ",":
        text = "\n".join(lines)
        if "." in text:
            return None
        lines = text.replace(",", ".").split("\n")
    try:
        values = np.loadtxt(lines, delimiter=layout.delimiter or None, comments=None, ndmin=2, usecols=layout.columns)
    except ValueError:
        return None
    return values if len(values) == len(lines) else None


def _slow(lines: list[str], layout: Layout, doubts: Doubts, first: int) -> Samples:
    found: list[list[float]] = []
    for at, line in enumerate(lines, first):
        if not line.strip():
            continue
        parts = layout.split(WRAPPED.sub(r"\1", line))
        cells = [parts[column] for column in layout.columns] if len(parts) == layout.width else []
        row = [number(cell, layout.decimal) for cell in cells]
        if not cells or any(math.isnan(value) and cell.lower() not in MISSING for value, cell in zip(row, cells, strict=True)):
            doubts.add("bad_lines", f"line {at}: {line[:60]!r}")
            row = [math.nan] * len(layout.columns)
        elif any(map(math.isnan, row)):
            doubts.add("invalid_values", f"line {at}: {line[:60]!r}")
        found.append(row)
    return np.array(found, dtype=np.float64).reshape(len(found), len(layout.columns))


def plausible(watts: Samples, doubts: Doubts, row: int, signed: bool = True) -> Samples:
    """Watts (N,), NaN where no device takes that much, and, unless ``signed``, clearly below zero. ``row`` is the first one's number.

    An instrument's small negative samples are noise about zero, and to cut them off would raise the mean.
    """
    size = np.abs(watts)
    wrong = size > MOST_W
    if not signed:
        largest = float(np.nanmax(np.where(wrong, np.nan, size), initial=0.0))
        wrong = wrong | (watts < -max(NOISE_W, NOISE * largest)) | (watts == SENTINEL_W)
    if not np.any(wrong):
        return watts
    at = int(np.flatnonzero(wrong)[0])
    doubts.add("invalid_values", f"sample {row + at} is {watts[at]:.4g} W", int(np.count_nonzero(wrong)))
    return np.where(wrong, np.nan, watts)


# ---------------------------------------------------------------- stamps


class Paced:
    """Times of rows taken at a known period, from stamps of their arrival, which may be late but never early.

    Row number times period, moved on only where all later rows of the chunk are later by ``gap_s`` and more: samples were lost there.
    Where rows come faster than the period says, the first chunk's own mean period is used.
    """

    def __init__(self, period_s: float, gap_s: float = 0.1) -> None:
        self._period_s, self._gap_s = period_s, gap_s
        self._rows = 0
        self._origin_s: float | None = None  # the first stamp
        self._last_s = 0.0
        self._shift_s = 0.0

    def times(self, stamps_s: Samples) -> Samples:
        """Seconds (N,) from about the first stamp, for the next N rows; NaN stamps say nothing.

        Raises MeterError where the stamps start over, or where there are more rows than the period and they allow.
        """
        known = np.flatnonzero(np.isfinite(stamps_s))
        rows = self._rows + np.arange(len(stamps_s), dtype=np.float64)
        self._rows += len(rows)
        at: Samples = rows * self._period_s
        if not len(known):
            return at + self._shift_s
        begins = self._origin_s is None
        if self._origin_s is None:
            self._origin_s = float(stamps_s[known[0]])
        stamps = stamps_s[known] - self._origin_s
        self._check(stamps, rows[known])
        if begins:
            self._settle(stamps, rows[known])
            at = rows * self._period_s
        late = stamps - at[known]
        lowest = np.minimum.accumulate(late[::-1])[::-1]
        if begins:
            self._shift_s = float(lowest[0])
        if lowest[0] - self._shift_s < -(2 * self._gap_s + 0.005 * abs(stamps[-1])):
            raise MeterError(
                f"up to row {self._rows} there are more samples than one every {self._period_s:.4g} s gives: "
                "give --interval, or split the file"
            )
        return at + self._moved(lowest, known, len(rows))

    def _moved(self, lowest: Samples, known: npt.NDArray[np.intp], rows: int) -> Samples:
        """By how much each row is moved on, given the least lateness from each known stamp on, which never falls."""
        moved = np.full(rows, self._shift_s)
        while (lost := int(np.searchsorted(lowest, self._shift_s + self._gap_s))) < len(lowest):
            self._shift_s = float(lowest[lost])
            moved[known[lost] :] = self._shift_s
        return moved

    def _settle(self, stamps_s: Samples, rows: Samples) -> None:
        """Take the first chunk's mean period where it is shorter than the one that was said."""
        span_s, count = float(stamps_s[-1] - stamps_s[0]), float(rows[-1] - rows[0])
        if count * self._period_s - span_s > self._gap_s and span_s > 0:
            self._period_s = span_s / count

    def _check(self, stamps_s: Samples, rows: Samples) -> None:
        steps = np.diff(stamps_s, prepend=self._last_s)
        back = np.flatnonzero(steps < -1.0)
        if len(back):
            raise MeterError(
                f"time goes back by {-steps[back[0]]:.4g} s at sample {rows[back[0]] + 1:.0f}: "
                "split the file where the recording was restarted, or give --interval"
            )
        self._last_s = float(stamps_s[-1])
