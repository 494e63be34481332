"""Backend: torch's own compiler. As an AOTInductor package, machine code made ahead of time, or compiled by torch.compile when loaded.

A package is code: it is loaded only if its sha256 is the manifest's, and only on a processor that has every instruction set of the one
that it was compiled on (or a GPU of the same architecture). It needs torch where it is loaded, and a C++ compiler only where it is made.
int8 is torchao's PT2E: per-channel symmetric weights of linear layers and convolutions, asymmetric activations at their inputs,
everything else in float32. A program compiled at load keeps its results in torch's own cache. Knows no manifest format and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule import manifest
from edgejoule.compile import aoti, aoti_source
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.compile.torch_program import (
    Layout,
    float32_products,
    lacking,
    load_program,
    precision_of,
    products_set,
    program_of,
    set_products,
    shapes_of,
)
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE = "model.pt2"


@dataclass(frozen=True)
class Inductor:
    """``package``: compiled ahead of time, else at load. ``max_autotune`` times kernels while it compiles for a GPU.

    ``graphs``: on a GPU the kernels are captured once in a CUDA graph and launched together.
    """

    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8"] = "fp32"
    device: Literal["cpu", "cuda"] = "cpu"
    layout: Layout = "contiguous"
    package: bool = True
    max_autotune: bool = False
    graphs: bool = True

    def __post_init__(self) -> None:
        if self.precision == "int8" and not (self.device == "cpu" and self.package):
            raise ValueError("int8 is for packages on a CPU: leave device and package as they are, or use another precision")
        if self.max_autotune and self.device == "cpu":
            raise ValueError("max_autotune fixes the number of threads on a CPU: leave it out, or use device='cuda'")

    def probe(self) -> str | None:
        return self._cannot_run() or aoti.lacking_to_compile(self.precision, self.device, self.package)

    def toolchain(self) -> Mapping[str, str]:
        """With the compiler and the processor, which shape the machine code."""
        found = versions((*EXPORTER, "torchao") if self.precision == "int8" else EXPORTER)
        return {**found, **aoti.machine(self.device)} if self.package else found

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.pt2. Raises ModelError (cannot be exported) and BackendError (cannot be compiled or saved)."""
        path = context.workdir / FILE
        if not self.package:
            from edgejoule.compile.export import save_program

            save_program(program_of(export, self.precision, self.layout, context.shape), path)
            return path
        program = self._program(export, context)
        try:
            with products_set(self.precision == "tf32"):
                aoti.compile_package(program, path, self.device, self.max_autotune)
        except (OSError, BackendError):
            raise
        except Exception as error:
            raise BackendError(f"inductor cannot compile the network ({reason(error)}): use package=False or another backend") from error
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> InductorSession:
        """Raises ArtifactError for a file that is damaged, not the manifest's or made for another processor; BackendError where torch or
        the GPU is missing. Runs one stream."""
        check_one_stream("inductor", streams)
        if (missing := self._cannot_run()) is not None:
            raise BackendError(missing)
        import torch

        torch.set_num_threads(threads)
        set_products(self.precision == "tf32")
        if self.package:
            return _load_package(_verified(artifact), self)
        return _compile_now(Path(artifact.folder) / FILE, self)

    def handover(self, artifact: Artifact) -> Handover:
        version = artifact.toolchain.get("torch", "2.13").partition("+")[0]
        opened = 'torch._inductor.aoti_load_package("model.pt2")' if self.package else "torch.compile(program.module())"
        lines = ["import torch"] if self.package else ["import torch", 'program = torch.export.load("model.pt2")']
        there, back = (".cuda()", ".cpu()") if self.device == "cuda" else ("", "")
        if self.device == "cuda" and not self.package:
            lines += ["from torch.export.passes import move_to_device_pass", 'program = move_to_device_pass(program, "cuda")']
        if self.device == "cuda":
            lines += [f'torch.set_float32_matmul_precision("{"high" if self.precision == "tf32" else "highest"}")']
            lines += [f"torch.backends.cudnn.allow_tf32 = {self.precision == 'tf32'}"]
        lines += [f"network = {opened}", "def run(images):", "    with torch.inference_mode():"]
        lines += [f"        return network(torch.from_numpy(images){there}){back}.numpy()", ""]
        return Handover(f"pip install torch=={version} numpy pillow", "\n".join(lines), _CPP if self.package else "")

    def _cannot_run(self) -> str | None:
        return aoti.lacking_int8() if self.precision == "int8" else lacking(self.precision, self.device)

    def _program(self, export: Export, context: CompileContext) -> Any:
        if self.precision != "int8":
            return program_of(export, self.precision, self.layout, context.shape)
        from edgejoule.compile.quantize_pt2e import quantized_program

        return quantized_program(program_of(export, "fp32", self.layout, context.shape), context)


class InductorSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}, after the device has finished."""

    def __init__(self, call: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], precision: str, how: Inductor) -> None:
        import torch

        self._torch, self._call = torch, call  # a float32 tensor (B, C, H, W) -> (B, K)
        self._shape = shapes[0]
        self._gpu: Any = None
        if how.device == "cuda":
            from edgejoule.compile.cuda import GpuRun

            torch.backends.cudnn.benchmark = True  # the shape never changes: the fastest algorithm is looked for once
            self._gpu = GpuRun(call, self._shape, how.graphs)
        self._info = SessionInfo(
            precision=precision,
            providers=(f"cuda: {torch.cuda.get_device_name()}",) if how.device == "cuda" else ("cpu",),
            runtime=f"torch {torch.__version__} {'aotinductor' if how.package else 'compile'}",
            threads=torch.get_num_threads(),
            inputs=(TensorInfo("images", shapes[0], "float32"),),
            outputs=(TensorInfo("logits", shapes[1], "float32"),),
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
        try:
            if self._gpu is not None:
                return {"logits": self._gpu(images)}
            with self._torch.inference_mode():
                return {"logits": self._call(self._torch.from_numpy(images)).numpy()}
        except Exception as error:
            raise BackendError(
                f"torch failed while running the program ({reason(error)}): free some memory or use another backend"
            ) from error

    def info(self) -> SessionInfo:
        """``precision``: of the weights that the package's own source multiplies by; of a program compiled at load, of its graph."""
        return self._info

    def close(self) -> None:
        self._call = None
        if self._gpu is not None:
            self._gpu.close()


class PackageSession(InductorSession):
    """A session of a package, whose source says what it calls."""

    def __init__(self, placed: Placement, call: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], how: Inductor) -> None:
        super().__init__(call, shapes, "+".join(_main(placed.precisions)), how)
        self._placed = placed

    def audit(self, images: Any) -> Placement:
        """The calls of the source that was compiled into the package: the same for all images."""
        return self._placed


def _main(precisions: Mapping[str, int]) -> list[str]:
    """``int8`` where most products are, else all that there are."""
    if 2 * precisions.get("int8", 0) > sum(precisions.values()):
        return ["int8"]
    return sorted(precisions) or ["unknown"]


def _verified(artifact: Artifact) -> Path:
    """The file, after comparing it with the manifest: loading it runs it. Raises ArtifactError."""
    folder = Path(artifact.folder)
    if manifest.hash_files(folder, [FILE]) != tuple(file for file in artifact.files if file.name == FILE):
        raise ArtifactError(f"{folder / FILE} is not the file in its manifest, and AOTInductor's packages are code: compile again")
    return folder / FILE


def _load_package(path: Path, how: Inductor) -> PackageSession:
    facts = aoti.check_machine(path)
    placed = aoti_source.placement(path, how.device, float32_products())
    call = aoti.load_package(path)
    return PackageSession(placed, call, (tuple(facts["images"]), tuple(facts["logits"])), how)


def _compile_now(path: Path, how: Inductor) -> InductorSession:
    import torch

    from edgejoule.compile.export import quiet

    program = load_program(path, how.device)
    compile_: Any = torch.compile
    options: dict[str, Any] = {"freezing": True, "max_autotune": how.max_autotune}
    shapes = shapes_of(program)
    try:
        with quiet(), torch.inference_mode():
            call = compile_(program.module(check_guards=False), fullgraph=True, options=options)
            call(torch.zeros(shapes[0], device=how.device))
    except Exception as error:
        raise BackendError(f"torch.compile refuses the network ({reason(error)}): use the eager backend") from error
    return InductorSession(call, shapes, precision_of(program, how.device), how)


_CPP = """// link with libtorch of the same version
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
torch::Tensor run(const torch::Tensor& images) {  // (B, C, H, W) float32 -> (B, K) float32
    static torch::inductor::AOTIModelPackageLoader network("model.pt2");
    return network.run({images})[0];
}
"""
