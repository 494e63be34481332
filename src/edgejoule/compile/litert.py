"""Backend: LiteRT (TensorFlow Lite), from the exported program to model.tflite. Loading imports ai_edge_litert and numpy only, no torch.

litert-torch converts and ai-edge-quantizer quantises in the worker environment ``litert``, because they ask for older packages than
ours; there the agent runs too. XNNPACK is LiteRT's own choice on CPUs; what it takes is read back from the loaded graph. Images go in as
(B, C, H, W) float32, whatever the weights are. Knows no manifest and no cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgejoule import environments
from edgejoule.compile.litert_graph import Operator, placement, precision
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE = "model.tflite"
PACKAGES = ("litert-torch", "litert-converter", "ai-edge-quantizer", "ai-edge-litert")
WORKER = "edgejoule.compile.litert_worker"
TIMEOUT_S = 3600.0
EDGETPU_COMPILER = "edgetpu_compiler"
# A delegate's library, and how to get it.
LIBRARIES = {
    "gpu": ("libtensorflowlite_gpu_delegate.so", "build TensorFlow Lite's GPU delegate for this device and put it on the loader's path"),
    "edgetpu": ("libedgetpu.so.1", "install Coral's libedgetpu1-std and plug the Edge TPU in"),
}
RAN = {"xnnpack": "cpu", "none": "cpu", "gpu": "gpu", "edgetpu": "edgetpu"}


@dataclass(frozen=True)
class LiteRt:
    """``mode`` says when int8 activations get their ranges: ``dynamic`` row by row at run time, ``static`` from calibration images.

    ``dynamic`` is the default because it is the safe one for ViTs: activations between layers stay float, and their outlier channels
    stretch no range but their own row's. With random weights, on 32 photographs, the worst logits were 1.6 % off on test_vit and 2.6 % on
    deit_tiny (top-1 kept on 100 and 94 %); static ones 20 and 31 % (66 and 78 %). Depthwise convolutions stay float then: XNNPACK takes
    them from no dynamic file, which would cut the graph at each of them, and static ones among the dynamic products cost more than they
    gave (mobilenetv3_small_050 and mobilevit_xxs, random weights: mean error 2.2 to 6.6 % and 2.6 to 4.8 %, CPU time 13 and 23 % up).
    ``edgetpu`` takes integers only, so there everything is static int8, which ViTs seldom survive. What precision a GPU's delegate
    computes in it does not tell: there it is the file's. On held-out images the int8 file is held against the float one, and what
    hurts goes back to float until ``max_drop_pct`` is kept (not where integers are all there is).
    """

    precision: Literal["fp32", "int8"] = "fp32"
    mode: Literal["dynamic", "static"] = "dynamic"
    delegate: Literal["xnnpack", "gpu", "edgetpu", "none"] = "xnnpack"
    environment: ClassVar[str] = "litert"

    def __post_init__(self) -> None:
        if self.delegate == "edgetpu" and (self.precision, self.mode) != ("int8", "static"):
            raise ValueError("the Edge TPU computes with integers only: it needs precision='int8' and mode='static'")
        if self.precision == "fp32" and self.mode == "static":
            raise ValueError("mode='static' is a way to quantise: it needs precision='int8'")

    @property
    def device(self) -> str:
        return RAN[self.delegate]

    def probe(self) -> str | None:
        if not _runtime_is_here() and (missing := environments.missing(self.environment)) is not None:
            return missing
        return _probe_library(self.delegate) if self.delegate in LIBRARIES else None

    def toolchain(self) -> Mapping[str, str]:
        return {**versions(EXPORTER), **environments.versions(self.environment, PACKAGES)}

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.tflite. Raises ModelError (cannot be exported) and BackendError (cannot be converted or quantised)."""
        if (missing := environments.missing(self.environment)) is not None:
            raise BackendError(missing)
        if self.delegate == "edgetpu" and shutil.which(EDGETPU_COMPILER) is None:
            raise BackendError(f"{EDGETPU_COMPILER} is not installed: install Coral's edgetpu-compiler (Debian on x86-64 only)")
        path = context.workdir.absolute() / FILE
        from edgejoule.compile.export import save_program

        with tempfile.TemporaryDirectory(prefix="edgejoule-litert-") as name:
            program = Path(name) / "program.pt2"
            save_program(export.program, program)
            job = {"program": str(program), "target": str(path), "recipe": self._recipe(), "shape": list(context.shape)}
            if self.precision == "int8":
                job |= self._save_images(context, Path(name))
            context.notify("litert converts the network in its own environment")
            found = environments.run(self.environment, WORKER, job, TIMEOUT_S)
        if self.delegate == "edgetpu":
            _compile_for_edgetpu(path)
        for what, chosen in found["chosen"].items():
            context.note(what, chosen)
        return context.workdir / FILE

    def _save_images(self, context: CompileContext, folder: Path) -> Mapping[str, Any]:
        """What the worker calibrates on, and what it judges the file by. ``dynamic`` calibrates nothing."""
        import numpy as np

        from edgejoule.compile.quantize import held

        if self.mode == "dynamic":
            return {**held.save(held.only_held(context), folder), "max_drop_pct": context.max_drop_pct}
        images, judged_by = held.calibration_and_held(context)
        np.save(folder / "calibration.npy", images)
        paths = {**held.save(judged_by, folder), "calibration": str(folder / "calibration.npy")}
        return {**paths, "max_drop_pct": context.max_drop_pct}

    def _recipe(self) -> str:
        if self.precision == "fp32":
            return "float"
        return "integer" if self.delegate == "edgetpu" else self.mode

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> LiteRtSession:
        """Raises ArtifactError for a damaged file, BackendError where LiteRT or the delegate is missing or refuses it. One stream."""
        check_one_stream("litert", streams)
        if not _runtime_is_here():
            advice = f"load it with {environments.python_of(self.environment)}, as edgejoule's worker does"
            raise BackendError(f"litert is not in this installation but in its own environment: {self.probe() or advice}")
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        return LiteRtSession(Path(artifact.folder) / FILE, self.delegate, threads)

    def handover(self, artifact: Artifact) -> Handover:
        options = {"none": ", experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES"}
        options |= {name: f', experimental_delegates=[load_delegate("{LIBRARIES[name][0]}")]' for name in LIBRARIES}
        names = {"none": "Interpreter, OpResolverType", "xnnpack": "Interpreter"}.get(self.delegate, "Interpreter, load_delegate")
        threads = artifact.info.threads
        script = [
            f"from ai_edge_litert.interpreter import {names}",
            f'interpreter = Interpreter("{FILE}", num_threads={threads}{options.get(self.delegate, "")})',
            "interpreter.allocate_tensors()",
            'entry, leave = (details()[0]["index"] for details in (interpreter.get_input_details, interpreter.get_output_details))',
            "def run(images):  # (B, C, H, W) float32 -> (B, K)",
            "    interpreter.set_tensor(entry, images)",
            "    interpreter.invoke()",
            "    return interpreter.get_tensor(leave)",
        ]
        return Handover("pip install ai-edge-litert numpy pillow", "\n".join(script), _cpp(threads) if self.delegate == "xnnpack" else "")


class LiteRtSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, path: Path, delegate: str, threads: int) -> None:
        interpreter = _interpreter(path, delegate, threads)
        try:
            interpreter.allocate_tensors()
            (entry,), (leave,) = interpreter.get_input_details(), interpreter.get_output_details()
            operators = [_operator(one) for one in interpreter._get_ops_details()]  # the one way to see what was delegated
        except Exception as error:
            raise BackendError(f"litert cannot prepare {path} ({reason(error)}): use another delegate or backend") from error
        self._placement = found = placement(operators, delegated=delegate != "none")
        if not found.delegated:
            raise BackendError(f"litert's {delegate} delegate took no operator of {path}: use delegate='none'")
        self._interpreter: Any = interpreter
        self._entry, self._leave, self._shape = entry["index"], leave["index"], tuple(map(int, entry["shape"]))
        self._info = SessionInfo(
            precision=precision(found),
            providers=(delegate,) if delegate != "none" else ("cpu",),
            runtime=f"ai-edge-litert {_version()}",
            threads=threads,
            inputs=(_tensor(entry),),
            outputs=(_tensor(leave),),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        check_images(images, self._shape)
        try:
            self._interpreter.set_tensor(self._entry, images)
            self._interpreter.invoke()
            return {"logits": self._interpreter.get_tensor(self._leave)}  # a copy
        except Exception as error:
            raise BackendError(f"litert failed while running the model ({reason(error)}): use another delegate or backend") from error

    def audit(self, images: Any) -> Placement:
        """The loaded graph after delegation; ``precisions`` are of the weights that a product multiplies (by integers where int8)."""
        self.infer(images)
        return self._placement

    def info(self) -> SessionInfo:
        """``precision`` is that of most products with weights in the loaded graph. LiteRT does not tell its threads: they are as set."""
        return self._info

    def close(self) -> None:
        self._interpreter = None


def _runtime_is_here() -> bool:
    return importlib.util.find_spec("ai_edge_litert") is not None


def _version() -> str:
    return environments.versions(LiteRt.environment, ("ai-edge-litert",)).get("ai-edge-litert", "")


def _probe_library(delegate: str) -> str | None:
    import ctypes

    library, advice = LIBRARIES[delegate]
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return f"LiteRT's {delegate} delegate cannot be loaded ({reason(error)}): {advice}, or use delegate='xnnpack'"
    return None


def _interpreter(path: Path, delegate: str, threads: int) -> Any:
    """Raises ArtifactError and BackendError. Beside another delegate XNNPACK stays out, so that what is delegated is told apart."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType, load_delegate

    options: dict[str, Any] = {"num_threads": threads}
    if delegate != "xnnpack":
        options["experimental_op_resolver_type"] = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    if delegate in LIBRARIES:
        try:
            options["experimental_delegates"] = [load_delegate(LIBRARIES[delegate][0])]
        except Exception as error:
            raise BackendError(f"litert's {delegate} delegate does not start ({reason(error)}): {LIBRARIES[delegate][1]}") from error
    try:
        return Interpreter(str(path), **options)
    except Exception as error:
        raise ArtifactError(f"{path} is not a file that LiteRT {_version()} can load ({reason(error)}): compile again") from error


def _operator(details: Mapping[str, Any]) -> Operator:
    kinds = dict(zip((int(i) for i in details["inputs"] if i != -1), (kind.__name__ for kind in details["operand_types"]), strict=False))
    return Operator(details["op_name"], tuple(map(int, details["inputs"])), tuple(map(int, details["outputs"])), kinds)


def _tensor(details: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(details["name"], tuple(map(int, details["shape"])), details["dtype"].__name__)


def _compile_for_edgetpu(path: Path) -> None:
    """Coral's compiler writes a file of its own beside; ours takes its place. Raises BackendError."""
    done = subprocess.run([EDGETPU_COMPILER, "-s", "-o", str(path.parent), str(path)], capture_output=True, text=True)
    made = path.with_name(f"{path.stem}_edgetpu.tflite")
    if done.returncode or not made.exists():
        said = " ".join((done.stderr or done.stdout).split())[-environments.SHOWN :]
        raise BackendError(f"{EDGETPU_COMPILER} refuses the network ({said}): use delegate='xnnpack'")
    made.replace(path)
    path.with_name(f"{path.stem}_edgetpu.log").unlink(missing_ok=True)


def _cpp(threads: int) -> str:
    return "\n".join(
        [
            f'auto model = tflite::FlatBufferModel::BuildFromFile("{FILE}");',
            "tflite::ops::builtin::BuiltinOpResolver resolver;  // brings XNNPACK",
            "std::unique_ptr<tflite::Interpreter> interpreter;",
            f"tflite::InterpreterBuilder(*model, resolver)(&interpreter, {threads});",
            "interpreter->AllocateTensors();",
            "std::copy_n(images, size, interpreter->typed_input_tensor<float>(0));  // (B, C, H, W)",
            "interpreter->Invoke();",
            "const float* logits = interpreter->typed_output_tensor<float>(0);  // (B, K)",
        ]
    )
