"""Backend: ncnn on the CPU, through pnnx, from the network rewritten to four dimensions at most. Loading imports ncnn and numpy only.

The worker environment converts: pnnx says success over operators that ncnn lacks, and ncnn then kills the process that runs them. So the
file's layers are looked up first, and the file is run there once and compared with the network before it is an artifact. ncnn has no
batch dimension: the file is of one image, and a batch is one image after another inside ``infer``. int8 is not offered: its calibration
tools (ncnn2table, ncnn2int8) are not in the Python package. Half precision is arithmetic on arm only: on x86 ncnn at most stores linear
layers' weights so and multiplies in float32, hence it is refused there. Threads wait passively. Knows no cache.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgejoule import environments
from edgejoule.compile.hashed import checked_facts, sha256_by_name
from edgejoule.compile.ncnn_net import BIN, ENTRY, HALF, LEAVE, PARAM, TINY, Layer, load, read_layers
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.errors import BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FACTS = "edgejoule.json"
WORKER = "edgejoule.compile.ncnn_worker"
TIMEOUT_S = 1800.0
ARM = frozenset({"aarch64", "arm64"})
FARTHEST = {"fp32": 2e-2, "fp16": 0.5}  # relative error of logits: farther away, it is another network; LeViT's own float32 noise is 3e-3
NO_WORK = frozenset({"Input", "Split", "MemoryData", "Noop"})
ROUNDED = 2e-5  # relative error that float32 in another order of summation stays below, and half precision does not
SEED = 0


@dataclass(frozen=True)
class Ncnn:
    """``fp16`` halves the file and lets ncnn store and compute in half precision, where the processor has its arithmetic."""

    precision: Literal["fp32", "fp16"] = "fp32"
    device: Literal["cpu"] = "cpu"
    environment: ClassVar[str] = "ncnn"

    def probe(self) -> str | None:
        if self.precision == "fp16" and platform.machine().lower() not in ARM:
            return f"ncnn multiplies in float32 on {platform.machine()} whatever its weights are stored in (arm can): use precision='fp32'"
        return environments.missing(self.environment)

    def toolchain(self) -> Mapping[str, str]:
        return {**versions(EXPORTER), **environments.versions(self.environment, ("ncnn", "pnnx"))}

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.param, model.bin and edgejoule.json.

        Raises ModelError (cannot be exported) and BackendError (operators that ncnn lacks, a crash, or another result than the network's).
        """
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        with tempfile.TemporaryDirectory(prefix="edgejoule-ncnn-") as scratch:
            folder = Path(scratch)
            shape = (1, *context.shape[1:])
            classes = _trace(export, shape, folder)
            context.notify("pnnx converts the network for ncnn")
            job = {"folder": scratch, "shape": list(shape), "half": self.precision == "fp16"}
            environments.run(self.environment, WORKER, {**job, "do": "convert"}, TIMEOUT_S)
            _check(environments.run(self.environment, WORKER, {**job, "do": "run"}, TIMEOUT_S), FARTHEST[self.precision])
            for name in (PARAM, BIN):
                shutil.copyfile(folder / name, context.workdir / name)
        facts = {
            "images": context.shape,
            "logits": (context.shape[0], classes),
            "sha256": sha256_by_name(context.workdir, (PARAM, BIN)),
        }
        (context.workdir / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return context.workdir / PARAM

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> NcnnSession:
        """Raises ArtifactError for a damaged file, BackendError where ncnn is not in this Python. Runs one stream."""
        check_one_stream("ncnn", streams)  # its Python binding holds the interpreter while it runs: n threads would wait for one another
        return NcnnSession(Path(artifact.folder), self.precision == "fp16", threads)

    def handover(self, artifact: Artifact) -> Handover:
        return Handover(
            install="pip install ncnn numpy pillow", python=_python(self.precision == "fp16"), cpp=_cpp(self.precision == "fp16")
        )


class NcnnSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}; the B images run one after another."""

    def __init__(self, folder: Path, half: bool, threads: int) -> None:
        facts = checked_facts(folder, FACTS, (PARAM, BIN), "ncnn")
        self._ncnn = _import_ncnn()
        self._folder, self._threads = folder, threads
        self._shape, self._classes = tuple(facts["images"]), int(facts["logits"][1])
        self._net: Any = load(self._ncnn, folder, half, threads)
        options = self._net.opt
        self._info = SessionInfo(
            precision="fp16" if any(getattr(options, name) for name in HALF) and self._ncnn.cpu_support_arm_asimdhp() else "fp32",
            providers=("cpu",),
            runtime=f"ncnn {self._ncnn.__version__}",
            threads=int(options.num_threads),
            inputs=(TensorInfo("images", self._shape, "float32"),),
            outputs=(TensorInfo("logits", tuple(facts["logits"]), "float32"),),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where ncnn fails."""
        import numpy as np

        check_images(images, self._shape)
        logits = np.empty((len(images), self._classes), dtype=np.float32)  # (B, K)
        for i, image in enumerate(images):
            extractor = self._net.create_extractor()
            # a Mat of an array borrows its memory, and ncnn may work in place: the copy is ncnn's own
            code = extractor.input(ENTRY, self._ncnn.Mat(np.ascontiguousarray(image)).clone())
            failed, result = extractor.extract(LEAVE) if code == 0 else (code, None)
            row = np.array(result).ravel()  # a copy; Mat.total counts padding
            if failed or row.size != self._classes:
                raise BackendError(f"ncnn failed while running the model (code {failed}): free some memory or use another backend")
            logits[i] = row
        return {"logits": logits}

    def info(self) -> SessionInfo:
        """``precision`` is fp16 where the loaded net may use half precision and ncnn sees its arithmetic; ``audit`` tells by layer."""
        return self._info

    def audit(self, images: Any) -> Placement:
        """The file's layers; and of those with weights, which compute something else than a float32 net of the same file: in half."""
        layers = read_layers(self._folder / PARAM)
        work = [layer for layer in layers if layer.kind not in NO_WORK]
        weighted = [layer for layer in layers if layer.has_weights]
        twin = load(self._ncnn, self._folder, False, self._threads)
        found = _precisions(self._ncnn, self._net, twin, weighted, images[0])
        return Placement(len(work), len(work), {}, dict(found))

    def close(self) -> None:
        self._net = None


