"""Records as text for the terminal, as Markdown and as CSV. Every function returns a string; rendering never measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgejoule.records import Accuracy, Artifact, Caveat, Cost, Failure, Interval, Measurement, ModelSpec, Ranking, RankRow, Screened
from edgejoule.report import format as f
from edgejoule.report import table as t
from edgejoule.report import worth
from edgejoule.report.report import Sensitivity
from edgejoule.report.table import Column, Table, terminal

MARKS = {"note": "note", "warn": "WARNING", "reject": "REJECTED"}


# ---------------------------------------------------------------- rankings


def rankings(found: Sequence[Ranking]) -> str:
    """Every ranking for the terminal, then each caveat once with its advice."""
    if not found:
        return "Nothing was ranked: no measurement has an energy. edgejoule doctor says which meters work here.\n"
    tables = "\n".join(terminal(ranking_table(ranking)) for ranking in found)
    return tables + caveat_lines(doubt for ranking in found for doubt in ranking.caveats)


def markdown(found: Sequence[Ranking]) -> str:
    """The rankings as Markdown, with their caveats."""
    body = "".join(t.markdown(ranking_table(ranking)) for ranking in found)
    return body + caveat_lines((doubt for ranking in found for doubt in ranking.caveats), bullet="- ")


def csv_rows(found: Sequence[Ranking]) -> str:
    """The rankings as one CSV that ``edgejoule rank`` reads again: plain numbers, bounds beside them, and what may not be mixed."""
    shared = ("dataset", "device", "workload", "protocol", "grade", "scope", "meter", "metric", "a", "b")
    bounded = ("energy_mj", "latency_ms", "power_w", "sam", "efficiency_pct_per_mj")
    plain = (
        "accuracy",
        "weights",
        "pareto_energy",
        "pareto_latency",
        "saved_pct",
        "netscore",
        "params_m",
        "macs_g",
        "note",
        "artifact_sha256",
        "recipe",
    )
    header = [
        "model",
        "rank",
        "top1_pct",
        "top1_pct_low",
        "top1_pct_high",
        "seeds",
        *(name + end for name in bounded for end in ("", "_low", "_high")),
        *plain,
        "worth",
        *shared,
    ]
    lines = []
    for ranking in found:
        common = [getattr(ranking, name) for name in shared]
        for row in ranking.rows:
            bounds = [value for name in bounded for value in _bounds(getattr(row, name))]  # Student's lower bound may lie below zero
            bounds = [None if value is None else max(0.0, value) for value in bounds[:9]] + bounds[9:]
            top1 = (row.top1_pct, *_bounds(row.top1)[1:], row.seeds)
            lines.append([row.model, row.rank, *top1, *bounds, *(getattr(row, name) for name in plain), worth.words(row), *common])
    return t.csv_text(header, lines)


def ranking_table(ranking: Ranking) -> Table:
    """One ranking: place, model, accuracy, metric, energy, latency, power, saving, Pareto fronts, and whether a recipe is worth it."""
    accuracy = f.accuracy_name(ranking.dataset)
    columns = [
        Column("#", right=True),
        Column("model", wrap=any(row.recipe for row in ranking.rows)),  # a label with a recipe may be longer than any terminal
        Column(accuracy, 1, True),
        Column("SAM", 0 if ranking.metric == "sam" else 3, True),
    ]
    columns += [Column("energy / image", 0, True), Column("latency", 2, True), Column("power", 6, True), Column("% / mJ", 5, True)]
    columns += [Column("energy saved", 4, True), Column("on front", 7), Column("weights", 3)]
    columns += [Column(worth.TITLE, 1, wrap=True)]
    rows = tuple(_ranking_cells(row, ranking.grade) for row in ranking.rows)
    empty = {i for i in range(len(columns)) if rows and all(row[i] in ("", f.NONE) for row in rows)}
    empty |= {10} if all(row.weights in ("", "pretrained") for row in ranking.rows) else set()
    return Table(
        title=" · ".join(filter(None, (ranking.title, f"ranked by {f.metric_name(ranking.metric, ranking.a, ranking.b)}"))),
        columns=tuple(column for i, column in enumerate(columns) if i not in empty),
        rows=tuple(tuple(cell for i, cell in enumerate(row) if i not in empty) for row in rows),
        subtitle=context_line(ranking),
        notes=tuple(_ranking_notes(ranking)),
        strong=frozenset({0} if rows and ranking.rows[0].rank == 1 else ()),
    )


def context_line(ranking: Ranking) -> str:
    """What all rows share: data set, device, workload, protocol, meter, grade, scope."""
    if not ranking.grade:
        return "energies as the table states them; meter, grade and scope are not stated"
    where = " on ".join(filter(None, (ranking.dataset, ranking.device)))
    energy = f"energy by {ranking.meter}, grade {f.grade_words(ranking.grade)}, scope {ranking.scope}"
    return " · ".join(filter(None, (where, ranking.workload, f"protocol {ranking.protocol}", energy)))


def sensitivity_table(found: Sensitivity) -> str:
    """The order by SAM under other exponents, factors and units: its first three, and Kendall's tau against the default."""
    columns = (Column("a", right=True), Column("b", right=True), Column("unit of energy"), Column("tau", right=True))
    rows = []
    for setting in found.settings:
        first = " > ".join(setting.order[:3]) + (" > …" if len(setting.order) > 3 else "")
        order = "the same" if setting.order == found.default.order else first or setting.reason
        rows.append((f"{setting.a:g}", f"{setting.b:g}", setting.unit, _tau(setting.tau), order))
    verdict = "The order depends on these choices." if found.ambiguous else "The order survives every choice that has a meaning."
    why = "b only scales SAM and cannot change the order; the exponent a and the unit (through the logarithm) can."
    notes = (f"{verdict} {why}", "tau: Kendall's tau-b against the default order, 1 the same, 0 unrelated, -1 the opposite.")
    subtitle = f"default (a = {found.default.a:g}, b = {found.default.b:g}, {found.default.unit}): {' > '.join(found.default.order)}"
    table = Table("How the order by SAM depends on its choices", (*columns, Column("order", wrap=True)), tuple(rows), subtitle, notes)
    return "\n" + terminal(table)


