"""The parts of the page about one ranking: the answer, the plots, the table, pairs, agreement.

Records in, escaped HTML out. Measures nothing, reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgejoule.records import Agreement, Pair, Ranking, RankRow
from edgejoule.report import format as f
from edgejoule.report import worth
from edgejoule.report.cells import BOUNDS, Cell, Head, accuracy_cell, esc, interval_cell, label_cell, number_cell, section, table, text_cell

ACCURACY = "Accuracy is labelled published or measured; its interval is over seeds where several were trained, else over the test images."


def finding(ranking: Ranking) -> str:
    """The answer in plain words: who wins, what it saves, how sure that is."""
    best = ranking.rows[0] if ranking.rows and ranking.rows[0].rank == 1 else None
    if best is None:
        return "<p>No model could be ranked; the table says why.</p>"
    estimate = " (an estimate, not a measurement)" if ranking.grade == "D" else ""
    words = [f"<strong>{esc(best.model)}</strong> is best by {esc(f.metric_name(ranking.metric, ranking.a, ranking.b))}."]
    runner = ranking.rows[1] if len(ranking.rows) > 1 else None
    if ranking.metric == "sam" and runner and _overlap(best, runner):
        words.append(f"Its lead over {esc(runner.model)} lies within the uncertainty: treat the two as equal.")
    name, _, backend = best.model.partition(" @ ")
    if best.saved_pct is not None and ranking.baseline not in (best.model, name):
        amount = "the same energy as" if f.saved(best.saved_pct) == "same" else f"{f.saved(best.saved_pct)} energy than"
        where = f" on {backend}" if backend and " @ " not in ranking.baseline else ""
        words.append(f"It uses {esc(amount)} {esc(ranking.baseline + where)}{estimate}.")
    thrift = min(ranking.rows, key=lambda row: row.energy_mj.value)
    if thrift is not best:
        least, _ = _split(f.measure(thrift.energy_mj, "mJ", 1.0, ranking.grade))
        words.append(f"The thriftiest is {esc(thrift.model)} with {esc(least).replace(chr(32), chr(160))} an image.")
    return f"<p>{' '.join(words)}</p>"


def hero(ranking: Ranking) -> str:
    """The winner's figures as tiles above the table, with what all rows share."""
    tiles = ""
    if ranking.rows and ranking.rows[0].rank == 1:
        row = ranking.rows[0]
        shown = (
            (f"{_accuracy(ranking)} accuracy", *_top1(row)),
            ("Energy per image", *_split(f.measure(row.energy_mj, "mJ", 1.0, ranking.grade))),
            ("Latency", *_split(f.measure(row.latency_ms, "ms"))),
            ("SAM", *_split(f.measure(row.sam))),
        )
        tiles = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}<small>{esc(sub)}</small></dd></div>" for name, value, sub in shown)
        tiles = f'<dl class="tiles">{tiles}</dl>'
    return f'<div class="hero"><p class="kicker">{esc(_where(ranking))}</p>{finding(ranking)}{tiles}{chips(ranking)}</div>'


def chips(ranking: Ranking) -> str:
    """Grade, scope, meter, workload and protocol: what must be said beside every energy."""
    grade = f'<li class="grade grade-{esc(ranking.grade[:1] or "none")}">grade {esc(f.grade_words(ranking.grade))}</li>'
    facts = (("scope", ranking.scope), ("meter", ranking.meter), ("workload", ranking.workload), ("protocol", ranking.protocol))
    return f'<ul class="chips">{grade}' + "".join(f"<li>{name} <b>{esc(fact)}</b></li>" for name, fact in facts if fact) + "</ul>"


def ranking_table(ranking: Ranking) -> str:
    """The sortable ranking."""
    heads = (
        Head("#", "place", True),
        Head("Model", "network, and below it the runtime (backend)", pin=True),
        Head(_accuracy(ranking), "accuracy, and whether others published it or it was measured here", True),
        Head("SAM", "accuracy and energy in one score, higher is better", True),
        Head("Energy / image", f"gross, grade {ranking.grade or 'not stated'}, scope {ranking.scope or 'not stated'}", True),
        Head(worth.TITLE.capitalize(), worth.HINT),
        Head("Latency", "median time of one inference", True),
        Head("Power", "mean over the window", True),
        Head("% / mJ", f"{f.accuracy_name(ranking.dataset)} per energy, higher is better", True),
        Head("Saved", f"energy saved against {ranking.baseline or 'a baseline: none here'}", True),
        Head("On the front", "no other row is as accurate for less energy, or for less time"),
    )
    rows = [_ranking_row(row, ranking.grade) for row in ranking.rows]
    used = [i for i in range(len(heads)) if i < 2 or any(row[i].markup not in ("", f.NONE) for row in rows)]
    caption = f"Ranking by {f.metric_name(ranking.metric, ranking.a, ranking.b)}, best first; {BOUNDS}"
    return table([heads[i] for i in used], [[row[i] for i in used] for row in rows], caption, 0, best=bool(rows))


