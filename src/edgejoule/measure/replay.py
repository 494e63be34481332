"""A recorded power trace played back as if it were sampled live: to try the whole pipeline where there is no sensor.

The file is CSV with a header, one row per sample. Its time starts when ``start()`` is called; with ``loop`` it starts over at
its end. The power does not belong to the run (caveat ``replayed``), so that models cannot be compared by it. Knows no other
format: recordings to integrate belong to the trace readers.
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from edgejoule.errors import MeterError
from edgejoule.records import Grade, Trace, floats
from edgejoule.registry import Call

MOST_SAMPLES = 50_000_000  # played: a window of a day at 500 Hz


@dataclass(frozen=True, slots=True)
class Replay:
    """Plays ``path``: ``time_col`` in seconds, ascending, and ``power_col`` in watts."""

    path: str
    time_col: str = "time_s"
    power_col: str = "power_w"
    grade: Grade = "D"
    loop: bool = True
    _started: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.grade not in get_args(Grade):
            raise ValueError(f"grade={self.grade!r} is not one of A, B, C, D")

    def probe(self) -> str | None:
        try:
            read_power(Path(self.path), self.time_col, self.power_col)
        except MeterError as error:
            return str(error)
        return None

    def start(self) -> None:
        """Raises MeterError where it was already started."""
        if self._started:
            raise MeterError("the replay was already started: a meter is for one use, open it again")
        self._started.append(time.perf_counter())

    def stop(self) -> tuple[Trace, ...]:
        """One rail, ``replay``. Raises MeterError where the file cannot be read, or was never started."""
        if not self._started:
            raise MeterError("the replay was stopped before it was started: call start() first")
        times, powers = read_power(Path(self.path), self.time_col, self.power_col)
        return (self.played(times, powers, self._started[0], time.perf_counter()),)

    def played(self, times_s: list[float], powers_w: list[float], start_s: float, stop_s: float) -> Trace:
        """The trace between two instants of the meter's clock, up to the first sample at or after the last one."""
        step = sorted(b - a for a, b in itertools.pairwise(times_s))[(len(times_s) - 1) // 2]
        turn = times_s[-1] - times_s[0] + step  # the last sample holds for one step before the first comes again
        turns = math.ceil((stop_s - start_s) / turn) + 1 if self.loop else 1
        if turns * len(times_s) > MOST_SAMPLES:
            raise MeterError(f"{self.path} would be played {turns} times: use a longer recording, or loop=False")
        at = [start_s + n * turn + (t - times_s[0]) for n in range(turns) for t in times_s]
        end = next((i + 1 for i, t in enumerate(at) if t >= stop_s), len(at))
        options = {"path": self.path, "time_col": self.time_col, "power_col": self.power_col, "grade": self.grade, "loop": self.loop}
        return Trace(
            rail="replay",
            quantity="power_w",
            times_s=floats(at[:end]),
            values=floats((powers_w * turns)[:end]),
            source=str(Call("replay", options)),
            grade=self.grade,
            scope="replay",
            period_s=step,
        )


def read_power(path: Path, time_col: str, power_col: str) -> tuple[list[float], list[float]]:
    """A CSV's times in seconds and powers in watts, at least two samples.

    Raises MeterError naming the line where a value is missing, is no finite number, or time does not go forwards.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            samples = list(_samples(file, path, time_col, power_col))
    except FileNotFoundError as error:
        raise MeterError(f"no recording at {path}: expected a CSV file with the columns {time_col} and {power_col}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MeterError(f"cannot read {path} ({error}): expected a CSV file in UTF-8") from error
    if len(samples) < 2:
        raise MeterError(f"{path} holds {len(samples)} samples: expected at least two")
    return [t for t, _ in samples], [w for _, w in samples]


def _samples(file: Iterator[str], path: Path, time_col: str, power_col: str) -> Iterator[tuple[float, float]]:
    reader = csv.reader(file)
    last = -math.inf
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in (time_col, power_col):
            if header.count(name) != 1:
                raise MeterError(
                    f"{path}, line 1: expected one column {name!r}, found {', '.join(header) or 'nothing'}: name it with its option"
                )
        columns = header.index(time_col), header.index(power_col)
        for row in reader:
            if not any(map(str.strip, row)):
                continue
            at, power = (_number(row, column, path, reader.line_num) for column in columns)
            if at <= last:
                raise MeterError(f"{path}, line {reader.line_num}: time {at:g} s does not come after {last:g} s, sort or split the file")
            last = at
            yield at, power
    except csv.Error as error:
        raise MeterError(f"{path}, line {reader.line_num}: {error}: expected comma-separated values") from error


def _number(row: list[str], column: int, path: Path, line: int) -> float:
    text = row[column].strip() if column < len(row) else ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MeterError(f"{path}, line {line}: {text!r} is not a finite number, with a decimal point: mend that line")
    return value
