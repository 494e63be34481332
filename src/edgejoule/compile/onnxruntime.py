"""Backend: ONNX Runtime on the CPU or an NVIDIA GPU, from the shared ONNX file. Loading imports onnxruntime only.

Threads wait passively (no spinning), so that an idle core is idle and its energy is the inference's. float32 only: ONNX
Runtime's CPU kernels have no bfloat16. Knows no manifest and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule.compile.reasons import reason
from edgejoule.compile.toolchain import ONNX_EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export

FILE = "model.onnx"
WEIGHTS = "edgejoule.weights"  # the metadata entry that carries the weights' type to where no onnx package is
PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16"}
ELEMENT = {"tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16"}


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs the graph in the types it is written in, with all graph optimisations."""

    precision: Literal["fp32"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"

    def probe(self) -> str | None:
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            return f"onnxruntime cannot be imported ({reason(error)}): pip install 'edgejoule[onnxruntime]'"
        if PROVIDER[self.device] not in onnxruntime.get_available_providers():
            return f"onnxruntime has no {PROVIDER[self.device]}: pip install onnxruntime-gpu in its place, or use device='cpu'"
        return None

    def toolchain(self) -> Mapping[str, str]:
        return versions((*ONNX_EXPORTER, "onnxruntime", "onnxruntime-gpu"))

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.onnx, with the type of its weights in the metadata. Raises ModelError and BackendError."""
        source = export.onnx
        try:
            import onnx

            model = onnx.load(source)
            kinds = sorted({_short(onnx, weight.data_type) for weight in model.graph.initializer} - {""})
            entry = model.metadata_props.add()
            entry.key, entry.value = WEIGHTS, "+".join(kinds)
            path = context.workdir / FILE
            onnx.save(model, path)
        except OSError:
            raise  # the caller knows the folder, and says why it cannot be written
        except Exception as error:
            raise BackendError(f"the ONNX file cannot be read back ({reason(error)}): pip install 'edgejoule[host]' again") from error
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> OnnxRuntimeSession:
        """Raises ArtifactError for a damaged file, BackendError where the runtime or the GPU is missing. Runs one stream."""
        if streams != 1:
            raise BackendError(f"onnxruntime runs one stream here, {streams} were asked for: use openvino, or one process a stream")
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        return OnnxRuntimeSession(Path(artifact.folder) / FILE, self.device, threads)


class OnnxRuntimeSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        import onnxruntime

        if not path.is_file():
            raise ArtifactError(f"{path} is missing: compile again for onnxruntime")
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), _options(onnxruntime, threads), providers=_providers(device))
        except Exception as error:
            damaged = type(error).__name__ in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "ModelRequiresCompilation")
            kind = ArtifactError if damaged else BackendError
            raise kind(f"onnxruntime cannot load {path} ({reason(error)}): compile again") from error
        self._session.disable_fallback()
        providers = tuple(self._session.get_providers())
        if providers[0] != PROVIDER[device]:
            raise BackendError(
                f"onnxruntime fell back to {providers[0]} where {PROVIDER[device]} was asked for: install its CUDA and cuDNN libraries"
            )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._shape = tuple(inputs[0].shape)
        self._input, self._outputs = inputs[0].name, [output.name for output in outputs]
        self._info = SessionInfo(
            precision=_precision(self._session, path),
            providers=providers,
            runtime=f"onnxruntime {onnxruntime.__version__}",
            threads=self._session.get_session_options().intra_op_num_threads,
            inputs=tuple(map(_tensor, inputs)),
            outputs=tuple(map(_tensor, outputs)),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        if images.shape != self._shape or images.dtype != "float32":
            raise BackendError(f"images are {images.dtype} {images.shape}, expected float32 {self._shape}: compile for that batch and size")
        try:
            (logits,) = self._session.run(self._outputs, {self._input: images})
        except Exception as error:
            raise BackendError(
                f"onnxruntime failed while running the model ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits}

    def info(self) -> SessionInfo:
        """``precision`` is the type of the weights (from the file's metadata) and of the input (from the session).

        The CPU and CUDA providers run a graph in the types it is written in; TF32 and bfloat16 short cuts are switched off.
        """
        return self._info

    def close(self) -> None:
        self._session = None


def _options(onnxruntime: Any, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "0")  # would run fp32 products in bfloat16 on arm
    return options


def _providers(device: str) -> list[Any]:
    if device == "cuda":
        return [(PROVIDER["cuda"], {"use_tf32": "0"}), PROVIDER["cpu"]]  # TF32 keeps 10 bits of mantissa: that would not be fp32
    return [PROVIDER["cpu"]]


def _tensor(port: Any) -> TensorInfo:
    return TensorInfo(port.name, tuple(port.shape), NUMPY.get(port.type, port.type))


def _short(onnx: Any, data_type: int) -> str:
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    return kinds.get(data_type, "")


def _precision(session: Any, path: Path) -> str:
    weights = session.get_modelmeta().custom_metadata_map.get(WEIGHTS)
    if not weights:
        raise ArtifactError(f"{path} does not say what its weights are, so edgejoule did not write it: compile again")
    entry = session.get_inputs()[0].type
    return "+".join(sorted({*weights.split("+"), ELEMENT.get(entry, entry)}))
