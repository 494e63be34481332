"""The verb evaluate: what an artifact gets right on labelled images. Parses, calls and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgejoule.catalog import saved_network
from edgejoule.errors import SpecError
from edgejoule.progress import Progress
from edgejoule.verbs.options import Cache, Calibration, Json, MaxDrop, Threads, bench_of, command_line, compiling_of, print_json, print_text

if TYPE_CHECKING:
    from edgejoule.records import Artifact, Evaluation


def evaluate(
    target: Annotated[str, typer.Argument(metavar="ARTIFACT_OR_MODEL", help="A folder that edgejoule compile made, or a model.")],
    data: Annotated[
        str, typer.Option(help='Labelled images: digits, imagefolder(path="..."); an ImageNet folder is one named by WordNet ids.')
    ] = ("digits"),
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    backend: Annotated[str | None, typer.Option(help="The backend to compile a model for. Default: onnxruntime.")] = None,
    weights: Annotated[str, typer.Option(help="A model's checkpoint file; or the one that an artifact was compiled from.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Only so many images, drawn at random, always the same.", min=1)] = None,
    no_reference: Annotated[bool, typer.Option("--no-reference", help="Do not run the float32 network beside it.")] = False,
    max_bad_images: Annotated[int, typer.Option(help="Leave out so many images that cannot be read, then stop.", min=0)] = 0,
    threads: Threads = 0,
    calibration: Calibration = "auto",
    max_drop_pct: MaxDrop = 1.0,
    out: Annotated[Path | None, typer.Option(help="Keep the evaluation in this folder's results.sqlite.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Evaluate an artifact in its own runtime: top-1, top-5, calibration, per class, agreement with the float32 network."""
    from edgejoule.evaluating import artifact_of, evaluate_artifact, opened, reference_of
    from edgejoule.plain import encode
    from edgejoule.report.evaluation import evaluation
    from edgejoule.study import check_writable

    if out is not None:
        check_writable(out)
    compiling = compiling_of(calibration, max_drop_pct)
    if (calibration, max_drop_pct) != ("auto", 1.0) and Path(target).is_dir() and saved_network(target) is None:
        raise SpecError(
            f"{target} is compiled already, within the budget that its manifest says: leave --calibration and --max-drop-pct out"
        )
    with Progress("without --out nothing is kept" if out is None else "") as progress:
        bench = bench_of(cache, progress)
        artifact = artifact_of(target, opened(data), backend, weights, threads, bench, compiling)
        reference, why = (None, "not asked for") if no_reference else reference_of(artifact, weights, bench)
        if why and not no_reference:
            progress.say(f"no agreement with the float32 network: {why} (with --weights)")
        found = evaluate_artifact(artifact, data, split, bench, reference, limit, max_bad_images, threads)
    store = keep(artifact, found, out) if out is not None else None
    if as_json:
        print_json(encode(found) | {"label": artifact.label})
    else:
        print_text(evaluation(found, artifact.label, why))
        if store is not None:
            print_text(f"\nresults  {store}")


def keep(artifact: Artifact, found: Evaluation, out: Path) -> Path:
    """The evaluation in ``out``'s results file, whose path is returned. Raises StoreError, OutputError."""
    from edgejoule import __version__
    from edgejoule.store import NAME, Store

    with Store.open(out / NAME) as store:
        run = store.begin_run("evaluate", "", command_line(), __version__)
        store.add_artifact(artifact)
        store.add_evaluation(run, found)
    return out / NAME
