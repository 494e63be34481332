"""Repeats in, one Measurement out: medians per repeat, intervals over repeats, every doubt merged. Host only.

Recomputable from stored trials at any time. A repeat with a ``reject`` doubt is left out of the statistics and counted in the
caveats, unless all are. Knows no clock, no store and no ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgejoule import registry
from edgejoule.caveats import caveat
from edgejoule.errors import MeterError
from edgejoule.measure.energy import BESIDE, Energy, samples, window_energy
from edgejoule.measure.plan import is_rejected, median_latency_s, narrow_enough, needs_repeat
from edgejoule.measure.protocols import base_name
from edgejoule.measure.stats import block_bootstrap, half_width, percentile, sequential_interval, t_interval, variation
from edgejoule.records import Accuracy, Artifact, Camera, Caveat, Grade, Interval, Measurement, Memory, Trial

JOULES_PER_WH = 3600.0
P99_NEEDS = 1000  # inferences
VARY, VARY_MUCH = 0.025, 0.10
PILOT = 0.05
COSTLY = 0.01  # of one core
Estimator = Callable[[Sequence[float]], Interval]  # the one that the way of stopping asks for
EXCUSED = ("no_meter",)  # said by the trial and again by the energy: once is enough


@dataclass(frozen=True, slots=True)
class _Energies:
    """Over the repeats that were measured, per image; None where none was."""

    energy_j: Interval | None
    net_energy_j: Interval | None
    power_w: Interval | None
    power_time_j: Interval | None
    idle_w: float | None
    watts: tuple[float | None, ...]  # per repeat
    sensed: bool  # not estimated
    caveats: tuple[tuple[Caveat, ...], ...]  # per repeat


def summarise(trials: Sequence[Trial], artifact: Artifact, accuracy: Accuracy | None = None) -> Measurement:
    """The measurement that these repeats of one artifact make.

    Raises MeterError where there is no trial, or where trials differ in artifact, workload, protocol, meter or environment.
    """
    first = _alike(trials, artifact)
    kept = [trial for trial in trials if not is_rejected(trial)] or list(trials)
    interval = sequential_interval if first.protocol.repeats_max > first.protocol.repeats_min else t_interval
    latency = interval([median_latency_s(trial) for trial in kept])
    grade, scope = _instrument(kept)
    energies = _energies(kept, grade, interval)
    pooled = np.concatenate([np.frombuffer(trial.latencies_s, dtype=np.float64) for trial in kept]).tolist()
    measured = energies.energy_j
    caveats = _merge(trials, kept, energies) + list(artifact.caveats)
    caveats += _repeat_doubts(trials, kept, latency, energies) + _labels(first, artifact, accuracy, trials)
    return Measurement(
        variant=artifact.variant.label,
        model=artifact.variant.spec.name,
        backend=artifact.backend,
        precision=artifact.info.precision,
        weights=artifact.variant.weights,
        artifact_sha256=artifact.sha256,
        workload=first.workload,
        protocol=first.protocol.name,
        device=first.environment.device.name,
        fingerprint=first.environment.fingerprint,
        meter=first.meter,
        grade=grade,
        scope=scope,
        latency_s=latency,
        p90_s=percentile(pooled, 90),
        p99_s=percentile(pooled, 99) if len(pooled) >= P99_NEEDS else None,
        throughput_ips=interval([_images(trial) / _window_s(trial) for trial in kept]),
        power_w=energies.power_w,
        energy_j=measured,
        net_energy_j=energies.net_energy_j,
        idle_w=energies.idle_w,
        first_inference_s=float(np.median([trial.first_inference_s for trial in kept])),
        load_s=float(np.median([trial.load_s for trial in kept])),
        peak_memory_bytes=max(trial.peak_memory_bytes for trial in kept),
        artifact_bytes=artifact.bytes,
        inferences_per_wh=JOULES_PER_WH / measured.value if measured is not None and measured.value > 0 else None,
        repeats=len(kept),
        inferences=len(pooled),
        accuracy=accuracy,
        systematic=_systematic(kept),
        power_time_j=energies.power_time_j,
        memory=_memory(kept),
        sampler_cores=max((t.sampler_cores for t in kept if t.sampler_cores is not None), default=None),
        frames_due=_total([trial.frames_due for trial in kept]),
        deadlines_missed=_total([trial.deadlines_missed for trial in kept]),
        cameras=_cameras(kept),
        caveats=tuple({doubt.code: doubt for doubt in reversed(caveats)}.values())[::-1],
    )


def with_percentiles(found: Measurement, trials: Sequence[Trial]) -> Measurement:
    """The measurement with the interval of its 90th percentile, which takes a second: a block bootstrap within the kept repeats."""
    kept = [trial for trial in trials if not is_rejected(trial)] or list(trials)
    pooled = np.concatenate([np.frombuffer(trial.latencies_s, dtype=np.float64) for trial in kept])
    return replace(found, p90_interval_s=block_bootstrap(pooled.tolist(), 90.0))


def _alike(trials: Sequence[Trial], artifact: Artifact) -> Trial:
    if not trials:
        raise MeterError(f"no trial of {artifact.label}: measure it first")
    first = trials[0]
    same = (artifact.sha256, first.workload, first.protocol, first.meter, first.environment.fingerprint)
    for trial in trials:
        if (trial.artifact_sha256, trial.workload, trial.protocol, trial.meter, trial.environment.fingerprint) != same:
            raise MeterError(
                f"trials of {artifact.label} differ in artifact, workload, protocol, meter or environment: summarise each kind apart"
            )
        if trial.phase("window") is None or not len(trial.latencies_s):
            raise MeterError(f"trial {trial.key} of {artifact.label} holds no window: measure it again")
    return first


def _window_s(trial: Trial) -> float:
    window = trial.phase("window")
    assert window is not None  # _alike has seen to it
    return window.stop_s - window.start_s


def _images(trial: Trial) -> int:
    return len(trial.latencies_s) * trial.workload.batch


def _instrument(kept: Sequence[Trial]) -> tuple[Grade, str]:
    """The worst grade and the scope of the rails that add up to the whole; D and no scope where nothing was recorded."""
    totals = [trace for trial in kept for trace in trial.traces if trace.total]
    if not totals:
        return "D", ""
    return max(trace.grade for trace in totals), "+".join(sorted({trace.scope for trace in totals}))


def _systematic(kept: Sequence[Trial]) -> float | None:
    """The largest error that the meters' makers admit of the rails in the total; None where they say nothing."""
    return max((trace.systematic for trial in kept for trace in trial.traces if trace.total), default=0.0) or None


