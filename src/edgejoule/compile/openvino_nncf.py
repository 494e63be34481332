"""int8 by NNCF, Intel's quantiser, on OpenVINO's own graph: what to quantise, how to smooth, which ranges, what to put back to float.

Default scope: the inputs of linear layers and convolutions, nothing else (no adds, norms, softmax, GELU, products of activations).
Every choice is made on held-out images by the error of the logits, and stops at the budget of accuracy. NNCF reports its use to its
vendor and prints as it works: here it is imported without the package that reports, and works in silence. Runs on a host; knows no
device: it judges on this machine's CPU, whose int8 products are exact where it has VNNI, or where ``weight_bits`` is 7.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.compile.export import quiet
from edgejoule.compile.openvino_import import REPORTER, core, signal_stack_kept, without
from edgejoule.compile.openvino_restore import WAY, activation_quantizers, bypass, int8_names, is_weighted, weighted_names
from edgejoule.compile.openvino_rewrite import fold_constants, read_for_int8
from edgejoule.compile.quantize.options import Chosen, Options
from edgejoule.compile.quantize.score import Score
from edgejoule.compile.quantize.search import unquantize
from edgejoule.errors import BackendError
from edgejoule.seams import CompileContext, Held

Array = np.ndarray[Any, Any]
ALPHAS: tuple[str, ...] = ("off", "0.15", "0.5", "0.95")  # NNCF's own conformance tests need each of them for some ViT; its default is 0.95
RANGES = ("minmax", "percentile", "mse")
USUAL = ("0.5", "minmax")
OUTLIERS = 1e-4  # of percentile: the fraction of an image's values that falls outside, at either end
RANKED_IMAGES = 8  # are enough to say which layers hurt most
MOST_RUNS = 8  # of NNCF, in looking for the layers: seconds each
ROUNDING = 1e-9
TINY = 1e-12


@dataclass(frozen=True)
class Attempt:
    """A quantised model, how it was made, and what it costs on the held-out images."""

    model: Any
    smoothing: str
    ranges: str
    error: float
    drop_pct: float
    kept: tuple[str, ...] = ()


@dataclass
class Judge:
    """The float32 network's answers on held-out images, and how far a model is from them."""

    images: list[Array]  # of (B, C, H, W)
    held: Held
    kind: str
    wanted: Array = field(default_factory=lambda: np.empty((0, 0)))  # (M, K)

    def logits(self, model: Any, most: int | None = None) -> Array:
        """(M, K) float64, of the first ``most`` batches."""
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        request = core().compile_model(model, "CPU", config).create_infer_request()
        rows = [request.infer(batch, share_inputs=True)[0] for batch in self.images[:most]]
        return np.concatenate(rows)[: len(self.held.images)].astype(np.float64)

    def error(self, logits: Array) -> float:
        """Mean over images of ||logits - float32 logits|| / ||float32 logits||; infinite where they are not finite."""
        wanted = self.wanted[: len(logits)]
        relative = np.linalg.norm(logits - wanted, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), TINY)
        return float(relative.mean()) if np.isfinite(relative).all() else math.inf

    def drop_pct(self, logits: Array) -> float:
        """Points of top-1 lost, by labels where there are any; else points of agreement with the float32 network."""
        answers, wanted = logits.argmax(axis=1), self.wanted.argmax(axis=1)
        truth = wanted if self.held.labels is None else np.asarray(self.held.labels)
        return 100.0 * float((wanted == truth).mean() - (answers == truth).mean())


def quantize_by_nncf(source: Path, context: CompileContext, options: Options) -> tuple[Any, Chosen]:
    """An OpenVINO model of ``source`` (float32 ONNX) with int8 products. Raises BackendError; NNCF's own exceptions pass."""
    search = _Search(source, context, options)
    best = search.smoothing_and_ranges()
    if options.search and not search.meets_budget(best):
        best = search.restored(best)
    best = search.corrected(best)
    return best.model, search.chosen(best)


