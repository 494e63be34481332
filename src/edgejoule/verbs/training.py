"""The verb that trains: train. Under ``accelerate launch`` every process runs it, and the first alone writes and prints."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from edgejoule.errors import SpecError, StudyError, TrainingError
from edgejoule.progress import Progress
from edgejoule.verbs.options import Json, command_line, print_json, print_text

PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu")


def train(
    study: Annotated[str | None, typer.Argument(help="A study with a [train] table: a shipped name such as digits, or a file.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Train this model instead of a study's. May be repeated.")] = None,
    data: Annotated[str, typer.Option(help='digits, cifar10(path="..."), imagefolder(path="..."), coco(path="..."), …')] = "",
    recipe: Annotated[list[str] | None, typer.Option(help='deit, digits, "deit(epochs=100, batch=256)", …. May be repeated.')] = None,
    head: Annotated[str, typer.Option(help="retinanet, mask_rcnn or semantic_fpn, on the model as backbone.")] = "",
    distill: Annotated[str, typer.Option(help='A teacher, as in soft(teacher="...", weights="teacher.safetensors").')] = "",
    weights: Annotated[str, typer.Option(help="auto (pretrained where they can be had), pretrained, random, or a file.")] = "",
    seeds: Annotated[int, typer.Option(help="Train so many times, with seeds one after another.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="The first seed. Default: the study's, else 0.", min=0, max=2**32 - 1)] = None,
    out: Annotated[Path | None, typer.Option(help="Weights, checkpoints, TensorBoard files and results.sqlite go here.")] = None,
    max_bad_images: Annotated[int | None, typer.Option(help="Skip and count so many images that cannot be read.", min=0)] = None,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16. Default: the study's, else no.")] = "",
    accumulate: Annotated[int, typer.Option(help="Split each step's images into so many parts, to need less memory.", min=1)] = 1,
    workers: Annotated[int | None, typer.Option(help="Processes that read images, beside each training process.", min=0)] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one) or cpu.")] = "auto",
    checkpoint_s: Annotated[float, typer.Option(help="Write a checkpoint at least every so many seconds.", min=0.0)] = 60.0,
    as_json: Json = False,
) -> None:
    """Train or fine-tune models on labelled data, with several seeds and a teacher if you like. Run it again to resume."""
    from edgejoule import training

    asked = {"data": data, "recipe": recipe, "distill": distill, "weights": weights, "seeds": seeds, "max_bad_images": max_bad_images}
    asked["mixed_precision"] = mixed_precision
    plan, specs, name, first = _plan(study, model or [], asked, seed)
    for value, known, option in ((plan.mixed_precision, PRECISIONS, "--mixed-precision"), (device, DEVICES, "--device")):
        if value not in known:
            raise SpecError(f"{option} {value!r} is not one of {', '.join(known)}")
    training.check(plan, head)
    hardware = training.Hardware(accumulate, workers, device, checkpoint_s)
    runs = training.runs_of(specs, plan, first, head)
    _train(runs, out or Path("runs") / name, hardware, name, as_json)


def _train(runs: Any, out: Path, hardware: Any, name: str, as_json: bool) -> None:
    """Makes the runs; the first process keeps and prints them. Raises TrainingError where none succeeded."""
    from edgejoule import __version__, training
    from edgejoule.bench import Bench
    from edgejoule.records import Failure
    from edgejoule.study import check_writable

    done, failed, first = [], [], training.is_first()
    with ExitStack() as opened:
        bench, store, number = Bench(), None, 0
        if first:
            from edgejoule.store import NAME, Store

            check_writable(out)
            progress = opened.enter_context(Progress("training goes on from its last checkpoint"))
            bench = Bench(notify=progress.notify)
            store = opened.enter_context(Store.open(out / NAME))
            for recipe in dict.fromkeys(run.recipe for run in runs):
                progress.say(training.about(recipe))
            number = store.begin_run(name, "", command_line(), __version__)
        for result in training.train_all(runs, out, store, number, bench, hardware):
            if not isinstance(result, Failure):
                done.append(result)
                continue
            failed.append(result)
            if store is not None:
                store.add_failure(number, result)
        epochs = {one.key: store.epochs(one.key) for one in done} if store is not None else {}
    if not first:
        return
    if not done:
        raise TrainingError("; ".join(f"{failure.variant}: {failure.reason}" for failure in failed))
    _print(done, failed, epochs, out, as_json)


def _print(done: Any, failed: Any, epochs: Any, out: Path, as_json: bool) -> None:
    from edgejoule.accuracies import over_seeds, spread
    from edgejoule.plain import encode
    from edgejoule.report import text
    from edgejoule.report import training as tables

    if as_json:
        names = ("recipe", "distill", "head")
        accuracies = [
            {"model": first.spec.name} | {name: getattr(first, name) for name in names} | encode(found) for first, found in over_seeds(done)
        ]
        print_json(
            {
                "trainings": [encode(training) | {"file": str(out / training.weights)} for training in done],
                "accuracy": accuracies,
                "failures": encode(failed),
                "out": str(out),
            }
        )
        return
    print_text(tables.trainings(done, epochs) + tables.spreads(spread(done)) + (text.failures(failed) if failed else ""))
    builder, file = (shlex.quote(str(text)) for text in (done[0].spec.builder, out / done[0].weights))
    print_text(f"\nresults  {out / 'results.sqlite'}\nweights  {out / 'weights'}\n")
    measure = "" if done[0].head else f"edgejoule measure {builder} --weights {file}; "  # dense networks are measured as backbones
    print_text(f"Next: {measure}tensorboard --logdir {shlex.quote(str(out / 'checkpoints'))}")


def _plan(study: str | None, models: list[str], asked: dict[str, Any], seed: int | None) -> Any:
    """The training plan, the specs, a name for the folder, and the first seed: a study's, with what the options say instead.

    Raises StudyError for a study that trains nothing, SpecError where there is nothing to train or no data to train on.
    """
    from dataclasses import replace

    from edgejoule import stages
    from edgejoule.catalog import find_model
    from edgejoule.study_file import TrainPlan, check_train, load_study

    if study is None and not (models and asked["data"]):
        raise SpecError("name a study that trains, such as digits, or give --model and --data")
    loaded = load_study(study) if study else None
    plan = loaded.train if loaded else TrainPlan(asked["data"])
    if plan is None:
        raise StudyError(f"{study} has no table [train]: add one, or give --model and --data")
    values = {"data": asked["data"], "recipes": tuple(asked["recipe"] or ()), "distill": asked["distill"], "weights": asked["weights"]}
    values |= {"seeds": asked["seeds"], "mixed_precision": asked["mixed_precision"]}
    plan = replace(plan, **{key: value for key, value in values.items() if value})
    if asked["max_bad_images"] is not None:
        plan = replace(plan, max_bad_images=asked["max_bad_images"])
    check_train(plan, lambda key, message: StudyError(f"--{key.replace('_', '-')}: {message}"))
    if models or loaded is None:
        specs: Any = tuple(find_model(model, allow_code=True) for model in models)
    else:
        rows = stages.screen_models(stages.candidates(loaded.screen), loaded.screen, _quiet())
        kept = {row.name for row in rows if row.kept}
        specs = tuple(spec for spec in stages.candidates(loaded.screen) if spec.name in kept)
    first = seed if seed is not None else loaded.study.seed if loaded else 0
    return plan, specs, loaded.study.name if loaded else "train", first


def _quiet() -> Any:
    from edgejoule.bench import Bench

    return Bench()