def _memory(kept: Sequence[Trial]) -> Memory | None:
    """The peak of each kind over the repeats; None where no repeat knows it."""
    found = [trial.memory for trial in kept if trial.memory is not None]
    if not found:
        return None

    def most(name: str) -> int | None:
        return max((value for one in found if (value := getattr(one, name)) is not None), default=None)

    return Memory(most("rss_bytes"), most("pss_bytes"), most("gpu_bytes"), most("swap_bytes"))


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _cameras(kept: Sequence[Trial]) -> tuple[Camera, ...]:
    """Each camera's own latencies, over the repeats; none where there was one stream."""
    which = np.concatenate([np.frombuffer(trial.cameras, dtype=np.float64) for trial in kept])
    latencies = np.concatenate([np.frombuffer(trial.latencies_s, dtype=np.float64) for trial in kept])
    if len(which) != len(latencies):
        return ()
    found = []
    for camera in np.unique(which):
        mine = latencies[which == camera].tolist()
        p99_s = percentile(mine, 99) if len(mine) >= P99_NEEDS else None
        found.append(Camera(len(mine), float(np.median(mine)), percentile(mine, 90), p99_s))
    return tuple(found)


def _energies(kept: Sequence[Trial], grade: Grade, interval: Estimator) -> _Energies:
    found: list[Energy] = []
    for trial in kept:
        window = trial.phase("window")
        assert window is not None
        found.append(window_energy(trial.traces, window, trial.phase("idle_before"), trial.phase("idle_after")))
    images = [_images(trial) for trial in kept]
    gross = [None if e.energy_j is None else e.energy_j / n for e, n in zip(found, images, strict=True)]
    net = [None if e.net_energy_j is None else e.net_energy_j / n for e, n in zip(found, images, strict=True)]
    idle = [e.idle_w for e in found if e.idle_w is not None]
    return _Energies(
        _over_repeats(gross, grade, interval),
        _over_repeats(net, grade, interval),
        _over_repeats([e.power_w for e in found], grade, interval),
        _over_repeats([_power_time_j(trial) for trial in kept], grade, interval),
        float(np.mean(idle)) if idle else None,
        tuple(e.power_w for e in found),
        grade != "D",
        tuple(e.caveats for e in found),
    )


def _power_time_j(trial: Trial) -> float | None:
    """E3P's energy per image: the mean of the power samples in the window times its length; None where no power was sampled.

    Beside a counter it is the power recorded along with it; no edge and no averaging of the sensor is corrected.
    """
    window = trial.phase("window")
    assert window is not None
    totals = {trace.rail for trace in trial.traces if trace.total}
    powers = [t for t in trial.traces if t.quantity == "power_w" and (t.total or t.rail.removesuffix(BESIDE) in totals)]
    means = []
    for trace in powers:
        times, watts = samples(trace)
        inside = (times >= window.start_s) & (times <= window.stop_s)
        if not np.any(inside):
            return None
        means.append(float(np.mean(watts[inside])))
    return sum(means) * (window.stop_s - window.start_s) / _images(trial) if means else None


