"""``perf stat -I`` running beside the work: the processor package's energy where powercap's files may not be read but perf may.

Grade C, scope: the package; the counters are RAPL's. Each line is the energy of the interval just ended, so that their sum is exact. Prefer
``rapl`` where it works: it needs no program beside the work. Reads perf's CSV in the C locale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgejoule.caveats import Doubts
from edgejoule.measure.streamed import probe_stream
from edgejoule.measure.traces.perf import UPDATE_S, IntervalSums, figure, is_package
from edgejoule.records import Grade

LEAST_S = 0.01  # below, perf itself is busy
EVENTS = ("pkg", "cores", "gpu", "ram", "psys")
REMEDY = "system-wide perf needs root or kernel.perf_event_paranoid <= 0, an Intel or AMD processor, and no virtual machine"


@dataclass(frozen=True, slots=True)
class Perf:
    """A line of every one of ``events`` each ``period_s`` seconds; only ``pkg`` is the whole. ``command`` is perf's path."""

    events: str = "pkg"
    period_s: float = 0.1
    command: str = "perf"
    _seen: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.period_s >= LEAST_S:
            raise ValueError(f"period_s={self.period_s:g} is below {LEAST_S:g} s")
        if not self._names() or not set(self._names()) <= set(EVENTS) or len(set(self._names())) < len(self._names()):
            raise ValueError(f"events={self.events!r} is not a list of {', '.join(EVENTS)}, each once")

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
        return "package"

    def total(self, rail: str) -> bool:
        return is_package(rail)

    def probe(self) -> str | None:
        said = probe_stream(self)
        return None if said is None else f"{said.rstrip(' .')} ({REMEDY})"

    def argv(self) -> Sequence[str]:
        """perf prints on stderr unless it is given another channel."""
        events = ",".join(f"power/energy-{name}/" for name in self._names())
        return [self.command, "stat", "-a", "-x,", "--log-fd", "1", "-I", f"{1e3 * self.period_s:.0f}", "-e", events]

    def parser(self) -> Callable[[str], Mapping[str, float] | None]:
        """{rail: joules since perf began}, once all events of an interval have come."""
        doubts = Doubts()
        sums = IntervalSums(doubts, len(self._names()))
        self._seen.clear()

        def parse(line: str) -> Mapping[str, float] | None:
            found = figure(line)
            if found is None or not found.rail or found.stamp is None:
                return None
            rows = list(sums.add(found, ".", f"at {found.stamp} s perf's line"))
            self._seen.update({doubt.code: doubt.seen for doubt in doubts.caveats()})
            sample = {rail: value for rail, value in rows[-1].energy_j.items() if not math.isnan(value)} if rows else {}
            return sample or None

        return parse

    def doubts(self) -> dict[str, str]:
        """Events that were not counted, or counted twice."""
        return self._seen.copy()

    def _names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.events.split(",") if name.strip())
