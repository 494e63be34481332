"""The timed window: back-to-back inferences, a camera's frames, or several cameras at once, and what the timings themselves give away.

The loops do as little as they can (benchmarks/overhead.py keeps their share below 1 %). Back to back, an inference's latency is
the time from the end of the one before to its own end, so that latencies add up to the window exactly; at a frame rate it is the time
from the frame's arrival to its end. Images are cycled from a pool that is ready before. Knows no meter and no protocol.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import queue
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgejoule.caveats import caveat
from edgejoule.errors import DataError
from edgejoule.records import Caveat, Floats, floats

POOL = 64  # distinct images at most: enough to defeat caches of one input, small enough for a board
DRIFT, DRIFT_SLIGHT = 0.03, 0.02
THIRD = 5  # inferences in a third of the window: fewer give no verdict on drift
OUTLYING = 14.826  # median absolute deviations, as hyperfine's
ROOT_HALF_PI = math.sqrt(math.pi / 2)  # a normal distribution's standard deviation over its mean absolute deviation
SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


@dataclass(frozen=True, slots=True)
class Timed:
    """A window: when it began and ended, seconds per inference, and at a frame rate how many frames came and how many were late.

    ``cameras`` says of several cameras which one each latency belongs to.
    """

    start_s: float
    stop_s: float
    latencies_s: Floats
    frames_due: int | None = None
    deadlines_missed: int | None = None
    cameras: Floats = field(default_factory=floats)


def image_pool(crops: npt.NDArray[np.uint8], batch: int) -> list[npt.NDArray[np.uint8]]:
    """Batches (B, C, H, W) of at most 64 distinct crops of (N, C, H, W); crops repeat only where a batch needs more than there are.

    Raises DataError where there is no crop or the array is not uint8 of rank 4.
    """
    if crops.ndim != 4 or crops.dtype != np.uint8 or not len(crops):
        raise DataError(f"expected at least one image as uint8 (N, C, H, W), found {crops.dtype} {crops.shape}: prepare the images again")
    distinct = crops[:POOL]
    batches = max(1, len(distinct) // batch)
    order = np.arange(batches * batch) % len(distinct)
    return [np.ascontiguousarray(distinct[order[i * batch : (i + 1) * batch]]) for i in range(batches)]


def run_window(
    infer: Callable[[Any], Any], pool: Sequence[Any], duration_s: float, at_least: int, expected: int, clock: Callable[[], float]
) -> Floats:
    """Call ``infer`` on the pool in turn until both the duration and the number are reached -> the instants (n + 1,) between calls.

    ``expected`` calls are allocated for beforehand; the buffer doubles where more are made. The garbage collector is held off
    (collect before: it takes milliseconds).
    """
    stamps = array("d", bytes(8 * (max(at_least, expected) + 2)))
    size = len(stamps)
    with _no_collection():
        done = 0
        stamps[0] = now = clock()
        deadline = now + duration_s
        for images in itertools.cycle(pool):
            infer(images)
            now = clock()
            done += 1
            if done == size:
                stamps.extend(array("d", bytes(8 * size)))
                size = len(stamps)
            stamps[done] = now
            if now >= deadline and done >= at_least:
                break
    return stamps[: done + 1]


def back_to_back(stamps: Floats) -> Timed:
    """(n + 1,) instants between inferences -> their window."""
    return Timed(stamps[0], stamps[-1], floats(np.diff(np.frombuffer(stamps, dtype=np.float64)).tolist()))


def run_frames(
    infer: Callable[[Any], Any],
    pool: Sequence[Any],
    duration_s: float,
    at_least: int,
    hz: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Timed:
    """A camera's window: frame i arrives i / hz after the start, and the device idles until it comes.

    The newest frame wins: those that came and went while an older one was worked on are dropped. A frame that is dropped or not done
    when the next one arrives has missed its deadline. The window ends when the next frame would come (or, if the device is busy
    then, when it is free), after at least ``duration_s`` and ``at_least`` finished inferences.
    """
    spent, late, frame = floats(), 0, 0
    with _no_collection():
        start = clock()
        for images in itertools.cycle(pool):
            arrival = start + frame / hz
            if (wait := arrival - clock()) > 0:
                sleep(wait)
            infer(images)
            now = clock()
            spent.append(now - arrival)
            late += now > start + (frame + 1) / hz
            newest = max(frame + 1, math.floor((now - start) * hz))
            late += newest - frame - 1
            frame = newest
            if newest / hz >= duration_s and len(spent) >= at_least:
                break
        if (rest := start + frame / hz - clock()) > 0:  # the idle after the last frame belongs to it as it does to the others
            sleep(rest)
        return Timed(start, clock(), spent, frame, late)


def together(infer: Callable[[Any], Any], n: int) -> Callable[[Sequence[Any]], Any]:
    """``infer`` on n images at once, in as many threads: how several cameras warm a session up. Raises what the first of them raises."""
    threads = ThreadPoolExecutor(n)  # kept: starting threads is no part of an inference
    return lambda images: list(threads.map(infer, images))


def run_streams(
    infer: Callable[[Any], Any], pool: Sequence[Any], duration_s: float, at_least: int, n: int, clock: Callable[[], float]
) -> Timed:
    """n cameras at once, a thread each, every one with its next image as soon as its last is done; ``infer`` is called by all of them.

    Each begins elsewhere in the pool. The window lasts from the common start until the last camera has finished the image that it was
    at when the duration and the number (``at_least``, of all together) were reached. Raises what the first camera that failed raised.
    """
    ends: list[Floats] = [floats() for _ in range(n)]
    errors: list[BaseException] = []
    start = [0.0]
    together_now = threading.Barrier(n, action=lambda: start.__setitem__(0, clock()))

    def camera(index: int) -> None:
        mine, images = ends[index], _from(pool, index, n)
        together_now.wait()
        try:
            for image in images:
                infer(image)
                mine.append(now := clock())
                if errors or (now >= start[0] + duration_s and sum(map(len, ends)) >= at_least):
                    return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=camera, args=(index,), daemon=True) for index in range(n)]
    with _no_collection():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return _of_cameras([floats([start[0], *mine]) for mine in ends])


def run_submitted(
    submit: Callable[[Any, Callable[[Any], None]], Any],
    pool: Sequence[Any],
    duration_s: float,
    at_least: int,
    n: int,
    clock: Callable[[], float],
) -> Timed:
    """As ``run_streams``, by a session that begins inferences and calls back when they are done: one thread hands all images over."""
    finished: queue.SimpleQueue[tuple[int, float, Any]] = queue.SimpleQueue()
    images = [_from(pool, index, n) for index in range(n)]
    done, under_way = 0, n
    with _no_collection():
        start = clock()
        stamps = [floats([start]) for _ in range(n)]
        for index in range(n):
            submit(next(images[index]), lambda answer, index=index: finished.put((index, clock(), answer)))  # type: ignore[misc]
        while under_way:
            index, now, answer = finished.get()
            under_way -= 1
            if isinstance(answer, BaseException):
                raise answer
            stamps[index].append(now)
            done += 1
            if now < start + duration_s or done < at_least:
                submit(next(images[index]), lambda answer, index=index: finished.put((index, clock(), answer)))  # type: ignore[misc]
                under_way += 1
    return _of_cameras(stamps)


def _from(pool: Sequence[Any], index: int, n: int) -> Iterator[Any]:
    """The pool in turn, for ever, from where camera ``index`` of n begins."""
    first = index * len(pool) // n
    return itertools.cycle([*pool[first:], *pool[:first]])


def _of_cameras(stamps: Sequence[Floats]) -> Timed:
    """Each camera's instants, the start and then the end of every inference -> their common window, in the order of the ends."""
    ended = sorted((end, end - before, index) for index, mine in enumerate(stamps) for before, end in itertools.pairwise(mine))
    return Timed(
        start_s=min(mine[0] for mine in stamps),
        stop_s=ended[-1][0],
        latencies_s=floats(latency for _, latency, _ in ended),
        cameras=floats(index for _, _, index in ended),
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage collector held off: it takes milliseconds."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def timing_doubts(latencies_s: Floats) -> list[Caveat]:
    """Drift between the first and the last third of the window, and outliers: flagged, never deleted.

    A drift counts only where three standard errors of the two medians do not explain it, and from five inferences a third up:
    the medians of two or three inferences differ by more than 3 % by chance alone.
    """
    values = np.frombuffer(latencies_s, dtype=np.float64)
    third = len(values) // 3
    doubts: list[Caveat] = []
    if third >= THIRD:
        first, last = values[:third], values[-third:]
        change = float(np.median(last) / np.median(first)) - 1
        noise = (_median_error(first) ** 2 + _median_error(last) ** 2) ** 0.5 / float(np.median(first))
        if change > DRIFT_SLIGHT and change > 3 * noise:
            code = "drift" if change > DRIFT else "drift_slight"
            doubts.append(caveat(code, f"the last third's median is {100 * change:.1f} % above the first third's"))
    if len(values) >= 3 * THIRD:
        centre = float(np.median(values))
        mad = float(np.median(np.abs(values - centre)))
        far = int(np.count_nonzero(np.abs(values - centre) > OUTLYING * mad)) if mad > 0 else 0
        if far:
            doubts.append(caveat("outliers", f"{far} of {len(values)} inferences, the slowest {1e3 * float(values.max()):.4g} ms"))
    return doubts


def _median_error(values: npt.NDArray[np.float64]) -> float:
    """Standard error of a median, sqrt(pi / 2) sigma / sqrt(n).

    Sigma is the larger of two estimates, because the median deviation alone is blind to timings of two speeds.
    """
    away = np.abs(values - np.median(values))
    sigma = max(SIGMA * float(np.median(away)), ROOT_HALF_PI * float(np.mean(away)))
    return ROOT_HALF_PI * sigma / math.sqrt(len(values))
