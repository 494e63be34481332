"""What a page shows (``Report``), and what a table of sensitivities must offer. Plain records: no rendering here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgejoule.records import (
    Artifact,
    Caveat,
    Environment,
    Epoch,
    Evaluation,
    Failure,
    Interval,
    Measurement,
    Ranking,
    Screened,
    Training,
)
from edgejoule.report.reproduction import Beside


class RecipeSpread(Protocol):
    """One recipe's test top-1 over its seeds, as fractions."""

    @property
    def recipe(self) -> str: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def values(self) -> Sequence[float]: ...
    @property
    def mean(self) -> Interval: ...
    @property
    def std(self) -> float | None: ...


class Spread(Protocol):
    """How far a model's top-1 varies with the seed and with the recipe, as fractions."""

    @property
    def model(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def how(self) -> str: ...
    @property
    def recipes(self) -> Sequence[RecipeSpread]: ...
    @property
    def seed_std(self) -> float | None: ...
    @property
    def recipe_std(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Report:
    """Everything on one page. ``study_text`` is the study file as it was, ``created_at`` unix time in seconds."""

    title: str
    rankings: tuple[Ranking, ...]
    measurements: tuple[Measurement, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    screened: tuple[Screened, ...] = ()
    failures: tuple[Failure, ...] = ()
    environments: tuple[Environment, ...] = ()
    caveats: tuple[Caveat, ...] = ()
    beside: tuple[Beside, ...] = ()
    trainings: tuple[Training, ...] = ()
    epochs: Mapping[str, tuple[Epoch, ...]] = field(default_factory=dict)  # by the training's key
    spreads: tuple[Spread, ...] = ()
    evaluations: tuple[tuple[str, Evaluation], ...] = ()  # with the artifact's label
    study_text: str = ""
    command: str = ""
    created_at: float = 0.0
    version: str = ""


class Setting(Protocol):
    """The order under one choice of exponents and unit, or the reason why there is none."""

    @property
    def a(self) -> float: ...
    @property
    def b(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def order(self) -> tuple[str, ...]: ...
    @property
    def tau(self) -> float | None: ...
    @property
    def reason(self) -> str: ...


class Sensitivity(Protocol):
    """The default order, and the orders under other choices."""

    @property
    def default(self) -> Setting: ...
    @property
    def settings(self) -> Sequence[Setting]: ...
    @property
    def ambiguous(self) -> bool: ...
