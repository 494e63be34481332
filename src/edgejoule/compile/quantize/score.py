"""How good a candidate file is: run on held-out images (in onnxruntime, unless told how else) and compared with the float network.

The error is smooth and chooses between candidates; the drop (of top-1 where labels are known, else of agreement with the float
network's own answers) is what the budget is about. A drop of one image is always allowed: fewer cannot be told. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.quantize.graph import Array
from edgejoule.compile.quantize.observe import batches, session_options
from edgejoule.errors import BackendError
from edgejoule.seams import Held

TINY = 1e-12
GLANCE = 8  # held-out images


@dataclass(frozen=True)
class Score:
    error: float  # mean over images of ||quantised - float|| / ||float||, on logits
    drop_pct: float  # points of top-1 or of agreement


class Judge:
    """Scores candidate files on the same held-out images; counts how many it has run.

    ``run`` (file, images, batch, exact) -> logits, for files of another runtime's; a file is then whatever ``run`` takes.
    """

    def __init__(self, float_file: Any, held: Held, batch: int, max_drop_pct: float, run: Callable[..., Array] | None = None) -> None:
        self.images, self.batch, self._run = held.images, batch, run or logits_of
        self.runs = 0
        self.logits = self._run(float_file, held.images, batch)  # (M, K)
        answers = self.logits.argmax(axis=1)
        self.kind = "agreement" if held.labels is None else "top-1"
        self._truth = answers if held.labels is None else np.asarray(held.labels)
        self._right = float((answers == self._truth).mean())
        self.allowed_pct = max(max_drop_pct, 100.0 / len(held.images))

    def score(self, file: Any, exact: bool = False) -> Score:
        """``exact``: without the fusions that change the result of quantised products of two activations."""
        self.runs += 1
        logits = self._run(file, self.images, self.batch, exact)
        error = relative_error(logits, self.logits)
        return Score(error, 100.0 * (self._right - float((logits.argmax(axis=1) == self._truth).mean())))

    def glance(self, file: Any) -> float:
        """The error on the first few images: enough to rank products by, and not counted as a run."""
        return relative_error(self._run(file, self.images[:GLANCE], self.batch), self.logits[:GLANCE])

    def within(self, score: Score) -> bool:
        return score.drop_pct <= self.allowed_pct + 1e-9


def relative_error(logits: Array, wanted: Array) -> float:
    """Mean over images (M, K) of ||logits - wanted|| / ||wanted||; infinite where a logit is no number."""
    distance = np.linalg.norm(logits.astype(np.float64) - wanted, axis=1)
    error = float((distance / np.maximum(np.linalg.norm(wanted, axis=1), TINY)).mean())
    return error if np.isfinite(error) else float("inf")


def logits_of(path: Path, images: Any, batch: int, exact: bool = False) -> Array:
    """(M, K) logits. Raises BackendError where onnxruntime refuses the file."""
    import onnxruntime

    options = session_options(onnxruntime)
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        found = [session.run(None, {entry: part})[0] for part in batches(images, batch)]
    except Exception as error:
        from edgejoule.compile.reasons import reason

        raise BackendError(f"onnxruntime cannot run a quantised candidate ({reason(error)}): use precision='fp32'") from error
    joined: Array = np.concatenate(found)[: len(images)]
    return joined
