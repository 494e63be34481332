"""Backend: ONNX Runtime on the CPU or an NVIDIA GPU, from the shared ONNX file. Loading imports onnxruntime only.

float32, or int8 as Q/DQ (``mode="static"``, ranges calibrated) or with activations quantised as they come (``mode="dynamic"``); ONNX
Runtime's CPU kernels have no bfloat16. Optimising corrupts quantised attention that is nearly uniform (QLinearSoftmax overflows,
docs/decisions/0009): every int8 file is kept clear of that, and compared with itself unoptimised before it is given out.
Sessions are opened as ``onnxruntime_sessions`` says. Knows no manifest and no cache.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgejoule.compile.onnxruntime_handover import CPP, INSTALL, PYTHON
from edgejoule.compile.onnxruntime_sessions import CONFIG, INT8_CONFIG, PROVIDER, audit_file, open_session, providers
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images
from edgejoule.compile.toolchain import ONNX_EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError, EdgejouleError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

if TYPE_CHECKING:
    from edgejoule.compile.quantize import Options

FILE = "model.onnx"
WEIGHTS = "edgejoule.weights"  # the metadata entry that carries the weights' type to where no onnx package is
NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16"}
ELEMENT = {"tensor(float)": "fp32", "tensor(float16)": "fp16", "tensor(bfloat16)": "bf16"}
INT8_FIELDS = ("mode", "quantizer", "scope", "smoothing", "ranges", "search")


@dataclass(frozen=True)
class OnnxRuntime:
    """Runs the graph in the types it is written in, with all graph optimisations.

    The fields after ``device`` belong to int8; those after ``mode`` to its static quantisation, as in ``quantize.Options``.
    """

    learned: ClassVar[bool] = True  # runs networks that were trained for int8
    precision: Literal["fp32", "int8"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    mode: Literal["static", "dynamic"] = "static"
    quantizer: Literal["onnxruntime", "nncf"] = "onnxruntime"
    scope: Literal["linear", "attention", "all"] = "linear"
    smoothing: Literal["auto", "off", "fold"] | float = "auto"
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    search: bool = True

    def __post_init__(self) -> None:
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        told = [name for name in INT8_FIELDS if getattr(self, name) != usual[name]]
        if self.precision != "int8" and told:
            raise ValueError(f"{told[0]}={getattr(self, told[0])!r} belongs to precision='int8'")
        if self.mode == "dynamic" and told != ["mode"]:
            raise ValueError(f"{told[1]}={getattr(self, told[1])!r} belongs to mode='static'")

    def probe(self) -> str | None:
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            return f"onnxruntime cannot be imported ({reason(error)}): pip install 'edgejoule[onnxruntime]'"
        if self.precision == "int8" and self.device == "cuda":
            return "onnxruntime's CUDA kernels run Q/DQ files in float: use tensorrt for int8 on a GPU, or device='cpu'"
        if PROVIDER[self.device] not in onnxruntime.get_available_providers():
            return f"onnxruntime has no {PROVIDER[self.device]}: pip install onnxruntime-gpu in its place, or use device='cpu'"
        return None

    def toolchain(self) -> Mapping[str, str]:
        quantizer = ("nncf",) if self.quantizer == "nncf" else ()
        return versions((*ONNX_EXPORTER, "onnxruntime", "onnxruntime-gpu", *quantizer))

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.onnx, with the type of its weights in the metadata. Raises ModelError and BackendError.

        A network that was trained for int8 (``learned.py``) is taken as it is, and in int8 only.
        int8 runs the file on calibration images: its weights' type is what the runtime's own profile says of most products, and
        optimised it must compute what it computes unoptimised.
        """
        source, path = export.onnx, context.workdir / FILE
        try:
            import onnx

            if self.precision == "int8":
                self._quantize(onnx, source, context, path)
                return path
            from edgejoule.compile.learned import refuse_float

            model = onnx.load(source)
            refuse_float(model, self.precision)
            kinds = sorted({_short(onnx, weight.data_type) for weight in model.graph.initializer} - {""})
            _save(onnx, model, "+".join(kinds), path)
        except (OSError, EdgejouleError):
            raise  # of an OSError, the caller knows the folder, and says why it cannot be written
        except Exception as error:
            doing = "quantised" if self.precision == "int8" else "read back"
            raise BackendError(f"the ONNX file cannot be {doing} ({reason(error)}): pip install 'edgejoule[host]' again") from error
        return path

    def _quantize(self, onnx: Any, source: Path, context: CompileContext, path: Path) -> None:
        from edgejoule.compile.learned import for_kernels, note_of
        from edgejoule.compile.onnxruntime_int8 import compare_with_plain, quantize_dynamic, widen_softmax
        from edgejoule.compile.quantize import quantize_onnx

        images = context.calibration()  # (N, C, H, W)
        batch = context.shape[0]
        with tempfile.TemporaryDirectory(prefix="edgejoule-onnxruntime-") as folder:
            draft = Path(folder) / FILE
            if (learned := for_kernels(source, gemm=True)) is not None:
                onnx.save(learned[0], draft)
                context.note("quantisation", note_of(learned[1]))
            elif self.mode == "dynamic":
                quantize_dynamic(source, draft)
            else:
                for what, chosen in quantize_onnx(source, context, self._options(), draft).notes().items():
                    context.note(what, chosen)
            model = onnx.load(draft)
            if widened := widen_softmax(model):
                context.note("softmax ranges widened", f"{widened}, which QLinearSoftmax would overflow in")
                onnx.save(model, draft)
            apart = compare_with_plain(source, draft, images, batch)
            first = images.take(range(batch), axis=0, mode="wrap")  # (B, C, H, W)
            ran = audit_file(draft, self.device, 0, first, int8=True).precisions
        context.note("optimised against plain", f"{apart:.2g} of the logits' norm apart")
        mostly = 2 * ran.get("int8", 0) > sum(ran.values())
        _save(onnx, model, "int8" if mostly else "+".join(sorted(ran)), path)

    def _options(self) -> Options:
        """Convolutions' outputs are quantised as well: without that, ONNX Runtime computes them in float."""
        from edgejoule.compile.quantize import Options

        return Options(self.quantizer, self.scope, self.smoothing, self.ranges, outputs="conv", search=self.search)

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> OnnxRuntimeSession:
        """Raises ArtifactError for a damaged file, BackendError where the runtime or the GPU is missing.

        With n streams, n threads may call ``infer`` at once; they and the runtime's own workers are ``threads`` in all, or n if more.
        """
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        return OnnxRuntimeSession(Path(artifact.folder) / FILE, self.device, threads, streams, self.precision == "int8")

    def handover(self, artifact: Artifact) -> Handover:
        """The options of our own sessions but for the waiting, so that a user gets the same logits."""
        exact = {key: value for key, value in CONFIG.items() if key.startswith("mlas")} | (INT8_CONFIG if self.precision == "int8" else {})
        package = "onnxruntime-gpu" if self.device == "cuda" else "onnxruntime"
        python = "".join(f'options.add_session_config_entry("{key}", "{value}")\n' for key, value in exact.items())
        cpp = "".join(f'  options.AddConfigEntry("{key}", "{value}");\n' for key, value in exact.items())
        shape = (artifact.batch, *artifact.variant.spec.preprocessing.input_size)
        return Handover(
            install=INSTALL.format(package=package),
            python=PYTHON.format(file=FILE, config=python, providers=providers(self.device)),
            cpp=CPP.format(file=FILE, config=cpp, shape=", ".join(map(str, shape))) if self.device == "cpu" else "",
        )


class OnnxRuntimeSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}. Up to ``streams`` threads may call it at once."""

    def __init__(self, path: Path, device: str, threads: int, streams: int = 1, int8: bool = False) -> None:
        import onnxruntime

        if not path.is_file():
            raise ArtifactError(f"{path} is missing: compile again for onnxruntime")
        self._path, self._device, self._int8 = path, device, int8
        # The workers are shared by all callers, each of which computes as well: so many are at work in all.
        self._intra = max(1, threads - streams + 1) if streams > 1 else threads
        try:
            self._session: Any = open_session(path, device, self._intra, int8=int8)
        except Exception as error:
            damaged = type(error).__name__ in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "ModelRequiresCompilation")
            kind = ArtifactError if damaged else BackendError
            raise kind(f"onnxruntime cannot load {path} ({reason(error)}): compile again") from error
        self._session.disable_fallback()
        found = tuple(self._session.get_providers())
        if found[0] != PROVIDER[device]:
            raise BackendError(
                f"onnxruntime fell back to {found[0]} where {PROVIDER[device]} was asked for: install its CUDA and cuDNN libraries"
            )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._shape = tuple(inputs[0].shape)
        self._input, self._outputs = inputs[0].name, [output.name for output in outputs]
        self._info = SessionInfo(
            precision=_precision(self._session, path),
            providers=found,
            runtime=f"onnxruntime {onnxruntime.__version__}",
            threads=self._session.get_session_options().intra_op_num_threads + streams - 1,
            inputs=tuple(map(_tensor, inputs)),
            outputs=tuple(map(_tensor, outputs)),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        self._check(images)
        try:
            (logits,) = self._session.run(self._outputs, {self._input: images})
        except Exception as error:
            raise BackendError(
                f"onnxruntime failed while running the model ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits}

    def audit(self, images: Any) -> Placement:
        """What a second session of this file executes, by its profile of one run. Raises BackendError."""
        self._check(images)
        try:
            return audit_file(self._path, self._device, self._intra, images, int8=self._int8)
        except Exception as error:
            raise BackendError(f"onnxruntime cannot profile {self._path} ({reason(error)}): free some memory or disk space") from error

    def info(self) -> SessionInfo:
        """``precision`` is the type of the weights (from the file's metadata) and of the input (from the session).

        The CPU and CUDA providers run a graph in the types it is written in; TF32 and bfloat16 short cuts are switched off. For int8
        the metadata holds what most products with weights ran in when the file was compiled; ``audit`` says it of this machine.
        """
        return self._info

    def close(self) -> None:
        self._session = None

    def _check(self, images: Any) -> None:
        check_images(images, self._shape)


def _save(onnx: Any, model: Any, weights: str, path: Path) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = WEIGHTS, weights
    onnx.save(model, path)


def _tensor(port: Any) -> TensorInfo:
    return TensorInfo(port.name, tuple(port.shape), NUMPY.get(port.type, port.type))


def _short(onnx: Any, data_type: int) -> str:
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    return kinds.get(data_type, "")


def _precision(session: Any, path: Path) -> str:
    weights = session.get_modelmeta().custom_metadata_map.get(WEIGHTS)
    if not weights:
        raise ArtifactError(f"{path} does not say what its weights are, so edgejoule did not write it: compile again")
    if weights == "int8":
        return "int8"  # its input and what lies between the products is float32, as it should be
    entry = session.get_inputs()[0].type
    return "+".join(sorted({*weights.split("+"), ELEMENT.get(entry, entry)}))
