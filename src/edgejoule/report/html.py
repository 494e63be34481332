"""A ``Report`` as one self-contained page that opens from disk: no network, no server. The frame is ``page.py``'s."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgejoule.records import Caveat, Interval, Ranking, RankRow
from edgejoule.report import evaluation, evidence, training, worth
from edgejoule.report import format as f
from edgejoule.report import sections as s
from edgejoule.report.cells import esc, section
from edgejoule.report.page import page, write_page
from edgejoule.report.report import Report


def write_html(path: Path | str, report: Report) -> Path:
    """Writes the report's page, whole or not at all. Raises OutputError where it cannot be written."""
    return write_page(path, render(report))


def render(report: Report) -> str:
    """The whole page as text."""
    about = ' <a href="#words">What the words mean</a>'
    title = report.title
    return page(title or "edgejoule", _meta(report), _body(report), _data(report), "report.js", title or "Report", about)


def _body(report: Report) -> str:
    several = len(report.rankings) > 1
    ranked = "".join(s.ranking_sections(ranking, number, several) for number, ranking in enumerate(report.rankings))
    if not ranked:
        ranked = '<div class="hero"><p>Nothing was ranked: no measurement has an energy. <code>edgejoule doctor</code> says why.</p></div>'
    everything = "Every figure with its unit; grade, scope and meter stand in the same row. Energies are per image, latency is the median."
    stage1 = "Before any device was touched: thresholds, then NetScore, a score from accuracy and size alone. Best first."
    return (
        ranked
        + section(
            "Caveats", evidence.caveat_cards(_caveats(report)), "What could make these figures wrong, and what to do about it.", "caveats"
        )
        + section("What could not go on", evidence.failures_list(report.failures), "The rest of the study went on without these.")
        + "".join(evidence.beside_section(found) for found in report.beside)
        + training.training_section(report.trainings, report.epochs)
        + training.spread_section(report.spreads)
        + evaluation.evaluation_section(report.evaluations)
        + section("Every measurement", evidence.measurements_table(report.measurements), everything)
        + section("What was compiled", evidence.artifacts_table(report.artifacts), "Each file beside the network, on real photographs.")
        + section("Stage 1: choosing candidates", evidence.screened_table(report.screened), stage1)
        + section("The machine", evidence.environments_list(report.environments))
        + section("How to reproduce", _reproduce(report))
        + section("What the words mean", evidence.glossary(), anchor="words")
    )


def _meta(report: Report) -> str:
    when = (
        datetime.datetime.fromtimestamp(report.created_at, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        if report.created_at
        else ""
    )
    count = f"{len(report.measurements)} measurements" if report.measurements else ""
    return " · ".join(filter(None, (when, count, f"edgejoule {report.version}" if report.version else "")))


def _reproduce(report: Report) -> str:
    command = f'<p>Command</p><pre class="command">{esc(report.command)}</pre>' if report.command else ""
    study = _lines(report.study_text)
    return command + (f"<details open><summary>The study file</summary><pre>{study}</pre></details>" if report.study_text else "")


def _lines(text: str) -> str:
    return "\n".join(esc(line.expandtabs(4)) for line in text.splitlines())


def _caveats(report: Report) -> Iterator[tuple[str, Caveat]]:
    for measurement in report.measurements:
        for doubt in measurement.caveats:
            yield f"{measurement.variant} @ {measurement.backend}", doubt
    for label, found in report.evaluations:
        for doubt in found.caveats:
            yield label, doubt
    for doubt in (*(doubt for ranking in report.rankings for doubt in ranking.caveats), *report.caveats):
        yield "", doubt


def _data(report: Report) -> dict[str, Any]:
    return {"rankings": [_plot_data(ranking) for ranking in report.rankings]}


def _plot_data(ranking: Ranking) -> dict[str, Any]:
    scope = f"grade {ranking.grade}, {ranking.scope}" if ranking.grade else ""
    accuracy = f.accuracy_name(ranking.dataset)
    title = "Top-1 accuracy (%)" if accuracy == "top-1" else f"{accuracy} (%)"
    return {"scope": f.clean(scope), "accuracy": title, "rows": [_point(row, ranking) for row in ranking.rows if row.top1_pct is not None]}


def _point(row: RankRow, ranking: Ranking) -> dict[str, Any]:
    name, _, backend = f.clean(row.model).partition(" @ ")
    hover = (
        f"rank {row.rank or f.NONE}",
        f"{f.accuracy_name(ranking.dataset)} {f.top1(row.top1_pct, row.accuracy, row.top1, row.seeds)}",
        f"energy {f.measure(row.energy_mj, 'mJ', 1.0, ranking.grade)} an image",
        f"latency {f.measure(row.latency_ms, 'ms')}",
        f"power {f.measure(row.power_w, 'W', 1.0, ranking.grade)}",
        f"SAM {f.measure(row.sam)}",
        f"{f.measure(row.efficiency_pct_per_mj)} %/mJ",
        f"energy saved {f.saving(row.saved_pct)}" if row.saved_pct is not None else "",
        f"grade {ranking.grade}, scope {ranking.scope}" if ranking.grade else "",
        f"weights {row.weights}" if row.weights else "",
        f"{worth.TITLE} {f.clean(worth.words(row))}" if row.worth is not None else "",
    )
    return {
        "name": name,
        "label": row.model,
        "own": row.worth.own if row.worth is not None else "",
        "backend": backend,
        "top1": row.top1_pct,
        "bounds": _triple(row.top1),
        "energy": _triple(row.energy_mj),
        "latency": _triple(row.latency_ms),
        "front": {"energy": row.pareto_energy, "latency": bool(row.pareto_latency)},
        "best": row.rank == 1,
        "hover": [line for line in hover if line],
    }


def _triple(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [interval.value, interval.low, interval.high]
