"""What a page shows (``Report``), and what a table of sensitivities must offer. Plain records: no rendering here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgejoule.records import Artifact, Caveat, Environment, Failure, Measurement, Ranking, Screened
from edgejoule.report.reproduction import Beside


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
