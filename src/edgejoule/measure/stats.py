"""Statistics: Student's t over repeats, never a bootstrap of five (95 % nominal covers 82 %); block bootstrap within a run. Host only.

The inferences of one repeat are not independent (autocorrelation), repeats in fresh processes are: intervals are over repeats. What can
only be had within a run, the interval of a percentile, counts how many independent samples the series is worth and refuses (no bounds)
where they are too few. ``benchmarks/coverage.py`` simulates how often each of these intervals holds the truth.
Knows no trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgejoule.errors import MeterError
from edgejoule.records import Interval

OUTLYING = 14.826  # median absolute deviations, as hyperfine's
FENCE, FAR_FENCE = 1.5, 3.0  # interquartile ranges beyond the quartiles (Tukey 1977)
SEQUENTIAL = 0.7  # of the error that is allowed
FEWEST_EFFECTIVE = 30.0  # independent samples: with fewer, the autocorrelation itself is not known
FEWEST_MEANS = 20  # of short batches
BLOCK = 5.0  # autocorrelation times in a block
CELLS = 8  # places in a block's length at which blocks may begin
MANY_BLOCKS = 1000  # need no overlap
ELEMENTS = 4_000_000  # of one array at a time: 32 MB
FEWEST_STEPS = 1000  # on which a percentile is sought, within eight standard errors

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outlying:
    """Places (from 0) of values that lie far off. ``far``: more than 14.826 MAD from the median; the others beyond Tukey's fences."""

    far: tuple[int, ...]
    mild: tuple[int, ...]  # beyond 1.5 interquartile ranges, ``extreme`` included
    extreme: tuple[int, ...]  # beyond 3


