"""MNN's modules: its options by precision, loading, running, and the proof that tells what products are computed in.

Shared by the backend and its worker. Knows no artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

FILE, PROOF = "model.mnn", "proof.mnn"
ENTRY, LEAVE = "images", "logits"  # as in the ONNX file
CONVERTER = {  # the converter's arguments; its approximation of GELU is off
    "fp32": ["--useGeluApproximation", "0"],
    "fp16": ["--useGeluApproximation", "0", "--fp16"],
    "int8": ["--useGeluApproximation", "0", "--weightQuantBits", "8"],
}
RUNTIME = {  # precision and memory mode; low memory keeps int8 weights and quantises their inputs as they come
    "fp32": {"precision": "high", "memory": "normal"},
    "fp16": {"precision": "low", "memory": "normal"},
    "int8": {"precision": "high", "memory": "low"},
}
PROOF_SHAPE, PROOF_OUTPUTS = (1, 32, 8, 8), ("pointwise", "spatial")
SEED = 0
TINY = 1e-12


def config(asked: str, threads: int) -> dict[str, Any]:
    """MNN's configuration of a runtime for an asked precision."""
    return {"backend": "CPU", "numThread": threads, **RUNTIME[asked]}


def load(mnn: Any, path: Path, outputs: tuple[str, ...], options: Mapping[str, Any]) -> Any:
    """Whatever MNN raises; RuntimeError where it only gives nothing."""
    runtime = mnn.nn.create_runtime_manager((dict(options),))
    module = mnn.nn.load_module_from_file(str(path), [ENTRY], list(outputs), runtime_manager=runtime, shape_mutable=False)
    if module is None:
        raise RuntimeError("it gives no module")
    return module


def forward(mnn: Any, module: Any, images: Any) -> list[Any]:
    """The outputs as float32 arrays of their own."""
    import numpy as np

    entry = mnn.expr.const(np.ascontiguousarray(images), list(images.shape), mnn.expr.NCHW)
    leaves = [mnn.expr.convert(leaf, mnn.expr.NCHW) for leaf in module.forward([entry])]
    return [np.array(leaf.read(), dtype=np.float32).reshape(leaf.shape) for leaf in leaves]


def prove(mnn: Any, path: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """How far f(a) + f(b) is from f(a + b), relative, for each convolution f: rounding of the products in use, float32 or coarser."""
    import numpy as np

    module = load(mnn, path, PROOF_OUTPUTS, options)
    one, other = np.random.default_rng(SEED).normal(size=(2, *PROOF_SHAPE)).astype(np.float32)
    first, second, both = (forward(mnn, module, image) for image in (one, other, one + other))
    return {
        name: float(np.linalg.norm(a + b - c) / max(float(np.linalg.norm(c)), TINY))
        for name, a, b, c in zip(PROOF_OUTPUTS, first, second, both, strict=True)
    }


def import_mnn() -> Any:
    try:
        import MNN
        import MNN.expr
        import MNN.nn
    except (ImportError, OSError) as error:
        raise BackendError(
            f"MNN is not in this Python ({reason(error)}): edgejoule doctor --install mnn, or on a board pip install MNN"
        ) from error
    return MNN
