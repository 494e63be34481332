"""Lowers an exported program to an ExecuTorch file, in the environment that has executorch: ``python -m`` this, a job on stdin.

What the file holds is read back from its bytes and written beside it: which calls go to a delegate, which operators inside it multiply
by weights and in what precision, and what stays with ExecuTorch's own portable operators. Times nothing; knows no network by name.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.export import quiet
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

PARTITIONERS = {
    "coreml": "executorch.backends.apple.coreml.partition:CoreMLPartitioner",
    "openvino": "executorch.backends.openvino.partitioner:OpenvinoPartitioner",
    "vulkan": "executorch.backends.vulkan.partitioner.vulkan_partitioner:VulkanPartitioner",
    "xnnpack": "executorch.backends.xnnpack.partition.xnnpack_partitioner:XnnpackPartitioner",
}
XNNPACK = "XnnpackBackend"
WEIGHTED = ("XNNFullyConnected", "XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d")
PORTABLE_WEIGHTED = ("aten::convolution", "aten::linear", "aten::addmm", "aten::mm")
INT8 = ("xnn_datatype_qint8", "xnn_datatype_qcint8", "xnn_datatype_qdint8")
BARE = re.compile(r":\s*(-?inf|nan)\b")  # a ReLU's upper bound, say: flatbuffers write it so, and it is no JSON
NO_BIAS = 2**32 - 1  # XNN_INVALID_VALUE_ID


def main() -> int:
    return environments.answer(compile_program)


def compile_program(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Writes ``target`` (.pte) and ``plan`` (JSON). ``job``: program, target, plan, precision, partitioner, soc, and of int8 held,
    labels (.npy, labels or None) and max_drop_pct; the answer has "notes" of it beside the plan. Raises BackendError."""
    import torch

    from edgejoule.compile import executorch_int8, executorch_learned, pt2e_search
    from edgejoule.compile.quantize import held

    program = torch.export.load(job["program"])
    shape = tuple(program.example_inputs[0][0].shape)  # (B, C, H, W)
    try:
        with torch.no_grad(), quiet():
            notes: Mapping[str, str] = {}
            if executorch_learned.is_learned(program):
                program, notes = executorch_learned.for_kernels(program, job["precision"])
            elif job["precision"] == "int8":
                program, chosen = executorch_int8.quantized(program, held.load(job), job["max_drop_pct"])
                notes = pt2e_search.notes(chosen)
            content = bytes(lowered(program, job["partitioner"], job["soc"]).buffer)
    except (OSError, BackendError):
        raise
    except Exception as error:
        raise BackendError(
            f"executorch cannot lower the network for {job['partitioner']} ({reason(error)}): use another backend"
        ) from error
    plan = {"sha256": hashlib.sha256(content).hexdigest(), "shape": shape, **read_plan(content)}
    Path(job["target"]).write_bytes(content)
    Path(job["plan"]).write_text(json.dumps(plan, indent=1), encoding="utf-8")
    return {**plan, "notes": notes}


def lowered(program: Any, partitioner: str, soc: str) -> Any:
    """The ExecuTorch program. Rewritten for XNNPACK, whose operators are fewest; the others and the portable ones have LayerNorm."""
    from executorch.exir import to_edge_transform_and_lower

    from edgejoule.compile import executorch_layouts
    from edgejoule.compile import executorch_rewrites as rewrites

    partitioners = [] if partitioner == "none" else [_partitioner(partitioner, soc)]
    program = rewrites.rewrite(program) if partitioner == "xnnpack" else rewrites.constants(program.run_decompositions({}))
    with executorch_layouts.corrected():
        return to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()


def _partitioner(name: str, soc: str) -> Any:
    if name == "qnn":
        return _qnn(soc)
    module, _, attribute = PARTITIONERS[name].partition(":")
    made = getattr(importlib.import_module(module), attribute)
    if name == "openvino":
        from executorch.exir.backend.backend_details import CompileSpec

        return made([CompileSpec("device", b"CPU")])
    return made()


