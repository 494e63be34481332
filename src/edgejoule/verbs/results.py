"""The verbs that read results and published tables: rank, report, store info, reproduce. None of them measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgejoule.progress import Progress
from edgejoule.verbs.options import Json, check_finite, command_line, print_json, print_text


def rank(
    source: Annotated[str, typer.Argument(metavar="FILE.csv|STORE", help="A table with model, top1_pct, energy_mj; or a results.sqlite.")],
    metric: Annotated[str, typer.Option(help="sam, efficiency, energy, latency, accuracy or netscore.")] = "sam",
    a: Annotated[float, typer.Option(help="SAM's exponent of accuracy.")] = 5.0,
    b: Annotated[float, typer.Option(help="SAM's factor.")] = 5.0,
    baseline: Annotated[str, typer.Option(help="Count the energy saved against this model.")] = "",
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Also show how the order changes with a, b and the unit.")] = False,
    as_json: Json = False,
) -> None:
    """Rank models by accuracy per joule: SAM, %/mJ, Pareto fronts."""
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.results import rank_source
    from edgejoule.study_file import RankPlan

    check_finite(a=a, b=b)
    rankings, tables = rank_source(source, RankPlan(metric, a, b, baseline), sensitivity)
    if as_json:
        rows = [encode(row) | _flat(row) for row in rankings[0].rows] if rankings else []
        value: dict[str, Any] = {"rows": rows, "rankings": encode(rankings)}
        print_json(value | ({"sensitivity": encode(tables)} if sensitivity else {}))
    else:
        print_text(text.rankings(rankings) + "".join(text.sensitivity_table(table) for table in tables))


def compare(
    source: Annotated[str, typer.Argument(metavar="STORE", help="A results.sqlite.")],
    ours: Annotated[str, typer.Argument(metavar="A", help="A model, or variant @ backend as the report has it.")],
    theirs: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    as_json: Json = False,
) -> None:
    """Say whether two measured variants differ: the ratio A over B, its interval, and a verdict."""
    from edgejoule.plain import encode
    from edgejoule.report.format import measure
    from edgejoule.results import compare_in_store

    found = compare_in_store(source, ours, theirs)
    if as_json:
        print_json({"ours": ours, "theirs": theirs} | encode(found))
        return
    for figure, verdict in found.items():
        if isinstance(verdict, str):
            print_text(f"{figure:8} not compared: {verdict}")
            continue
        print_text(f"{figure:8} {measure(verdict.ratio)} ×  {'differ' if verdict.differs else 'no difference'}: {verdict.reason}")


def report(
    source: Annotated[str, typer.Argument(metavar="STORE", help="A results.sqlite.")],
    out: Annotated[Path | None, typer.Option(help="The page to write. Default: report.html beside the store.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables instead of writing a page.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV rows instead of writing a page.")] = False,
    as_json: Json = False,
) -> None:
    """Write the report of a results file again, from the stored trials. Measures nothing."""
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.results import report_store

    beside = Path("report.html") if "://" in source else Path(source).with_name("report.html")
    outcome = report_store(source, None if markdown or csv else out or beside, command_line())
    if as_json:
        page = str(outcome.report) if outcome.report else None
        print_json(encode({"report": page, "rankings": outcome.rankings, "failures": outcome.failures, "beside": outcome.beside}))
    elif markdown:
        print_text(text.markdown(outcome.rankings))
    elif csv:
        print_text(text.csv_rows(outcome.rankings))
    else:
        print_text(f"report   {outcome.report}")


def reproduce(
    paper: Annotated[str, typer.Argument(metavar="PAPER", help="edgevit (arXiv 2205.03436) or e3p (arXiv 2511.23166).")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: Json = False,
) -> None:
    """Recompute a paper's tables and claims from their own numbers and from the built models, every disagreement shown."""
    from edgejoule.plain import encode
    from edgejoule.report import reproduction
    from edgejoule.reproduce import reproduce as recompute

    with Progress() as progress:
        found = recompute(paper, progress.notify)
    if as_json:
        print_json(encode(found))
    else:
        print_text(reproduction.markdown(found) if markdown else reproduction.reproduction(found))


def store_info(source: Annotated[str, typer.Argument(metavar="STORE")], as_json: Json = False) -> None:
    """Say what a results file holds: runs, artifacts, trials, failures."""
    from edgejoule.plain import encode
    from edgejoule.store import Store

    with Store.open(source, create=False) as store:
        runs = [encode(run) for run in store.runs()]
        counts = {"runs": runs, "artifacts": len(store.artifacts()), "trials": len(store.trial_keys())}
        counts |= {"trainings": len(store.trainings()), "evaluations": len(store.evaluations()), "failures": len(store.failures())}
    if as_json:
        print_json(counts)
    else:
        print_text("\n".join(f"{key:10} {len(value) if isinstance(value, list) else value}" for key, value in counts.items()))


def _flat(row: Any) -> dict[str, Any]:
    """The fixed shape of a ranked row: plain numbers, with the intervals beside them."""
    return {name: found.value if (found := getattr(row, name)) else None for name in ("sam", "efficiency_pct_per_mj")}
