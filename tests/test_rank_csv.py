"""Tables from anywhere: what they may look like, and which cell an error names."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgejoule.errors import RankError
from edgejoule.rank.ranking import rank
from edgejoule.rank.table import entries_from_csv
from edgejoule.records import Interval

DATA = Path(__file__).parent / "data"
HEADER = "model,top1_pct,energy_mj\n"


def table(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_e3p_anchors_rank_as_published() -> None:
    found = rank(entries_from_csv(DATA / "e3p_anchors.csv"))
    assert found.rows[0].model == "TinyViT-11M_Distilled" and found.rows[0].sam is not None
    assert found.rows[0].sam.value == pytest.approx(0.76, abs=0.005)
    assert found.baseline == "ViT_S" and found.rows[0].saved_pct == pytest.approx(36.8, abs=0.1)
    assert {pair.plain for pair in found.pairs} == {"TinyViT-11M"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_delimiters_marks_line_ends_and_extra_columns(tmp_path: Path, delimiter: str, mark: str, newline: str) -> None:
    text = newline.join(["Model, energy_mj ,note,TOP1_PCT,latency_ms,latency_ms_low", "a b,100,x,80,5.5,5", "c,200,,81,,", ""])
    first, second = entries_from_csv(table(tmp_path, mark + text.replace(",", delimiter)))
    assert first.model == "a b" and first.energy_mj.value == 100.0 and first.latency_ms is not None and first.latency_ms.low == 5.0
    assert second.latency_ms is None and second.accuracy == "table"


def test_the_interval_of_an_accuracy_is_read_where_it_is_whole(tmp_path: Path) -> None:
    text = "model,top1_pct,energy_mj,top1_pct_low,top1_pct_high,seeds\na,80,100,79,82,5\nb,80,100,79,,\nc,80,100,79,82,\n"
    whole, half, plain = entries_from_csv(table(tmp_path, text))
    assert whole.top1 == Interval(80.0, 79.0, 82.0, 5) and whole.seeds == 5
    assert half.top1 is None and plain.top1 == Interval(80.0, 79.0, 82.0, 1) and plain.seeds is None


def test_a_netscore_is_computed_where_it_can_be(tmp_path: Path) -> None:
    text = "model,top1_pct,energy_mj,params_m,macs_g,netscore\na,80,100,5,1,\nb,80,100,5,1,61.5\nc,80,100,,1,\n"
    found = entries_from_csv(table(tmp_path, text), netscore=lambda top1, params, macs: top1 + params + macs)
    assert [one.netscore for one in found] == [86.0, 61.5, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (",,,\n", "delimiters only"),
        (HEADER, "no rows"),
        ("model,energy_mj\na,1\n", "line 1: the column top1_pct is missing, found 'model', 'energy_mj'"),
        ("name\na\n", "model, top1_pct, energy_mj"),
        ("model,top1_pct,energy_mj,energy_mj\na,80,1,2\n", "twice"),
        (HEADER + ",80,100\n", "line 2, column model: the value is empty"),
        (HEADER + "a,80,100\nb,,100\n", "line 3, column top1_pct: the value is empty"),
        (HEADER + "a,80\n", "column energy_mj: the value is empty"),
        (HEADER + "a,80,100,7\n", "line 2: 4 values where the header has 3"),
        (HEADER + "a,eighty,100\n", "column top1_pct: the value is 'eighty', expected a number"),
        ("model;top1_pct;energy_mj\na;81,4;100\n", "decimal point"),
        (HEADER + "a,80,nan\n", "expected a finite number"),
        (HEADER + "a,inf,100\n", "expected a finite number"),
        (HEADER + "a,80,0\n", "column energy_mj: the value is 0, expected a number above 0"),
        (HEADER + "a,80,-4\n", "above 0"),
        (HEADER + "a,0,100\n", "column top1_pct: the value is 0, expected percent"),
        (HEADER + "a,101,100\n", "expected percent"),
        (HEADER + "a,0.814,100\nb,0.79,100\n", "looks like fractions"),
        (HEADER + "a,80,100\nb,80,90\na,81,100\n", "line 4, column model: 'a' stands on line 2 already"),
        ("model,top1_pct,energy_mj,energy_mj_low\na,80,100,101\n", "column energy_mj_low"),
        ("model,top1_pct,energy_mj,energy_mj_high\na,80,100,99\n", "column energy_mj_high"),
        ("model,top1_pct,energy_mj,params_m\na,80,100,0\n", "column params_m"),
        ("model,top1_pct,energy_mj,top1_pct_low\na,80,100,81\n", "column top1_pct_low"),
        ("model,top1_pct,energy_mj,top1_pct_high\na,80,100,79\n", "column top1_pct_high"),
        ("model,top1_pct,energy_mj,top1_pct_high\na,80,100,101\n", "column top1_pct_high"),
        ("model,top1_pct,energy_mj,seeds\na,80,100,2.5\n", "column seeds"),
        ("model,top1_pct,energy_mj,top1_pct_low,top1_pct_low\na,80,100,79,79\n", "twice"),
        (HEADER + '"a,80,100\n', "expected a CSV table"),
        (b"\xff\xfem\x00o\x00", "not UTF-8"),
    ],
)
def test_the_cell_at_fault_is_named(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = table(tmp_path, text)
    with pytest.raises(RankError) as caught:
        entries_from_csv(path)
    assert expected in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.csv", tmp_path, "a\0b"):
        with pytest.raises(RankError, match=r"cannot read|not UTF-8"):
            entries_from_csv(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(str.encode),
        st.text('modeltp1_cgyj,;"\n0.5naif-\t ', max_size=200).map(lambda s: (HEADER + s).encode()),
    )
)
@example(b'model,top1_pct,energy_mj\n"a\nb",80,100\n')
@example("model,top1_pct,energy_mj\na\u2028b,80,100\n".encode())
def test_any_bytes_give_entries_or_a_rank_error(tmp_path: Path, text: bytes) -> None:
    try:
        found = entries_from_csv(table(tmp_path, text))
    except RankError:
        return
    assert found and all(one.energy_mj.value > 0 and one.model for one in found)


names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12).filter(lambda s: s == s.strip())
rows = st.lists(st.tuples(names, st.floats(1.5, 100.0), st.floats(1e-3, 1e9)), min_size=1, max_size=8, unique_by=lambda row: row[0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows, st.sampled_from([",", ";"]))
def test_what_is_written_is_read(tmp_path: Path, written: list[tuple[str, float, float]], delimiter: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([("model", "top1_pct", "energy_mj"), *written])
    found = entries_from_csv(table(tmp_path, out.getvalue()))
    assert [(one.model, one.top1_pct, one.energy_mj.value) for one in found] == written
