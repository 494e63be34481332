"""The meter of last resort: CPU seconds of this process times assumed watts. A model, grade D, never a measurement.

How poor it is: the watts are guesses (4 W a core, 2 W idle) and the same on every chip; memory, caches, frequency, vector units,
the accelerator and the rest of the board are not seen. It ranks models by their CPU time and by nothing else, and its
absolute figure can be off by 40 % or by several times. It claims no interval. Set ``core_w`` and ``idle_w`` from a wall meter to
make it less wrong.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from edgejoule.records import Grade


@dataclass(frozen=True, slots=True)
class Estimate:
    """Energy counter = ``core_w`` x this process's CPU seconds (all its threads) + ``idle_w`` x wall seconds. Watts."""

    core_w: float = 4.0
    idle_w: float = 2.0
    period_s: float = 0.02  # a reading costs microseconds

    def __post_init__(self) -> None:
        if not (self.core_w > 0 and self.idle_w >= 0 and self.period_s > 0):
            raise ValueError("core_w and period_s must be above 0 and idle_w not below")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j"

    @property
    def averaging_s(self) -> float:
        return 0.0

    @property
    def grade(self) -> Grade:
        return "D"

    @property
    def scope(self) -> str:
        return "process"

    def probe(self) -> str | None:
        return None

    def read(self) -> dict[str, float]:
        return {"estimate": self.core_w * time.process_time() + self.idle_w * time.perf_counter()}
