"""The order of events of quantisation: observe, try smoothings, then ranges, then put back to float what hurts.

Every candidate is a file that is run on held-out images; the number of them is bounded by the table below plus ``search.MOST_RUNS``.
Knows what is chosen and when, not how each part works.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgejoule.compile.quantize import nncf, qdq, search, sensitivity
from edgejoule.compile.quantize.convolutions import given_by_convolutions
from edgejoule.compile.quantize.graph import Graph, clean
from edgejoule.compile.quantize.held import calibration_and_held
from edgejoule.compile.quantize.norms import Norm, find_norms
from edgejoule.compile.quantize.observe import Observed, observe
from edgejoule.compile.quantize.options import Chosen, Options
from edgejoule.compile.quantize.ranges import Scale, activation_scale
from edgejoule.compile.quantize.score import Judge, Score
from edgejoule.compile.quantize.smoothing import smooth
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError, EdgejouleError
from edgejoule.seams import CompileContext

SMOOTHINGS: tuple[float | str, ...] = ("off", 0.15, 0.5, 0.95, "fold")  # NNCF's conformance tests need each of these alphas for some ViT
RANGES = ("mse", "minmax", "percentile 99.99", "percentile 99.9")
FIRST_RANGES = "mse"  # smoothings are compared with these
NNCF = "nncf"  # ranges and biases as it finds them
BETTER = 0.97  # a candidate further from plain must have at most this fraction of the error: less is noise


def quantize_onnx(source: Path, context: CompileContext, options: Options, target: Path) -> Chosen:
    """Writes ``source`` (float32 ONNX of one input and the logits) with Q/DQ to ``target``, and says what was chosen.

    Calibrates on ``context.calibration()``, and chooses on ``context.held()``; where nothing is held out, every third calibration
    image is. Raises BackendError where the file cannot be quantised, DataError from the context's images.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="edgejoule-quantize-") as folder:
            calibration, held = calibration_and_held(context)
            graph = clean(source, Path(folder))
            judge = Judge(source, held, context.shape[0], context.max_drop_pct)
            if options.scope == "all":
                return _everything(graph, judge, calibration, options, Path(folder), target)
            return _Bench(graph, judge, Path(folder), options, context).run(calibration, target)
    except (EdgejouleError, OSError):
        raise
    except Exception as error:
        raise BackendError(f"the ONNX file cannot be quantised ({reason(error)}): use precision='fp32'") from error


@dataclass(frozen=True)
class Candidate:
    smoothing: str
    ranges: str
    plan: qdq.Plan = field(repr=False)
    score: Score

    @property
    def name(self) -> str:
        return self.ranges if self.smoothing == "off" else f"{self.ranges}, smoothing {self.smoothing}"


