"""The joints of the pipeline: each function hands one stage's records to the next, and a stage only what it needs.

Stages know nothing of one another; this file and the command line are the only places where they meet. One model's
error becomes a ``Failure`` and the rest goes on; what concerns the whole run (a full disk, a missing meter) is raised.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule import data, registry
from edgejoule.bench import Bench, Event, cores, writable
from edgejoule.catalog import find_model, pool
from edgejoule.errors import (
    AgentError,
    ArtifactError,
    BackendError,
    MeterError,
    ModelError,
    OutputError,
    SpecError,
)
from edgejoule.records import (
    Artifact,
    Failure,
    Job,
    ModelSpec,
    Outputs,
    Protocol,
    Screened,
    Trial,
    Variant,
    Workload,
)
from edgejoule.scenarios import scenario
from edgejoule.seams import Backend, PassContext
from edgejoule.study_file import CompilePlan, MeasurePlan, ScreenPlan

if TYPE_CHECKING:  # SQLAlchemy, which doctor and screen do without
    from edgejoule.store import Store

OF_ONE_MODEL = (ModelError, BackendError, ArtifactError, AgentError, SpecError)


# ---------------------------------------------------------------- stage 1


def candidates(plan: ScreenPlan, allow_code: bool = False) -> tuple[ModelSpec, ...]:
    """The models that a study names, each once whatever its spellings. Raises UnknownNameError with the nearest names."""
    specs = pool(plan.pool) if plan.pool else [find_model(name, allow_code=allow_code) for name in plan.models]
    named: dict[str, ModelSpec] = {}
    for spec in specs:
        if (other := named.setdefault(spec.name, spec)).builder != spec.builder:
            raise SpecError(f"{other.builder} and {spec.builder} are both called {spec.name}: let spec() name them apart")
    return tuple(named.values())


def screen_models(specs: Sequence[ModelSpec], plan: ScreenPlan, bench: Bench) -> tuple[Screened, ...]:
    """Every candidate, best NetScore first, with the reason where it was rejected."""
    from edgejoule.screen.select import Thresholds, screen

    thresholds = Thresholds(plan.min_top1_pct, plan.max_params_m, plan.max_macs_g)
    costs = count_models(specs, bench) if plan.recount else None
    return screen(specs, thresholds, plan.alpha, plan.beta, plan.gamma, costs)


def count_models(specs: Sequence[ModelSpec], bench: Bench) -> Mapping[str, Any]:
    """Params and MACs of each model, counted on the meta device."""
    from edgejoule import zoo
    from edgejoule.screen.cost import count

    costs = {}
    for done, spec in enumerate(specs):
        bench.notify(Event("count", spec.name, done, len(specs)))
        costs[spec.name] = count(zoo.build_meta(spec), spec.preprocessing.input_size)
    return costs


# ---------------------------------------------------------------- compile


class LazyExport:
    """A network that is built and exported only when a backend really compiles: a cached artifact needs neither."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def _export(self) -> Any:
        return self._make()

    @property
    def module(self) -> Any:
        return self._export.module

    @property
    def program(self) -> Any:
        return self._export.program

    @property
    def onnx(self) -> Path:
        return Path(self._export.onnx)


def compile_model(
    spec: ModelSpec,
    backends: Sequence[str],
    plan: MeasurePlan,
    weights: str,
    bench: Bench,
    recipe: str = "",
    compiling: CompilePlan | None = None,
) -> Iterator[Artifact | Failure]:
    """One model, changed by a recipe, for each backend: an artifact, or the reason why there is none.

    ``compiling`` says what quantisation is calibrated on and what it may cost. Raises DataError for calibration images that cannot be had.
    """
    from edgejoule import zoo
    from edgejoule.calibration import material
    from edgejoule.compile.build import build
    from edgejoule.compile.export import TorchExport

    try:
        variant = replace(zoo.identify(spec, bench.seed, weights), recipe=registry.canonical(recipe))
    except OF_ONE_MODEL as error:
        name = f"{spec.name} | {recipe}" if recipe else spec.name
        yield from (Failure(name, backend, "build", str(error)) for backend in backends)
        return
    crops, _ = data.write_crops(plan.images, spec.preprocessing, writable(bench.cache / "images"))
    shape = (plan.batch, *spec.preprocessing.input_size)
    compiling = compiling or CompilePlan()
    quantises = any(registry.create("backend", backend).precision == "int8" for backend in backends)
    given = material(spec, compiling.calibration, compiling.max_drop_pct) if quantises else None
    with ExitStack() as scratch:
        export = LazyExport(lambda: TorchExport(optimized(variant, bench), shape, _scratch(bench.cache, scratch), name=variant.label))
        for backend in backends:
            try:
                yield build(
                    variant,
                    backend,
                    export,
                    crops=crops,
                    batch=plan.batch,
                    cache=bench.cache,
                    threads=cores(plan.threads),
                    outputs=lambda folder, images, threads: _outputs(folder, images, threads, plan.batch, bench),
                    material=given,
                    notify=lambda line: bench.notify(Event("compile", line)),
                )
            except OF_ONE_MODEL as error:
                yield Failure(variant.label, backend, "compile", str(error))


