"""What is computed again from a store: rankings in a useful order, each with the metric that has a meaning there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgejoule.errors import RankError
from edgejoule.records import Trace, floats
from edgejoule.report.evidence import beside_section
from edgejoule.results import besides, measurements, rank_source, rankings
from edgejoule.store import Store
from edgejoule.study_file import RankPlan
from tests.samples import artifact, trial


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """``unknown`` was measured first and has no published accuracy; its images take less than 1 mJ."""
    path = tmp_path / "r.sqlite"
    with Store.open(path) as store:
        run = store.begin_run("s", "", "", "0")
        for name in ("unknown", "levit_conv_192"):
            made = artifact(name)
            if name == "unknown":
                made = replace(made, variant=replace(made.variant, spec=replace(made.variant.spec, published=None)))
            store.add_artifact(made)
            for repeat in range(3):
                found = trial(f"{name}{repeat}", name, repeat)
                store.add_trial(run, replace(found, traces=(sampled(found.traces[0], 0.005 if name == "unknown" else 1.0),)))
    return path


def sampled(trace: Trace, scale: float) -> Trace:
    """2 W at rest and 10 W in the window from 1 s to 3 s, read every 50 ms; ``scale`` makes it a smaller device."""
    times = [0.05 * i for i in range(81)]
    joules = [scale * (2.0 * t + 8.0 * min(max(t - 1.0, 0.0), 2.0)) for t in times]
    return replace(trace, times_s=floats(times), values=floats(joules))


def test_a_renewed_runtime_is_measured_apart_and_the_newest_is_shown(store: Path) -> None:
    """A worker environment's versions are in no fingerprint; beside the old runtime's repeats the new one's would be one mean."""
    with Store.open(store) as opened:
        run = opened.begin_run("s", "", "", "0")
        old = next(m for m in measurements(opened) if m.model == "levit_conv_192")
        for repeat in range(3):
            found = trial(f"newer{repeat}", "levit_conv_192", repeat)
            newer = replace(found.environment, versions={**found.environment.versions, "ai-edge-litert": "9"})
            slow = floats([2 * seconds for seconds in found.latencies_s])
            opened.add_trial(run, replace(found, environment=newer, started_at=found.started_at + 60, latencies_s=slow))
        (new,) = (m for m in measurements(opened) if m.model == "levit_conv_192")
    assert new.repeats == old.repeats == 3 and new.latency_s.value == pytest.approx(2 * old.latency_s.value)


def test_models_of_unknown_accuracy_come_last_and_stop_nobody(store: Path) -> None:
    with Store.open(store) as opened:
        known, unknown = rankings(opened, measurements(opened), RankPlan(baseline="LeViT-Conv-192"))
    assert (known.dataset, unknown.dataset) == ("imagenet-1k", "")
    assert known.metric == "sam" and known.rows[0].rank == 1 and known.baseline == "levit_conv_192"
    assert not {"metric_replaced", "baseline_missing"} & {doubt.code for doubt in known.caveats}
    assert unknown.rows[0].energy_mj.value < 1.0 and unknown.rows[0].rank == 0


def test_sensitivity_is_told_of_the_rankings_that_have_one(store: Path) -> None:
    ranked, tables = rank_source(store, RankPlan(baseline="levit_conv_192.fb_dist_in1k"), sensitive=True)
    assert len(ranked) == 2 and len(tables) == 1
    assert tables[0].default.order == ("levit_conv_192 @ onnxruntime",)


def test_a_baseline_that_is_nowhere_is_refused_by_rank_and_left_out_by_a_run(store: Path) -> None:
    with pytest.raises(RankError, match="vit_tiny"):
        rank_source(str(store), RankPlan(baseline="vit_tiny"))
    with Store.open(store) as opened:
        assert "baseline_missing" in {
            doubt.code for doubt in rankings(opened, measurements(opened), RankPlan(baseline="vit_tiny"))[0].caveats
        }


def test_latencies_stand_beside_a_printed_table_recipe_by_recipe_and_machine_by_machine(store: Path) -> None:
    with Store.open(store) as opened:
        one = next(m for m in measurements(opened) if m.model == "levit_conv_192")
    models = ("edgevit_xxs", "edgevit_s", "mobilenetv2_100")
    found = [
        replace(one, model=name, variant=name, latency_s=replace(one.latency_s, value=0.01 * (i + 1))) for i, name in enumerate(models)
    ]
    fused = [replace(m, variant=f"{m.model} | fuse", latency_s=replace(m.latency_s, value=0.5 * m.latency_s.value)) for m in found]
    threaded = [replace(m, fingerprint="two threads", latency_s=replace(m.latency_s, value=0.001)) for m in found]
    tables = besides([*fused, *threaded, *found], RankPlan(beside="edgevit_table2"))
    here = {table.label: {row.model: row.here for row in table.rows if row.here} for table in tables}
    assert len(here) == len(tables) == 3
    plain, other, recipe = (table.label for table in tables)
    assert (
        plain.endswith(f"environment {one.fingerprint}")
        and other.endswith("two threads")
        and recipe.startswith("medians: fuse @ onnxruntime")
    )
    assert here[plain] == pytest.approx({"EdgeViT-XXS": 10.0, "EdgeViT-S": 20.0, "MobileNet-v2": 30.0})  # ms
    assert set(here[other].values()) == {1.0} and here[recipe]["EdgeViT-S"] == pytest.approx(10.0)
    assert besides(found, RankPlan()) == ()
    seconds = besides([replace(found[0], model="edgevit_xxs_coco"), found[1]], RankPlan(beside="edgevit_table7"))[0]
    assert {row.model: row.here for row in seconds.rows if row.here} == {"EdgeViT-XXS": 0.01} and seconds.unmatched == ("edgevit_s",)
    assert "Not in the printed table: edgevit_s." in beside_section(seconds) and "Here, s" in beside_section(seconds)


def test_what_saves_bytes_alone_says_so() -> None:
    from edgejoule.results import _of_size_only

    (doubt,) = _of_size_only("deit_tiny | fuse | prune_weights(pattern='2:4') | qat(bits=4)")
    assert doubt.code == "size_only" and "prune_weights(pattern='2:4') and qat(bits=4)" in doubt.seen
    assert _of_size_only("deit_tiny") == () == _of_size_only("deit_tiny | prune_ffn(ratio=0.3) | qat(epochs=2)")
