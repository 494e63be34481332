"""Backend: TorchScript on the CPU, traced and frozen, as a full file or the mobile-lite one that EdgeViT's paper timed. Needs torch.

The file is code: it is loaded only if its sha256 is the manifest's. Freezing folds BatchNorm into the convolution before it. The full
executor profiles the first inference and compiles at the second, so both are slow: measure after a warm-up. A trace holds the CPU's name
and the batch, hence no ``device="cuda"`` here. The lite file is not rewritten for XNNPACK (``optimize_for_mobile``): the paper
does not say that it was, and torch's own x86 builds come without XNNPACK. Threads are torch's, process-wide. Knows no cache.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule import manifest
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.compile.torch_program import SHORT, Layout, prepared
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE, LITE_FILE = "model.pt", "model.ptl"
FACTS = "edgejoule.json"  # rides in the file: a frozen graph knows no shapes, and the lite module shows no graph
LITE_SAVER = "_save_to_buffer_for_lite_interpreter"  # torch calls the lite interpreter deprecated: the first thing it may drop
SEED = 0
FARTHEST = 1e-4  # a trace repeats the module's own operations, so it differs by rounding at most
TINY = 1e-12


@dataclass(frozen=True)
class TorchScript:
    """``lite`` writes and runs the mobile-lite file, as EdgeViT's paper did; ``optimize`` adds ``optimize_for_inference`` at load.

    The optimised graph holds oneDNN's own tensors, which a file cannot, and the lite interpreter cannot run it.
    """

    precision: Literal["fp32"] = "fp32"
    device: Literal["cpu"] = "cpu"
    lite: bool = False
    optimize: bool = False
    layout: Layout = "contiguous"

    def __post_init__(self) -> None:
        if self.lite and self.optimize:
            raise ValueError("lite=True runs the file as it is, and optimize=True rewrites it after loading: choose one of them")

    @property
    def file(self) -> str:
        return LITE_FILE if self.lite else FILE

    def probe(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install 'edgejoule[host]'"
        return _probe_lite() if self.lite else None

    def toolchain(self) -> Mapping[str, str]:
        return versions(EXPORTER)

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.pt or model.ptl. Raises ModelError (no classifier) and BackendError (cannot be traced, or not saved)."""
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        frozen, facts = _frozen(prepared(export.module, self.precision, self.layout, context.shape), context.shape)
        content = _bytes(frozen, self.lite, {FACTS: json.dumps(facts)})
        path = context.workdir / self.file
        path.write_bytes(content)
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> TorchScriptSession:
        """Raises ArtifactError for a file that is damaged or not the manifest's, BackendError where torch is missing. One stream."""
        check_one_stream("torchscript", streams)
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        return TorchScriptSession(_verified(artifact, self.file), self.lite, self.optimize, threads)

    def handover(self, artifact: Artifact) -> Handover:
        """The lite file as the full interpreter runs it: in Python, torch opens both kinds alike."""
        version = artifact.toolchain.get("torch", "2.13").partition("+")[0]
        opened = "torch.jit.optimize_for_inference(network)" if self.optimize else ""
        lines = ["import torch", f'network = torch.jit.load("{self.file}")', *([f"network = {opened}"] if opened else [])]
        python = "\n".join([*lines, *_RUN])
        return Handover(f"pip install torch=={version} numpy pillow", python, "" if self.lite else _CPP.format(file=self.file))


class TorchScriptSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}. A full file's first two inferences are slow."""

    def __init__(self, path: Path, lite: bool, optimize: bool, threads: int) -> None:
        import torch

        from edgejoule.compile.export import quiet

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # oneDNN may multiply in bfloat16 below that: it would not be fp32
        self._torch = torch
        facts = _facts(path)
        try:
            with quiet():
                module = _load(path, lite)
            found = facts["precision"] if lite else _precision(module, facts["result"])
            self._shape = tuple(facts["images"])
            ports = TensorInfo("images", self._shape, "float32"), TensorInfo("logits", tuple(facts["logits"]), "float32")
        except Exception as error:
            raise ArtifactError(
                f"{path} is not a file that TorchScript of torch {torch.__version__} can load ({reason(error)}): compile again"
            ) from error
        self._optimize = optimize
        self._module: Any = _optimized(module) if optimize else module
        self._info = SessionInfo(
            precision=found,
            providers=("cpu",),
            runtime=f"torch {torch.__version__} torchscript{' lite' * lite}",
            threads=torch.get_num_threads(),
            inputs=ports[:1],
            outputs=ports[1:],
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where torch fails."""
        check_images(images, self._shape)
        try:
            with self._torch.inference_mode():
                logits = self._module(self._torch.from_numpy(images)).float()  # (B, K)
        except Exception as error:
            raise BackendError(
                f"torch failed while running the graph ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits.numpy()}

    def audit(self, images: Any) -> Placement:
        """Every operator as the interpreter dispatches it, with its types. Raises BackendError.

        An optimised graph calls oneDNN's convolutions past the dispatcher: those are counted in the graph itself.
        """
        from edgejoule.compile.torch_audit import audit

        try:
            found = audit(self._module, self._torch.from_numpy(images), "cpu")
            n = _packed_convolutions(self._module) if self._optimize else 0
            precisions = {**found.precisions, "fp32": found.precisions.get("fp32", 0) + n}
            return Placement(found.nodes + n, found.delegated + n, found.fallbacks, precisions)
        except Exception as error:
            raise BackendError(f"torch failed while running the graph ({reason(error)}): load it again") from error

    def info(self) -> SessionInfo:
        """``precision`` is the type of the loaded graph's weights and of its result, before the cast to float32.

        The lite module shows no graph: there it is what the graph said when it was written into that very file.
        """
        return self._info

    def close(self) -> None:
        self._module = None


def _frozen(module: Any, shape: tuple[int, int, int, int]) -> tuple[Any, dict[str, Any]]:
    """The traced, checked and frozen graph, and what it cannot tell of itself. Raises BackendError."""
    import torch

    from edgejoule.compile.export import quiet

    random = torch.Generator().manual_seed(SEED)
    # one to trace, and two whose every statistic differs from its, so that whatever the trace fixed at its values comes to light
    images = [torch.randn(shape, generator=random) + shift for shift in (0.0, 1.0, -1.0)]  # (B, C, H, W) each
    jit: Any = torch.jit
    with torch.no_grad(), quiet():
        try:
            traced = jit.trace(module, images[0], check_trace=False)
            errors = [_relative(traced(other), module(other)) for other in images[1:]]
            frozen = jit.freeze(traced)
            logits = frozen(images[0])
        except Exception as failure:
            raise BackendError(f"torch.jit.trace refuses the network ({reason(failure)}): use onnxruntime or eager") from failure
    if not all(error <= FARTHEST for error in errors):  # nan is not
        raise BackendError(
            f"the trace computes something else than the network on other images (relative errors {errors[0]:.0e} and {errors[1]:.0e}, "
            f"expected at most {FARTHEST:.0e}); its forward depends on the values of tensors, which no trace holds: use another network"
        )
    result = str(logits.dtype).removeprefix("torch.")
    return frozen, {"precision": _precision(frozen, result), "result": result, "images": shape, "logits": tuple(logits.shape)}


def _relative(found: Any, wanted: Any) -> float:
    """Of Euclidean norms, all images together; nan where either is not finite."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(TINY))


def _bytes(frozen: Any, lite: bool, extra: dict[str, str]) -> bytes:
    """In memory, so that a folder that cannot be written gives an OSError, for which torch has a RuntimeError. Raises BackendError."""
    from edgejoule.compile.export import quiet

    try:
        with quiet():
            content: bytes = getattr(frozen, LITE_SAVER if lite else "save_to_buffer")(_extra_files=extra)
    except Exception as error:
        raise BackendError(f"torch cannot save the traced graph ({reason(error)}): use another backend") from error
    return content


def _verified(artifact: Artifact, name: str) -> Path:
    """The file, after comparing it with the manifest: loading it runs it. Raises ArtifactError."""
    folder = Path(artifact.folder)
    if manifest.hash_files(folder, [name]) != tuple(file for file in artifact.files if file.name == name):
        raise ArtifactError(f"{folder / name} is not the file in its manifest, and TorchScript files are code: compile again")
    return folder / name


def _facts(path: Path) -> dict[str, Any]:
    """What compile wrote beside the graph. Raises ArtifactError."""
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (name for name in archive.namelist() if name.endswith(f"/extra/{FACTS}"))
            facts: dict[str, Any] = json.loads(archive.read(entry))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged, or edgejoule did not write it ({reason(error)}): compile again") from error
    return facts


def _load(path: Path, lite: bool) -> Any:
    import torch

    if lite:
        from torch.jit import mobile

        lite_of: Any = mobile._load_for_lite_interpreter
        return lite_of(str(path))
    jit: Any = torch.jit
    return jit.load(path, map_location="cpu")


def _optimized(module: Any) -> Any:
    """Raises BackendError."""
    import torch

    from edgejoule.compile.export import quiet

    try:
        with quiet():
            return torch.jit.optimize_for_inference(module)
    except Exception as error:
        raise BackendError(f"torch cannot optimise the graph for inference ({reason(error)}): use optimize=False") from error


def _packed_convolutions(module: Any) -> int:
    """oneDNN's own, of float32 blocks: the optimiser packs no other type."""
    return str(module.graph).count("::mkldnn_convolution(")


def _precision(module: Any, result: str) -> str:
    """Frozen weights are constants of the graph. One without dimensions is a number of the formula: it sets no type in torch."""
    constants = (node for node in module.graph.findAllNodes("prim::Constant", recurse=True) if node.hasAttribute("value"))
    weights = [node.t("value") for node in constants if node.kindOf("value") == "t"]
    weights += [*module.parameters(), *module.buffers()]  # what freezing had to leave outside the graph
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in weights if weight.is_floating_point() and weight.ndim}
    return "+".join(SHORT.get(kind, kind) for kind in sorted(kinds | {result}))


def _probe_lite() -> str | None:
    try:
        import torch
        from torch.jit import mobile
    except (ImportError, OSError) as error:
        return f"torch with mobile-lite files cannot be imported ({reason(error)}): install torch 2.13, or use lite=False"
    jit: Any = torch.jit
    if not hasattr(jit.RecursiveScriptModule, LITE_SAVER) or not hasattr(mobile, "_load_for_lite_interpreter"):
        return f"torch {torch.__version__} has no mobile-lite files any more: install torch 2.13, or use lite=False"
    return None


_RUN = (
    "def run(images):",
    "    with torch.inference_mode():",
    "        return network(torch.from_numpy(images)).numpy()",
    "",
)
_CPP = """// link with libtorch of the same version
#include <torch/script.h>
torch::Tensor run(const torch::Tensor& images) {{  // (B, C, H, W) float32 -> (B, K) float32
    static torch::jit::Module network = torch::jit::load("{file}");
    c10::InferenceMode guard;
    return network.forward({{images}}).toTensor();
}}
"""
