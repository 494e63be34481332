"""Warming up until the timings have settled: when a series of block medians is steady, and the loop that makes it.

Steady: of the last 20 block medians, the first ten and the last ten have quartiles within 5 % of each other, the first ten's mean
lies in [-50 %, +10 %] of the last ten's (pyperf's rules), and no slope of 1 %/min or more can be told from the scatter.
The slope is judged by its own standard error, because over a few seconds chance alone makes slopes of several %/min.
Whether the temperature has settled too is asked of the caller, who can read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgejoule.records import Floats, Protocol

BLOCKS = 20
FEWEST = 6  # blocks to judge by, where the cap leaves no time for twenty
QUARTILES, MEAN_BELOW, MEAN_ABOVE, SLOPE_PER_MIN = 0.05, 0.50, 0.10, 0.01


@dataclass(frozen=True, slots=True)
class Warmed:
    """What the warm-up saw. ``typical_s`` is the median inference of its last blocks."""

    steady: bool
    inferences: int
    typical_s: float
    blocks: int


def warm_up(infer: Callable[[int], Any], protocol: Protocol, clock: Callable[[], float], cool: Callable[[], bool] = lambda: True) -> Warmed:
    """Call ``infer(i)`` for at least ``warmup_s`` and ``warmup_inferences``, then until steady or the cap (0: seek no steadiness)."""
    block_s = protocol.warmup_s / BLOCKS
    start = block_start = clock()
    medians: list[float] = []
    middles: list[float] = []
    block: list[float] = []
    done, settled = 0, False
    while True:
        before = clock()
        infer(done)
        now = clock()
        done += 1
        block.append(now - before)
        if now - block_start >= block_s:
            medians.append(float(np.median(block)))
            middles.append((block_start + now) / 2)
            block, block_start = [], now
        enough = done >= protocol.warmup_inferences and now - start >= protocol.warmup_s
        capped = now - start >= protocol.warmup_cap_s
        if enough and not capped and len(medians) >= BLOCKS:
            settled = is_steady(medians[-BLOCKS:], middles[-BLOCKS:]) and cool()
        if enough and (settled or capped):
            break
    if not settled and len(medians) >= FEWEST:
        settled = is_steady(medians[-BLOCKS:], middles[-BLOCKS:]) and cool()
    typical = float(np.median(medians[-BLOCKS:] if medians else block))
    return Warmed(settled or protocol.warmup_cap_s == 0, done, typical, len(medians))


def warm_up_by_windows(
    window: Callable[[float, int], Floats], protocol: Protocol, clock: Callable[[], float], cool: Callable[[], bool] = lambda: True
) -> Warmed:
    """As ``warm_up``, of what times itself: whole windows, of ``warmup_s`` and ``warmup_inferences`` at least, until one is steady.

    ``window`` gives instants (n + 1,). A window cannot be ended early, and its program takes its time to start: the cap says when no
    other begins.
    """
    start, done = clock(), 0
    while True:
        instants = np.asarray(window(protocol.warmup_s, protocol.warmup_inferences))
        spent = np.diff(instants)
        done += len(spent)
        count = min(BLOCKS, len(spent))
        medians = [float(np.median(block)) for block in np.array_split(spent, count)]
        middles = [float(np.mean(block)) for block in np.array_split(instants[1:], count)]
        settled = is_steady(medians, middles) and cool()
        if settled or clock() - start >= protocol.warmup_cap_s:
            return Warmed(settled or protocol.warmup_cap_s == 0, done, float(np.median(medians)), count)


def is_steady(medians: Sequence[float], middles_s: Sequence[float]) -> bool:
    """Whether block medians, at these times, have settled. An even number of blocks is best; at least six."""
    values, times = np.asarray(medians, dtype=np.float64), np.asarray(middles_s, dtype=np.float64)
    if len(values) < FEWEST or np.any(values <= 0):
        return False
    half = len(values) // 2
    early, late = values[:half], values[-half:]
    for quartile in (25, 75):
        ratio = np.percentile(early, quartile) / np.percentile(late, quartile)
        if abs(ratio - 1) > QUARTILES:
            return False
    if not -MEAN_BELOW <= np.mean(early) / np.mean(late) - 1 <= MEAN_ABOVE:
        return False
    return _slope_excess(values / np.median(values), times) < SLOPE_PER_MIN / 60


def _slope_excess(values: np.typing.NDArray[np.float64], times: np.typing.NDArray[np.float64]) -> float:
    """The part of the least-squares slope (per second) that its own two standard errors do not explain."""
    centred = times - times.mean()
    spread = float(np.sum(centred**2))
    if spread == 0:
        return 0.0
    slope = float(np.sum(centred * (values - values.mean()))) / spread
    residual = values - values.mean() - slope * centred
    error = math.sqrt(float(np.sum(residual**2)) / (len(values) - 2) / spread)
    return max(0.0, abs(slope) - 2 * error)
