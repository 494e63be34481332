"""What ``quantize.budget`` needs to search a LiteRT file: its products with weights, and the logits that LiteRT itself gives for a file.

Runs in the worker environment. Knows no recipe and no quantiser.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgejoule.compile.litert_graph import WEIGHTED, WEIGHTS
from edgejoule.compile.quantize.observe import batches
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError


@dataclass(frozen=True)
class Products:
    """``candidates``: name -> (operator, scope) of each operator of the same weights. ``others``: how many of a kind always stay float."""

    candidates: Mapping[str, tuple[tuple[str, str], ...]]
    others: Mapping[str, int]


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
