"""Stage 1: which candidates are worth a device's time. Thresholds on published or counted numbers, then NetScore. Pure.

Source: the two-stage evaluation of E3P-ViT (arXiv 2511.23166): top-1 at least, params and MACs strictly below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgejoule.errors import SpecError
from edgejoule.records import Cost, ModelSpec, Screened
from edgejoule.screen.netscore import netscore


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Top-1 at least ``min_top1_pct``, params below ``max_params_m`` and MACs below ``max_macs_g``, both strictly; None is no threshold."""

    min_top1_pct: float | None = None
    max_params_m: float | None = None
    max_macs_g: float | None = None


E3P = Thresholds(min_top1_pct=79.0, max_params_m=23.0, max_macs_g=5.0)


def screen(
    specs: Sequence[ModelSpec],
    thresholds: Thresholds = E3P,
    alpha: float = 2.0,
    beta: float = 0.5,
    gamma: float = 0.5,
    costs: Mapping[str, Cost] | None = None,
) -> tuple[Screened, ...]:
    """Every candidate with its NetScore and, where it was rejected, the sentence that says why; best NetScore first.

    ``costs`` by model name: counted params and MACs, used instead of the published ones. A candidate without the numbers
    that a threshold needs is rejected. Raises SpecError for numbers or exponents outside NetScore's domain.
    """
    rows = [_judge(spec, thresholds, (alpha, beta, gamma), (costs or {}).get(spec.name)) for spec in specs]
    return tuple(sorted(rows, key=lambda row: (row.netscore is None, -(row.netscore or 0.0), row.name)))


def _judge(spec: ModelSpec, thresholds: Thresholds, exponents: tuple[float, float, float], cost: Cost | None) -> Screened:
    published = spec.published
    top1_pct = published.top1_pct if published else None
    params_m = published.params_m if published else None
    macs_g = published.macs_g if published else None
    if cost is not None:
        params_m, macs_g = cost.params / 1e6, cost.macs / 1e9
    score = None
    if top1_pct is not None and params_m is not None and macs_g is not None:
        try:
            score = netscore(top1_pct, params_m, macs_g, *exponents)
        except SpecError as error:
            raise SpecError(f"{spec.name}: {error}") from error
    reasons = [
        _too_low("top-1", top1_pct, thresholds.min_top1_pct, "%"),
        _too_high("params", params_m, thresholds.max_params_m, "M"),
        _too_high("MACs", macs_g, thresholds.max_macs_g, "G"),
    ]
    reason = "; ".join(filter(None, reasons))
    return Screened(spec.name, top1_pct, params_m, macs_g, score, not reason, reason, counted=cost is not None)


def _too_low(what: str, value: float | None, at_least: float | None, unit: str) -> str:
    if at_least is None or (value is not None and value >= at_least):
        return ""
    if value is None:
        return f"no {what} is published, and at least {at_least:g} {unit} is asked for"
    return f"{what} {value:.5g} {unit} is below {at_least:g} {unit}"


def _too_high(what: str, value: float | None, below: float | None, unit: str) -> str:
    if below is None or (value is not None and value < below):
        return ""
    if value is None:
        return f"no {what} are published (count them), and less than {below:g} {unit} is asked for"
    return f"{what} {value:.5g} {unit} are not below {below:g} {unit}"