def optimized(variant: Variant, bench: Bench) -> Any:
    """The variant's network after its recipe: an nn.Module in eval mode. Raises ModelError and SpecError."""
    from edgejoule import zoo
    from edgejoule.optimize.recipe import apply

    module = zoo.build(variant)
    if not variant.recipe:
        return module
    with tempfile.TemporaryDirectory() as workdir:
        context = PassContext(fit=None, teacher=None, data=None, seed=variant.seed, workdir=Path(workdir))
        module, spec = apply(variant.recipe, module, variant.spec, context)
    if spec.preprocessing != variant.spec.preprocessing:
        raise ModelError(f"the recipe {variant.recipe} gives {spec.name} other images than it was made for: leave that pass out")
    return module


def _scratch(cache: Path, stack: ExitStack) -> Path:
    """A folder for one export, gone with ``stack``; first those of killed runs on this machine are removed."""
    for folder in cache.glob("export-*-*"):
        process = folder.name.split("-")[1]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    try:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"export-{os.getpid()}-", dir=writable(cache))))
    except OSError as error:
        raise OutputError(f"cannot write into {cache} ({error.strerror}): set EDGEJOULE_CACHE to a folder that you may write") from error


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _outputs(folder: Path, images: Path, threads: int, batch: int, bench: Bench) -> Outputs:
    """What the compiled file computes in a fresh process, as it will be measured."""
    from edgejoule.compile.build import PARITY_IMAGES
    from edgejoule.fleet.dispatch import run_job

    workload = Workload("offline" if batch > 1 else "single_stream", batch)
    job = Job("outputs", str(folder), str(images), workload, threads, most=PARITY_IMAGES, audit=True)
    answer = run_job(job, bench.transport)
    if not isinstance(answer, Outputs):
        raise AgentError("the worker answered with a trial where outputs were asked for: is it another version of edgejoule?")
    return answer


# ---------------------------------------------------------------- measure


@dataclass(frozen=True, slots=True)
class Entrant:
    """One artifact in one measuring plan: all that its trials' keys are made of, but for the repeat."""

    artifact: Artifact
    crops: Path
    workload: Workload
    meter: str


def entrants(artifacts: Iterable[Artifact], plan: MeasurePlan, bench: Bench) -> tuple[Entrant, ...]:
    """The artifacts with their images and meter."""
    chosen: dict[str, str] = {}
    found = []
    for artifact in artifacts:
        device = backend_of(artifact).device
        if device not in chosen:
            chosen[device] = _meter(plan.meter, device, bench)
        crops, sha256 = data.write_crops(plan.images, artifact.variant.spec.preprocessing, writable(bench.cache / "images"))
        images = registry.canonical(plan.images)
        workload = Workload(str(scenario(plan.scenario)), plan.batch, plan.end_to_end, images, sha256)
        found.append(Entrant(artifact, crops, workload, chosen[device]))
    return tuple(found)


def backend_of(artifact: Artifact) -> Backend:
    backend: Backend = registry.create("backend", artifact.backend)
    return backend


def measure(entered: Sequence[Entrant], plan: MeasurePlan, store: Store, run: int, bench: Bench) -> Iterator[Failure]:
    """Rounds of repeats, interleaved in random order, until every interval is narrow enough or the cap is reached.

    Every trial is stored the moment it exists; those that are stored already are not run again.
    """
    from edgejoule.measure.environment import environment
    from edgejoule.measure.plan import most_trials, next_round, trial_key
    from edgejoule.measure.protocols import profile
    from edgejoule.measure.temperature import cool_down, hottest_c

    protocol, threads = profile(plan.profile), cores(plan.threads)
    fingerprint = environment(threads).fingerprint
    by_label = {entrant.artifact.label: entrant for entrant in entered}

    def key(entrant: Entrant, repeat: int) -> str:
        return trial_key(entrant.artifact.sha256, entrant.workload, protocol, fingerprint, entrant.meter, repeat)

    trials = {label: _stored(store, [key(entrant, n) for n in range(most_trials(protocol))]) for label, entrant in by_label.items()}
    labels, start_c = tuple(by_label), hottest_c()
    while waiting := next_round(trials, labels, protocol, bench.seed):
        for label in waiting:
            entrant, repeat = by_label[label], len(trials[label])
            done = sum(map(len, trials.values()))
            bench.notify(Event("measure", f"{label}, repeat {repeat + 1}", done, max(done + 1, protocol.repeats_min * len(labels))))
            cool_down(protocol.cooldown_s, start_c)
            try:
                trial = run_trial(entrant, key(entrant, repeat), protocol, threads, repeat, bench)
            except OF_ONE_MODEL as error:
                labels = tuple(other for other in labels if other != label)
                yield Failure(entrant.artifact.variant.label, entrant.artifact.backend, "measure", str(error))
                continue
            store.add_trial(run, trial)
            trials[label] = (*trials[label], trial)