# ---------------------------------------------------------------- stage 1 and the catalog


def screened_table(rows: Sequence[Screened]) -> str:
    """Stage 1: the kept by NetScore, then the rejected with their reasons."""
    columns = (Column("model"), Column("top-1", 1, True), Column("params", 3, True), Column("MACs", 3, True), Column("NetScore", 0, True))
    cells = tuple(
        (row.name, f.top1(row.top1_pct), _unit(row.params_m, "M"), _unit(row.macs_g, "G"), f.plain_number(row.netscore), _verdict(row))
        for row in rows
    )
    kept = sum(row.kept for row in rows)
    counted = "params and MACs counted from the built models" if any(row.counted for row in rows) else "published params and MACs"
    title = f"Stage 1: {kept} of {len(rows)} candidates kept"
    return terminal(Table(title, (*columns, Column("verdict", wrap=True)), cells, f"best NetScore first, higher is better; {counted}"))


def catalog_table(specs: Sequence[ModelSpec]) -> str:
    """The catalog's rows with their published figures."""
    columns = (Column("model"), Column("family", 2), Column("top-1", 1, True), Column("params", 1, True), Column("MACs", 1, True))
    rows = []
    for spec in specs:
        p = spec.published
        figures = (f.top1(p.top1_pct), _unit(p.params_m, "M"), _unit(p.macs_g, "G")) if p else (f.NONE,) * 3
        kind = f.accuracy_name(spec.dataset)
        if kind != "top-1":
            figures = (f"{figures[0]} {kind}", *figures[1:])
        rows.append((spec.name, spec.family, *figures, ", ".join(spec.pools), p.source if p else ""))
    return terminal(Table(f"{len(specs)} models", (*columns, Column("pools", 3), Column("source", 4)), tuple(rows)))


def model_card(spec: ModelSpec, cost: Cost) -> str:
    """One model: counted figures beside the published ones."""
    published = spec.published
    size = " × ".join(map(str, cost.input_size))
    rows = (
        (f.accuracy_name(spec.dataset), f.NONE, f.top1(published.top1_pct) if published else f.NONE),
        ("params", _unit(cost.params / 1e6, "M"), _unit(published.params_m, "M") if published else f.NONE),
        ("MACs", _unit(cost.macs / 1e9, "G"), _unit(published.macs_g, "G") if published else f.NONE),
        ("activations (float32)", f.scaled(cost.activation_bytes, f.SIZES), f.NONE),
    )
    notes = (
        f"input {size} (channels, height, width), {spec.num_classes} classes of {spec.dataset}",
        f"built by {spec.builder}",
        f"licence {spec.licence}; figures from {published.source if published else 'nobody'}",
    )
    columns = (Column("figure"), Column("counted", right=True), Column("published", right=True))
    return terminal(Table(f"{spec.name} ({spec.family})", columns, rows, notes=notes))


# ---------------------------------------------------------------- compiling and measuring


