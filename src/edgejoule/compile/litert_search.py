"""Which products of a LiteRT file run in int8: all, or where that loses more than the budget allows, all but those that hurt most.

Every candidate is a file that LiteRT itself runs on held-out images, beside the float one: one run where the budget is met at once. Else
each product is quantised alone and run on a few images, and the search of ``quantize.search`` puts the worst back to float: one file a
product and ``search.MOST_RUNS`` more. Runs in the worker environment. Knows no recipe and no quantiser: ``write`` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgejoule.compile.litert_graph import WEIGHTED, WEIGHTS
from edgejoule.compile.quantize.observe import batches
from edgejoule.compile.quantize.options import Chosen
from edgejoule.compile.quantize.score import Judge, Score, relative_error
from edgejoule.compile.quantize.search import unquantize
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError
from edgejoule.seams import Held

LOOKED_AT = 8  # held-out images that the ranking looks at
Write = Callable[[frozenset[str]], bytes]  # products that stay in float -> the file


@dataclass(frozen=True)
class Products:
    """``candidates``: name -> (operator, scope) of each operator of the same weights. ``others``: how many of a kind always stay float."""

    candidates: Mapping[str, tuple[tuple[str, str], ...]]
    others: Mapping[str, int]

    @property
    def count(self) -> int:
        return len(self.candidates) + sum(self.others.values())


def find_products(content: bytes, kinds: Sequence[str]) -> Products:
    """The operators of a float file that multiply by weights; those of ``kinds`` are candidates. A scope is how ai-edge-quantizer
    tells operators apart: the names of what they give."""
    from ai_edge_quantizer.qtyping import BuiltinOperator
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    kind_of = {code: name for name, code in vars(BuiltinOperator).items()}
    model = flatbuffers.read_model(bytearray(content))
    (graph,) = model.subgraphs[:1]
    found: dict[int, list[tuple[str, str]]] = {}
    owners: dict[str, int] = {}  # where two have one scope, no rule tells them apart: they are one product then
    others: Counter[str] = Counter()
    for operator in graph.operators:
        kind = kind_of[model.operatorCodes[operator.opcodeIndex].builtinCode]
        if kind not in WEIGHTED or len(operator.inputs) <= WEIGHTS:
            continue
        weights = graph.tensors[operator.inputs[WEIGHTS]].buffer
        if flatbuffers.get_tensor_data(graph.tensors[operator.inputs[WEIGHTS]], model.buffers) is None:
            continue  # a product of two activations
        if kind in kinds:
            scope = flatbuffers.get_op_scope(operator, graph.tensors)
            found.setdefault(owners.setdefault(scope, weights), []).append((kind, scope))
        else:
            others[kind] += 1
    return Products({_readable(uses[0][1], place): tuple(uses) for place, uses in enumerate(found.values())}, others)


def choose(
    content: bytes, products: Products, write: Write, held: Held, batch: int, max_drop_pct: float, search: bool = True
) -> tuple[bytes, Chosen]:
    """The file within the budget, or where none is, the one with the least drop. Raises BackendError where LiteRT refuses one."""
    judge = Judge(content, held, batch, max_drop_pct, logits_of)
    names = list(products.candidates)
    kept: frozenset[str] = frozenset()
    made = write(kept)
    score = judge.score(made)
    if search and not judge.within(score):
        apart = sum(products.others.values())
        found = unquantize(_rank(names, write, judge), score, lambda kept: judge.score(write(kept)), judge.within, others=apart)
        kept, score = found.kept_float, found.score
        made = write(kept) if kept else made
    return made, _chosen(products, kept, score, judge)


def _rank(names: Sequence[str], write: Write, judge: Judge) -> list[str]:
    """The worst first: by the logits' error when a product alone is quantised; ties in the graph's order."""
    images, wanted = judge.images[:LOOKED_AT], judge.logits[:LOOKED_AT]
    error = {name: relative_error(logits_of(write(frozenset(names) - {name}), images, judge.batch), wanted) for name in names}
    return sorted(names, key=lambda name: -error[name])


def _chosen(products: Products, kept: frozenset[str], score: Score, judge: Judge) -> Chosen:
    return Chosen(
        quantizer="ai-edge-quantizer",
        smoothing="off",
        ranges="minmax",
        quantized=len(products.candidates) - len(kept),
        products=products.count,
        kept_float=tuple(name for name in products.candidates if name in kept),
        error=score.error,
        drop_pct=score.drop_pct,
        drop_kind=judge.kind,
        held=len(judge.images),
        sessions=judge.runs,
        within_budget=judge.within(score),
    )


def logits_of(content: bytes, images: Any, batch: int, exact: bool = False) -> Any:
    """(M, K) logits of images (M, C, H, W) by LiteRT with XNNPACK, one thread. Raises BackendError. ``exact`` changes nothing here."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
        (entry,), (leave,) = interpreter.get_input_details(), interpreter.get_output_details()
        found = []
        for part in batches(images, batch):
            interpreter.set_tensor(entry["index"], part)
            interpreter.invoke()
            found.append(interpreter.get_tensor(leave["index"]))
    except Exception as error:
        raise BackendError(f"litert cannot run a quantised candidate ({reason(error)}): use precision='fp32'") from error
    return np.concatenate(found)[: len(images)]


def _readable(scope: str, place: int) -> str:
    """``4 blocks.0.mlp.fc1``: a product's number and the attributes on the way to its module. Scopes hold each module's class as well."""
    path = scope.split(";")[0].split("/")
    attributes = [part.rpartition(".")[2].partition("_")[2] for part in path]
    return f"{place} {'.'.join(name for name in attributes if name) or scope}"
