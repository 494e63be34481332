"""The joint of accuracy: from stored trainings and evaluations to the one figure that a measurement carries into rankings.

What was measured here stands before what others published, and says so; what is known of other seeds stands before one lucky training.
Everything is computed again from records at any time. Opens no store, runs no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edgejoule.caveats import caveat
from edgejoule.errors import ArtifactError
from edgejoule.records import Accuracy, Artifact, Caveat, Evaluation, Interval, ModelSpec, Training

TEST = "test"
BUDGET_PCT = 1.0  # points of top-1 that compiling may cost where nothing else was asked for


def accuracy_of(artifact: Artifact, trainings: Iterable[Training], evaluations: Iterable[Evaluation]) -> Accuracy | None:
    """The top-1 of an artifact, the first of these that is known; None where nothing is.

    1. Its weights are those of a training which was made with several seeds: the mean over the seeds, its t-interval and standard
       deviation. Where the artifact itself was evaluated on the same images, all are shifted by its own top-1 less its training's, so
       that what compiling lost is not forgotten (assumed the same for every seed; clipped to [0, 1]). The interval is about training:
       the test images are the same for all seeds, and ``n`` says how many they are.
    2. Its newest evaluation on a test split, with Wilson's interval.
    3. The float32 accuracy of the training that made its weights.
    4. What the catalog says was published.

    Of a network that an optimising recipe changed only an evaluation counts: what its model got right is another network's.
    """
    trainings = tuple(trainings)
    own = training_of(artifact, trainings)
    evaluated = evaluation_of(artifact, evaluations, own)
    if own is not None and own.accuracy is not None:
        seeds = seeds_of(own, trainings)
        if len(seeds) > 1:
            return _over_seeds(seeds, _lost(own, evaluated), evaluated)
    if evaluated is not None:
        top1 = evaluated.scores.top1
        source = f"evaluated on {evaluated.data} in its own runtime"
        return Accuracy(
            evaluated.dataset, evaluated.split, top1.value, "measured", source, top1.n, top1.low, top1.high, origin=evaluated.origin
        )
    if own is not None and own.accuracy is not None:
        return own.accuracy
    return published_accuracy(artifact.variant.spec)


def doubts_of(artifact: Artifact, trainings: Iterable[Training], evaluations: Iterable[Evaluation]) -> tuple[Caveat, ...]:
    """What must be said beside ``accuracy_of``: that the compiled file itself was not evaluated, or what its evaluation doubts."""
    trainings = tuple(trainings)
    own = training_of(artifact, trainings)
    evaluated = evaluation_of(artifact, evaluations, own)
    if evaluated is not None:
        return (*evaluated.caveats, *_lost_too_much(artifact, evaluated, own))
    if own is None or own.accuracy is None:
        published = artifact.variant.weights == "file" and published_accuracy(artifact.variant.spec) is not None
        return (caveat("weights_of_file", f"{artifact.variant.label} was made from a file"),) if published else ()
    return (caveat("accuracy_of_training", f"{100 * own.accuracy.value:.2f} % on {own.accuracy.dataset}, {own.recipe}, seed {own.seed}"),)


def _lost_too_much(artifact: Artifact, evaluated: Evaluation, own: Training | None) -> tuple[Caveat, ...]:
    """Where even the least drop that the labelled images allow is beyond the budget that the artifact was compiled with."""
    drop = evaluated.drop or _unpaired(evaluated, own)
    if artifact.variant.weights == "random" or drop is None or drop.low is None:
        return ()  # random weights had no budget: near ties
    if 100 * drop.low <= (budget := _budget_of(artifact)):
        return ()
    fell = f"top-1 fell by {100 * drop.value:.1f} points, at least {100 * drop.low:.1f}"
    seen = f"{fell}, on {evaluated.scores.n} images; the budget is {budget:g}"
    return (caveat("accuracy_lost", seen),)


def _budget_of(artifact: Artifact) -> float:
    """Points of top-1 that the artifact may lose. Raises ArtifactError where its manifest was edited to something that is no number."""
    said = artifact.notes.get("budget_pct", str(BUDGET_PCT))
    try:
        budget = float(said)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        raise ArtifactError(f"the manifest in {artifact.folder} allows {said!r} points of top-1, which is no number: compile again")
    return budget


def _unpaired(evaluated: Evaluation, own: Training | None) -> Interval | None:
    """The drop from what the training scored on as many of the same images, where the float32 network did not run beside the artifact.

    From end to end of the two intervals: wider than a paired one, so that it condemns less.
    """
    top1, trained = evaluated.scores.top1, own.accuracy if own is not None else None
    if trained is None or trained.n != evaluated.scores.n or trained.low is None or top1.high is None:
        return None
    return Interval(trained.value - top1.value, trained.low - top1.high, None, evaluated.scores.n)


def published_accuracy(spec: ModelSpec) -> Accuracy | None:
    """The catalog's top-1, labelled as published; None where nobody published one."""
    published = spec.published
    if published is None or published.top1_pct is None:
        return None
    return Accuracy(spec.dataset, "validation", published.top1_pct / 100, "published", published.source)


