"""Entries -> a Ranking: metric, Pareto flags, energy saved against the baseline, distilled beside plain, whether a recipe is worth it,
and where it is slower, agreement with stage 1.

Pure: reads no clock, no file and no device. What may stand in one ranking is decided in ``groups``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from edgejoule.caveats import caveat
from edgejoule.errors import RankError
from edgejoule.rank.agreement import agreements, sensitivity
from edgejoule.rank.groups import GroupKey
from edgejoule.rank.metrics import efficiency_interval, sam_interval
from edgejoule.rank.pareto import front
from edgejoule.rank.table import Entry
from edgejoule.rank.worth import MOST, difference, worth
from edgejoule.records import Caveat, Interval, Pair, Ranking, RankRow

SLOWER = 0.01  # relative: a smaller difference of latencies is that of a machine from day to day, as for ``compare``
Score = Callable[[RankRow], float | None]
METRICS: dict[str, Score] = {  # higher is better
    "sam": lambda row: None if row.sam is None else row.sam.value,
    "efficiency": lambda row: None if row.efficiency_pct_per_mj is None else row.efficiency_pct_per_mj.value,
    "netscore": lambda row: row.netscore,
    "energy": lambda row: -row.energy_mj.value,
    "latency": lambda row: None if row.latency_ms is None else -row.latency_ms.value,
    "accuracy": lambda row: row.top1_pct,
}


def rank(
    entries: Sequence[Entry],
    *,
    metric: str = "sam",
    a: float = 5.0,
    b: float = 5.0,
    baseline: str = "",
    title: str = "",
    dataset: str = "",
    device: str = "",
    workload: str = "",
    protocol: str = "",
    grade: str = "",
    scope: str = "",
    meter: str = "",
    caveats: Sequence[Caveat] = (),
    elsewhere: Sequence[Entry] = (),
) -> Ranking:
    """Entries in order, best first; ties by name. Rows that lack what the metric needs stand last with rank 0 and a note.

    ``metric`` is one of ``METRICS``. ``baseline`` is a model's name or a whole label; without one a ViT-S is taken where there is
    one. ``elsewhere`` are entries that were measured in the same way and are ranked on other data: only what a recipe does to the latency
    is looked up among them. Raises RankError for an unknown metric or baseline, no entries, and an energy of 1 mJ or less under SAM.
    """
    if metric not in METRICS:
        raise RankError(f"no metric is called {metric!r}: expected one of {', '.join(METRICS)}")
    if not entries:
        raise RankError("there is nothing to rank: expected at least one model with an energy")
    _check_labels(entries)
    chosen = find_baseline(entries, baseline)
    rows = _weighed(_rows(entries, metric, a, b, chosen), entries, grade)
    order = sorted(range(len(rows)), key=lambda i: _place(rows[i], metric))
    ranked = tuple(_numbered([rows[i] for i in order], metric))
    heading = (title, metric, a, b, dataset, device, workload, protocol, grade, scope, meter)
    return Ranking(
        *heading,
        rows=ranked,
        baseline=chosen,
        agreements=agreements(rows, [entry.name or entry.model for entry in entries]),
        pairs=_pairs(entries, {row.model: row for row in rows}),
        caveats=(*caveats, *_slower(entries, elsewhere, device, workload), *_doubts(entries, ranked, metric, a, b)),
    )


def rank_groups(
    groups: Mapping[GroupKey, Sequence[Entry]], *, metric: str = "sam", a: float = 5.0, b: float = 5.0, baseline: str = "", title: str = ""
) -> tuple[Ranking, ...]:
    """One ranking for every group. A baseline that a group lacks leaves that group without one. Raises RankError as ``rank`` does,
    and for a baseline that no group has."""
    everything = [entry for entries in groups.values() for entry in entries]
    if baseline and everything:
        find_baseline(everything, baseline)
    rankings = []
    for key, entries in groups.items():
        here = baseline if any(_is_baseline(entry, baseline) for entry in entries) else ""
        ranking = rank(
            entries,
            metric=metric,
            a=a,
            b=b,
            baseline=here,
            title=title,
            dataset=key.dataset,
            device=key.device,
            workload=key.workload_label,
            protocol=key.protocol,
            grade=key.grade,
            scope=key.scope,
            meter=key.meter,
            elsewhere=_elsewhere(key, groups),
        )
        rankings.append(ranking)
    return tuple(rankings)


def find_baseline(entries: Sequence[Entry], wanted: str = "") -> str:
    """The name or label that energy is compared with: ``wanted``, else a ViT-S, else ''. Raises RankError where ``wanted`` is not there."""
    if wanted:
        if any(_is_baseline(entry, wanted) for entry in entries):
            return wanted
        known = sorted({entry.name or entry.model for entry in entries} | {entry.model for entry in entries})
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
        advice = f"did you mean {' or '.join(near)}?" if near else "name a ranked model"
        raise RankError(f"no model is called {wanted!r}, so it cannot be the baseline: {advice}")
    names = {entry.name or entry.model for entry in entries}
    small = sorted((name for name in names if _is_vit_small(name)), key=lambda name: (len(name), name))
    return small[0] if small else ""


def _rows(entries: Sequence[Entry], metric: str, a: float, b: float, baseline: str) -> list[RankRow]:
    with_accuracy = [i for i, entry in enumerate(entries) if entry.top1_pct is not None]
    with_latency = [i for i in with_accuracy if entries[i].latency_ms is not None]
    by_energy = _front({i: entries[i].energy_mj.value for i in with_accuracy}, entries)
    by_latency = _front({i: latency.value for i in with_latency if (latency := entries[i].latency_ms) is not None}, entries)
    rows = []
    for i, entry in enumerate(entries):
        rows.append(
            RankRow(
                model=entry.model,
                rank=0,
                top1_pct=entry.top1_pct,
                accuracy=entry.accuracy,
                energy_mj=entry.energy_mj,
                latency_ms=entry.latency_ms,
                power_w=entry.power_w,
                sam=_sam(entry, metric, a, b),
                efficiency_pct_per_mj=_efficiency(entry),
                pareto_energy=by_energy.get(i, False),
                pareto_latency=by_latency.get(i),
                saved_pct=_saved_pct(entry, entries, baseline),
                netscore=entry.netscore,
                params_m=entry.params_m,
                macs_g=entry.macs_g,
                weights=entry.weights,
                note=entry.note,
                artifact_sha256=entry.artifact_sha256,
                top1=entry.top1,
                seeds=entry.seeds,
                recipe=entry.recipe,
            )
        )
    return rows


def _weighed(rows: Sequence[RankRow], entries: Sequence[Entry], grade: str) -> list[RankRow]:
    """The rows, those with a recipe with what the plain ones say about them."""
    found = worth(entries, grade)
    return [replace(row, worth=found.get(row.model)) for row in rows]


def _front(costs: Mapping[int, float], entries: Sequence[Entry]) -> dict[int, bool]:
    points = [(cost, top1) for i, cost in costs.items() if (top1 := entries[i].top1_pct) is not None]
    return dict(zip(costs, front(points), strict=True))


def _sam(entry: Entry, metric: str, a: float, b: float) -> Interval | None:
    if entry.energy_mj.value <= 1.0 and metric == "sam" and entry.top1_pct:
        raise RankError(
            f"{entry.model} uses {entry.energy_mj.value:g} mJ per image, and SAM changes sign at 1 mJ: "
            "rank by efficiency or energy instead (--metric efficiency)"
        )
    if entry.top1_pct is None or entry.top1_pct <= 0.0 or entry.energy_mj.value <= 1.0:
        return None
    return sam_interval(_fraction(entry.top1_pct, entry.top1), entry.energy_mj, a, b)


def _efficiency(entry: Entry) -> Interval | None:
    if entry.top1_pct is None or entry.top1_pct <= 0.0:
        return None
    return efficiency_interval(entry.top1 or Interval(entry.top1_pct, None, None, 1), entry.energy_mj)


def _fraction(top1_pct: float, top1: Interval | None) -> Interval:
    if top1 is None or top1.low is None or top1.high is None:
        return Interval(top1_pct / 100.0, None, None, 1)
    return Interval(top1_pct / 100.0, top1.low / 100.0, top1.high / 100.0, top1.n)


def _saved_pct(entry: Entry, entries: Sequence[Entry], baseline: str) -> float | None:
    """Against the baseline on the same backend, so that models are compared, not runtimes; a whole label is one fixed row."""
    if not baseline:
        return None
    fixed = [other for other in entries if other.model == baseline]
    same = [other for other in entries if other.name == baseline and other.backend == entry.backend]
    plain = sorted(same, key=lambda other: other.recipe != "")  # the unchanged network first
    reference = next(iter((*fixed, *plain)), None)
    return None if reference is None else 100.0 * (1.0 - entry.energy_mj.value / reference.energy_mj.value)


def _pairs(entries: Sequence[Entry], rows: Mapping[str, RankRow]) -> tuple[Pair, ...]:
    twins = {(entry.name or entry.model, entry.recipe, entry.backend): entry for entry in entries}
    pairs = []
    for entry in entries:
        twin = twins.get((entry.plain, entry.recipe, entry.backend)) if entry.plain else None
        if twin is None:
            continue
        mine, other = rows[entry.model].sam, rows[twin.model].sam
        delta = mine.value - other.value if mine is not None and other is not None else None
        pairs.append(Pair(entry.model, twin.model, entry.energy_mj.value / twin.energy_mj.value, delta))
    return tuple(pairs)


def _place(row: RankRow, metric: str) -> tuple[float, str]:
    score = METRICS[metric](row)
    return (math.inf if score is None else -score, row.model)


def _numbered(rows: Sequence[RankRow], metric: str) -> list[RankRow]:
    numbered = []
    for place, row in enumerate(rows, start=1):
        if METRICS[metric](row) is None:
            missing = {"sam": "accuracy", "efficiency": "accuracy", "netscore": "NetScore"}.get(metric, metric)
            numbered.append(replace(row, rank=0, note="; ".join(filter(None, (row.note, f"not ranked: it has no {missing}")))))
        else:
            numbered.append(replace(row, rank=place))
    return numbered


def _elsewhere(key: GroupKey, groups: Mapping[GroupKey, Sequence[Entry]]) -> list[Entry]:
    """For the ranking of what has no accuracy, as most recipes' networks before they are evaluated: the entries of the others that were
    measured in the same way, networks without a recipe and their published accuracy among them."""
    return [entry for other, entries in groups.items() if other != key and replace(other, dataset="") == key for entry in entries]


def _slower(entries: Sequence[Entry], elsewhere: Sequence[Entry], device: str, workload: str) -> list[Caveat]:
    """A doubt for every entry with a recipe that takes longer than the same network without one, on the same backend."""
    where = ", ".join(filter(None, (device, workload)))
    doubts = []
    for entry in entries:
        ratio = _times_plain(entry.latency_ms, _without_recipe(entry, entries) or _without_recipe(entry, elsewhere))
        if ratio is not None:
            bounds = f" (95 % interval {ratio.low:.2f} to {ratio.high:.2f})" if ratio.low is not None and ratio.high is not None else ""
            seen = f"{entry.model} takes {ratio.value:.2f} x the latency without the recipe{bounds}"
            doubts.append(caveat("slower_than_plain", f"{seen}, {where}" if where else seen))
    return doubts


def _without_recipe(entry: Entry, entries: Sequence[Entry]) -> list[Interval]:
    """The latencies of the network of an entry with a recipe, without one: several where it was measured with several weights."""
    if not entry.recipe:
        return []
    same = [other for other in entries if not other.recipe and other.backend == entry.backend]
    name = entry.name or entry.model
    return [other.latency_ms for other in same if (other.name or other.model) == name and other.latency_ms is not None]


def _times_plain(mine: Interval | None, plain: Sequence[Interval]) -> Interval | None:
    """The ratio of two latencies where their 95 % intervals do not meet and it is above 1 + SLOWER; None where nothing is shown.

    Of several plain ones the slowest counts. A latency without an interval shows nothing.
    """
    bounded = [(one.high, one) for one in plain if one.high is not None and one.value > 0.0]
    if mine is None or mine.low is None or not bounded:
        return None
    high, other = max(bounded, key=lambda pair: pair[0])
    if not (mine.low > high and mine.value / other.value > 1.0 + SLOWER):
        return None
    found = difference(_logarithm(mine), _logarithm(other))
    low, most = (None if bound is None or math.isinf(bound) else math.exp(min(bound, MOST)) for bound in (found.low, found.high))
    return Interval(mine.value / other.value, low, most, found.n)


def _logarithm(latency: Interval) -> Interval:
    """Bounds that are not there, or not above zero as Student's may be, are infinite."""
    low = math.log(latency.low) if latency.low is not None and latency.low > 0.0 else -math.inf
    return Interval(math.log(latency.value), low, math.inf if latency.high is None else math.log(latency.high), latency.n)