def run_trial(entrant: Entrant, key: str, protocol: Protocol, threads: int, repeat: int, bench: Bench) -> Trial:
    """One repeat in a fresh process. Raises what the worker raised, or AgentError where it died."""
    from edgejoule.fleet.dispatch import run_job

    job = Job(
        action="measure",
        artifact=entrant.artifact.folder,
        images=str(entrant.crops),
        workload=entrant.workload,
        threads=threads,
        key=key,
        protocol=protocol,
        meter=entrant.meter,
        repeat=repeat,
        seed=bench.seed,
    )
    answer = run_job(job, bench.transport)
    if not isinstance(answer, Trial):
        raise AgentError("the worker answered with outputs where a trial was asked for: is it another version of edgejoule?")
    return answer


def check(plan: MeasurePlan, backends: Sequence[str], recipes: Sequence[str] = ()) -> None:
    """Raises before any work for what would stop it later: a backend, pass, profile, image source or meter that is not there."""
    from edgejoule.measure.meters import open_meter
    from edgejoule.measure.protocols import profile
    from edgejoule.optimize.recipe import check as check_recipe

    for backend in backends:
        registry.create("backend", backend)
    for recipe in recipes:
        check_recipe(recipe)
    profile(plan.profile)
    data.source(plan.images)
    asked = registry.parse(plan.meter)
    if asked.name in ("auto", "none") and asked.options:
        raise SpecError(f"meter {asked.name} takes no options, found {', '.join(asked.options)}")
    if asked.name != "auto":
        meter = open_meter(plan.meter)
        if meter is not None and (missing := meter.probe()):
            raise MeterError(f"the meter {plan.meter} cannot be used here: {missing}")


def _meter(asked: str, device: str, bench: Bench) -> str:
    from edgejoule.measure.meters import choose_meter

    if registry.parse(asked).name != "auto":
        return registry.canonical(asked)
    chosen, why = choose_meter(device)
    bench.notify(Event("meter", why))
    return chosen


def _stored(store: Store, keys: Sequence[str]) -> tuple[Trial, ...]:
    """The stored trials of these keys in the order of their repeats, up to the first that is missing."""
    there = store.trial_keys()
    present = []
    for key in keys:
        if key not in there:
            break
        present.append(key)
    return tuple(sorted(store.trials(present), key=lambda trial: trial.repeat)) if present else ()


# ---------------------------------------------------------------- single artifacts, and what is there to work with


def open_artifact(folder: Path, plan: MeasurePlan, backend: str | None = None) -> Artifact:
    """An artifact from its folder, hashes checked. Raises ArtifactError, also where it was compiled for another batch or backend."""
    from edgejoule import manifest

    artifact = manifest.read(folder.absolute())
    if artifact.batch != plan.batch:
        raise ArtifactError(
            f"{folder} was compiled for batches of {artifact.batch}, not of {plan.batch}: say --batch {artifact.batch}, or compile again"
        )
    if backend is not None and registry.canonical(backend) != artifact.backend:
        raise ArtifactError(f"{folder} was compiled for {artifact.backend}, not for {backend}: leave --backend out, or compile again")
    return artifact


def check_new(out: Path) -> None:
    """Raises OutputError for a folder that is there already."""
    if os.path.lexists(out):
        raise OutputError(f"{out} is there already: name a new folder with --out")


def copy_artifact(artifact: Artifact, out: Path) -> Artifact:
    """The artifact's files and manifest, copied into ``out`` whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    check_new(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(artifact.folder, partial)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"cannot write {out} ({error.strerror}): choose another folder with --out") from error
    return replace(artifact, folder=str(out.absolute()))


def survey() -> dict[str, list[dict[str, Any]]]:
    """What works on this machine, and what the rest needs: ``{meters, backends, transports: [{name, ok, remedy}]}``."""
    from edgejoule.measure.meters import survey as survey_meters

    return {"meters": survey_meters(), "backends": _probes("backend"), "transports": _probes("transport")}


def _probes(kind: str) -> list[dict[str, Any]]:
    rows = []
    for name in registry.names(kind):
        try:
            remedy = registry.create(kind, name).probe()
        except SpecError as error:
            remedy = str(error)
        rows.append({"name": name, "ok": remedy is None, "remedy": remedy})
    return rows
