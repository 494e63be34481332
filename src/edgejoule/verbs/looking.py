"""The verbs that look: zoo list, zoo show, doctor; and the hidden one that a worker runs. Only ``doctor --install`` writes files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgejoule.errors import SpecError
from edgejoule.progress import Progress
from edgejoule.verbs.options import Json, Model, bench_of, print_json, print_text

if TYPE_CHECKING:
    from edgejoule.measure.calibrate import Calibration
    from edgejoule.records import Interval


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


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Find out what one meter really does, by a load of half a minute.")
    ] = False,
    meter: Annotated[str, typer.Option(help="With --calibrate: auto, or a meter such as rapl(period_s=0.05).")] = "auto",
    install: Annotated[
        list[str] | None,
        typer.Option("--install", metavar="NAME", help="Make the environment of a backend that needs one; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which meters, backends and transports work here, and what the others need; make the environments that some backends need."""
    from edgejoule import environments
    from edgejoule.report import text
    from edgejoule.stages import survey

    if calibrate and install:
        raise SpecError("--calibrate needs a quiet machine and --install keeps it busy: give one of them")
    if calibrate:
        _calibrate(meter, as_json)
        return
    if install:
        _install(install, as_json)
        return
    found = {**survey(), "environments": environments.survey()}
    if as_json:
        print_json(found)
    else:
        print_text(text.doctor_table(found))


def _install(names: list[str], as_json: bool) -> None:
    """Make environments one after the other, showing progress; where each is and what it holds on stdout."""
    from edgejoule import environments
    from edgejoule.bench import Event
    from edgejoule.installing import install

    for name in names:
        environments.environment_of(name)  # a mistyped name is told before minutes are spent on another
    made: list[dict[str, Any]] = []
    with Progress("what was finished is kept") as progress:
        for name in dict.fromkeys(names):
            python = install(name, lambda line: progress.notify(Event("doctor", line)))
            made.append({"name": name, "python": python, "versions": environments.versions(name, environments.packages_named(name))})
    if as_json:
        print_json({"environments": made})
    else:
        lines = (f"{one['name']}: {', '.join(f'{what} {version}' for what, version in one['versions'].items())}" for one in made)
        print_text("\n".join(lines) + "\n")


def _calibrate(meter: str, as_json: bool) -> None:
    """Calibrate a meter, showing progress; its update period, delay, averaging time and cost on stdout."""
    from edgejoule.bench import Event
    from edgejoule.measure.calibrate import STEPS, calibrate
    from edgejoule.measure.meters import choose_meter
    from edgejoule.plain import encode

    with Progress() as progress:
        chosen, why = choose_meter() if meter == "auto" else (meter, "")
        progress.say(why or f"calibrating {chosen}: under a minute, on an otherwise quiet machine")
        found = calibrate(chosen, lambda line, done: progress.notify(Event("doctor", line, done, STEPS)))
    if as_json:
        print_json(encode(found))
    else:
        print_text(_calibration_text(found))


def _calibration_text(found: Calibration) -> str:
    """A line a figure, 95 % intervals in brackets, and what it means."""
    seen, cost = found.response, found.sampler
    often = f"at most {1e3 * seen.poll_s:.2g} ms: a new value at every read" if seen.every_read else _figure(seen.update_s, 1e3, "ms")
    lines = [
        f"{found.meter}, rail {seen.rail} ({found.scope}, grade {found.grade}), while {found.load} worked and rested",
        f"  new value every   {often}" + (f", by {seen.least_step_j:.3g} J at least" if seen.least_step_j is not None else ""),
    ]
    if seen.kind != "none":
        lines += [
            f"  step of power     {_figure(seen.step_w, 1, 'W')} above {seen.idle_w:.3g} W",
            f"  delay             {_figure(seen.delay_s, 1e3, 'ms')}",
            f"  rise 10 to 90 %   {_figure(seen.rise_s, 1e3, 'ms')}",
            f"  averages over     {_figure(seen.averaging_s, 1e3, 'ms')}, {seen.kind}" + ("" if seen.decided else " or another filter"),
            "  left unexplained  " + ", ".join(f"{kind} {100 * share:.2g} % of the step" for kind, share in seen.misfit.items()),
        ]
    if cost is not None:
        idle = f"idle {cost.with_w:.3g} W with it, {cost.without_w:.3g} W without"
        lines.append(f"  the sampler costs {_figure(cost.added_w, 1, 'W')} ({idle}) and {100 * cost.cores:.2g} % of a core")
    return "\n".join((*lines, *found.says)) + "\n"


def _figure(interval: Interval | None, scale: float, unit: str) -> str:
    if interval is None:
        return "could not be told"
    bounds = "" if interval.low is None or interval.high is None else f" [{interval.low * scale:.3g}, {interval.high * scale:.3g}]"
    return f"{interval.value * scale:.3g} {unit}{bounds}"


def agent() -> None:
    """Read one job on stdin, answer with a trial on stdout: what a worker runs."""
    from edgejoule.fleet.agent import main as work

    sys.exit(work())
