"""Backend: MNN on the CPU, from the shared ONNX file. Loading imports MNN and numpy only.

The worker environment converts, by the converter's own binary module: MNN's command line (MNN.tools) would install a package with pip and
report each conversion to its vendor. MNN tells no precision of a loaded model, so it is found out: a small file of two convolutions,
made with the same options, travels along and is run on the device; its answer tells whether products are linear to float32's last
digits. ``fp32`` is precision mode "high". Half precision and int8 are arithmetic on arm only: on x86 MNN (3.6) unpacks such weights to
float32, so there they are refused. Knows no cache.
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
from edgejoule.compile.mnn_module import ENTRY, FILE, LEAVE, PROOF, RUNTIME, SEED, config, forward, import_mnn, load, prove
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import ONNX_EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FACTS = "edgejoule.json"
WORKER = "edgejoule.compile.mnn_worker"
TIMEOUT_S = 1800.0
ARM = frozenset({"aarch64", "arm64"})
FARTHEST = {"fp32": 2e-2, "fp16": 0.5, "int8": 0.5}  # relative error of logits: farther away, it is another network; LeViT's own is 3e-3
WEIGHTED = frozenset({"Convolution", "ConvolutionDepthwise", "Deconvolution", "DeconvolutionDepthwise", "ConvInt8", "DepthwiseConvInt8"})
ROUNDED = 2e-5  # relative: float32 stays below it, half precision and int8 do not


@dataclass(frozen=True)
class Mnn:
    """``fp16``: half weights in the file, half arithmetic. ``int8``: int8 weights by channel, their inputs quantised as they come."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    device: Literal["cpu"] = "cpu"
    environment: ClassVar[str] = "mnn"

    def probe(self) -> str | None:
        if self.precision != "fp32" and platform.machine().lower() not in ARM:
            return f"MNN unpacks {self.precision} weights to float32 on {platform.machine()} (arm computes in them): use precision='fp32'"
        return environments.missing(self.environment)

    def toolchain(self) -> Mapping[str, str]:
        return {**versions(ONNX_EXPORTER), **environments.versions(self.environment, ("MNN",))}

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.mnn, proof.mnn and edgejoule.json.

        Raises ModelError (cannot be exported) and BackendError (the converter refuses it, a crash, or another result than the network's).
        """
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        source = export.onnx
        with tempfile.TemporaryDirectory(prefix="edgejoule-mnn-") as scratch:
            folder = Path(scratch)
            classes = _reference(export, context.shape, folder)
            context.notify("mnnconvert converts the ONNX file")
            job = {"folder": scratch, "source": str(source.absolute()), "precision": self.precision}
            environments.run(self.environment, WORKER, {**job, "do": "convert"}, TIMEOUT_S)
            ran = environments.run(self.environment, WORKER, {**job, "do": "run"}, TIMEOUT_S)
            if not ran["error"] <= FARTHEST[self.precision]:  # nan is not
                raise BackendError(
                    f"MNN computes something else than the network from what its converter wrote (relative error {ran['error']:.0e}, "
                    f"expected at most {FARTHEST[self.precision]:.0e}): use onnxruntime"
                )
            for name in (FILE, PROOF):
                shutil.copyfile(folder / name, context.workdir / name)
        if self.precision == "int8":
            context.note(
                "held-out search", "none: weights by channel, inputs by their own range; the budget was not judged while compiling"
            )
        facts = {"images": context.shape, "logits": (context.shape[0], classes), "sha256": sha256_by_name(context.workdir, (FILE, PROOF))}
        (context.workdir / FACTS).write_text(json.dumps(facts), encoding="utf-8")
        return context.workdir / FILE

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> MnnSession:
        """Raises ArtifactError for a damaged file, BackendError where MNN is not in this Python. Runs one stream."""
        check_one_stream("mnn", streams)
        return MnnSession(Path(artifact.folder), self.precision, threads)

    def handover(self, artifact: Artifact) -> Handover:
        modes = RUNTIME[self.precision]
        shape = (artifact.batch, *artifact.variant.spec.preprocessing.input_size)
        return Handover(install="pip install MNN numpy pillow", python=_python(modes, shape), cpp=_cpp(modes))


class MnnSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, folder: Path, asked: str, threads: int) -> None:
        facts = checked_facts(folder, FACTS, (FILE, PROOF), "MNN")
        self._mnn = import_mnn()
        self._folder, self._config = folder, config(asked, threads)
        self._shape = tuple(facts["images"])
        try:
            self._module: Any = load(self._mnn, folder / FILE, (LEAVE,), self._config)
            proven = prove(self._mnn, folder / PROOF, self._config)
        except Exception as error:
            raise ArtifactError(f"MNN {self._mnn.version()} cannot load {folder / FILE} ({reason(error)}): compile again") from error
        self._info = SessionInfo(
            precision=_precision(proven, asked),
            providers=("cpu",),
            runtime=f"MNN {self._mnn.version()}",
            threads=threads,
            inputs=(TensorInfo("images", self._shape, "float32"),),
            outputs=(TensorInfo("logits", tuple(facts["logits"]), "float32"),),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where MNN fails."""
        check_images(images, self._shape)
        try:
            (logits,) = forward(self._mnn, self._module, images)  # (B, K)
        except Exception as error:
            raise BackendError(f"MNN failed while running the model ({reason(error)}): free some memory or use another backend") from error
        return {"logits": logits}

    def info(self) -> SessionInfo:
        """``precision`` is float32 where the proof, run here with the same options, is linear to float32's last digits, and else what was
        asked for; ``reduced`` where that was float32."""
        return self._info

    def audit(self, images: Any) -> Placement:
        """The operators that MNN calls back for, one by one, while it runs the images; the precision of the convolutions is the proof's."""
        mnn = self._mnn
        interpreter = mnn.Interpreter(str(self._folder / FILE))
        session = interpreter.createSession(self._config)
        entry = interpreter.getSessionInput(session)
        entry.copyFrom(mnn.Tensor(self._shape, mnn.Halide_Type_Float, images, mnn.Tensor_DimensionType_Caffe))
        kinds: Counter[str] = Counter()

        def begin(tensors: Any, operator: Any) -> bool:
            kinds[operator.getType()] += 1
            return True

        interpreter.runSessionWithCallBackInfo(session, begin, lambda tensors, operator: True)
        total = sum(kinds.values())
        weighted = sum(count for kind, count in kinds.items() if kind in WEIGHTED)
        return Placement(total, total, {}, {self._info.precision: weighted})

    def close(self) -> None:
        self._module = None


def _reference(export: Export, shape: tuple[int, ...], folder: Path) -> int:
    """Writes images.npy and logits.npy of one batch; the number of classes."""
    import numpy as np
    import torch

    images = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))  # (B, C, H, W)
    with torch.no_grad():
        logits = export.module(images)  # (B, K)
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "logits.npy", logits.numpy())
    return int(logits.shape[1])


