"""Runs in the ncnn environment: pnnx on a traced network, and the first run of what it wrote, which may kill this process.

A job names a folder with traced.pt, images.npy (1, C, H, W) and logits.npy (1, K); the files come to lie there. Knows no torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.ncnn_net import BIN, ENTRY, LEAVE, PARAM, TINY, load, read_layers
from edgejoule.errors import BackendError

TIMEOUT_S = 1500.0
SHOWN = 200  # characters of pnnx's last line


def main() -> int:
    return environments.answer(work)


def work(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """``do``: "convert" writes model.param and model.bin; "run" gives their error against the logits. Raises BackendError."""
    folder = Path(job["folder"])
    return convert(folder, job["shape"], job["half"]) if job["do"] == "convert" else run(folder, job["half"])


def convert(folder: Path, shape: list[int], half: bool) -> Mapping[str, Any]:
    """pnnx's own seven files land in the folder, which is for scratch. Raises BackendError naming what ncnn has no layer for."""
    import ncnn
    import pnnx

    options = {"inputshape": f"[{','.join(map(str, shape))}]f32", "fp16": int(half), "ncnnparam": PARAM, "ncnnbin": BIN}
    argv = [pnnx.EXEC_PATH, "traced.pt", *(f"{key}={value}" for key, value in options.items())]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    if done.returncode or not (folder / PARAM).is_file() or not (folder / BIN).is_file():
        last = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-1:]
        raise BackendError(
            f"pnnx cannot convert the network (exit code {done.returncode}{', ' + last[0][:SHOWN] if last else ''}): use onnxruntime"
        )
    lacking = Counter(layer.kind for layer in read_layers(folder / PARAM) if ncnn.layer_to_index(layer.kind) < 0)
    if lacking:
        named = ", ".join(f"{kind} ({count} times)" for kind, count in sorted(lacking.items()))
        raise BackendError(f"ncnn has no layer for {named}: use onnxruntime, or a network without them")
    return {}


def run(folder: Path, half: bool) -> Mapping[str, Any]:
    """The relative error of ncnn's logits, infinite for another shape. ncnn kills this process where a layer's input does not fit."""
    import ncnn
    import numpy as np

    images, wanted = np.load(folder / "images.npy"), np.load(folder / "logits.npy").ravel()  # (1, C, H, W), (K,)
    net = load(ncnn, folder, half, 1)
    extractor = net.create_extractor()
    extractor.input(ENTRY, ncnn.Mat(images[0]).clone())
    failed, result = extractor.extract(LEAVE)
    if failed:
        raise BackendError(f"ncnn cannot run what pnnx wrote (code {failed}): use onnxruntime")
    found = np.array(result).ravel()
    if found.shape != wanted.shape:
        return {"error": float("inf")}
    return {"error": float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), TINY))}


if __name__ == "__main__":
    sys.exit(main())
