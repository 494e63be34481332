"""The joint of optimising: a recipe's passes, given data, a teacher and the training loop, and the network that comes out kept on disk.

A recipe of exact passes (``fuse``) is applied anew whenever its network is needed. Any other is applied once: the network lies in the cache
under a key, a hash of all that determines it, with an architecture description instead of code. A run that was killed goes on from the
checkpoint of the pass that was training. Knows no pass by name, no backend and no meter.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgejoule import calibration, data, registry, teaching
from edgejoule.bench import Bench, Event, writable
from edgejoule.catalog import find_model
from edgejoule.errors import DataError, ModelError, OutputError, SpecError
from edgejoule.plain import digest
from edgejoule.records import Interval, ModelSpec, Variant
from edgejoule.seams import Held, PassContext
from edgejoule.shrunk import Shrunk, Size
from edgejoule.study_file import OptimizePlan

TRAIN = "digits"  # the training recipe where none is named, as ``edgejoule train`` has it
VERSION = 1  # raise it with any change of what a recipe makes of the same network: finished ones are then made anew
CHECKED = "photos(n=4, seed=5)"
LIKE = 1e-5  # relative: what was saved against what was in memory


def check(recipes: Sequence[str], plan: OptimizePlan) -> None:
    """Raises before any work for a pass that is not there, stands in a bad order, or needs data that nobody named."""
    from edgejoule.optimize.recipe import check as check_recipe
    from edgejoule.optimize.recipe import passes

    for recipe in recipes:
        check_recipe(recipe, provided(plan))
    teaching.find_recipe(plan.train or TRAIN)
    for text in _taught(recipes):
        teaching.check_distillation(teaching.with_teacher(text, plan.teacher, ()))
    if plan.teacher:
        find_model(plan.teacher)
    if plan.data and any(one.needs for recipe in recipes for _, one in passes(recipe)):
        labelled = teaching.open_data(plan.data)
        if labelled.kind != "classification":
            raise SpecError(f"{plan.data} is a {labelled.kind} set, and classifiers are optimised: name labelled images, such as digits")
        teaching.find_recipe(plan.train or TRAIN, labelled.kind)


def provided(plan: OptimizePlan) -> frozenset[str]:
    """What passes may need and get: calibration always (photographs where nothing is named), training where there is labelled data."""
    return frozenset({"calibration", "training", "teacher"} if plan.data else {"calibration"})


def optimize(spec: ModelSpec, weights: str, recipe: str, plan: OptimizePlan, bench: Bench) -> Variant:
    """The variant that a recipe makes of a model: identified, and for a recipe that is not exact, made and in the cache.

    Its spec is the network's own after the recipe (``resize`` gives it other images). Raises ModelError, SpecError, TrainingError,
    DataError and OutputError.
    """
    from edgejoule import zoo
    from edgejoule.optimize.recipe import check as check_recipe
    from edgejoule.optimize.recipe import check_order, is_exact

    base = zoo.identify(spec, bench.seed, weights)
    recipe = registry.canonical(recipe)
    if is_exact(recipe):
        return replace(base, recipe=recipe)
    check_recipe(recipe, provided(plan))
    if (folder := _saved_in(spec)) is not None:
        check_order(f"{zoo.read_note(folder)['recipe']} | {recipe}")
    return _made(base, recipe, plan, bench)


def network(variant: Variant, bench: Bench) -> Any:
    """The variant's network after its recipe: an nn.Module in eval mode. Raises ModelError, also where it is no longer in the cache."""
    from edgejoule import zoo
    from edgejoule.optimize.recipe import apply

    if variant.optimized:
        folder = place(bench.cache, variant.optimized)
        if not zoo.is_optimized(folder):
            raise ModelError(f"the network of {variant.label} is no longer in the cache: optimise or compile it again")
        return zoo.load(folder, allow_code=True)  # of code that was taken from the command line before
    module = zoo.build(variant)
    if not variant.recipe:
        return module
    with tempfile.TemporaryDirectory() as workdir:
        context = PassContext(fit=None, teacher=None, data=None, seed=variant.seed, workdir=Path(workdir))
        module, spec = apply(variant.recipe, module, variant.spec, context)
    if spec.preprocessing != variant.spec.preprocessing:
        raise ModelError(f"the recipe {variant.recipe} gives {spec.name} other images, and says that it is exact: leave that pass out")
    return module


def place(cache: Path, key: str) -> Path:
    """Where the network of a key lies."""
    return cache / "optimized" / key


def check_saveable(spec: ModelSpec) -> None:
    """Raises SpecError for a network of a user's own code, which a folder cannot bring along."""
    if registry.parse(spec.builder).name == "custom":
        raise SpecError(
            f"{spec.name} is code of your own, which a saved network cannot bring: say --recipe to edgejoule compile or measure instead"
        )


