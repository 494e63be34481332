"""The verbs that work: run, screen, compile, measure. Each parses, calls and prints; imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgejoule.errors import SpecError
from edgejoule.progress import Progress
from edgejoule.verbs.options import (
    BACKENDS,
    Cache,
    Calibration,
    Data,
    Images,
    Json,
    MaxDrop,
    Meter,
    Model,
    Recipe,
    Threads,
    Train,
    Weights,
    bench_of,
    check_finite,
    command_line,
    compiling_of,
    optimizing_of,
    plan_of,
    print_json,
    print_text,
)

SUSTAIN_S = (30.0, 86_400.0)


def run(
    study: Annotated[str, typer.Argument(help="A study file, or the name of a shipped one.")] = "quickstart",
    out: Annotated[Path | None, typer.Option(help="Folder for results.sqlite and report.html. Default: runs/<study>.")] = None,
    meter: Annotated[str | None, typer.Option(help="Use this meter instead of the study's.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Use this profile instead of the study's: quick, standard, publish, paper, edgevit.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Train on this instead of the study's data: 'cifar10(path=\"...\")'.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Run a whole study: screen, train, compile, measure, rank, report. Run it again to resume."""
    from edgejoule.plain import encode
    from edgejoule.report import reproduction, text
    from edgejoule.report import training as tables
    from edgejoule.study import load_study, run_study
    from edgejoule.study_file import with_data, with_measure

    chosen = with_data(with_measure(load_study(study), meter=meter, profile=profile), data)
    folder = out or Path("runs") / chosen.study.name
    with Progress("every finished trial is stored") as progress:
        if chosen.study.cost:
            progress.say(f"{chosen.study.name}: {chosen.study.cost}")
        outcome = run_study(chosen, folder, bench_of(cache, progress, chosen.study.seed), command_line())
    if as_json:
        files = {"study": chosen.study.name, "store": str(outcome.store), "report": str(outcome.report)}
        print_json(files | encode({"rankings": outcome.rankings, "failures": outcome.failures, "beside": outcome.beside}))
    else:
        trained = tables.trainings(outcome.trainings, outcome.epochs) + tables.spreads(outcome.spreads) if outcome.trainings else ""
        print_text(trained + text.rankings(outcome.rankings) + text.failures(outcome.failures))
        if outcome.beside:
            print_text("\n" + "\n".join(reproduction.beside(found) for found in outcome.beside))
        print_text(f"\nresults  {outcome.store}\nreport   {outcome.report}\n")
        test = f"edgejoule rank {outcome.store} --sensitivity; " if any(found.rows[0].sam for found in outcome.rankings) else ""
        print_text(f"Next: open {outcome.report} in a browser; {test}edgejoule run e3p_vit")


def screen(
    models: Annotated[list[str] | None, typer.Argument(help="Models to screen, instead of a pool.")] = None,
    pool: Annotated[str, typer.Option(help="A pool of the catalog: e3p, edgevit, guide, …")] = "",
    min_top1_pct: Annotated[float | None, typer.Option(help="Keep models with at least this top-1.")] = None,
    max_params_m: Annotated[float | None, typer.Option(help="Keep models with fewer params (millions).")] = None,
    max_macs_g: Annotated[float | None, typer.Option(help="Keep models with fewer MACs (billions).")] = None,
    alpha: Annotated[float, typer.Option(help="NetScore's exponent of accuracy.")] = 2.0,
    beta: Annotated[float, typer.Option(help="NetScore's exponent of params.")] = 0.5,
    gamma: Annotated[float, typer.Option(help="NetScore's exponent of MACs.")] = 0.5,
    recount: Annotated[bool, typer.Option("--recount", help="Count params and MACs from the built model.")] = False,
    as_json: Json = False,
) -> None:
    """Stage 1, without a device: thresholds and NetScore. The pool e3p has the paper's thresholds by default."""
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.stages import candidates, screen_models
    from edgejoule.study_file import ScreenPlan

    if models and pool:
        raise SpecError("give either models or --pool, not both")
    pool = pool or ("" if models else "e3p")
    limits = (min_top1_pct, max_params_m, max_macs_g)
    if pool == "e3p" and limits == (None, None, None):
        limits = (79.0, 23.0, 5.0)
    check_finite(min_top1_pct=limits[0], max_params_m=limits[1], max_macs_g=limits[2], alpha=alpha, beta=beta, gamma=gamma)
    plan = ScreenPlan(pool, tuple(models or ()), *limits, alpha, beta, gamma, recount)
    with Progress() as progress:
        rows = screen_models(candidates(plan, allow_code=True), plan, bench_of(None, progress))
    if as_json:
        print_json({"candidates": encode(rows)})
    else:
        print_text(text.screened_table(rows))


