"""The verb that shrinks: optimize. It applies a recipe and saves the network, or says layer by layer what each pass would cost."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from edgejoule.errors import SpecError
from edgejoule.progress import Progress
from edgejoule.verbs.options import Cache, Data, Json, Model, Teacher, Train, Weights, bench_of, optimizing_of, print_json, print_text


def optimize(
    model: Model,
    recipe: Annotated[str, typer.Option(help='Passes in order, as in "prune_ffn(ratio=0.3) | distill(epochs=5)".')] = "",
    data: Data = "",
    train: Train = "",
    teacher: Teacher = "",
    weights: Weights = "auto",
    seed: Annotated[int, typer.Option(help="Seeds what passes draw, and random weights.", min=0, max=2**32 - 1)] = 0,
    out: Annotated[Path | None, typer.Option(help="A new folder for the network. Default: optimized/<model>-<number>.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Change nothing: what each pass costs and saves, layer by layer.")
    ] = False,
    backend: Annotated[str, typer.Option(help="The backend that --sensitivity times layers with; none times nothing.")] = "onnxruntime",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Shrink a model by a recipe of passes, and save the network: prune, resize, drop tokens, distil, quantise."""
    from edgejoule.evaluating import spec_of_weights

    if bool(recipe) == sensitivity:
        raise SpecError("give --recipe, as in --recipe 'prune_ffn(ratio=0.3)', or --sensitivity")
    plan = optimizing_of([recipe], data, train, teacher)
    with Progress("what was trained goes on from its last checkpoint") as progress:
        bench, spec = bench_of(cache, progress, seed), spec_of_weights(model, weights)
        if sensitivity:
            _sensitivity(spec, weights, plan, backend, out, bench, as_json)
            return
        from edgejoule import optimizing

        folder = out or _free(Path("optimized"), spec.name)
        if folder.exists():
            raise SpecError(f"{folder} is there already: name a new folder with --out")
        optimizing.check_saveable(spec)
        variant = optimizing.optimize(spec, weights, recipe, plan, bench)
        found = optimizing.shrunk(spec, weights, variant, plan, bench)
        optimizing.save(variant, folder, bench)
    _print(variant, found, folder, as_json)


def _print(variant: Any, found: Any, folder: Path, as_json: bool) -> None:
    from edgejoule.plain import encode
    from edgejoule.report.optimizing import shrunk_table

    if as_json:
        print_json({"variant": variant.label, "folder": str(folder)} | encode(found))
        return
    print_text(shrunk_table(found))
    print_text(f"\nnetwork  {folder}\nNext: edgejoule measure {shlex.quote(str(folder))}")


def _sensitivity(spec: Any, weights: str, plan: Any, backend: str, out: Path | None, bench: Any, as_json: bool) -> None:
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.report.sensitivity import sensitivity_table, write_plot
    from edgejoule.sensitivity import sensitivity as measured

    rows, failures = measured(spec, weights, plan, "" if backend == "none" else backend, bench)
    page = write_plot((out or Path()) / f"sensitivity-{_plain(spec.name)}.html", rows, spec.name)
    if as_json:
        print_json({"model": spec.name, "rows": encode(rows), "failures": encode(failures), "page": str(page)})
        return
    print_text(sensitivity_table(rows) + (text.failures(failures) if failures else ""))
    print_text(f"\npage  {page}")


def _free(home: Path, name: str) -> Path:
    """The first folder of a name and a number that is not there."""
    number = 1
    while (home / f"{_plain(name)}-{number}").exists():
        number += 1
    return home / f"{_plain(name)}-{number}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "model"
