"""On-device power monitors of Pixel phones (ODPM) over adb: energy counters of single rails of the chip. Grade C, scope: rail.

The counters (microwatt-seconds) are latched about every 0.1 s and carry the phone's own time of that (milliseconds since it was booted).
A way through adb takes 20-50 ms and sometimes far longer, so that the instant of arrival says little: the joules are brought from the
phone's time to the middle of the way, which is what the meter stamps, along the mean power between the last two latches. The shortest
delay seen ties the two clocks; ``stamp_uncertainty_s`` is half of that way. Two monitors have rails of their own.
Which rails add up to the phone is documented nowhere: ``whole="S10M_VDD_TPU,S2M_VDD_CPUCL2"`` says it, nothing is guessed.
"""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.measure import adb as phone
from edgejoule.records import Grade

UPDATE_S = 0.1
FOLDERS = "/sys/bus/iio/devices/iio:device*"
SLOW_S = 1.0  # a way that long leaves the stamp too uncertain
STALE_S = 2.0
READS = 256  # whose delays are compared
BEGIN = re.compile(r"t=(\d{1,15})")
CHANNEL = re.compile(r"CH\d+(?:\(T=(\d{1,15})\))?\[([^\[\]]{1,60})\], *(\d{1,18})")
ENABLED = re.compile(r"CH\d+\[([^\[\]]+)\]:(.+)")


@dataclass(frozen=True, slots=True)
class Latch:
    """A counter as the phone latched it. ``at_s`` is None where an old kernel gives no time."""

    at_s: float | None  # since the phone was booted
    joules: float


@dataclass(slots=True)
class _Rail:
    """A rail's last latch, its power since the one before, and what was last said of it."""

    at_s: float
    joules: float
    watts: float = 0.0
    said_j: float = 0.0


@dataclass(slots=True)
class _Seen:
    """What earlier reads found: the rails, (delay, way) in seconds of each read, and rails that came twice in one."""

    rails: dict[str, _Rail] = field(default_factory=dict)
    delays: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=READS))
    twice: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Odpm:
    """The phone ``serial`` (the only one, where empty), read every ``period_s`` seconds; ``whole`` names the rails that add up."""

    serial: str = ""
    whole: str = ""
    adb: str = "adb"
    period_s: float = 0.2
    _seen: _Seen = field(default_factory=_Seen, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.period_s > 0:
            raise ValueError(f"period_s={self.period_s:g} is not above 0")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j"

    @property
    def averaging_s(self) -> float:
        return UPDATE_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "rail"

    @property
    def stamp_uncertainty_s(self) -> float:
        """Half of the way through adb whose delay was the shortest; before the first read, how often the counters are latched."""
        return min(self._seen.delays)[1] / 2 if self._seen.delays else UPDATE_S

    def total(self, rail: str) -> bool:
        return rail in self._wanted()

    def probe(self) -> str | None:
        try:
            self._latches()
        except MeterError as error:
            return str(error)
        return None

    def doubts(self) -> dict[str, str]:
        """Heat and charger as Android tells them now, and rails that came twice."""
        twice = {"duplicate_rail": ", ".join(sorted(self._seen.twice))} if self._seen.twice else {}
        return phone.doubts(self.adb, self.serial) | twice

    def read(self) -> dict[str, float]:
        """{rail: joules} at the middle of the way through adb. Raises MeterError where adb fails or a counter goes back."""
        before = time.perf_counter()
        latches = self._latches()
        way_s = time.perf_counter() - before
        if way_s > SLOW_S:
            raise MeterError(f"adb took {way_s:.2g} s for one reading: expected less than {SLOW_S:g} s, close other adb sessions")
        middle_s = before + way_s / 2
        known = [latch.at_s for latch in latches.values() if latch.at_s is not None]
        if known:
            self._seen.delays.append((middle_s - max(known), way_s))
        tied_s = min(self._seen.delays)[0] if known else 0.0
        return {rail: self._joules(rail, latch, middle_s - tied_s) for rail, latch in latches.items()}

    def _joules(self, rail: str, latch: Latch, now_s: float) -> float:
        """A counter at ``now_s`` on the phone's clock."""
        at_s = now_s if latch.at_s is None else latch.at_s
        last = self._seen.rails.setdefault(rail, _Rail(at_s, latch.joules))
        if at_s < last.at_s or latch.joules < last.joules:
            raise MeterError(f"the counter of {rail} went back: the phone was restarted or its monitor reset, measure again")
        if now_s - at_s > STALE_S:
            raise MeterError(f"the counter of {rail} was not latched for {now_s - at_s:.1f} s: expected every {UPDATE_S:g} s")
        if at_s > last.at_s:
            last.watts = (latch.joules - last.joules) / (at_s - last.at_s)
            last.at_s, last.joules = at_s, latch.joules
        last.said_j = max(last.said_j, last.joules + last.watts * max(0.0, now_s - at_s))
        return last.said_j

    def _wanted(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.whole.split(",") if name.strip())

    def _latches(self) -> dict[str, Latch]:
        """All rails. Raises MeterError where ``whole`` is not said, or names one that is not there."""
        latches, twice = parse(phone.ask(self.adb, self.serial, f"cat {FOLDERS}/energy_value"))
        self._seen.twice |= twice
        if not latches:
            raise MeterError("the phone's energy_value holds no counters: expected lines such as CH0(T=473848)[S10M_VDD_TPU], 3161249")
        wanted = self._wanted()
        missing = [name for name in wanted if name not in latches]
        if not wanted or missing:
            lack = f"the phone has no rail {', '.join(missing)}" if missing else "nobody knows which rails add up to the phone"
            raise MeterError(f'{lack}: name them with whole="…", of {self._names(latches)}')
        return latches

    def _names(self, latches: dict[str, Latch]) -> str:
        """The rails with what they feed, where the phone says it."""
        try:
            feeds = dict(ENABLED.findall(phone.ask(self.adb, self.serial, f"cat {FOLDERS}/enabled_rails")))
        except MeterError:
            feeds = {}
        return ", ".join(f"{rail} ({feeds[rail].strip()})" if rail in feeds else rail for rail in latches)


def parse(text: str) -> tuple[dict[str, Latch], frozenset[str]]:
    """``energy_value`` of one monitor or several -> {rail: Latch}, and the rails that come twice and are therefore left out.

    A last line without its end is cut, and left out too.
    """
    latches, twice = dict[str, Latch](), set[str]()
    begun_s: float | None = None
    for line in text.split("\n")[:-1]:
        begin, channel = BEGIN.fullmatch(line.strip()), CHANNEL.fullmatch(line.strip())
        if begin:
            begun_s = int(begin[1]) / 1e3
        elif channel:
            if channel[2] in latches:
                twice.add(channel[2])
            at_s = begun_s if channel[1] is None else int(channel[1]) / 1e3
            latches[channel[2]] = Latch(at_s, int(channel[3]) / 1e6)
    return {rail: latch for rail, latch in latches.items() if rail not in twice}, frozenset(twice)
