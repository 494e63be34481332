"""Backend: Core ML. Its mlprogram is written and checked on any system, in an environment of its own, and runs on a Mac.

int8 stores the weights of linear and convolution in int8, per channel, and quantises what they read; Macs before the M4 and iPhones
before the A17 multiply such products in half precision. Core ML decides where an operator runs, within ``units``: the audit asks its
compute plan. Knows no manifest and no cache; ``coreml_worker.py`` knows coremltools.
"""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgejoule import environments
from edgejoule.compile.mlprogram import facts_of, products_of
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

PACKAGE = "model.mlpackage"
MODEL = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
PORTS = ("inputs", "outputs")
FIRST_PLANS = (14, 4)  # the macOS that first tells compute plans
LONGEST_S = 1800.0  # the largest networks take minutes
DTYPES = {"float32": "float32", "float16": "float16", "double": "float64", "int32": "int32"}
DEVICES = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu", "MLNeuralEngineComputeDevice": "neural engine"}
NAMED = {"cpu_only": "cpu", "cpu_and_gpu": "gpu", "cpu_and_ne": "neural engine"}  # the unit that was asked for; "all" asks for none
PYTHON = """\
import coremltools as ct, numpy as np  # on a Mac
model = ct.models.MLModel("model.mlpackage", compute_units=ct.ComputeUnit.{units})
def run(images):
    return model.predict({{"images": np.asarray(images, np.float32)}})["logits"]
"""
SWIFT = """\
// Swift: drag model.mlpackage into Xcode, or compile it here
let configuration = MLModelConfiguration(); configuration.computeUnits = .{units}
let model = try MLModel(contentsOf: try await MLModel.compileModel(at: url), configuration: configuration)
let images = try MLMultiArray(shape: {shape}, dataType: .float32)  // (B, C, H, W)
let result = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: ["images": images]))
let logits = result.featureValue(for: "logits")!.multiArrayValue!
"""
SWIFT_UNITS = {"all": "all", "cpu_only": "cpuOnly", "cpu_and_gpu": "cpuAndGPU", "cpu_and_ne": "cpuAndNeuralEngine"}


@dataclass(frozen=True)
class CoreMl:
    """``units`` are those that Core ML may use, of a Mac's CPU, GPU and neural engine; ``target`` is the oldest system that can load it."""

    precision: Literal["fp16", "fp32", "int8"] = "fp16"
    units: Literal["all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"] = "all"
    target: Literal["iOS17", "iOS18"] = "iOS17"

    environment: ClassVar[str] = "coreml"

    @property
    def device(self) -> str:
        return "cpu" if self.units == "cpu_only" else "apple"

    def probe(self) -> str | None:
        """Of compiling, which any system can: ``runs_here`` is of loading."""
        return environments.missing(self.environment)

    def runs_here(self) -> str | None:
        """None where the file can be loaded on this machine, else one sentence."""
        if platform.system() != "Darwin":
            return "Core ML programs are written anywhere but run on a Mac only: measure there, with edgejoule doctor --install coreml"
        return environments.missing(self.environment)

    def toolchain(self) -> Mapping[str, str]:
        return {**versions(EXPORTER), **environments.versions(self.environment, ("coremltools",))}

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.mlpackage. Raises ModelError, and BackendError where coremltools refuses the network or did not do as told."""
        from edgejoule.compile.export import save_program

        program, package = export.program, context.workdir / PACKAGE
        with tempfile.TemporaryDirectory(prefix="edgejoule-coreml-") as scratch:
            saved = Path(scratch) / "program.pt2"
            save_program(program, saved)
            job = {"program": str(saved), "package": str(package), "precision": self.precision, "target": self.target}
            if self.precision == "int8":
                job |= _save_images(Path(scratch), context)
            context.notify("coreml: converting")
            done = environments.run(self.environment, "edgejoule.compile.coreml_worker", job, LONGEST_S)
        _check(done, self.precision, context.shape)
        for what, value in {**done["notes"], **_notes(done)}.items():
            context.note(what, value)
        return package

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> CoreMlSession:
        """On a Mac. Raises ArtifactError for a damaged file, BackendError as ``runs_here``."""
        if (missing := self.runs_here()) is not None:
            raise BackendError(missing)
        check_one_stream("coreml", streams)
        return CoreMlSession(Path(artifact.folder), self.units, threads)

    def handover(self, artifact: Artifact) -> Handover:
        shape = [artifact.batch, *artifact.variant.spec.preprocessing.input_size]
        swift = SWIFT.format(units=SWIFT_UNITS[self.units], shape=shape)
        return Handover("pip install coremltools numpy pillow  # on a Mac", PYTHON.format(units=self.units.upper()), swift)


class CoreMlSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, folder: Path, units: str, threads: int) -> None:
        import coremltools as ct

        if not (folder / MODEL).is_file():
            raise ArtifactError(f"{folder / MODEL} is missing: compile again for coreml")
        self._units, self._named = getattr(ct.ComputeUnit, units.upper()), NAMED.get(units)
        try:
            self._model: Any = ct.models.MLModel(str(folder / PACKAGE), compute_units=self._units)
            facts = facts_of(self._model.get_spec())
        except Exception as error:
            raise ArtifactError(f"Core ML cannot load {folder / PACKAGE} ({reason(error)}): compile again") from error
        inputs, outputs = ([TensorInfo(name, tuple(shape), DTYPES.get(kind, kind)) for name, shape, kind in facts[p]] for p in PORTS)
        self._shape = inputs[0].shape
        self._info = SessionInfo(
            precision=_dominant(facts["products"]),
            providers=(units,),
            runtime=f"coremltools {ct.__version__}",
            threads=threads,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where Core ML fails."""
        check_images(images, self._shape)
        try:
            logits = self._model.predict({"images": images})["logits"]
        except Exception as error:
            raise BackendError(f"Core ML failed while running the model ({reason(error)}): use units='cpu_only'") from error
        return {"logits": logits.astype("float32", copy=False)}

    def info(self) -> SessionInfo:
        """``precision`` is what the program's products with weights are written in; Core ML has no say of what its units really use."""
        return self._info

    def audit(self, images: Any) -> Placement | None:
        """Which unit Core ML prefers for each operator, by its compute plan; None where macOS has none (before 14.4).

        Raises BackendError where the plan cannot be read.
        """
        said = platform.mac_ver()[0]
        if said and tuple(map(int, said.split(".")[:2])) < FIRST_PLANS and not said.startswith("10.16"):  # which any newer one may say
            return None
        from coremltools.models.compute_plan import MLComputePlan

        try:
            plan = MLComputePlan.load_from_path(self._model.get_compiled_model_path(), self._units)
            operators = plan.model_structure.program.functions["main"].block.operations
            usages = [(op.operator_name, plan.get_compute_device_usage_for_mlprogram_operation(op)) for op in operators]
        except Exception as error:
            raise BackendError(f"Core ML tells no compute plan ({reason(error)}): measure without it, or update macOS") from error
        preferred = [(name, type(usage.preferred_compute_device).__name__) for name, usage in usages if usage]
        return placement_of(preferred, self._precisions(), self._named)

    def close(self) -> None:
        self._model = None

    def _precisions(self) -> Mapping[str, int]:
        ((_, block),) = next(iter(self._model.get_spec().mlProgram.functions.values())).block_specializations.items()
        return Counter(products_of(block.operations).values())