class _Bench:
    """One quantisation: the cleaned graph and all that is needed to try a candidate."""

    def __init__(self, graph: Graph, judge: Judge, folder: Path, options: Options, context: CompileContext) -> None:
        self._graph, self._judge, self._folder, self._options, self._context = graph, judge, folder, options, context
        self._norms: tuple[Norm, ...] = find_norms(graph)
        self._given, self._delicate = given_by_convolutions(graph) if options.outputs == "conv" else ({}, frozenset())
        self._names = tuple(product.name for product in graph.products if product.name not in self._delicate)
        self._factors = _factors(graph) if options.scope == "attention" else ()
        self._smoothed: dict[str, tuple[Graph, dict[str, Observed]]] = {}
        self._tried: dict[str, Candidate] = {}
        self._corrected: dict[str, tuple[Graph, dict[str, Scale]]] = {}
        self._calibration: Any = None

    def run(self, calibration: Any, target: Path) -> Chosen:
        if not self._names:
            raise BackendError("the network has no linear layer or convolution that could run in int8: use precision='fp32'")
        self._context.notify(f"quantising {len(self._names)} products: observing {len(calibration)} calibration images")
        seen = observe(self._graph, self._tensors(), calibration, self._context.shape[0], self._folder)
        self._smoothed["off"] = self._graph, seen
        self._calibration = calibration
        naive = self._try("off", "minmax")
        best = self._choose(naive)
        kept: frozenset[str] = frozenset()
        score = best.score
        if self._options.search and not self._judge.within(score):
            kept, score = self._search(best)
        self._write(best, kept, target)
        return self._chosen(best, naive, kept, score)

    def _tensors(self) -> dict[str, int | None]:
        """What to observe: the sources of products, channel by channel where a norm may be folded, and what is quantised behind."""
        channelwise = {product.source: product.source_axis for norm in self._norms for product in norm.products}
        nodes = {node.name: node for node in self._graph.model.graph.node}
        plain = [product.source for product in self._graph.products] + list(self._given.values())
        plain += [tensor for name in self._factors for tensor in nodes[name].input]
        return {name: channelwise.get(name) for name in dict.fromkeys(plain)}

    def _choose(self, naive: Candidate) -> Candidate:
        """Smoothings first, compared with one kind of ranges; then the other ranges for the best of them."""
        asked = self._options.smoothing
        smoothings: Iterable[float | str] = SMOOTHINGS if asked == "auto" else (asked,)
        if not self._norms:
            smoothings = ("off",)
        if self._options.quantizer == "nncf":
            return _best(self._try(smoothing, NNCF) for smoothing in smoothings)
        ranges = RANGES if self._options.ranges == "auto" else tuple(r for r in RANGES if r.startswith(self._options.ranges))
        first = FIRST_RANGES if FIRST_RANGES in ranges else ranges[0]
        best = _best(self._try(smoothing, first) for smoothing in smoothings)
        best = _best([best, *(self._try(best.smoothing, kind) for kind in ranges if kind != first)])
        free = asked == "auto" and self._options.ranges == "auto"
        return _best([naive, best]) if free else best

    def _try(self, smoothing: float | str, ranges: str) -> Candidate:
        how = smoothing if isinstance(smoothing, str) else f"{smoothing:g}"
        key = f"{how} {ranges}"
        if key not in self._tried:
            candidate = Candidate(how, ranges, self._plan(self._scales(how, ranges)), Score(float("inf"), 100.0))
            score = self._score(candidate, frozenset())
            self._tried[key] = dataclasses.replace(candidate, score=score)
            self._context.notify(f"quantising: {candidate.name}: error {score.error:.2g}, drop {score.drop_pct:.2g} points")
        return self._tried[key]

    def _scales(self, how: str, ranges: str) -> dict[str, Scale]:
        _, seen = self._smooth(how)
        method, signed = FIRST_RANGES if ranges == NNCF else ranges, self._options.activations == "s8"
        found = {name: activation_scale(seen[name], method, signed) for name in seen}
        return {**found, **self._by_nncf(how)[1]} if ranges == NNCF else found

    def _plan(self, scales: dict[str, Scale]) -> qdq.Plan:
        options = self._options
        return qdq.Plan(scales, self._given, self._factors, options.weight_bits, options.weights == "mse", options.bias == "int32")

    def _smooth(self, how: str) -> tuple[Graph, dict[str, Observed]]:
        """The graph so smoothed. A graph holds all weights, so only the plain one and the last one are kept."""
        if how not in self._smoothed:
            graph, seen = self._smoothed["off"]
            self._smoothed = {"off": (graph, seen), how: smooth(graph, self._norms, seen, how if how == "fold" else float(how))}
        return self._smoothed[how]

    def _score(self, candidate: Candidate, kept: frozenset[str]) -> Score:
        path = self._folder / "candidate.onnx"
        self._write(candidate, kept, path)
        return self._judge.score(path, exact=bool(self._factors))

    def _write(self, candidate: Candidate, kept: frozenset[str], path: Path) -> None:
        qdq.write(self._graph_of(candidate), candidate.plan, set(self._names) - kept, path)

    def _graph_of(self, candidate: Candidate) -> Graph:
        return self._by_nncf(candidate.smoothing)[0] if candidate.ranges == NNCF else self._smooth(candidate.smoothing)[0]

    def _by_nncf(self, how: str) -> tuple[Graph, dict[str, Scale]]:
        """NNCF's corrected biases and scales, of the last smoothing that was asked for."""
        if how not in self._corrected:
            names, signed = {*self._names, *self._factors}, self._options.activations == "s8"
            made = nncf.quantize(self._smooth(how)[0], names, self._calibration, self._judge.batch, signed)
            self._corrected = {how: made}
        return self._corrected[how]

    def _search(self, best: Candidate) -> tuple[frozenset[str], Score]:
        notify: Callable[[str], None] = self._context.notify
        notify(
            f"quantising: drop {best.score.drop_pct:.2g} points, budget {self._judge.allowed_pct:.2g}: ranking {len(self._names)} products"
        )
        ranked = sensitivity.rank(
            self._smooth(best.smoothing)[0], best.plan, self._names, self._judge.images, self._judge.batch, self._folder
        )

        def score(kept: frozenset[str]) -> Score:
            found = self._score(best, kept)
            notify(f"quantising: {len(kept)} products in float: error {found.error:.2g}, drop {found.drop_pct:.2g} points")
            return found

        found = search.unquantize([name for name, _ in ranked], best.score, score, self._judge.within, others=len(self._delicate))
        return found.kept_float, found.score

    def _chosen(self, best: Candidate, naive: Candidate, kept: frozenset[str], score: Score) -> Chosen:
        left = tuple(p.name for p in self._graph.products if p.name in kept or p.name in self._delicate)
        return Chosen(
            quantizer=self._options.quantizer,
            smoothing=best.smoothing,
            ranges=best.ranges,
            quantized=len(self._graph.products) - len(left),
            products=len(self._graph.products),
            kept_float=left,
            error=score.error,
            naive_error=naive.score.error,
            drop_pct=score.drop_pct,
            drop_kind=self._judge.kind,
            held=len(self._judge.images),
            tried={candidate.name: candidate.score.error for candidate in self._tried.values()},
            sessions=self._judge.runs,
            within_budget=self._judge.within(score),
        )


def _everything(graph: Graph, judge: Judge, calibration: Any, options: Options, folder: Path, target: Path) -> Chosen:
    from edgejoule.compile.quantize import everything  # onnxruntime and onnx come with it

    everything.quantize(graph, calibration, judge.batch, options, folder, target)
    score, products = judge.score(target, exact=True), len(graph.products)
    return Chosen(
        "onnxruntime",
        "off",
        "minmax",
        products,
        products,
        (),
        score.error,
        score.error,
        score.drop_pct,
        judge.kind,
        len(judge.images),
        {"everything, minmax": score.error},
        judge.runs,
        judge.within(score),
    )


def _best(candidates: Iterable[Candidate]) -> Candidate:
    """The least error; a later one must be better by more than noise."""
    first, *others = candidates
    best = first
    for candidate in others:
        if candidate.score.error < BETTER * best.score.error:
            best = candidate
    return best


def _factors(graph: Graph) -> tuple[str, ...]:
    """MatMuls of two activations."""
    return tuple(
        node.name
        for node in graph.model.graph.node
        if node.op_type == "MatMul" and node.name not in graph.product_of and not any(graph.constant(name) for name in node.input)
    )
