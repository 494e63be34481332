"""One repeat, from loading to the last idle second: the order of events, and nothing else.

    canary · load · first inference · warm-up to steady state │ meter on │ idle · window · idle │ meter off · canary

Clocks and temperatures are watched in the window, memory before it. Images are normalised before the window, unless the workload is
end to end. All phases are stamped on one monotonic clock, the traces' own. Each idle phase is longer than the protocol's by the
sensor's memory (the first by twice that: it must forget the warm-up, too), so that a clean idle of that length remains. Keeps raw
timings and traces; derives no statistic. Knows no runtime and no sensor, imports neither torch nor scipy.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule import data
from edgejoule.caveats import caveat
from edgejoule.errors import ArtifactError, BackendError, EdgejouleError, MeterError, SpecError
from edgejoule.measure import canary, conditions, memory
from edgejoule.measure.energy import FEWEST_UPDATES, PAD
from edgejoule.measure.environment import environment
from edgejoule.measure.temperature import LOOK_BACK_S, Heat
from edgejoule.measure.warmup import Warmed, warm_up, warm_up_by_windows
from edgejoule.measure.watch import Watch, gpu_doubts
from edgejoule.measure.window import (
    Timed,
    back_to_back,
    image_pool,
    run_frames,
    run_streams,
    run_submitted,
    run_window,
    timing_doubts,
    together,
)
from edgejoule.records import Artifact, Caveat, Environment, Job, Memory, Phase, Preprocessing, Protocol, Series, Trace, Trial
from edgejoule.scenarios import scenario
from edgejoule.seams import Meter, Session

Normalise = Callable[[npt.NDArray[np.uint8], Preprocessing], npt.NDArray[np.float32]]
PhaseName = Literal["load", "first", "warmup", "idle_before", "window", "idle_after"]
MOST_EXPECTED = 10_000_000  # stamps allocated beforehand: 80 MB
ENOUGH_UPDATES = 1.25 * FEWEST_UPDATES  # sensors update a little more slowly than they claim


@dataclass(frozen=True)
class Bench:
    """What a trial takes from the world, so that tests can run the order of events without any real time."""

    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.time
    describe: Callable[[int, str], Environment] = environment
    notify: Callable[[str], None] = lambda phase: None
    root: Path = conditions.SYSTEM
    canary: Callable[[float], float] = lambda cold_s: canary.best_s(cold_s=cold_s)
    cuda: bool = False  # the artifact runs on a GPU: watch it, and ask for its memory


def run_trial(
    load: Callable[[], Session],
    artifact: Artifact,
    images: npt.NDArray[np.uint8],
    job: Job,
    meter: Meter | None,
    normalise: Normalise | None = None,
    bench: Bench | None = None,
) -> Trial:
    """Measure one artifact once. ``images`` are uint8 crops (N, C, H, W), ``load`` opens the session; whoever gave it closes it.

    Raises SpecError or ArtifactError where job and artifact do not fit, and what the session or the meter raise.
    """
    bench = bench or Bench()
    protocol = _check(job, artifact)
    # The pool is made before the session exists, so that its memory is not taken for the runtime's growth in the window.
    pool, infer_on = _prepare(images, job, artifact.variant.spec.preprocessing, normalise)
    cold_s = bench.canary(0.0)
    memory.reset_peak()
    log, started_at, proportional = _Log(bench), bench.now(), memory.PssWatch()
    proportional.start()
    try:
        session: Session = log.enter("load", load)
        infer = infer_on(session)
        window = _window_of(session, infer, pool, job, bench)
        log.enter("first", lambda: infer(pool[0]))
        state = bench.describe(job.threads, session.info().runtime)
        heat = Heat(bench.clock, bench.root)
        cool = heat.steady if protocol.warmup_cap_s >= LOOK_BACK_S else lambda: True  # a short warm-up cannot tell
        warmed: Warmed = log.enter("warmup", lambda: _warm(session, infer, pool, job, bench.clock, cool))
    finally:
        pss_peak = proportional.stop()
    recorded = _record(log, window, job, protocol, warmed, meter)
    used = memory.measured(pss_peak, bench.cuda) if not hasattr(session, "window") else _childs_memory()
    slowed = canary.doubts(cold_s, bench.canary(cold_s))
    load_phase, first = log.phases[:2]
    return Trial(
        key=job.key,
        artifact_sha256=artifact.sha256,
        workload=job.workload,
        protocol=protocol,
        meter=job.meter or "none",
        repeat=job.repeat,
        environment=state,
        started_at=started_at,
        phases=tuple(log.phases),
        latencies_s=recorded.timed.latencies_s,
        load_s=load_phase.stop_s - load_phase.start_s,
        first_inference_s=first.stop_s - first.start_s,
        peak_memory_bytes=used.rss_bytes or 0,
        traces=recorded.traces,
        caveats=tuple(_warmup_doubts(warmed, protocol) + recorded.caveats + slowed),
        watched=recorded.watched,
        memory=used,
        sampler_cores=recorded.sampler_cores,
        frames_due=recorded.timed.frames_due,
        deadlines_missed=recorded.timed.deadlines_missed,
        cameras=recorded.timed.cameras,
    )


@dataclass(frozen=True, slots=True)
class _Log:
    """The phases so far, stamped on the bench's clock."""

    bench: Bench
    phases: list[Phase] = field(default_factory=list)

    def enter(self, name: PhaseName, work: Callable[[], Any]) -> Any:
        self.bench.notify(name)
        start = self.bench.clock()
        result = work()
        self.phases.append(Phase(name, start, self.bench.clock()))
        return result


