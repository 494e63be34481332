"""Backend: torch runs the exported program operation by operation, on the CPU or an NVIDIA GPU. Needs torch where it is loaded.

The file is a ``torch.export`` program, not pickled Python. At batch 1 on a CPU it was measured 5 to 10 % slower than calling the
module itself; the cause is not isolated. Threads are torch's, process-wide. Knows no manifest and no cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule.compile.cpu import has_bf16
from edgejoule.compile.reasons import reason
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export

FILE = "model.pt2"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Eager:
    """``bf16`` holds weights and activations in bfloat16; images go in and logits come out as float32."""

    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"

    def probe(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install 'edgejoule[host]'"
        if self.device == "cuda":
            return _probe_cuda(self.precision)
        if self.precision == "bf16" and has_bf16() is False:
            return "this processor has no bfloat16 instructions (avx512_bf16, amx_bf16 or arm bf16): use precision='fp32'"
        return None

    def toolchain(self) -> Mapping[str, str]:
        return versions(EXPORTER)

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.pt2. Raises ModelError (cannot be exported) and BackendError (cannot be saved)."""
        import torch

        from edgejoule.compile.export import quiet

        program = export.program if self.precision == "fp32" else _bf16_program(export.module, context.shape)
        path = context.workdir / FILE
        try:
            with quiet():
                torch.export.save(program, path)
        except OSError:
            raise  # the caller knows the folder, and says why it cannot be written
        except Exception as error:
            raise BackendError(f"torch cannot save the exported program ({reason(error)}): use another backend") from error
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> EagerSession:
        """Raises ArtifactError for a damaged or foreign file, BackendError where torch or the GPU is missing. Runs one stream."""
        if streams != 1:
            raise BackendError(f"eager runs one stream, {streams} were asked for: use openvino, or one process a stream")
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        return EagerSession(Path(artifact.folder) / FILE, self.device, threads)


class EagerSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}, after the device has finished."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        import torch
        from torch.export.passes import move_to_device_pass

        from edgejoule.compile.export import quiet

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # TF32 keeps 10 bits of mantissa: that would not be fp32
        torch.backends.cudnn.allow_tf32 = False
        self._torch = torch
        self._device = device
        try:
            with quiet():
                program = torch.export.load(path)
        except Exception as error:
            raise ArtifactError(
                f"{path} is not a program that torch {torch.__version__} can load ({reason(error)}): compile again"
            ) from error
        try:
            if device == "cuda":
                program = move_to_device_pass(program, "cuda")
            # torch's own guards re-check on every call what infer checks once and faster
            self._module: Any = program.module(check_guards=False)
        except Exception as error:
            raise BackendError(f"torch cannot put {path} on {device} ({reason(error)}): free some memory or use another device") from error
        entry, leave = _ends(program)
        self._shape, self._dtype = tuple(entry.shape), entry.dtype
        self._info = SessionInfo(
            precision=_precision(program, leave),
            providers=(f"cuda: {torch.cuda.get_device_name()}",) if device == "cuda" else ("cpu",),
            runtime=f"torch {torch.__version__}",
            threads=torch.get_num_threads(),
            inputs=(TensorInfo("images", self._shape, "float32"),),
            outputs=(TensorInfo("logits", tuple(leave.shape), "float32"),),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where torch fails."""
        if images.shape != self._shape or images.dtype != "float32":
            raise BackendError(f"images are {images.dtype} {images.shape}, expected float32 {self._shape}: compile for that batch and size")
        torch = self._torch
        try:
            with torch.inference_mode():
                logits = self._module(torch.from_numpy(images).to(self._device, self._dtype)).float().cpu()
            if self._device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            raise BackendError(
                f"torch failed while running the program ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits.numpy()}

    def info(self) -> SessionInfo:
        """``precision`` is the type of the program's own weights and of its result, before the cast to float32."""
        return self._info

    def close(self) -> None:
        self._module = None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()


def _bf16_program(module: Any, shape: tuple[int, int, int, int]) -> Any:
    import copy

    import torch

    from edgejoule.compile.export import export_program

    # train() drops the float32 tensors that some networks cache outside their buffers, where .to() does not reach
    twin = copy.deepcopy(module).train().eval().to(torch.bfloat16)
    with torch.no_grad():
        try:
            twin(torch.zeros(shape, dtype=torch.bfloat16))  # fills those caches again, in bfloat16
        except Exception as error:
            raise BackendError(f"the network does not run in bfloat16 ({reason(error)}): use precision='fp32'") from error
    return export_program(twin, shape, "the network in bfloat16", torch.bfloat16)


def _probe_cuda(precision: str) -> str | None:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({reason(error)}): install it again"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU: install a CUDA build of torch and NVIDIA's driver, or use device='cpu'"
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name()} has no bfloat16 instructions (Ampere and newer have): use precision='fp32'"
    return None


def _ends(program: Any) -> tuple[Any, Any]:
    """The input's and the result's fake tensors: shape and dtype without data."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return values[program.graph_signature.user_inputs[0]], values[program.graph_signature.user_outputs[0]]


def _precision(program: Any, result: Any) -> str:
    kinds = {value.dtype for value in program.state_dict.values() if value.is_floating_point()} | {result.dtype}
    found = sorted(str(kind).removeprefix("torch.") for kind in kinds)
    return "+".join(SHORT.get(kind, kind) for kind in found)