def artifacts_table(artifacts: Sequence[Artifact]) -> str:
    """Compiled files: what the runtime really runs, the size, and how closely it agrees with the network."""
    columns = (
        Column("artifact"),
        Column("runs as", 1),
        Column("runtime", 4),
        Column("size", 2, True),
        Column("parity", 1),
        Column("folder", 3),
    )
    rows = []
    for artifact in artifacts:
        parity = artifact.parity
        agreed = (
            f"top-1 agrees on {100 * parity.top1_agreement:.0f} % of {parity.n}, error {parity.max_rel:.1e}" if parity else "not checked"
        )
        row = (artifact.label, artifact.info.precision, artifact.info.runtime, f.scaled(artifact.bytes, f.SIZES), agreed, artifact.folder)
        rows.append(row)
    table = terminal(Table(f"{len(artifacts)} compiled", columns, tuple(rows)))
    return table + caveat_lines(doubt for artifact in artifacts for doubt in artifact.caveats)


def measurement(found: Measurement) -> str:
    """One measurement, a figure a line, then its caveats."""
    grade = found.grade
    sensed = f"{found.meter}, grade {f.grade_words(grade)}, scope {found.scope}" if found.energy_j is not None else "none"
    accuracy = found.accuracy
    rows = (
        ("latency, median", f.measure(found.latency_s, "ms", 1e3)),
        ("latency, p90 and p99", f"{_p90(found)}, {_p99(found)}"),
        ("throughput", f.measure(found.throughput_ips, "images/s")),
        ("energy per image", _graded(found, found.energy_j, "mJ", 1e3)),
        ("  above idle", _graded(found, found.net_energy_j, "mJ", 1e3)),
        *_besides(found),
        ("power", _graded(found, found.power_w, "W", 1.0)),
        ("  idle", f.scaled(found.idle_w, f.POWERS)),
        ("images per watt-hour", f.plain_number(found.inferences_per_wh)),
        ("first inference, load", f"{f.scaled(found.first_inference_s, f.TIMES)}, {f.scaled(found.load_s, f.TIMES)}"),
        *_frames(found),
        *_cameras(found),
        ("peak memory, artifact", f"{f.scaled(found.peak_memory_bytes, f.SIZES)}, {f.scaled(found.artifact_bytes, f.SIZES)}"),
        *_memory_cells(found),
        (
            f.accuracy_name(accuracy.dataset) if accuracy else "top-1",
            f"{_top1(accuracy)} on {accuracy.dataset}" if accuracy else "not known",
        ),
        ("weights, precision", f"{found.weights}, {found.precision}"),
        ("energy meter", sensed),
        ("sampling", f.NONE if found.sampler_cores is None else f"{100 * found.sampler_cores:.2g} % of one core"),
    )
    title = f"{found.variant} @ {found.backend}"
    work = found.workload
    subtitle = f"{found.device} · {work.scenario}, batch {work.batch}, {work.images} · protocol {found.protocol}"
    repeats = f"{found.repeats} repeat{'s' if found.repeats > 1 else ''}, {found.inferences} inferences"
    notes = (f"{repeats}; in brackets the 95 % interval over repeats (p90: within them)",)
    table = terminal(Table(title, (Column("figure"), Column("value", wrap=True)), rows, subtitle, notes))
    return table + caveat_lines(found.caveats)


# ---------------------------------------------------------------- doubts and failures


def caveat_lines(caveats: Iterable[Caveat], bullet: str = "") -> str:
    """Each caveat once: what was seen, why it matters, what to do."""
    seen: dict[str, list[str]] = {}
    first: dict[str, Caveat] = {}
    for doubt in caveats:
        first.setdefault(doubt.code, doubt)
        places = seen.setdefault(doubt.code, [])
        if doubt.seen and doubt.seen not in places:
            places.append(doubt.seen)
    lines = []
    for code, doubt in first.items():
        more = f" (and {len(seen[code]) - 3} more)" if len(seen[code]) > 3 else ""
        lines.append(f"{bullet}{MARKS[doubt.severity]} {code}: {f.clean('; '.join(seen[code][:3]))}{more}. {doubt.why} {doubt.advice}")
    return t.printable("\n" + "\n".join(lines) + "\n") if lines else ""


def failures(found: Sequence[Failure]) -> str:
    """What could not go on, at which stage, and why."""
    if not found:
        return ""
    lines = [f"  {f.clean(one.variant)} @ {f.clean(one.backend)} ({one.stage}): {f.clean(one.reason)}" for one in found]
    return t.printable("\n".join(["", f"{len(found)} could not go on:", *lines]) + "\n")


