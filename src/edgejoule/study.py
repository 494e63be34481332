"""The whole pipeline as one function that reads like a table of contents. Knows the order of things, and nothing else."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgejoule import __version__, calibration, compiling, optimizing, registry, stages, teaching, trained, training
from edgejoule.bench import Bench, Event
from edgejoule.catalog import find_model
from edgejoule.errors import OF_ONE_MODEL, BackendError, DataError, OutputError, StudyError
from edgejoule.records import Artifact, Failure, Measurement, ModelSpec, Training, Trial
from edgejoule.results import Outcome, measurements, outcome_of
from edgejoule.store import NAME, Store
from edgejoule.study_file import CompilePlan, MeasurePlan, OptimizePlan, ScreenPlan, Study, load_study

__all__ = ["Outcome", "Study", "load_study", "run_study"]
REPORT = "report.html"
Network = tuple[ModelSpec, str]  # and its weights: auto, random or a file


def run_study(study: Study, out: Path, bench: Bench | None = None, command: str = "") -> Outcome:
    """Screen, train where that is asked for, compile, measure, rank and report. Resumes what ``out`` already holds.

    Raises EdgejouleError for what stops the whole run; one model's error becomes a row of ``failures``.
    """
    bench = bench or Bench(seed=study.study.seed)
    check_writable(out)
    for plan in study.measure:
        stages.check(plan, study.compile.backends)
    optimizing.check(study.optimize.recipes, optimize_plan(study))
    calibration.check(compile_plan(study).calibration)
    if study.train is not None:
        training.check(study.train)
    with Store.open(out / NAME) as store:
        run = store.begin_run(study.study.name, study.text, command, __version__)
        networks = train(study, screen(study, store, run, bench), out, store, run, bench)
        for plan in study.measure:
            artifacts = compile_all(study, networks, plan, store, run, bench)
            evaluate(study, artifacts, store, run, bench)
            measure(artifacts, plan, store, run, bench)
        outcome = outcome_of(store, study.rank, out / REPORT, command)
        bench.notify(Event("report", str(outcome.report)))
        return outcome


def screen(study: Study, store: Store, run: int, bench: Bench) -> tuple[ModelSpec, ...]:
    """Stage 1, stored; the specs that were kept, best NetScore first."""
    specs = {spec.name: spec for spec in stages.candidates(study.screen)}
    rows = stages.screen_models(tuple(specs.values()), study.screen, bench)
    store.add_screened(run, rows)
    kept = tuple(specs[row.name] for row in rows if row.kept)
    bench.notify(Event("screen", f"{len(kept)} of {len(rows)} candidates kept", len(rows), len(rows)))
    if not kept:
        raise StudyError(f"no candidate of {study.study.name} passes the thresholds: loosen them (edgejoule screen shows each reason)")
    return kept


def train(study: Study, specs: tuple[ModelSpec, ...], out: Path, store: Store, run: int, bench: Bench) -> tuple[Network, ...]:
    """Every kept model trained on labelled data, and stage 1 again with what that gave; without a training plan the models as they are."""
    plan = study.train
    if plan is None:
        return tuple((spec, study.screen.weights) for spec in specs)
    done: list[Training] = []
    for result in training.train_all(training.runs_of(specs, plan, study.study.seed), out, store, run, bench):
        if isinstance(result, Failure):
            store.add_failure(run, result)
            bench.notify(Event("train", f"{result.variant} failed: {result.reason}"))
        else:
            done.append(result)
    if not done:
        raise StudyError(f"nothing in {study.study.name} could be trained: {'; '.join(f.reason for f in store.failures(run)[:2])}")
    chosen = trained.chosen(done).values()
    rows = stages.screen_models([trained.measured_spec(one, done) for one in chosen], counted(study.screen), bench)
    store.add_screened(run, [replace(row, accuracy="measured") for row in rows])
    return tuple((one.spec, str(out / one.weights)) for one in chosen)


def counted(plan: ScreenPlan) -> ScreenPlan:
    """NetScore again after training, from counted params and MACs, without thresholds: those were for the published figures."""
    return replace(plan, min_top1_pct=None, max_params_m=None, max_macs_g=None, recount=True)


def evaluate(study: Study, artifacts: tuple[Artifact, ...], store: Store, run: int, bench: Bench) -> None:
    """Every artifact on the test split, in its own runtime, where the networks were trained here."""
    if study.train is None or not study.train.evaluate:
        return
    from edgejoule.evaluating import evaluate_artifact, is_whole, reference_of

    data, origin = registry.canonical(study.train.data), teaching.open_data(study.train.data).origin()
    known = {
        one.artifact_sha256 for one in store.evaluations() if (one.split, one.data, one.origin) == ("test", data, origin) and is_whole(one)
    }
    references: dict[tuple[str, str], Any] = {}  # one float network for all backends of a variant
    for artifact in artifacts:
        if artifact.sha256 in known:
            continue
        variant = artifact.variant
        if (key := (variant.label, variant.weights_id)) not in references:
            references = {key: reference_of(artifact, "auto", bench)[0]}
        try:
            found = evaluate_artifact(artifact, data, "test", bench, references[key], max_bad_images=study.train.max_bad_images)
        except (*OF_ONE_MODEL, DataError) as error:
            store.add_failure(run, Failure(variant.label, artifact.backend, "evaluate", str(error)))
            bench.notify(Event("evaluate", f"{artifact.label} failed: {error}"))
        else:
            store.add_evaluation(run, found)


def compile_all(
    study: Study, networks: tuple[Network, ...], plan: MeasurePlan, store: Store, run: int, bench: Bench
) -> tuple[Artifact, ...]:
    """Every kept model through every recipe on every backend; what fails is stored with its reason and left out."""
    artifacts: list[Artifact] = []
    variants = [(spec, weights, recipe) for spec, weights in networks for recipe in recipes_for(spec, study)]
    plan_of_passes = replace(optimize_plan(study), trained=tuple((s.builder, weights) for s, weights in networks if study.train))
    done, total = 0, len(variants) * len(study.compile.backends)
    for spec, weights, recipe in variants:
        bench.notify(Event("compile", f"{spec.name} | {recipe}" if recipe else spec.name, done, total))
        how = (compile_plan(study), plan_of_passes)
        for result in compiling.compile_model(spec, study.compile.backends, plan, weights, bench, recipe, *how):
            done += 1
            if isinstance(result, Failure):
                store.add_failure(run, result)
                bench.notify(Event("compile", f"{result.variant} @ {result.backend} failed: {result.reason}", done, total))
            elif twin := next((other for other in artifacts if other.sha256 == result.sha256), None):
                bench.notify(Event("compile", f"{result.label} is the same file as {twin.label}: measured once, as that", done, total))
            else:
                store.add_artifact(result)
                artifacts.append(result)
                bench.notify(Event("compile", f"{result.label}: {result.info.precision}, {result.bytes / 1e6:.1f} MB", done, total))
    if not artifacts:
        raise StudyError(f"nothing in {study.study.name} could be compiled: {'; '.join(f.reason for f in store.failures(run)[:2])}")
    return tuple(artifacts)


def compile_plan(study: Study) -> CompilePlan:
    """The study's compiling plan, calibrated on its training data where it has some and names no other images."""
    if study.compile.calibration != "auto" or study.train is None:
        return study.compile
    return replace(study.compile, calibration=study.train.data)