@dataclass(frozen=True, slots=True)
class _Recorded:
    timed: Timed
    traces: tuple[Trace, ...]
    caveats: list[Caveat]
    watched: tuple[Series, ...]
    sampler_cores: float


def _record(
    log: _Log, window: Callable[[float, int, int], Timed], job: Job, protocol: Protocol, warmed: Warmed, meter: Meter | None
) -> _Recorded:
    """The metered part, with a look at the machine before and after it. The meter is stopped whatever happens."""
    root, clock = log.bench.root, log.bench.clock
    watch = Watch(root, clock, gpu=log.bench.cuda)
    gc.collect()  # here and not at the window's edge, where its energy would count
    before, ended_s = conditions.look(root, clock), _ended_cpu_s()
    if meter is not None:
        meter.start()
    try:
        timed, said = _idle_window_idle(log, window, job, protocol, warmed, meter, watch)
    except BaseException:
        if meter is not None:
            with suppress(EdgejouleError):  # the first error is the one to report
                meter.stop()
        raise
    traces = meter.stop() if meter is not None else ()
    if meter is not None and not traces:
        raise MeterError(f"the meter {job.meter} recorded nothing: check it with edgejoule doctor")
    watched = watch.stop()
    found = conditions.doubts(before, conditions.look(root, clock), _childs_cpu_s(meter, clock() - before.at_s, ended_s))
    found += list(getattr(meter, "caveats", ()))
    said = gpu_doubts(watched) | said
    found += [caveat(code, seen) for code, seen in said.items()] + _clock_doubts(watched, root, _is_paced(job))
    if meter is None:
        found.append(caveat("no_meter", "measured without a meter"))
    cores = watch.cores + (getattr(meter, "cores", None) or 0.0)
    return _Recorded(timed, traces, found + timing_doubts(timed.latencies_s), watched, cores)


def _idle_window_idle(
    log: _Log,
    window: Callable[[float, int, int], Timed],
    job: Job,
    protocol: Protocol,
    warmed: Warmed,
    meter: Meter | None,
    watch: Watch,
) -> tuple[Timed, dict[str, str]]:
    """The window's timings, and what the device said of itself while it was hot: {caveat code: what was seen}."""
    bench, averaging_s = log.bench, float(getattr(meter, "averaging_s", 0.0))
    memory_s = PAD * averaging_s + float(getattr(meter, "stamp_uncertainty_s", 0.0))
    duration_s, at_least = window_size(protocol, job.workload.batch, averaging_s)
    expected = min(MOST_EXPECTED, int(1.5 * duration_s / max(warmed.typical_s, 1e-7)))
    # The sensor must forget the warm-up before the padding of the window begins.
    log.enter("idle_before", lambda: bench.sleep(protocol.idle_s + 2 * memory_s))
    watch.start()
    try:
        bench.notify("window")
        timed = window(duration_s, at_least, expected)
        # Only what must be asked while the device is hot stands between the window and the idle after it.
        said = _said(meter) | conditions.flagged(bench.root)
    finally:
        watch.stop()
    log.phases.append(Phase("window", timed.start_s, timed.stop_s))
    log.enter("idle_after", lambda: bench.sleep(protocol.idle_s + memory_s))
    return timed, said


def _window_of(
    session: Session, infer: Callable[[Any], Any], pool: list[Any], job: Job, bench: Bench
) -> Callable[[float, int, int], Timed]:
    """The scenario's window as a function of its duration in seconds, its least number of inferences, and how many are expected."""
    asked, submit = scenario(job.workload.scenario), getattr(session, "submit", None)
    by_itself = getattr(session, "window", None)
    if by_itself is not None:
        if asked.hz is not None or asked.name == "streams" or job.workload.end_to_end:
            what = "end to end" if job.workload.end_to_end else f"the scenario {job.workload.scenario}"
            raise BackendError(f"{session.info().runtime} times itself, back to back only: {what} needs the runtime's Python package here")
        return lambda duration_s, at_least, expected: back_to_back(by_itself(pool[0], duration_s, at_least, bench.clock))
    if asked.hz is not None:
        hz = asked.hz
        return lambda duration_s, at_least, expected: run_frames(infer, pool, duration_s, at_least, hz, bench.clock, bench.sleep)
    if asked.name == "streams" and submit is not None and not job.workload.end_to_end:
        return lambda duration_s, at_least, expected: run_submitted(submit, pool, duration_s, at_least, asked.n, bench.clock)
    if asked.name == "streams":
        return lambda duration_s, at_least, expected: run_streams(infer, pool, duration_s, at_least, asked.n, bench.clock)
    return lambda duration_s, at_least, expected: back_to_back(run_window(infer, pool, duration_s, at_least, expected, bench.clock))