def _qnn(soc: str) -> Any:
    """Raises BackendError where Qualcomm's SDK is not named: executorch would fetch it from its vendor, unasked."""
    if not os.environ.get("QNN_SDK_ROOT"):
        raise BackendError("qnn needs Qualcomm's AI Engine Direct SDK: install it and name its folder in QNN_SDK_ROOT")
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import generate_htp_compiler_spec, generate_qnn_executorch_compiler_spec

    options = generate_htp_compiler_spec(use_fp16=True)
    return QnnPartitioner(generate_qnn_executorch_compiler_spec(soc_model=getattr(QcomChipset, soc), backend_options=options))


# ---------------------------------------------------------------- what the file holds


def read_plan(content: bytes) -> dict[str, Any]:
    """Of a file's bytes: calls and nodes, those delegated, delegates, fallbacks and precisions (see ``records.Placement``).

    A delegate other than XNNPACK does not show its nodes: each of its calls counts as one, and its precisions are not known. Of portable
    operators a linear layer that was lowered to a batched product is not told from attention's, and not counted as one with weights.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(content).program
    (method,) = program.execution_plan
    calls = [call.instr_args for chain in method.chains for call in chain.instructions or ()]
    portable: collections.Counter[str] = collections.Counter()
    precisions: collections.Counter[str] = collections.Counter()
    delegated = pieces = 0
    for call in calls:
        if type(call).__name__ == "KernelCall":
            name = method.operators[call.op_index].name
            portable[name.removeprefix("aten::")] += 1
            precisions["fp32"] += name in PORTABLE_WEIGHTED
        elif type(call).__name__ == "DelegateCall":
            delegate, pieces = method.delegates[call.delegate_index], pieces + 1
            graph = _xnnpack_graph(program.backend_delegate_data[delegate.processed.index].data) if delegate.id == XNNPACK else None
            delegated += len(graph["xnodes"]) if graph else 1
            precisions.update(products(graph) if graph else ())
    return {
        "delegates": sorted({delegate.id for delegate in method.delegates}),
        "calls": pieces,
        "nodes": delegated + sum(portable.values()),
        "delegated": delegated,
        "fallbacks": dict(portable),
        "precisions": {kind: count for kind, count in precisions.items() if count},
    }


def products(graph: Mapping[str, Any]) -> Iterator[str]:
    """The precision of each product with weights in an XNNPACK graph.

    Two are none: a row without bias is a mean that ``executorch_rewrites`` spelt, and a depthwise convolution of one pixel a BatchNorm
    that could not be fused, as ExecuTorch's DecomposeBatchNorm spells it.
    """
    values = {}
    for value in (entry["xvalue_union"] for entry in graph["xvalues"]):
        plain = value.get("tensor_value", value)
        values[plain["id_out"]] = plain
    for node in graph["xnodes"]:
        if node["xnode_union_type"] not in WEIGHTED:
            continue
        inner = node["xnode_union"]
        weights, images = values[inner["filter_id"]], values[inner["input1_id"]]
        if weights["dims"][0] == 1 and inner["bias_id"] == NO_BIAS and node["xnode_union_type"] == "XNNFullyConnected":
            continue
        if node["xnode_union_type"] == "XNNDepthwiseConv2d" and weights["dims"][1:3] == [1, 1]:  # (1, H, W, C)
            continue
        kinds = {weights["datatype"], images["datatype"]}
        yield "int8" if kinds <= set(INT8) else "+".join(sorted(kind.removeprefix("xnn_datatype_") for kind in kinds))


def _xnnpack_graph(blob: bytes) -> dict[str, Any]:
    """The delegate's own graph, decompiled by the flatbuffer compiler that comes with executorch."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(bytes(blob[: XNNHeader.EXPECTED_LENGTH]))
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary))
        told = Path(folder, "graph.json").read_text(encoding="utf-8")
    graph: dict[str, Any] = json.loads(BARE.sub(r': "\1"', told))
    return graph


if __name__ == "__main__":
    sys.exit(main())
