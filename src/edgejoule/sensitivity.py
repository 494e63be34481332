"""The joint of sensitivity: what each pass costs in accuracy, and saves in work, bytes and measured time, one layer at a time.

Every line is a recipe on one layer (``prune_ffn(layers=["blocks.3.mlp"], ratio=0.5)``), without recovery, so that it can be tried again
by hand. Accuracy is on the validation images of labelled data, or, without such, how often photographs get the network's own answer;
latencies are interleaved in one process. Knows the passes by their spellings and the backend by its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from edgejoule import compiling, data, optimizing, registry, stages, teaching
from edgejoule.bench import Bench, Event, cores
from edgejoule.datasets.classification import paired_difference
from edgejoule.errors import OF_ONE_MODEL, BackendError, ModelError
from edgejoule.optimize.groups import Group
from edgejoule.optimize.heads import find_heads
from edgejoule.optimize.impossible import reason
from edgejoule.optimize.neurons import find_neurons
from edgejoule.records import Artifact, Failure, Interval, ModelSpec, Variant
from edgejoule.shrunk import LayerCost
from edgejoule.study_file import CompilePlan, MeasurePlan, OptimizePlan

Key = TypeVar("Key")
RATIO, KEEP = 0.5, 0.7  # of heads and neurons that go, of tokens that stay
PHOTOS = "photos(n=64, seed=3)"
ROUNDS, ROUND_S = 15, 0.02  # each round times every network for so long, in random order
BATCH = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """One layer under one pass."""

    layer: str
    recipe: str


def trials_of(module: Any) -> tuple[Trial, ...]:
    """What can be tried on a network: half of each block's heads and neurons gone, its tokens cut, its layers in int8; in layer order."""
    heads, neurons = (_names(find, module) for find in (find_heads, find_neurons))
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    found = [Trial(name, _spelled("prune_heads", layers=[name], ratio=RATIO)) for name in heads]
    found += [Trial(name, _spelled("prune_ffn", layers=[name], ratio=RATIO)) for name in neurons]
    if reason("qat", module) is None:
        found += [Trial(name, _spelled("qat", layers=[name], epochs=0)) for name in dict.fromkeys((*heads, *neurons))]
    if reason("prune_tokens", module) is None and hasattr(module, "blocks"):
        found += [Trial(f"blocks.{i}", _spelled("prune_tokens", layers=[i], keep=KEEP)) for i in range(1, len(module.blocks))]
    return tuple(sorted(found, key=lambda trial: (order.get(trial.layer, 0), trial.recipe)))


def _names(find: Callable[[Any], Sequence[Group]], module: Any) -> list[str]:
    """The blocks that a finder knows; none of a network whose units are coupled."""
    try:
        return [group.name for group in find(module)]
    except ModelError:
        return []


def sensitivity(
    spec: ModelSpec, weights: str, plan: OptimizePlan, backend: str, bench: Bench
) -> tuple[tuple[LayerCost, ...], tuple[Failure, ...]]:
    """A line for each layer and pass, and why a pass failed on a layer; ``backend`` empty times nothing.

    Raises ModelError where nothing can be tried on the network, and what building it or reading the data raises.
    """
    for kind in (backend, _int8(backend)) if backend else ():
        registry.create("backend", kind)
    plain = optimizing.optimize(spec, weights, "", plan, bench)
    module = optimizing.network(plain, bench)
    trials = trials_of(module)
    if not trials:
        raise ModelError(f"no pass knows a layer of {spec.name}: sensitivity is for attention and feed-forward blocks")
    before, answers = _cost(plain, module), _Answers(plan, plain)
    own = answers.of(module, plain)
    made: dict[Trial, Variant] = {}
    lines: dict[Trial, LayerCost] = {}
    failures: list[Failure] = []
    for done, trial in enumerate(trials):
        bench.notify(Event("sensitivity", f"{trial.layer}: {registry.parse(trial.recipe).name}", done, len(trials)))
        try:
            variant = optimizing.optimize(spec, weights, trial.recipe, plan, bench)
            changed = optimizing.network(variant, bench)
            after = _cost(variant, changed)
            drop = answers.drop(own, answers.of(changed, variant))
        except OF_ONE_MODEL as error:
            failures.append(Failure(f"{spec.name} | {trial.recipe}", "", "sensitivity", str(error)))
            continue
        made[trial] = variant
        lines[trial] = LayerCost(
            trial.layer, _named(trial), drop, 1 - after[0] / before[0], 1 - after[1] / before[1], None, answers.n, answers.note
        )
    timed = _timed(plain, made, weights, plan, backend, bench) if backend else {}
    return tuple(replace(line, saved_time=timed.get(trial)) for trial, line in lines.items()), tuple(failures)


def _named(trial: Trial) -> str:
    """The pass without the layer, which has a column of its own."""
    call = registry.parse(trial.recipe)
    return str(registry.Call(call.name, {key: value for key, value in call.options.items() if key != "layers"}))


