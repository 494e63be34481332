"""Racing: many candidates, short trials in interleaved rounds, losers dropped as soon as the rounds tell.

A round runs every candidate that is left once, in an order of its own, so that what the machine does meanwhile hits all alike; ratios are
paired by round. Pure but for the trial it is given. Knows no artifact.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from edgejoule.errors import EdgejouleError
from edgejoule.measure.stats import ratio_interval
from edgejoule.records import Interval

HOPELESS, SLOW = 3.0, 1.5  # times the best: dropped after one round, after two; single rounds are noisy
TELLING = 3  # rounds before a paired interval may drop a candidate, and after which a race with one left is over
FAILED = "failed: "  # what the reason of a candidate that broke, and was not merely slow, begins with
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Lane(Generic[C]):
    """How one candidate did: seconds of each round that it ran in, in order, and why it left the race early (empty where it did not)."""

    candidate: C
    seconds: tuple[float, ...]
    left: str = ""


def race(
    candidates: Sequence[C], trial: Callable[[C, int], float], rounds: int, seed: int = 0, failures: tuple[type[EdgejouleError], ...] = ()
) -> tuple[Lane[C], ...]:
    """The lanes, those that ran to the end first, fastest first (by the geometric mean of paired rounds), the others after them.

    ``trial(candidate, round)`` gives seconds; one that raises one of ``failures`` leaves the race with that reason.
    """
    lanes: dict[C, Lane[C]] = {candidate: Lane(candidate, ()) for candidate in candidates}
    for number in range(rounds):
        running = [lane.candidate for lane in lanes.values() if not lane.left]
        if len(running) <= 1 and number >= TELLING:
            break
        random.Random(f"{seed} {number}").shuffle(running)
        for candidate in running:
            lane = lanes[candidate]
            try:
                lanes[candidate] = Lane(candidate, (*lane.seconds, trial(candidate, number)))
            except failures as error:
                lanes[candidate] = Lane(candidate, lane.seconds, f"{FAILED}{error}")
        for loser, why in _losers([lane for lane in lanes.values() if not lane.left]):
            lanes[loser] = Lane(loser, lanes[loser].seconds, why)
    return tuple(sorted(lanes.values(), key=lambda lane: (bool(lane.left), _mean(lane.seconds))))


def ratio(ours: Lane[C], theirs: Lane[C]) -> Interval | None:
    """Ours over theirs over the rounds that both ran in: the first so many; None where there is none."""
    n = min(len(ours.seconds), len(theirs.seconds))
    return ratio_interval(ours.seconds[:n], theirs.seconds[:n]) if n else None


def _losers(running: Sequence[Lane[C]]) -> list[tuple[C, str]]:
    if len(running) < 2:
        return []
    best = min(running, key=lambda lane: _mean(lane.seconds))
    found = []
    for lane in running:
        if lane is best or (slower := ratio(lane, best)) is None:
            continue
        told = slower.n >= TELLING and slower.low is not None and slower.low > 1.0
        if told or slower.value > (HOPELESS if slower.n == 1 else SLOW):
            found.append((lane.candidate, f"dropped after {slower.n} round{'s' * (slower.n > 1)}: {slower.value:.2f} x the best"))
    return found


def _mean(seconds: Sequence[float]) -> float:
    """Geometric; infinite where there is none."""
    return float(np.exp(np.mean(np.log(seconds)))) if seconds else float("inf")
