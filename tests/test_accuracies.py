"""Which accuracy a measurement carries, and what seeds and recipes contribute: records in, numbers checked by other means."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule.accuracies import accuracy_of, doubts_of, published_accuracy, spread, variance_components
from edgejoule.caveats import caveat
from edgejoule.datasets.classification import wilson
from edgejoule.errors import ArtifactError
from edgejoule.records import Accuracy, Epoch, Evaluation, Interval, Ranking, Scores, Trace, Training, floats
from edgejoule.report import text
from edgejoule.report.training import spreads, trainings
from edgejoule.results import measurements, outcome_of, rank_source
from edgejoule.store import Store
from edgejoule.study_file import RankPlan
from tests.samples import artifact, spec, trial

TESTED = 400  # images


def training(seed: int, top1: float, recipe: str = "digits", name: str = "levit_conv_192", **changes: Any) -> Training:
    made = Training(
        key=f"{name} {recipe} {seed}",
        spec=replace(spec(name), dataset="digits", published=None),
        initial="random",
        initial_id=f"fresh(seed={seed})",
        data="digits",
        origin="o1",
        recipe=recipe,
        distill="",
        seed=seed,
        weights_id=f"w {name} {recipe} {seed}",
        weights="weights/w.safetensors",
        steps=100,
        seconds=75.0,
        processes=1,
        mixed_precision="no",
        versions={"torch": "2"},
        validation=Accuracy("digits", "validation", top1 - 0.01, "measured", "epoch 9"),
        accuracy=Accuracy("digits", "test", top1, "measured", "float32 in torch", TESTED, top1 - 0.02, top1 + 0.015),
    )
    return replace(made, **changes)


def compiled(one: Training | None = None, name: str = "levit_conv_192") -> Any:
    made = artifact(name)
    if one is None:
        return made
    return replace(made, variant=replace(made.variant, spec=one.spec, weights="file", weights_id=one.weights_id))


def evaluated(hits: int, n: int = TESTED, **changes: Any) -> Evaluation:
    share = wilson(hits, n)
    scores = Scores(n, share, None, 0.1, 0.02, {"0": share})
    made = Evaluation(compiled().sha256, "digits", "test", "digits", "o1", scores, None, None, evaluated_at=1.0)
    return replace(made, **changes)


# ---------------------------------------------------------------- one artifact


def test_nothing_but_the_catalog_is_a_published_accuracy() -> None:
    found = accuracy_of(compiled(), [], [])
    assert found == published_accuracy(compiled().variant.spec) and found and found.kind == "published" and found.value == 0.7986
    unknown = replace(compiled(), variant=replace(compiled().variant, spec=replace(spec(), published=None)))
    assert accuracy_of(unknown, [training(0, 0.9)], []) is None and doubts_of(unknown, [training(0, 0.9)], []) == ()


def test_an_evaluation_stands_before_what_was_published() -> None:
    found = accuracy_of(compiled(), [], [evaluated(380)])
    assert found and (found.kind, found.dataset, found.split, found.value, found.n) == ("measured", "digits", "test", 0.95, TESTED)
    assert (found.low, found.high) == (wilson(380, TESTED).low, wilson(380, TESTED).high) and found.seeds is None


def test_of_several_evaluations_the_newest_on_most_images_counts_and_only_test_splits_do() -> None:
    many = evaluated(360, evaluated_at=5.0)
    few = evaluated(40, 40, evaluated_at=9.0)  # --limit 40, later
    seen = evaluated(400, split="train", evaluated_at=20.0)
    other = evaluated(300, artifact_sha256="another", evaluated_at=21.0)
    found = accuracy_of(compiled(), [], [evaluated(390), many, few, seen, other])
    assert found and found.value == 0.9
    elsewhere = evaluated(100, dataset="mnist", origin="o2", evaluated_at=30.0)
    moved = accuracy_of(compiled(), [], [many, elsewhere])
    assert moved and moved.dataset == "mnist"


def test_a_training_gives_its_own_accuracy_and_says_that_the_file_was_not_evaluated() -> None:
    own = training(0, 0.96)
    assert accuracy_of(compiled(own), [own], []) == own.accuracy
    (doubt,) = doubts_of(compiled(own), [own], [])
    assert doubt.code == "accuracy_of_training" and "96.00 %" in doubt.seen
    told = evaluated(380, caveats=(caveat("part_of_split", "9 of 10"),))
    assert [one.code for one in doubts_of(compiled(own), [own], [told])] == ["part_of_split"]


def test_several_seeds_are_their_mean_with_students_interval() -> None:
    from scipy import stats

    values = [0.97, 0.96, 0.975, 0.968, 0.981]
    runs = [training(seed, value) for seed, value in enumerate(values)]
    found = accuracy_of(compiled(runs[2]), runs, [])
    assert found and found.seeds == 5 and found.n == TESTED and found.kind == "measured" and "5 seeds" in found.source
    assert found.value == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)


def test_what_compiling_lost_is_not_forgotten() -> None:
    runs = [training(0, 0.96), training(1, 0.98)]
    plain = accuracy_of(compiled(runs[0]), runs, [])
    shifted = accuracy_of(compiled(runs[0]), runs, [evaluated(380)])  # 0.95 where its training had 0.96
    assert plain and shifted and plain.low and shifted.low
    assert shifted.value == pytest.approx(plain.value - 0.01) and shifted.low == pytest.approx(plain.low - 0.01)
    assert shifted.std == plain.std and "less what compiling lost" in shifted.source
    for unlike in (evaluated(38, 40), evaluated(380, origin="o2"), evaluated(380, split="train")):
        found = accuracy_of(compiled(runs[0]), runs, [unlike])
        assert found and found.value == plain.value


def test_accuracies_stay_between_none_and_all() -> None:
    found = accuracy_of(compiled(training(0, 1.0)), [training(0, 1.0), training(1, 0.98)], [])
    assert found and found.high == 1.0 and found.value == pytest.approx(0.99) and found.low is not None and found.low > 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "digits(lr=0.1)"},
        {"teacher_id": "another"},
        {"origin": "o2"},
        {"distill": "soft(teacher='x')"},
        {"mixed_precision": "bf16"},
        {"initial": "pretrained", "initial_id": "hub"},
        {"accuracy": None},
    ],
)
def test_trainings_that_differ_in_more_than_the_seed_are_not_counted(change: dict[str, Any]) -> None:
    own = training(0, 0.96)
    found = accuracy_of(compiled(own), [own, replace(training(1, 0.9), **change)], [])
    assert found == own.accuracy


def test_where_the_data_lie_is_no_difference() -> None:
    runs = [training(0, 0.96), replace(training(1, 0.9), data="imagefolder(path='/elsewhere')")]
    found = accuracy_of(compiled(runs[0]), runs, [])
    assert found and found.seeds == 2


def test_a_seed_counts_once_and_other_models_do_not() -> None:
    own = training(0, 0.96)
    again = replace(own, key="older", weights_id="older", accuracy=replace(own.accuracy, value=0.5))  # type: ignore[type-var]
    other = training(1, 0.5, name="vit_tiny")
    assert accuracy_of(compiled(own), [again, own, other], []) == own.accuracy
    both = [replace(training(seed, 0.9), initial="pretrained", initial_id="hub") for seed in (0, 1)]
    found = accuracy_of(compiled(both[0]), both, [])
    assert found and found.seeds == 2


# ---------------------------------------------------------------- seeds and recipes


def test_variance_components_of_a_textbook_layout_by_hand() -> None:
    groups = [[1.0, 3.0], [5.0, 7.0, 9.0], [2.0]]
    inside, between = variance_components(groups)
    # by hand: SSE = 2 + 8 + 0, N - a = 3; means 2, 7, 2, grand 4.5: SSA = 2*6.25 + 3*6.25 + 6.25 = 37.5; n0 = (6 - 14/6) / 2 = 11/6
    assert inside == pytest.approx(10 / 3) and between == pytest.approx((37.5 / 2 - 10 / 3) / (11 / 6))
    assert variance_components([[1.0], [2.0]]) == (None, None) and variance_components([[1.0, 2.0]]) == (0.5, None)
    assert variance_components([[0.0, 10.0], [1.0, 9.0]])[1] == 0.0  # equal means: less than chance would give


def test_variance_components_find_the_truth_of_a_simulation() -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(400):
        effects = random.normal(0.0, 2.0, 6)
        sizes = zip(effects, (2, 3, 5, 5, 3, 2), strict=True)
        found.append(variance_components([list(effect + random.normal(0.0, 1.0, size)) for effect, size in sizes]))
    inside, between = np.mean(np.array(found, dtype=float), axis=0)
    assert inside == pytest.approx(1.0, rel=0.05) and between == pytest.approx(4.0, rel=0.15)


def test_the_spread_is_a_table_of_recipes_by_seeds_for_each_model() -> None:
    runs = [training(seed, top1, recipe) for recipe, seed, top1 in (("a", 1, 0.91), ("a", 0, 0.9), ("b", 0, 0.8), ("b", 1, 0.82))]
    taught = training(0, 0.6, distill="soft(teacher='x')")
    runs += [training(0, 0.7, "a", "alone"), taught, training(2, 0.5, accuracy=None)]
    (found,) = spread(runs)
    assert (found.model, found.dataset) == ("levit_conv_192", "digits")
    assert {row.recipe: (row.seeds, row.values) for row in found.recipes} == {"a": ((0, 1), (0.9, 0.91)), "b": ((0, 1), (0.8, 0.82))}
    inside, between = variance_components([[0.9, 0.91], [0.8, 0.82]])
    assert inside and between and found.seed_std == pytest.approx(inside**0.5) and found.recipe_std == pytest.approx(between**0.5)
    shown = spreads([found])
    assert "between seeds 1.12, between recipes 6.67" in shown and "90.00 91.00" in shown
    assert spread(runs[:1]) == () and spreads([]) == "" and trainings([]) == ""


def test_trainings_read_well() -> None:
    run = training(3, 0.97)
    epochs = {run.key: tuple(Epoch(n, 10 * n, 1.0 / n, 1e-3, 5.0, 100, {"top1": 0.1 * n}) for n in range(1, 10))}
    shown = trainings([run, replace(training(4, 0.9), validation=None, accuracy=None, distill="soft(teacher='x')")], epochs)
    for part in ("2 trained", "97.0 % [95.0, 98.5]", "75.0 s", "soft(teacher='x')", "96.00 %", "–"):
        assert part in shown, part


# ---------------------------------------------------------------- through the store into rankings


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three artifacts of one data set: two seeds and an evaluation, an evaluation alone, and what the catalog says."""
    path = tmp_path / "r.sqlite"
    runs = [training(0, 0.96), training(1, 0.98)]
    other, printed = (on_digits(name) for name in ("vit_tiny", "printed"))
    with Store.open(path) as opened:
        run = opened.begin_run("s", "", "", "0")
        for n, made in enumerate((compiled(runs[0]), other, printed)):
            opened.add_artifact(made)
            for repeat in range(3):
                name = made.variant.spec.name
                found = trial(f"{name}{repeat}", name, repeat)
                opened.add_trial(run, replace(found, traces=(heated(found.traces[0], 1.0 + n),)))
        for one in runs:
            opened.add_training(run, one)
            opened.add_epoch(one.key, Epoch(1, 10, 0.5, 1e-3, 5.0, 100, {"top1": 0.9}))
        opened.add_evaluation(run, evaluated(380))
        opened.add_evaluation(run, evaluated(300, artifact_sha256=other.sha256))
    return path


