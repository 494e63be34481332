"""Backend: TensorRT 10 and 11 on an NVIDIA GPU, a PC's or a Jetson's, from strongly typed ONNX. Loading imports tensorrt and cuda only.

Compiling needs neither: what is written is ONNX whose own types are the precision (``strongly_typed.py``), and TensorRT keeps to them.
An engine runs on the GPU and version that built it, so it is built where it is loaded, once, and kept in the cache beside compiled
files; the first load takes minutes. Where Python has no TensorRT, trtexec runs the same file (``trtexec_session.py``). Knows no manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgejoule.bench import default_cache
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images, check_one_stream
from edgejoule.compile.toolchain import ONNX_EXPORTER, versions
from edgejoule.compile.trtexec import OLDEST, dominant, placement_of
from edgejoule.compile.trtexec_session import TrtexecSession, find_trtexec
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Artifact, Placement, SessionInfo, TensorInfo
from edgejoule.seams import CompileContext, Export, Handover

FILE, FACTS = "model.onnx", "products.json"  # the second: the operators with weights, which only a host with onnx can tell
MIB = 2**20
PYTHON = """\
import numpy as np, tensorrt as trt
from cuda.bindings import runtime as cuda  # cuda-python; before 12.8: from cuda import cudart as cuda
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
assert trt.OnnxParser(network, builder.logger).parse_from_file("model.onnx")
plan = builder.build_serialized_network(network, builder.create_builder_config())  # minutes: keep it in a file
engine = trt.Runtime(builder.logger).deserialize_cuda_engine(plan)
context, logits = engine.create_execution_context(), np.empty(tuple(engine.get_tensor_shape("logits")), np.float32)
def run(images):
    images = np.ascontiguousarray(images, np.float32)
    there = [cuda.cudaMalloc(array.nbytes)[1] for array in (images, logits)]
    cuda.cudaMemcpy(there[0], images.ctypes.data, images.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
    for name, place in zip(("images", "logits"), there): context.set_tensor_address(name, int(place))
    context.execute_async_v3(0)
    cuda.cudaMemcpy(logits.ctypes.data, there[1], logits.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    for place in there: cuda.cudaFree(place)
    return logits.copy()
"""
CPP = """\
// trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.engine; then link with -lnvinfer -lcudart
std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
context->setTensorAddress("images", images);  // device memory, float32
context->setTensorAddress("logits", logits);
context->enqueueV3(stream);
"""


@dataclass(frozen=True)
class TensorRt:
    """``int8`` puts linear and convolution into symmetric int8 and the rest into half precision. ``workspace_mib`` 0 sets no limit."""

    precision: Literal["fp16", "fp32", "int8"] = "fp16"
    device: Literal["cuda"] = "cuda"
    workspace_mib: int = 0

    def __post_init__(self) -> None:
        if self.workspace_mib < 0:
            raise ValueError(f"workspace_mib={self.workspace_mib}, expected 0 (no limit) or more")

    def probe(self) -> str | None:
        """Of compiling, which needs no GPU: ``runs_here`` is of loading."""
        absent = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
        return f"{' and '.join(absent)} cannot be found: pip install 'edgejoule[host]'" if absent else None

    def runs_here(self) -> str | None:
        """None where the file can be loaded on this machine, else one sentence: what is missing and how to get it."""
        if (lacking := _python_lacks()) is None:
            return _gpu_lacks()
        found = find_trtexec()
        return f"{lacking}; {found}" if isinstance(found, str) else None

    def toolchain(self) -> Mapping[str, str]:
        return versions((*ONNX_EXPORTER, "onnxruntime"))  # TensorRT shapes the engine, which is no part of the artifact

    def compile(self, export: Export, context: CompileContext) -> Path:
        """Writes model.onnx and products.json. Raises ModelError and BackendError."""
        from edgejoule.compile.strongly_typed import write_strongly_typed

        target = context.workdir / FILE
        if self.precision != "int8":
            images = context.calibration() if self.precision == "fp16" else None
            written = write_strongly_typed(export.onnx, target, self.precision, _batch(images, context))
        else:
            from edgejoule.compile.quantize import Options, quantize_onnx

            with tempfile.TemporaryDirectory(prefix="edgejoule-tensorrt-") as folder:
                quantized = Path(folder) / FILE
                chosen = quantize_onnx(export.onnx, context, Options(activations="s8"), quantized)
                written = write_strongly_typed(quantized, target, "fp16", _batch(context.calibration(), context))
            for what, value in chosen.notes().items():
                context.note(what, value)
        (context.workdir / FACTS).write_text(json.dumps(written, indent=1))
        return target

    def load(self, artifact: Artifact, threads: int, streams: int = 1) -> TensorRtSession | TrtexecSession:
        """Builds the engine where the cache has none: minutes. Raises ArtifactError for a damaged file, BackendError as ``runs_here``."""
        check_one_stream("tensorrt", streams)
        if (missing := self.runs_here()) is not None:
            raise BackendError(missing)
        folder = Path(artifact.folder)
        if _python_lacks() is not None and not isinstance(found := find_trtexec(), str):
            return TrtexecSession(found, folder / FILE, _read_facts(folder), self.workspace_mib, threads)
        return TensorRtSession(folder, self.workspace_mib * MIB, threads)

    def handover(self, artifact: Artifact) -> Handover:
        return Handover("pip install tensorrt cuda-python numpy pillow  # on a Jetson TensorRT comes with JetPack", PYTHON, CPP)


class TensorRtSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}; the time includes both transfers."""

    def __init__(self, folder: Path, workspace_bytes: int, threads: int) -> None:
        import numpy as np
        import tensorrt as trt

        self._products = _read_facts(folder)
        self._cuda = cuda = _cuda()
        _checked(cuda.cudaSetDeviceFlags(cuda.cudaDeviceScheduleBlockingSync))  # a waiting core sleeps, and its energy is its own
        try:
            self._engine: Any = open_engine(folder / FILE, workspace_bytes)
            self._context: Any = self._engine.create_execution_context()
            self._stream = _checked(cuda.cudaStreamCreate())
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            self._host, self._there, ports = {}, {}, {}
            for name in names:
                kind = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
                ports[name] = TensorInfo(name, tuple(self._engine.get_tensor_shape(name)), kind.name)
                self._host[name] = np.empty(ports[name].shape, kind)
                self._there[name] = _checked(cuda.cudaMalloc(self._host[name].nbytes))
                self._context.set_tensor_address(name, int(self._there[name]))
            inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        except (ArtifactError, BackendError):
            raise
        except Exception as error:
            raise BackendError(f"TensorRT cannot load {folder / FILE} ({reason(error)}): free some GPU memory") from error
        self._input, self._output = inputs[0], next(name for name in names if name not in inputs)
        self._shape = ports[self._input].shape
        self._info = SessionInfo(
            precision=dominant(self._placement(), self._products),
            providers=(_gpu_name(cuda),),
            runtime=f"tensorrt {trt.__version__}",
            threads=threads,
            inputs=(ports[self._input],),
            outputs=(ports[self._output],),
        )

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the GPU fails."""
        check_images(images, self._shape)
        cuda, logits = self._cuda, self._host[self._output]
        self._host[self._input][...] = images  # contiguous, whatever the caller's strides are
        self._copy(self._input, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError("TensorRT refused to run the engine: free some GPU memory or use another backend")
        self._copy(self._output, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        _checked(cuda.cudaStreamSynchronize(self._stream))
        return {"logits": logits.copy()}

    def info(self) -> SessionInfo:
        """``precision`` is that of most products with weights, by the engine's inspector; the network's where blocks do not tell."""
        return self._info

    def audit(self, images: Any) -> Placement:
        """The engine's layers, and its products' precisions, by its own inspector. The images do not matter: an engine is fixed."""
        return self._placement()

    def close(self) -> None:
        for place in self._there.values():
            self._cuda.cudaFree(place)
        if self._context is not None:
            self._cuda.cudaStreamDestroy(self._stream)
        self._there, self._context, self._engine = {}, None, None

    def _placement(self) -> Placement:
        import tensorrt as trt

        told = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return placement_of(told, self._products.keys())

    def _copy(self, name: str, direction: Any) -> None:
        host, there = self._host[name], self._there[name]
        target, source = (there, host.ctypes.data) if name == self._input else (host.ctypes.data, there)
        _checked(self._cuda.cudaMemcpyAsync(target, source, host.nbytes, direction, self._stream))


def open_engine(onnx: Path, workspace_bytes: int) -> Any:
    """The engine of an ONNX file for this GPU, from the cache or built and put there. Raises ArtifactError and BackendError."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    content = onnx.read_bytes() if onnx.is_file() else b""
    facts = f"{hashlib.sha256(content).hexdigest()} {trt.__version__} {_gpu_name(_cuda())} {workspace_bytes}"
    kept = default_cache() / "engines" / f"{hashlib.sha256(facts.encode()).hexdigest()}.engine"
    if kept.is_file() and (engine := trt.Runtime(logger).deserialize_cuda_engine(kept.read_bytes())) is not None:
        return engine
    plan = _build(trt, logger, onnx, content, workspace_bytes)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next load minutes, nothing else
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_bytes(plan)
        partial.replace(kept)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError("TensorRT cannot load the engine that it has just built: free some GPU memory")
    return engine


def _build(trt: Any, logger: Any, onnx: Path, content: bytes, workspace_bytes: int) -> bytes:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))  # 11 is so anyway, and takes the flag
    parser = trt.OnnxParser(network, logger)
    if not content or not parser.parse(content):
        told = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))[:200] if content else "it is missing or empty"
        raise ArtifactError(f"TensorRT cannot read {onnx} ({told}): compile again")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # costs nothing while running, and lets the audit see the layers
    config.clear_flag(trt.BuilderFlag.TF32)  # TF32 keeps 10 bits of mantissa: that would not be fp32
    if workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError("TensorRT cannot build an engine of the network: free some GPU memory, or use precision='fp32'")
    return bytes(plan)