def training_of(artifact: Artifact, trainings: Iterable[Training]) -> Training | None:
    """The training that ended with the artifact's weights, the newest of several; None for weights from elsewhere, or changed since."""
    if artifact.variant.optimized:
        return None
    return next((one for one in reversed(tuple(trainings)) if one.weights_id == artifact.variant.weights_id), None)


def evaluation_of(artifact: Artifact, evaluations: Iterable[Evaluation], own: Training | None = None) -> Evaluation | None:
    """The artifact's evaluation on a test split: of the data that was used last, the one on most images, of equals one beside the
    float32 network, and the newest of those.

    Of an artifact whose training was tested here, ``own``, only an evaluation on the same images counts, all of them.
    """
    mine = [one for one in evaluations if one.artifact_sha256 == artifact.sha256 and one.split == TEST]
    if own is not None and own.accuracy is not None:
        mine = [one for one in mine if one.origin == own.origin and _covers(one, own.accuracy)]
    if not mine:
        return None
    newest = max(mine, key=lambda one: one.evaluated_at)
    alike = [one for one in mine if (one.dataset, one.origin) == (newest.dataset, newest.origin)]
    return max(alike, key=lambda one: (one.scores.n, one.drop is not None, one.evaluated_at))


def _covers(one: Evaluation, accuracy: Accuracy) -> bool:
    return accuracy.n is None or one.scores.n + one.bad_images >= accuracy.n


def seeds_of(own: Training, trainings: Iterable[Training]) -> tuple[Training, ...]:
    """The tested trainings that differ from ``own`` in nothing but the seed, ``own`` among them, by seed; of one seed the newest."""
    alike = [one for one in trainings if one.accuracy is not None and _but_for_seed(one) == _but_for_seed(own)]
    return tuple(sorted({**{one.seed: one for one in alike}, own.seed: own}.values(), key=lambda one: one.seed))


def over_seeds(trainings: Iterable[Training]) -> tuple[tuple[Training, Accuracy], ...]:
    """For each model and recipe its first seed's training, and the test accuracy over all seeds (dense tasks: the validation score's)."""
    groups: dict[tuple[object, ...], list[Training]] = {}
    for one in trainings:
        score = one.accuracy or one.validation
        if score is not None:
            groups.setdefault(_but_for_seed(one), []).append(replace(one, accuracy=score))
    found = []
    for group in groups.values():
        seeds = sorted({one.seed: one for one in group}.values(), key=lambda one: one.seed)
        accuracy = _over_seeds(seeds, 0.0, None) if len(seeds) > 1 else seeds[0].accuracy
        assert accuracy is not None
        found.append((seeds[0], accuracy))
    return tuple(found)


def _but_for_seed(one: Training) -> tuple[object, ...]:
    """What trainings that differ in their seed alone have in common: not where data and teachers lie, but what they are."""
    from edgejoule.train.distil import canonical

    begun = "" if one.initial == "random" else one.initial_id  # random weights are made from the seed
    taught = (canonical(one.distill, weights=False), one.teacher_id)
    return one.spec.name, one.head, one.origin, one.recipe, *taught, one.initial, begun, one.mixed_precision


def _over_seeds(seeds: Sequence[Training], lost: float, evaluated: Evaluation | None) -> Accuracy:
    from edgejoule.measure.stats import t_interval

    known = [one.accuracy for one in seeds if one.accuracy is not None]
    values = [accuracy.value for accuracy in known]
    found = t_interval(values)
    value, low, high = (None if bound is None else _clipped(bound - lost) for bound in (found.value, found.low, found.high))
    assert value is not None
    how = "; less what compiling lost" if evaluated is not None and lost else ""
    return replace(
        known[0],
        value=value,
        kind="measured",
        source=f"{len(values)} seeds of {seeds[0].recipe}, float32 in torch{how}",
        low=low,
        high=high,
        seeds=len(values),
        std=_deviation(values),
    )


