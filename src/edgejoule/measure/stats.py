"""Statistics over repeats: Student's t, never a bootstrap of five (95 % nominal covers 82 %), percentiles, spread. Host only.

The inferences of one repeat are not independent (autocorrelation), repeats in fresh processes are: intervals are over repeats.
Knows no trials.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgejoule.errors import MeterError
from edgejoule.records import Interval


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of independent repeats and its Student-t interval, mean +- t(n-1) s / sqrt(n); no bounds where n < 2.

    Raises MeterError where there is no value, or one that is not a finite number.
    """
    sample = _checked(values)
    mean, n = float(np.mean(sample)), len(sample)
    if n < 2:
        return Interval(mean, None, None, n)
    half = _t_quantile(confidence, n - 1) * float(np.std(sample, ddof=1)) / n**0.5
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio of paired repeats (geometric mean) and its t-interval, computed on logarithms so that it stays positive.

    Raises MeterError where the repeats are not paired or not all positive.
    """
    top, bottom = _checked(values), _checked(baseline)
    if len(top) != len(bottom):
        raise MeterError(f"cannot pair {len(top)} repeats with {len(bottom)}: expected as many of each")
    if np.any(top <= 0) or np.any(bottom <= 0):
        raise MeterError("cannot take the ratio of repeats that are zero or negative: expected positive values only")
    logs = t_interval(np.log(top / bottom).tolist(), confidence)
    bounds = [None if bound is None else float(np.exp(bound)) for bound in (logs.low, logs.high)]
    return Interval(float(np.exp(logs.value)), bounds[0], bounds[1], logs.n)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linearly interpolated percentile. Raises MeterError where there is no value."""
    return float(np.percentile(_checked(values), percent))


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation, standard deviation (n - 1) over mean; None where n < 2 or the mean is 0."""
    sample = _checked(values)
    mean = float(np.mean(sample))
    return None if len(sample) < 2 or mean == 0 else float(np.std(sample, ddof=1)) / abs(mean)


def half_width(interval: Interval) -> float | None:
    """Half of an interval's width over its value: 0.01 is +-1 %; None where it has no bounds or no value."""
    if interval.low is None or interval.high is None or interval.value == 0:
        return None
    return (interval.high - interval.low) / 2 / abs(interval.value)


def _checked(values: Sequence[float]) -> npt.NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample):
        raise MeterError("no repeats to compute a statistic of: expected at least one")
    if not np.all(np.isfinite(sample)):
        raise MeterError("a repeat is not a finite number: expected finite values, measure it again")
    return sample


def _t_quantile(confidence: float, freedom: int) -> float:
    from scipy.stats import t  # host only, and slow to import

    return float(t.ppf(0.5 + confidence / 2, freedom))