def _batch(images: Any, context: CompileContext) -> Any:
    """The first batch (B, C, H, W) of real images; None where there are too few."""
    return None if images is None or len(images) < context.shape[0] else images[: context.shape[0]]


# ---------------------------------------------------------------- on the device


def _python_lacks() -> str | None:
    """Why Python cannot drive TensorRT here, where trtexec may: one sentence without end, None where it can."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        return (
            f"TensorRT cannot be imported ({reason(error)}): on a PC with an NVIDIA GPU pip install tensorrt cuda-python; "
            "on a Jetson it comes with JetPack 6.1 or later, and makes its Python see it by a venv with --system-site-packages"
        )
    if int(tensorrt.__version__.split(".")[0]) < OLDEST:
        return f"TensorRT {tensorrt.__version__} builds no strongly typed networks: install {OLDEST}.0 or later (JetPack 6.1)"
    try:
        _cuda()
    except (ImportError, OSError) as error:
        return f"cuda-python cannot be imported ({reason(error)}): pip install cuda-python of your CUDA's version"
    return None


def _gpu_lacks() -> str | None:
    try:
        _checked(_cuda().cudaGetDeviceCount())
    except BackendError as error:
        return f"CUDA finds no GPU ({reason(error)}): install the NVIDIA driver, or look at nvidia-smi"
    return None


def _read_facts(folder: Path) -> Mapping[str, str]:
    try:
        found = json.loads((folder / FACTS).read_text())
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    except (OSError, ValueError):
        pass
    raise ArtifactError(f"{folder / FACTS} is missing or damaged: compile again for tensorrt")


def _cuda() -> Any:
    """The CUDA runtime's Python module, which cuda-python has moved."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        from cuda import cudart as runtime
    return runtime


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a CUDA call gave besides its error code. Raises BackendError."""
    code, *values = answer
    if int(code):
        raise BackendError(f"CUDA failed ({getattr(code, 'name', code)}): free some GPU memory, or look at nvidia-smi")
    return values[0] if values else None


def _gpu_name(cuda: Any) -> str:
    name = _checked(cuda.cudaGetDeviceProperties(0)).name
    return name.decode().rstrip("\x00") if isinstance(name, bytes) else str(name)