def pairs_table(pairs: Sequence[Pair]) -> str:
    """Distilled models beside their plain twins."""
    heads = (Head("Distilled"), Head("Plain twin"), Head("Energy ratio", "distilled over plain", True), Head("SAM gained", "", True))
    rows = [
        (
            label_cell(pair.distilled),
            label_cell(pair.plain),
            number_cell(f"{pair.energy_ratio:.2f} ×", pair.energy_ratio),
            number_cell(f.NONE if pair.delta_sam is None else f"{pair.delta_sam:+.3f}", pair.delta_sam),
        )
        for pair in pairs
    ]
    return table(heads, rows, "Distilled models beside their plain twins") if rows else ""


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """Kendall's tau of every cheap figure against every measured one."""
    heads = (Head("Stage 1 (no device)"), Head("Stage 2 (measured)"), Head("Kendall's tau", "1 same order, 0 unrelated, -1 opposite", True))
    rows = [
        (text_cell(one.stage1), text_cell(one.stage2), number_cell(f.NONE if one.tau is None else f"{one.tau:+.2f}", one.tau), *_n(one.n))
        for one in agreements
    ]
    return table((*heads, Head("Models", "", True)), rows, "Agreement of stage 1 with stage 2") if rows else ""


def ranking_sections(ranking: Ranking, number: int, several: bool) -> str:
    """All about one ranking: answer, plots, table, pairs, agreement."""
    plots = "".join(_plot(ranking, number, cost) for cost in _costs(ranking))
    about = (
        "Each dot is one model on one runtime; up is more accurate, left is cheaper. The dashed line joins the choices that no other "
        "beats. Point at a dot for its figures."
    )
    if any(row.worth is not None and row.worth.own for row in ranking.rows):
        about += " An arrow leads from a network to what a recipe made of it."
    title = f"Ranking {number + 1}: {_where(ranking)}" if several else "Ranking"
    agreement = (
        "Would screening by cheap figures have found the same order? A tau near 1 says yes, near 0 says that only measuring tells. Each "
        "model counts once, at its best."
    )
    return (
        hero(ranking)
        + section("Accuracy against cost", f'<div class="plots">{plots}</div>', about)
        + section(title, ranking_table(ranking), f"Click a heading to sort. {BOUNDS.capitalize()}. {ACCURACY}{_worth(ranking)}")
        + section("Distilled beside plain", pairs_table(ranking.pairs), "The same network, trained with and without a teacher.")
        + section("Does stage 1 foretell stage 2?", agreement_table(ranking.agreements), agreement)
    )


def _worth(ranking: Ranking) -> str:
    return "".join(f" {esc(note[:1].upper() + note[1:])}." for note in worth.notes(ranking.rows))


def _accuracy(ranking: Ranking) -> str:
    name = f.accuracy_name(ranking.dataset)
    return name[:1].upper() + name[1:] if name == "top-1" else name


def _ranking_row(row: RankRow, grade: str) -> tuple[Cell, ...]:
    fronts = [name for name, on in (("energy", row.pareto_energy), ("latency", row.pareto_latency)) if on]
    note = " · ".join(filter(None, (f"weights: {row.weights}" if row.weights not in ("", "pretrained") else "", row.note)))
    return (
        number_cell(str(row.rank) if row.rank else f.NONE, row.rank or None),
        label_cell(row.model, note),
        accuracy_cell(row.top1_pct, row.accuracy, row.top1, row.seeds),
        interval_cell(row.sam),
        interval_cell(row.energy_mj, "mJ", 1.0, grade),
        worth.cell(row),
        interval_cell(row.latency_ms, "ms"),
        interval_cell(row.power_w, "W", 1.0, grade),
        interval_cell(row.efficiency_pct_per_mj),
        Cell(f.NONE) if row.saved_pct is None else number_cell(f.saving(row.saved_pct), row.saved_pct),
        Cell("".join(f'<span class="front">{name}</span>' for name in fronts), -len(fronts)),
    )


def _costs(ranking: Ranking) -> tuple[str, ...]:
    has_latency = any(row.latency_ms is not None and row.top1_pct is not None for row in ranking.rows)
    has_energy = any(row.top1_pct is not None for row in ranking.rows)
    return tuple(cost for cost, there in (("energy", has_energy), ("latency", has_latency)) if there)


def _plot(ranking: Ranking, number: int, cost: str) -> str:
    sensed = f"grade {ranking.grade}, scope {ranking.scope}, {ranking.meter}" if ranking.grade else "as the table states it"
    sub = sensed if cost == "energy" else ranking.workload
    return (
        f"<figure><figcaption>Accuracy against {cost} <small>{esc(sub)}</small></figcaption>"
        f'<div class="plot" id="plot-{number}-{cost}" data-ranking="{number}" data-cost="{cost}"></div></figure>'
    )


def _where(ranking: Ranking) -> str:
    return " on ".join(filter(None, (ranking.dataset, ranking.device))) or "figures from a table"


def _overlap(best: RankRow, runner: RankRow) -> bool:
    if best.sam is None or runner.sam is None or best.sam.low is None or runner.sam.high is None:
        return False
    return runner.sam.high >= best.sam.low


def _top1(row: RankRow) -> tuple[str, str]:
    value, bounds = _split(f.top1(row.top1_pct, "", row.top1))
    return value, " ".join(filter(None, (bounds, f.accuracy_origin(row.accuracy, row.seeds) or row.accuracy)))


def _split(measure: str) -> tuple[str, str]:
    value, _, bounds = measure.partition(" [")
    return value, f"[{bounds}" if bounds else ""


def _n(n: int) -> tuple[Cell, ...]:
    return (number_cell(str(n), n),)