def save(variant: Variant, out: Path, bench: Bench) -> Path:
    """The network's folder (model.safetensors, architecture.json), whole or not at all. Raises OutputError for one that is there."""
    from edgejoule import zoo

    if out.exists():
        raise OutputError(f"{out} is there already: name a new folder with --out")
    check_saveable(variant.spec)
    if variant.optimized:
        files = {name: (place(bench.cache, variant.optimized) / name).read_bytes() for name in zoo.OPTIMIZED_FILES}
    else:
        files = zoo.contents(network(variant, bench), variant.spec, variant.recipe, _facts(variant, OptimizePlan()))
    _write(out, files)
    return out


def shrunk(spec: ModelSpec, weights: str, variant: Variant, plan: OptimizePlan, bench: Bench) -> Shrunk:
    """What a recipe did to a network: both counted, and both judged on the test images where labelled data is named."""
    from edgejoule import zoo
    from edgejoule.screen.cost import count

    found = []
    for one in (zoo.identify(spec, bench.seed, weights), variant):
        module = network(one, bench)
        cost, top1 = count(module, one.spec.preprocessing.input_size), None
        if plan.data:
            bench.notify(Event("optimize", f"{one.label}: test images"))
            top1 = top1_of(module, one.spec, plan.data)
        found.append(Size(one.label, cost.params, cost.macs, bytes_of(module), top1))
    return Shrunk(*found)