def _precision(proven: Mapping[str, float], asked: str) -> str:
    """Of how far each convolution of the proof is from linear: one that is coarse is not float32, and one that is not is no int8."""
    coarse = [error > ROUNDED for error in proven.values()]
    if any(coarse) and asked == "fp32":
        return "reduced"
    return asked if all(coarse) else "fp32"


def _python(modes: Mapping[str, str], shape: tuple[int, ...]) -> str:
    return f"""import MNN
import MNN.expr as expr
import numpy as np
modes = {{"backend": "CPU", "numThread": 1, "precision": "{modes["precision"]}", "memory": "{modes["memory"]}"}}
runtime = MNN.nn.create_runtime_manager((modes,))
net = MNN.nn.load_module_from_file("{FILE}", ["{ENTRY}"], ["{LEAVE}"], runtime_manager=runtime)
def run(images):  # {shape}
    (logits,) = net.forward([expr.const(np.ascontiguousarray(images), list(images.shape), expr.NCHW)])
    return np.array(expr.convert(logits, expr.NCHW).read())
"""


def _cpp(modes: Mapping[str, str]) -> str:
    precision, memory = (modes[name].capitalize() for name in ("precision", "memory"))
    return f"""#include <MNN/expr/Module.hpp>
MNN::BackendConfig modes; modes.precision = MNN::BackendConfig::Precision_{precision}; modes.memory = MNN::BackendConfig::Memory_{memory};
MNN::ScheduleConfig config; config.numThread = 1; config.backendConfig = &modes;
std::shared_ptr<MNN::Express::Executor::RuntimeManager> runtime(MNN::Express::Executor::RuntimeManager::createRuntimeManager(config));
std::shared_ptr<MNN::Express::Module> net(MNN::Express::Module::load({{"{ENTRY}"}}, {{"{LEAVE}"}}, "{FILE}", runtime));
auto images = MNN::Express::_Input({{B, C, H, W}}, MNN::Express::NCHW, halide_type_of<float>());  // fill images->writeMap<float>()
const float* logits = net->onForward({{images}})[0]->readMap<float>();
"""