def doctor_table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Which meters, backends and transports work here, and what the others need."""
    rows = [
        (kind, str(one["name"]), ("compiles" if one["remedy"] else "works") if one["ok"] else "missing", str(one["remedy"] or ""))
        for kind, ones in found.items()
        for one in ones
    ]
    strong = frozenset(i for i, row in enumerate(rows) if row[2] == "works")
    columns = (Column("kind"), Column("name"), Column("here"), Column("what is missing and how to get it", wrap=True))
    return terminal(Table("What works on this machine", columns, tuple(rows), strong=strong))


# ---------------------------------------------------------------- cells


def _ranking_cells(row: RankRow, grade: str) -> tuple[str, ...]:
    fronts = [name for name, on in (("energy", row.pareto_energy), ("latency", row.pareto_latency)) if on]
    return (
        str(row.rank) if row.rank else f.NONE,
        row.model,
        f.top1(row.top1_pct, row.accuracy, row.top1, row.seeds),
        f.measure(row.sam),
        f.measure(row.energy_mj, "mJ", 1.0, grade),
        f.measure(row.latency_ms, "ms"),
        f.measure(row.power_w, "W", 1.0, grade),
        f.measure(row.efficiency_pct_per_mj),
        f.saving(row.saved_pct),
        ", ".join(fronts),
        row.weights,
        worth.words(row),
    )


def _ranking_notes(ranking: Ranking) -> Iterable[str]:
    for row in ranking.rows:
        if row.note:
            yield f"{row.model}: {row.note}"
    yield from worth.notes(ranking.rows)
    if ranking.baseline:
        yield f"energy saved: against {ranking.baseline}{'' if '@' in ranking.baseline else ' on the same backend'}"
    for pair in ranking.pairs:
        gain = f", SAM {pair.delta_sam:+.3f}" if pair.delta_sam is not None else ""
        yield f"distilled over plain: {pair.distilled} uses {pair.energy_ratio:.2f} × the energy of {pair.plain}{gain}"
    if told := [one for one in ranking.agreements if one.tau is not None]:
        each = ", ".join(f"{one.stage1} ~ {one.stage2} {_tau(one.tau)}" for one in told)
        yield f"agreement of stage 1 with stage 2 over {told[0].n} models (Kendall tau: 1 same order, 0 unrelated, -1 opposite): {each}"


def _bounds(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if interval is None else (interval.value, interval.low, interval.high)


def _top1(accuracy: Accuracy) -> str:
    bounds = None if accuracy.low is None or accuracy.high is None else Interval(accuracy.value, accuracy.low, accuracy.high, 1)
    figure = f.top1(100 * accuracy.value) if bounds is None else f.percent(bounds)
    return f"{figure} {f.accuracy_origin(accuracy.kind, accuracy.seeds)}"


def _tau(tau: float | None) -> str:
    return f.NONE if tau is None or not math.isfinite(tau) else f"{tau:+.2f}"


def _unit(value: float | None, unit: str) -> str:
    return f.NONE if value is None else f"{value:.2f} {unit}"


def _verdict(row: Screened) -> str:
    return "kept" if row.kept else row.reason or "rejected"


def _graded(found: Measurement, interval: Interval | None, unit: str, factor: float) -> str:
    """A figure with its grade and what the meter saw, so that it is never quoted without them."""
    text = f.measure(interval, unit, factor, found.grade)
    return text if interval is None else f"{text}  grade {found.grade}, {found.scope}"


def _besides(found: Measurement) -> tuple[tuple[str, str], ...]:
    """What stands beside an energy: E3P's own way of computing it, and the error that repeats do not lessen."""
    rows: list[tuple[str, str]] = []
    if found.power_time_j is not None:
        rows.append(("  mean power × time (E3P)", _graded(found, found.power_time_j, "mJ", 1e3)))
    if found.energy_j is not None and found.grade != "D":
        stated = f"± {100 * found.systematic:.3g} %, besides the interval" if found.systematic else "not stated by the sensor's maker"
        rows.append(("  systematic error", stated))
    return tuple(rows)


def _cameras(found: Measurement) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"camera {n}", f"median {f.scaled(one.median_s, f.TIMES)}, p90 {f.scaled(one.p90_s, f.TIMES)}, {one.inferences} images")
        for n, one in enumerate(found.cameras, 1)
    )


def _frames(found: Measurement) -> tuple[tuple[str, str], ...]:
    if found.frames_due is None or found.deadlines_missed is None:
        return ()
    return (("deadlines missed", f"{found.deadlines_missed} of {found.frames_due} frames"),)


def _memory_cells(found: Measurement) -> tuple[tuple[str, str], ...]:
    """What the peak resident set does not say: shared pages counted once, the GPU's memory, what was swapped out."""
    if (memory := found.memory) is None:
        return ()
    parts = (("proportional", memory.pss_bytes), ("GPU", memory.gpu_bytes), ("swapped", memory.swap_bytes))
    known = [f"{name} {f.scaled(value, f.SIZES)}" for name, value in parts if value is not None]
    return (("  of which", ", ".join(known)),) if known else ()


def _p90(found: Measurement) -> str:
    within = found.p90_interval_s
    return f.scaled(found.p90_s, f.TIMES) if within is None else f.measure(within, "ms", 1e3)


def _p99(found: Measurement) -> str:
    return f"p99 needs 1000 inferences ({found.inferences} done)" if found.p99_s is None else f.scaled(found.p99_s, f.TIMES)