def _over_repeats(values: Sequence[float | None], grade: Grade, interval: Estimator) -> Interval | None:
    """The interval over the repeats that were measured; grade D claims no bounds, because an estimate's scatter is not its error."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = interval(known)
    return replace(found, low=None, high=None) if grade == "D" else found


def _merge(trials: Sequence[Trial], kept: Sequence[Trial], energies: _Energies) -> list[Caveat]:
    """One caveat per code, saying in how many repeats it was seen; a rejected repeat's doubt becomes a note when it was left out."""
    by_energy = {id(trial): doubts for trial, doubts in zip(kept, energies.caveats, strict=True)}
    seen: dict[str, list[Caveat]] = {}
    for trial in trials:
        mine: dict[str, Caveat] = {}
        for doubt in (*trial.caveats, *by_energy.get(id(trial), ())):
            mine.setdefault(doubt.code, doubt)
        for code, doubt in mine.items():
            seen.setdefault(code, []).append(doubt)
    left_out = len(kept) < len(trials)
    merged = []
    for doubts in seen.values():
        doubt, text = doubts[0], doubts[0].seen
        out = left_out and doubt.severity == "reject"
        if doubt.code not in EXCUSED and (len(trials) > 1 or out):
            text += f" (in {len(doubts)} of {len(trials)} repeats{', left out of the statistics' if out else ''})"
        merged.append(replace(doubt, seen=text, severity="note" if out else doubt.severity))
    return merged


def _repeat_doubts(trials: Sequence[Trial], kept: Sequence[Trial], latency: Interval, energies: _Energies) -> list[Caveat]:
    protocol, n = kept[0].protocol, len(kept)
    doubts: list[Caveat] = []
    if n < 3:
        doubts.append(caveat("few_repeats", f"{n} repeat{'s' if n > 1 else ''}"))
    spread = variation([median_latency_s(trial) for trial in kept]) or 0.0
    if spread > VARY:
        doubts.append(
            caveat("repeats_vary_much" if spread > VARY_MUCH else "repeats_vary", f"latency by {100 * spread:.1f} % over {n} repeats")
        )
    doubts += _pilot_doubts(energies.watts) if energies.sensed else []
    if (missed := _total([trial.deadlines_missed for trial in kept])) and (due := _total([trial.frames_due for trial in kept])):
        doubts.append(caveat("deadlines_missed", f"{missed} of {due} frames ({100 * missed / due:.2g} %)"))
    costs = [trial.sampler_cores for trial in kept if trial.sampler_cores is not None]
    if costs and max(costs) > COSTLY:
        doubts.append(caveat("sampler_costly", f"{100 * max(costs):.2g} % of a core"))
    if protocol.repeats_max > protocol.repeats_min:
        if n > protocol.repeats_min:
            doubts.append(caveat("sequential", f"{n} repeats, where {protocol.repeats_min} were the least"))
        if not needs_repeat(trials, protocol) and not narrow_enough(kept, protocol):
            width = {"latency": half_width(latency), "energy": half_width(energies.energy_j) if energies.energy_j else None}
            wide = ", ".join(f"{name} +-{100 * value:.1f} %" for name, value in width.items() if value is not None)
            doubts.append(caveat("cap_reached", f"{wide} after {len(trials)} repeats"))
    return doubts


def _pilot_doubts(watts: Sequence[float | None]) -> list[Caveat]:
    """The first repeat with a power is the pilot: a later one whose mean power is more than 5 % off was measured in another state."""
    known = [power for power in watts if power is not None and power > 0]
    if not known:
        return []
    pilot = known[0]
    off = [100 * (power / pilot - 1) for power in known[1:]]
    far = [change for change in off if abs(change) > 100 * PILOT]
    if not far:
        return []
    return [caveat("power_off_pilot", f"{len(far)} of {len(off)} repeats, by up to {max(far, key=abs):+.1f} % of {pilot:.4g} W")]


def _labels(first: Trial, artifact: Artifact, accuracy: Accuracy | None, trials: Sequence[Trial]) -> list[Caveat]:
    """What every reader must know of this kind of result, whatever was seen."""
    name = first.meter.partition("(")[0]
    labels: list[Caveat] = []
    if base_name(first.protocol) == "quick":
        labels.append(caveat("quick_profile", f"{len(trials)} repeats of {first.protocol.window_s:g} s"))
    if artifact.variant.weights == "random":
        labels.append(caveat("weights_random", f"the weights of {artifact.variant.spec.name} are random"))
    if name == "estimate":
        model = registry.create("meter", first.meter)
        labels.append(caveat("estimate", f"{model.core_w:g} W for each busy core and {model.idle_w:g} W at rest were assumed"))
    if name == "replay":
        labels.append(caveat("replayed", first.meter))
    if accuracy is not None and accuracy.kind == "published":
        labels.append(caveat("accuracy_published", f"{100 * accuracy.value:.2f} % on {accuracy.dataset}, from {accuracy.source}"))
    return labels
