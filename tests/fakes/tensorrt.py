"""A TensorRT and a CUDA runtime for machines that have neither: "device" memory is the host's, and an engine is its ONNX file.

Only what the backend calls exists, with the signatures of TensorRT 10 and 11 and of cuda-python; onnxruntime computes. Knows no test.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
from typing import Any

import numpy as np


class Mode(enum.Enum):
    INPUT, OUTPUT = 0, 1


class Copy(enum.IntEnum):
    cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = 1, 2  # noqa: N815


class Engine:
    def __init__(self, plan: bytes, built: dict[str, Any]) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(plan.removeprefix(b"plan"))
        self.ports = {port.name: port for port in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.ports)
        self.layers = built["layers"]

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name == self.session.get_inputs()[0].name else Mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.ports[name].shape)

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.ports[name].type)

    def create_engine_inspector(self) -> Any:
        return types.SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": self.layers}))

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.places = engine, {}  # type: ignore[var-annotated]

    def set_tensor_address(self, name: str, place: int) -> bool:
        self.places[name] = place
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        images, logits = (port[0].name for port in (self.engine.session.get_inputs(), self.engine.session.get_outputs()))
        found = self.engine.session.run(None, {images: self._array(images)})[0]
        self._array(logits)[...] = found
        return True

    def _array(self, name: str) -> Any:
        shape = self.engine.get_tensor_shape(name)
        there = (ctypes.c_float * int(np.prod(shape))).from_address(self.places[name])
        return np.ctypeslib.as_array(there).reshape(shape)


class Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self.network, self.num_errors = network, 0

    def parse(self, content: bytes) -> bool:
        if content.startswith(b"not"):
            self.num_errors = 1
            return False
        self.network.content = content
        return True

    def parse_from_file(self, path: str) -> bool:
        with open(path, "rb") as stream:  # noqa: PTH123
            return self.parse(stream.read())

    def get_error(self, index: int) -> Any:
        return types.SimpleNamespace(desc=lambda: "no protobuf")


class Config:
    profiling_verbosity = None

    def __init__(self) -> None:
        self.cleared: list[str] = []
        self.limits: dict[str, int] = {}

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def set_memory_pool_limit(self, pool: str, most: int) -> None:
        self.limits[pool] = most


def modules(version: str, layers: list[dict[str, Any]] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to put into ``sys.modules``, and a record of what was built: configs, flags, bytes that are allocated."""
    built: dict[str, Any] = {"configs": [], "flags": [], "layers": layers or [], "memory": {}}

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            built["flags"].append(flags)
            return types.SimpleNamespace(content=b"")

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Any, config: Config) -> bytes:
            built["configs"].append(config)
            return b"plan" + network.content

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            return Engine(bytes(plan), built) if bytes(plan).startswith(b"plan") else None

    logger = type("Logger", (), {"ERROR": 2, "__init__": lambda self, level: None})
    trt = types.ModuleType("tensorrt")
    trt.__dict__.update(
        __version__=version,
        Logger=logger,
        Builder=Builder,
        Runtime=Runtime,
        OnnxParser=Parser,
        TensorIOMode=Mode,
        nptype=lambda kind: {"tensor(float)": np.float32}[kind],
        NetworkDefinitionCreationFlag=enum.IntEnum("Flag", {"STRONGLY_TYPED": 1}),
        BuilderFlag=types.SimpleNamespace(TF32="TF32"),
        MemoryPoolType=types.SimpleNamespace(WORKSPACE="WORKSPACE"),
        ProfilingVerbosity=types.SimpleNamespace(DETAILED="DETAILED"),
        LayerInformationFormat=types.SimpleNamespace(JSON="JSON"),
    )
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = _runtime(built["memory"])  # type: ignore[attr-defined]
    cuda = types.ModuleType("cuda")
    cuda.bindings = bindings  # type: ignore[attr-defined]
    return {"tensorrt": trt, "cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}, built


def _runtime(memory: dict[int, Any]) -> Any:
    def malloc(size: int) -> tuple[int, int]:
        block = (ctypes.c_char * size)()
        memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def copy(target: int, source: int, size: int, kind: Any, stream: Any = None) -> tuple[int]:
        ctypes.memmove(target, source, size)
        return (0,)

    def free(place: int) -> tuple[int]:
        return (0 if memory.pop(place, None) is not None else 1,)

    runtime = types.ModuleType("cuda.bindings.runtime")
    runtime.__dict__.update(
        cudaDeviceScheduleBlockingSync=4,
        cudaMemcpyKind=Copy,
        cudaSetDeviceFlags=lambda flags: (0,),
        cudaGetDeviceCount=lambda: (0, 1),
        cudaGetDeviceProperties=lambda device: (0, types.SimpleNamespace(name=b"Orin Nano\x00\x00")),
        cudaStreamCreate=lambda: (0, 7),
        cudaStreamSynchronize=lambda stream: (0,),
        cudaStreamDestroy=lambda stream: (0,),
        cudaMalloc=malloc,
        cudaFree=free,
        cudaMemcpy=copy,
        cudaMemcpyAsync=copy,
    )
    return runtime
