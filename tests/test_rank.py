"""SAM, efficiency, Pareto fronts, Kendall's tau and whole rankings against published figures and hand-made cases."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.caveats import UNRANKED, caveat
from edgejoule.errors import RankError
from edgejoule.rank.agreement import agreements, kendall_tau_b, sensitivity
from edgejoule.rank.groups import entries_from_measurements, unranked
from edgejoule.rank.metrics import efficiency, efficiency_interval, sam, sam_interval
from edgejoule.rank.pareto import front
from edgejoule.rank.ranking import METRICS, find_baseline, rank, rank_groups
from edgejoule.rank.table import Entry
from edgejoule.records import Accuracy, Interval, Screened
from tests.report_sample import measurement, sample_measurements, sample_screened

DATA = Path(__file__).parent / "data"


def exact(value: float) -> Interval:
    return Interval(value, None, None, 1)


def entry(model: str, top1_pct: float | None = 80.0, energy_mj: float = 400.0, **fields: object) -> Entry:
    return replace(Entry(model, top1_pct, exact(energy_mj), name=model), **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("accuracy", "energy_j_per_1000", "published"), [(0.83232, 425.0, 0.76), (0.980, 425.0, 1.72), (0.9751, 1151.0, 1.44)]
)
def test_sam_gives_the_published_scores_at_the_implied_energies(accuracy: float, energy_j_per_1000: float, published: float) -> None:
    assert sam(accuracy, energy_j_per_1000) == pytest.approx(published, abs=0.005)


def test_b_scales_and_more_energy_or_less_accuracy_lowers_sam() -> None:
    assert sam(0.8, 300, 5, 10) == pytest.approx(2 * sam(0.8, 300, 5, 5))
    assert sam(0.8, 301) < sam(0.8, 300) < sam(0.81, 300)


@pytest.mark.parametrize("energy_mj", [1.0, 0.5, 0.0, -3.0, math.nan, math.inf])
def test_sam_refuses_energies_where_its_logarithm_changes_sign(energy_mj: float) -> None:
    with pytest.raises(RankError, match="changes sign"):
        sam(0.8, energy_mj)


@pytest.mark.parametrize("accuracy", [0.0, -0.1, 1.0001, 81.4, math.nan])
def test_sam_refuses_accuracies_that_are_no_fractions(accuracy: float) -> None:
    with pytest.raises(RankError, match="fraction"):
        sam(accuracy, 400.0)


@pytest.mark.parametrize(("a", "b"), [(-1.0, 5.0), (5.0, 0.0), (5.0, -1.0), (math.nan, 5.0), (5.0, math.inf), (5.0, 1e308)])
def test_sam_refuses_exponents_that_turn_it_round(a: float, b: float) -> None:
    with pytest.raises(RankError):
        sam(1.0, 1.000001, a, b)


def test_less_energy_is_the_upper_bound_of_sam() -> None:
    found = sam_interval(exact(0.8), Interval(400.0, 380.0, 430.0, 5))
    assert found.low == pytest.approx(sam(0.8, 430.0)) and found.high == pytest.approx(sam(0.8, 380.0)) and found.n == 5
    wider = sam_interval(Interval(0.8, 0.78, 0.82, 1000), Interval(400.0, 380.0, 430.0, 5))
    assert wider.low == pytest.approx(sam(0.78, 430.0)) and wider.high == pytest.approx(sam(0.82, 380.0))


def test_bounds_that_cannot_be_claimed_are_none() -> None:
    assert sam_interval(exact(0.8), exact(400.0)) == Interval(sam(0.8, 400.0), None, None, 1)
    assert sam_interval(Interval(0.8, 0.7, 0.9, 10), exact(400.0)).low is None
    near = sam_interval(exact(0.8), Interval(1.5, 0.9, 2.0, 3))
    assert near.high is None and near.low is not None
    assert efficiency_interval(exact(80.0), Interval(1.0, -0.2, 2.0, 3)).high is None


@given(st.floats(0.01, 1.0), st.floats(2.0, 1e6), st.floats(1.0, 1.5), st.floats(0.0, 9.0))
def test_the_interval_holds_the_value(accuracy: float, energy_mj: float, spread: float, a: float) -> None:
    found = sam_interval(
        Interval(accuracy, accuracy / spread, min(1.0, accuracy * spread), 9),
        Interval(energy_mj, energy_mj / spread, energy_mj * spread, 9),
        a,
    )
    assert found.low is not None and found.low <= found.value
    assert found.high is None or found.value <= found.high


def test_efficiency_gives_the_column_that_edgevit_prints() -> None:
    for row in table3():
        printed, top1, energy = (float(row[name]) for name in ("efficiency_percent_per_mJ", "top1_percent", "energy_mean_mJ"))
        low, high = efficiency(top1 - 0.05, energy + 0.05), efficiency(top1 + 0.05, energy - 0.05)
        agrees = low - 0.0005 <= printed <= high + 0.0005
        assert agrees == (row["model"] != "LeViT-384"), row["model"]  # the one row that disagrees beyond rounding
    with pytest.raises(RankError):
        efficiency(80.0, 0.0)


# ---------------------------------------------------------------- pareto


def table3() -> list[dict[str, str]]:
    with (DATA / "edgevit_table3.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def table2() -> list[dict[str, str]]:
    with (DATA / "edgevit_table2.csv").open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def kept(rows: list[dict[str, str]], cost: str) -> set[str]:
    flags = front([(float(row[cost]), float(row["top1_percent"])) for row in rows])
    return {row["model"] for row, flag in zip(rows, flags, strict=True) if flag}


def test_the_front_of_edgevit_table_3_by_energy() -> None:
    expected = {"MobileNet-v3 0.75", "EdgeViT-XXS", "EfficientNet-B0", "EdgeViT-XS", "PVT-v2-B1", "EdgeViT-S"}
    assert kept(table3(), "energy_mean_mJ") == expected


def test_the_fronts_of_edgevit_table_2() -> None:
    by_latency = {"MobileNet-v3 0.75", "EdgeViT-XXS", "EfficientNet-B0", "EdgeViT-XS", "LeViT-384", "EdgeViT-S"}
    assert kept(table2(), "cpu_latency_mean_ms") == by_latency
    assert kept(table2(), "params_M") == {"MobileViT-XXS", "MobileViT-XS", "EfficientNet-B0", "MobileViT-S", "EdgeViT-S"}
    assert kept(table2(), "flops_G") == {"MobileNet-v3 0.75", "EfficientNet-B0", "EdgeViT-XS", "EdgeViT-S"}


def test_ties_on_the_front() -> None:
    assert front([]) == ()
    assert front([(1, 1), (1, 1)]) == (True, True)
    assert front([(1, 1), (1, 2), (2, 2), (2, 3)]) == (False, True, False, True)
    with pytest.raises(RankError, match="finite"):
        front([(math.nan, 1.0)])


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30)


@given(points)
def test_the_front_is_what_the_definition_says(found: list[tuple[int, int]]) -> None:
    def beaten(i: int) -> bool:
        cost, value = found[i]
        return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in found)

    assert front(found) == tuple(not beaten(i) for i in range(len(found)))


# ---------------------------------------------------------------- agreement


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=25))
def test_tau_b_is_scipys(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is needed to check our tau against it")
    x, y = zip(*pairs, strict=True)
    ours, theirs = kendall_tau_b(x, y), float(stats.kendalltau(x, y).statistic)
    assert (ours is None) == math.isnan(theirs)
    assert ours is None or ours == pytest.approx(theirs)


def test_agreement_counts_each_model_once_and_means_cheaper_is_better() -> None:
    entries = [
        entry(
            f"{name} @ {backend}", energy_mj=energy * factor, name=name, backend=backend, params_m=params, macs_g=params / 5, netscore=score
        )
        for name, energy, params, score in (("s", 100.0, 5.0, 70.0), ("m", 200.0, 11.0, 65.0), ("l", 400.0, 22.0, 60.0))
        for backend, factor in (("onnxruntime", 1.0), ("openvino", 0.9))
    ]
    found = {(one.stage1, one.stage2): one for one in rank(entries).agreements}
    for stage1 in ("params (fewer first)", "MACs (fewer first)", "NetScore"):
        assert found[stage1, "energy (less first)"].tau == pytest.approx(1.0) and found[stage1, "SAM"].n == 3
    assert agreements((), ()) == ()


def test_agreement_takes_a_models_best_row_and_only_figures_that_exist() -> None:
    entries = [
        entry("s @ fast", energy_mj=100.0, name="s", params_m=5.0),
        entry("s @ slow", energy_mj=900.0, name="s", params_m=5.0),
        entry("m @ fast", energy_mj=200.0, name="m", params_m=11.0),
    ]
    found = {(one.stage1, one.stage2): one.tau for one in rank(entries).agreements}
    assert found == {("params (fewer first)", "energy (less first)"): 1.0, ("params (fewer first)", "SAM"): 1.0}


def test_sensitivity_shows_b_scaling_and_units_failing() -> None:
    studied = sensitivity([entry("frugal", 75.0, 120.0), entry("precise", 83.0, 900.0), entry("middle", 79.5, 300.0)])
    by = {(s.a, s.b, s.unit): s for s in studied.settings}
    default = studied.default.order
    assert all(s.order == default for key, s in by.items() if key[0] == 5 and key[2] == "mJ per image")
    assert by[1.0, 5.0, "mJ per image"].order[0] == "frugal" and default[0] == "precise" and studied.ambiguous
    assert by[1.0, 5.0, "mJ per image"].tau == pytest.approx(-1.0)
    joules = by[5.0, 5.0, "J per image"]
    assert joules.order == () and joules.tau is None and "changes sign" in joules.reason
    assert by[5.0, 5.0, "J per 1000 images"].order == default
    with pytest.raises(RankError, match="changes sign"):
        sensitivity([entry("tiny", 75.0, 0.9)])


# ---------------------------------------------------------------- rankings


def test_every_metric_orders_best_first() -> None:
    rows = [
        entry("a", 70.0, 100.0, latency_ms=exact(9.0), netscore=60.0),
        entry("b", 85.0, 500.0, latency_ms=exact(20.0), netscore=70.0),
        entry("c", 80.0, 101.0, latency_ms=exact(5.0), netscore=65.0),
    ]
    best = {metric: [row.model for row in rank(rows, metric=metric).rows] for metric in METRICS}
    assert best["sam"] == ["b", "c", "a"] and best["netscore"] == best["accuracy"] == ["b", "c", "a"]
    assert best["efficiency"] == ["c", "a", "b"] and best["energy"] == ["a", "c", "b"] and best["latency"] == ["c", "a", "b"]
    assert [row.rank for row in rank(rows).rows] == [1, 2, 3]


def test_ties_go_by_name_and_flags_are_set() -> None:
    found = rank([entry("b"), entry("a"), entry("worse", 79.0, 450.0, latency_ms=exact(3.0))])
    assert [row.model for row in found.rows] == ["a", "b", "worse"]
    assert [row.pareto_energy for row in found.rows] == [True, True, False]
    assert [row.pareto_latency for row in found.rows] == [None, None, True]


def test_an_energy_below_one_mj_is_named_and_other_metrics_still_work() -> None:
    rows = [entry("fine"), entry("too small", energy_mj=0.7)]
    with pytest.raises(RankError, match=r"too small uses 0.7 mJ .*--metric efficiency"):
        rank(rows)
    found = rank(rows, metric="efficiency")
    assert found.rows[0].model == "too small" and found.rows[0].sam is None


def test_a_row_without_accuracy_stands_last_unranked() -> None:
    found = rank([entry("known"), entry("unknown", None), entry("hopeless", 0.0)])
    assert [(row.model, row.rank) for row in found.rows] == [("known", 1), ("hopeless", 0), ("unknown", 0)]
    assert "no accuracy" in found.rows[2].note and found.rows[2].sam is None


def test_saving_is_against_the_baseline_on_the_same_backend() -> None:
    rows = [
        entry(f"{name} @ {backend}", energy_mj=energy, name=name, backend=backend)
        for name, backend, energy in (
            ("vit_small_patch16_224", "ort", 1000.0),
            ("levit", "ort", 400.0),
            ("vit_small_patch16_224", "ov", 500.0),
            ("levit", "ov", 400.0),
        )
    ]
    saved = {row.model: row.saved_pct for row in rank(rows).rows}
    assert rank(rows).baseline == "vit_small_patch16_224"
    assert saved["levit @ ort"] == pytest.approx(60.0) and saved["levit @ ov"] == pytest.approx(20.0)
    fixed = {row.model: row.saved_pct for row in rank(rows, baseline="levit @ ov").rows}
    assert fixed["vit_small_patch16_224 @ ort"] == pytest.approx(-150.0) and fixed["levit @ ort"] == pytest.approx(0.0)


def test_an_unknown_baseline_metric_or_twin_is_an_error() -> None:
    with pytest.raises(RankError, match="did you mean levit_192"):
        rank([entry("levit_192")], baseline="levit_129")
    with pytest.raises(RankError, match="metric"):
        rank([entry("x")], metric="speed")
    with pytest.raises(RankError, match="twice"):
        rank([entry("x"), entry("x")])
    with pytest.raises(RankError, match="nothing to rank"):
        rank([])
    assert find_baseline([entry("resnet50")]) == ""


def test_a_distilled_model_stands_beside_its_plain_twin() -> None:
    rows = [entry("tiny", 79.0, 400.0), entry("tiny_d", 81.0, 500.0, plain="tiny"), entry("orphan", plain="nowhere")]
    (pair,) = rank(rows).pairs
    assert (pair.distilled, pair.plain) == ("tiny_d", "tiny") and pair.energy_ratio == pytest.approx(1.25)
    assert pair.delta_sam == pytest.approx(sam(0.81, 500) - sam(0.79, 400))


def test_published_accuracy_and_random_weights_are_said() -> None:
    codes = {one.code for one in rank([entry("x", weights="random"), entry("y", accuracy="measured")]).caveats}
    assert codes == {"accuracy_mixed", "accuracy_published", "weights_random"}


# ---------------------------------------------------------------- from measurements


def test_measurements_are_ranked_by_group() -> None:
    groups = entries_from_measurements(sample_measurements(), sample_screened(), {"tiny_vit_11m_dist": "tiny_vit_11m"})
    (ranking,) = rank_groups(groups, title="sample")
    assert len(ranking.rows) == 10 and ranking.grade == "C" and ranking.dataset == "imagenet-1k"
    assert ranking.rows[0].energy_mj.value > 1.0 and ranking.rows[0].netscore is not None
    assert len(ranking.pairs) == 2 and ranking.baseline == "vit_small_patch16_224"


@pytest.mark.parametrize(
    "other",
    [
        {"device": "pi"},
        {"fingerprint": "f2"},
        {"protocol": "quick"},
        {"grade": "D"},
        {"scope": "wall"},
        {"meter": "nvml"},
        {"accuracy": None},
    ],
)
def test_what_must_not_be_mixed_is_ranked_apart(other: dict[str, object]) -> None:
    first, second = measurement("a"), replace(measurement("b"), **other)  # type: ignore[arg-type]
    assert len(entries_from_measurements([first, measurement("b")])) == 1
    assert len(entries_from_measurements([first, second])) == 2


def test_other_batches_and_data_sets_are_ranked_apart() -> None:
    first = measurement("a")
    batch = replace(measurement("b"), workload=replace(first.workload, batch=8))
    other_crops = replace(measurement("d"), workload=replace(first.workload, images_sha256="another model's crops of the same photos"))
    cifar = replace(measurement("c"), accuracy=Accuracy("cifar10", "test", 0.97, "measured", "us"))
    groups = entries_from_measurements([first, batch, other_crops, cifar])
    assert len(groups) == 3 and any("batch 8" in key.workload_label for key in groups)


def test_a_measurement_without_energy_is_noted_not_ranked() -> None:
    silent = replace(measurement("b"), energy_j=None, net_energy_j=None)
    assert entries_from_measurements([silent]) == {}
    (note,) = unranked([measurement("a"), silent])
    assert note.stage == "rank" and "no energy" in note.reason and rank_groups({}) == ()


def test_two_artifacts_of_one_spelling_are_told_apart() -> None:
    first = measurement("a")
    (entries,) = entries_from_measurements([first, replace(first, artifact_sha256="f" * 64), first]).values()
    assert len({one.model for one in entries}) == 3


@pytest.mark.parametrize("code", sorted(UNRANKED))
def test_an_artifact_that_fails_the_truth_gate_is_shown_and_not_ranked(code: str) -> None:
    liar = replace(measurement("fast"), caveats=(caveat("quick_profile", "3 repeats"), caveat(code, "0.56 instead of 0.03")))
    honest = measurement("slow")
    (entries,) = entries_from_measurements([liar, honest]).values()
    assert [entry.name for entry in entries] == ["slow"]
    (shown,) = unranked([liar, honest])
    assert shown.variant == "fast" and shown.stage == "truth" and "0.56 instead of 0.03" in shown.reason and "quick" not in shown.reason


def test_a_baseline_missing_from_one_group_is_no_error() -> None:
    groups = entries_from_measurements(
        [measurement("a"), replace(measurement("b"), device="pi")], [Screened("a", 80.0, 5.0, 1.0, 66.0, True, "")]
    )
    assert [ranking.baseline for ranking in rank_groups(groups, baseline="a")] == ["a", ""]
    with pytest.raises(RankError, match="baseline"):
        rank_groups(groups, baseline="zzz")
