"""The long studies (make test-all): all 13 survivors of E3P-ViT through every stage on both runtimes, with short windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgejoule.bench import Bench
from edgejoule.study import run_study
from edgejoule.study_file import load_study, with_measure

SHORT = "quick(window_s=0.5, idle_s=0.2, warmup_s=0.2, warmup_cap_s=1.0)"


@pytest.mark.study
def test_the_thirteen_of_e3p_vit(tmp_path: Path) -> None:
    outcome = run_study(with_measure(load_study("e3p_vit"), profile=SHORT), tmp_path / "out", Bench(cache=tmp_path / "cache"))
    assert not outcome.failures
    assert sum(row.kept for row in outcome.screened) == 13 and len(outcome.screened) == 25
    assert len(outcome.measurements) == 26
    (ranking,) = outcome.rankings
    assert len(ranking.rows) == 26 and ranking.baseline == "vit_small"
    assert len(ranking.pairs) == 2 * 4  # three TinyViTs and DeiT-S, on two runtimes
    assert all(agreement.tau is not None and agreement.n == 13 for agreement in ranking.agreements)
    assert {m.precision for m in outcome.measurements} == {"fp32"}
    assert not any(doubt.code in ("parity_low", "parity_blind", "precision_differs") for m in outcome.measurements for doubt in m.caveats)


@pytest.mark.study
@pytest.mark.parametrize(("name", "models"), [("edgevit_table2", 18), ("edgevit_table8", 7)])
def test_edgevits_tables_run_again(name: str, models: int, tmp_path: Path) -> None:
    profile = "edgevit(images=5, repeats_min=1, repeats_max=1, idle_s=0.2, warmup_s=0.2, warmup_cap_s=1.0)"
    outcome = run_study(with_measure(load_study(name), profile=profile), tmp_path / "out", Bench(cache=tmp_path / "cache"))
    assert not outcome.failures and len(outcome.measurements) == models
    (beside,) = outcome.beside
    assert beside.n == len(beside.rows) == models and not beside.unmatched
    assert beside.spearman is not None and 0.0 < beside.spearman < 1.0
    assert not any(doubt.code in ("parity_low", "parity_blind", "precision_differs") for m in outcome.measurements for doubt in m.caveats)
    assert "Beside the published table" in (tmp_path / "out" / "report.html").read_text()
