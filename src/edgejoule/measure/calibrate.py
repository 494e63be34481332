"""The calibration of one meter, live: switch a load on and off, watch, and say what the sensor really does (``response.py`` fits).

The load runs on every usable core in processes of its own, so that it neither holds up the sampler nor counts as this process's CPU
time; on a GPU it is torch's matrix product in a thread. The sampler's own cost is idle power with and without it, in turn. Takes under
a minute. Knows no leaf: what a meter promises is read off it. What it cannot do: see a sensor of another machine, or of a rail that
the load does not draw on, and it says so.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edgejoule import registry
from edgejoule.errors import MeterError
from edgejoule.measure.energy import samples
from edgejoule.measure.meters import open_meter
from edgejoule.measure.polled import PolledMeter
from edgejoule.measure.response import Response, response
from edgejoule.records import Grade, Interval, Trace
from edgejoule.registry import Call
from edgejoule.seams import Meter

CYCLES, PHASE_S, LEAD_S = 6, (1.5, 3.5), 2.0
FAST_S, SPARSE_S, BLOCK_S, PAIRS = 0.002, 0.5, 1.5, 4
T95 = 3.18  # Student's t at 95 % for four pairs
STEPS = CYCLES + PAIRS
PART = 0.8  # of its update period: a sensor that observes less misses the rest
SAME = 0.1  # a declared averaging time this near needs no other spelling
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Switch = Callable[[bool], None]
Notify = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class SamplerCost:
    """Idle watts with the sampler at its own period and with hardly any, in turn, and the sampler's CPU seconds per second."""

    with_w: float
    without_w: float
    added_w: Interval
    cores: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """One meter: what was seen, and in ``says`` what it means. ``write`` is the spelling to use from now on; empty where none helps."""

    meter: str
    load: str
    grade: Grade
    scope: str
    declared_averaging_s: float
    response: Response
    sampler: SamplerCost | None
    write: str = ""
    says: tuple[str, ...] = ()


