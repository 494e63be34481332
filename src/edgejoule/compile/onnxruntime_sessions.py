"""How a session of ONNX Runtime is opened: the options and providers with which we measure, and which operators it then runs.

Threads wait passively (no spinning), so that an idle core is idle and its energy is the inference's. What a session executes is read
from its own profile of one run. Loads onnxruntime only; knows no manifest and no quantisation.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgejoule.records import Placement

PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# U8 x S8 products saturate at 16 bits on x86 processors without VNNI: on those, and only there, "1" computes them as U8 x U8.
CONFIG = {
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    "mlas.enable_gemm_fastmath_arm64_bfloat16": "0",  # would run fp32 products in bfloat16 on arm
}
INT8_CONFIG = {"session.x64quantprecision": "1"}
PRODUCTS = ("Conv", "Gemm", "MatMul")  # parts of an operator's name: QLinearConv, FusedMatMul, DynamicQuantizeMatMul, …
DYNAMIC = "DynamicQuantizeMatMul"  # takes float32 and multiplies in int8
KINDS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}
WIDTH = {"float": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}  # bytes


def open_session(path: Path, device: str, threads: int, *, int8: bool = False, plain: bool = False, profile: str = "") -> Any:
    """An InferenceSession; whatever onnxruntime raises leaves here as it is.

    ``plain`` runs the graph as it is written, without any optimisation; ``profile`` is the prefix of a file to write one to.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in {**CONFIG, **(INT8_CONFIG if int8 else {})}.items():
        options.add_session_config_entry(key, value)
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(str(path), options, providers=providers(device))


def providers(device: str) -> list[Any]:
    """What ``InferenceSession`` is asked for, best first."""
    if device == "cuda":
        return [(PROVIDER["cuda"], {"use_tf32": "0"}), PROVIDER["cpu"]]  # TF32 keeps 10 bits of mantissa: that would not be fp32
    return [PROVIDER["cpu"]]


def audit_file(path: Path, device: str, threads: int, images: Any, *, int8: bool) -> Placement:
    """What a session of this file executes on images (B, C, H, W), by its own profile; whatever onnxruntime raises leaves here."""
    with tempfile.TemporaryDirectory(prefix="edgejoule-profile-") as folder:  # the artifact's own folder may be read-only
        session = open_session(path, device, threads, int8=int8, profile=str(Path(folder) / "profile"))
        session.disable_fallback()
        session.run(None, {session.get_inputs()[0].name: images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return placement(events, PROVIDER[device])


def placement(events: Iterable[Mapping[str, Any]], provider: str) -> Placement:
    """From the events of a profile of one run. Every operator leaves one ``…_kernel_time`` event."""
    ran = [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    elsewhere = Counter(str(node["op_name"]) for node in ran if node["provider"] != provider)
    kinds = Counter(_kind(node) for node in ran if _has_weights(node))
    return Placement(len(ran), len(ran) - elsewhere.total(), dict(elsewhere), dict(kinds))


def _has_weights(node: Mapping[str, Any]) -> bool:
    """Whether this is a product with a constant: an operand that was packed beforehand is not listed, another counts as a parameter.

    Scales and zero points are parameters as well, but smaller than an operand of two activations' product.
    """
    if not any(part in node["op_name"] for part in PRODUCTS):
        return False
    tensors = [next(iter(tensor.items())) for tensor in node["input_type_shape"]]
    operands = [WIDTH.get(kind, 4) * math.prod(shape) for kind, shape in tensors if len(shape) > 1]
    return len(operands) < 2 or int(node["parameter_size"]) >= min(operands)


def _kind(node: Mapping[str, Any]) -> str:
    if node["op_name"] == DYNAMIC:
        return "int8"
    (kind,) = node["input_type_shape"][0]
    return KINDS.get(kind, str(kind))
