"""The joint of training: hands labelled data, a recipe and a network to the loop, and keeps what comes out.

Each run has a key, a hash of all that determines its weights; a run whose key and weights are there is not made again, one that
was interrupted goes on from its checkpoint. With several processes (``accelerate launch``) the first alone writes and tells.
Knows no backend, no meter and no ranking.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule import registry
from edgejoule.bench import Bench, Event, writable
from edgejoule.errors import DataError, ModelError, SpecError, TrainingError
from edgejoule.plain import digest
from edgejoule.records import Accuracy, Epoch, Failure, ModelSpec, Training
from edgejoule.study_file import TrainPlan
from edgejoule.teaching import find_recipe, named_distiller, open_data, teacher_id
from edgejoule.trained import is_there, write_weights

if TYPE_CHECKING:
    from edgejoule.seams import LabelledData
    from edgejoule.store import Store
    from edgejoule.train.recipe import Recipe

VERSION = 1  # raise it with any change of what a recipe, a seed and data give: finished runs are then made anew
OF_ONE_RUN = (ModelError, SpecError, TrainingError)


@dataclass(frozen=True, slots=True)
class Hardware:
    """How a run is spread over the machine. It decides nothing but rounding, except that batch norms and mixing see one micro-batch."""

    accumulate: int = 1
    workers: int | None = None  # None: as many as help
    device: str = "auto"
    checkpoint_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One training run to make. ``spec`` is the catalog's; ``head`` names a dense head for detection and segmentation."""

    spec: ModelSpec
    data: str
    recipe: str
    seed: int
    weights: str = "auto"
    distill: str = ""
    head: str = ""
    max_bad_images: int = 0
    mixed_precision: str = "no"


def check(plan: TrainPlan, head: str = "") -> None:
    """Raises before any work for what would stop a run later: data, recipe or teacher that is not there or does not fit."""
    data, recipes = open_data(plan.data), [find_recipe(text) for text in plan.recipes]
    for recipe in recipes:
        if recipe.kind != data.kind:
            raise SpecError(f"the recipe {recipe.name} is for {recipe.kind}, and {plan.data} is a {data.kind} set: name one that fits")
    if data.kind != "classification":
        from edgejoule.zoo.dense import HEADS, head_of

        if not head:
            raise SpecError(f"{plan.data} is a {data.kind} set: name a head with --head, one of {', '.join(HEADS[data.kind])}")
        head_of(data.kind, head)
    if head and data.kind == "classification":
        raise SpecError(f"--head {head} is for detection and segmentation, and {plan.data} is a classification set: leave it out")
    if plan.distill:
        from edgejoule.train import distil

        teacher_id(distil.canonical(plan.distill))
        if data.kind != "classification":
            raise SpecError(f"distillation is for classification, and {plan.data} is a {data.kind} set: leave it out")
    for name in ("train", "validation", "test") if data.kind == "classification" else ():
        if not len(data.split(name)):
            raise DataError(f"the {name} split of {plan.data} holds no images, and all three are needed: give it a share, as in {name}=0.1")


def about(recipe: str) -> str:
    """What a recipe is for, what it should give and what it costs, on a few lines."""
    found = find_recipe(recipe)
    return f"{recipe}: {found.about}\n  expected: {found.expect}\n  cost: {found.cost}\n  source: {found.source}"


def runs_of(specs: Sequence[ModelSpec], plan: TrainPlan, seed: int, head: str = "") -> tuple[Run, ...]:
    """The runs of a plan, seeds innermost: every model by every recipe with every seed, each once."""
    from edgejoule.train import recipes

    data, shared = registry.canonical(plan.data), (plan.weights, plan.distill, head, plan.max_bad_images, plan.mixed_precision)
    return tuple(
        Run(spec, data, recipe, seed + n, *shared)
        for spec in {spec.builder: spec for spec in specs}.values()
        for recipe in dict.fromkeys(map(recipes.canonical, plan.recipes))
        for n in range(plan.seeds)
    )


