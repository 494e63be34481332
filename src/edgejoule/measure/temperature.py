"""How warm the machine is: whether it has stopped heating up (warm-up), and waiting until it has cooled down (between repeats).

Reads the kernel's thermal zones; a machine that shows none is never waited for. Sets no fan and no clock. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

SYSTEM = Path("/")
SLOPE_C_PER_MIN = 1.0
LOOK_BACK_S = 30.0
NEAR_C = 2.0  # of the temperature at the start of the run
COOL_CAP_S = 300.0
PERIOD_S = 1.0
DUMMIES_C = (-256.0, 50.0, 100.0)  # what boards report for rails and PMICs that have no sensor


def hottest_c(root: Path = SYSTEM) -> float | None:
    """The highest believable thermal zone in degrees Celsius; None where there is none."""
    found = []
    for zone in root.glob("sys/class/thermal/thermal_zone*"):
        try:
            kind, reading = (zone / "type").read_text().strip(), int((zone / "temp").read_text()) / 1000
        except (OSError, ValueError):  # a zone that is switched off answers with an error
            continue
        dummy = reading in DUMMIES_C and "pmic" in kind.lower()
        if not dummy and -40 < reading < 150:
            found.append(reading)
    return max(found, default=None)


class Heat:
    """Remembers temperatures, at most one a second; ``steady`` says whether they have stopped rising or falling."""

    def __init__(self, clock: Callable[[], float], root: Path = SYSTEM) -> None:
        self._clock, self._root = clock, root
        self._seen: list[tuple[float, float]] = []

    def steady(self) -> bool:
        """Below 1 °C/min over the last 30 s, by least squares; true where the machine shows no temperature."""
        now = self._clock()
        if not self._seen or now - self._seen[-1][0] >= PERIOD_S:
            reading = hottest_c(self._root)
            if reading is None:
                return True
            self._seen.append((now, reading))
        recent = [(t, c) for t, c in self._seen if now - t <= LOOK_BACK_S]
        if now - self._seen[0][0] < LOOK_BACK_S / 2 or len(recent) < 3:
            return False  # a sensor's steps of a degree need time to show a slope
        mean_t = sum(t for t, _ in recent) / len(recent)
        mean_c = sum(c for _, c in recent) / len(recent)
        spread = sum((t - mean_t) ** 2 for t, _ in recent)
        slope = sum((t - mean_t) * (c - mean_c) for t, c in recent) / spread
        return abs(slope) * 60 < SLOPE_C_PER_MIN


def cool_down(
    least_s: float,
    start_c: float | None,
    root: Path = SYSTEM,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Wait ``least_s``, then until within 2 °C of ``start_c``, at most five minutes. Returns the seconds waited; 0 s asks for nothing."""
    if least_s <= 0:
        return 0.0
    began = clock()
    sleep(least_s)
    while start_c is not None and clock() - began < COOL_CAP_S:
        now_c = hottest_c(root)
        if now_c is None or now_c <= start_c + NEAR_C:
            break
        sleep(PERIOD_S)
    return clock() - began