def placement_of(usages: list[tuple[str, str]], precisions: Mapping[str, int], named: str | None = None) -> Placement:
    """``usages`` are (operator, class of the device that Core ML prefers). Delegated is what goes to the unit that was ``named``, so that
    a program that stays on the CPU is told apart; where none was, to the one that Core ML gives most to."""
    places = Counter(DEVICES.get(device, device) for _, device in usages)
    there = named or max(places, key=lambda place: places[place], default="cpu")
    others = Counter(name.rpartition(".")[2] for name, device in usages if DEVICES.get(device, device) != there)
    return Placement(len(usages), places[there], dict(others), dict(precisions))


def _save_images(scratch: Path, context: CompileContext) -> dict[str, str]:
    """Calibration and held-out images as files; the same where nothing is held out. Raises BackendError where there are too few."""
    import numpy as np

    calibration = context.calibration()
    held = context.held().images if context.held is not None else calibration
    found = {}
    for name, images in (("images", calibration), ("held", held)):
        if images is None or len(images) < context.shape[0]:
            raise BackendError(f"int8 needs at least {context.shape[0]} images to calibrate on: name a source of more")
        np.save(scratch / f"{name}.npy", images)
        found[name] = str(scratch / f"{name}.npy")
    return found


def _check(done: Mapping[str, Any], precision: str, shape: tuple[int, int, int, int]) -> None:
    """The file that was written, read back. Raises BackendError unless it is what was asked for."""
    (name, images, kind), *more = done["inputs"]
    outputs = [(port[0], port[2]) for port in done["outputs"]]
    if more or (name, tuple(images), kind) != ("images", shape, "float32") or outputs != [("logits", "float32")]:
        raise BackendError(f"the mlprogram takes {done['inputs']} and gives {done['outputs']}, expected images {shape} and logits, float32")
    found = Counter(done["products"].values())
    wanted = found[precision]
    if wanted < (sum(found.values()) + 1) // 2 or (precision != "int8" and wanted != sum(found.values())):
        raise BackendError(f"the mlprogram's products with weights are {dict(found)}, asked for {precision}: use another precision")


def _notes(done: Mapping[str, Any]) -> dict[str, str]:
    counted = Counter(done["products"].values())
    notes = {
        "products": ", ".join(f"{count} {kind}" for kind, count in counted.items()),
        "operators": f"{sum(done['operators'].values())} ({done['opset']})",
    }
    if counted["int8"]:
        kept = [name for name, kind in done["products"].items() if kind != "int8"]
        notes["kept in float"] = ", ".join(kept) or "none"
    return notes


def _dominant(products: Mapping[str, str]) -> str:
    return Counter(products.values()).most_common(1)[0][0] if products else "unknown"