def train_all(
    runs: Sequence[Run], out: Path, store: Store | None, number: int, bench: Bench, hardware: Hardware = Hardware()
) -> Iterator[Training | Failure]:
    """Every run, one after another: what came out, or why nothing did. Those that the store holds already are not made again.

    ``store`` is None in all processes but the first. Raises what stops them all: data that cannot be read, a disk that is full.
    """
    opened = {text: open_data(text) for text in dict.fromkeys(run.data for run in runs)}  # once: shards are indexed when opened
    for done, run in enumerate(runs):
        bench.notify(Event("train", f"{run.spec.name}, {run.recipe}, seed {run.seed}: run {done + 1} of {len(runs)}"))
        try:
            training = train_one(run, opened[run.data], out, store, number, bench, hardware)
        except OF_ONE_RUN as error:
            if processes() > 1:
                raise  # in one process only, perhaps: the others must end, too, and not take the next run's messages for this one's
            yield Failure(run.spec.name, "", "train", f"{run.recipe}, seed {run.seed}: {error}")
            continue
        if training is not None:
            yield training


@dataclass(frozen=True, slots=True)
class _Start:
    """All that determines what a run gives, and the network that it begins with."""

    key: str
    spec: ModelSpec  # as trained
    recipe: Recipe
    recipe_text: str
    distill_text: str
    teacher_id: str
    origin: str
    module: Any  # nn.Module
    initial: str
    initial_id: str
    file: Path  # of the weights, relative to the results' folder


def train_one(
    run: Run, data: LabelledData, out: Path, store: Store | None, number: int, bench: Bench, hardware: Hardware
) -> Training | None:
    """One run, from the store, from its checkpoint or from the beginning; None in all processes but the first.

    Raises TrainingError, ModelError, SpecError, DataError and OutputError.
    """
    from edgejoule.train.loop import train

    start = _start(run, data)
    before = store.trainings().get(start.key) if store is not None else None
    if _agreed(before is not None and is_there(before, out / start.file), hardware):
        return before
    settings = _settings(run, start, out, hardware)
    task = _task(run, data, start, out, settings.workers)

    def keep(epoch: Epoch) -> None:
        if store is not None:
            store.add_epoch(start.key, epoch)

    done = train(start.module, task, start.recipe, settings, on_epoch=keep, notify=bench.notify)
    if store is None:
        return None
    accuracy, missed = _tested(done.module, data, start.spec, run, settings, bench)
    noted = None if run.head else start.spec  # a network with a head is no row of the catalog
    weights_id = write_weights(done.module, out / start.file, noted, before.weights_id if before else "")
    training = Training(
        key=start.key,
        spec=start.spec,
        initial=start.initial,
        initial_id=start.initial_id,
        data=run.data,
        origin=start.origin,
        recipe=start.recipe_text,
        distill=start.distill_text,
        seed=run.seed,
        weights_id=weights_id,
        weights=str(start.file),
        steps=done.steps,
        seconds=done.seconds,
        processes=done.processes,
        mixed_precision=done.mixed_precision,
        versions=done.versions,
        validation=_validation(done.epochs, task, data),
        accuracy=accuracy,
        bad_images=done.bad_images + missed,
        head=run.head,
        teacher_id=start.teacher_id,
    )
    if before is None:
        store.add_training(number, training)
    return training


def trained_spec(spec: ModelSpec, data: LabelledData, recipe: Recipe) -> ModelSpec:
    """The row of the network as it will be: the data's classes and name, the recipe's crop, nothing published."""
    from edgejoule.train.augment import preprocessing_for

    preprocessing = preprocessing_for(spec.preprocessing, recipe) if data.kind == "classification" else spec.preprocessing
    return replace(spec, num_classes=len(data.classes), dataset=data.dataset, preprocessing=preprocessing, published=None, plain="")


def _start(run: Run, data: LabelledData) -> _Start:
    from edgejoule import zoo
    from edgejoule.train import distil, recipes

    recipe = find_recipe(run.recipe)
    spec = trained_spec(run.spec, data, recipe)
    if run.head:
        module, initial, initial_id = zoo.dense_for_training(spec, run.head, run.seed, run.weights, recipe.drop_path)
    else:
        module, initial, initial_id = zoo.for_training(spec, run.seed, run.weights, recipe.drop_path)
    texts = (recipes.canonical(run.recipe), distil.canonical(run.distill))
    origin = data.origin()
    taught_by = teacher_id(run.distill)
    network = (spec.builder, spec.num_classes, spec.dataset, spec.preprocessing, initial_id, run.head)
    how = (texts[0], distil.canonical(run.distill, weights=False), taught_by, run.mixed_precision)
    key = digest([VERSION, *network, origin, *how, run.seed])
    name = re.sub(r"[^\w.-]+", "_", f"{spec.name}_{run.head}" if run.head else spec.name)
    file = Path("weights") / f"{name}-seed{run.seed}-{key[:12]}.safetensors"
    return _Start(key, spec, recipe, *texts, taught_by, origin, module, initial, initial_id, file)