def recipes_for(spec: ModelSpec, study: Study) -> tuple[str, ...]:
    """The recipes that a model goes through, each once; the empty one alone for a model that they are not for."""
    chosen = {find_model(name).builder for name in study.optimize.models}
    return tuple(dict.fromkeys(study.optimize.recipes)) if not chosen or spec.builder in chosen else ("",)


def optimize_plan(study: Study) -> OptimizePlan:
    """The study's optimising plan, with the data and first recipe of its ``[train]`` for passes that learn, where it names no others."""
    plan, train = study.optimize, study.train
    if train is None:
        return plan
    return replace(plan, data=plan.data or train.data, train=plan.train or train.recipes[0])


def measure(artifacts: tuple[Artifact, ...], plan: MeasurePlan, store: Store, run: int, bench: Bench) -> None:
    """Stage 2: repeats until the intervals are narrow enough; every trial is in the store before the next begins."""
    for failure in stages.measure(stages.entrants(artifacts, plan, bench), plan, store, run, bench):
        store.add_failure(run, failure)
        bench.notify(Event("measure", f"{failure.variant} @ {failure.backend} failed: {failure.reason}"))


def check_writable(out: Path) -> None:
    """Raises OutputError before hours of work, not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        raise OutputError(f"cannot write into {out} ({error.strerror}): choose another folder with --out") from error


def measure_one(
    artifact: Artifact, plan: MeasurePlan, out: Path | None, bench: Bench, command: str = ""
) -> tuple[Measurement, tuple[Trial, ...]]:
    """One artifact by one plan, and the repeats it was made of; they go into ``out`` where that is given, else they are forgotten.

    Raises the error of the first trial that fails.
    """
    from edgejoule.measure.summary import with_percentiles

    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        check_writable(folder)
        with Store.open(folder / NAME) as store:
            run = store.begin_run("measure", "", command, __version__)
            store.add_artifact(artifact)
            (entrant,) = stages.entrants((artifact,), plan, bench)
            for failure in stages.measure((entrant,), plan, store, run, bench):
                raise BackendError(f"{failure.variant} @ {failure.backend}: {failure.reason}")
            # The store may hold other measurements of this artifact: with other threads, images or another meter.
            trials = stages.stored(store, stages.trial_keys(entrant, plan))
            (found,) = measurements(store, trials)
            return with_percentiles(found, trials), trials
