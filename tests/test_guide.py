"""The guide's study, shortened: every step a row with its own accuracy, bytes and latency, and a verdict beside the plain networks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgejoule.bench import Bench
from edgejoule.study import run_study
from edgejoule.study_file import Study, load_study, with_measure

SHORT = "quick(window_s=0.5, idle_s=0.2, warmup_s=0.2, warmup_cap_s=1.0)"


def shortened() -> Study:
    """Two of its networks, three of its recipes and two of its backends, a few steps of training each."""
    study = with_measure(load_study("guide"), profile=SHORT)
    assert study.train is not None
    first, distilled, *_, last_float, last = (re.sub(r"epochs=\d+", "epochs=0.1", recipe) for recipe in study.optimize.recipes)
    assert last_float in last and distilled in last_float
    return replace(
        study,
        screen=replace(study.screen, models=study.screen.models[:2]),
        optimize=replace(study.optimize, recipes=(first, last_float, last)),
        train=replace(study.train, recipes=("digits(steps=30)",)),
        compile=replace(study.compile, backends=study.compile.backends[:2], max_drop_pct=100.0),
    )


def test_the_guides_steps_are_rows_of_one_ranking(tmp_path: Path) -> None:
    study = shortened()
    outcome = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache"))
    steps = len(study.optimize.recipes)
    trained_for_int8 = sum("qat" in recipe for recipe in study.optimize.recipes)
    assert len(outcome.measurements) == 2 * (steps + 1) - trained_for_int8, [failure.reason for failure in outcome.failures]
    refused = [failure for failure in outcome.failures if failure.stage == "compile"]
    assert len(refused) == len(outcome.failures) == trained_for_int8 and all("int8" in failure.reason for failure in refused)
    (ranking,) = outcome.rankings
    assert all(row.top1_pct is not None for row in ranking.rows) and {row.recipe for row in ranking.rows} == set(study.optimize.recipes)
    smaller = {m.variant: m.artifact_bytes for m in outcome.measurements if m.backend == "onnxruntime"}
    assert min(smaller.values()) < 0.75 * smaller["vit_digits"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "worth it?" in page.lower() and all(row.worth is not None for row in ranking.rows if row.recipe)
    assert {one.model for one in outcome.measurements} == {"vit_digits", "edgevit_digits"}
    again = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache"))
    assert len(again.measurements) == len(outcome.measurements)