def _lost(own: Training, evaluated: Evaluation | None) -> float:
    """How much of its training's top-1 an artifact lost on the same images, as a fraction; 0 where that is not known."""
    if own.accuracy is None or evaluated is None or (evaluated.origin, evaluated.dataset) != (own.origin, own.accuracy.dataset):
        return 0.0
    same = own.accuracy.n in (None, evaluated.scores.n)
    return own.accuracy.value - evaluated.scores.top1.value if same else 0.0


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, value))


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


# ---------------------------------------------------------------- how much seeds and recipes matter


@dataclass(frozen=True, slots=True)
class RecipeSpread:
    """One recipe's test top-1 over its seeds, as fractions; ``std`` is None for one seed."""

    recipe: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: Interval  # t-interval over the seeds, clipped to [0, 1]
    std: float | None


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the top-1 of one model on one data set varies with the seed, and with the recipe. Fractions; None where not known."""

    model: str
    dataset: str
    how: str  # what all the trainings share: what they began with, and their teacher
    recipes: tuple[RecipeSpread, ...]
    seed_std: float | None  # pooled over the recipes
    recipe_std: float | None  # of the recipes' own means, chance of the seed taken off


def spread(trainings: Iterable[Training]) -> tuple[Spread, ...]:
    """For each model that was trained more than once on the same data: recipes by seeds, and the standard deviation that each brings.

    Recipes are taken as a random effect: ``y_ij = m + r_i + e_ij``. With a recipes, n_i seeds each, N in all, ``MSE`` = the sum of squares
    within recipes over N - a, and ``MSA`` = the sum of n_i (mean_i - mean)^2 over a - 1, the ANOVA estimators are ``seed_std^2 = MSE`` and
    ``recipe_std^2 = (MSA - MSE) / n0`` with ``n0 = (N - sum of n_i^2 / N) / (a - 1)``; a negative estimate is 0. Known only for N > a, and
    the second for a > 1. Source: Searle, Casella and McCulloch 1992, "Variance Components", section 3.6 (unbalanced one-way).
    """
    models: dict[tuple[object, ...], dict[str, dict[int, Training]]] = {}
    for one in trainings:
        if one.accuracy is not None:
            model = _but_for_seed(replace(one, recipe=""))
            models.setdefault(model, {}).setdefault(one.recipe, {})[one.seed] = one
    found = [_spread([list(seeds.values()) for seeds in recipes.values()]) for recipes in models.values()]
    return tuple(one for one in found if sum(len(recipe.values) for recipe in one.recipes) > 1)


def _spread(groups: Sequence[Sequence[Training]]) -> Spread:
    first = groups[0][0]
    assert first.accuracy is not None
    rows = tuple(_recipe_spread(group) for group in groups)
    within, between = variance_components([row.values for row in rows])
    started = f"initial weights {first.initial}"
    return Spread(
        first.spec.name,
        first.accuracy.dataset,
        f"{started}, learning from {first.distill}" if first.distill else started,
        rows,
        None if within is None else math.sqrt(within),
        None if between is None else math.sqrt(between),
    )


def _recipe_spread(group: Sequence[Training]) -> RecipeSpread:
    from edgejoule.measure.stats import t_interval

    ordered = sorted(group, key=lambda one: one.seed)
    values = tuple(one.accuracy.value for one in ordered if one.accuracy is not None)
    deviation, mean = _deviation(values) if len(values) > 1 else None, t_interval(values)
    low, high = (None if bound is None else _clipped(bound) for bound in (mean.low, mean.high))
    mean = Interval(mean.value, low, high, mean.n)
    return RecipeSpread(ordered[0].recipe, tuple(one.seed for one in ordered), values, mean, deviation)


def variance_components(groups: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """Variances within and between groups of values, by the formulas of ``spread``; every group holds at least one value."""
    a, total = len(groups), sum(map(len, groups))
    if total <= a:
        return None, None
    means = [math.fsum(group) / len(group) for group in groups]
    inside = math.fsum((value - mean) ** 2 for group, mean in zip(groups, means, strict=True) for value in group) / (total - a)
    if a < 2:
        return inside, None
    grand = math.fsum(value for group in groups for value in group) / total
    among = math.fsum(len(group) * (mean - grand) ** 2 for group, mean in zip(groups, means, strict=True)) / (a - 1)
    effective = (total - sum(len(group) ** 2 for group in groups) / total) / (a - 1)
    return inside, max(0.0, (among - inside) / effective)
