"""The joint of autotuning: which backend, precision, layout, fusion and number of threads runs one network fastest on this device.

Two races of fresh worker processes: first every backend and precision that works here, at its defaults; then the best few with one thing
changed each (threads, layout, fused layers). Only what passes the truth gate races, and what quantising brought under the budget on images
held out; where those are labelled, the winner must keep it in its own runtime too. What was found is kept by device and network. Ranks no
energy: measure the winner for that.
"""

from __future__ import annotations

import json
import math
import statistics
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgejoule import compiling, data, manifest, registry, stages
from edgejoule.bench import Bench, Event, cores, writable
from edgejoule.caveats import UNRANKED
from edgejoule.errors import OF_ONE_MODEL, ArtifactError, BackendError, SpecError
from edgejoule.measure.race import FAILED, Lane, race, ratio
from edgejoule.plain import decode, digest, encode
from edgejoule.records import Artifact, Failure, Interval, ModelSpec
from edgejoule.study_file import CompilePlan, MeasurePlan

VERSION = 2
SHORT = "quick(window_s=0.3, window_inferences=3, warmup_s=0.2, warmup_cap_s=0.4, idle_s=0.0, repeats_min=1, repeats_max=1)"
COARSE, FINE, BEST, CLOSE = 4, 6, 3, 2.0  # rounds of each race; how many of the first one's best are varied, if so close to the best


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run the network."""

    backend: str  # canonical spelling
    recipe: str
    threads: int

    @property
    def label(self) -> str:
        return f"{self.backend}{' | ' + self.recipe if self.recipe else ''}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True, slots=True)
class Tried:
    """One choice and what became of it. ``ratio``: its latency over the winner's, paired by round."""

    choice: Choice
    verdict: str  # "won", "ran to the end", "dropped …", "not raced: …", "failed: …", "over budget: …"
    latency_s: float | None = None  # median over the rounds
    ratio: Interval | None = None
    rounds: int = 0
    top1_agreement: float | None = None  # with the float32 network, on the gate's images
    drop_pct: float | None = None  # of top-1 on held-out labelled images
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The winner first. ``key`` is of the network, the device with its software, and what was allowed to race."""

    key: str
    model: str
    device: str
    max_drop_pct: float
    tried: tuple[Tried, ...]

    @property
    def winner(self) -> Tried:
        return self.tried[0]


def tune(
    spec: ModelSpec, weights: str, plan: MeasurePlan, compiling: CompilePlan, bench: Bench, backends: Sequence[str] = (), recipe: str = ""
) -> Tuning:
    """The fastest way to run a network within the budget, from the cache or raced now.

    ``backends`` restricts the race to these spellings; without them all that works here races. Raises BackendError where nothing is left.
    """
    tuner = _Tuner(spec, weights, plan, compiling, bench)
    first = [Choice(registry.canonical(one), recipe, cores(plan.threads)) for one in (backends or usable())]
    key = tuner.key(first)
    place = bench.cache / "tunings" / f"{key}.json"
    if (found := _kept(place)) is not None:
        bench.notify(Event("tune", f"{spec.name} was tuned on this device before: {place}"))
        return found
    coarse = tuner.race(first, COARSE)
    if not any(lane.seconds and not lane.left for lane in coarse):
        reasons = {*tuner.refused.values(), *(lane.left for lane in coarse)}
        raise BackendError(f"nothing that was tried runs {spec.name}: {'; '.join(sorted(reasons))[:300]}")
    fastest = min(statistics.median(lane.seconds) for lane in coarse if lane.seconds)
    best = [lane.candidate for lane in coarse if lane.seconds and statistics.median(lane.seconds) <= CLOSE * fastest][:BEST]
    fine = tuner.race([*best, *(other for one in best for other in varied(one, cores(plan.threads)))], FINE)
    found = tuner.finish(key, fine, coarse)
    data.write_whole(writable(place.parent) / place.name, json.dumps(encode(found)).encode())
    return found


def usable() -> tuple[str, ...]:
    """Every backend in every precision that works on this machine, at its defaults otherwise."""
    found = []
    for name in registry.names("backend"):
        for spelling in _precisions(name):
            try:
                leaf = registry.create("backend", spelling)
                runs_here = getattr(leaf, "runs_here", lambda: None)
                if leaf.probe() is None and runs_here() is None:
                    found.append(registry.canonical(spelling))
            except SpecError:
                continue
    return tuple(found)


def varied(choice: Choice, all_cores: int) -> Iterator[Choice]:
    """The choice with one thing changed: fewer threads, another layout, layers fused beforehand."""
    call = registry.parse(choice.backend)
    hints = typing.get_type_hints(type(registry.create("backend", choice.backend)))
    for threads in sorted({1, max(1, all_cores // 2)} - {choice.threads}):
        yield replace(choice, threads=threads)
    for layout in typing.get_args(hints.get("layout")):
        options = {**call.options, "layout": layout}
        if call.options.get("layout", "contiguous") != layout:
            yield replace(choice, backend=str(registry.Call(call.name, options)))
    if "fuse" not in choice.recipe:
        yield replace(choice, recipe=f"{choice.recipe} | fuse" if choice.recipe else "fuse")


def _precisions(name: str) -> list[str]:
    try:
        hints = typing.get_type_hints(type(registry.create("backend", name)))
    except SpecError:
        return []
    devices = typing.get_args(hints.get("device")) or ("cpu",)
    return [
        f"{name}(precision={precision!r}{f', device={device!r}' if device != 'cpu' else ''})"
        for device in devices
        for precision in typing.get_args(hints.get("precision"))
    ] or [name]


def _kept(place: Path) -> Tuning | None:
    """A tuning whose winner's artifact is still there, and whole."""
    try:
        found = decode(Tuning, json.loads(place.read_text(encoding="utf-8")))
        manifest.read(Path(found.winner.folder))
    except (OSError, ValueError, IndexError, ArtifactError):
        return None
    return found