def compile_(
    model: Model,
    backends: Annotated[list[str] | None, BACKENDS] = None,
    recipe: Recipe = "",
    data: Data = "",
    train: Train = "",
    batch: Annotated[int, typer.Option(help="Images per inference.", min=1)] = 1,
    weights: Weights = "auto",
    threads: Threads = 0,
    images: Images = "photos(n=32)",
    calibration: Calibration = "auto",
    max_drop_pct: MaxDrop = 1.0,
    tune: Annotated[bool, typer.Option("--tune", help="Race all that works here (or the backends named) and keep the fastest.")] = False,
    out: Annotated[Path | None, typer.Option(help="Copy the artifact's folder to here.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Compile a model for backends, check it against the network, and say what the runtime really runs."""
    from edgejoule import stages
    from edgejoule.plain import encode
    from edgejoule.report import text

    plan = plan_of(scenario="offline" if batch > 1 else "single_stream", batch=batch, threads=threads, images=images)
    backend = list(backends or () if tune else backends or ("onnxruntime",))
    stages.check(plan, backend)
    optimizing = optimizing_of([recipe], data, train)
    compiling = compiling_of(calibration, max_drop_pct)
    if out is not None and len(backend) > 1 and not tune:
        raise SpecError(f"--out holds one artifact, and {len(backend)} backends were named: compile them one by one")
    if out is not None:
        stages.check_new(out)
    if tune:
        tune_model(model, backend, recipe, plan, compiling, weights, out, cache, as_json)
        return
    with Progress("what was compiled is kept") as progress:
        artifacts = compile_all(model, backend, plan, weights, bench_of(cache, progress), recipe, (compiling, optimizing))
    if out is not None:
        artifacts = (stages.copy_artifact(artifacts[0], out),)
    if as_json:
        print_json({"artifacts": [encode(artifact) | {"bytes": artifact.bytes} for artifact in artifacts]})
    else:
        print_text(text.artifacts_table(artifacts))


def tune_model(
    model: str,
    backends: list[str],
    recipe: str,
    plan: Any,
    compiling: Any,
    weights: str,
    out: Path | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Race, print the table of all that was tried, and copy the winner to ``out`` where that is given."""
    from edgejoule import manifest, stages
    from edgejoule.evaluating import spec_of_weights
    from edgejoule.plain import encode
    from edgejoule.report.tuning import tuning_table
    from edgejoule.tuning import tune

    with Progress("what was compiled is kept") as progress:
        found = tune(spec_of_weights(model, weights), weights, plan, compiling, bench_of(cache, progress), backends, recipe)
    folder = Path(found.winner.folder)
    if out is not None:
        folder = Path(stages.copy_artifact(manifest.read(folder), out).folder)
    if as_json:
        print_json(encode(found) | {"winner": encode(found.winner), "folder": str(folder)})
    else:
        print_text(tuning_table(found.model, found.device, found.tried))
        print_text(f"\nwinner  {found.winner.choice.label}\nfolder  {folder}")
        print_text(f"Next: edgejoule measure {folder} --threads {found.winner.choice.threads}")


def measure(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A model, or a folder that edgejoule compile made.")],
    backend: Annotated[str | None, typer.Option(help="The backend to compile a model for. Default: onnxruntime.")] = None,
    recipe: Recipe = "",
    data: Data = "",
    train: Train = "",
    meter: Meter = "auto",
    profile: Annotated[str, typer.Option(help="quick, standard, publish, paper, edgevit, or standard(window_s=5).")] = "standard",
    scenario: Annotated[
        str, typer.Option(help="single_stream, offline (batches), fixed_rate(hz=30) (a camera), streams(n=4) (cameras at once).")
    ] = "single_stream",
    batch: Annotated[int, typer.Option(help="Images per inference; above 1 only with offline.", min=1)] = 1,
    threads: Threads = 0,
    weights: Weights = "auto",
    images: Images = "photos(n=32)",
    calibration: Calibration = "auto",
    max_drop_pct: MaxDrop = 1.0,
    sustain: Annotated[str, typer.Option(help="One window this long (10m, 90s, 1h) from cold: throttling and the steady state.")] = "",
    out: Annotated[Path | None, typer.Option(help="Keep the trials in this folder's results.sqlite and resume from it.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure time, power, energy and memory of one model or artifact on this machine."""
    from edgejoule import stages
    from edgejoule.catalog import saved_network
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.study import check_writable, measure_one

    if sustain:
        profile = sustained_profile(sustain)
    plan = plan_of(profile=profile, scenario=scenario, batch=batch, meter=meter, threads=threads, images=images)
    wanted = backend or "onnxruntime"
    stages.check(plan, [wanted])
    optimizing = optimizing_of([recipe], data, train) if recipe else None  # an artifact is measured where there is no torch
    compiling = compiling_of(calibration, max_drop_pct)
    folder = Path(target) if Path(target).is_dir() and saved_network(target) is None else None
    if recipe and folder is not None:
        raise SpecError(f"{target} is compiled already, and a recipe changes the network before that: leave --recipe out")
    if out is not None or sustain:
        check_writable(out or Path("runs"))
    with Progress("every finished trial is stored" if out else "without --out no trial is kept") as progress:
        bench = bench_of(cache, progress)
        artifact = (
            stages.open_artifact(folder, plan, backend)
            if folder is not None
            else compile_all(target, [wanted], plan, weights, bench, recipe, (compiling, optimizing))[0]
        )
        found, trials = measure_one(artifact, plan, out, bench, command_line())
    if not as_json:
        print_text(text.measurement(found))
    settled = settle(found, trials[-1], out or Path("runs")) if sustain else {}
    if as_json:
        print_json(encode(found) | {name: encode(value) for name, value in settled.items()})
    elif sustain:
        from edgejoule.report import sustained as page

        print_text("\n" + page.text(settled["sustained"], f"{found.variant} @ {found.backend}, sustained"))
        print_text(f"\npage  {settled['page']}")


def settle(found: Any, trial: Any, folder: Path) -> dict[str, Any]:
    """What a sustained trial held, and the page that shows it, written into ``folder``."""
    from edgejoule.measure.sustained import sustained as analysed
    from edgejoule.report import sustained as page
    from edgejoule.report.page import write_page

    held = analysed(trial.latencies_s, trial.workload.batch, trial.phase("window"), trial.traces, trial.watched)
    facts = (found.device, f"{found.workload.scenario}, batch {found.workload.batch}", f"meter {found.meter}")
    file = write_page(folder / "sustained.html", page.render(held, f"{found.variant} @ {found.backend}", facts))
    return {"sustained": held, "page": str(file)}


def sustained_profile(duration: str) -> str:
    """``10m`` -> the spelling of the profile that runs so long. Raises SpecError for what is no duration of at least half a minute."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = duration.strip()[:-1], duration.strip()[-1:]
    if unit.isdigit():
        number, unit = duration.strip(), "s"
    try:
        seconds = float(number) * units[unit]
    except (ValueError, KeyError) as error:
        raise SpecError(f"--sustain {duration!r} is no duration: expected seconds, minutes or hours, as in 10m") from error
    if not SUSTAIN_S[0] <= seconds <= SUSTAIN_S[1]:
        raise SpecError(f"--sustain {duration} is outside half a minute to a day: expected something like 10m")
    return f"sustained(window_s={seconds:g})"


def compile_all(
    model: str, backends: list[str], plan: Any, weights: str, bench: Any, recipe: str = "", plans: tuple[Any, ...] = ()
) -> tuple[Any, ...]:
    """Artifacts of one model; the first that fails is the error."""
    from edgejoule.bench import Event
    from edgejoule.compiling import compile_model
    from edgejoule.errors import BackendError
    from edgejoule.evaluating import spec_of_weights
    from edgejoule.records import Artifact

    artifacts = []
    bench.notify(Event("compile", f"{model} for {', '.join(backends)}", 0, len(backends)))
    for result in compile_model(spec_of_weights(model, weights), backends, plan, weights, bench, recipe, *plans):
        if not isinstance(result, Artifact):
            raise BackendError(f"{result.variant} @ {result.backend}: {result.reason}")
        artifacts.append(result)
        bench.notify(Event("compile", result.label, len(artifacts), len(backends)))
    return tuple(artifacts)
