"""study.toml -> Study. Says which file, line and key is wrong; runs nothing, builds nothing, imports no torch.

A study names models, backends and meters by the grammar of ``registry``; it can not name code (``module:function``),
because a study file may come from a stranger.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgejoule import registry
from edgejoule.errors import EdgejouleError, SpecError, StudyError
from edgejoule.scenarios import scenario

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
METRICS = ("sam", "efficiency", "netscore", "energy", "latency", "accuracy")
# Printed latencies that a study's own may stand beside: the table's column, which ends with its unit.
BESIDE = {
    "edgevit_table2": "cpu_latency_mean_ms",
    "edgevit_table3": "cpu_latency_mean_ms",
    "edgevit_table7": "cpu_latency_mean_s",
    "edgevit_table8": "cpu_latency_mean_s",
}
LARGEST = 1e300  # a larger number in a study is a slip, and would overflow what is computed from it
MOST_THREADS = 1024
MOST_SEEDS = 100


@dataclass(frozen=True, slots=True)
class About:
    """``[study]``: what it is, what it costs and what it should print."""

    name: str
    about: str = ""
    cost: str = ""
    expect: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ScreenPlan:
    """``[screen]``: a pool of the catalog or a list of models, thresholds (top-1 at least, params and MACs below), NetScore's exponents."""

    pool: str = ""
    models: tuple[str, ...] = ()
    min_top1_pct: float | None = None
    max_params_m: float | None = None
    max_macs_g: float | None = None
    alpha: float = 2.0
    beta: float = 0.5
    gamma: float = 0.5
    recount: bool = False
    weights: Literal["auto", "random"] = "auto"


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """``[train]``: every kept model is trained, or fine-tuned where it has pretrained weights, before it is compiled.

    Each recipe is run with ``seeds`` seeds, from the study's seed on. Of several recipes the one with the best mean validation accuracy
    is compiled, of its seeds the first: never the best, which would be luck.
    """

    data: str
    recipes: tuple[str, ...] = ("digits",)
    seeds: int = 1
    weights: Literal["auto", "pretrained", "random"] = "auto"  # what it begins with
    distill: str = ""  # 'soft(teacher="...", weights="...")'
    max_bad_images: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    evaluate: bool = True  # every artifact on the test split, in its own runtime


@dataclass(frozen=True, slots=True)
class OptimizePlan:
    """``[optimize]``: the recipes that every kept model goes through, each on its own; the empty one leaves the network as it is.

    ``models`` names those that the recipes are for; the others stay as they are. ``data`` and ``train`` are for passes that learn:
    labelled data and a training recipe; empty, they are the study's own of ``[train]``. ``teacher`` is a model that ``distill`` learns from
    where the recipe names none; empty, it is the network that the recipe began with. ``trained`` is no key of the file: a study's own
    networks (model, weights file), which may teach.
    """

    recipes: tuple[str, ...] = ("",)
    models: tuple[str, ...] = ()
    data: str = ""
    train: str = ""
    teacher: str = ""
    trained: tuple[tuple[str, str], ...] = field(default=(), metadata={"given": False})


@dataclass(frozen=True, slots=True)
class CompilePlan:
    """``[compile]``: which backends every kept model is compiled for, what int8 is calibrated on, and how much accuracy it may cost.

    ``calibration``: images (``folder(path="...")``) or labelled data (``digits``); ``auto`` is the study's training data, else photographs.
    """

    backends: tuple[str, ...] = ("onnxruntime",)
    calibration: str = "auto"
    max_drop_pct: float = 1.0


@dataclass(frozen=True, slots=True)
class MeasurePlan:
    """``[[measure]]``: one way of measuring; several make several rankings. ``threads`` 0 means all the cores this process may use."""

    profile: str = "standard"
    scenario: str = "single_stream"
    batch: int = 1
    end_to_end: bool = False
    meter: str = "auto"
    threads: int = 0
    images: str = "photos(n=32)"


@dataclass(frozen=True, slots=True)
class RankPlan:
    """``[rank]``: the metric and its exponents, and the model that energy saved is counted against.

    ``beside`` names a published table (``edgevit_table2``) whose latencies are printed beside those measured here.
    """

    metric: str = "sam"
    a: float = 5.0
    b: float = 5.0
    baseline: str = ""
    beside: str = ""


@dataclass(frozen=True, slots=True)
class Study:
    """A whole study. ``text`` is the file as it was read, kept with the results."""

    study: About
    screen: ScreenPlan
    optimize: OptimizePlan = field(default_factory=OptimizePlan)
    compile: CompilePlan = field(default_factory=CompilePlan)
    train: TrainPlan | None = None
    measure: tuple[MeasurePlan, ...] = (MeasurePlan(),)
    rank: RankPlan = field(default_factory=RankPlan)
    text: str = ""
    path: str = ""


