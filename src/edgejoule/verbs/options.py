"""What the verbs share: their common options, and how they print, ask for a bench and read a measuring plan. Runs no stage."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgejoule.errors import SpecError, StudyError
from edgejoule.progress import Progress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Cache = Annotated[Path | None, typer.Option(help="Where compiled files are kept. Default: $EDGEJOULE_CACHE or the user's cache folder.")]
Model = Annotated[str, typer.Argument(help='A catalog name, timm(name="..."), or your own module:function.')]
BACKENDS = typer.Option("--backend", help='Such as onnxruntime (the default) or openvino(precision="int8"). May be repeated.')
Recipe = Annotated[str, typer.Option(help='Passes that change the network first, as in "fuse". Default: none.')]
Data = Annotated[str, typer.Option(help='Labelled data for passes that learn: digits, imagefolder(path="..."), … Default: none.')]
Teacher = Annotated[str, typer.Option(help="The model that distill learns from. Default: the network that the recipe begins with.")]
Train = Annotated[str, typer.Option(help='The training recipe of passes that learn, as in "digits(lr=0.001)". Default: digits.')]
Weights = Annotated[str, typer.Option(help="auto (pretrained where they can be had, else random), random, or a checkpoint file.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime; 0 means all cores.", min=0)]
Images = Annotated[str, typer.Option(help='photos(n=32), or folder(path="...").')]
Calibration = Annotated[str, typer.Option(help='What int8 is calibrated on: folder(path="..."), digits, ... auto: photographs.')]
MaxDrop = Annotated[float, typer.Option("--max-drop-pct", help="Percentage points of accuracy that int8 may cost on held-out images.")]
Meter = Annotated[str, typer.Option(help="auto, none, or a meter such as rapl(period_s=0.05); edgejoule doctor lists them.")]


def bench_of(cache: Path | None, progress: Progress, seed: int = 0) -> Any:
    """Where and how a verb works: the cache, the seed, and whom to tell."""
    from edgejoule.bench import Bench, default_cache

    return Bench(notify=progress.notify, cache=(cache or default_cache()).absolute(), seed=seed)


def plan_of(**values: Any) -> Any:
    """A measuring plan from options, checked as a study's would be."""
    from edgejoule.study_file import MeasurePlan, check_plan

    def refuse(key: str, message: str) -> StudyError:
        return StudyError(f"--{key}: {message}")

    plan = MeasurePlan(**values)
    check_plan(plan, refuse)
    return plan


def compiling_of(calibration: str, max_drop_pct: float) -> Any:
    """A compiling plan from options, checked as a study's would be, the images' being there too."""
    from edgejoule.calibration import check
    from edgejoule.study_file import CompilePlan, check_compile

    plan = CompilePlan(calibration=calibration, max_drop_pct=max_drop_pct)
    check_compile(plan, lambda key, message: StudyError(f"--{key.replace('_', '-')}: {message}"))
    check(calibration)
    return plan


def optimizing_of(recipes: list[str], data: str, train: str, teacher: str = "") -> Any:
    """An optimising plan from options, checked with its recipes before any work."""
    from edgejoule.optimizing import check
    from edgejoule.study_file import OptimizePlan

    plan = OptimizePlan(tuple(recipes), data=data, train=train, teacher=teacher)
    check(recipes, plan)
    return plan


def check_finite(**options: float | None) -> None:
    """Raises SpecError for an option that is no finite number."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise SpecError(f"--{name.replace('_', '-')}: expected a finite number, found {value}")


def command_line() -> str:
    """The command as it was typed, kept with the results."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def print_text(text: str) -> None:
    """Text on stdout, with a line end."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print_text(json.dumps(value, allow_nan=False))