class _Search:
    """The order of events. Each attempt is one run of NNCF and one of the held-out images."""

    def __init__(self, source: Path, context: CompileContext, options: Options) -> None:
        self._nncf, self._context, self._options = _nncf(), context, options
        self._float = fold_constants(read_for_int8(source))  # NNCF takes a weight for one only where it is a constant
        calibration = context.calibration()
        if calibration is None or not len(calibration):
            raise BackendError("int8 needs images to calibrate with, none were given: name a source of images, or use precision='fp32'")
        self._calibration = _batches(calibration, context.shape[0])
        self._guesses = context.held is None  # nothing to choose by: the usual choice stands, and its cost is told on what it was made with
        held = context.held() if context.held is not None else Held(calibration)
        self._judge = Judge(_batches(held.images, context.shape[0]), held, "agreement" if held.labels is None else "top-1")
        self._judge.wanted = self._judge.logits(self._float)
        self._allowed_pct = max(context.max_drop_pct, 100.0 / len(held.images)) + ROUNDING  # less than one image cannot be told
        self._tried: dict[tuple[str, str, tuple[str, ...], bool], Attempt] = {}

    def meets_budget(self, attempt: Attempt) -> bool:
        return attempt.drop_pct <= self._allowed_pct

    def smoothing_and_ranges(self) -> Attempt:
        """The least error: first over smoothing, then with that over ranges; ``USUAL`` where there are no held-out images."""
        usual = USUAL if self._guesses else None
        alphas = _candidates(str(self._options.smoothing), usual[:1] if usual else ALPHAS)
        ranges = _candidates(self._options.ranges, usual[1:] if usual else RANGES)
        best = min((self._attempt(alpha, ranges[0]) for alpha in alphas), key=_cost)
        return min((best, *(self._attempt(best.smoothing, other) for other in ranges[1:])), key=_cost)

    def restored(self, best: Attempt) -> Attempt:
        """Puts what hurts most back to float, until the budget is met or half of the products are float."""
        self._context.notify(f"int8 costs {best.drop_pct:.2g} points, at most {self._allowed_pct:.2g} are allowed: looking for the layers")
        quantizers = activation_quantizers(best.model)
        few = -(-RANKED_IMAGES // self._context.shape[0])
        worst = sorted(quantizers, key=lambda name: self._judge.error(self._judge.logits(bypass(best.model, name), few)))
        layers = tuple(dict.fromkeys(layer for name in worst for layer in quantizers[name]))

        def attempt(kept: frozenset[str]) -> Attempt:
            return self._attempt(best.smoothing, best.ranges, tuple(sorted(kept)))

        def score(kept: frozenset[str]) -> Score:
            found = attempt(kept)
            return Score(found.error, found.drop_pct)

        start = Score(best.error, best.drop_pct)
        return attempt(unquantize(layers, start, score, lambda found: found.drop_pct <= self._allowed_pct, MOST_RUNS).kept_float)

    def corrected(self, best: Attempt) -> Attempt:
        """With biases that make up for the mean error of their layers, where that helps. Half of NNCF's time: once, at the end."""
        corrected = self._attempt(best.smoothing, best.ranges, best.kept, correct=True)
        return min((best, corrected), key=lambda attempt: (not self.meets_budget(attempt), attempt.error))

    def _attempt(self, smoothing: str, ranges: str, kept: tuple[str, ...] = (), correct: bool = False) -> Attempt:
        key = smoothing, ranges, kept, correct
        if key not in self._tried:
            self._context.notify(f"quantising: smoothing {smoothing}, ranges {ranges}, {len(kept)} layers kept in float")
            model = self._quantize(*key)
            logits = self._judge.logits(model)
            self._tried[key] = Attempt(model, smoothing, ranges, self._judge.error(logits), self._judge.drop_pct(logits), kept)
        return self._tried[key]

    def _quantize(self, smoothing: str, ranges: str, kept: tuple[str, ...], correct: bool) -> Any:
        nncf, model = self._nncf, self._float.clone()
        advanced = nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1.0 if smoothing == "off" else float(smoothing)),
            activations_range_estimator_params=_estimator(ranges),
            disable_bias_correction=not correct,
            overflow_fix=nncf.OverflowFix.ENABLE if self._options.weight_bits == 7 else nncf.OverflowFix.FIRST_LAYER,
        )
        with quiet(), signal_stack_kept():  # NNCF begins plugins of its own
            return nncf.quantize(
                model,
                nncf.Dataset(self._calibration),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(self._calibration),
                model_type=None if self._options.scope == "all" else nncf.ModelType.TRANSFORMER,
                ignored_scope=_ignored(nncf, model, self._options.scope, kept),
                advanced_parameters=advanced,
            )

    def chosen(self, best: Attempt) -> Chosen:
        products, quantised = weighted_names(self._float), int8_names(best.model)
        naive = self._tried.get(("off", "minmax", (), False))
        floats = tuple(name for name in products if name not in quantised)
        return Chosen(
            quantizer="nncf",
            smoothing=best.smoothing,
            ranges=best.ranges,
            quantized=len(products) - len(floats),
            products=len(products),
            kept_float=floats,
            error=best.error,
            naive_error=naive.error if naive is not None else None,
            drop_pct=best.drop_pct,
            drop_kind=self._judge.kind,
            held=len(self._judge.held.images),
            tried={f"{key[0]} {key[1]}": attempt.error for key, attempt in self._tried.items() if not key[2] and not key[3]},
            sessions=len(self._tried),
            within_budget=self.meets_budget(best),
        )