def shipped() -> tuple[str, ...]:
    """The names of the studies that come with edgejoule."""
    folder = resources.files("edgejoule") / "studies"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load_study(name_or_path: str | Path) -> Study:
    """A shipped study by name, or a file by path. Raises StudyError naming file, line and key."""
    text_name = str(name_or_path)
    if text_name in shipped():
        text = (resources.files("edgejoule") / "studies" / f"{text_name}.toml").read_text("utf-8")
        return parse_study(text, f"{text_name}.toml")
    path = Path(name_or_path)
    try:
        return parse_study(path.read_text("utf-8"), str(path))
    except FileNotFoundError as error:
        raise StudyError(f"there is no study {text_name!r}: expected a file, or one of {', '.join(shipped())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"cannot read the study {text_name}: {error}") from error


def parse_study(text: str, path: str) -> Study:
    """The text of a study file -> Study. Raises StudyError naming ``path``, line and key."""
    try:
        raw = tomllib.loads(text)
    except ValueError as error:  # tomllib's own error is one, and Python's for a number of thousands of digits
        raise StudyError(f"{path}: {error}") from error
    except RecursionError as error:
        raise StudyError(f"{path}: the file is nested too deeply to be a study") from error
    where = _Where(path, text)
    kinds = ("study", "screen", "train", "optimize", "compile", "measure", "rank")
    for table in raw:
        if table not in kinds:
            raise where.error("", table, 0, f"unknown table [{table}]: expected {', '.join(kinds)}")
    if "study" not in raw or "screen" not in raw:
        raise StudyError(f"{path}: a study needs the tables [study] and [screen]")
    measures = raw.get("measure", [{}])
    if not isinstance(measures, list):
        raise where.error("", "measure", 0, "measure is a list of tables: write [[measure]], not [measure]")
    study = Study(
        study=_table(About, raw["study"], "study", where),
        screen=_table(ScreenPlan, raw["screen"], "screen", where),
        optimize=_table(OptimizePlan, raw.get("optimize", {}), "optimize", where),
        compile=_table(CompilePlan, raw.get("compile", {}), "compile", where),
        train=_table(TrainPlan, raw["train"], "train", where) if "train" in raw else None,
        measure=tuple(_table(MeasurePlan, entry, "measure", where, nth) for nth, entry in enumerate(measures)),
        rank=_table(RankPlan, raw.get("rank", {}), "rank", where),
        text=text,
        path=path,
    )
    _check_values(study, where)
    return study


class _Where:
    """Where in the file a key stands, so that an error can say it."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()

    def error(self, table: str, key: str, nth: int, message: str) -> StudyError:
        spot = f"line {line}" if (line := self._line(table, key, nth)) else "key"
        return StudyError(f"{self._path}, {spot}, {'.'.join(filter(None, (table, key)))}: {message}")

    def measure_error(self, nth: int, key: str, message: str) -> StudyError:
        return self.error("measure", key, nth, message)

    def train_error(self, key: str, message: str) -> StudyError:
        return self.error("train", key, 0, message)

    def _line(self, table: str, key: str, nth: int) -> int | None:
        inside, seen = not table, -1
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[\[?\s*([\w.\"-]+)\s*\]\]?", line):
                if not table and header[1].strip('"') == key:
                    return number
                seen += header[1] == table
                inside = header[1] == table and seen == nth
            elif inside and re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", line):
                return number
        return None


def _table(cls: type[T], raw: Any, table: str, where: _Where, nth: int = 0) -> T:
    if not isinstance(raw, dict):
        raise where.error("", table, nth, f"expected a table [{table}]")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.metadata.get("given", True)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in known:
            raise where.error(table, key, nth, f"unknown key: expected one of {', '.join(known)}")
        values[key] = _value(hints[key], value, partial(where.error, table, key, nth))
    for name, f in known.items():
        if f.default is f.default_factory is MISSING and name not in values:
            raise where.error("", table, nth, f"the key {name} is missing from [{table}]")
    return cls(**values)


def _value(hint: Any, value: Any, error: Callable[[str], StudyError]) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise error(f"{value!r} is not one of {', '.join(options)}")
        return value
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise error('expected a list of texts, as in ["a", "b"]')
        return tuple(value)
    kind = next(option for option in (*options, hint) if option is not type(None))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= LARGEST:
            raise error(f"expected a finite number, found {str(value)[:20]}")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise error(f"expected {kind.__name__}, found {value!r}")
    return value


def _check_values(study: Study, where: _Where) -> None:
    """What types alone do not say: spellings that parse, sizes that make sense."""
    screen = study.screen
    if bool(screen.pool) == bool(screen.models):
        raise where.error("screen", "pool" if screen.pool else "models", 0, "give either pool or models")
    if not study.optimize.recipes:
        raise where.error("optimize", "recipes", 0, 'name at least one recipe; "" leaves the network as it is')
    for text in study.optimize.recipes:
        _recipe(text, partial(where.error, "optimize", "recipes", 0))
    for nth, model in enumerate(study.optimize.models):
        if model not in screen.models and not screen.pool:
            raise where.error(
                "optimize", "models", 0, f"{model!r} is none of the study's models (number {nth + 1}): name them as [screen] does"
            )
    for key in ("data", "train", "teacher"):
        if spelling := getattr(study.optimize, key):
            _spelling(spelling, partial(where.error, "optimize", key, 0))
    check_compile(study.compile, partial(_no_nth, where, "compile"))
    if not re.fullmatch(r"(?!\.+$)[\w.-]+", study.study.name):
        raise where.error("study", "name", 0, "expected letters, digits, '-', '_' and '.': it names a folder")
    if not 0 <= study.study.seed < 2**32:
        raise where.error("study", "seed", 0, "expected a whole number from 0 to 4294967295")
    if study.rank.metric not in METRICS:
        raise where.error("rank", "metric", 0, f"{study.rank.metric!r} is not one of {', '.join(METRICS)}")
    if study.rank.a < 0 or study.rank.b <= 0:
        raise where.error("rank", "a" if study.rank.a < 0 else "b", 0, "expected a of at least 0 and b above 0")
    if study.rank.beside and study.rank.beside not in BESIDE:
        raise where.error("rank", "beside", 0, f"{study.rank.beside!r} is not one of {', '.join(BESIDE)}")
    if study.train is not None:
        check_train(study.train, where.train_error)
    for nth, plan in enumerate(study.measure):
        check_plan(plan, partial(where.measure_error, nth))


def _no_nth(where: _Where, table: str, key: str, message: str) -> StudyError:
    return where.error(table, key, 0, message)


def check_compile(plan: CompilePlan, error: Callable[[str, str], StudyError]) -> None:
    """Raises ``error(key, message)`` for the first value of a compiling plan that makes no sense."""
    if not plan.backends:
        raise error("backends", "name at least one backend")
    for text in plan.backends:
        _spelling(text, partial(error, "backends"))
    _spelling(plan.calibration, partial(error, "calibration"))
    if not 0 <= plan.max_drop_pct <= 100:
        raise error("max_drop_pct", f"expected percentage points from 0 to 100, found {plan.max_drop_pct:g}")


def check_train(plan: TrainPlan, error: Callable[[str, str], StudyError]) -> None:
    """Raises ``error(key, message)`` for the first value of a training plan that makes no sense."""
    _spelling(plan.data, partial(error, "data"))
    _recipe(plan.distill, partial(error, "distill"))
    if not plan.recipes:
        raise error("recipes", "name at least one training recipe")
    for text in plan.recipes:
        _spelling(text, partial(error, "recipes"))
    for key, least, most in (("seeds", 1, MOST_SEEDS), ("max_bad_images", 0, 10**9)):
        if not least <= getattr(plan, key) <= most:
            raise error(key, f"expected a whole number from {least} to {most}")


def check_plan(plan: MeasurePlan, error: Callable[[str, str], StudyError]) -> None:
    """Raises ``error(key, message)`` for the first value of a measuring plan that makes no sense."""
    for key in ("profile", "meter", "images"):
        _spelling(getattr(plan, key), partial(error, key))
    if plan.batch < 1:
        raise error("batch", "expected at least 1")
    try:
        scenario(plan.scenario)
    except SpecError as problem:
        raise error("scenario", str(problem)) from problem
    try:
        scenario(plan.scenario, plan.batch)
    except SpecError as problem:
        raise error("batch", str(problem)) from problem
    if not 0 <= plan.threads <= MOST_THREADS:
        raise error("threads", f"expected 0 (all cores) or at most {MOST_THREADS}")


def with_measure(study: Study, meter: str | None = None, profile: str | None = None) -> Study:
    """The study with another meter or profile in all its measuring plans (and each plan once)."""

    def refuse(key: str, message: str) -> StudyError:
        return StudyError(f"--{key}: {message}")

    plans = [replace(plan, meter=meter or plan.meter, profile=profile or plan.profile) for plan in study.measure]
    for plan in plans:
        check_plan(plan, refuse)
    return replace(study, measure=tuple(dict.fromkeys(plans)))


def with_data(study: Study, data: str | None) -> Study:
    """The study trained on other data. Raises StudyError where it trains nothing, or for a spelling that cannot be read."""
    if data is None:
        return study
    if study.train is None:
        raise StudyError(f"--data: {study.study.name} trains nothing: give a study with a table [train], such as digits")
    plan = replace(study.train, data=data)
    check_train(plan, lambda key, message: StudyError(f"--{key}: {message}"))
    return replace(study, train=plan)


def _spelling(text: str, error: Callable[[str], StudyError]) -> None:
    try:
        registry.parse(text)
    except EdgejouleError as problem:
        raise error(str(problem)) from problem


def _recipe(text: str, error: Callable[[str], StudyError]) -> None:
    try:
        registry.parse_recipe(text)
    except EdgejouleError as problem:
        raise error(str(problem)) from problem
