"""Runs in the MNN environment: MNN's converter on an ONNX file and on the proof, and the first run of what it wrote.

The converter is called as the binary module that MNN's command line wraps: the wrapper (MNN.tools) installs a package with pip when it is
imported and reports each conversion to its vendor. A job names a folder with images.npy (B, C, H, W) and logits.npy (B, K).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.mnn_module import (
    CONVERTER,
    ENTRY,
    FILE,
    LEAVE,
    PROOF,
    PROOF_OUTPUTS,
    PROOF_SHAPE,
    SEED,
    TINY,
    config,
    forward,
    import_mnn,
    load,
)
from edgejoule.errors import BackendError

TIMEOUT_S = 1500.0
SHOWN = 200  # characters of the converter's complaint
CALL = "import _tools, sys; sys.exit(0 if _tools.mnnconvert(sys.argv) else 1)"
COMPLAINT = re.compile(r"not support|error|fail|can't|unknown", re.IGNORECASE)


def main() -> int:
    return environments.answer(work)


def work(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """``do``: "convert" writes model.mnn and proof.mnn; "run" gives their error against the logits. Raises BackendError."""
    folder = Path(job["folder"])
    if job["do"] == "run":
        return run(folder, job["precision"])
    convert(Path(job["source"]), folder / FILE, job["precision"])
    write_proof(folder / "proof.onnx")
    convert(folder / "proof.onnx", folder / PROOF, job["precision"])
    return {}


def convert(source: Path, target: Path, precision: str) -> None:
    """In a process of its own, for the converter speaks to file descriptors only. Raises BackendError with what it says."""
    options = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), "--bizCode", "edgejoule", *CONVERTER[precision]]
    argv = [sys.executable, "-E", "-c", CALL, *options]
    done = subprocess.run(
        argv,
        cwd=target.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode or not target.is_file():
        said = [line.strip() for line in done.stdout.splitlines() if COMPLAINT.search(line)][:1]
        raise BackendError(
            f"mnnconvert refuses the network (exit code {done.returncode}{', ' + said[0][:SHOWN] if said else ''}): use onnxruntime"
        )


def write_proof(path: Path) -> None:
    """Two convolutions of the input, without bias, of fixed random weights: 1x1, as MNN runs a linear layer, and 3x3."""
    import numpy as np
    import onnx

    channels = PROOF_SHAPE[1]
    random = np.random.default_rng(SEED)
    nodes, weights, leaves = [], [], []
    for name, kernel in zip(PROOF_OUTPUTS, (1, 3), strict=True):
        weight = random.normal(size=(channels, channels, kernel, kernel)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"{name}_weight"))
        nodes.append(onnx.helper.make_node("Conv", [ENTRY, f"{name}_weight"], [name], pads=[kernel // 2] * 4, kernel_shape=[kernel] * 2))
        leaves.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, PROOF_SHAPE))
    entry = onnx.helper.make_tensor_value_info(ENTRY, onnx.TensorProto.FLOAT, PROOF_SHAPE)
    graph = onnx.helper.make_graph(nodes, "proof", [entry], leaves, weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


def run(folder: Path, precision: str) -> Mapping[str, Any]:
    """The relative error of MNN's logits, infinite for another shape. Raises BackendError."""
    import numpy as np

    mnn = import_mnn()
    images, wanted = np.load(folder / "images.npy"), np.load(folder / "logits.npy")  # (B, C, H, W), (B, K)
    try:
        (found,) = forward(mnn, load(mnn, folder / FILE, (LEAVE,), config(precision, 1)), images)
    except Exception as error:
        raise BackendError(f"MNN cannot run what its converter wrote ({' '.join(str(error).split())[:SHOWN]}): use onnxruntime") from error
    if found.shape != wanted.shape:
        return {"error": float("inf")}
    errors = np.linalg.norm(found - wanted, axis=1) / np.maximum(np.linalg.norm(wanted, axis=1), TINY)
    return {"error": float(errors.max())}


if __name__ == "__main__":
    sys.exit(main())
