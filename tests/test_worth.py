"""Is a recipe worth it? Verdicts on hand-made rankings, their words, and what no added row or other order may change."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from edgejoule.plain import decode, encode
from edgejoule.rank.groups import entries_from_measurements
from edgejoule.rank.ranking import rank, rank_groups
from edgejoule.rank.table import Entry, entries_from_csv
from edgejoule.rank.worth import difference, worth
from edgejoule.records import Accuracy, Interval, Measurement, Ranking, RankRow, Worth
from edgejoule.report import text
from edgejoule.report import worth as shown
from edgejoule.report.html import render
from edgejoule.report.report import Report
from edgejoule.report.sections import ranking_table
from edgejoule.report.table import markdown, terminal
from tests.report_sample import about, measurement


def exact(value: float) -> Interval:
    return Interval(value, None, None, 1)


def entry(name: str, top1: float | None, energy: float, recipe: str = "", wide: float = 0.01, sure: float = 0.2, **more: object) -> Entry:
    """A measured entry: energy known to a relative ``wide``, accuracy to ``sure`` points."""
    backend = str(more.pop("backend", "ort"))
    label = f"{name} | {recipe} @ {backend}" if recipe else f"{name} @ {backend}"
    made = Entry(
        label,
        top1,
        about(energy, wide),
        latency_ms=about(energy / 10.0, wide),
        accuracy="measured",
        top1=None if top1 is None else Interval(top1, top1 - sure, top1 + sure, 1000),
        name=name,
        recipe=recipe,
        backend=backend,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def verdict(*entries: Entry, grade: str = "B") -> Worth:
    """Of the one entry with a recipe."""
    (found,) = worth(entries, grade).values()
    return found


def said(*entries: Entry, grade: str = "B") -> str:
    (row,) = [row for row in rank(entries, metric="energy", grade=grade).rows if row.recipe]
    return shown.words(row)


PRUNED = entry("deit", 80.0, 100.0, "prune_heads(ratio=0.5)")


# ---------------------------------------------------------------- verdicts and their words


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ([entry("levit", 81.0, 88.0)], "no: levit has +1.0 points for -12 % energy"),
        ([entry("levit", 81.0, 88.0), entry("far", 99.0, 10.0)], "no: levit has +1.0 points for -12 % energy"),
        ([entry("levit", 81.0, 88.0, backend="ov")], "no: levit @ ov has +1.0 points for -12 % energy"),
        ([entry("deit", 80.0, 145.0)], "yes: -31 % energy at the accuracy of deit, no plain row costs as little"),
        ([entry("deit", 81.0, 145.0)], "yes: -31 % energy for -1.0 points against deit, no plain row costs as little"),
        ([entry("levit", 78.8, 100.0)], "yes: +1.2 points at the energy of levit"),
        ([entry("levit", 78.8, 90.0)], "yes: +1.2 points for +11 % energy against levit"),
        ([entry("deit", 78.8, 110.0), entry("cheap", 50.0, 20.0)], "yes: +1.2 points and -9 % energy against deit"),
        (
            [entry("levit", 79.9, 88.0)],
            "not shown: levit may do as well, it has -0.1 points for -12 % energy; more images would decide",
        ),
        (
            [entry("levit", 81.0, 100.2)],
            "not shown: levit may do as well, it has +1.0 points for +0.2 % energy; more repeats would decide",
        ),
        (
            [entry("deit", 80.0, 100.0)],
            "not shown: deit may do as well, it has the same accuracy for the same energy; more images or more repeats would decide",
        ),
        ([], "unknown: no plain network in this ranking"),
        ([entry("levit", None, 88.0)], "unknown: levit has no accuracy"),
        ([entry("levit", None, 200.0)], "unknown: levit has no accuracy"),
        ([entry("levit", 81.0, 88.0, accuracy="published")], "unknown: levit has no measured accuracy"),
    ],
)
def test_a_recipe_is_judged_against_the_plain_row_that_speaks_most_against_it(plain: list[Entry], expected: str) -> None:
    assert said(PRUNED, *plain) == expected


def test_an_accuracy_that_is_not_there_or_not_its_own_is_no_verdict() -> None:
    plain = entry("deit", 80.0, 145.0)
    assert said(replace(PRUNED, top1_pct=None, top1=None), plain) == "unknown: no accuracy"
    published = [replace(one, accuracy="published", top1=None) for one in (PRUNED, plain)]
    assert said(*published).startswith("unknown: no accuracy of its own, the published one is the network's before")
    fused = replace(published[0], recipe="fuse")  # computes the same function: the published accuracy stays its own
    assert said(fused, published[1]).startswith("yes: -31 % energy at the accuracy of deit")


def test_a_row_that_could_not_decide_leaves_the_verdict_to_the_others() -> None:
    silent, mute = entry("mute", None, 500.0), entry("deit", 80.0, 145.0)
    assert verdict(PRUNED, silent, mute).verdict == "yes" and verdict(PRUNED, silent, mute).beside == "deit @ ort"
    assert verdict(PRUNED, replace(silent, energy_mj=about(50.0)), mute).verdict == "unknown"


def test_the_nearest_is_measured_in_shares_of_the_rankings_ranges() -> None:
    """Ranges: 0.9 points, a factor of 20. Then 0.9 points are farther than a factor of 2.7."""
    points, factor, far = entry("points", 79.1, 100.0), entry("factor", 80.0, 270.0), entry("far", 80.0, 2000.0)
    assert verdict(PRUNED, points, factor, far).beside == "factor @ ort"
    twin = entry("twin", 80.0, 270.0)
    assert verdict(PRUNED, twin, points, factor).beside == "factor @ ort"  # equally near: by label
    published = entry("near", 80.0, 110.0, accuracy="published")  # cannot be set beside it
    assert verdict(PRUNED, published, factor).beside == "factor @ ort"


def test_figures_that_are_stated_and_equal_are_no_reason_to_change_a_network() -> None:
    mine, same = (replace(one, energy_mj=exact(100.0), top1=None, accuracy="table") for one in (PRUNED, entry("levit", 80.0, 100.0)))
    assert said(mine, same, grade="") == "no: levit has the same accuracy for the same energy"


def test_few_images_or_repeats_show_nothing_and_more_of_them_do() -> None:
    for sure, wide, expected in ((1.0, 0.01, "not shown"), (0.2, 0.2, "not shown"), (0.2, 0.01, "no")):
        plain = entry("levit", 80.9, 88.0, sure=sure, wide=wide)
        assert verdict(replace(PRUNED, top1=Interval(80.0, 80.0 - sure, 80.0 + sure, 9)), plain).verdict == expected
    once = replace(entry("levit", 81.0, 88.0), energy_mj=exact(88.0))  # one repeat has no interval
    assert (verdict(PRUNED, once).verdict, verdict(PRUNED, once).missing) == ("not shown", "more repeats")
    unbounded = replace(entry("levit", 81.0, 88.0), top1=None)
    assert verdict(PRUNED, unbounded).missing == "an interval of the accuracy"
    trained = replace(entry("levit", 80.0, 88.0), seeds=5)
    assert verdict(PRUNED, trained).missing == "more seeds"
    stated = [replace(one, energy_mj=exact(one.energy_mj.value), top1=None, accuracy="table") for one in (PRUNED, once)]
    assert verdict(*stated, grade="").verdict == "no"  # a table's own figures are taken as they stand


def test_estimated_energies_give_way_to_measured_latency() -> None:
    plain = entry("levit", 81.0, 1.0, latency_ms=about(20.0))
    estimates = [replace(one, energy_mj=exact(one.energy_mj.value)) for one in (PRUNED, plain)]
    found = verdict(*estimates, grade="D")
    assert (found.verdict, found.cost) == ("yes", "latency") and found.cost_ratio is not None
    assert found.cost_ratio.value == pytest.approx(0.5) and "-50 % latency" in said(*estimates, grade="D")
    assert said(*[replace(one, latency_ms=None) for one in estimates], grade="D") == "unknown: no latency"
    assert "latency, because the energies are estimates" in shown.notes(rank(estimates, metric="energy", grade="D").rows)[0]


def test_its_own_plain_network_is_a_row_like_any_other_and_its_absence_is_said() -> None:
    own = [entry("deit", 80.0, 300.0, backend="ov"), entry("deit", 81.0, 145.0)]
    assert verdict(PRUNED, *own).own == "deit @ ort" and verdict(PRUNED, *own).plain_models == 1
    assert verdict(PRUNED, own[0]).own == "deit @ ov" and verdict(PRUNED, entry("levit", 81.0, 88.0)).own == ""
    here, gone = (rank([PRUNED, one], metric="energy", grade="B").rows for one in (own[0], entry("levit", 81.0, 88.0)))
    assert len(shown.notes(here)) == 1 and "the 1 plain model of this ranking" in shown.notes(here)[0]
    assert shown.notes(gone)[1] == "not in it without the recipe: deit | prune_heads(ratio=0.5) @ ort"
    assert shown.notes([row for row in here if not row.recipe]) == ()
    assert "there is no plain model" in shown.notes(rank([PRUNED], metric="energy").rows)[0]


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """Newcombe 1998, table II, method 10: 56/70 and 48/80 give 0.2000 with 0.0524 to 0.3339; 9/10 and 3/10 give 0.1705 to 0.8090."""

    def wilson(k: int, n: int, z: float = 1.959964) -> Interval:
        p, half = k / n, z * math.sqrt(k * (n - k) / n + z * z / 4.0) / (n + z * z)
        middle = (p + z * z / (2 * n)) / (1.0 + z * z / n)
        return Interval(p, middle - half, middle + half, n)

    for one, other, low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090)):
        found = difference(wilson(*one), wilson(*other))
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_figures_carry_the_interval_of_the_difference() -> None:
    found = verdict(PRUNED, entry("levit", 79.0, 90.0))
    assert found.points is not None and found.cost_ratio is not None and found.cost_ratio.low is not None
    assert found.points.low == pytest.approx(1.0 - math.hypot(0.2, 0.2)) and found.points.high == pytest.approx(1.0 + math.hypot(0.2, 0.2))
    assert found.cost_ratio.low < found.cost_ratio.value == pytest.approx(100.0 / 90.0)
    assert math.log(found.cost_ratio.value / found.cost_ratio.low) == pytest.approx(math.hypot(math.log(0.99), math.log(1.01)))


# ---------------------------------------------------------------- properties


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    """Plain ones and at least one with a recipe; some figures missing, some without bounds."""
    made = []
    for i in range(draw(st.integers(1, 7))):
        top1 = draw(st.none() | st.integers(1, 20).map(lambda n: 5.0 * n))
        energy = float(draw(st.integers(1, 20)))
        recipe = "qat(bits=8)" if i == 0 or draw(st.booleans()) else ""
        one = entry(f"m{i % 4}", top1, energy, recipe, draw(st.sampled_from([0.0, 0.05, 1.5])), draw(st.sampled_from([0.0, 4.0])))
        one = replace(one, model=f"{one.model} #{i}", accuracy=draw(st.sampled_from(["measured", "measured", "published"])))
        if draw(st.integers(0, 5)) == 0:
            one = replace(one, energy_mj=exact(energy), latency_ms=None)
        made.append(one)
    return made


GRADES = st.sampled_from(["", "B", "C", "D"])


@settings(deadline=None)
@given(entries(), GRADES, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(found: list[Entry], grade: str, random: object) -> None:
    mixed = list(found)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert worth(found, grade) == worth(mixed, grade)


@settings(deadline=None, max_examples=200)
@given(entries(), GRADES, st.data())
def test_one_more_plain_row_never_turns_no_into_anything_else(found: list[Entry], grade: str, data: st.DataObject) -> None:
    before = worth(found, grade)
    more = data.draw(entries().map(lambda some: replace(some[0], model="one more", recipe="")))
    after = worth([*found, more], grade)
    assert all(after[label].verdict == "no" for label, one in before.items() if one.verdict == "no")


@settings(deadline=None, max_examples=200)
@given(entries(), st.sampled_from(["", "B"]), st.data())
def test_a_plain_row_that_dominates_leaves_no_yes(found: list[Entry], grade: str, data: st.DataObject) -> None:
    mine = data.draw(st.sampled_from([one for one in found if one.recipe]))
    if mine.top1_pct is None or mine.accuracy != "measured" or worth(found, grade)[mine.model].verdict == "unknown":
        return
    better = entry("better", mine.top1_pct + 50.0, mine.energy_mj.value / 50.0, sure=0.1)
    before, after = worth(found, grade)[mine.model], worth([*found, better], grade)[mine.model]
    assert after.verdict == "no" if (mine.energy_mj.low or 0.0) > 0.0 and mine.top1 else after.verdict != "yes" or before.verdict == "no"


@given(entries(), GRADES)
def test_every_verdict_can_be_said_and_written(found: list[Entry], grade: str) -> None:
    for row in rank(found, metric="energy", grade=grade).rows:
        assert (row.worth is not None) == bool(row.recipe)
        if row.worth is not None:
            assert shown.words(row).startswith(row.worth.verdict) and "nan" not in shown.words(row) and "inf" not in shown.words(row)
            assert decode(RankRow, encode(row)) == row


def test_a_row_of_an_older_version_is_read() -> None:
    row = rank([entry("deit", 80.0, 100.0)], metric="energy").rows[0]
    old = {key: value for key, value in encode(row).items() if key not in ("recipe", "worth")}
    assert decode(RankRow, old) == row and row.worth is None


# ---------------------------------------------------------------- where it is shown


def measured(variant: str, model: str, top1: float, energy_j: float) -> Measurement:
    accuracy = Accuracy("digits", "test", top1, "measured", "evaluated", 2000, top1 - 0.004, top1 + 0.004)
    return replace(measurement(model), variant=variant, model=model, energy_j=about(energy_j), accuracy=accuracy)


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    pruned = "levit_digits | prune_heads(ratio=0.5)"
    found = [measured("levit_digits", "levit_digits", 0.97, 0.14), measured(pruned, "levit_digits", 0.95, 0.1)]
    return rank_groups(entries_from_measurements([*found, measured("tiny_digits", "tiny_digits", 0.98, 0.08)]))[0]


NO = "no: tiny_digits has +3.0 points for -20 % energy"


def test_text_markdown_csv_and_page_have_the_column(ranking: Ranking) -> None:
    assert NO in terminal(text.ranking_table(ranking), 300) and "the 2 plain models of this ranking" in text.rankings([ranking])
    for width in (34, 80, 100, 120, 200):  # a label with a recipe wraps, so that the verdict has room
        narrow = terminal(text.ranking_table(ranking), width)
        assert max(map(cell_len, narrow.splitlines())) <= width and ("worth it?" in narrow.splitlines()[3] or width != 120)
    assert f"| {NO} |".replace("_", "\\_") in markdown(text.ranking_table(ranking))
    written = {row["model"]: row["worth"] for row in csv.DictReader(io.StringIO(text.csv_rows([ranking])))}
    assert sorted(written.values()) == ["", "", NO]
    page = ranking_table(ranking)
    assert "Worth it?" in page and '<span class="lost">no</span>' in page and NO.removeprefix("no: ") in page
    whole = render(Report("digits", (ranking,)))
    assert '"own": "levit_digits @ onnxruntime"' in whole and "An arrow leads from a network" in whole


def test_a_ranking_without_a_recipe_has_no_such_column(ranking: Ranking) -> None:
    plain = replace(ranking, rows=tuple(row for row in ranking.rows if not row.recipe))
    pages = (text.rankings([plain]), text.markdown([plain]), ranking_table(plain), render(Report("digits", (plain,))))
    assert not [page for page in pages if "worth it?" in page.lower() or "An arrow leads" in page]


def test_a_csv_is_read_again_with_its_recipes(ranking: Ranking, tmp_path: Path) -> None:
    path = tmp_path / "ranking.csv"
    path.write_text(text.csv_rows([ranking]), encoding="utf-8")
    again = {row.model: row for row in rank(entries_from_csv(path)).rows}
    for row in ranking.rows:
        assert again[row.model].recipe == row.recipe and shown.words(again[row.model]) == shown.words(row)
        assert (again[row.model].worth and again[row.model].worth.own) == (row.worth and row.worth.own)  # type: ignore[union-attr]


def test_names_from_outside_stay_text(ranking: Ranking) -> None:
    evil = "<script>alert(1)</script>\x1b[31m"
    rows = tuple(replace(row, worth=replace(row.worth, beside=evil)) if row.worth else row for row in ranking.rows)
    page = ranking_table(replace(ranking, rows=rows))
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert "\x1b" not in text.rankings([replace(ranking, rows=rows)])
