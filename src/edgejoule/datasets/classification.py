"""What a classifier got right, from its logits and the labels: top-1, top-5, loss, calibration, per class. Pure numpy.

``judge`` turns a block of logits into a few numbers an image, so that a large split is never held as logits; ``scores_of`` adds them up.
Knows no image, no model and no file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgejoule.errors import DataError
from edgejoule.records import Interval, Scores

Z = 1.959963984540054  # the standard normal's 97.5 % quantile
BINS = 15  # of the calibration error, as in Guo et al.
AMONG = 5
BROKEN = -1  # stands for the answer where the logits are not finite

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Judged:
    """A classifier's answers to N labelled images, one number each."""

    labels: Integers  # (N,)
    answers: Integers  # (N,) the first answer; BROKEN where a logit is not finite
    among: Flags  # (N,) the label is among the first five answers
    confidence: Floats  # (N,) the softmax of the first answer; NaN where broken
    loss: Floats  # (N,) negative log-likelihood of the label, nats; NaN where broken
    classes: int  # K

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def broken(self) -> int:
        return int(np.count_nonzero(self.answers == BROKEN))

    @property
    def right(self) -> Flags:
        """(N,)"""
        return np.equal(self.answers, self.labels)


def judge(logits: npt.ArrayLike, labels: npt.ArrayLike) -> Judged:
    """Logits (N, K) and labels (N,) in [0, K) -> Judged.

    Of equal logits the lower class comes first, whatever the label, so that a network that always says the same is right by chance
    only. A row that holds NaN or an infinity is wrong, whatever else it holds. The softmax is taken in float64 after the row's largest
    logit is subtracted. Raises DataError for other shapes and labels that are none.
    """
    wide = np.asarray(logits, dtype=np.float64)  # (N, K)
    wanted = np.asarray(labels)
    if wide.ndim != 2 or wanted.shape != wide.shape[:1] or 0 in wide.shape:
        raise DataError(f"logits of shape {wide.shape} and labels of shape {wanted.shape} do not fit: expected (N, K) and (N,), N, K > 0")
    if not np.issubdtype(wanted.dtype, np.integer) or wanted.min() < 0 or wanted.max() >= wide.shape[1]:
        raise DataError(f"a label is none of the {wide.shape[1]} classes: expected whole numbers from 0 to {wide.shape[1] - 1}")
    wanted = wanted.astype(np.int64)
    rows = np.arange(len(wide))
    finite: Flags = np.asarray(np.isfinite(wide).all(axis=1))  # (N,)
    safe = np.where(finite[:, None], wide, 0.0)
    answers = safe.argmax(axis=1)
    own = safe[rows, wanted][:, None]
    before = (safe > own) | ((safe == own) & (np.arange(wide.shape[1]) < wanted[:, None]))  # (N, K) classes placed before the label
    top = safe.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(safe - top).sum(axis=1)) + top[:, 0]  # (N,) log of the sum of exponentials
    return Judged(
        labels=wanted,
        answers=np.where(finite, answers, BROKEN),
        among=finite & (before.sum(axis=1) < AMONG),
        confidence=np.where(finite, np.exp(top[:, 0] - normaliser), np.nan),
        loss=np.where(finite, normaliser - own[:, 0], np.nan),
        classes=wide.shape[1],
    )


def joined(parts: Sequence[Judged]) -> Judged:
    """The parts in order as one. Raises DataError for none, or for parts of different numbers of classes."""
    if not parts:
        raise DataError("there are no images to judge: expected at least one")
    if len({part.classes for part in parts}) > 1:
        raise DataError(f"the parts have {', '.join(str(part.classes) for part in parts)} classes: expected one number")
    return Judged(
        labels=np.concatenate([part.labels for part in parts]),
        answers=np.concatenate([part.answers for part in parts]),
        among=np.concatenate([part.among for part in parts]),
        confidence=np.concatenate([part.confidence for part in parts]),
        loss=np.concatenate([part.loss for part in parts]),
        classes=parts[0].classes,
    )


def scores(logits: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str]) -> Scores:
    """Scores of logits (N, K) on labels (N,); ``classes`` are the names by label. Raises DataError as ``judge`` and ``scores_of`` do."""
    return scores_of(judge(logits, labels), classes)


