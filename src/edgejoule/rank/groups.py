"""Measurements sorted into groups that may be ranked together: one data set, device, workload, protocol, grade, scope and meter.

Knows what may not be mixed. Computes no metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgejoule.caveats import UNRANKED
from edgejoule.rank.table import Entry
from edgejoule.records import Accuracy, Caveat, Failure, Interval, Measurement, Screened, Workload


@dataclass(frozen=True, slots=True)
class GroupKey:
    """What two rows of one ranking share. ``fingerprint`` is the environment's."""

    dataset: str
    device: str
    fingerprint: str
    workload: Workload
    protocol: str
    grade: str
    scope: str
    meter: str

    @property
    def workload_label(self) -> str:
        return workload_label(self.workload)


def workload_label(workload: Workload) -> str:
    """One readable spelling: ``single_stream, batch 1, photos(n=32)``."""
    extent = ", preprocessing included" if workload.end_to_end else ""
    return f"{workload.scenario}, batch {workload.batch}{extent}, {workload.images}"


def entries_from_measurements(
    measurements: Sequence[Measurement],
    screened: Sequence[Screened] = (),
    plain: Mapping[str, str] | None = None,
) -> dict[GroupKey, tuple[Entry, ...]]:
    """Groups of comparable entries, in the order of the measurements. ``plain`` maps a distilled model to its plain twin.

    Stage-1 figures come from ``screened``, by model name. Measurements without energy are left out: ``unranked`` says which and why.
    """
    stage1 = {row.name: row for row in screened}
    groups: dict[GroupKey, list[Entry]] = {}
    for measurement in _by_origin(measurements):
        if measurement.energy_j is not None and not gated(measurement):
            entry = _entry(measurement, measurement.energy_j, stage1.get(measurement.model), (plain or {}).get(measurement.model, ""))
            groups.setdefault(group_key(measurement), []).append(entry)
    return {key: _told_apart(entries) for key, entries in groups.items()}


def _by_origin(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Two sets of images may share a name (two folders, or one that has changed): then the images' hash joins the name."""
    known = [m.accuracy for m in measurements if m.accuracy is not None and m.accuracy.origin]
    doubled = {a.dataset for a in known if len({b.origin for b in known if b.dataset == a.dataset}) > 1}
    told = []
    for one in measurements:
        accuracy = one.accuracy
        if accuracy is not None and accuracy.origin and accuracy.dataset in doubled:
            one = replace(one, accuracy=replace(accuracy, dataset=f"{accuracy.dataset} #{accuracy.origin[:8]}"))
        told.append(one)
    return tuple(told)


def unranked(measurements: Sequence[Measurement]) -> tuple[Failure, ...]:
    """The measurements that no ranking can hold, each with its reason: an artifact that lies, or no energy."""
    failures = []
    for m in measurements:
        if doubts := gated(m):
            reason = "; ".join(f"{doubt.code.replace('_', ' ')}: {doubt.seen}" for doubt in doubts)
            failures.append(Failure(m.variant, m.backend, "truth", f"{reason}; its figures stand in the measurements"))
        elif m.energy_j is None:
            failures.append(Failure(m.variant, m.backend, "rank", _why_no_energy(m) + "; its latency stands in the measurements"))
    return tuple(failures)


def gated(measurement: Measurement) -> tuple[Caveat, ...]:
    """What keeps the artifact out of rankings: it does not compute, or does not run as, what its label says."""
    return tuple(doubt for doubt in measurement.caveats if doubt.code in UNRANKED)


def group_key(measurement: Measurement) -> GroupKey:
    """The group that a measurement belongs to. Without accuracy it stands apart, on the data set ''."""
    return GroupKey(
        dataset=measurement.accuracy.dataset if measurement.accuracy else "",
        device=measurement.device,
        fingerprint=measurement.fingerprint,
        workload=replace(measurement.workload, images_sha256=""),  # the crops of one image set differ with each model's preprocessing
        protocol=measurement.protocol,
        grade=measurement.grade,
        scope=measurement.scope,
        meter=measurement.meter,
    )


def _entry(measurement: Measurement, energy_j: Interval, stage1: Screened | None, plain: str) -> Entry:
    accuracy = measurement.accuracy
    name, _, recipe = measurement.variant.partition(" | ")
    return Entry(
        model=f"{measurement.variant} @ {measurement.backend}",
        top1_pct=100.0 * accuracy.value if accuracy else None,
        energy_mj=scaled(energy_j, 1e3),
        latency_ms=scaled(measurement.latency_s, 1e3),
        power_w=measurement.power_w,
        accuracy=accuracy.kind if accuracy else "",
        top1=_top1(accuracy),
        seeds=accuracy.seeds if accuracy else None,
        name=measurement.model or name,
        recipe=recipe,
        backend=measurement.backend,
        weights=measurement.weights,
        netscore=stage1.netscore if stage1 else None,
        params_m=stage1.params_m if stage1 else None,
        macs_g=stage1.macs_g if stage1 else None,
        plain=plain,
        artifact_sha256=measurement.artifact_sha256,
    )


def _told_apart(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Two artifacts may share a spelling (other weights, other calibration): then their hash, at last a number, joins the label."""
    labels = Counter(entry.model for entry in entries)
    named = [replace(e, model=f"{e.model} #{e.artifact_sha256[:8]}") if labels[e.model] > 1 else e for e in entries]
    seen: Counter[str] = Counter()
    told = []
    for entry in named:
        seen[entry.model] += 1
        told.append(replace(entry, model=f"{entry.model} ({seen[entry.model]})") if seen[entry.model] > 1 else entry)
    return tuple(told)


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in a unit ``factor`` times smaller, as 1e3 turns J into mJ."""
    low = None if interval.low is None else interval.low * factor
    high = None if interval.high is None else interval.high * factor
    return Interval(interval.value * factor, low, high, interval.n)


def _top1(accuracy: Accuracy | None) -> Interval | None:
    if accuracy is None or accuracy.low is None or accuracy.high is None:
        return None
    return Interval(100.0 * accuracy.value, 100.0 * accuracy.low, 100.0 * accuracy.high, accuracy.seeds or accuracy.n or 1)


def _why_no_energy(measurement: Measurement) -> str:
    doubts = [
        caveat.code for caveat in measurement.caveats if caveat.code in ("no_meter", "few_updates", "stuck_sensor", "negative_energy")
    ]
    return f"it has no energy ({', '.join(doubts)})" if doubts else "it has no energy"
