"""What Apple's ``powermetrics`` prints, as text or as plists one after another (separated by NULs). Grade D, scope: the SoC.

Apple calls the figures estimates and warns against comparing machines by them; display, memory of some chips and the rest of the
computer are not in them. Each sample is the mean power of the time just elapsed, so power times that time, added up, is exact. The
combined power is the whole: CPU, GPU and ANE are its parts and are never added to it. Dates are only used to see that time was lost
between two samples (sleep, a second run), by their clock and offset: their words are in the language of the machine.
"""

from __future__ import annotations

import dataclasses
import math
import plistlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from xml.parsers.expat import ExpatError

from edgejoule.caveats import Doubts
from edgejoule.measure.traces.reading import number
from edgejoule.measure.traces.rows import MOST_W, Row, RunningJoules, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

HEADER = re.compile(r"\*\*\* Sampled system activity \((?P<date>.*)\) \((?P<ms>[\d.,]+)ms elapsed\)")
POWER = re.compile(r"(?P<name>[A-Za-z][\w -]{0,30}?) Power(?: \([^)]*\))?: +(?P<value>\S+) ?(?P<unit>mW|W)")
INTEL = re.compile(r"Intel energy model derived package power \([^)]*\): +(?P<value>[\d.,]+) ?W")
PRESSURE = re.compile(r"Current pressure level: *(\w+)")
CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d)(?:.*?([+-])(\d\d)(\d\d)\b)?")
PLIST_KEY = re.compile(r"([a-z]\w*?)_(power|energy|watts)")
SCALE = {"power": 1e-3, "watts": 1.0, "mW": 1e-3, "W": 1.0}  # to watts; energies are millijoules of the sample
CALM = ("", "Nominal", "Undefined")
WHOLES, PARTS = ("combined", "package"), ("cpu", "gpu", "ane")
LONGEST_PLIST = 200_000  # lines
DAY_S, LOST_S = 86_400, 3.0  # dates are of one second's resolution
BROKEN = (ExpatError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Sample:
    """Mean powers over ``elapsed_s``; NaN where a figure is not valid."""

    elapsed_s: float
    power_w: Mapping[str, float]
    pressure: str = ""  # thermal
    clock_s: float | None = None  # seconds of the day, UTC where the date says its offset


@dataclass(frozen=True, slots=True)
class Powermetrics:
    """Text (``powermetrics -i 200``) or plists (``--format plist``)."""

    @property
    def averaging_s(self) -> float:
        """0: the counters are summed at the very ends of the samples; how often one comes is the trace's own period."""
        return 0.0

    @property
    def grade(self) -> Grade:
        return "D"

    @property
    def scope(self) -> str:
        return "SoC"

    def recognises(self, head: Sequence[str]) -> bool:
        if any(HEADER.search(line) for line in head):
            return True
        return any("<plist" in line for line in head) and any("<key>elapsed_ns</key>" in line for line in head)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        """The combined power (before it, the package's); else CPU, GPU and ANE where all three are there."""
        whole = next(((rail,) for rail in WHOLES if rail in rails), ())
        return whole or (PARTS if set(PARTS) <= set(rails) else ())

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        found: Iterable[Sample] = _samples(lines, doubts)
        if hints.interval_s is not None:
            found = (dataclasses.replace(sample, elapsed_s=hints.interval_s, clock_s=None) for sample in found)
        yield from blocks(_rows(found, doubts))


def _rows(samples: Iterable[Sample], doubts: Doubts) -> Iterator[Row]:
    sums, now_s, clock_s = RunningJoules(), 0.0, None
    for count, sample in enumerate(samples, 1):
        if sample.pressure not in CALM:
            doubts.add("throttled", f"sample {count} reports thermal pressure {sample.pressure}")
        lost_s = _lost_s(clock_s, sample)
        clock_s = sample.clock_s
        if lost_s > LOST_S:
            doubts.add("trace_gap", f"{lost_s:.0f} s passed before sample {count} that no sample covers")
            sums.skip(lost_s)
            now_s += lost_s
        elif lost_s < -LOST_S:
            doubts.add(
                "clock_backwards", f"sample {count} ends {-lost_s:.0f} s before the one ahead of it does; only elapsed times were used"
            )
        if count == 1:
            yield Row(0.0, energy_j={rail: 0.0 for rail, watts in sample.power_w.items() if not math.isnan(watts)})
        now_s += sample.elapsed_s
        counters = sums.add(sample.elapsed_s, joules(sample))
        yield Row(now_s, energy_j={rail: counters.get(rail, math.nan) for rail in sample.power_w})


def joules(sample: Sample) -> dict[str, float]:
    """{rail: joules of the sample's time}."""
    return {rail: watts * sample.elapsed_s for rail, watts in sample.power_w.items()}


def _lost_s(clock_s: float | None, sample: Sample) -> float:
    """By how much two dates differ from the time elapsed; 0 where there are none."""
    if clock_s is None or sample.clock_s is None:
        return 0.0
    return (sample.clock_s - clock_s - sample.elapsed_s + DAY_S / 2) % DAY_S - DAY_S / 2


def _samples(lines: Iterable[str], doubts: Doubts) -> Iterator[Sample]:
    text, plists = TextReader(doubts), _Plists(doubts)
    for line in lines:
        for piece in line.split("\0"):
            found = plists.feed(piece) or text.feed(piece)
            if found is not None:
                yield found
    last = text.finish()
    if last is not None:
        yield last
    plists.finish()


@dataclass(slots=True)
class TextReader:
    """Samples from lines of text. ``early`` gives one as soon as its whole is known (live), else when the next begins."""

    doubts: Doubts
    early: bool = False
    pressure: str = ""  # the last one seen
    _elapsed_s: float = math.nan
    _clock_s: float | None = None
    _power: dict[str, float] = field(default_factory=dict)
    _given: bool = False

    def feed(self, line: str) -> Sample | None:
        line = line.strip("\0 \t\r")
        header = HEADER.search(line)
        if header:
            before = self.finish()
            self._begin(header)
            return before
        pressure = PRESSURE.match(line)
        if pressure:
            self.pressure = pressure[1]
            return None
        power, intel = POWER.fullmatch(line), INTEL.fullmatch(line)
        if power is None and intel is None:
            return None
        if power:
            self._add(power["name"].lower(), power["value"], SCALE[power["unit"]])
        elif intel:
            self._add(WHOLES[1], intel["value"], 1.0)
        return self.finish() if self.early and WHOLES[0] in self._power else None

    def finish(self) -> Sample | None:
        """The sample so far; None where there is none, or it was given already."""
        if self._given or not self._power:
            return None
        self._given = True
        if not self._elapsed_s > 0:
            self.doubts.add("bad_lines", "a sample's elapsed time is missing or not above 0")
            return None
        return Sample(self._elapsed_s, dict(self._power), self.pressure, self._clock_s)

    def _begin(self, header: re.Match[str]) -> None:
        text = header["ms"]
        self._elapsed_s = number(text, "," if "," in text and "." not in text else ".") / 1e3  # powermetrics groups no thousands
        at = CLOCK.search(header["date"])
        self._clock_s = None if at is None else _day_s(at)
        self._power, self._given, self.pressure = {}, False, self.pressure if self.early else ""

    def _add(self, rail: str, text: str, scale: float) -> None:
        if self._given or math.isnan(self._elapsed_s):
            return
        watts = number(text, "," if "," in text and "." not in text else ".") * scale
        if not 0 <= watts < MOST_W:
            self.doubts.add("invalid_values", f"{rail} power is {text!r}")
            watts = math.nan
        if rail in self._power and self._power[rail] != watts:  # the GPU's is printed twice, in two sections
            self.doubts.add("duplicate_rail", f"{rail} power is {1e3 * self._power[rail]:g} and {1e3 * watts:g} mW in one sample")
            watts = math.nan
        self._power[rail] = watts


def _day_s(at: re.Match[str]) -> float:
    offset_s = 0 if at[4] is None else (1 if at[4] == "+" else -1) * (int(at[5]) * 3600 + int(at[6]) * 60)
    return float((int(at[1]) * 3600 + int(at[2]) * 60 + int(at[3]) - offset_s) % DAY_S)


class _Plists:
    """Samples from plists one after another."""

    def __init__(self, doubts: Doubts) -> None:
        self._doubts = doubts
        self._lines: list[str] = []

    def feed(self, line: str) -> Sample | None:
        if "<plist" in line:
            if self._lines:
                self._doubts.add("bad_lines", "a plist is cut off by the next one")
            self._lines = [line[line.index("<plist") :]]
        elif self._lines:
            self._lines.append(line)
        if not self._lines or "</plist>" not in line:
            if len(self._lines) > LONGEST_PLIST:
                self._doubts.add("bad_lines", f"a plist does not end within {LONGEST_PLIST} lines")
                self._lines = []
            return None
        text, self._lines = "\n".join(self._lines), []
        try:
            return self._sample(plistlib.loads(text[: text.index("</plist>") + 8].encode(errors="replace"), fmt=plistlib.FMT_XML))
        except BROKEN as error:
            self._doubts.add("bad_lines", f"a plist cannot be read ({type(error).__name__})")
            return None

    def finish(self) -> None:
        if self._lines:
            self._doubts.add("bad_lines", "the last plist is cut off")

    def _sample(self, top: Any) -> Sample | None:
        elapsed_s = _figure(top.get("elapsed_ns")) / 1e9
        if not elapsed_s > 0:
            self._doubts.add("bad_lines", f"a plist's elapsed_ns is {top.get('elapsed_ns')!r}")
            return None
        power: dict[str, float] = {}
        for key, value in top.get("processor", {}).items():
            match = PLIST_KEY.fullmatch(str(key))
            if match is None or (match[2] == "energy" and match[1] in power):
                continue
            watts = _figure(value) * (1e-3 / elapsed_s if match[2] == "energy" else SCALE[match[2]])
            if not 0 <= watts < MOST_W:
                self._doubts.add("invalid_values", f"{key} is {value!r}"[:80])
                watts = math.nan
            power[match[1]] = watts
        stamp = top.get("timestamp")
        clock_s = float(stamp.hour * 3600 + stamp.minute * 60 + stamp.second) if isinstance(stamp, datetime) else None
        return Sample(elapsed_s, power, str(top.get("thermal_pressure", ""))[:20], clock_s)


def _figure(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
