"""The papers' tables recomputed: every known disagreement is found by name, what agrees agrees, and a changed cell turns its verdict."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest

from edgejoule.bench import Event
from edgejoule.errors import ModelError, RankError, UnknownNameError
from edgejoule.plain import decode, encode
from edgejoule.records import Cost
from edgejoule.report import reproduction as text
from edgejoule.reproduce import Check, Reproduction, beside, e3p, edgevit, energy, fronts, prose, published_table, reproduce, sizes
from edgejoule.reproduce.checks import Span, as_printed, compared, exact, reproduction
from edgejoule.reproduce.published import edgevit_tables

KNOWN = {  # what a careful reader found by hand
    "table1.params.EdgeViT-S",
    "table1.blocks.EdgeViT-XS",
    "table1.blocks.EdgeViT-S",
    "table1.heads.EdgeViT-XS",
    "table1.heads.EdgeViT-S",
    "table1.head_dim.EdgeViT-XS",
    "table1.head_dim.EdgeViT-S",
    "table1.printed_depths.params.EdgeViT-XS",
    "table1.printed_depths.FLOPs.EdgeViT-XS",
    "table1.printed_depths.params.EdgeViT-S",
    "table1.printed_depths.FLOPs.EdgeViT-S",
    "table1.s_minus_xs.retinanet",
    "table1.s_minus_xs.maskrcnn",
    "table1.s_minus_xs.semfpn",
    "table2.params.MobileNet-v2",
    "table2.params.PVT-v2-B0",
    "table2.params.EdgeViT-S",
    "table2.flops.T2T-ViT-12",
    "table2.table3.latency_pm.LeViT-384",
    "table3.efficiency.LeViT-384",
    "table3.closure",
    "table5.retinanet.params.EdgeViT-XXS",
    "table5.two_heads.EdgeViT-XXS",
    "prose.speed.EdgeViT-XS",
    "prose.energy_exception",
    "prose.energy_dominance",
    "prose.mobilenet_gain",
    "prose.figure1.xxs",
    "prose.mask_ap",
    "text.norms",
    "text.kernel",
    "text.delegate",
    "text.ffns",
    "text.propagation",
    "text.batch",
    "text.pooling",
    "text.upsampling",
    "appendix.local",
    "appendix.propagation",
    "appendix.positions",
    "appendix.total",
}
FOUND = {"table1.params.EdgeViT-XS", "table2.params.EdgeViT-XS", "table2.params.MobileViT-XS"}  # found by computing


class Given:
    """Counts of networks as figures, so that no network is built; what is not given cannot be counted."""

    def __init__(self, costs: Mapping[str, tuple[int, int]] | None = None) -> None:
        self.costs = costs or {}

    def cost(self, label: str) -> Cost:
        if label not in self.costs:
            raise ModelError(f"no count of {label} was given")
        return Cost(*self.costs[label], 0, (3, 224, 224))

    def headless_params(self, label: str) -> int:
        return self.cost(label).params

    def stages(self, label: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        raise ModelError(f"no stages of {label} were given")

    def anatomy(self, label: str) -> Mapping[str, str]:
        raise ModelError(f"no anatomy of {label} was given")

    def spatial(self, label: str) -> Any:
        raise ModelError(f"no spatial operations of {label} were given")

    def dense_params(self, head: str, label: str) -> int:
        raise ModelError(f"no count of {head} on {label} was given")

    def segmenter_macs(self, label: str) -> int:
        raise ModelError(f"no count of {label} was given")


@functools.cache
def full(name: str) -> Reproduction:
    return reproduce(name)


def by_name(found: Reproduction) -> dict[str, Check]:
    return {check.name: check for section in found.sections for check in section.checks}


def check_of(section: Any, name: str) -> Check:
    return next(check for check in section.checks if check.name == name)


def changed(table: str, model: str, column: str, value: str, key: str = "model") -> dict[str, list[dict[str, str]]]:
    """The tables with one cell changed."""
    tables = edgevit_tables()
    row = next(row for row in tables[table] if row[key] == model)
    assert row[column] != value
    row[column] = value
    return tables


# ---------------------------------------------------------------- intervals


def test_a_printed_number_stands_for_half_a_unit_of_its_last_digit() -> None:
    assert as_printed("0.173") == Span(0.173, 0.1725, 0.1735, 3)
    assert as_printed("14") == Span(14.0, 13.5, 14.5, 0)
    assert as_printed("4.1", decimals=2).low == pytest.approx(4.095)  # a zero cut off its end


def test_intervals_hold_every_result_of_their_corners() -> None:
    a, b = as_printed("72.0"), as_printed("85.7")
    quotient, product, difference = a / b, a * b, a - b
    assert (quotient.low, quotient.high) == pytest.approx((71.95 / 85.75, 72.05 / 85.65))
    assert (product.low, product.high) == pytest.approx((71.95 * 85.65, 72.05 * 85.75))
    assert (difference.low, difference.high) == pytest.approx((-13.8, -13.6))
    assert (a + b).high == pytest.approx(157.8)
    negative = Span(-1.0, -2.0, 3.0) * Span(1.0, -4.0, 5.0)
    assert (negative.low, negative.high) == (-12.0, 15.0)
    with pytest.raises(ZeroDivisionError):
        a / Span(0.0, -1.0, 1.0)


def test_a_verdict_is_disagreement_only_where_intervals_do_not_meet() -> None:
    def verdict(printed: str, found: Span) -> str:
        return compared("n", "p", "c", as_printed(printed), found).verdict

    assert verdict("2.0", exact(2.04)) == "agrees"
    assert verdict("2.0", Span(2.06, 2.04, 2.08)) == "agrees within rounding"
    assert verdict("2.0", Span(2.08, 2.06, 2.10)) == "disagrees"
    assert verdict("0.3", exact(0.1 + 0.2 + 0.05)) == "agrees"  # the bound itself, whatever binary fractions make of it


def test_two_checks_may_not_share_a_name() -> None:
    section = prose.speed(edgevit_tables())
    with pytest.raises(ValueError, match="share a name"):
        reproduction("x", "x", "x", [section, section])


# ---------------------------------------------------------------- EdgeViT


def test_every_known_disagreement_is_found_and_no_other() -> None:
    assert {check.name for check in full("edgevit").disagreements} == KNOWN | FOUND


def test_known_agreements_agree() -> None:
    checks = by_name(full("edgevit"))
    for name in (
        "table1.params.EdgeViT-XXS",
        "table1.blocks.EdgeViT-XXS",
        "table2.flops.EdgeViT-S",
        "table2.params.LeViT-384",
        "table2.front.EdgeViT-XXS",
        "table3.front.EdgeViT-S",
        "prose.latency_exception",
        "prose.speed.EdgeViT-XXS",
        "prose.speed.EdgeViT-S",
        "table5.s_minus_xs.retinanet.built",
        "table6.flops.ResNet18",
        "table7.front.energy",
        "table8.front.latency",
        "table2.table3.top1",
        "appendix.attention",
        "text.learning_rate",
    ):
        assert checks[name].verdict == "agrees", name
    for name in ("table3.efficiency.MobileNet-v2", "table3.efficiency.MobileNet-v3 0.75", "table2.params.Twins-SVT-Tiny"):
        assert checks[name].verdict == "agrees within rounding", name  # only naively wrong
    assert all(check.verdict == "agrees" for name, check in checks.items() if name.startswith(("table7.eff", "table8.eff")))


def test_the_numbers_that_disagree_are_the_ones_worked_out_by_hand() -> None:
    checks = by_name(full("edgevit"))
    levit = checks["table3.efficiency.LeViT-384"]
    assert (levit.low, levit.high) == pytest.approx((0.1745, 0.1748), abs=5e-5)
    assert checks["prose.speed.EdgeViT-XS"].recomputed.startswith("2.77")
    assert checks["table1.params.EdgeViT-S"].recomputed == "13.11"
    assert checks["table5.retinanet.params.EdgeViT-XXS"].recomputed.startswith("13.39")
    assert checks["table1.printed_depths.params.EdgeViT-XS"].recomputed == "7.263"
    assert "0.64 (MobileViT-XS) to 1.03 (LeViT-384)" in checks["table3.closure"].recomputed
    assert checks["prose.energy_exception"].recomputed == "PVT-v2-B1"
    assert "3.410 M" in checks["table2.params.PVT-v2-B0"].note
    assert "MobileNet-v2" in checks["prose.figure1.xxs"].note


def test_what_cannot_be_told_is_said_so() -> None:
    checks = by_name(full("edgevit"))
    names = ("table2.order.EdgeViT-XXS.MobileNet-v2", "table2.order.EdgeViT-XS.EfficientNet-B0", "table7.front.latency", "table3.bold")
    assert all(checks[name].verdict == "not recoverable" and checks[name].note for name in names)
    assert "ResNet18" in checks["table7.front.latency"].recomputed


def test_pareto_sets_are_those_of_the_printed_means() -> None:
    rows = dict(fronts.fronts(edgevit_tables()).listings[0].rows)
    energy_front = "MobileNet-v3 0.75 (63, 73.3), EdgeViT-XXS (127.4, 74.4), EfficientNet-B0 (159, 77.1), EdgeViT-XS (234.6, 77.5), "
    assert rows["top-1 and energy, mJ (Table 3)"] == energy_front + "PVT-v2-B1 (309, 78.7), EdgeViT-S (386.7, 81)"
    assert "LeViT-384 (71.3, 79.5)" in rows["top-1 and latency, ms (Table 2)"]
    assert "EdgeViT-XXS" not in rows["top-1 and FLOPs, G (Table 2)"]
    assert rows["top-1 and params, M (Table 2)"].startswith("MobileViT-XXS (1.3, 69), MobileViT-XS (2.4, 74.7), EfficientNet-B0")


@pytest.mark.parametrize(
    ("section", "change", "name", "verdict"),
    [
        (energy.efficiency, ("table3", "LeViT-384", "efficiency_percent_per_mJ", "0.175"), "table3.efficiency.LeViT-384", "agrees"),
        (energy.efficiency, ("table3", "DeiT-Tiny", "energy_mean_mJ", "197.2"), "table3.efficiency.DeiT-Tiny", "disagrees"),
        (energy.dense_efficiency, ("table7", "PVTv2-B0", "AP_percent", "47.2"), "table7.efficiency.PVTv2-B0", "disagrees"),
        (prose.speed, ("table2", "MobileViT-XS", "cpu_latency_mean_ms", "146.1"), "prose.speed.EdgeViT-XS", "agrees"),
        (prose.sentences, ("table2", "MobileNet-v2", "top1_percent", "72.2"), "prose.mobilenet_gain", "agrees"),
        (prose.repeated, ("table3", "EdgeViT-S", "top1_percent", "81.1"), "table2.table3.top1.EdgeViT-S", "disagrees"),
        (prose.uncertainties, ("table2", "MobileNet-v2", "cpu_latency_mean_ms", "63.3"), "table2.order.EdgeViT-XXS.MobileNet-v2", "agrees"),
        (fronts.fronts, ("table3", "EdgeViT-XXS", "energy_mean_mJ", "227.4"), "table3.front.EdgeViT-XXS", "disagrees"),
        (fronts.fronts, ("table3", "LeViT-384", "energy_mean_mJ", "300.0"), "prose.energy_exception", "agrees"),
        (fronts.dense_fronts, ("table7", "ResNet18", "cpu_latency_mean_s", "0.60"), "table7.front.latency", "agrees"),
        (fronts.dense_fronts, ("table7", "ResNet18", "cpu_latency_mean_s", "0.40"), "table7.front.latency", "disagrees"),
    ],
)
def test_a_changed_cell_turns_its_verdict(section: Any, change: tuple[str, str, str, str], name: str, verdict: str) -> None:
    assert check_of(section(changed(*change)), name).verdict == verdict


def test_energy_that_is_power_times_latency_closes() -> None:
    tables = edgevit_tables()
    for row in tables["table3"]:
        row["energy_mean_mJ"] = f"{float(row['power_mean_W']) * float(row['cpu_latency_mean_ms']):.1f}"
    check = check_of(energy.closure(tables), "table3.closure")
    assert check.verdict == "agrees" and check.recomputed.endswith("0 of 17 rows are not 1")
    tables["table3"][3]["energy_mean_mJ"] = "99.9"
    assert check_of(energy.closure(tables), "table3.closure").verdict == "disagrees"


def test_a_changed_count_turns_its_verdict_and_a_network_that_is_missing_is_not_dropped() -> None:
    tables = edgevit_tables()
    counts = Given({"EdgeViT-S": (11_100_000, 1_900_000_000), "MobileNet-v2": (3_600_000, 200_000_000)})
    section = sizes.classifiers(tables, counts)
    assert check_of(section, "table1.params.EdgeViT-S").verdict == "agrees"
    assert check_of(section, "table2.flops.MobileNet-v2").verdict == "disagrees"
    missing = check_of(section, "table2.params.DeiT-Tiny")
    assert missing.verdict == "not recoverable" and "no count of DeiT-Tiny" in missing.note
    whole = edgevit.recomputed(tables, Given())
    assert {check.name for section in whole.sections for check in section.checks} >= {f"text.{x}" for x in ("norms", "kernel", "ffns")}


def test_progress_hears_of_every_network() -> None:
    events: list[Event] = []
    reproduce("e3p", events.append)
    assert [event.done for event in events] == [1, 2] and all(event.total == 2 and event.stage == "count" for event in events)


def test_notes_and_printed_words_are_not_put_into_the_papers_mouth() -> None:
    checks = by_name(full("edgevit"))
    assert not checks["table1.blocks.EdgeViT-XXS"].note and checks["table1.blocks.EdgeViT-XS"].note
    assert checks["appendix.positions"].printed == "not in the formula" and checks["text.propagation"].printed == "not mentioned"
    assert checks["text.augmentation"].verdict == "not recoverable"
    assert checks["prose.speed.EdgeViT-XS"].note.startswith("cut off, not rounded")
    assert "not proven" in by_name(full("e3p"))["e3p.names"].note


# ---------------------------------------------------------------- E3P-ViT


def test_the_energies_that_sam_implies() -> None:
    checks = by_name(full("e3p"))
    imagenet = checks["e3p.energy.rtx_imagenet"]
    assert imagenet.recomputed == "425 [408, 442]" and imagenet.verdict == "agrees"
    assert checks["e3p.energy.rtx_cifar"].recomputed.startswith("accuracy 0.9800")
    assert checks["e3p.energy.tx2_cifar"].recomputed.startswith("accuracy 0.9751")
    rows = {row[0]: row[1:] for row in e3p.energies().listings[0].rows}
    rtx, tx2 = (as_printed(score) for score in (e3p.RTX_CIFAR, e3p.TX2_CIFAR))
    assert [round(e3p.energy_of(rtx, acc).value) for acc in (0.97, 0.975, 0.98, 0.985, 0.99)] == [314, 364, 424, 496, 581]
    assert [round(e3p.energy_of(tx2, acc).value) for acc in (0.97, 0.975, 0.98)] == [959, 1146, 1376]
    assert rows["98.0%"][0].startswith("424 [")
    least, most = e3p.baseline_energies()
    assert (round(least.value), round(most.value), round(most.value * 0.47)) == (673, 2448, 1151)


def test_energy_and_accuracy_are_inverse() -> None:
    score = as_printed("1.72")
    assert e3p.accuracy_of(exact(1.72), e3p.energy_of(exact(1.72), 0.975)).value == pytest.approx(0.975)
    band = e3p.energy_of(score, 0.98)
    assert band.low < band.value < band.high  # a larger SAM is a smaller energy


def test_one_convention_is_left() -> None:
    section = e3p.conventions()
    assert section.checks[0].verdict == "agrees" and section.checks[0].recomputed == "J per 1000 images = mJ per image"
    verdicts = {row[0]: row[3] for row in section.listings[0].rows}
    assert verdicts["J per image"] == verdicts["Wh per image = kWh per 1000 images"] == "SAM is negative there"
    rows = {row[0]: row[2] for row in section.listings[0].rows}
    assert rows["mJ per image, natural logarithm"] == "13.84" and rows["mJ per image, accuracy in percent"].startswith("10^")


def test_the_26_percent_example_is_of_published_figures() -> None:
    checks = by_name(full("e3p"))
    assert checks["e3p.example.params.published"].recomputed == "16.51" and checks["e3p.example.MACs.published"].recomputed == "25.71"
    assert checks["e3p.example.MACs.counted"].verdict == checks["e3p.example.params.counted"].verdict == "disagrees"
    assert checks["e3p.example.slower"].verdict == "not recoverable"
    assert {check.name for check in full("e3p").disagreements} == {"e3p.example.MACs.counted", "e3p.example.params.counted"}


def test_screening_keeps_the_thirteen() -> None:
    checks = by_name(full("e3p"))
    assert (checks["e3p.candidates"].recomputed, checks["e3p.survivors"].recomputed) == ("25", "13")
    kept = checks["e3p.names"].recomputed.split(", ")
    assert len(kept) == 13 and {"levit_conv_192", "tiny_vit_11m_distilled", "efficientvit_b1", "vit_small"} <= set(kept)
    scores = next(section for section in full("e3p").sections if section.title == "Stage 1: NetScore").listings[0]
    table = {row[0]: row for row in scores.rows}
    assert table["efficientvit_b1"][5] == "69.2" and table["levit_conv_192"][5] == "67.3" and len(table) == 13


def test_sensitivity_to_the_exponent_and_the_unit() -> None:
    section = next(section for section in full("e3p").sections if "17 models" in section.title)
    taus = {(row[0], row[1]): row[2] for row in section.listings[0].rows}
    assert [a for a, unit in taus if unit == "mJ per image"] == ["1", "3", "5", "7"]
    assert taus["5", "mJ per image"] == "1.000" and float(taus["1", "mJ per image"]) < 0.2 < float(taus["3", "mJ per image"])
    literal = {row[0]: row for row in section.listings[1].rows}
    assert list(literal) == ["mJ per image", "J per image", "Wh per image", "kWh per image"]
    assert all(float(literal[unit][2]) < 0.0 and float(literal[unit][3]) < 0.0 for unit in ("J per image", "Wh per image", "kWh per image"))
    moves = {row[0]: row[1] for row in section.listings[2].rows}
    assert moves == {"accuracy up by 1 % of itself": "+5.1 %", "energy doubled": "-10.3 %"}


# ---------------------------------------------------------------- text, JSON, tables beside


@pytest.mark.parametrize("name", ["edgevit", "e3p"])
def test_text_fits_and_shows_every_disagreement(name: str) -> None:
    found = full(name)
    shown = text.reproduction(found, 140)
    assert max(map(len, shown.splitlines())) <= 140
    end = " ".join(shown.partition("Disagreements:")[2].split())
    for check in found.disagreements:
        assert " ".join(f"{check.claim}: printed {check.printed}, recomputed {check.recomputed}".split()) in end
    assert shown.count("DISAGREES") == len(found.disagreements) == found.counts["disagrees"]
    assert f"Disagreements: {len(found.disagreements)}" in shown
    assert all(f"## {section.title}" in text.markdown(found).replace("\\", "") for section in found.sections if section.checks)


@pytest.mark.parametrize("name", ["edgevit", "e3p"])
def test_a_reproduction_survives_json(name: str) -> None:
    plain = json.loads(json.dumps(encode(full(name)), allow_nan=False))
    assert decode(Reproduction, plain) == full(name)


def test_an_unknown_paper_or_table_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="edgevit"):
        reproduce("edgevitt")
    with pytest.raises(UnknownNameError, match="edgevit_table2"):
        published_table("edgevit_table22")


def test_published_tables_keep_their_digits() -> None:
    rows = published_table("edgevit_table7")
    assert rows[0]["energy_mean_J"] == "3.50" and len(published_table("edgevit_table2")) == 18
    rows[0]["energy_mean_J"] = "9"
    assert published_table("edgevit_table7")[0]["energy_mean_J"] == "3.50"


def test_figures_beside_a_printed_column() -> None:
    here = {"mobilenetv2_100": 16.65, "edgevit_xxs": 25.0, "EdgeViT-S": 63.0, "somebody_else": 3.0, "levit_384.fb_dist_in1k": 60.0}
    found = beside(here)
    rows = {row.model: row for row in found.rows}
    assert rows["MobileNet-v2"].ratio == pytest.approx(0.5) and rows["MobileNet-v3 0.75"].here is None
    assert len(found.rows) == 18 and found.n == 4 and found.unmatched == ("somebody_else",)
    from scipy import stats

    pairs = [(row.here, row.paper) for row in found.rows if row.here is not None]
    assert found.spearman == pytest.approx(stats.spearmanr(pairs).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(*zip(*pairs, strict=True)).statistic)
    assert "somebody_else" in text.beside(found) and f"order of {found.n} models" in text.beside(found)


def test_ties_and_few_models_in_rank_correlations() -> None:
    from scipy import stats

    few = beside({"edgevit_xxs": 1.0, "edgevit_s": 2.0})
    assert (few.n, few.spearman, few.kendall) == (2, None, None)
    same = beside({"edgevit_xxs": 1.0, "edgevit_s": 1.0, "deit_tiny": 1.0})
    assert (same.spearman, same.kendall) == (None, None)
    tied = beside({"edgevit_xxs": 1.0, "edgevit_s": 2.0, "deit_tiny": 1.0, "levit_384": 3.0})
    pairs = [(row.here, row.paper) for row in tied.rows if row.here is not None]
    assert tied.spearman == pytest.approx(stats.spearmanr(pairs).statistic)


def test_dense_columns_take_backbones_at_their_size() -> None:
    here = {"edgevit_xxs_coco": 0.5, "ResNet18": 0.6, "edgevit_s": 0.05, "edgevit_xs_ade20k": 0.1}
    found = beside(here, "edgevit_table7", "cpu_latency_mean_s")
    assert {row.model: row.here for row in found.rows if row.here} == {"EdgeViT-XXS": 0.5, "ResNet18": 0.6}
    assert found.unmatched == ("edgevit_s", "edgevit_xs_ade20k")  # 224 px or 512 px do not stand beside 800 px


def test_beside_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(RankError, match="positive"):
        beside({"edgevit_xxs": math.nan})
    with pytest.raises(RankError, match="one model"):
        beside({"edgevit_xxs": 1.0, "EdgeViT-XXS": 2.0})
    with pytest.raises(UnknownNameError, match="cpu_latency_mean_ms"):
        beside({}, column="cpu_latency_ms")
