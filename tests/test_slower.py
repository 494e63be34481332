"""Where a recipe makes a network slower, the ranking says so with the ratio, on the terminal and on the page; no row loses its rank."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from edgejoule.caveats import UNRANKED
from edgejoule.measure.compare import LATENCY_FLOOR
from edgejoule.rank.groups import entries_from_measurements
from edgejoule.rank.ranking import SLOWER, rank, rank_groups
from edgejoule.rank.table import Entry, entries_from_csv
from edgejoule.records import Accuracy, Caveat, Interval, Measurement, Ranking
from edgejoule.report import text
from edgejoule.report.html import render
from edgejoule.report.report import Report
from edgejoule.results import measurements, rankings
from edgejoule.store import Store
from edgejoule.study_file import RankPlan
from tests.report_sample import about, measurement
from tests.samples import artifact, trial
from tests.test_results import sampled

CODE, MERGE = "slower_than_plain", "merge_tokens(r=8)"


def entry(recipe: str, latency_ms: Interval | None, backend: str = "ort", name: str = "deit", **more: object) -> Entry:
    label = f"{name} | {recipe} @ {backend}" if recipe else f"{name} @ {backend}"
    made = Entry(label, 80.0, about(100.0), latency_ms=latency_ms, accuracy="measured", name=name, recipe=recipe, backend=backend)
    return replace(made, **more)  # type: ignore[arg-type]


def doubts(*entries: Entry, device: str = "", workload: str = "") -> list[Caveat]:
    ranking = rank(entries, metric="latency", device=device, workload=workload)
    return [doubt for doubt in ranking.caveats if doubt.code == CODE]


PLAIN = entry("", about(10.0, 0.02))


# ---------------------------------------------------------------- when it is said


def test_it_says_by_how_much_where_and_what_to_do() -> None:
    (found,) = doubts(PLAIN, entry(MERGE, about(11.2, 0.02)), device="pi", workload="single_stream, batch 1")
    # d = ln 1.12, sqrt of the summed squares of the two sides' distances: 0.0283 below and above, so 1.089 to 1.152
    told = "deit | merge_tokens(r=8) @ ort takes 1.12 x the latency without the recipe (95 % interval 1.09 to 1.15)"
    assert found.seen == f"{told}, pi, single_stream, batch 1"
    assert found.severity == "warn" and "batch size" in found.advice and "leave the pass out" in found.advice


@pytest.mark.parametrize(
    ("latency_ms", "said"),
    [
        (about(8.0, 0.02), False),  # faster
        (about(10.0, 0.02), False),
        (about(10.3, 0.02), False),  # the intervals meet: 10.094 and 10.2
        (Interval(10.5, 10.2, 10.8, 5), False),  # at one point
        (Interval(10.5, 10.21, 10.8, 5), True),
        (Interval(10.5, 10.21, None, 5), True),  # nothing above matters
        (Interval(10.5, None, None, 1), False),  # one repeat shows nothing
        (None, False),
    ],
)
def test_it_is_said_only_where_the_interval_lies_above_the_plain_ones(latency_ms: Interval | None, said: bool) -> None:
    assert bool(doubts(PLAIN, entry(MERGE, latency_ms))) is said


def test_a_difference_that_a_machine_makes_from_day_to_day_is_none() -> None:
    assert SLOWER == LATENCY_FLOOR  # of the same figure elsewhere
    assert not doubts(entry("", about(10.0, 0.001)), entry(MERGE, about(10.09, 0.001)))
    assert doubts(entry("", about(10.0, 0.001)), entry(MERGE, about(10.11, 0.001)))


@pytest.mark.parametrize(
    "plain",
    [
        [],
        [entry("", about(5.0), backend="ov")],  # another runtime
        [entry("", about(5.0), name="levit")],  # another network
        [entry("fuse", about(5.0))],  # another recipe
        [entry("", Interval(5.0, None, None, 1))],
        [entry("", None)],
        [entry("", about(5.0)), entry("", about(11.0), model="deit @ ort #2")],  # of two, the slower one is in doubt
    ],
)
def test_only_the_same_network_on_the_same_backend_without_a_recipe_counts(plain: list[Entry]) -> None:
    slow = entry(MERGE, about(11.2))
    assert doubts(slow, PLAIN) and not doubts(slow, *plain)


def test_a_plain_network_is_never_in_doubt() -> None:
    assert not doubts(PLAIN, entry("", about(50.0), name="large"), entry(MERGE, about(5.0)))


@pytest.mark.parametrize("extreme", [Interval(1e-300, -1e-301, 2e-300, 2), Interval(0.0, 0.0, 0.0, 2)])
def test_extreme_latencies_stop_nobody(extreme: Interval) -> None:
    found = doubts(entry("", extreme), entry(MERGE, Interval(1e300, 9e299, 2e300, 2)))
    assert all("nan" not in doubt.seen and "95 %" not in doubt.seen for doubt in found)


# ---------------------------------------------------------------- from measurements


def variant(latency_ms: float, recipe: str = "", batch: int = 1, known: bool = True, spread: float = 0.01) -> Measurement:
    made = measurement("deit_tiny")
    return replace(
        made,
        variant=f"deit_tiny | {recipe}" if recipe else "deit_tiny",
        artifact_sha256=f"{recipe} {batch}",
        workload=replace(made.workload, batch=batch),
        latency_s=about(latency_ms / 1e3, spread),
        accuracy=Accuracy("imagenet-1k", "val", 0.72, "measured", "us") if known else None,
    )


def ranked(*found: Measurement) -> tuple[Ranking, ...]:
    return rank_groups(entries_from_measurements(found), metric="energy")


def test_a_batch_is_compared_with_the_same_batch() -> None:
    small, large = ranked(variant(10.0), variant(11.2, MERGE), variant(600.0, batch=64), variant(500.0, MERGE, 64))
    assert [doubt.seen.partition(" takes ")[2][:6] for doubt in small.caveats if doubt.code == CODE] == ["1.12 x"]
    assert CODE not in {doubt.code for doubt in large.caveats}


def test_a_network_that_nobody_evaluated_is_compared_with_the_plain_one_of_another_data_set() -> None:
    """A recipe's network has no published accuracy, so until it is evaluated it is ranked apart from its own plain row."""
    known, unknown = ranked(variant(10.0), variant(11.2, MERGE, known=False))
    assert (known.dataset, unknown.dataset) == ("imagenet-1k", "")
    assert CODE in {doubt.code for doubt in unknown.caveats} and CODE not in {doubt.code for doubt in known.caveats}
    (alone,) = ranked(variant(11.2, MERGE, known=False))
    assert CODE not in {doubt.code for doubt in alone.caveats}
    for other in ({"device": "pi"}, {"fingerprint": "f2"}, {"protocol": "quick"}):
        apart = ranked(replace(variant(10.0), **other), variant(11.2, MERGE, known=False))  # type: ignore[arg-type]
        assert all(doubt.code != CODE for ranking in apart for doubt in ranking.caveats)