def _spelled(name: str, **options: Any) -> str:
    return str(registry.Call(name, options))


def _cost(variant: Variant, module: Any) -> tuple[int, int]:
    """MACs, and bytes of parameters and buffers."""
    from edgejoule.screen.cost import count

    macs = count(module, variant.spec.preprocessing.input_size).macs
    return macs, optimizing.bytes_of(module)


class _Answers:
    """The images that networks are compared on, and what they answer to each."""

    def __init__(self, plan: OptimizePlan, variant: Variant) -> None:
        self._images = teaching.open_data(plan.data).split("validation") if plan.data else None
        if self._images is not None:
            self.n, self.note = len(self._images), "top-1 on validation images"
        else:
            self.n, self.note = len(data.crops(PHOTOS, variant.spec.preprocessing)), "agreement on photographs"

    def of(self, module: Any, variant: Variant) -> Any:
        """(N,) bool: right answers where labels are known, else (N,) int64: the answers."""
        import torch

        from edgejoule.train.classification import logits

        if self._images is not None:
            found, labels, _ = logits(module, self._images, variant.spec.preprocessing, torch.device("cpu"))
            return found.argmax(-1) == labels
        preprocessing = variant.spec.preprocessing
        crops = torch.from_numpy(data.normalise(data.crops(PHOTOS, preprocessing), preprocessing))  # (N, C, H, W)
        with torch.no_grad():
            return np.concatenate([module(crops[i : i + BATCH]).argmax(-1).numpy() for i in range(0, len(crops), BATCH)])

    def drop(self, before: Any, after: Any) -> Interval:
        """Percentage points lost, with a 95 % interval over the images."""
        labelled = self._images is not None
        own = before if labelled else np.ones(len(before), dtype=bool)
        found = paired_difference(own, after if labelled else before == after)
        low, high = (None if bound is None else 100 * bound for bound in (found.low, found.high))
        return Interval(100 * found.value, low, high, found.n)


def _timed(
    plain: Variant, made: Mapping[Trial, Variant], weights: str, plan: OptimizePlan, backend: str, bench: Bench
) -> dict[Trial, Interval | None]:
    """The share of the latency that each change saves, through a backend, all interleaved; None where it could not be compiled."""
    how = CompilePlan(calibration=plan.data or "auto")
    kinds = {trial: _int8(backend) if "qat" in trial.recipe else backend for trial in made}
    with ExitStack() as opened:
        sessions: dict[Trial | None, Any] = {}
        wanted: list[tuple[Trial | None, Variant, str]] = [(None, plain, backend), *((t, v, kinds[t]) for t, v in made.items())]
        for done, (trial, variant, kind) in enumerate(wanted):
            bench.notify(Event("sensitivity", f"compiling {trial.layer if trial else variant.label} for {kind}", done, len(wanted)))
            artifact = next(compiling.compile_variant(variant, (kind,), MeasurePlan(), bench, how))
            if not isinstance(artifact, Artifact):
                if trial is None:
                    raise BackendError(f"{artifact.variant} @ {artifact.backend}: {artifact.reason}")
                continue
            session = stages.backend_of(artifact).load(artifact, cores(0))
            opened.callback(session.close)
            sessions[trial] = session, _input(variant)
        rounds = list(interleaved(sessions, bench))
    return {trial: _saved([one[trial] for one in rounds], [one[None] for one in rounds]) for trial in sessions if trial is not None}


def interleaved(sessions: Mapping[Key, tuple[Any, Any]], bench: Bench, rounds: int = ROUNDS) -> Iterator[dict[Key, float]]:
    """The median latency in seconds of every session on its images, in each round, which has an order of its own."""
    draw = np.random.default_rng(bench.seed)
    for session, images in sessions.values():
        session.infer(images)
    for done in range(rounds):
        bench.notify(Event("timing", f"round {done + 1}", done, rounds))
        found: dict[Key, float] = {}
        keys = list(sessions)
        for place in draw.permutation(len(keys)):
            session, images = sessions[keys[place]]
            times: list[float] = []
            while sum(times) < ROUND_S or len(times) < 3:
                began = time.perf_counter()
                session.infer(images)
                times.append(time.perf_counter() - began)
            found[keys[place]] = statistics.median(times)
        yield found


def _saved(seconds: Sequence[float], plain: Sequence[float]) -> Interval | None:
    """The share of the latency that is saved, from rounds in pairs."""
    from edgejoule.measure.stats import ratio_interval

    over = ratio_interval(seconds, plain)
    low, high = (None if bound is None else 1 - bound for bound in (over.high, over.low))
    return Interval(1 - over.value, low, high, over.n)


def _input(variant: Variant) -> Any:
    preprocessing = variant.spec.preprocessing
    return data.normalise(data.crops("photos(n=1)", preprocessing), preprocessing)  # (1, C, H, W)


def _int8(backend: str) -> str:
    call = registry.parse(backend)
    return str(registry.Call(call.name, {**call.options, "precision": "int8"}))
