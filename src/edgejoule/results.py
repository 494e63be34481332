"""From stored trials to measurements, rankings and the page: everything here can be computed again at any time.

Measures nothing, compiles nothing, and changes nothing in the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule import __version__, registry
from edgejoule.accuracies import Spread, accuracy_of, doubts_of, spread
from edgejoule.catalog import find_model
from edgejoule.caveats import caveat
from edgejoule.errors import EdgejouleError, MeterError, RankError
from edgejoule.records import Artifact, Caveat, Epoch, Evaluation, Failure, Measurement, Ranking, Screened, Training, Trial
from edgejoule.study_file import BESIDE, RankPlan, parse_study

if TYPE_CHECKING:  # the store brings SQLAlchemy, which ranking a table does without
    from edgejoule.measure.compare import Verdict
    from edgejoule.rank.groups import GroupKey
    from edgejoule.rank.table import Entry
    from edgejoule.reproduce import Beside
    from edgejoule.store import Store


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a results file says, and where its files are."""

    store: Path
    report: Path | None
    screened: tuple[Screened, ...]
    measurements: tuple[Measurement, ...]
    rankings: tuple[Ranking, ...]
    failures: tuple[Failure, ...]
    beside: tuple[Beside, ...] = ()  # where the study asks for a printed table's latencies
    trainings: tuple[Training, ...] = ()
    epochs: Mapping[str, tuple[Epoch, ...]] = field(default_factory=dict)  # by the training's key
    spreads: tuple[Spread, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()


def measurements(store: Store, trials: Sequence[Trial] | None = None) -> tuple[Measurement, ...]:
    """Every measurement that the stored trials, or those given of them, hold; of one variant measured twice in one way, the newest.

    Its accuracy is what ``accuracies`` makes of the stored trainings and evaluations, else the published one.
    """
    from edgejoule.measure.summary import summarise

    artifacts, trainings, evaluations = store.artifacts(), tuple(store.trainings().values()), store.evaluations()
    groups: dict[tuple[Any, ...], list[Trial]] = {}  # a runtime's environment may have been renewed, which the fingerprint does not see
    for trial in store.trials() if trials is None else trials:
        at = trial.environment
        same = (trial.artifact_sha256, trial.workload, trial.protocol, trial.meter, at.fingerprint, tuple(sorted(at.versions.items())))
        groups.setdefault(same, []).append(trial)
    newest: dict[tuple[Any, ...], Measurement] = {}
    for group in sorted(groups.values(), key=lambda group: max(trial.started_at for trial in group)):
        artifact = artifacts[group[0].artifact_sha256]
        found = summarise(group, artifact, accuracy_of(artifact, trainings, evaluations))
        doubts = (*_still_doubted(found, evaluations), *doubts_of(artifact, trainings, evaluations), *_of_size_only(found.variant))
        found = replace(found, caveats=doubts)
        weights = artifact.variant.weights_id  # of one model, trained twice, both are shown
        alike = (
            found.variant,
            weights,
            found.backend,
            replace(found.workload, images_sha256=""),
            found.protocol,
            found.meter,
            found.fingerprint,
        )
        newest[alike] = found
    return tuple(newest.values())


def _of_size_only(variant: str) -> tuple[Caveat, ...]:
    """What is said of a variant whose passes save bytes alone: sparse weights, and weights of 4 bits."""
    calls = registry.parse_recipe(variant.partition(" | ")[2])
    only = [str(call) for call in calls if call.name == "prune_weights" or (call.name == "qat" and call.options.get("bits") == 4)]
    return (caveat("size_only", f"{variant.partition(' | ')[0]} went through {' and '.join(only)}"),) if only else ()


def _still_doubted(found: Measurement, evaluations: Sequence[Evaluation]) -> tuple[Caveat, ...]:
    """The doubts, but for that the file was never run where it has been evaluated since: on the device that it was carried to."""
    evaluated = any(one.artifact_sha256 == found.artifact_sha256 for one in evaluations)
    return tuple(doubt for doubt in found.caveats if doubt.code != "not_run" or not evaluated)


def compare_in_store(source: str, ours: str, theirs: str) -> dict[str, Verdict | str]:
    """Two variants of a store, each named by ``variant @ backend``, by the variant or by the model: {latency, energy}, ours over theirs.

    Repeats of one round are paired; where energies cannot be compared, the reason stands in their place. Raises RankError for a name that
    fits none or several, MeterError where two must not be compared at all.
    """
    from edgejoule.measure.compare import compare_trials
    from edgejoule.store import Store

    with Store.open(source, create=False) as store:
        artifacts = store.artifacts()
        shas = [_only_artifact(artifacts, name) for name in (ours, theirs)]
        trials = [[trial for trial in store.trials() if trial.artifact_sha256 == sha] for sha in shas]
    found: dict[str, Verdict | str] = {"latency": compare_trials(trials[0], trials[1], "latency")}
    try:
        found["energy"] = compare_trials(trials[0], trials[1], "energy")
    except MeterError as error:  # the latencies can be compared all the same
        found["energy"] = str(error)
    return found


def _only_artifact(artifacts: Mapping[str, Artifact], name: str) -> str:
    """The hash of the one artifact that a name fits."""

    def known_as(sha: str, artifact: Artifact) -> tuple[str, ...]:
        return f"{artifact.label} #{sha[:8]}", artifact.label, artifact.variant.label, artifact.variant.spec.name

    names = {sha: known_as(sha, artifact) for sha, artifact in artifacts.items()}
    found: list[str] = []
    for way in range(4):
        found = [sha for sha, known in names.items() if known[way] == name]
        if len(found) == 1:
            return found[0]
        if found:
            break
    labels = [artifact.label for artifact in artifacts.values()]
    there = ", ".join(repr(known[labels.count(known[1]) < 2]) for known in names.values())
    raise RankError(f"{name!r} names {'several' if found else 'none'} of the artifacts here: name one of {there}")


def rankings(store: Store, found: tuple[Measurement, ...], plan: RankPlan) -> tuple[Ranking, ...]:
    """One ranking for each data set, device, workload, protocol, grade and scope.

    What was measured is always ranked: a baseline that is not there is left out, and a metric without meaning for the rows of
    a ranking is replaced there by efficiency; a caveat says so.
    """
    groups, plan = _groups(store, found), replace(plan, baseline=_named(plan.baseline))
    doubts = []
    if plan.baseline and not any(plan.baseline in _names(rows) for rows in groups.values()):
        doubts.append(caveat("baseline_missing", f"the baseline is {plan.baseline}"))
    ranked = [_ranking(key, rows, plan) for key, rows in groups.items()]
    return tuple(replace(ranking, caveats=(*doubts, *ranking.caveats)) for ranking in ranked)


def _ranking(key: GroupKey, rows: Sequence[Entry], plan: RankPlan) -> Ranking:
    from edgejoule.rank.ranking import rank_groups

    options: dict[str, Any] = {"a": plan.a, "b": plan.b, "baseline": plan.baseline if plan.baseline in _names(rows) else ""}
    try:
        return rank_groups({key: rows}, metric=plan.metric, **options)[0]
    except RankError as error:
        ranking = rank_groups({key: rows}, metric="efficiency", **options)[0]
        return replace(ranking, caveats=(caveat("metric_replaced", str(error)), *ranking.caveats))


def _names(rows: Sequence[Entry]) -> set[str]:
    return {name for entry in rows for name in (entry.name, entry.model)}


def rank_source(source: Path | str, plan: RankPlan, sensitive: bool = False) -> tuple[tuple[Ranking, ...], tuple[Any, ...]]:
    """Rankings of a CSV or a store, and for each its sensitivity where that is asked for."""
    from edgejoule.rank.agreement import sensitivity
    from edgejoule.rank.ranking import rank, rank_groups
    from edgejoule.rank.table import entries_from_csv

    options: dict[str, Any] = {"metric": plan.metric, "a": plan.a, "b": plan.b, "baseline": plan.baseline}
    if is_store(source):
        from edgejoule.store import Store

        with Store.open(source, create=False) as store:
            groups = _groups(store, measurements(store))
        options["baseline"] = _named(plan.baseline)
        if not groups:
            raise RankError(f"{source} holds no measurement with energy: run a study into it, with a meter that edgejoule doctor lists")
        # Models whose accuracy nobody knows stand in a group of their own, which has no order by SAM to test.
        known = [rows for rows in groups.values() if any(entry.top1_pct for entry in rows)] or list(groups.values())
        return rank_groups(groups, **options), tuple(sensitivity(rows, a=plan.a, b=plan.b) for rows in known if sensitive)
    entries = entries_from_csv(source)
    tables = (sensitivity(entries, a=plan.a, b=plan.b),) if sensitive else ()
    return (rank(entries, title=Path(source).name, **options),), tables


def besides(found: Sequence[Measurement], plan: RankPlan) -> tuple[Beside, ...]:
    """The measured median latencies beside the printed ones of ``plan.beside``.

    Once for each recipe, backend, workload, protocol and machine with its threads: figures of two kinds never share a column.
    """
    from edgejoule.reproduce import beside

    if not plan.beside:
        return ()
    column = BESIDE[plan.beside]
    factor = 1e3 if column.endswith("_ms") else 1.0
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in found:
        recipe, work = one.variant.partition(" | ")[2], one.workload
        how = (
            f"{one.backend}, {work.scenario}, batch {work.batch}, {work.images}{', end to end' if work.end_to_end else ''}, {one.protocol}"
        )
        label = f"medians: {recipe} @ {how}" if recipe else f"medians: {how}"
        groups.setdefault((recipe, label, one.fingerprint), {})[one.model] = factor * one.latency_s.value  # measured again: the newest
    labels = [label for _, label, _ in groups]
    named = {key: f"{key[1]}, environment {key[2]}" if labels.count(key[1]) > 1 else key[1] for key in sorted(groups)}
    return tuple(replace(beside(groups[key], plan.beside, column), label=label) for key, label in named.items())


def is_store(source: Path | str) -> bool:
    """Whether a path or URL names a results store and not a table."""
    if "://" in str(source):
        return True
    try:
        with Path(source).open("rb") as file:
            return file.read(16) == b"SQLite format 3\x00"
    except OSError:
        return False  # entries_from_csv says what is wrong with the path


def outcome_of(store: Store, plan: RankPlan, report: Path | None, command: str) -> Outcome:
    """All that the store says; writes the page where a path for it is given. Raises OutputError where it cannot be written."""
    from edgejoule.rank.groups import unranked

    found = measurements(store)
    studies = [run.id for run in store.runs() if run.text]  # evaluate and train may have added runs of their own since
    # Of several measuring plans each says the same.
    failures = tuple(dict.fromkeys((*store.failures(studies[-1] if studies else None), *unranked(found))))
    trainings = store.trainings()
    outcome = Outcome(
        store=Path(store.where),
        report=report,
        screened=store.screened(),
        measurements=found,
        rankings=rankings(store, found, plan),
        failures=failures,
        beside=besides(found, plan),
        trainings=tuple(trainings.values()),
        epochs={key: store.epochs(key) for key in trainings},
        spreads=spread(trainings.values()),
        evaluations=store.evaluations(),
    )
    if report is not None:
        _write_page(store, outcome, report, command)
    return outcome


def _write_page(store: Store, outcome: Outcome, page: Path, command: str) -> None:
    from edgejoule.report.html import write_html
    from edgejoule.report.report import Report

    runs, artifacts = store.runs(), store.artifacts()
    study = next((run for run in reversed(runs) if run.text), runs[-1] if runs else None)
    environments = {trial.environment.fingerprint: replace(trial.environment, runtime="") for trial in store.trials()}
    measured = {m.artifact_sha256 for m in outcome.measurements}
    report = Report(
        title=study.study if study else outcome.store.stem,
        rankings=outcome.rankings,
        measurements=outcome.measurements,
        artifacts=tuple(artifact for sha256, artifact in artifacts.items() if sha256 in measured),
        screened=outcome.screened,
        failures=outcome.failures,
        beside=outcome.beside,
        trainings=outcome.trainings,
        epochs=outcome.epochs,
        spreads=outcome.spreads,
        evaluations=tuple((artifacts[one.artifact_sha256].label, one) for one in outcome.evaluations),
        environments=tuple(environments.values()),
        study_text=study.text if study else "",
        command=study.command if study else command,
        created_at=study.created_at if study else 0.0,
        version=__version__,
    )
    write_html(page, report)


def report_store(source: Path | str, page: Path | None, command: str) -> Outcome:
    """The outcome of a results file, ranked as its newest study asks, and its page written again where a path is given."""
    from edgejoule.store import Store

    with Store.open(source, create=False) as store:
        runs = [run for run in store.runs() if run.text]
        plan = parse_study(runs[-1].text, f"the study in {source}").rank if runs else RankPlan()
        return outcome_of(store, plan, page, command)


def _named(model: str) -> str:
    """A model's own name for any of its spellings; what is none is left as it is."""
    try:
        return find_model(model).name if model else ""
    except EdgejouleError:
        return model


def _groups(store: Store, found: tuple[Measurement, ...]) -> Any:
    from edgejoule.rank.groups import entries_from_measurements

    plain = {a.variant.spec.name: a.variant.spec.plain for a in store.artifacts().values() if a.variant.spec.plain}
    groups = entries_from_measurements(found, store.screened(), plain)
    return dict(sorted(groups.items(), key=lambda group: not group[0].dataset))  # those of unknown accuracy last
