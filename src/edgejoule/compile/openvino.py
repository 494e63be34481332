"""Backend: OpenVINO, from the shared ONNX file to its IR (model.xml, model.bin). Loading imports openvino only, no torch.

OpenVINO would run a float32 model in bfloat16 wherever the processor can, and takes "f16" for bfloat16 where it has no float16: the
precision is always stated, refused where the device lacks it, and read back from the compiled graph; only of what an int8 file leaves
in float is it the device's choice. The ONNX file is read by the core. Knows no manifest and no cache.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from edgejoule.compile.cpu import sums_exactly
from edgejoule.compile.openvino_import import core, import_openvino
from edgejoule.compile.openvino_rewrite import read_for_int8, rewrite
from edgejoule.compile.quantize.options import Options
from edgejoule.compile.reasons import reason
from edgejoule.compile.toolchain import ONNX_EXPORTER, versions
from edgejoule.errors import BackendError
from edgejoule.records import Artifact
from edgejoule.seams import CompileContext, Export, Handover

if TYPE_CHECKING:
    from edgejoule.compile.openvino_session import OpenVinoSession

FILE = "model.xml"
HINT = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
QUANTISING = ("quantizer", "scope", "smoothing", "ranges", "search", "rest")


@dataclass(frozen=True)
class OpenVino:
    """``precision`` is what the weighted products compute in. Threads are split among the ``streams``.

    ``storage="fp16"`` halves the file: its float weights are rounded to float16, and computed with in ``precision`` on any device.
    Of int8: ``quantizer``, ``scope``, ``smoothing``, ``ranges`` and ``search`` as in ``quantize.Options``; ``rest`` is the precision of
    what stays in float ("auto": the device's fastest), chosen when the file is loaded.
    ``rewrite``: the graph is put in the order in which the processor plugin is fast (``openvino_rewrite``); results differ by rounding.
    """

    learned: ClassVar[bool] = True  # runs networks that were trained for int8
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    device: Literal["cpu", "gpu", "npu"] = "cpu"
    streams: int = 1
    storage: Literal["fp32", "fp16"] = "fp32"
    quantizer: Literal["nncf", "onnxruntime"] = "nncf"
    scope: Literal["linear", "attention", "all"] = "linear"
    smoothing: Literal["auto", "off", "fold"] | float = "auto"
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    search: bool = True
    rest: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    rewrite: bool = True

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams={self.streams}, expected 1 or more")
        idle = [name for name in QUANTISING if getattr(self, name) != getattr(type(self), name)]
        if self.precision != "int8" and idle:
            raise ValueError(f"{idle[0]} says how to quantise: use it with precision='int8'")
        if self.quantizer == "nncf" and self.smoothing == "fold":
            raise ValueError("smoothing='fold' is not one of nncf's: use quantizer='onnxruntime' with it")
        if isinstance(self.smoothing, float | int) and not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing={self.smoothing}, expected a number between 0 and 1")

    @property
    def inference(self) -> str | None:
        """The precision to ask the runtime for: of everything that is not int8; None leaves it to the device."""
        wanted = self.rest if self.precision == "int8" else self.precision
        return None if wanted == "auto" else wanted

    def probe(self) -> str | None:
        return self._probe_quantizer() or self._probe_runtime()

    def _probe_quantizer(self) -> str | None:
        if self.precision != "int8" or importlib.util.find_spec(self.quantizer) is not None:
            return None
        return f"{self.quantizer}, which quantises, is not installed: pip install {self.quantizer}, or use another quantizer"

    def _probe_runtime(self) -> str | None:
        """What loading needs; a board that only runs int8 files needs no quantiser."""
        try:
            import_openvino()
        except (ImportError, OSError) as error:
            return f"openvino cannot be imported ({reason(error)}): pip install 'edgejoule[openvino]'"
        name = self.device.upper()
        try:
            devices = core().available_devices
            if not any(found == name or found.startswith(f"{name}.") for found in devices):
                return f"openvino sees no {name}: install its driver, or use one of {', '.join(devices).lower()}"
            able = core().get_property(name, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            return f"openvino does not start ({reason(error)}): install it again"
        for wanted in (self.precision, self.inference):
            if wanted is not None and wanted.upper() not in able:
                instead = "rest='auto'" if self.precision == "int8" and wanted != "int8" else "another precision"
                return f"this {name} has no {WORDS[wanted]} instructions, says openvino: use {instead}"
        return None

    def toolchain(self) -> Mapping[str, str]:
        quantiser = (self.quantizer,) if self.precision == "int8" else ()
        return versions((*ONNX_EXPORTER, "openvino", *quantiser))

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.xml and model.bin; the device need not be here. Raises ModelError and BackendError."""
        if (missing := self._probe_quantizer()) is not None:
            raise BackendError(missing)
        source = export.onnx
        path = context.workdir / FILE
        try:
            openvino = import_openvino()

            model = self._quantized(source, context) if self.precision == "int8" else self._float(source)
            if self.rewrite and (done := rewrite(model, fold=self.precision != "int8")):
                context.note("rewritten", ", ".join(f"{count} {what}" for what, count in done.items()))
            openvino.save_model(model, path, compress_to_fp16=self.storage == "fp16")
        except (OSError, BackendError):
            raise  # the caller knows the folder, and says why it cannot be written
        except Exception as error:
            raise BackendError(f"openvino cannot convert the ONNX file ({reason(error)}): use another backend") from error
        if self.storage == "fp16":
            context.note("storage", "float weights are kept in float16")
        return path

    def _float(self, source: Path) -> Any:
        import onnx

        from edgejoule.compile.learned import refuse_float

        refuse_float(onnx.load(source), self.precision)
        return core().read_model(source)

    def _quantized(self, source: Path, context: CompileContext) -> Any:
        """The network with int8 products, as OpenVINO's model; what was chosen is noted. Raises BackendError."""
        from edgejoule.compile.learned import for_kernels, note_of

        if (learned := for_kernels(source)) is not None:
            context.note("quantisation", note_of(learned[1]))
            return read_for_int8(learned[0].SerializeToString())
        bits: Literal[7, 8] = 7 if sums_exactly() is False else 8
        options = Options(self.quantizer, self.scope, self.smoothing, self.ranges, search=self.search, weight_bits=bits)
        if self.quantizer == "nncf":
            from edgejoule.compile.openvino_nncf import quantize_by_nncf

            model, chosen = quantize_by_nncf(source, context, options)
        else:
            from edgejoule.compile.quantize import quantize_onnx

            with tempfile.TemporaryDirectory(prefix="edgejoule-openvino-") as folder:
                target = Path(folder) / "quantized.onnx"
                chosen = quantize_onnx(source, context, options, target)
                model = read_for_int8(target.read_bytes())
        for what, word in chosen.notes().items():
            context.note(what, word)
        if bits < 8:
            context.note("weights", f"{bits} bits: with 8 this processor's sums of int8 products would saturate")
        return model

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> OpenVinoSession:
        """Raises ArtifactError for a damaged file, BackendError where openvino refuses it. ``streams`` > 1 wins over the field."""
        if (missing := self._probe_runtime()) is not None:
            raise BackendError(missing)
        from edgejoule.compile.openvino_session import OpenVinoSession

        count = streams if streams > 1 else self.streams
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.inference is not None:
            config["INFERENCE_PRECISION_HINT"] = HINT[self.inference]
        if self.device != "npu":  # it has one queue of its own, and no such setting
            config["NUM_STREAMS"] = count
        if self.device == "cpu":
            config["INFERENCE_NUM_THREADS"] = threads
        return OpenVinoSession(Path(artifact.folder) / FILE, self.device.upper(), config, threads, count)

    def handover(self, artifact: Artifact) -> Handover:
        device, hint = self.device.upper(), HINT.get(self.inference or "")
        version = artifact.toolchain.get("openvino")
        stated = f'{{"INFERENCE_PRECISION_HINT": "{hint}"}}' if hint else "{}"
        python = f"""\
import openvino

model = openvino.Core().compile_model("{FILE}", "{device}", {stated})


def run(images):  # numpy float32 {artifact.batch, *artifact.variant.spec.preprocessing.input_size}, normalised -> logits (B, K)
    return model(images)[0]
"""
        properties = f", ov::hint::inference_precision(ov::element::{hint})" if hint else ""
        cpp = f"""\
#include <openvino/openvino.hpp>  // cmake: find_package(OpenVINO REQUIRED), link openvino::runtime

int main() {{
    ov::Core core;
    auto model = core.compile_model("{FILE}", "{device}"{properties});
    auto request = model.create_infer_request();
    float* images = request.get_input_tensor().data<float>();  // fill with (B, C, H, W), normalised
    request.infer();
    const float* logits = request.get_output_tensor().data<float>();  // (B, K)
}}
"""
        return Handover(f"pip install openvino{f'=={version}' if version else ''} numpy pillow", python, cpp)