def _ignored(nncf: Any, model: Any, scope: str, kept: tuple[str, ...]) -> Any:
    """NNCF's transformer mode leaves adds, norms and softmax's product alone; "linear" forbids all but products with weights."""
    names, types = set(kept), set()
    if scope == "linear":
        for node in model.get_ops():
            kind = node.get_type_name()
            if kind == "MatMul" and not is_weighted(node):
                names.add(node.get_friendly_name())
            elif not is_weighted(node) and kind != "MatMul" and kind not in WAY:
                types.add(kind)
    return nncf.IgnoredScope(names=sorted(names), types=sorted(types), validate=False)


def _candidates(asked: str, all_of_them: tuple[str, ...]) -> tuple[str, ...]:
    return all_of_them if asked == "auto" else (asked,)


def _estimator(ranges: str) -> Any:
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        RangeEstimatorParametersSet,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    if ranges == "percentile":
        told = StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=OUTLIERS)
        return RangeEstimatorParameters(min=told, max=told)
    known = {"minmax": RangeEstimatorParametersSet.MINMAX, "mse": RangeEstimatorParametersSet.HISTOGRAM}
    return known[ranges]


def _cost(attempt: Attempt) -> float:
    return attempt.error


def _batches(images: Array, size: int) -> list[Array]:
    """Of (N, C, H, W) the batches (B, C, H, W), the last one filled up by repeating."""
    places = np.arange(-(-len(images) // size) * size) % len(images)
    return [np.ascontiguousarray(images[places[start : start + size]], dtype=np.float32) for start in range(0, len(places), size)]


class _Silent:
    """Stands where NNCF keeps its sender of usage reports."""

    def start_session(self, *_: Any, **__: Any) -> None: ...
    def send_event(self, *_: Any, **__: Any) -> None: ...
    def end_session(self, *_: Any, **__: Any) -> None: ...


def _nncf() -> Any:
    """The package, which sends nothing, and leaves its own class of loggers to nobody else."""
    kind = logging.getLoggerClass()
    try:
        with without(REPORTER), quiet():
            import nncf
            import nncf.telemetry.decorator
    finally:
        logging.setLoggerClass(kind)
    nncf.telemetry.decorator.telemetry = _Silent()  # somebody may have imported nncf before us
    return nncf