def on_digits(name: str) -> Any:
    made = compiled(name=name)
    return replace(made, variant=replace(made.variant, spec=replace(spec(name), dataset="digits")))


def heated(trace: Trace, scale: float) -> Trace:
    """2 W at rest and 10 W in the window from 1 s to 3 s, read every 50 ms."""
    times = [0.05 * i for i in range(81)]
    return replace(trace, times_s=floats(times), values=floats([scale * (2.0 * t + 8.0 * min(max(t - 1.0, 0.0), 2.0)) for t in times]))


def bounds(interval: Interval | None) -> Any:
    return interval and (interval.value, interval.low, interval.high)


def ranked(store: Path) -> Ranking:
    (found,), _ = rank_source(store, RankPlan())
    return found


def test_measured_accuracy_is_carried_into_the_ranking_with_its_interval(store: Path) -> None:
    rows = {row.model.partition(" ")[0]: row for row in ranked(store).rows}
    seeds, alone, printed = rows["levit_conv_192"], rows["vit_tiny"], rows["printed"]
    assert (seeds.accuracy, seeds.seeds, seeds.top1_pct) == ("measured", 2, pytest.approx(96.0)) and seeds.top1 and seeds.top1.n == 2
    assert (alone.accuracy, alone.seeds, alone.top1_pct) == ("measured", None, 75.0) and alone.top1 and alone.top1.n == TESTED
    assert (printed.accuracy, printed.top1, printed.top1_pct) == ("published", None, 79.86)
    assert alone.sam and printed.sam and alone.sam.low and alone.sam.high and printed.sam.low and printed.sam.high
    wider = (alone.sam.high - alone.sam.low) / alone.sam.value
    assert wider > 5 * (printed.sam.high - printed.sam.low) / printed.sam.value  # the accuracy's uncertainty is in the metric's


