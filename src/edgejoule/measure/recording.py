"""A trace file in, traces out: opens the file, chooses the format, checks the stamps, keeps memory bounded.

Files are read once, line by line. A rail keeps at most ``MOST`` samples: beyond that its power becomes a running integral and
every second stamp is dropped, which changes no energy between the stamps that remain. Knows no format's columns.
"""

from __future__ import annotations

import codecs
import io
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule import registry
from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.records import Caveat, Trace
from edgejoule.seams import Block, TraceFormat, TraceHints

MOST = 2**21  # samples of a rail
HEAD = 50  # lines shown to a format that is asked whether it recognises the file
LONGEST = 1_000_000  # characters of a line
BACKWARDS = 0.01  # of all samples: with more, the file is not one recording
PART = 2**20  # characters read at once
PROGRESS_S = 0.5
MOST_S, MOST_VALUE = 1e11, 1e15  # beyond these a number is damaged: three thousand years, and any energy in joules
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recording:
    """What a file holds. ``times_s`` of every trace count from the file's first sample."""

    format: str
    traces: tuple[Trace, ...]
    samples: int
    duration_s: float
    caveats: tuple[Caveat, ...]


def open_recording(
    path: Path, spelling: str = "auto", hints: TraceHints | None = None, notify: Callable[[float], None] = lambda share: None
) -> Recording:
    """Read a trace file; ``spelling`` is a format's, or ``auto``. ``notify`` hears which share of the file has been read.

    Raises MeterError where the file cannot be read, no format or several recognise it, or what it says has no one meaning.
    """
    said = hints or TraceHints()
    for value, what in ((said.interval_s, "--interval"), (said.voltage_v, "--voltage")):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise MeterError(f"{what} {value:g} is not above 0: expected seconds and volts as the recorder had them")
    name, leaf = _recognised(path, said) if spelling == "auto" else (spelling, registry.create("trace", spelling))
    doubts, kept = Doubts(), _Kept(said.interval_s)
    try:
        for block in leaf.read(_lines(path, notify), said, doubts):
            kept.add(block, doubts)
    except MeterError as error:
        raise error if str(path) in str(error) else MeterError(f"{path}: {error}") from error
    kept.check(path, name, doubts)
    traces = kept.traces(registry.canonical(name), leaf, leaf.totals(kept.rails()))
    last = max(trace.times_s[-1] for trace in traces)
    return Recording(registry.parse(name).name, traces, kept.samples, last, doubts.caveats())


def _recognised(path: Path, hints: TraceHints) -> tuple[str, TraceFormat]:
    """The one format that recognises the head of the file; ``csv`` where the user names its columns, or says what is missing."""
    if hints.time_col or hints.power_col or hints.voltage_col or hints.current_col:
        return "csv", registry.create("trace", "csv")
    head = [line for line in islice(_lines(path), HEAD * 4) if line.strip()][:HEAD]
    if not head:
        raise MeterError(f"{path} is empty: expected a trace file")
    leaves = {name: registry.create("trace", name) for name in registry.names("trace")}
    found = [name for name, leaf in leaves.items() if leaf.recognises(head)]
    if len(found) > 1:
        raise MeterError(f"{path} may be {' or '.join(found)}: say which with --format")
    if found:
        return found[0], leaves[found[0]]
    if any(mark in line for line in head[:5] for mark in ("\0", "\ufffd")):
        raise MeterError(f"{path} is no text: export it from its own program as CSV, and read that")
    try:
        next(leaves["csv"].read(iter(head), hints, Doubts()), None)
    except MeterError as error:
        known = ", ".join(leaves)
        raise MeterError(
            f"no format recognises {path}, whose first line is {head[0][:60]!r}: name one with --format ({known}); as csv, {error}"
        ) from error
    return "csv", leaves["csv"]