def calibrate(
    spelling: str,
    notify: Notify = lambda text, done: None,
    load: Callable[[], AbstractContextManager[Switch]] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Calibrate a meter by a load that is switched on and off; ``notify`` hears a line and how many of the ``STEPS`` are done.

    ``load`` gives the switch (default: all cores, or the GPU where the meter's scope is one). Raises MeterError where the meter cannot
    be read or the load cannot be made, SpecError for a spelling that names no meter.
    """
    opened = open_meter(spelling)
    if opened is None:
        raise MeterError("there is no meter to calibrate: name one, as in --meter rapl; edgejoule doctor lists them")
    leaf: Any = registry.create("meter", spelling)
    if missing := leaf.probe():
        raise MeterError(f"the meter {spelling} does not work here: {missing}")
    polled = callable(getattr(leaf, "read", None))
    on_gpu = getattr(leaf, "scope", "") == "gpu"
    make = load or (gpu_load if on_gpu else core_load)
    meter: Meter = PolledMeter(_Paced(leaf, FAST_S), spelling, clock) if polled else opened
    with make() as switch:
        cost = _sampler_cost(leaf, spelling, notify, sleep, clock) if polled else None
        meter.start()
        edges = _exercise(switch, notify, sleep, clock)
        traces = meter.stop()
    notify("fitting", STEPS)
    trace, found = _clearest(traces, edges)
    what = "the GPU" if on_gpu else f"{usable_cores()} cores"
    write, says = _verdict(spelling, leaf, trace, found, what)
    return Calibration(spelling, what, trace.grade, trace.scope, trace.averaging_s, found, cost, write, says)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- the experiment


@dataclass(frozen=True, slots=True)
class _Paced:
    """A sensor as it is, read every ``period_s``."""

    sensor: Any
    period_s: float

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        found: Literal["energy_j", "power_w"] = self.sensor.quantity
        return found

    @property
    def averaging_s(self) -> float:
        return float(self.sensor.averaging_s)

    @property
    def grade(self) -> Grade:
        found: Grade = self.sensor.grade
        return found

    @property
    def scope(self) -> str:
        return str(self.sensor.scope)

    def total(self, rail: str) -> bool:
        ask = getattr(self.sensor, "total", None)
        return bool(ask(rail)) if callable(ask) else True

    def probe(self) -> str | None:
        return None

    def read(self) -> Mapping[str, float]:
        found: Mapping[str, float] = self.sensor.read()
        return found


def _exercise(switch: Switch, notify: Notify, sleep: Callable[[float], None], clock: Callable[[], float]) -> list[float]:
    """Idle, then the load on and off in phases of random length -> the instants of the edges."""
    rng, edges = random.Random(0), list[float]()
    sleep(LEAD_S)
    for cycle in range(CYCLES):
        for on in (True, False):
            edges.append(clock())
            switch(on)
            sleep(rng.uniform(*PHASE_S))
        notify(f"load on and off, {cycle + 1} of {CYCLES}", PAIRS + cycle + 1)
    return edges


def _sampler_cost(leaf: Any, spelling: str, notify: Notify, sleep: Callable[[float], None], clock: Callable[[], float]) -> SamplerCost:
    """Idle power while the sensor is read at its own period, and hardly ever, in pairs of random order."""
    rng, pairs, cores = random.Random(1), list[tuple[float, float]](), list[float]()
    settle_s = min(float(leaf.averaging_s), 1.0)  # a sensor's memory of the block before
    for pair in range(PAIRS):
        watts = dict[bool, float]()
        for sampled in rng.sample([True, False], 2):
            meter = PolledMeter(_Paced(leaf, float(leaf.period_s) if sampled else SPARSE_S), spelling, clock)
            meter.start()
            used, begin = time.process_time(), clock()
            sleep(BLOCK_S + settle_s)
            if sampled:
                cores.append((time.process_time() - used) / (clock() - begin))
            watts[sampled] = sum(_mean_w(trace, settle_s) for trace in meter.stop() if trace.total)
        pairs.append((watts[True], watts[False]))
        notify(f"idle with and without the sampler, {pair + 1} of {PAIRS}", pair + 1)
    both, added = np.mean(pairs, axis=0), np.array([a - b for a, b in pairs])
    half, mean = T95 * float(np.std(added, ddof=1)) / PAIRS**0.5, float(np.mean(added))
    return SamplerCost(float(both[0]), float(both[1]), Interval(mean, mean - half, mean + half, PAIRS), float(np.mean(cores)))


def _mean_w(trace: Trace, settle_s: float) -> float:
    times, values = samples(trace)
    late = times >= min(times[0] + settle_s, times[-2])
    times, values = times[late], values[late]
    return float((values[-1] - values[0]) / (times[-1] - times[0])) if trace.quantity == "energy_j" else float(np.mean(values))


def _clearest(traces: Sequence[Trace], edges: Sequence[float]) -> tuple[Trace, Response]:
    """The rail with the largest step among those that make the total, or among all where none of those steps."""
    if not traces:
        raise MeterError("the meter recorded nothing while the load was switched: check it with edgejoule doctor")
    found = [(t, response(t.rail, *samples(t), edges, t.quantity == "energy_j")) for t in traces]
    return max(found, key=lambda one: (one[1].kind != "none", one[0].total, one[1].step_w.value))


# ---------------------------------------------------------------- what it means


def _verdict(spelling: str, leaf: Any, trace: Trace, found: Response, load: str) -> tuple[str, tuple[str, ...]]:
    """-> the spelling to use from now on, empty where none helps, and what is to be said."""
    if found.kind == "none" or trace.grade == "D":
        return "", (_nothing(spelling, trace, found, load),)
    call, declared = registry.parse(spelling), trace.averaging_s
    takes = {f.name for f in dataclasses.fields(leaf) if f.init} if dataclasses.is_dataclass(leaf) else set[str]()
    update = found.update_s.value if found.update_s is not None and not found.every_read else 0.0
    observed = found.averaging_s.value if found.averaging_s is not None else 0.0
    measured = float(f"{max(update, observed, found.poll_s):.2g}")
    says = [] if found.decided else ["A boxcar and an exponential fit equally well; the boxcar's width is given, which pads more."]
    most = (found.averaging_s.high or 0.0) * (2 if found.kind == "exponential" else 1) if found.averaging_s is not None else np.inf
    if most < PART * update:
        says.append(
            f"It observes no more than {1e3 * most:.2g} of every {1e3 * update:.3g} ms: padding does not cure that, so measure long"
            " windows of a load that does not repeat in step with it."
        )
    if max(update, observed) <= found.poll_s:
        says.append(f"No averaging was seen (polled every {1e3 * found.poll_s:.2g} ms): nothing to write.")
        return "", tuple(says)
    if abs(measured - declared) <= SAME * measured:
        says.append(f"{trace.rail} is declared to average over {declared:g} s, which is right: nothing to write.")
        return "", tuple(says)
    if "averaging_s" in takes:
        write = str(Call(call.name, {**call.options, "averaging_s": measured}))
        return write, (*says, f"Write {write} from now on: it counted on {declared:g} s.")
    longer = "Windows and idle should be longer than it asks for." if measured > declared else "It pads more than it needs, which is safe."
    return "", (*says, f"{call.name} counts on {declared:g} s, {measured:g} s was seen, and it has no option averaging_s. {longer}")


def _nothing(spelling: str, trace: Trace, found: Response, load: str) -> str:
    """Why there is nothing to calibrate."""
    if trace.scope == "replay":
        return f"{spelling} plays a recording back: it does not see this machine, so there is nothing to calibrate."
    if trace.grade == "D":
        return f"{spelling} is a model of grade D and no sensor: it does not see {load} at work, so there is nothing to calibrate."
    stood = "its figure never changed" if found.update_s is None else "its power did not follow"
    return (
        f"{spelling} showed no step when {load} worked ({stood}): it is another machine's meter, a rail that the load does not draw on,"
        " or it does not work."
    )


# ---------------------------------------------------------------- loads


@contextmanager
def core_load() -> Iterator[Switch]:
    """A matrix product on every usable core, each in a process; idle until switched on."""
    context = multiprocessing.get_context("spawn")
    on, ready = context.Event(), context.Semaphore(0)
    workers = [context.Process(target=_work, args=(on, ready), daemon=True) for _ in range(usable_cores())]
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read when a worker imports numpy
    try:
        for worker in workers:
            worker.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    try:
        if not all(ready.acquire(timeout=60) for _ in workers):
            raise MeterError("the processes that make the load did not start within a minute: close other programs and try again")
        yield lambda wanted: on.set() if wanted else on.clear()
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(on: Any, ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    parent, matrix = multiprocessing.parent_process(), np.random.default_rng(0).normal(size=(192, 192))
    ready.release()
    while parent is not None and parent.is_alive():  # never outlives it
        if on.wait(timeout=1.0):
            for _ in itertools.takewhile(lambda _: on.is_set(), range(200)):
                matrix @ matrix


@contextmanager
def gpu_load() -> Iterator[Switch]:
    """torch's matrix product on the first CUDA device, in a thread; idle until switched on."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise MeterError("this meter sees the GPU, and the load for it needs torch: pip install 'edgejoule[host]'") from error
    if not torch.cuda.is_available():
        raise MeterError("this meter sees the GPU, and torch finds no CUDA device to load: install a build of torch for CUDA")
    on, quit_ = threading.Event(), threading.Event()
    matrix = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()

    def work() -> None:
        while not quit_.is_set():
            if on.wait(timeout=0.2):
                _ = matrix @ matrix
                torch.cuda.synchronize()

    thread = threading.Thread(target=work, name="gpu load", daemon=True)
    thread.start()
    try:
        yield lambda wanted: on.set() if wanted else on.clear()
    finally:
        quit_.set()
        on.set()
        thread.join()
