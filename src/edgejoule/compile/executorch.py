"""Backend: ExecuTorch, lowered by a partitioner's name in the environment ``executorch``; XNNPACK's runs here and on phones alike.

The file's plan is fixed: what the partitioner did not take runs on portable operators, and nothing falls back while it runs. So ``audit``
tells what compile read in the very bytes that are loaded (``executorch_worker.read_plan``, bound by sha256); the wheel's runtime records
no events. ExecuTorch has one pool of threads a process. Its Python bindings need torch; the runtime itself does not. Knows no cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgejoule import environments
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import EXPORTER, versions
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE, PLAN = "model.pte", "plan.json"
WORKER = "edgejoule.compile.executorch_worker"
TIMEOUT_S = 3600.0
TYPES = {6: "float32", 5: "float16", 15: "bfloat16"}  # ExecuTorch's ScalarType
DEVICE = {"coreml": "npu", "qnn": "npu", "vulkan": "gpu"}
_OPEN: weakref.WeakSet[ExecuTorchSession] = weakref.WeakSet()  # they hold on to the pool of threads that they were loaded with


@dataclass(frozen=True)
class ExecuTorch:
    """``int8``: linear layers and convolutions, weights by channel, activations scaled at every inference. ``soc`` is qnn's."""

    learned: ClassVar[bool] = True  # runs networks that were trained for int8
    precision: Literal["fp32", "int8"] = "fp32"
    partitioner: Literal["xnnpack", "coreml", "openvino", "qnn", "vulkan", "none"] = "xnnpack"
    soc: str = "SM8650"

    environment: ClassVar[str] = "executorch"

    def __post_init__(self) -> None:
        if self.precision == "int8" and self.partitioner != "xnnpack":
            raise ValueError(f"int8 is for partitioner='xnnpack', not {self.partitioner!r}: each delegate quantises in its own way")

    @property
    def device(self) -> str:
        return DEVICE.get(self.partitioner, "cpu")

    def probe(self) -> str | None:
        if (missing := environments.missing(self.environment)) is not None:
            return missing
        if self.partitioner == "qnn" and not os.environ.get("QNN_SDK_ROOT"):
            return "qnn needs Qualcomm's AI Engine Direct SDK: install it and name its folder in QNN_SDK_ROOT"
        return None

    def toolchain(self) -> Mapping[str, str]:
        return {**versions(EXPORTER), **environments.versions(self.environment, ("executorch", "torchao"))}

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.pte and plan.json. Raises ModelError (no classifier, no export) and BackendError (cannot be lowered)."""
        if (missing := self.probe()) is not None:
            raise BackendError(missing)
        from edgejoule.compile.export import save_program

        path = context.workdir / FILE
        context.notify(f"executorch lowers the network for {self.partitioner}: tens of seconds")
        with tempfile.TemporaryDirectory(prefix="edgejoule-executorch-") as folder:
            program = Path(folder, "program.pt2")
            save_program(export.program, program)
            job: dict[str, Any] = {
                "program": str(program),
                "target": str(path.absolute()),
                "plan": str((context.workdir / PLAN).absolute()),
                "precision": self.precision,
                "partitioner": self.partitioner,
                "soc": self.soc,
            }
            if self.precision == "int8":
                from edgejoule.compile.quantize import held  # onnx comes with it, which a board may lack

                job |= {**held.save(held.only_held(context), Path(folder)), "max_drop_pct": context.max_drop_pct}
            plan = environments.run(self.environment, WORKER, job, TIMEOUT_S)
        context.note("delegate calls", str(plan["calls"]))
        if self.precision == "int8":
            context.note("int8 activations", "scaled at every inference, by row in linear layers")
        for what, chosen in plan["notes"].items():
            context.note(what, chosen)
        return path

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> ExecuTorchSession:
        """Raises ArtifactError for files that are damaged or not of one compilation, BackendError where runtime or delegate is missing."""
        check_one_stream("executorch", streams)
        if importlib.util.find_spec("executorch") is None:
            raise BackendError(
                environments.missing(self.environment) or "executorch is in its environment only: load it with that one's python"
            )
        return ExecuTorchSession(Path(artifact.folder), threads)

    def handover(self, artifact: Artifact) -> Handover:
        """For XNNPACK and the portable operators these lines are all; other delegates come with their vendor's own builds."""
        batch, (channels, height, width) = artifact.batch, artifact.variant.spec.preprocessing.input_size
        own, torch = (
            artifact.toolchain.get(package, known).partition("+")[0] for package, known in (("executorch", "1.4.1"), ("torch", "2.13.0"))
        )
        return Handover(
            install=f"pip install executorch=={own} torch=={torch} numpy pillow",  # the bindings are built for one torch
            python=PYTHON.format(file=FILE),
            cpp=CPP.format(file=FILE, shape=f"{batch}, {channels}, {height}, {width}"),
        )


class ExecuTorchSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}."""

    def __init__(self, folder: Path, threads: int) -> None:
        path = folder / FILE
        self._plan = _read_plan(folder)
        self._torch, runtime = _import_runtime()
        for delegate in self._plan["delegates"]:
            if not runtime._is_available(delegate):
                found = ", ".join(runtime._get_registered_backend_names())
                raise BackendError(f"this executorch was built without {delegate} (it has {found}): run the file on the device it is for")
        used = _set_threads(runtime, threads)
        try:
            checked = runtime.Verification.InternalConsistency
            program = runtime._load_program(str(path), enable_etdump=False, debug_buffer_size=0, program_verification=checked)
            self._method: Any = program.load_method("forward")
            meta = program.method_meta("forward")
            ports = [_tensor(meta.input_tensor_meta(0), "images"), _tensor(meta.output_tensor_meta(0), "logits")]
        except Exception as error:
            raise ArtifactError(f"executorch cannot load {path} ({reason(error)}): compile again") from error
        self._shape = ports[0].shape
        self._info = SessionInfo(
            precision=_precision(self._plan["precisions"]),
            providers=tuple(self._plan["delegates"]) or ("portable",),
            runtime=f"executorch {environments.versions(ExecuTorch.environment, ('executorch',)).get('executorch', 'unknown')}",
            threads=used,
            inputs=(ports[0],),
            outputs=(ports[1],),
        )
        _OPEN.add(self)

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        check_images(images, self._shape)
        try:
            (logits,) = self._method([self._torch.from_numpy(images).contiguous()])  # the result is a copy
        except Exception as error:
            raise BackendError(
                f"executorch failed while running the model ({reason(error)}): free some memory or use another backend"
            ) from error
        return {"logits": logits.numpy()}

    def info(self) -> SessionInfo:
        """``precision`` is that of most products with weights in the loaded bytes; ``threads`` the pool's, which the process shares."""
        return self._info

    def audit(self, images: Any) -> Placement:
        """Read in the file when it was written, and bound to its bytes: the plan leaves the runtime no choice, so nothing is run."""
        plan = self._plan
        return Placement(plan["nodes"], plan["delegated"], plan["fallbacks"], plan["precisions"])

    def close(self) -> None:
        self._method = None
        _OPEN.discard(self)


def _import_runtime() -> tuple[Any, Any]:
    """torch, and the bindings themselves: executorch.runtime would import its whole compiler, which is memory that a device lacks."""
    try:
        import torch
        from executorch.extension.pybindings import _portable_lib
    except (ImportError, OSError) as error:
        raise BackendError(f"the executorch runtime cannot be imported ({reason(error)}): edgejoule doctor --install executorch") from error
    return torch, _portable_lib


def _set_threads(runtime: Any, threads: int) -> int:
    """How many threads the process's pool has now. A session whose pool is replaced under it crashes, hence BackendError."""
    found = int(runtime._threadpool_get_thread_count())
    if threads <= 0 or found == threads:
        return found
    if len(_OPEN):
        raise BackendError(
            f"executorch has one pool of threads a process, of {found} here: close its other sessions, or use another process"
        )
    runtime._unsafe_reset_threadpool(threads)
    return int(runtime._threadpool_get_thread_count())


def _read_plan(folder: Path) -> dict[str, Any]:
    """What compile wrote beside the program. Raises ArtifactError where it is missing, damaged or that of another program."""
    path = folder / PLAN
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = plan["sha256"] == hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
        Placement(**{name: plan[name] for name in ("nodes", "delegated", "fallbacks", "precisions")})
        sound = isinstance(plan["delegates"], list)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder} holds no sound {FILE} with its {PLAN} ({reason(error)}): compile again") from error
    if not same or not sound:
        raise ArtifactError(f"{folder / FILE} is not the program that {PLAN} describes: compile again, or copy the whole folder")
    return plan


def _precision(products: Mapping[str, int]) -> str:
    """That of most products with weights; "unknown" where the delegate does not tell, and what is unknown is not ranked."""
    return max(products, key=lambda kind: products[kind]) if products else "unknown"


def _tensor(meta: Any, name: str) -> TensorInfo:
    return TensorInfo(name, tuple(meta.sizes()), TYPES.get(meta.dtype(), f"scalar type {meta.dtype()}"))


PYTHON = """\
import numpy as np
import torch  # the bindings need it; the C++ runtime does not
from executorch.runtime import Runtime
program = Runtime.get().load_program("{file}")
method = program.load_method("forward")
def run(images):
    return method.execute([torch.from_numpy(np.ascontiguousarray(images))])[0].numpy()
"""

CPP = """\
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
using namespace executorch::extension;  // link extension_module, extension_tensor, xnnpack_backend and portable_ops_lib
Module module("{file}");
auto images = from_blob(pixels, {{{shape}}});  // const float*, normalised, (B, C, H, W)
const auto result = module.forward(images);
const float* logits = result->at(0).toTensor().const_data_ptr<float>();  // (B, K), where result.ok()
"""