def scores_of(judged: Judged, classes: Sequence[str]) -> Scores:
    """The scores of judged answers; top-5 is None where there are five classes or fewer.

    Images whose logits were not finite count as wrong, and have neither loss nor confidence. Raises DataError where ``classes`` has
    another length than the logits, and where no row at all was finite.
    """
    if len(classes) != judged.classes:
        raise DataError(f"there are {len(classes)} classes and {judged.classes} logits: expected as many of one as of the other")
    finite = judged.answers != BROKEN
    if not finite.any():
        raise DataError(f"none of the {len(judged)} rows of logits is finite: compile with precision fp32, or train again")
    n, right = len(judged), judged.right
    shown = _told_apart(classes)
    images = np.bincount(judged.labels, minlength=len(classes))  # (K,)
    hits = np.bincount(judged.labels[right], minlength=len(classes))
    return Scores(
        n=n,
        top1=wilson(int(right.sum()), n),
        top5=wilson(int(judged.among.sum()), n) if judged.classes > AMONG else None,
        loss=float(judged.loss[finite].mean()),
        calibration_error=calibration_error(judged.confidence[finite], right[finite]),
        per_class={shown[k]: wilson(int(hits[k]), int(images[k])) for k in range(len(classes)) if images[k]},
    )


def calibration_error(confidence: Floats, right: Flags) -> float:
    """Expected calibration error of confidences (N,) in [0, 1] and whether each answer was right (N,); N > 0. A fraction.

    ``sum over bins of (n_m / N) |accuracy of m - mean confidence of m|`` with 15 bins of equal width, bin m being ((m-1)/15, m/15]: a
    confidence of 1 lies in the last bin, one on an edge in the bin below it, and 0, which no softmax gives, in the first.
    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    edges = np.arange(1, BINS + 1) / BINS
    place = np.minimum(np.searchsorted(edges, confidence, side="left"), BINS - 1)  # (N,)
    gap = np.bincount(place, right.astype(np.float64) - confidence, minlength=BINS)  # (15,) n_m (accuracy - confidence)
    return float(np.abs(gap).sum() / len(confidence))


def wilson(hits: int, n: int) -> Interval:
    """The share hits / n and its 95 % score interval, for 0 <= hits <= n, n > 0; never outside [0, 1], and not a point at 0 or 1.

    ``(p + z^2/2n -+ z sqrt(p (1-p)/n + z^2/4n^2)) / (1 + z^2/n)``, z = 1.96. Source: Wilson 1927, JASA 22:209; recommended by Brown, Cai
    and DasGupta 2001, Statistical Science 16:101. Raises DataError outside the domain.
    """
    if n < 1 or not 0 <= hits <= n:
        raise DataError(f"{hits} of {n} is no share: expected 0 <= hits <= n with n > 0")
    share, square = hits / n, Z * Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    low = 0.0 if hits == 0 else max(0.0, centre - half)  # exactly: rounding must not leave it just beside its own bound
    high = 1.0 if hits == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def paired_difference(first: Flags, second: Flags) -> Interval:
    """The share of (N,) ``first`` less that of ``second``, both of the same N images, with its 95 % interval; N > 0.

    With b images only the first and c only the second got right: value (b - c) / N; bounds from half an image added to each of the
    four cells, ``d = (b - c) / (N + 2)``, ``d -+ z sqrt((b + c + 1) / (N + 2) - d^2) / sqrt(N + 2)``, widened to hold the value.
    Source: Agresti and Min 2005, Statistics in Medicine 24:729. Raises DataError for other shapes.
    """
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise DataError(f"{first.shape} and {second.shape} are not pairs: expected two arrays (N,) of the same N > 0")
    n = len(first)
    only, other = int(np.count_nonzero(first & ~second)), int(np.count_nonzero(second & ~first))
    value, middle = (only - other) / n, (only - other) / (n + 2)
    half = Z * math.sqrt(((only + other + 1) / (n + 2) - middle * middle) / (n + 2))
    return Interval(value, max(-1.0, min(value, middle - half)), min(1.0, max(value, middle + half)), n)


def _told_apart(classes: Sequence[str]) -> tuple[str, ...]:
    """Names, each once: ImageNet has two cranes. A name that comes again bears its label."""
    often = Counter(classes)
    return tuple(f"{name} ({label})" if often[name] > 1 else name for label, name in enumerate(classes))
