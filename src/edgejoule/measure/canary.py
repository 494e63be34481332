"""A fixed small workload that tells whether the processor still runs as fast as it did: its time before over its time after.

Timed before the artifact is loaded and again after the window's idle, on one core; a ratio above 1.10 says that the processor was
throttled (the rule of Android's androidx.benchmark). The work is arithmetic on an array that fits into the first cache, so that
memory and other cores matter little. The best of many short runs is taken: a busy machine interrupts some of them, hardly all; the
runs go on until the best one has stood for a while, so that a clock that ramps up from idle has arrived, and much longer before
it is said that the processor is slow. Sees one core of the processor, not a GPU. A lasting load on the sibling of a core that runs
two threads looks like throttling, and so does a clock that another program's load lowers: both change what is measured, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgejoule.caveats import caveat
from edgejoule.records import Caveat

SLOW = 1.10
LENGTH = 1024  # float64: 8 KiB, and as much again for the result
PAGE = 4096
ROUNDS = 16  # a run takes 30 to 200 µs: shorter than a scheduler's slice
PATIENCE = 400  # runs without a better one end it
GAIN = 0.99  # a better one is better by this much
MOST = 8000  # runs, where it looks slow: a third of a second, on a small board a little over one


def best_s(clock: Callable[[], float] = time.perf_counter, cold_s: float = 0.0) -> float:
    """The shortest time of the fixed work in seconds, after some 10 to 100 ms.

    With ``cold_s``, what it took before: where the work looks slow against it, the runs go on for longer.
    """
    data, room = _arrays()
    best, since = float("inf"), 0
    for _ in range(MOST):
        began = clock()
        _work(data, room)
        spent = clock() - began
        since = 0 if spent < GAIN * best else since + 1
        best = min(best, spent)
        if since >= PATIENCE and (cold_s <= 0 or best <= SLOW * cold_s):
            break
    return best


def doubts(cold_s: float, warm_s: float) -> list[Caveat]:
    """``canary_slow`` where the work took more than 1.10 times as long as when cold; a time of zero or less gives no verdict."""
    if not (cold_s > 0 and warm_s > SLOW * cold_s):
        return []
    return [caveat("canary_slow", f"{1e6 * warm_s:.4g} µs, where it took {1e6 * cold_s:.4g} µs before: {warm_s / cold_s:.2f} times")]


def _arrays() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Two arrays that always lie the same way in a page: reads that share low address bits with a write before are a quarter slower."""
    pages = np.zeros(4 * LENGTH * 8 + PAGE, dtype=np.uint8)
    first = -pages.ctypes.data % PAGE
    second = first + 2 * LENGTH * 8 + PAGE // 2
    data, room = (pages[at : at + LENGTH * 8].view(np.float64) for at in (first, second))
    np.copyto(data, np.linspace(0.5, 1.5, LENGTH))
    return data, room


def _work(data: npt.NDArray[np.float64], room: npt.NDArray[np.float64]) -> None:
    """Element-wise arithmetic only: numpy hands it to no second thread, unlike matrix products."""
    np.copyto(room, data)
    for _ in range(ROUNDS):
        np.multiply(room, room, out=room)
        np.add(room, data, out=room)
        np.sqrt(room, out=room)
