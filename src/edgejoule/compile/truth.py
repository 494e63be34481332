"""The truth gate: what a compiled file computes and really runs, against what was asked for; what fails here is shown and never ranked.

Two kinds of evidence: the file's logits on real images beside the float32 network's (every build), and what the runtime says that it
executes: its precision, its providers, which operators went where. Accuracy on labelled images comes later, where there are labels
(``accuracies.doubts_of``). Runs nothing, knows no backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgejoule.caveats import caveat
from edgejoule.datasets.classification import wilson
from edgejoule.errors import BackendError, ModelError
from edgejoule.records import Caveat, Parity, Placement, SessionInfo, Variant

TINY = 1e-12  # stands in for the norm of a vanishing reference, so that its relative error stays a number
BLIND_RMS = 1e-3
# The largest relative error of an image's logits that rounding explains. Over 20 catalog networks with random weights, fp32 stayed below
# 1.2e-3 (levit_128s, which amplifies noise) and bfloat16 above 7e-3; a trained network of
# digits that was shown photographs moved by up to 0.11 in bfloat16 (median 0.034), and gave every test digit the same answer.
WORST = {"fp32": 3e-3, "tf32": 5e-2, "bf16": 0.25, "fp16": 5e-2, "int8": 1.0}
# The median over images, which quantisation moves: a sound int8 network stays near 0.03, one whose runtime corrupts it was at 0.56.
TYPICAL = {"bf16": 7e-2, "int8": 0.25}
# How often the first answer must stay the same, at least: condemned where so few or fewer would stay by less than this chance, so that
# few images never condemn. With random weights classes are near ties that any rounding flips: there the logits' error is what judges.
SAME, SAME_RANDOM = {"fp32": 0.99, "tf32": 0.99, "bf16": 0.97, "fp16": 0.97, "int8": 0.97}, {"fp32": 0.99, "int8": 0.5}
CHANCE = 0.025
LEAST_DELEGATED = 0.9  # of an accelerator's nodes


def verify_parity(reference: np.ndarray[Any, Any], compiled: np.ndarray[Any, Any]) -> Parity:
    """The compiled file's logits (n, K) against the float32 network's (n, K); the relative error is of Euclidean norms, image by image.

    Raises ModelError or BackendError where the respective logits are not finite, BackendError for another shape.
    """
    if reference.shape != compiled.shape:
        raise BackendError(f"the compiled file gives logits of shape {compiled.shape}, the network {reference.shape}: use another backend")
    if not np.isfinite(reference).all():
        raise ModelError("the network's own logits are not finite on real images: check its weights")
    if not np.isfinite(compiled).all():
        raise BackendError("the compiled file's logits are not finite on real images: use precision='fp32'")
    wide = reference.astype(np.float64)  # (n, K)
    error = compiled.astype(np.float64) - wide
    relative = np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(wide, axis=1), TINY)  # (n,)
    same = wide.argmax(axis=1) == compiled.argmax(axis=1)
    return Parity(
        n=len(wide),
        max_abs=float(np.abs(error).max()),
        max_rel=float(relative.max()),
        top1_agreement=float(same.mean()),
        reference_rms=float(np.sqrt(np.square(wide).mean())),
        median_rel=float(np.median(relative)),
        agreement=wilson(int(same.sum()), len(wide)),
    )


def gate(variant: Variant, asked: str, device: str, info: SessionInfo, parity: Parity) -> tuple[Caveat, ...]:
    """Every doubt about an artifact that was compiled for precision ``asked`` and a device (``cpu``, ``cuda``, …); those of
    ``caveats.UNRANKED`` keep it out of rankings."""
    return (*of_weights(variant), *_precision(asked, info), *_placement(device, info.placement), *_parity(variant, asked, parity))


def of_weights(variant: Variant) -> tuple[Caveat, ...]:
    """What must be said of the weights, whatever became of the file."""
    if variant.weights != "random":
        return ()
    return (caveat("weights_random", f"{variant.spec.name} was built with random weights ({variant.weights_id})"),)


def _precision(asked: str, info: SessionInfo) -> Iterator[Caveat]:
    if info.precision != asked:
        yield caveat("precision_differs", f"{asked} was asked for, {info.runtime} runs {info.precision}")
        return
    if info.placement is None or not (kinds := info.placement.precisions):
        return
    if 2 * kinds.get(asked, 0) < sum(kinds.values()):
        seen = f"{kinds.get(asked, 0)} of {sum(kinds.values())} products with weights run in {asked}"
        yield caveat("precision_differs", f"{seen}: {info.placement.words}")


def _placement(device: str, placement: Placement | None) -> Iterator[Caveat]:
    if placement is None or placement.delegated >= placement.nodes:
        return
    elsewhere = device != "cpu" and placement.delegated < LEAST_DELEGATED * placement.nodes
    yield caveat("fell_back" if elsewhere else "partly_delegated", placement.words)


def _parity(variant: Variant, asked: str, parity: Parity) -> Iterator[Caveat]:
    if parity.reference_rms < BLIND_RMS:
        yield caveat("parity_blind", f"the logits' root mean square is {parity.reference_rms:.1e} over {parity.n} images")
    worst, typical = WORST.get(asked, 1.0), TYPICAL.get(asked)
    if parity.max_rel > worst:
        yield caveat("parity_low", f"relative error {parity.max_rel:.1e} (at most {worst:g}) on {parity.n} images")
    elif typical is not None and parity.median_rel is not None and parity.median_rel > typical:
        yield caveat("parity_low", f"median relative error {parity.median_rel:.1e} (at most {typical:g}) over {parity.n} images")
    random = variant.weights == "random"
    least, found = (SAME_RANDOM if random else SAME).get(asked, 0.75 if random else 0.97), parity.agreement
    if found is not None and _tail(round(found.value * found.n), found.n, least) < CHANCE and parity.reference_rms >= BLIND_RMS:
        yield caveat("answers_differ", f"the same top-1 on {found.value:.1%} of {found.n} images, at least {least:.0%} expected")


def _tail(hits: int, n: int, share: float) -> float:
    """The chance of ``hits`` or fewer of n where each comes with probability ``share``: the binomial distribution's lower tail."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(hits + 1))
