"""Rankings and measurements as text: figures with unit and interval, labels, narrow terminals, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from edgejoule.caveats import caveat
from edgejoule.rank.agreement import sensitivity
from edgejoule.rank.groups import entries_from_measurements
from edgejoule.rank.ranking import rank, rank_groups
from edgejoule.rank.table import entries_from_csv
from edgejoule.records import Failure, Interval, Ranking
from edgejoule.report import format as f
from edgejoule.report import table as t
from edgejoule.report import text
from tests import samples
from tests.report_sample import PLAIN, measurement, sample_failures, sample_measurements, sample_screened

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    return rank_groups(entries_from_measurements(sample_measurements(), sample_screened(), PLAIN), title="sample")[0]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("interval", "unit", "factor", "grade", "expected"),
    [
        (Interval(0.0482, 0.0479, 0.0486, 5), "ms", 1e3, "C", "48.2 ms [47.9, 48.6]"),
        (Interval(0.5151, 0.506, 0.524, 5), "mJ", 1e3, "B", "515 mJ [506, 524]"),
        (Interval(0.7606, 0.7587, 0.7627, 5), "", 1.0, "", "0.761 [0.759, 0.763]"),
        (Interval(0.4223, None, None, 1), "mJ", 1e3, "D", "≈422 mJ"),
        (Interval(2.5, 2.0, None, 3), "", 1.0, "", "2.50 [2.00, …]"),
        (Interval(0.0, 0.0, 0.0, 3), "W", 1.0, "", "0 W [0, 0]"),
        (Interval(0.0228, -0.0003, 0.0459, 3), "ms", 1e3, "C", "23 ms [0, 46]"),
        (None, "ms", 1.0, "", "–"),
    ],
)
def test_digits_follow_the_interval(interval: Interval | None, unit: str, factor: float, grade: str, expected: str) -> None:
    assert f.measure(interval, unit, factor, grade) == expected


def test_units_follow_the_size() -> None:
    assert f.scaled(0.0482, f.TIMES) == "48.2 ms" and f.scaled(3.2e-5, f.TIMES) == "32.0 µs" and f.scaled(2.0, f.TIMES) == "2.00 s"
    assert f.scaled(43_900_000, f.SIZES) == "43.9 MB" and f.scaled(0.0, f.SIZES) == "0 B" and f.scaled(None, f.SIZES) == "–"
    assert f.scaled(0.4, f.ENERGIES) == "400 mJ" and f.scaled(0.25, f.POWERS) == "250 mW"
    assert (f.saved(62.3), f.saved(-8.0), f.saved(0.2), f.saved(None)) == ("62 % less", "8 % more", "same", "–")
    assert f.saving(-0.3) == "0 %" and f.top1(79.86, "published") == "79.86 % published" and f.top1(80.0, "table") == "80.00 %"
    assert f.top1(97.8, "measured", Interval(97.8, 97.1, 98.3, 5), 5) == "97.8 % [97.1, 98.3] measured, 5 seeds"
    assert f.top1(90.0, "measured", Interval(90.0, 80.0, 95.0, 40)) == "90.0 % [80.0, 95.0] measured" and f.top1(None, "measured") == "–"
    assert f.points(Interval(-0.0031, -0.006, 0.001, 9)) == "-0.3 points [-0.6, 0.1]"
    assert f.points(Interval(0.5, None, None, 1)) == "+50.0 points" and f.points(None) == f.percent(None) == "–"
    assert (f.duration(48.04), f.duration(750.0), f.duration(11520.0), f.duration(119.0)) == ("48.0 s", "12.5 min", "3.20 h", "119 s")


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1e12), st.floats(0, 1e12))
def test_no_number_breaks_the_formatting(value: float, below: float, above: float) -> None:
    assert f.measure(Interval(value, value - below, value + above, 3), "mJ")
    assert f.scaled(value, f.TIMES)


# ---------------------------------------------------------------- tables


def test_a_ranking_says_all_that_must_stand_beside_an_energy(ranking: Ranking) -> None:
    shown = text.rankings([ranking])
    for part in (
        "SAM (a = 5, b = 5)",
        "grade C",
        "scope package",
        "rapl",
        "imagenet-1k on thinkpad",
        "422 mJ [415, 429]",
        "83.23 % published",
    ):
        assert part in shown
    assert "distilled over plain" in shown and "Kendall tau" in shown and "against vit_small_patch16_224" in shown
    assert shown.count("accuracy_published:") == 1 and "Evaluate the artifact" in shown


def test_random_weights_are_labelled(ranking: Ranking) -> None:
    random = replace(ranking, rows=tuple(replace(row, weights="random") for row in ranking.rows))
    assert "random" in t.terminal(text.ranking_table(random), 200) and "random" not in t.terminal(text.ranking_table(ranking), 200)


@pytest.mark.parametrize("width", [20, 34, 48, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(ranking: Ranking, width: int) -> None:
    shown = t.terminal(text.ranking_table(ranking), width)
    assert max(map(cell_len, shown.splitlines())) <= width
    assert "…" not in shown  # cut off, not left out
    compact = "".join(shown.split())
    assert "levit_conv_192@openvino" in compact and "138mJ" in compact


def test_narrow_terminals_lose_columns_aloud(ranking: Ranking) -> None:
    shown = t.terminal(text.ranking_table(ranking), 80)
    assert "not shown for want of width: intervals" in shown and "[415" not in shown
    assert "#: 1" in t.terminal(text.ranking_table(ranking), 34)


def test_colour_only_where_asked(ranking: Ranking) -> None:
    assert "\x1b[" not in text.rankings([ranking])
    assert "\x1b[" in t.terminal(text.ranking_table(ranking), 120, color=True)


def test_names_cannot_steer_the_terminal_or_markdown(ranking: Ranking) -> None:
    evil = "\x1b[31m[bold]x[/bold]\u202e|`*<b>\n# y"
    hostile = replace(ranking, rows=(replace(ranking.rows[0], model=evil), *ranking.rows[1:]))
    shown = text.rankings([hostile])
    assert "\x1b" not in shown and "\u202e" not in shown and "[bold]x[/bold]" in shown
    page = text.markdown([hostile])
    assert "\\|\\`\\*\\<b\\>" in page and "\n# y" not in page
    assert "\x1b" not in text.failures([Failure(evil, "b", "compile", evil)]) + text.caveat_lines([caveat("drift", evil)])


def test_markdown_is_one_table_per_ranking(ranking: Ranking) -> None:
    page = text.markdown([ranking, ranking])
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * 12 and len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert page.count("## sample") == 2 and "**tiny\\_vit\\_11m\\_dist @ openvino**" in page


def test_csv_is_read_again_as_the_same_ranking(ranking: Ranking, tmp_path: Path) -> None:
    path = tmp_path / "ranking.csv"
    path.write_text(text.csv_rows([ranking]), encoding="utf-8")
    again = rank(entries_from_csv(path))
    assert [(row.model, row.sam and row.sam.value) for row in again.rows] == [
        (row.model, row.sam and row.sam.value) for row in ranking.rows
    ]
    assert again.rows[0].energy_mj.low == ranking.rows[0].energy_mj.low and again.rows[0].accuracy == "published"
    first = next(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    assert first["grade"] == "C" and first["scope"] == "package"


def test_an_ascii_terminal_gets_question_marks_not_a_traceback(ranking: Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text.rankings([ranking]).encode("ascii")


def test_nothing_ranked_says_what_to_do() -> None:
    assert "edgejoule doctor" in text.rankings([]) and text.failures([]) == "" and text.markdown([]) == ""


def test_a_ranking_from_a_table_says_that_grade_and_scope_are_not_stated() -> None:
    shown = text.rankings([rank(entries_from_csv(DATA / "e3p_anchors.csv"))])
    assert "not stated" in shown and "latency" not in shown.splitlines()[2]


def test_the_other_tables() -> None:
    screened = text.screened_table(sample_screened())
    assert "5 of 7 candidates kept" in screened and "top-1 72.19 % is below 79 %" in screened
    spec = samples.spec()
    assert "79.86 %" in text.catalog_table([spec])
    assert "44.0 MB" in text.artifacts_table([samples.artifact()])
    one = text.measurement(replace(measurement(), p99_s=None, energy_j=None, net_energy_j=None, power_w=None))
    assert "p99 needs 1000 inferences" in one and "energy meter" in one and "none" in one
    assert "10.90 ms [10.83, 10.97]" in one
    found = text.doctor_table(
        {"meters": [{"name": "rapl", "ok": False, "remedy": "run as root"}, {"name": "estimate", "ok": True, "remedy": None}]}
    )
    assert "run as root" in found and "works" in found
    assert "StarReLU" in text.failures(sample_failures())


def test_the_sensitivity_table_tells_same_other_and_undefined() -> None:
    (entries,) = entries_from_measurements(sample_measurements()).values()
    shown = text.sensitivity_table(sensitivity(entries))
    assert "the same" in shown and "undefined: 10 of 10" in shown and "b only scales SAM" in shown and "The order depends" in shown


def test_an_accuracy_bears_the_name_of_its_data_set() -> None:
    from edgejoule.catalog import pool
    from edgejoule.report.format import accuracy_name

    assert [accuracy_name(pool(name)[0].dataset) for name in ("edgevit_coco", "edgevit_ade20k", "edgevit")] == ["AP", "mIoU", "top-1"]
    assert "38.70 % AP" in text.catalog_table(pool("edgevit_coco")) and "AP" not in text.catalog_table(pool("edgevit"))