def bytes_of(module: Any) -> int:
    """Of its parameters and buffers, as they lie in memory."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values() if hasattr(value, "numel"))


def top1_of(module: Any, spec: ModelSpec, data_spelling: str, split: Literal["train", "validation", "test"] = "test") -> Interval:
    """A network's accuracy in float32 in torch, a fraction with Wilson's interval."""
    import torch

    from edgejoule.datasets.classification import wilson
    from edgejoule.train.classification import logits

    images = teaching.open_data(data_spelling).split(split)
    found, labels, _ = logits(module, images, spec.preprocessing, torch.device("cpu"))
    return wilson(int((found.argmax(-1) == labels).sum()), len(labels))


@dataclass(frozen=True, slots=True)
class Fitting:
    """``seams.Fit`` on one labelled set by one training recipe. Each call of a run has its number, and a checkpoint of its own."""

    plan: OptimizePlan
    start: tuple[Any, ModelSpec]  # the network that the recipe began with
    random: bool  # whether its weights are: then it teaches nothing
    seed: int
    key: str
    workdir: Path
    bench: Bench
    calls: list[str]

    def __call__(
        self,
        module: Any,
        spec: ModelSpec,
        *,
        epochs: float,
        lr: float = 1.0,
        distill: str = "",
    ) -> Any:
        from edgejoule.train.classification import Classification
        from edgejoule.train.loop import Settings, train
        from edgejoule.train.recovery import Recovery

        labelled = teaching.open_data(self.plan.data)
        if len(labelled.classes) != spec.num_classes:
            raise DataError(
                f"{spec.name} tells {spec.num_classes} classes apart and {labelled.dataset} has {len(labelled.classes)}: "
                "train it on this data first (edgejoule train), and give its weights"
            )
        recipe = shortened(teaching.find_recipe(self.plan.train or TRAIN, labelled.kind), epochs, lr)
        taught = teaching.with_teacher(distill, self.plan.teacher, self.plan.trained)
        distiller = teaching.distiller(taught, spec, self.seed, self.start, self.random) if distill else None
        splits = (labelled.split("train"), labelled.split("validation"))
        task = Classification(*splits, spec.num_classes, spec.preprocessing, recipe, self.seed, distiller)
        self.calls.append(f"{epochs:g} epochs of {recipe.name}{', ' + distill if distill else ''}")
        number = len(self.calls)
        self.bench.notify(Event("optimize", f"{spec.name}: {self.calls[-1]}"))
        settings = Settings(folder=self.workdir / f"fit-{number}", key=f"{self.key}-{number}", seed=self.seed, checkpoint_s=60.0)
        done = train(module, Recovery(task), recipe, settings, notify=self.bench.notify)
        return done.module


def shortened(recipe: Any, epochs: float, lr: float) -> Any:
    """A training recipe as it is used for recovery: so many epochs at a factor of its rate, a tenth to warm up, nothing averaged."""
    warm = min(recipe.warmup_epochs, 0.1 * epochs)
    return replace(
        recipe, epochs=epochs, steps=0, lr=recipe.lr * lr, warmup_epochs=warm, warmup_steps=0, milestones=(), ema=0.0, drop_path=None
    )


# ---------------------------------------------------------------- making


def _made(base: Variant, recipe: str, plan: OptimizePlan, bench: Bench) -> Variant:
    """The variant of a recipe, its network made where the cache has none."""
    from edgejoule import zoo

    key = _key(base, recipe, plan)
    folder = place(bench.cache, key)
    if not _is_whole(folder):
        _make(base, recipe, plan, key, bench)
    spec = replace(zoo.spec_after(zoo.read_note(folder), str(folder)), name=base.spec.name, builder=base.spec.builder)
    return replace(base, spec=spec, recipe=recipe, optimized=key)


def _saved_in(spec: ModelSpec) -> Path | None:
    """The folder of a network that was saved, and is optimised further."""
    call = registry.parse(spec.builder)
    return Path(str(call.options["path"])) if call.name == "optimized" else None


def _make(base: Variant, recipe: str, plan: OptimizePlan, key: str, bench: Bench) -> None:
    """Applies the last pass to what those before it made, and puts the network into the cache; one process at a time.

    Recipes that begin alike share what they begin with, and a run that was killed goes on at its last pass.
    """
    from edgejoule import zoo
    from edgejoule.compile.cache import sole_builder
    from edgejoule.optimize.recipe import apply

    folder = place(bench.cache, key)
    with sole_builder(bench.cache, key):
        if _is_whole(folder):
            return
        *first, last = map(str, registry.parse_recipe(recipe))
        before = _made(base, " | ".join(first), plan, bench) if first else base
        bench.notify(Event("optimize", f"{base.spec.name} | {recipe}"))
        workdir = writable(folder.with_name(f".{key}.work"))
        start = (zoo.build(base), base.spec)
        module = network(before, bench) if first else start[0]
        fit = Fitting(plan, start, base.weights == "random", base.seed, key, workdir, bench, []) if plan.data else None
        context = PassContext(
            fit=fit,
            teacher=start,
            data=lambda spec, n: _drawn(spec, plan, n),
            seed=base.seed,
            workdir=workdir,
            notify=lambda line: bench.notify(Event("optimize", line)),
        )
        changed, spec = apply(last, module, before.spec, context)
        spec = replace(spec, published=None)
        files = zoo.contents(changed, spec, recipe, _facts(base, plan))
        _write(folder, files, lambda written: _compare(written, changed, spec))
        shutil.rmtree(workdir, ignore_errors=True)


def _compare(folder: Path, changed: Any, spec: ModelSpec) -> None:
    """What was saved computes what was in memory, on photographs. Raises ModelError where it does not."""
    import torch

    from edgejoule import zoo

    images = torch.from_numpy(data.normalise(data.crops(CHECKED, spec.preprocessing), spec.preprocessing))  # (N, C, H, W)
    again = zoo.load(folder, allow_code=True)
    try:
        with torch.no_grad():
            expected, found = changed(images), again(images)
    except Exception as error:  # a network raises whatever its parts raise
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{spec.name} does not run on images of {spec.preprocessing.input_size} ({said}): check its input size") from error
    apart = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if not apart <= LIKE:
        raise ModelError(
            f"{spec.name} comes back {apart:.2g} away from what was saved: one of its passes keeps something that cannot be written down"
        )


def _drawn(spec: ModelSpec, plan: OptimizePlan, n: int) -> Held:
    """n training images for a spec, or photographs where no data is named: (n, C, H, W) float32 tensors, labels (n,) int64 or None."""
    import torch

    crops, labels = calibration.samples(spec, plan.data or "auto", n)
    images = torch.from_numpy(data.normalise(crops, spec.preprocessing))
    return Held(images, None if labels is None else torch.from_numpy(labels))


def _key(base: Variant, recipe: str, plan: OptimizePlan) -> str:
    """All that determines the network, as a sha256; figures and names that others gave it do not."""
    from edgejoule.optimize.recipe import passes

    spec = base.spec
    made_of: list[Any] = [VERSION, spec.builder, spec.num_classes, spec.preprocessing, base.weights, base.weights_id, base.seed, recipe]
    if registry.parse(spec.builder).name == "custom":  # its weights may be the same after its code has changed
        from edgejoule import zoo

        made_of += [repr(zoo.build(base))]
    needs = frozenset[str]().union(*(one.needs for _, one in passes(recipe)))
    if needs:
        made_of += [calibration.identity(spec, plan.data or "auto")]
    if "training" in needs:
        made_of += [teaching.canonical_recipe(plan.train or TRAIN)]
        texts = _taught([recipe])
        made_of += [teaching.teacher_id(teaching.with_teacher(text, plan.teacher, plan.trained)) for text in texts]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    return digest([*made_of, versions])


def _taught(recipes: Sequence[str]) -> list[str]:
    """The distillations that the passes of recipes will ask for, as they spell them."""
    from edgejoule.optimize.recipe import passes

    found = [getattr(one, "learns_from", "") for recipe in recipes for _, one in passes(recipe)]
    return [text for text in found if text]


def _facts(base: Variant, plan: OptimizePlan) -> dict[str, Any]:
    """Where a network comes from, for who finds its folder: nothing here is needed to build it."""
    from edgejoule import __version__

    facts = {"weights": base.weights, "weights_id": base.weights_id, "seed": base.seed, "edgejoule": __version__}
    return facts | ({"data": plan.data, "train": plan.train} if plan.data else {})


def _is_whole(folder: Path) -> bool:
    from edgejoule import zoo

    if not zoo.is_optimized(folder):
        return False
    try:
        zoo.read_note(folder)
    except ModelError:
        return False
    return True


def _write(folder: Path, files: dict[str, bytes], checked: Callable[[Path], None] = lambda written: None) -> None:
    """A new folder of files, whole and ``checked`` or not at all. Raises OutputError, and what ``checked`` raises."""
    home = folder.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
        try:
            for name, content in files.items():
                (partial / name).write_bytes(content)
            checked(partial)
            partial.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {folder} ({error.strerror or error}): free some space, or name another folder") from error
