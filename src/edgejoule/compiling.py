"""The joint of compiling: one network, changed by a recipe, for each backend: exported once, built, run in a fresh worker, judged.

Knows no backend: they come by their spellings. One backend's failure is a ``Failure`` and the others go on; what concerns the whole run (a
full disk, calibration images that are not there) is raised.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from edgejoule import data, registry
from edgejoule.bench import Bench, Event, cores, writable
from edgejoule.errors import OF_ONE_MODEL, AgentError, OutputError, TrainingError
from edgejoule.optimizing import network, optimize
from edgejoule.records import Artifact, Failure, Job, ModelSpec, Outputs, Variant, Workload
from edgejoule.study_file import CompilePlan, MeasurePlan, OptimizePlan


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
    optimizing: OptimizePlan | None = None,
) -> Iterator[Artifact | Failure]:
    """One model, changed by a recipe, for each backend: an artifact, or the reason why there is none.

    ``compiling`` says what quantisation is calibrated on and what it may cost, ``optimizing`` what passes learn on. Raises DataError for
    calibration images that cannot be had.
    """
    try:
        variant = optimize(spec, weights, recipe, optimizing or OptimizePlan(), bench)
    except (*OF_ONE_MODEL, TrainingError) as error:
        name, stage = (f"{spec.name} | {registry.canonical(recipe)}", "optimize") if recipe else (spec.name, "build")
        yield from (Failure(name, backend, stage, str(error)) for backend in backends)
        return
    yield from compile_variant(variant, backends, plan, bench, compiling)


def compile_variant(
    variant: Variant, backends: Sequence[str], plan: MeasurePlan, bench: Bench, compiling: CompilePlan | None = None
) -> Iterator[Artifact | Failure]:
    """A variant that ``optimize`` gave, for each backend: an artifact, or the reason why there is none. Raises as ``compile_model``."""
    from edgejoule.calibration import material
    from edgejoule.compile.build import build
    from edgejoule.compile.export import TorchExport

    spec = variant.spec
    crops, _ = data.write_crops(plan.images, spec.preprocessing, writable(bench.cache / "images"))
    shape = (plan.batch, *spec.preprocessing.input_size)
    compiling = compiling or CompilePlan()
    quantises = any(registry.create("backend", backend).precision == "int8" for backend in backends)
    given = material(spec, compiling.calibration, compiling.max_drop_pct) if quantises else None
    with ExitStack() as scratch:
        export = LazyExport(lambda: TorchExport(network(variant, bench), shape, _scratch(bench.cache, scratch), name=variant.label))
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