def _trace(export: Export, shape: tuple[int, ...], folder: Path) -> int:
    """Writes traced.pt, images.npy and logits.npy, all of one image; the number of classes. Raises ModelError and BackendError."""
    import numpy as np
    import torch

    from edgejoule.compile.export import export_program, quiet
    from edgejoule.compile.rank4 import rank4

    _, channels, height, width = shape
    images = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))  # (1, C, H, W)
    program = export_program(export.module, (1, channels, height, width), "the network")
    jit: Any = torch.jit
    try:
        with torch.no_grad(), quiet():
            logits = export.module(images)  # (1, K)
            jit.trace(rank4(program), images, check_trace=False).save(str(folder / "traced.pt"))
    except Exception as error:
        raise BackendError(f"the network cannot be rewritten for ncnn ({reason(error)}): use onnxruntime") from error
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "logits.npy", logits.numpy())
    return int(logits.shape[1])


def _check(ran: Mapping[str, Any], farthest: float) -> None:
    """Raises BackendError where ncnn computed something else than the network."""
    if not ran["error"] <= farthest:  # nan is not
        raise BackendError(
            f"ncnn computes something else than the network from what pnnx wrote (relative error {ran['error']:.0e}, "
            f"expected at most {farthest:.0e}): use onnxruntime"
        )


def _import_ncnn() -> Any:
    try:
        import ncnn
    except (ImportError, OSError) as error:
        raise BackendError(
            f"ncnn is not in this Python ({reason(error)}): edgejoule doctor --install ncnn, or on a board pip install ncnn"
        ) from error
    return ncnn


def _precisions(ncnn: Any, net: Any, twin: Any, layers: list[Layer], image: Any) -> Counter[str]:
    """How many of the layers compute what a float32 ``twin`` computes from the same input; the others round to half precision."""
    import numpy as np

    running = net.create_extractor()
    running.set_light_mode(False)  # keeps every blob, so that nothing runs twice
    running.input(ENTRY, ncnn.Mat(np.ascontiguousarray(image)).clone())
    found: Counter[str] = Counter()
    for layer in layers:
        alone = twin.create_extractor()
        for name in layer.bottoms:
            alone.input(name, running.extract(name)[1].clone())
        ours, theirs = (np.array(one.extract(layer.tops[0])[1], dtype=np.float64) for one in (running, alone))
        error = np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), TINY)
        found["fp16" if error > ROUNDED else "fp32"] += 1
    return found


def _python(half: bool) -> str:
    off = "" if half else "".join(f"net.opt.{name} = " for name in HALF) + "False  # ncnn would compute in half precision\n"
    return f"""import ncnn
import numpy as np
net = ncnn.Net()
{off}net.load_param("{PARAM}"); net.load_model("{BIN}")
def one(image):
    extractor = net.create_extractor()
    extractor.input("{ENTRY}", ncnn.Mat(np.ascontiguousarray(image)).clone())
    return np.array(extractor.extract("{LEAVE}")[1]).ravel()
def run(images): return np.stack([one(image) for image in images])
"""


def _cpp(half: bool) -> str:
    off = "" if half else " ".join(f"net.opt.{name} = false;" for name in HALF) + "\n"
    return f"""#include "net.h"
ncnn::Net net;
{off}net.load_param("{PARAM}"); net.load_model("{BIN}");
ncnn::Extractor extractor = net.create_extractor();
ncnn::Mat image(W, H, C, data), logits;  // data: float, channels first, normalised, C * H * W of them
extractor.input("{ENTRY}", image.clone()); extractor.extract("{LEAVE}", logits);
"""
