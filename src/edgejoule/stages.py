"""The joints of the pipeline: each function hands one stage's records to the next, and a stage only what it needs.

Stages know nothing of one another; this file and the command line are the only places where they meet. One model's
error becomes a ``Failure`` and the rest goes on; what concerns the whole run (a full disk, a missing meter) is raised.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule import data, registry
from edgejoule.bench import Bench, Event, cores, writable
from edgejoule.catalog import find_model, pool
from edgejoule.errors import OF_ONE_MODEL, AgentError, ArtifactError, MeterError, OutputError, SpecError
from edgejoule.plain import digest
from edgejoule.records import Artifact, Failure, Job, ModelSpec, Protocol, Screened, Trial, Workload
from edgejoule.scenarios import scenario
from edgejoule.seams import Backend
from edgejoule.study_file import MeasurePlan, ScreenPlan

if TYPE_CHECKING:  # SQLAlchemy, which doctor and screen do without
    from edgejoule.store import Store


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
    from edgejoule.measure.plan import next_round
    from edgejoule.measure.protocols import profile
    from edgejoule.measure.temperature import cool_down, hottest_c

    protocol, threads = profile(plan.profile), cores(plan.threads)
    by_label = {entrant.artifact.label: entrant for entrant in entered}
    keys = {label: trial_keys(entrant, plan) for label, entrant in by_label.items()}
    trials = {label: stored(store, keys[label]) for label in by_label}
    labels, start_c = tuple(by_label), hottest_c()
    while waiting := next_round(trials, labels, protocol, bench.seed):
        for label in waiting:
            entrant, repeat = by_label[label], len(trials[label])
            done = sum(map(len, trials.values()))
            bench.notify(Event("measure", f"{label}, repeat {repeat + 1}", done, max(done + 1, protocol.repeats_min * len(labels))))
            cool_down(protocol.cooldown_s, start_c)
            try:
                trial = run_trial(entrant, keys[label][repeat], protocol, threads, repeat, bench)
            except OF_ONE_MODEL as error:
                labels = tuple(other for other in labels if other != label)
                yield Failure(entrant.artifact.variant.label, entrant.artifact.backend, "measure", str(error))
                continue
            store.add_trial(run, trial)
            trials[label] = (*trials[label], trial)


def trial_keys(entrant: Entrant, plan: MeasurePlan) -> tuple[str, ...]:
    """What the store knows the entrant's repeats by on this machine, as many as the plan may make.

    The fingerprint does not see what a backend's own environment holds, so its versions count here: a newer runtime may compile the same
    bytes and run them otherwise.
    """
    from edgejoule.measure.environment import environment
    from edgejoule.measure.plan import most_trials, trial_key
    from edgejoule.measure.protocols import profile

    protocol, backend = profile(plan.profile), backend_of(entrant.artifact)
    software = environment(cores(plan.threads)).fingerprint
    if getattr(backend, "environment", ""):
        software = digest([software, dict(backend.toolchain())])
    made_of = (entrant.artifact.sha256, entrant.workload, protocol, software, entrant.meter)
    return tuple(trial_key(*made_of, repeat) for repeat in range(most_trials(protocol)))


def run_trial(entrant: Entrant, key: str, protocol: Protocol, threads: int, repeat: int, bench: Bench) -> Trial:
    """One repeat in a fresh process. Raises what the worker raised, or AgentError where it died."""
    from edgejoule.fleet.dispatch import run_job, worker_argv
    from edgejoule.measure.environment import environment

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
    if worker_argv(job.artifact, bench.transport)[0] == sys.executable:
        return answer
    # It ran on this machine in its backend's environment, which holds another package or two: with a fingerprint of its own it would share
    # no ranking and no pair with what runs here. The versions stay those that ran.
    return replace(answer, environment=replace(answer.environment, fingerprint=environment(threads).fingerprint))


def check(plan: MeasurePlan, backends: Sequence[str]) -> None:
    """Raises before any work for what would stop it later: a backend, profile, image source or meter that is not there."""
    from edgejoule.measure.meters import open_meter
    from edgejoule.measure.plan import SUSTAINED
    from edgejoule.measure.protocols import base_name, profile

    for backend in backends:
        registry.create("backend", backend)
    how, work = profile(plan.profile), scenario(plan.scenario)
    if base_name(how) == SUSTAINED and (work.hz is not None or work.name == "streams"):
        raise SpecError(f"a sustained run is one inference after the other, and {plan.scenario} is not: leave one of them out")
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


def stored(store: Store, keys: Sequence[str]) -> tuple[Trial, ...]:
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
            leaf = registry.create(kind, name)
            remedy = leaf.probe()
        except SpecError as error:
            leaf, remedy = None, str(error)
        row = {"name": name, "ok": remedy is None, "remedy": remedy}
        if remedy is None and (elsewhere := getattr(leaf, "runs_here", lambda: None)()) is not None:
            row["remedy"] = f"compiles here; {elsewhere}"
        rows.append(row)
    return rows
