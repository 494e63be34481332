"""The metrics that order models: SAM and efficiency, with their intervals. Pure: no files, no records but Interval."""

from __future__ import annotations

import math

from edgejoule.errors import RankError
from edgejoule.records import Interval


def sam(accuracy_fraction: float, energy_mj: float, a: float = 5.0, b: float = 5.0) -> float:
    """Sustainable Accuracy Metric, ``b * accuracy**a / log10(energy)``: higher is better, dimensionless.

    ``accuracy_fraction`` lies in (0, 1]; ``energy_mj`` is mJ per image, which is the same number as J per 1000 images;
    ``a`` >= 0 weighs accuracy, ``b`` > 0 only scales. Source: Gowda et al., "Watt for What", arXiv 2310.06522; used with
    a = b = 5 ("SAM5") by Amanzhol & Park, arXiv 2511.23166. Domain: energy > 1 mJ, because the logarithm is zero there and
    changes sign below, so that less energy would rank worse. Raises RankError outside the domain.
    """
    _check_exponents(a, b)
    if not (math.isfinite(accuracy_fraction) and 0.0 < accuracy_fraction <= 1.0):
        raise RankError(f"SAM needs an accuracy in (0, 1] as a fraction, found {accuracy_fraction:g}: divide a percentage by 100")
    if not (math.isfinite(energy_mj) and energy_mj > 1.0):
        raise RankError(
            f"SAM has no meaning at {energy_mj:g} mJ per image: at 1 mJ its logarithm changes sign, "
            "so rank such models by efficiency or energy instead"
        )
    return _sam(accuracy_fraction, energy_mj, a, b)


def sam_interval(accuracy_fraction: Interval, energy_mj: Interval, a: float = 5.0, b: float = 5.0) -> Interval:
    """SAM with its bounds: SAM falls with energy and rises with accuracy, so the corners of both intervals bound it.

    A bound is None where it cannot be claimed: no interval on the energy, or a low energy bound of 1 mJ or less.
    The corners make the interval at least as wide as the joint 95 % one. Raises RankError where the value has no meaning.
    """
    value = sam(accuracy_fraction.value, energy_mj.value, a, b)
    worst = accuracy_fraction.value if accuracy_fraction.low is None else max(0.0, accuracy_fraction.low)
    best = accuracy_fraction.value if accuracy_fraction.high is None else min(1.0, accuracy_fraction.high)
    low = None if energy_mj.high is None else _sam(worst, energy_mj.high, a, b)
    high = None if energy_mj.low is None or energy_mj.low <= 1.0 else _sam(best, energy_mj.low, a, b)
    return Interval(value, low, high, energy_mj.n)


def efficiency(top1_pct: float, energy_mj: float) -> float:
    """Top-1 per energy, in percentage points per millijoule: the last column of Table 3 of EdgeViT (arXiv 2205.03436).

    Domain: top-1 in (0, 100] %, energy > 0 mJ per image. Raises RankError outside it.
    """
    if not (math.isfinite(top1_pct) and 0.0 < top1_pct <= 100.0):
        raise RankError(f"efficiency needs a top-1 in (0, 100] %, found {top1_pct:g}")
    if not (math.isfinite(energy_mj) and energy_mj > 0.0):
        raise RankError(f"efficiency needs an energy above 0 mJ per image, found {energy_mj:g}")
    return top1_pct / energy_mj


def efficiency_interval(top1_pct: Interval, energy_mj: Interval) -> Interval:
    """Efficiency with its bounds, in %/mJ; a bound is None where the energy has none, or where it is not above zero."""
    value = efficiency(top1_pct.value, energy_mj.value)
    worst = top1_pct.value if top1_pct.low is None else max(0.0, top1_pct.low)
    best = top1_pct.value if top1_pct.high is None else min(100.0, top1_pct.high)
    low = None if energy_mj.high is None else worst / energy_mj.high
    high = None if energy_mj.low is None or energy_mj.low <= 0.0 else best / energy_mj.low
    return Interval(value, low, high, energy_mj.n)


def _sam(accuracy_fraction: float, energy_mj: float, a: float, b: float) -> float:
    value = float(b * math.pow(accuracy_fraction, a) / math.log10(energy_mj))
    if not math.isfinite(value):
        raise RankError(f"SAM with a={a:g} and b={b:g} is too large for a number: choose smaller ones")
    return value


def _check_exponents(a: float, b: float) -> None:
    if not (math.isfinite(a) and a >= 0.0):
        raise RankError(f"the exponent a of SAM must be 0 or more, found {a:g}: with less, a worse model would rank better")
    if not (math.isfinite(b) and b > 0.0):
        raise RankError(f"the factor b of SAM must be above 0, found {b:g}: it only scales the score")