@dataclass(frozen=True, slots=True)
class Both:
    """The same figure with and without the values that are ``far`` off, so that a reader sees what they do; none is deleted."""

    all: Interval
    without: Interval
    left_out: int


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Relative half-widths, kept apart: ``random`` shrinks with repeats, ``systematic`` (the instrument's) does not. None: not known."""

    random: float | None
    systematic: float | None
    total: float | None  # in quadrature; None where either is not known


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


def sequential_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t-interval of repeats whose number its own width decided, with three tenths less error allowed (96.5 % for 95 %).

    Stopping when an interval is narrow picks the samples that scatter too little by chance: a plain 95 % interval then covers 92 % at
    worst (5 to 20 repeats, simulated in benchmarks/coverage.py), this one 94 %. Raises MeterError as ``t_interval`` does.
    """
    return t_interval(values, 1 - SEQUENTIAL * (1 - confidence))


def ratio_interval(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio of paired repeats (geometric mean) and its t-interval, computed on logarithms so that it stays positive.

    Raises MeterError where the repeats are not paired or not all positive.
    """
    return paired_ratio(values, baseline).interval(confidence)


@dataclass(frozen=True, slots=True)
class LogRatio:
    """The logarithm of a ratio with its standard error and Student-t degrees of freedom, both None where n < 2."""

    value: float
    error: float | None
    freedom: float | None
    n: int

    def interval(self, confidence: float = 0.95) -> Interval:
        ratio = math.exp(self.value)
        if self.error is None or self.freedom is None:
            return Interval(ratio, None, None, self.n)
        half = _t_quantile(confidence, self.freedom) * self.error
        return Interval(ratio, math.exp(self.value - half), math.exp(self.value + half), self.n)

    def p_value(self) -> float | None:
        """Two-sided probability of a ratio at least that far from 1, were it 1; None where n < 2."""
        from scipy.stats import t

        if self.error is None or self.freedom is None:
            return None
        if self.error == 0:
            return float(self.value == 0)
        return float(2 * t.sf(abs(self.value) / self.error, self.freedom))


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> LogRatio:
    """Of pairs, the i-th of both measured in one round. Raises MeterError where they are not as many or not all positive."""
    top, bottom = _positive(values), _positive(baseline)
    if len(top) != len(bottom):
        raise MeterError(f"cannot pair {len(top)} repeats with {len(bottom)}: expected as many of each")
    logs, n = np.log(top) - np.log(bottom), len(top)
    error = float(np.std(logs, ddof=1)) / n**0.5 if n > 1 else None
    return LogRatio(float(np.mean(logs)), error, n - 1 if n > 1 else None, n)


def unpaired_ratio(values: Sequence[float], baseline: Sequence[float]) -> LogRatio:
    """Of geometric means of repeats that share no rounds. Raises MeterError where a repeat is not positive."""
    sides = [np.log(_positive(side)) for side in (values, baseline)]
    spreads = [float(np.std(side, ddof=1)) if len(side) > 1 else 0.0 for side in sides]
    return welch_ratio(float(np.mean(sides[0]) - np.mean(sides[1])), spreads, [len(side) for side in sides])


def unpaired_ratio_interval(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio of repeats that share no rounds and its interval by Welch's t. Raises MeterError where a repeat is not positive."""
    return unpaired_ratio(values, baseline).interval(confidence)


def welch_ratio(value: float, spreads: Sequence[float], counts: Sequence[int]) -> LogRatio:
    """A logarithm of a ratio whose two sides scatter differently, from their standard deviations (of logarithms) and numbers of repeats.

    Degrees of freedom by Welch 1947, Biometrika 34, 28. ``n`` is the smaller number of repeats.
    """
    n = min(counts)
    if n < 2:
        return LogRatio(value, None, None, n)
    left, right = (spread**2 / count for spread, count in zip(spreads, counts, strict=True))
    if left + right == 0:
        return LogRatio(value, 0.0, n - 1, n)
    shares = [part / (left + right) for part in (left, right)]
    freedom = 1 / sum(share**2 / (count - 1) for share, count in zip(shares, counts, strict=True))
    return LogRatio(value, (left + right) ** 0.5, freedom, n)


def interval_spread(interval: Interval, confidence: float = 0.95) -> float | None:
    """Standard deviation of the repeats over their mean, from their t-interval; None where it has no bounds or no value."""
    width = half_width(interval)
    return None if width is None else width * interval.n**0.5 / _t_quantile(confidence, interval.n - 1)


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


def total_uncertainty(random_half_width: float | None, systematic: float | None) -> Uncertainty:
    """Relative half-widths (0.02 is +-2 %) of the random and the systematic error, and of both in quadrature.

    A systematic error of 0 means that nobody stated one (``Trace.systematic``), so there is no total: a repeatable reading is not a
    right one. Raises MeterError for a negative or infinite one.
    """
    for part in (random_half_width, systematic):
        if part is not None and not 0 <= part < float("inf"):
            raise MeterError(f"{part:g} is not a relative uncertainty: expected a finite number of at least 0")
    known = systematic or None
    total = None if random_half_width is None or known is None else float(np.hypot(random_half_width, known))
    return Uncertainty(random_half_width, known, total)


def outlying(values: Sequence[float]) -> Outlying:
    """Which values lie far off, by two rules; to be flagged, never deleted. Nothing is far off where most values are equal.

    Raises MeterError where there is no value, or one that is not a finite number.
    """
    sample = _scaled(_checked(values))
    away = np.abs(sample - np.median(sample))
    mad = float(np.median(away))
    low, high = np.percentile(sample, [25, 75])
    beyond = np.maximum(low - sample, sample - high)  # (N,)

    def places(flags: npt.NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(np.flatnonzero(flags).tolist())

    fences = [places(beyond > width * (high - low)) if high > low else () for width in (FENCE, FAR_FENCE)]
    return Outlying(places(away > OUTLYING * mad) if mad > 0 else (), *fences)


def with_and_without(values: Sequence[float], confidence: float = 0.95) -> Both:
    """The t-interval of all repeats, and that of those which are not ``far`` off. Raises MeterError as ``t_interval`` does."""
    far = outlying(values).far
    kept = np.delete(_checked(values), far)
    return Both(t_interval(values, confidence), t_interval(kept.tolist(), confidence), len(far))


# ---------------------------------------------------------------- within one run


def effective_sample_size(values: Sequence[float]) -> float:
    """How many independent samples the mean of an autocorrelated series (N,) is worth, 1 to N: N / tau, tau the sum of its correlations.

    Sums of adjacent autocovariances are added up while they are positive and made to fall (Geyer 1992, Practical Markov Chain Monte
    Carlo, Statist. Sci. 7, section 3.3). Never more than N, so that a series that alternates is not overrated. A series
    that is constant, or shorter than 4, is taken as independent; one with a trend is worth few samples, whatever its length.
    Raises MeterError where there is no value, or one that is not a finite number.
    """
    sample = _checked(values)
    n = len(sample)
    sample = _scaled(sample)
    sample = sample - np.mean(sample)
    if n < 4 or np.ptp(sample) == 0:
        return float(n)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(sample, size)
    covariance = np.fft.irfft(spectrum.real**2 + spectrum.imag**2, size)[: n - n % 2]
    sums = covariance[0::2] + covariance[1::2]
    ends = np.flatnonzero(sums <= 0)
    positive = np.minimum.accumulate(sums[: ends[0]] if len(ends) else sums)
    if covariance[0] <= 0:
        return float(n)
    tau = 2 * float(np.sum(positive)) / float(covariance[0]) - 1
    return float(min(n, max(1.0, n / max(tau, 1.0))))


def block_bootstrap(
    values: Sequence[float], percent: float = 50.0, confidence: float = 0.95, seed: int = 0, resamples: int = 2000
) -> Interval:
    """A percentile of one run's autocorrelated series (N,) and its interval; ``n`` is what the series is worth in independent samples.

    Circular blocks (Politis & Romano 1992) of five autocorrelation times, at least N^(1/3); the bootstrap's percentiles are taken further
    out, for the few blocks and for the correlation that blocks cut (expanded percentile interval, Hesterberg 2015, Amer. Statist. 69,
    371; half its degrees of freedom: chosen by benchmarks/coverage.py). The interval is never narrower than that of the order statistics
    of about ``n`` independent samples (Clopper & Pearson 1934). An autocorrelation time is itself estimated to about 2 / sqrt(n) of it
    (Madras & Sokal 1988, J. Stat. Phys. 50, 109), and is taken to be so much longer. No bounds where ``n``
    is below 30, or too small for one of its samples to lie beyond the percentile with that confidence (p90 needs 36, p99 368 of them).
    Changes slower than a tenth of the series cannot be told from a trend or from nothing. The same seed gives the same interval.
    Raises MeterError for a percent outside (0, 100) and for what is no sample.
    """
    sample = _checked(values)
    if not 0 < percent < 100 or not 0 < confidence < 1 or resamples < 1:
        raise MeterError(f"percent={percent:g}, confidence={confidence:g}, resamples={resamples}: expected (0, 100), (0, 1) and at least 1")
    value, share = float(np.percentile(sample, percent)), percent / 100
    of_share = _cautious_size((sample <= value).astype(np.float64))
    worth = min(_cautious_size(_ranks(sample)), of_share)
    outside = (1 - confidence) / 2
    if worth < FEWEST_EFFECTIVE or max(share, 1 - share) ** worth > outside:
        return Interval(value, None, None, int(worth))
    doubt = 1 - 2 / worth**0.5
    tau = len(sample) / worth
    length = max(BLOCK * tau / doubt if tau > 1.5 else 1.0, len(sample) ** (1 / 3))
    blocks = len(sample) / length
    found = _resampled(sample, share, max(2, round(blocks)), worth, np.random.default_rng(seed), resamples)
    widened = (blocks / (blocks - 1) / (1 - tau / (2 * length))) ** 0.5
    reach = _normal_tail(_t_quantile(confidence, (blocks - 1) / 2) * widened)
    low, high = np.quantile(found, [reach, 1 - reach])
    least, most = np.quantile(sample, _binomial_bounds(share, doubt * (of_share * worth) ** 0.5, outside))
    return Interval(value, float(min(low, least, value)), float(max(high, most, value)), int(worth))


def _resampled(sample: Samples, share: float, blocks: int, worth: float, rng: np.random.Generator, resamples: int) -> Samples:
    """The percentile in each resample of circular blocks (R,).

    Blocks begin at cells, an eighth of their length apart (a whole one, where there are many), and a cell's samples share a weight.
    Only samples within eight standard errors of the percentile are looked at: no resample's percentile lies outside.
    """
    n = len(sample)
    cells = min(n, blocks * (CELLS if blocks < MANY_BLOCKS else 1))
    span = max(1, round(cells / blocks))
    cell_of = np.arange(n) * cells // n
    order = np.argsort(sample, kind="stable")
    reach = 8 * n * (share * (1 - share) / worth) ** 0.5 + 2
    start, stop = max(0, int(n * share - reach)), min(n, int(n * share + reach) + 1)
    near, sizes = order[start:stop], np.bincount(cell_of, minlength=cells).astype(np.float64)
    under = np.bincount(cell_of[order[:start]], minlength=cells).astype(np.float64)
    steps, counted = _steps(cell_of[near], cells)
    turn, found = max(1, ELEMENTS // max(cells, len(steps))), []
    for done in range(0, resamples, turn):
        weights = _weights(rng, min(turn, resamples - done), blocks, cells, span)  # (rows, cells)
        count = counted(weights) + (weights @ under)[:, None]  # (rows, steps): samples at or below each step
        place = np.count_nonzero(count < share * (weights @ sizes)[:, None], axis=1)
        found.append(sample[near[steps[np.minimum(place, len(steps) - 1)]]])
    return np.concatenate(found)


def _steps(cell_of: npt.NDArray[np.int64], cells: int) -> tuple[npt.NDArray[np.int64], Callable[[Samples], Samples]]:
    """Which of the samples (given in rising order, by their cells) are tried as the percentile, and how weights count up to each.

    All of them where a table of cells by steps would be too large; else at most as many as fit, which is finer than the interval needs.
    """
    fit = ELEMENTS // cells
    if fit < FEWEST_STEPS:
        return np.arange(len(cell_of)), lambda weights: np.cumsum(weights[:, cell_of], axis=1)
    width = -(-len(cell_of) // fit)
    steps = np.minimum(np.arange(width - 1, len(cell_of) + width - 1, width), len(cell_of) - 1)
    places = cell_of * len(steps) + np.arange(len(cell_of)) // width
    table = np.bincount(places, minlength=cells * len(steps)).reshape(cells, len(steps)).cumsum(axis=1).astype(np.float64)
    return steps, lambda weights: np.asarray(weights @ table, dtype=np.float64)


def _weights(rng: np.random.Generator, rows: int, blocks: int, cells: int, span: int) -> Samples:
    """How often each cell was drawn (rows, cells), where so many blocks of ``span`` cells begin at random, the end joined to the start."""
    begins = rng.integers(0, cells, (rows, blocks)) + cells * np.arange(rows)[:, None]
    started = np.bincount(begins.ravel(), minlength=rows * cells).reshape(rows, cells)
    sums = np.cumsum(np.concatenate([np.zeros((rows, 1), dtype=np.int64), started[:, cells - span + 1 :], started], axis=1), axis=1)
    return np.asarray(sums[:, span:] - sums[:, :-span], dtype=np.float64)


def _cautious_size(sample: Samples) -> float:
    """The effective sample size, or where it is smaller that which short batches' means show.

    Slow changes under much fast noise escape Geyer's sum, which the noise ends early; a mean over N^0.4 samples has less noise.
    """
    worth, length = effective_sample_size(sample.tolist()), round(len(sample) ** 0.4)
    means = np.mean(sample[: len(sample) // length * length].reshape(-1, length), axis=1)
    if len(means) < FEWEST_MEANS or np.ptp(means) == 0:
        return worth
    return max(1.0, min(worth, effective_sample_size(means.tolist()) * float(np.var(sample)) / float(np.var(means))))


def _ranks(sample: Samples) -> Samples:
    """Places from 0, equal values sharing the mean of theirs: what correlates in time without the weight of outliers."""
    _, inverse, counts = np.unique(sample, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[inverse.ravel()], dtype=np.float64)


def _binomial_bounds(share: float, n: float, outside: float) -> tuple[float, float]:
    """Clopper-Pearson bounds of a share seen in n samples (n need not be whole)."""
    from scipy.stats import beta

    k = share * n
    return float(beta.ppf(outside, k, n - k + 1)), float(beta.ppf(1 - outside, k + 1, n - k))


def _checked(values: Sequence[float]) -> Samples:
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample):
        raise MeterError("no repeats to compute a statistic of: expected at least one")
    if not np.all(np.isfinite(sample)):
        raise MeterError("a repeat is not a finite number: expected finite values, measure it again")
    return sample


def _scaled(sample: Samples) -> Samples:
    """At most 1 in size, so that neither squares nor differences overflow."""
    return np.asarray(sample / 2 / (float(np.max(np.abs(sample / 2))) or 1.0), dtype=np.float64)


def _positive(values: Sequence[float]) -> Samples:
    sample = _checked(values)
    if np.any(sample <= 0):
        raise MeterError("cannot take the ratio of repeats that are zero or negative: expected positive values only")
    return sample


def _t_quantile(confidence: float, freedom: float) -> float:
    from scipy.stats import t  # host only, and slow to import

    return float(t.ppf(0.5 + confidence / 2, freedom))


def _normal_tail(z: float) -> float:
    """One-sided probability beyond z."""
    return 0.5 * math.erfc(z / math.sqrt(2))
