"""The command line: one short function a verb: parse, call, print. The only place that catches EdgejouleError.

Results go to stdout, all else to stderr; ``--json`` makes stdout one JSON value. Exit 0 on success, 2 on an error that
the user can mend (one sentence), 1 on a bug (its traceback). Imports what a verb needs when it runs, never before.
"""

from __future__ import annotations

import errno
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgejoule import __version__
from edgejoule.errors import EdgejouleError, SpecError, StudyError
from edgejoule.progress import Progress

app = typer.Typer(
    help="Find, shrink, compile and measure Vision Transformers for edge devices, and rank them by accuracy per joule.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
zoo_app = typer.Typer(help="The models that edgejoule knows by name.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
store_app = typer.Typer(help="Look into a results file.", no_args_is_help=True)
app.add_typer(store_app, name="store")

# what the extras bring and a board does without, by the names that are imported
MEASURE = ("PIL", "scipy", "sklearn", "sqlalchemy")
HOST = (*MEASURE, "huggingface_hub", "onnx", "onnxscript", "plotly", "safetensors", "timm", "torch", "torchvision")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Cache = Annotated[Path | None, typer.Option(help="Where compiled files are kept. Default: $EDGEJOULE_CACHE or the user's cache folder.")]
Model = Annotated[str, typer.Argument(help='A catalog name, timm(name="..."), or your own module:function.')]
Backends = Annotated[list[str], typer.Option("--backend", help='For instance onnxruntime, or openvino(precision="bf16"). May be repeated.')]
Weights = Annotated[str, typer.Option(help="auto (pretrained where they can be had, else random), random, or a checkpoint file.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime; 0 means all cores.", min=0)]
Images = Annotated[str, typer.Option(help='photos(n=32), or folder(path="...").')]
Meter = Annotated[str, typer.Option(help="auto, none, or a meter such as rapl(period_s=0.05); edgejoule doctor lists them.")]


@app.command()
def run(
    study: Annotated[str, typer.Argument(help="A study file, or the name of a shipped one.")] = "quickstart",
    out: Annotated[Path | None, typer.Option(help="Folder for results.sqlite and report.html. Default: runs/<study>.")] = None,
    meter: Annotated[str | None, typer.Option(help="Use this meter instead of the study's.")] = None,
    profile: Annotated[str | None, typer.Option(help="Use this profile instead of the study's: quick, standard, publish, paper.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Run a whole study: screen, compile, measure, rank, report. Run it again to resume."""
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.study import load_study, run_study
    from edgejoule.study_file import with_measure

    chosen = with_measure(load_study(study), meter=meter, profile=profile)
    folder = out or Path("runs") / chosen.study.name
    with Progress("every finished trial is stored") as progress:
        if chosen.study.cost:
            progress.say(f"{chosen.study.name}: {chosen.study.cost}")
        outcome = run_study(chosen, folder, _bench(cache, progress, chosen.study.seed), _command())
    if as_json:
        files = {"study": chosen.study.name, "store": str(outcome.store), "report": str(outcome.report)}
        _print_json(files | encode({"rankings": outcome.rankings, "failures": outcome.failures}))
    else:
        _print(text.rankings(outcome.rankings) + text.failures(outcome.failures))
        _print(f"\nresults  {outcome.store}\nreport   {outcome.report}\n")
        test = f"edgejoule rank {outcome.store} --sensitivity; " if any(found.rows[0].sam for found in outcome.rankings) else ""
        _print(f"Next: open {outcome.report} in a browser; {test}edgejoule run e3p_vit")


@zoo_app.command("list")
def zoo_list(pool: Annotated[str, typer.Option(help="Only this pool: e3p, edgevit, guide.")] = "", as_json: Json = False) -> None:
    """List the catalog: published accuracy, params and MACs, and their source."""
    from edgejoule import catalog
    from edgejoule.plain import encode
    from edgejoule.report import text

    specs = catalog.pool(pool) if pool else catalog.rows()
    if as_json:
        _print_json({"models": [encode(spec) for spec in specs]})
    else:
        _print(text.catalog_table(specs))


@zoo_app.command("show")
def zoo_show(name: Model, as_json: Json = False) -> None:
    """Show one model: counted params and MACs beside the published ones."""
    from edgejoule.catalog import find_model
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.stages import count_models

    with Progress() as progress:
        spec = find_model(name, allow_code=True)
        cost = count_models([spec], _bench(None, progress))[spec.name]
    published = encode(spec.published) if spec.published else None
    facts = {"name": spec.name, "family": spec.family, "params": cost.params, "macs": cost.macs, "input_size": list(cost.input_size)}
    facts |= {"activation_bytes": cost.activation_bytes, "published": published, "licence": spec.licence, "builder": spec.builder}
    if as_json:
        _print_json(facts)
    else:
        _print(text.model_card(spec, cost))


@app.command()
def screen(
    models: Annotated[list[str] | None, typer.Argument(help="Models to screen, instead of a pool.")] = None,
    pool: Annotated[str, typer.Option(help="A pool of the catalog: e3p, edgevit, guide.")] = "",
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
    _check_finite(min_top1_pct=limits[0], max_params_m=limits[1], max_macs_g=limits[2], alpha=alpha, beta=beta, gamma=gamma)
    plan = ScreenPlan(pool, tuple(models or ()), *limits, alpha, beta, gamma, recount)
    with Progress() as progress:
        rows = screen_models(candidates(plan, allow_code=True), plan, _bench(None, progress))
    if as_json:
        _print_json({"candidates": encode(rows)})
    else:
        _print(text.screened_table(rows))


@app.command("compile")
def compile_(
    model: Model,
    backend: Backends = ["onnxruntime"],  # noqa: B006
    batch: Annotated[int, typer.Option(help="Images per inference.", min=1)] = 1,
    weights: Weights = "auto",
    threads: Threads = 0,
    images: Images = "photos(n=32)",
    out: Annotated[Path | None, typer.Option(help="Copy the artifact's folder to here.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Compile a model for backends, check it against the network, and say what the runtime really runs."""
    from edgejoule import stages
    from edgejoule.plain import encode
    from edgejoule.report import text

    plan = _plan(scenario="offline" if batch > 1 else "single_stream", batch=batch, threads=threads, images=images)
    stages.check(plan, backend)
    if out is not None and len(backend) > 1:
        raise SpecError(f"--out holds one artifact, and {len(backend)} backends were named: compile them one by one")
    if out is not None:
        stages.check_new(out)
    with Progress("what was compiled is kept") as progress:
        artifacts = _compile(model, backend, plan, weights, _bench(cache, progress))
    if out is not None:
        artifacts = (stages.copy_artifact(artifacts[0], out),)
    if as_json:
        _print_json({"artifacts": [encode(artifact) | {"bytes": artifact.bytes} for artifact in artifacts]})
    else:
        _print(text.artifacts_table(artifacts))


@app.command()
def measure(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_ARTIFACT", help="A model, or a folder that edgejoule compile made.")],
    backend: Annotated[str | None, typer.Option(help="The backend to compile a model for. Default: onnxruntime.")] = None,
    meter: Meter = "auto",
    profile: Annotated[str, typer.Option(help="quick, standard, publish, paper, or standard(window_s=5).")] = "standard",
    scenario: Annotated[str, typer.Option(help="single_stream (latency) or offline (throughput).")] = "single_stream",
    batch: Annotated[int, typer.Option(help="Images per inference; above 1 only with offline.", min=1)] = 1,
    threads: Threads = 0,
    weights: Weights = "auto",
    images: Images = "photos(n=32)",
    out: Annotated[Path | None, typer.Option(help="Keep the trials in this folder's results.sqlite and resume from it.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure time, power, energy and memory of one model or artifact on this machine."""
    from edgejoule import stages
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.study import check_writable, measure_one

    plan = _plan(profile=profile, scenario=scenario, batch=batch, meter=meter, threads=threads, images=images)
    wanted = backend or "onnxruntime"
    stages.check(plan, [wanted])
    if out is not None:
        check_writable(out)
    with Progress("every finished trial is stored" if out else "without --out no trial is kept") as progress:
        bench = _bench(cache, progress)
        folder = Path(target)
        artifact = stages.open_artifact(folder, plan, backend) if folder.is_dir() else _compile(target, [wanted], plan, weights, bench)[0]
        found = measure_one(artifact, plan, out, bench, _command())
    if as_json:
        _print_json(encode(found))
    else:
        _print(text.measurement(found))


@app.command()
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

    _check_finite(a=a, b=b)
    rankings, tables = rank_source(source, RankPlan(metric, a, b, baseline), sensitivity)
    if as_json:
        rows = [encode(row) | _flat(row) for row in rankings[0].rows] if rankings else []
        value: dict[str, Any] = {"rows": rows, "rankings": encode(rankings)}
        _print_json(value | ({"sensitivity": encode(tables)} if sensitivity else {}))
    else:
        _print(text.rankings(rankings) + "".join(text.sensitivity_table(table) for table in tables))


@app.command()
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
    outcome = report_store(source, None if markdown or csv else out or beside, _command())
    if as_json:
        page = str(outcome.report) if outcome.report else None
        _print_json(encode({"report": page, "rankings": outcome.rankings, "failures": outcome.failures}))
    elif markdown:
        _print(text.markdown(outcome.rankings))
    elif csv:
        _print(text.csv_rows(outcome.rankings))
    else:
        _print(f"report   {outcome.report}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which meters, backends and transports work here, and what the others need."""
    from edgejoule.report import text
    from edgejoule.stages import survey

    found = survey()
    if as_json:
        _print_json(found)
    else:
        _print(text.doctor_table(found))


@app.command(hidden=True)
def agent() -> None:
    """Read one job on stdin, answer with a trial on stdout: what a worker runs."""
    from edgejoule.fleet.agent import main as work

    sys.exit(work())


@store_app.command("info")
def store_info(source: Annotated[str, typer.Argument(metavar="STORE")], as_json: Json = False) -> None:
    """Say what a results file holds: runs, artifacts, trials, failures."""
    from edgejoule.plain import encode
    from edgejoule.store import Store

    with Store.open(source, create=False) as store:
        runs = [encode(run) for run in store.runs()]
        counts = {"runs": runs, "artifacts": len(store.artifacts()), "trials": len(store.trial_keys()), "failures": len(store.failures())}
    if as_json:
        _print_json(counts)
    else:
        _print("\n".join(f"{key:10} {len(value) if isinstance(value, list) else value}" for key, value in counts.items()))


def main() -> None:
    """The entry point: maps our errors, and packages that an extra would bring, to one sentence and exit code 2."""
    try:
        app()
    except EdgejouleError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in HOST:
            raise
        board = " (a board that measures artifacts needs only 'edgejoule[measure]', no torch)" if error.name in MEASURE else ""
        _fail(f"this needs {error.name}, which is not installed: pip install 'edgejoule[host]'{board}")
    except OSError as error:
        where = error.filename or "a file"
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _fail(f"there is no file {str(where)[:60]!r}… ({error.strerror}): expected the name of a file, a folder or a model")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        _fail(f"cannot write {where} ({error.strerror}): free some space or choose another folder; what was stored is safe")


def version(wanted: bool) -> None:
    if wanted:
        _print(__version__)
        raise typer.Exit


@app.callback()
def root(show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    """Find, shrink, compile and measure Vision Transformers for edge devices, and rank them by accuracy per joule."""


def _bench(cache: Path | None, progress: Progress, seed: int = 0) -> Any:
    from edgejoule.bench import Bench, default_cache

    return Bench(notify=progress.notify, cache=(cache or default_cache()).absolute(), seed=seed)


def _plan(**values: Any) -> Any:
    """A measuring plan from options, checked as a study's would be."""
    from edgejoule.study_file import MeasurePlan, check_plan

    def refuse(key: str, message: str) -> StudyError:
        return StudyError(f"--{key}: {message}")

    plan = MeasurePlan(**values)
    check_plan(plan, refuse)
    return plan


def _check_finite(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise SpecError(f"--{name.replace('_', '-')}: expected a finite number, found {value}")


def _compile(model: str, backends: list[str], plan: Any, weights: str, bench: Any) -> tuple[Any, ...]:
    """Artifacts of one model; the first that fails is the error."""
    from edgejoule.bench import Event
    from edgejoule.catalog import find_model
    from edgejoule.errors import BackendError
    from edgejoule.records import Artifact
    from edgejoule.stages import compile_model

    artifacts = []
    bench.notify(Event("compile", f"{model} for {', '.join(backends)}", 0, len(backends)))
    for result in compile_model(find_model(model, allow_code=True), backends, plan, weights, bench):
        if not isinstance(result, Artifact):
            raise BackendError(f"{result.variant} @ {result.backend}: {result.reason}")
        artifacts.append(result)
        bench.notify(Event("compile", result.label, len(artifacts), len(backends)))
    return tuple(artifacts)


def _flat(row: Any) -> dict[str, Any]:
    """The fixed shape of a ranked row: plain numbers, with the intervals beside them."""
    return {name: found.value if (found := getattr(row, name)) else None for name in ("sam", "efficiency_pct_per_mj")}


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, allow_nan=False))


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
