"""Backend: OpenVINO, from the shared ONNX file to its IR (model.xml, model.bin). Loading imports openvino only, no torch.

OpenVINO would run a float32 model in bfloat16 wherever the processor can: the precision is always stated and read back.
The ONNX file is read by the core, never by OpenVINO's converter tool, which reports usage to its vendor. Knows no manifest and no cache.
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

FILE = "model.xml"
HINT = {"fp32": "f32", "bf16": "bf16"}
SHORT = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


@dataclass(frozen=True)
class OpenVino:
    """``precision`` is the inference precision; the IR itself always holds float32. Threads are split among the ``streams``."""

    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "gpu"] = "cpu"
    streams: int = 1

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams={self.streams}, expected 1 or more")

    def probe(self) -> str | None:
        try:
            import openvino
        except (ImportError, OSError) as error:
            return f"openvino cannot be imported ({reason(error)}): pip install 'edgejoule[openvino]'"
        name = self.device.upper()
        try:
            core = openvino.Core()
            if not any(found == name or found.startswith(f"{name}.") for found in core.available_devices):
                return f"openvino sees no {name}: install its driver, or use one of {', '.join(core.available_devices).lower()}"
            able = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            return f"openvino does not start ({reason(error)}): install it again"
        if self.precision == "bf16" and "BF16" not in able:
            return f"this {name} has no bfloat16 instructions, says openvino: use precision='fp32'"
        return None

    def toolchain(self) -> Mapping[str, str]:
        return versions((*ONNX_EXPORTER, "openvino"))

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.xml and model.bin. Raises ModelError and BackendError."""
        source = export.onnx
        path = context.workdir / FILE
        try:
            import openvino

            openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)
        except OSError:
            raise  # the caller knows the folder, and says why it cannot be written
        except Exception as error:
            raise BackendError(f"openvino cannot convert the ONNX file ({reason(error)}): use another backend") from error
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> OpenVinoSession:
        """Raises ArtifactError for a damaged file, BackendError where openvino refuses it. ``streams`` > 1 wins over the field."""
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINT[self.precision],
            "NUM_STREAMS": streams if streams > 1 else self.streams,
        }
        if self.device == "cpu":
            config["INFERENCE_NUM_THREADS"] = threads
        return OpenVinoSession(Path(artifact.folder) / FILE, self.device.upper(), config, threads)


class OpenVinoSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, path: Path, device: str, config: Mapping[str, Any], threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = _read(core, path)
        try:
            compiled = core.compile_model(model, device, dict(config))
            self._request: Any = compiled.create_infer_request()
            self._shape = tuple(compiled.input(0).shape)
            self._info = SessionInfo(
                precision=_precision(compiled),
                providers=tuple(compiled.get_property("EXECUTION_DEVICES")),
                runtime=f"openvino {'-'.join(openvino.__version__.split('-')[:2])}",
                threads=int(compiled.get_property("INFERENCE_NUM_THREADS")) if device == "CPU" else threads,
                inputs=tuple(_tensor(port) for port in compiled.inputs),
                outputs=tuple(_tensor(port) for port in compiled.outputs),
            )
        except Exception as error:
            raise BackendError(f"openvino cannot load {path} on {device} ({reason(error)}): use another precision or device") from error

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        if images.shape != self._shape or images.dtype != "float32":
            raise BackendError(f"images are {images.dtype} {images.shape}, expected float32 {self._shape}: compile for that batch and size")
        try:
            logits = self._request.infer(images, share_inputs=True)[0]  # the result is a copy, the input is not
        except Exception as error:
            raise BackendError(
                f"openvino failed while running the model ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits}

    def info(self) -> SessionInfo:
        """``precision`` is the compiled model's inference precision, ``providers`` the devices that execute it."""
        return self._info

    def close(self) -> None:
        self._request = None


def _read(core: Any, path: Path) -> Any:
    """Raises ArtifactError. What is no XML is never handed over: OpenVINO would try every other format's parser on it, aloud."""
    try:
        with path.open("rb") as stream:
            is_xml = stream.read(5) == b"<?xml"
        if is_xml:
            return core.read_model(path)
    except Exception as error:
        raise ArtifactError(f"openvino cannot read {path} ({reason(error)}): compile again") from error
    raise ArtifactError(f"{path} is damaged: it is no XML; compile again")


def _precision(compiled: Any) -> str:
    found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return SHORT.get(found, str(found))


def _tensor(port: Any) -> TensorInfo:
    return TensorInfo(port.any_name, tuple(port.shape), port.element_type.to_dtype().name)
