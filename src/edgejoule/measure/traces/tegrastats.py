"""Lines of NVIDIA's tegrastats, live or from a log: power rails, and beside them memory, loads, clocks and temperatures.

The first figure of a rail is what it draws now, in mW with or without the unit; the second is a mean over a window that NVIDIA states
nowhere, the third (JetPack 7) a maximum: neither is used. A figure without unit and partner is no rail (``APE 150``). The dates that
JetPack 5 and later print are local time in whole seconds: samples are spread evenly within theirs. A rail that a line names twice
is not used, nor one below zero (an offset of the sensor, seen at idle). Does not know how long the board's sensor averages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure import boards
from edgejoule.measure.traces.rows import Row, blocks
from edgejoule.records import Grade
from edgejoule.seams import Block, TraceHints

INA3221_S = 0.422  # L4T's default: 64 samples of 1.1 + 1.1 ms on 3 channels
SYSTEMATIC = 0.05
LONGEST = 10_000  # characters; real lines have some hundreds
MOST_A_SECOND = 1000
COLDEST_C = -40.0  # below is a dummy: -256 for a sensor that is off
DUMMIES = (("PMIC", 50.0), ("PMIC", 100.0))  # constants of the driver

N = r"([0-9]{1,9})"
DATE = re.compile(r"^\s*([0-9]{2})-([0-9]{2})-([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2})\s")
# Memory is no rail, though a cut "SWAP 0/1982MB" looks like one.
RAIL = re.compile(
    r"(?:^|(?<=\s))(?!(?:RAM|SWAP|IRAM) )([A-Z][A-Z0-9_]*) "
    r"(-?[0-9]{1,7})(?:(?:mW)?/-?[0-9]{1,7}(?:mW)?(?:/-?[0-9]{1,7}(?:mW)?)?|mW)(?=\s|$)",
    re.ASCII,
)
TEMPERATURE = re.compile(r"(?:^|(?<=\s))([A-Za-z][\w-]*)@(-?[0-9]{1,5}(?:\.[0-9]{1,6})?)C(?:/-?[0-9.]+C)?(?=\s|$)", re.ASCII)
MEMORY = re.compile(rf"\b(RAM|SWAP|IRAM) {N}/{N}([kM])B")
CPU = re.compile(rf"\bCPU \[([^\]]*)\](?:@{N})?")
CORE = re.compile(rf"{N}%(?:@{N})?")
GPU = re.compile(rf"\bGR3D_FREQ (?:{N}%)?(?:@(?:\[([0-9,]+)\]|{N}))?(?=\s|$)")
FIGURE = re.compile(r"[0-9]+(?:\.[0-9]+)?")
BYTES = {"k": 1024, "M": 1024**2}


@dataclass(frozen=True, slots=True)
class Stats:
    """One line. What it does not say is empty or None; loads are fractions, a core that is off is None."""

    date_s: float | None = None  # local time, whole seconds from 1970
    power_w: Mapping[str, float] = field(default_factory=dict)
    unusable: Mapping[str, str] = field(default_factory=dict)  # rails named twice or below zero: {rail: what was seen}
    temperature_c: Mapping[str, float] = field(default_factory=dict)
    ram_bytes: tuple[int, int] | None = None  # used, total
    swap_bytes: tuple[int, int] | None = None
    cores: tuple[tuple[float, float | None] | None, ...] = ()  # load, Hz
    gpu_load: float | None = None
    gpu_hz: tuple[float, ...] = ()

    @property
    def rails(self) -> frozenset[str]:
        return frozenset((*self.power_w, *self.unusable))


def parse(line: str) -> Stats | None:
    """What a whole line says; None for a line that is not tegrastats' own. Rails labelled NC are left out."""
    memory = {found[1]: found for found in MEMORY.finditer(line)} if len(line) <= LONGEST else {}
    if "RAM" not in memory:
        return None
    power, unusable = _rails(line)
    load, clocks = _gpu(line)
    return Stats(
        date_s=_date_s(line),
        power_w=power,
        unusable=unusable,
        temperature_c=_temperatures(line),
        ram_bytes=_bytes(memory["RAM"]),
        swap_bytes=_bytes(memory["SWAP"]) if "SWAP" in memory else None,
        cores=_cores(line),
        gpu_load=load,
        gpu_hz=clocks,
    )


def _rails(line: str) -> tuple[dict[str, float], dict[str, str]]:
    power: dict[str, float] = {}
    unusable: dict[str, str] = {}
    for found in RAIL.finditer(line):
        rail, milliwatts = found[1], int(found[2])
        if rail == boards.UNCONNECTED:
            continue
        if rail in power or rail in unusable:
            unusable[rail] = f"{rail} appears twice"
        elif milliwatts < 0:
            unusable[rail] = f"{rail} is {milliwatts} mW"
        else:
            power[rail] = milliwatts / 1e3
    return {rail: watts for rail, watts in power.items() if rail not in unusable}, unusable


def _date_s(line: str) -> float | None:
    found = DATE.match(line)
    if found is None:
        return None
    month, day, year, hour, minute, second = map(int, found.groups())
    try:
        return (datetime(year, month, day, hour, minute, second) - datetime(1970, 1, 1)).total_seconds()
    except ValueError:
        return None


def _temperatures(line: str) -> dict[str, float]:
    read = ((found[1], float(found[2])) for found in TEMPERATURE.finditer(line))
    return {zone: celsius for zone, celsius in read if celsius >= COLDEST_C and (zone, celsius) not in DUMMIES}


def _bytes(found: re.Match[str]) -> tuple[int, int]:
    return int(found[2]) * BYTES[found[4]], int(found[3]) * BYTES[found[4]]