def _lines(path: Path, notify: Callable[[float], None] = lambda share: None) -> Iterator[str]:
    """Lines without their ends, a part of the file at a time. Raises MeterError where it cannot be read, or has no lines."""
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
            size = max(1, raw.seek(0, os.SEEK_END))
            raw.seek(0)
            encoding = next((name for bom, name in BOMS if start.startswith(bom)), "utf-8")
            file = io.TextIOWrapper(raw, encoding=encoding, errors="replace", newline=None)
            spoken, begun = time.monotonic(), ""
            while part := file.read(PART):
                lines = (begun + part).split("\n")
                begun = lines.pop()
                yield from lines
                if len(begun) >= LONGEST:
                    raise MeterError(f"{path} has a line of more than {LONGEST} characters: expected a text trace, one sample a line")
                if time.monotonic() - spoken > PROGRESS_S:
                    spoken = time.monotonic()
                    notify(min(1.0, raw.tell() / size))
            if begun:
                yield begun
    except IsADirectoryError as error:
        raise MeterError(f"{path} is a folder: expected a trace file") from error
    except FileNotFoundError as error:
        raise MeterError(f"there is no file {path}: expected a trace file") from error
    except (OSError, UnicodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise MeterError(f"cannot read {path} ({why}): expected a trace file") from error


class _Rail:
    """One rail's samples so far, at most MOST: power as it is, then as a running integral with ever fewer stamps."""

    def __init__(self, quantity: Literal["power_w", "energy_j"]) -> None:
        self.quantity: Literal["power_w", "energy_j"] = quantity
        self.count = 0
        self._times: list[Samples] = []
        self._values: list[Samples] = []
        self._held = 0
        self._stride = 1
        self._skipped = 0  # stamps since the last one kept
        self._last: tuple[float, float] | None = None  # time and power of the last sample, where power is integrated
        self._joules = 0.0
        self._end: tuple[float, float] | None = None  # the last sample of all, kept or not

    def add(self, times: Samples, values: Samples) -> None:
        """Append samples, times ascending and after all before."""
        self.count += len(times)
        if self._last is not None:
            values = self._integral(times, values)
        self._end = (float(times[-1]), float(values[-1]))
        if self._stride > 1:
            first = self._stride - 1 - self._skipped
            self._skipped = (self._skipped + len(times)) % self._stride
            times, values = times[first :: self._stride].copy(), values[first :: self._stride].copy()  # a view keeps the whole block
        if len(times):
            self._times.append(times)
            self._values.append(values)
        self._held += len(times)
        while self._held > MOST:
            self._halve()

    def samples(self) -> tuple[Samples, Samples]:
        """What is kept, and the last sample; at least one was added."""
        times, values = self._kept()
        if self._skipped and self._end is not None:
            times, values = np.append(times, self._end[0]), np.append(values, self._end[1])
        return times, values

    def _kept(self) -> tuple[Samples, Samples]:
        return np.concatenate(self._times), np.concatenate(self._values)

    def _halve(self) -> None:
        times, values = self._kept()
        if self.quantity == "power_w":
            self.quantity, self._last = "energy_j", (float(times[0]), float(values[0]))
            values = np.append(0.0, self._integral(times[1:], values[1:]))
            self._end = (float(times[-1]), float(values[-1]))
        self._times, self._values = [times[::2].copy()], [values[::2].copy()]
        self._skipped += self._stride * ((len(times) - 1) % 2)
        self._stride *= 2
        self._held = len(self._times[0])

    def _integral(self, times: Samples, watts: Samples) -> Samples:
        """Joules at each stamp since the first, by trapezoid."""
        assert self._last is not None
        at, power = np.append(self._last[0], times), np.append(self._last[1], watts)
        joules: Samples = self._joules + np.cumsum(np.diff(at) * (power[1:] + power[:-1]) / 2)
        self._last, self._joules = (float(at[-1]), float(power[-1])), float(joules[-1])
        return joules


class _Kept:
    """All rails of a file, on the stamps that can be believed."""

    def __init__(self, interval_s: float | None) -> None:
        self._interval_s = interval_s
        self._rows = 0
        self._first_s: float | None = None
        self._last_s = -math.inf
        self._backwards = 0  # samples that do not come after the one before
        self._equal = 0  # of those, samples with the same stamp
        self._power: dict[str, _Rail] = {}
        self._energy: dict[str, _Rail] = {}
        self._unstamped = 0
        self.samples = 0

    def rails(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._power, *self._energy)))

    def add(self, block: Block, doubts: Doubts) -> None:
        """One block's rows, those without a stamp or before the last one left out."""
        rows = len(block.times_s)
        times: Samples = np.where(np.abs(block.times_s) < MOST_S, block.times_s, np.nan)
        if self._interval_s is not None:
            times = np.arange(self._rows, self._rows + rows, dtype=np.float64) * self._interval_s
        ahead = np.maximum.accumulate(np.concatenate(([self._last_s], np.where(np.isnan(times), -np.inf, times))))
        good = times > ahead[:-1]
        self._unstamped += int(np.count_nonzero(np.isnan(times)))
        stale = int(np.count_nonzero(~good & ~np.isnan(times)))
        if stale:
            row = int(np.flatnonzero(~good & ~np.isnan(times))[0])
            doubts.add("clock_backwards", f"sample {self._rows + row + 1} is stamped {times[row]:.6g} s, after {ahead[row]:.6g} s", stale)
            self._backwards += stale
            self._equal += int(np.count_nonzero(times == ahead[:-1]))
        self._rows += rows
        if not np.any(good):
            return
        if self._first_s is None:  # times count from the first sample that holds a value
            every = [np.abs(values) < MOST_VALUE for values in (*block.power_w.values(), *block.energy_j.values())]
            valid = good & np.logical_or.reduce(every) if every else good
            if not np.any(valid):
                return
            self._first_s = float(times[valid][0])
        self._last_s = float(ahead[-1])
        self.samples += int(np.count_nonzero(good))
        for rails, found, quantity in ((self._power, block.power_w, "power_w"), (self._energy, block.energy_j, "energy_j")):
            for rail, values in found.items():
                fit = good & (np.abs(values) < MOST_VALUE)
                if damaged := int(np.count_nonzero(np.abs(values) >= MOST_VALUE)):
                    doubts.add("invalid_values", f"rail {rail} holds values of {MOST_VALUE:g} and more", damaged)
                if np.any(fit):
                    rails.setdefault(rail, _Rail(quantity)).add(times[fit] - self._first_s, np.asarray(values)[fit])  # type: ignore[arg-type]

    def check(self, path: Path, name: str, doubts: Doubts) -> None:
        """Raises MeterError where time stands still or goes backwards too often for one recording, or no rail has two samples."""
        if self._backwards > max(3, BACKWARDS * self._rows):
            advice = "split the file where the recording was restarted, or give --interval"
            if self._equal > self._backwards / 2:
                advice = "its stamps are too coarse, so give --interval"
            raise MeterError(f"in {path} {self._backwards} of {self._rows} samples do not come after the one before: {advice}")
        if self._rows and self._unstamped == self._rows:
            raise MeterError(f"none of the {self._rows} samples in {path} has a stamp: add --interval with the seconds between them")
        most = max((rail.count for rail in (*self._power.values(), *self._energy.values())), default=0)
        if most < 2:
            seen = f" ({caveats[0].seen})" if (caveats := doubts.caveats()) else ""
            raise MeterError(f"{path} holds {most} valid samples as {name}: expected at least two of one rail{seen}")

    def traces(self, source: str, leaf: TraceFormat, totals: Sequence[str]) -> tuple[Trace, ...]:
        """A trace per rail: its power where the file has it, else its counter; both where it has both, and only power counts."""
        made = []
        for rails, other in ((self._power, {}), (self._energy, self._power)):
            for name, rail in rails.items():
                if rail.count < 2:
                    continue
                times, values = rail.samples()
                made.append(_trace(name, rail, times, values, source, leaf, name in totals and name not in other))
        return tuple(made)


def _trace(name: str, rail: _Rail, times: Samples, values: Samples, source: str, leaf: TraceFormat, total: bool) -> Trace:
    def samples(of: Samples) -> Any:
        return array("d", np.ascontiguousarray(of, dtype=np.float64).tobytes())

    return Trace(
        rail=name,
        quantity=rail.quantity,
        times_s=samples(times),
        values=samples(values),
        source=source,
        grade=leaf.grade,
        scope=leaf.scope,
        period_s=float(np.median(np.diff(times))),
        averaging_s=leaf.averaging_s,
        clock_id="file",
        total=total,
        systematic=float(getattr(leaf, "systematic", 0.0)),
    )