def _fastest_first(fine: Sequence[Lane[Choice]], coarse: Sequence[Lane[Choice]]) -> list[Lane[Choice]]:
    """The lanes that may win, those dropped early behind the others; by their time over the best's of their own race, because the
    machine may have been faster in the other. What ran in both counts as in the second; what failed cannot win."""
    again = {lane.candidate for lane in fine}
    found: list[tuple[bool, float, Lane[Choice]]] = []
    for lanes, elsewhere in ((fine, frozenset()), (coarse, again)):
        sound = [(bool(lane.left), statistics.median(lane.seconds), lane) for lane in lanes if lane.seconds and not _failed(lane)]
        best = min(sound, key=_place, default=(False, 1.0, None))[1]
        found += [(left, seconds / best, lane) for left, seconds, lane in sound if lane.candidate not in elsewhere]
    return [lane for _, _, lane in sorted(found, key=_place)]


def _place(one: tuple[bool, float, object]) -> tuple[bool, float]:
    return one[:2]


def _failed(lane: Lane[Choice]) -> bool:
    return lane.left.startswith(FAILED)


class _Tuner:
    """The network being tuned, and the artifacts made so far."""

    def __init__(self, spec: ModelSpec, weights: str, plan: MeasurePlan, compiling: CompilePlan, bench: Bench) -> None:
        self.spec, self.weights, self.compiling, self.bench = spec, weights, compiling, bench
        self.plan = replace(plan, profile=SHORT, meter="none")
        self.made: dict[tuple[str, str], Artifact] = {}
        self.refused: dict[Choice, str] = {}

    def key(self, first: Sequence[Choice]) -> str:
        """Raises ModelError for weights that are not there, and DataError for images that are not or that fit another network."""
        from edgejoule import zoo
        from edgejoule.calibration import material
        from edgejoule.compile.build import BUILD_VERSION
        from edgejoule.measure.environment import environment

        variant = zoo.identify(self.spec, self.bench.seed, self.weights)
        network = [self.spec.builder, self.spec.num_classes, variant.weights_id, variant.seed, self.spec.preprocessing]
        given = material(self.spec, self.compiling.calibration, self.compiling.max_drop_pct)
        racing = {one.label: dict(registry.create("backend", one.backend).toolchain()) for one in first}
        fingerprint = environment(cores(self.plan.threads)).fingerprint
        images = [registry.canonical(self.plan.images), data.source(self.plan.images).origin()]
        work = [self.plan.batch, self.plan.scenario, images]
        return digest([VERSION, BUILD_VERSION, network, given.identity, given.max_drop_pct, racing, fingerprint, work])

    def race(self, choices: Sequence[Choice], rounds: int) -> tuple[Lane[Choice], ...]:
        racing = [one for one in dict.fromkeys(choices) if self.compiled(one) is not None]
        done = 0

        def trial(choice: Choice, number: int) -> float:
            nonlocal done
            done += 1
            self.bench.notify(Event("tune", f"{choice.label}, round {number + 1}", done, max(done, rounds * len(racing))))
            return self.seconds(choice, number)

        return race(racing, trial, rounds, self.bench.seed, OF_ONE_MODEL)

    def compiled(self, choice: Choice) -> Artifact | None:
        """The artifact, where there is one that passes the truth gate; else the reason is noted."""
        place = choice.backend, choice.recipe
        if place not in self.made:
            self.bench.notify(Event("tune", f"compiling {self.spec.name} for {choice.backend}"))
            plan = replace(self.plan, threads=choice.threads)
            (result,) = compiling.compile_model(self.spec, (choice.backend,), plan, self.weights, self.bench, choice.recipe, self.compiling)
            if isinstance(result, Failure):
                self.refused[choice] = f"not raced: {result.reason}"
                return None
            barred = UNRANKED if result.variant.weights == "random" else UNRANKED | {"budget_missed"}
            if doubts := [doubt for doubt in result.caveats if doubt.code in barred]:
                self.refused[choice] = f"not raced: {doubts[0].code.replace('_', ' ')} ({doubts[0].seen})"
                return None
            self.made[place] = result
        return self.made[place]

    def seconds(self, choice: Choice, number: int) -> float:
        """The median inference of a short trial in a fresh worker."""
        from edgejoule.measure.protocols import profile

        artifact = self.made[choice.backend, choice.recipe]
        (entrant,) = stages.entrants((artifact,), self.plan, self.bench)
        trial = stages.run_trial(entrant, "tuning", profile(SHORT), choice.threads, number, self.bench)
        return statistics.median(trial.latencies_s)

    def finish(self, key: str, fine: Sequence[Lane[Choice]], coarse: Sequence[Lane[Choice]]) -> Tuning:
        """The fastest that keeps the budget first, then the rest in the order of the second race, the first and what never raced."""
        again = {lane.candidate for lane in fine}
        lanes = [*fine, *(lane for lane in coarse if lane.candidate not in again)]
        drops: dict[Choice, float | None] = {}
        winner = None
        for lane in _fastest_first(fine, coarse):
            drop = drops[lane.candidate] = self.drop_pct(lane.candidate)
            if drop is None or drop <= self.allowed(lane.candidate):
                winner = lane.candidate
                break
        if winner is None:
            raise BackendError(f"no way to run {self.spec.name} keeps the budget of {self.compiling.max_drop_pct:g} points: allow more")
        tried = [self.tried(lane, winner, (fine, coarse)[lane.candidate not in again], drops) for lane in lanes]
        tried += [Tried(choice, why) for choice, why in self.refused.items()]
        return Tuning(key, self.spec.name, _device_name(), self.compiling.max_drop_pct, tuple(sorted(tried, key=_is_beaten)))

    def tried(self, lane: Lane[Choice], winner: Choice, beside: Sequence[Lane[Choice]], drops: Mapping[Choice, float | None]) -> Tried:
        """A lane in words and numbers; its ratio is over the winner's lane of the same race, where it ran in that."""
        artifact, drop = self.made[lane.candidate.backend, lane.candidate.recipe], drops.get(lane.candidate)
        over = drop is not None and drop > self.allowed(lane.candidate)
        verdict = f"over budget: {drop:.1f} points lost" if over else lane.left or "ran to the end"
        its = next((one for one in beside if one.candidate == winner and one.seconds), None)
        return Tried(
            lane.candidate,
            "won" if lane.candidate == winner else verdict,
            statistics.median(lane.seconds) if lane.seconds else None,
            ratio(lane, its) if its is not None and its is not lane else None,
            len(lane.seconds),
            artifact.parity.top1_agreement if artifact.parity else None,
            drop,
            artifact.folder,
        )

    def allowed(self, choice: Choice) -> float:
        """Points of top-1; any number of them where the weights are random, whose classes are near ties."""
        artifact = self.made[choice.backend, choice.recipe]
        return math.inf if artifact.variant.weights == "random" else self.compiling.max_drop_pct

    def drop_pct(self, choice: Choice) -> float | None:
        """Points of top-1 lost on the held-out split of labelled calibration data; None where nobody knows the labels."""
        from edgejoule.calibration import resolve
        from edgejoule.evaluating import evaluate_artifact, reference_of

        text = resolve(self.spec, self.compiling.calibration)
        if registry.parse(text).name in data.SOURCES:
            return None
        artifact = self.made[choice.backend, choice.recipe]
        reference, _ = reference_of(artifact, self.weights, self.bench)
        found = evaluate_artifact(artifact, text, "validation", self.bench, reference, threads=choice.threads)
        return None if found.drop is None else 100 * found.drop.value


def _is_beaten(one: Tried) -> bool:
    return one.verdict != "won"


def _device_name() -> str:
    from edgejoule.measure.environment import environment

    return environment(1).device.name
