"""Study files: the shipped ones parse; a malformed one is refused with its file, line and key."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejoule.errors import StudyError
from edgejoule.rank import ranking
from edgejoule.reproduce import published_table
from edgejoule.study_file import BESIDE, METRICS, MeasurePlan, load_study, parse_study, shipped

GOOD = (
    '[study]\nname = "s"\n\n[screen]\nmodels = ["vit_small"]\n\n[compile]\nbackends = ["onnxruntime"]\n\n[[measure]]\nprofile = "quick"\n'
)


def test_the_shipped_studies_parse_and_say_what_they_cost() -> None:
    assert {"quickstart", "e3p_vit"} <= set(shipped())
    for name in shipped():
        study = load_study(name)
        assert study.study.name == name
        assert study.study.cost and study.study.expect and study.study.about


def test_a_good_study_has_its_defaults() -> None:
    study = parse_study(GOOD, "s.toml")
    assert study.measure == (MeasurePlan(profile="quick"),)
    assert study.text == GOOD


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "s"', 'nmae = "s"', "s.toml, line 2, study.nmae: unknown key"),
        ('name = "s"', "name = 3", "line 2, study.name: expected str"),
        ('models = ["vit_small"]', "models = 3", "line 5, screen.models: expected a list"),
        ('models = ["vit_small"]', "", "give either pool or models"),
        ('backends = ["onnxruntime"]', 'backends = ["onnx runtime"]', "line 8, compile.backends: cannot read"),
        ('backends = ["onnxruntime"]', "backends = []", "line 8, compile.backends: name at least one"),
        ('profile = "quick"', 'profile = "quick"\nbatch = 4', "line 12, measure.batch: single_stream"),
        ('profile = "quick"', 'scenario = "fast"', "line 11, measure.scenario: no scenario is called 'fast'"),
        ("[[measure]]", "[measure]", "write \\[\\[measure\\]\\]"),
        ("[compile]", "[kompile]", "line 7, kompile: unknown table"),
        ('name = "s"', 'name = "s', "line 2"),
        ('name = "s"', 'name = "../s"', "it names a folder"),
        ('name = "s"', 'name = ".."', "it names a folder"),
        ('name = "s"', 'name = "s"\nseed = -1', "line 3, study.seed: expected"),
        ('models = ["vit_small"]', 'models = ["vit_small"]\nalpha = nan', "line 6, screen.alpha: expected a finite number, found nan"),
        ('models = ["vit_small"]', f'models = ["vit_small"]\nalpha = 1{"0" * 400}', "line 6, screen.alpha: expected a finite number"),
        ('models = ["vit_small"]', f'models = ["vit_small"]\nalpha = 1{"0" * 5000}', "s.toml: "),
        ('profile = "quick"', 'profile = "quick"\nthreads = 100000', "line 12, measure.threads: expected 0"),
        ('profile = "quick"', 'profile = "quick"\n[rank]\nmetric = "smm"', "line 13, rank.metric: 'smm' is not one of sam"),
        (
            'profile = "quick"',
            'profile = "quick"\n[rank]\nbeside = "edgevit_tabel2"',
            "line 13, rank.beside: 'edgevit_tabel2' is not one of edgevit_table2",
        ),
        ('profile = "quick"', 'profile = "quick"\n[optimize]\nrecipes = ["fuse("]', "line 13, optimize.recipes: cannot read"),
        ('profile = "quick"', 'profile = "quick"\n[rank]\na = -1', "line 13, rank.a: expected a of at least 0"),
    ],
)
def test_a_malformed_study_is_refused_with_line_and_key(old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(StudyError, match=said):
        parse_study(GOOD.replace(old, new, 1), "s.toml")


def test_the_metrics_that_a_study_may_name_are_those_that_rank() -> None:
    assert set(METRICS) == set(ranking.METRICS)


def test_the_tables_that_a_study_may_name_have_the_column_that_is_printed_beside() -> None:
    assert all(column in published_table(table)[0] and column.endswith(("_ms", "_s")) for table, column in BESIDE.items())


def test_the_second_measure_table_is_the_one_named() -> None:
    with pytest.raises(StudyError, match=r"line 14, measure\.batch"):
        parse_study(GOOD + "\n[[measure]]\nbatch = -1\n", "s.toml")


def test_a_study_that_is_not_there_offers_the_shipped_ones() -> None:
    with pytest.raises(StudyError, match="quickstart"):
        load_study("quikstart")


@given(st.text(max_size=200) | st.builds(lambda a, b: GOOD.replace(a, b), st.sampled_from(GOOD.split()), st.text(max_size=20)))
def test_any_text_is_a_study_or_a_study_error(text: str) -> None:
    with contextlib.suppress(StudyError):
        parse_study(text, "fuzz.toml")
