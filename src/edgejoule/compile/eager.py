"""Backend: torch runs the exported program operation by operation, on the CPU or an NVIDIA GPU. Needs torch where it is loaded.

The file is a ``torch.export`` program, not pickled Python. At batch 1 on a CPU it was measured 5 to 10 % slower than calling the
module itself; the cause is not isolated. Threads are torch's, process-wide. Knows no manifest and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.compile.torch_program import Layout, lacking, load_program, precision_of, program_of, set_products, shapes_of
from edgejoule.errors import BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE = "model.pt2"


@dataclass(frozen=True)
class Eager:
    """Weights and activations in one type; images go in and logits come out as float32. ``tf32`` is float32 whose products a GPU's
    tensor cores round. ``graphs``: on a GPU the kernels are captured once in a CUDA graph and launched together."""

    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    layout: Layout = "contiguous"
    graphs: bool = True

    def probe(self) -> str | None:
        return lacking(self.precision, self.device)

    def toolchain(self) -> Mapping[str, str]:
        return versions(EXPORTER)

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.pt2. Raises ModelError (cannot be exported) and BackendError (cannot be saved)."""
        path = context.workdir / FILE
        from edgejoule.compile.export import save_program

        save_program(program_of(export, self.precision, self.layout, context.shape), path)
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> EagerSession:
        """Raises ArtifactError for a damaged or foreign file, BackendError where torch or the GPU is missing, or the network cannot be
        captured in a CUDA graph. Runs one stream."""
        check_one_stream("eager", streams)
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        set_products(self.precision == "tf32")
        return EagerSession(Path(artifact.folder) / FILE, self.device, threads, self.graphs)

    def handover(self, artifact: Artifact) -> Handover:
        version = artifact.toolchain.get("torch", "2.13").partition("+")[0]
        return Handover(install=f"pip install torch=={version} numpy pillow", python=_script(self.device, self.precision))


class EagerSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}, after the device has finished."""

    def __init__(self, path: Path, device: str, threads: int, graphs: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._device = device
        program = load_program(path, device)
        # torch's own guards re-check on every call what infer checks once and faster
        self._module: Any = program.module(check_guards=False)
        self._shape, logits = shapes_of(program)
        self._gpu: Any = None
        if device == "cuda":
            from edgejoule.compile.cuda import GpuRun

            torch.backends.cudnn.benchmark = True  # the shape never changes: the fastest algorithm is looked for once
            self._gpu = GpuRun(self._module, self._shape, graphs)
        self._info = SessionInfo(
            precision=precision_of(program, device),
            providers=(f"cuda: {torch.cuda.get_device_name()}",) if device == "cuda" else ("cpu",),
            runtime=f"torch {torch.__version__}",
            threads=torch.get_num_threads(),
            inputs=(TensorInfo("images", self._shape, "float32"),),
            outputs=(TensorInfo("logits", logits, "float32"),),
        )

    @property
    def device_time_s(self) -> float:
        """Seconds that the GPU computed in the last inference, by CUDA events, without the copies. Raises BackendError on a CPU."""
        if self._gpu is None:
            raise BackendError("CUDA events time a GPU, and this session has none: load with device='cuda'")
        return float(self._gpu.device_time_s)

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where torch fails."""
        check_images(images, self._shape)
        torch = self._torch
        try:
            if self._gpu is not None:
                return {"logits": self._gpu(images)}
            with torch.inference_mode():
                return {"logits": self._module(torch.from_numpy(images)).numpy()}
        except Exception as error:
            raise BackendError(
                f"torch failed while running the program ({reason(error)}): free some memory or use another backend"
            ) from error

    def audit(self, images: Any) -> Placement:
        """Every operator as torch dispatches it, with its device and types. Raises BackendError."""
        from edgejoule.compile.torch_audit import audit

        try:
            return audit(self._module, self._torch.from_numpy(images).to(self._device), self._device)
        except Exception as error:
            raise BackendError(f"torch failed while running the program ({reason(error)}): load it again") from error

    def info(self) -> SessionInfo:
        """``precision`` is the type of the program's weights and of its products; for float32 on a GPU, by torch's TF32 switches."""
        return self._info

    def close(self) -> None:
        self._module = None
        if self._gpu is not None:
            self._gpu.close()


def _script(device: str, precision: str) -> str:
    lines = ["import torch", 'program = torch.export.load("model.pt2")']
    there, back = (".cuda()", ".cpu()") if device == "cuda" else ("", "")
    if device == "cuda":
        lines += ["from torch.export.passes import move_to_device_pass", 'program = move_to_device_pass(program, "cuda")']
        lines += [f'torch.set_float32_matmul_precision("{"high" if precision == "tf32" else "highest"}")']
        lines += [f"torch.backends.cudnn.allow_tf32 = {precision == 'tf32'}"]
    lines += ["module = program.module()", "def run(images):", "    with torch.inference_mode():"]
    lines += [f"        return module(torch.from_numpy(images){there}){back}.numpy()"]
    return "\n".join(lines) + "\n"
