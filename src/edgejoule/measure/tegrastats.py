"""Jetson's power rails through NVIDIA's own tegrastats, which needs no root on most releases. Grade C, scope: what the board's rails hold.

The program is started with ``--interval`` and its lines are stamped as they arrive. Which rails make the total is in ``boards.py``; on
a board that is not there, the user names them. The module's rails leave out the carrier board. tegrastats itself costs processor time,
which is in the figure: the meter counts it. Does not know over what time the board's sensor averages: L4T's default is 0.42 s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.measure import boards
from edgejoule.measure.streamed import probe_stream
from edgejoule.measure.traces.tegrastats import SYSTEMATIC, parse
from edgejoule.records import Grade

SHORTEST_S = 0.1  # below, the sensor says the same again, and reading it wakes the processors
PATIENCE = 3  # lines without a rail


@dataclass(frozen=True, slots=True)
class Tegrastats:
    """tegrastats at ``path``, a line every ``period_s``; ``whole`` names the rails that add up to the total (comma-separated)."""

    path: str = "tegrastats"
    period_s: float = 0.1
    averaging_s: float = 0.42
    whole: str = ""
    _totals: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not SHORTEST_S <= self.period_s <= 60 or not 0 <= self.averaging_s <= 60:
            raise ValueError(f"period_s must be from {SHORTEST_S:g} to 60 and averaging_s from 0 to 60")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "power_w"

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        """Once a line was read, what the board's total holds; before, what that of most boards does."""
        return boards.scope(self._totals) if self._totals else boards.MODULE

    @property
    def systematic(self) -> float:
        return SYSTEMATIC

    def total(self, rail: str) -> bool:
        return rail in self._totals

    def probe(self) -> str | None:
        try:
            self.argv()
        except MeterError as error:
            return str(error)
        return probe_stream(self)

    def argv(self) -> Sequence[str]:
        """Raises MeterError where there is no tegrastats."""
        found = shutil.which(self.path)
        if found is None:
            raise MeterError(
                f"{self.path} is not there: it comes with JetPack on NVIDIA Jetson boards; on other machines use another meter"
            )
        return (found, "--interval", str(round(self.period_s * 1000)))

    def parser(self) -> Callable[[str], Mapping[str, float] | None]:
        """A line -> {rail: watts}. Raises MeterError where the first lines have no rails, or rails of no known board."""
        blind = 0
        self._totals.clear()

        def sample(line: str) -> Mapping[str, float] | None:
            nonlocal blind
            stats = parse(line)
            if stats is None:
                return None
            if not self._totals:
                if not stats.rails:
                    blind += 1
                    if blind >= PATIENCE:
                        raise MeterError(
                            f"{self.path} prints no power rails: run it as root, or use an external meter (Jetson Nano 2GB has no sensor)"
                        )
                    return None
                found = boards.chosen(stats.rails, self.whole)
                if isinstance(found, str):
                    raise MeterError(found)
                self._totals.extend(found)
            return stats.power_w

        return sample