def _warm(
    session: Session, infer: Callable[[Any], Any], pool: list[Any], job: Job, clock: Callable[[], float], cool: Callable[[], bool]
) -> Warmed:
    """By inferences; of a session that times itself by its own windows: its ``infer`` starts a program each time."""
    assert job.protocol is not None  # checked before
    by_itself = getattr(session, "window", None)
    if by_itself is None:
        return warm_up(_warming(infer, pool, job), job.protocol, clock, cool)
    return warm_up_by_windows(lambda duration_s, at_least: by_itself(pool[0], duration_s, at_least, clock), job.protocol, clock, cool)


def _warming(infer: Callable[[Any], Any], pool: list[Any], job: Job) -> Callable[[int], Any]:
    """What the warm-up repeats: an inference, or one of every camera at once, so that all streams are warm."""
    n = scenario(job.workload.scenario).n
    if n == 1:
        return lambda i: infer(pool[i % len(pool)])
    at_once = together(infer, n)
    return lambda i: at_once([pool[(i + k) % len(pool)] for k in range(n)])


def _is_paced(job: Job) -> bool:
    """Whether the device idles between the frames of a camera, and its clock with it."""
    return scenario(job.workload.scenario).hz is not None


def _clock_doubts(watched: Sequence[Series], root: Path, paced: bool) -> list[Caveat]:
    """Whether the processor's clock, or a GPU's, fell in the window (not asked where it idles between frames), or stayed too low."""
    found: dict[str, Caveat] = {}
    for series in watched:
        if series.unit == "Hz":
            hertz = list(series.values)
            asked = conditions.requested_hz(root) if series.name == "clock" else None
            fell = [] if paced else conditions.clock_doubts(hertz)
            found |= {doubt.code: doubt for doubt in fell + conditions.clock_low_doubts(hertz, asked)}
    return list(found.values())


def window_size(protocol: Protocol, batch: int, averaging_s: float = 0.0) -> tuple[float, int]:
    """How long a window lasts, in seconds, and its least number of inferences: by count where the protocol fixes the images.

    A window by time is never shorter than the sensor needs: the energy of fewer updates would be thrown away.
    """
    if protocol.images is not None:
        return 0.0, math.ceil(protocol.images / batch)
    return max(protocol.window_s, max(protocol.sensor_windows, ENOUGH_UPDATES) * averaging_s), protocol.window_inferences


def _check(job: Job, artifact: Artifact) -> Protocol:
    batch = job.workload.batch
    if job.protocol is None:
        raise SpecError("a measure job needs a protocol: expected one of the profiles, as quick or standard")
    scenario(job.workload.scenario, batch)
    if batch != artifact.batch:
        raise ArtifactError(f"{artifact.label} was compiled for batch {artifact.batch}, the workload's is {batch}: compile it again")
    return job.protocol


def _prepare(
    images: npt.NDArray[np.uint8], job: Job, preprocessing: Preprocessing, normalise: Normalise | None
) -> tuple[list[Any], Callable[[Session], Callable[[Any], Mapping[str, Any]]]]:
    """The pool that is cycled, and what is timed on each of its members: the session, or normalising and the session."""
    scale = normalise or data.normalise
    crops = image_pool(images, job.workload.batch)
    if job.workload.end_to_end:
        return list(crops), lambda session: lambda batch: session.infer(scale(batch, preprocessing))
    ready = [np.ascontiguousarray(scale(batch, preprocessing), dtype=np.float32) for batch in crops]
    return ready, lambda session: session.infer


def _childs_cpu_s(meter: Meter | None, duration_s: float, ended_before_s: float) -> float:
    """CPU seconds of programs of our own, the meter's or the runtime's: no other program's, and this process's clock does not hold them."""
    cores = getattr(meter, "cores", None) if getattr(meter, "is_program", False) else None
    return max(float(cores or 0.0) * duration_s, _ended_cpu_s() - ended_before_s)  # a meter that was waited for stands in both


def _ended_cpu_s() -> float:
    """CPU seconds of all programs of this process that have ended so far."""
    times = os.times()
    return times.children_user + times.children_system


def _childs_memory() -> Memory:
    """The peak of the largest program that this process ran, all that the system tells of those: the runtime's own, building included."""
    try:
        import resource  # not on Windows
    except ImportError:
        return Memory(None, None, None, None)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Memory(largest * (1 if sys.platform == "darwin" else 1024) or None, None, None, None)


def _said(meter: Meter | None) -> dict[str, str]:
    """What the metered device says of itself (an optional method of meters): {caveat code: what was seen}."""
    ask = getattr(meter, "doubts", None)
    return dict(ask()) if callable(ask) else {}


def _warmup_doubts(warmed: Warmed, protocol: Protocol) -> list[Caveat]:
    if warmed.steady:
        return []
    seen = f"not steady after {protocol.warmup_cap_s:g} s, {warmed.inferences} inferences in {warmed.blocks} blocks"
    return [caveat("no_steady_state", seen)]