def test_a_ranking_of_both_kinds_says_so_and_of_one_kind_does_not(store: Path) -> None:
    from edgejoule.rank.ranking import rank
    from edgejoule.rank.table import Entry

    mixed = {one.code: one for one in ranked(store).caveats}
    assert "accuracy_mixed" in mixed and mixed["accuracy_mixed"].severity == "warn" and "2 of 3 rows" in mixed["accuracy_mixed"].seen
    for kind in ("measured", "published"):
        entries = [Entry(name, 80.0, Interval(300.0, None, None, 1), accuracy=kind) for name in "ab"]
        assert "accuracy_mixed" not in {one.code for one in rank(entries).caveats}


def test_the_ranking_is_read_again_from_its_own_csv(store: Path, tmp_path: Path) -> None:
    before, path = ranked(store), tmp_path / "t.csv"
    path.write_text(text.csv_rows([before]), encoding="utf-8")
    (after,), _ = rank_source(path, RankPlan())
    assert [(row.model, row.seeds, row.accuracy) for row in after.rows] == [(row.model, row.seeds, row.accuracy) for row in before.rows]
    assert [bounds(row.top1) for row in after.rows] == [bounds(row.top1) for row in before.rows]
    assert [bounds(row.sam) for row in after.rows] == [bounds(row.sam) for row in before.rows]
    assert "top1_pct_low" in next(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_measurements_and_the_outcome_hold_it_all(store: Path) -> None:
    with Store.open(store) as opened:
        found = {one.model: one for one in measurements(opened)}
        outcome = outcome_of(opened, RankPlan(), store.with_name("page.html"), "")
    assert found["levit_conv_192"].accuracy and found["levit_conv_192"].accuracy.seeds == 2
    codes = {name: {doubt.code for doubt in one.caveats} for name, one in found.items()}
    assert "accuracy_published" in codes["printed"] and "accuracy_published" not in codes["vit_tiny"]
    assert len(outcome.trainings) == 2 and len(outcome.epochs[outcome.trainings[0].key]) == 1 and len(outcome.evaluations) == 2
    assert outcome.spreads[0].seed_std == pytest.approx(0.02 / 2**0.5)
    page = store.with_name("page.html").read_text()
    for part in ("measured, 2 seeds", "Training runs", "How much seeds and recipes matter", "What each file gets right", '"bounds": ['):
        assert part in page, part
    shown = text.rankings(outcome.rankings)
    assert "measured, 2 seeds" in shown and "75.0 % [70.5, 79.0] measured" in shown and "79.86 % published" in shown


# ---------------------------------------------------------------- the budget of accuracy


@pytest.mark.parametrize(
    ("drop", "notes", "lost"),
    [
        (Interval(0.05, 0.03, 0.07, 400), {}, True),
        (Interval(0.05, 0.005, 0.09, 400), {}, False),  # it may as well be half a point
        (Interval(0.05, 0.03, 0.07, 400), {"budget_pct": "4"}, False),
        (Interval(0.002, 0.001, 0.003, 40000), {"budget_pct": "0"}, True),
        (None, {}, False),
    ],
)
def test_what_loses_more_than_its_budget_is_condemned_where_the_images_prove_it(drop: Any, notes: Any, lost: bool) -> None:
    one = training(0, 0.95)
    made = replace(compiled(one), notes=notes)
    found = doubts_of(made, [one], [replace(evaluated(360), artifact_sha256=made.sha256, drop=drop)])
    assert ("accuracy_lost" in {doubt.code for doubt in found}) is lost


@pytest.mark.parametrize(("hits", "condemned"), [(300, True), (372, False)])
def test_a_drop_is_seen_beside_the_training_where_the_float_network_did_not_run(hits: int, condemned: bool) -> None:
    one = training(0, 0.95)  # at least 0.93
    found = doubts_of(compiled(one), [one], [replace(evaluated(hits), artifact_sha256=compiled(one).sha256, drop=None)])
    assert ("accuracy_lost" in {doubt.code for doubt in found}) is condemned


def test_a_later_evaluation_without_the_float_network_hides_no_drop() -> None:
    made = compiled()
    trained = replace(made, variant=replace(made.variant, weights="file"))
    beside = replace(evaluated(300), artifact_sha256=made.sha256, drop=Interval(0.2, 0.15, 0.25, TESTED))
    alone = replace(evaluated(300), artifact_sha256=made.sha256, drop=None, evaluated_at=beside.evaluated_at + 1)
    assert "accuracy_lost" in {doubt.code for doubt in doubts_of(trained, [], [beside, alone])}
    assert made.variant.weights == "random", "whose near ties have no budget"
    assert "accuracy_lost" not in {doubt.code for doubt in doubts_of(made, [], [beside, alone])}


@pytest.mark.parametrize("edited", ["much", "", "1,5", "nan", "-1", "inf"])
def test_a_budget_that_is_no_number_is_one_sentence(edited: str) -> None:
    random = replace(compiled(), notes={"budget_pct": edited})
    made = replace(random, variant=replace(random.variant, weights="file"))
    seen = replace(evaluated(300), artifact_sha256=made.sha256, drop=Interval(0.2, 0.15, 0.25, TESTED))
    with pytest.raises(ArtifactError, match="no number: compile again"):
        doubts_of(made, [], [seen])
    doubts_of(random, [], [seen])  # has no budget
