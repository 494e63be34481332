"""The verbs that look: zoo list, zoo show, doctor; and the hidden one that a worker runs. None of them writes a file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgejoule.progress import Progress
from edgejoule.verbs.options import Json, Model, bench_of, print_json, print_text


def zoo_list(
    pool: Annotated[str, typer.Option(help="Only this pool: e3p, edgevit, edgevit_coco, edgevit_ade20k, guide.")] = "",
    as_json: Json = False,
) -> None:
    """List the catalog: published accuracy, params and MACs, and their source."""
    from edgejoule import catalog
    from edgejoule.plain import encode
    from edgejoule.report import text

    specs = catalog.pool(pool) if pool else catalog.rows()
    if as_json:
        print_json({"models": [encode(spec) for spec in specs]})
    else:
        print_text(text.catalog_table(specs))


def zoo_show(name: Model, as_json: Json = False) -> None:
    """Show one model: counted params and MACs beside the published ones."""
    from edgejoule.catalog import find_model
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.stages import count_models

    with Progress() as progress:
        spec = find_model(name, allow_code=True)
        cost = count_models([spec], bench_of(None, progress))[spec.name]
    published = encode(spec.published) if spec.published else None
    facts = {"name": spec.name, "family": spec.family, "params": cost.params, "macs": cost.macs, "input_size": list(cost.input_size)}
    facts |= {"activation_bytes": cost.activation_bytes, "published": published, "licence": spec.licence, "builder": spec.builder}
    if as_json:
        print_json(facts)
    else:
        print_text(text.model_card(spec, cost))


def doctor(as_json: Json = False) -> None:
    """Say which meters, backends and transports work here, and what the others need."""
    from edgejoule.report import text
    from edgejoule.stages import survey

    found = survey()
    if as_json:
        print_json(found)
    else:
        print_text(text.doctor_table(found))


def agent() -> None:
    """Read one job on stdin, answer with a trial on stdout: what a worker runs."""
    from edgejoule.fleet.agent import main as work

    sys.exit(work())