def _settings(run: Run, start: _Start, out: Path, hardware: Hardware) -> Any:
    from edgejoule.train.loop import Settings

    return Settings(
        folder=writable(out / "checkpoints" / start.file.stem),
        key=start.key,
        seed=run.seed,
        mixed_precision=run.mixed_precision,  # type: ignore[arg-type]  # the study or the verb has checked both
        accumulate=hardware.accumulate,
        workers=_workers(hardware),
        checkpoint_s=hardware.checkpoint_s,
        max_bad_images=run.max_bad_images,
        device=hardware.device,  # type: ignore[arg-type]
    )


def _workers(hardware: Hardware) -> int:
    """Readers of images beside each process: none on a CPU, which they would share, up to eight where a GPU computes."""
    import torch

    if hardware.workers is not None:
        return hardware.workers
    if hardware.device == "cpu" or not torch.cuda.is_available():
        return 0
    return max(1, min(8, (os.cpu_count() or 2) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


# ---------------------------------------------------------------- what is learned


def _task(run: Run, data: LabelledData, start: _Start, out: Path, workers: int) -> Any:
    """The task of the loop: classification, with a teacher where one is asked for; detection or segmentation."""
    splits: tuple[Any, Any] = (data.split("train"), data.split("validation"))
    if data.kind == "detection":
        from edgejoule.train.dense import Detection

        return Detection(*splits, start.recipe, run.seed, frozen_statistics=start.initial != "random", workers=workers)
    if data.kind == "segmentation":
        from edgejoule.train.dense import Segmentation

        return Segmentation(*splits, start.recipe, run.seed, workers=workers)
    from edgejoule.train.classification import Classification

    teacher = (run.distill, start.spec, run.seed, start.recipe, start.origin, out / "teacher")
    distiller = named_distiller(*teacher) if run.distill else None
    classes, preprocessing = start.spec.num_classes, start.spec.preprocessing
    return Classification(
        *splits, classes, preprocessing, start.recipe, run.seed, distiller, workers=workers, max_bad_images=run.max_bad_images
    )


def _validation(epochs: Sequence[Epoch], task: Any, data: LabelledData) -> Accuracy | None:
    """The last epoch's headline score: what recipes are chosen by. The last, never the best: the best of many is luck."""
    if not epochs or task.headline not in epochs[-1].scores:
        return None
    name = data.dataset if task.headline == "top1" else f"{data.dataset} {task.headline}"
    return Accuracy(name, "validation", epochs[-1].scores[task.headline], "measured", f"epoch {epochs[-1].number}, float32 in torch")


def _tested(module: Any, data: LabelledData, spec: ModelSpec, run: Run, settings: Any, bench: Bench) -> tuple[Accuracy | None, int]:
    """Top-1 on the test split, which nothing was chosen by, and how many of its images could not be read; None for dense tasks.

    Raises BadImageError for more such images than are allowed.
    """
    if data.kind != "classification":
        return None, 0
    import torch

    from edgejoule.datasets.classification import scores
    from edgejoule.train.classification import logits

    images = data.split("test")
    device = torch.device("cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu")
    bench.notify(Event("train", f"{spec.name}: {len(images)} test images"))
    options = {"workers": settings.workers, "max_bad_images": run.max_bad_images}
    found, labels, bad = logits(module.to(device), images, spec.preprocessing, device, **options)
    top1 = scores(found, labels, data.classes).top1
    said = (data.dataset, "test", top1.value, "measured", "float32 in torch", top1.n, top1.low, top1.high)
    return Accuracy(*said, origin=data.origin()), len(bad)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is kept


def _agreed(decision: bool, hardware: Hardware) -> bool:
    """The first process's decision, in all of them."""
    if processes() == 1:
        return decision
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from edgejoule.train.run import LONGEST_WAIT

    PartialState(cpu=hardware.device == "cpu", timeout=LONGEST_WAIT)  # it makes the group that the loop uses, too
    return bool(broadcast_object_list([decision])[0])


def processes() -> int:
    """How many train together: what ``accelerate launch`` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and tells: the only one, or the first of ``accelerate launch``."""
    return int(os.environ.get("RANK", "0")) == 0
