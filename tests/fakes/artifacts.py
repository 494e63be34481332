"""Real artifacts without torch: a small ONNX network, and a third party's backend that misbehaves on demand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgejoule import manifest
from edgejoule.records import Artifact, ModelSpec, Preprocessing, SessionInfo, Variant

PREPROCESSING = Preprocessing((3, 16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

PLUGIN = '''
"""A third party's backend, found by its entry point."""
import dataclasses, os, signal, sys, time
import numpy as np
from edgejoule.errors import BackendError
from edgejoule.records import SessionInfo


@dataclasses.dataclass(frozen=True)
class Odd:
    mode: str = "ok"
    precision: str = "fp32"
    device: str = "cpu"

    def probe(self): return None
    def toolchain(self): return {}

    def load(self, artifact, threads, streams=1):
        if self.mode == "raise": raise BackendError("the runtime refuses the model: compile it again")
        if self.mode == "bug": raise ValueError("a bug of ours")
        if self.mode == "exit": os._exit(7)
        if self.mode in ("SIGKILL", "SIGSEGV"): os.kill(os.getpid(), getattr(signal, self.mode))
        if self.mode == "hang": time.sleep(60)
        if self.mode == "noise":
            os.write(1, b"a runtime's banner\\n")
            print("and a print")
        return Session(self.mode, threads)


class Session:
    def __init__(self, mode, threads):
        self.mode, self.threads = mode, threads

    def infer(self, images):
        if self.mode == "noise": os.write(1, b"{}\\n")
        time.sleep(0.002)
        return {"logits": images.mean(axis=(2, 3)).astype(np.float32)}

    def info(self):
        omp = os.environ.get("OMP_NUM_THREADS", "") + os.environ.get("OMP_WAIT_POLICY", "")
        return SessionInfo("fp32", (omp,), "odd 1", self.threads)

    def close(self):
        if self.mode == "late": os.kill(os.getpid(), signal.SIGSEGV)
'''


def install_plugin(site: Path) -> None:
    """What pip would put on the path: a module, and its entry point."""
    info = site / "edgejoule_odd-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "edgejoule_odd.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgejoule-odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgejoule.backend]\nodd = edgejoule_odd:Odd\n")


def write_artifact(folder: Path, backend: str, batch: int, names: tuple[str, ...]) -> Artifact:
    """A manifest over files that lie in the folder already."""
    files = manifest.hash_files(folder, names)
    variant = Variant(ModelSpec("tiny", "test", 'timm(name="tiny")', PREPROCESSING, num_classes=3), "random", "seed0")
    info = SessionInfo("fp32", ("CPU",), "test 1", 1)
    artifact = Artifact(manifest.artifact_sha256(files), variant, backend, "fp32", batch, files, {}, info, None)
    manifest.write(folder, artifact)
    return artifact


def odd_artifact(folder: Path, mode: str = "ok", batch: int = 1) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(b"weights")
    return write_artifact(folder, f"odd(mode={mode!r})", batch, ("weights.bin",))


def onnx_artifact(folder: Path, batch: int = 1) -> Artifact:
    """(B, 3, 16, 16) -> convolution, mean -> logits (B, 3), for the real onnxruntime backend."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "weight"], ["maps"]),
            helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
            helper.make_node("Flatten", ["means"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    entry = model.metadata_props.add()
    entry.key, entry.value = "edgejoule.weights", "fp32"
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return write_artifact(folder, "onnxruntime", batch, ("model.onnx",))


def write_images(path: Path, n: int = 5) -> np.ndarray:
    crops = np.random.default_rng(1).integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
    with path.open("wb") as stream:
        np.save(stream, crops)
    return crops