def test_no_row_loses_its_rank_for_it() -> None:
    assert CODE not in UNRANKED
    (ranking,) = ranked(variant(10.0), variant(11.2, MERGE), variant(8.0, "prune_tokens(keep=0.7)"))
    assert sorted(row.rank for row in ranking.rows) == [1, 2, 3] and not any(row.note for row in ranking.rows)


def test_the_terminal_the_markdown_and_the_page_say_it() -> None:
    found = (variant(10.0), variant(11.2, MERGE))
    rows = ranked(*found)
    told = "deit_tiny | merge_tokens(r=8) @ onnxruntime takes 1.12 x the latency without the recipe"
    assert f"WARNING {CODE}: {told}" in text.rankings(rows) and f"- WARNING {CODE}: {told}" in text.markdown(rows)
    page = render(Report(title="t", rankings=rows, measurements=found))
    assert told in page and "leave the pass out" in page


def test_a_table_that_was_written_says_it_again_when_it_is_ranked(tmp_path: Path) -> None:
    path = tmp_path / "ranking.csv"
    path.write_text(text.csv_rows(ranked(variant(10.0), variant(11.2, MERGE))))
    assert "recipe" in next(csv.reader(io.StringIO(path.read_text())))
    assert [doubt.seen[:47] for doubt in doubts(*entries_from_csv(path))] == ["deit_tiny | merge_tokens(r=8) @ onnxruntime tak"]


def test_a_store_says_it(tmp_path: Path) -> None:
    with Store.open(tmp_path / "r.sqlite") as store:
        run = store.begin_run("s", "", "", "0")
        plain = artifact()
        merged = replace(plain, sha256="merged", variant=replace(plain.variant, recipe="fuse"))
        for made, seconds in ((plain, 0.010), (merged, 0.012)):
            store.add_artifact(made)
            for repeat in range(3):
                one = trial(f"{made.sha256}{repeat}", repeat=repeat, latency_s=seconds * (1.0 + 0.001 * repeat))
                store.add_trial(run, replace(one, artifact_sha256=made.sha256, traces=(sampled(one.traces[0], 1.0),)))
        (ranking,) = rankings(store, measurements(store), RankPlan())
    (doubt,) = (doubt for doubt in ranking.caveats if doubt.code == CODE)
    assert doubt.seen.startswith("levit_conv_192 | fuse @ onnxruntime takes 1.20 x") and len(ranking.rows) == 2