def _cores(line: str) -> tuple[tuple[float, float | None] | None, ...]:
    found = CPU.search(line)
    if found is None:
        return ()
    cores = [CORE.fullmatch(core.strip()) for core in found[1].split(",")]
    return tuple(core and (int(core[1]) / 100, _hz(core[2] or found[2])) for core in cores)


def _gpu(line: str) -> tuple[float | None, tuple[float, ...]]:
    found = GPU.search(line)
    if found is None:
        return None, ()
    clocks = (found[2] or found[3] or "").split(",")
    return int(found[1]) / 100 if found[1] else None, tuple(int(mhz[:9]) * 1e6 for mhz in clocks if mhz)


def _hz(mhz: str | None) -> float | None:
    return int(mhz) * 1e6 if mhz else None


@dataclass(frozen=True, slots=True)
class Tegrastats:
    """A log of tegrastats. ``whole`` names the rails that add up to the total (comma-separated) where the board is not known.

    ``averaging_s`` is the board's INA3221's: ``update_interval`` of its driver says it, L4T's default is 0.42 s.
    """

    averaging_s: float = INA3221_S
    whole: str = ""
    _totals: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.averaging_s >= 0:
            raise ValueError("averaging_s must not be negative")

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        """After ``totals``: what those rails measure."""
        return boards.scope(self._totals) if self._totals else boards.MODULE

    @property
    def systematic(self) -> float:
        return SYSTEMATIC

    def recognises(self, head: Sequence[str]) -> bool:
        """Any line with tegrastats' memory and its processors or its GPU; no other tool prints these."""
        return any((stats := parse(line)) is not None and bool(stats.cores or "GR3D" in line or stats.power_w) for line in head)

    def totals(self, rails: Sequence[str]) -> tuple[str, ...]:
        """The named rails, or a known board's; () for another. Raises MeterError for a name that the log does not have."""
        found = boards.chosen(rails, self.whole) if self.whole else boards.total_rails(rails)
        if isinstance(found, str):
            raise MeterError(found)
        self._totals[:] = found
        return found

    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]:
        """Blocks of rows. Raises MeterError for a log without dates whose interval nobody says."""
        samples = _samples(lines, doubts)
        if hints.interval_s is not None:
            interval_s = hints.interval_s
            rows: Iterator[Row] = (Row(n * interval_s, stats.power_w) for n, stats in enumerate(samples))
        else:
            rows = _stamped(_seconds(samples), doubts)
        yield from blocks(rows)


def _samples(lines: Iterable[str], doubts: Doubts) -> Iterator[Stats]:
    """A record per sample, an empty one for a damaged line. A last line that may be cut is damaged."""
    usual: frozenset[str] = frozenset()
    before, (held_at, held) = "", (0, "")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if held:
            stats = _sample(held, usual, held_at, doubts)
            usual = usual or (stats.rails if stats else usual)
            if stats is not None:
                yield stats
        before, (held_at, held) = held, (number, line)
    if before and parse(held) is not None and _ending(held) != _ending(before):
        doubts.add("bad_lines", f"line {held_at}, the last one, ends otherwise than the line before: it may be cut, and was left out")
    elif held and (stats := _sample(held, usual, held_at, doubts)) is not None:
        yield stats


def _sample(line: str, usual: frozenset[str], number: int, doubts: Doubts) -> Stats | None:
    stats = parse(line)
    if stats is None:
        doubts.add("bad_lines", f"line {number} is not tegrastats': {line.strip()[:60]!r}")
        return Stats() if "CPU [" in line[:LONGEST] else None  # a piece of a sample keeps its place in time
    for seen in stats.unusable.values():
        doubts.add("duplicate_rail" if seen.endswith("twice") else "invalid_values", f"line {number}: {seen}")
    if missing := usual - stats.rails:
        doubts.add("bad_lines", f"line {number} lacks {', '.join(sorted(missing))}")
    return stats


def _ending(line: str) -> str:
    return FIGURE.sub("0", " ".join(line.split()[-2:]))


def _seconds(samples: Iterable[Stats]) -> Iterator[tuple[float, list[Stats]]]:
    """Samples with the second that they share; one without a date belongs to the second before."""
    second: float | None = None
    group: list[Stats] = []
    for stats in samples:
        if second is None and stats.date_s is None:
            if not stats.rails:
                continue  # a damaged first line
            raise MeterError("this tegrastats log has no dates (JetPack 4 and before): give --interval, the seconds between its lines")
        if second is not None and stats.date_s is not None and stats.date_s != second:
            yield second, group
            group = []
        second = second if stats.date_s is None else stats.date_s
        group.append(stats)
        if len(group) > MOST_A_SECOND:
            raise MeterError(f"more than {MOST_A_SECOND} lines share one date: give --interval, the seconds between the lines")
    if second is not None:
        yield second, group


def _stamped(seconds: Iterable[tuple[float, list[Stats]]], doubts: Doubts) -> Iterator[Row]:
    """Rows spread evenly within their seconds; the first second and the last are taken to be as full as their neighbours."""
    most, walker = 0, iter(seconds)
    current, before = next(walker, None), 0
    while current is not None:
        after = next(walker, None)
        second, group = current
        most = max(most, len(group))
        whole = max(len(group), before if after is None else 0, len(after[1]) if after is not None and not before else 0)
        skipped = whole - len(group) if not before else 0
        for n, stats in enumerate(group):
            yield Row(second + (skipped + n + 0.5) / whole, stats.power_w)
        current, before = after, len(group)
    if most:
        doubts.add("stamps_coarse", f"the dates have a resolution of 1 s, and up to {most} samples share one")