def _doubts(entries: Sequence[Entry], rows: Sequence[RankRow], metric: str, a: float, b: float) -> list[Caveat]:
    doubts = []
    published = sum(row.accuracy == "published" for row in rows)
    measured = sum(row.accuracy == "measured" for row in rows)
    if published and measured:
        doubts.append(caveat("accuracy_mixed", f"{measured} of {len(rows)} rows have measured accuracy, {published} published"))
    if published:
        doubts.append(caveat("accuracy_published", f"{published} of {len(rows)} rows use published accuracy"))
    random = sum(row.weights == "random" for row in rows)
    if random:
        doubts.append(caveat("weights_random", f"{random} of {len(rows)} rows ran with random weights"))
    if metric == "sam" and any(row.sam is not None for row in rows):
        studied = sensitivity(entries, a=a, b=b)
        changed = [setting for setting in studied.settings if setting.order and setting.order != studied.default.order]
        if changed:
            named = sorted({f"a = {s.a:g}" if s.a != a else s.unit for s in changed})
            doubts.append(caveat("order_ambiguous", f"another order with {', '.join(named)}"))
    return doubts


def _check_labels(entries: Sequence[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.model in seen:
            raise RankError(f"{entry.model} stands in the ranking twice: expected one row per model, backend and recipe")
        seen.add(entry.model)


def _is_baseline(entry: Entry, wanted: str) -> bool:
    return bool(wanted) and wanted in (entry.model, entry.name)


def _is_vit_small(name: str) -> bool:
    plain = name.lower().replace("-", "_")
    return plain.startswith("vit_small") or plain == "vit_s"
