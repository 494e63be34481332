"""Every backend computes what the network computes, says what it really runs, and refuses what is damaged or does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile.cpu import has_bf16, sums_exactly
from edgejoule.compile.eager import Eager
from edgejoule.compile.export import TorchExport
from edgejoule.compile.onnxruntime import OnnxRuntime
from edgejoule.compile.reasons import LONGEST, reason
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.seams import CompileContext
from tests.networks import in_folder, live

BATCH = 2
SHAPE = (BATCH, 3, 160, 160)
FP32 = ("eager", "onnxruntime", "openvino")
BF16 = ('eager(precision="bf16")', 'openvino(precision="bf16")')
NETWORKS = ("test_vit", "test_efficientnet")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchExport]:
    return {name: TorchExport(live(name), SHAPE, tmp_path_factory.mktemp(name), name) for name in NETWORKS}


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def compiled(exports: dict[str, TorchExport], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(spelling, network) -> the folder of the compiled file, made once."""
    made: dict[tuple[str, str], Path] = {}

    def folder_of(spelling: str, network: str = "test_vit") -> Path:
        if (spelling, network) not in made:
            folder = tmp_path_factory.mktemp("artifact")
            context = CompileContext(shape=SHAPE, workdir=folder, calibration=lambda: None)
            path = registry.create("backend", spelling).compile(exports[network], context)
            assert path.parent == folder
            made[spelling, network] = folder
        return made[spelling, network]

    return folder_of


def reference(export: TorchExport, images: Any) -> Any:
    import torch

    with torch.no_grad():
        return export.module(torch.from_numpy(images)).numpy()


def relative(logits: Any, wanted: Any) -> float:
    return float((np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spelling", FP32)
def test_fp32_is_the_network(spelling: str, network: str, exports: Any, compiled: Any, images: Any) -> None:
    session = registry.create("backend", spelling).load(in_folder(compiled(spelling, network)), threads=1)
    wanted = reference(exports[network], images)
    assert 0.1 < wanted.std() < 10
    logits = session.infer(images)["logits"]
    assert logits.dtype == np.float32 and logits.shape == (BATCH, 1000)
    assert relative(logits, wanted) < 1e-4  # bfloat16 under the name of float32 is 50 times this
    assert session.info().precision == "fp32"
    session.close()


@pytest.mark.parametrize("spelling", BF16)
def test_bf16_is_bf16_and_says_so(spelling: str, exports: Any, compiled: Any, images: Any) -> None:
    backend = registry.create("backend", spelling)
    if (missing := backend.probe()) is not None:
        pytest.skip(missing)
    session = backend.load(in_folder(compiled(spelling)), threads=1)
    assert 1e-4 < relative(session.infer(images)["logits"], reference(exports["test_vit"], images)) < 5e-2
    assert session.info().precision == "bf16"


@pytest.mark.parametrize("spelling", FP32)
def test_info_is_complete(spelling: str, compiled: Any) -> None:
    info = registry.create("backend", spelling).load(in_folder(compiled(spelling)), threads=1).info()
    assert info.threads == 1 and info.providers and info.runtime.startswith(("torch 2", "onnxruntime 1", "openvino 20"))
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in info.inputs] == [("images", SHAPE, "float32")]
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in info.outputs] == [("logits", (BATCH, 1000), "float32")]


@pytest.mark.parametrize("spelling", FP32)
def test_the_result_is_not_overwritten_by_the_next(spelling: str, compiled: Any, images: Any) -> None:
    session = registry.create("backend", spelling).load(in_folder(compiled(spelling)), threads=1)
    first = session.infer(images)["logits"]
    kept = first.copy()
    session.infer(np.ascontiguousarray(images[::-1]))
    assert (first == kept).all()


@pytest.mark.parametrize("spelling", FP32)
def test_images_that_do_not_fit(spelling: str, compiled: Any, images: Any) -> None:
    session = registry.create("backend", spelling).load(in_folder(compiled(spelling)), threads=1)
    with pytest.raises(BackendError, match=r"expected float32 \(2, 3, 160, 160\)"):
        session.infer(images[:1])
    with pytest.raises(BackendError, match="images are float64"):
        session.infer(images.astype(np.float64))


@pytest.mark.parametrize("spelling", FP32)
@pytest.mark.parametrize("damage", ["junk", "cut", "gone"])
def test_damaged_files(spelling: str, damage: str, compiled: Any, tmp_path: Path) -> None:
    for file in compiled(spelling).iterdir():
        whole = file.read_bytes()
        if damage != "gone":
            (tmp_path / file.name).write_bytes(b"no model" * 99 if damage == "junk" else whole[: len(whole) // 2])
    with pytest.raises(ArtifactError):
        registry.create("backend", spelling).load(in_folder(tmp_path), threads=1)


@pytest.mark.parametrize("spelling", ["onnxruntime", "openvino"])
def test_loading_imports_no_torch(spelling: str, compiled: Any) -> None:
    script = (
        "import sys, numpy; from tests.networks import in_folder; from edgejoule import registry; from pathlib import Path\n"
        f"session = registry.create('backend', {spelling!r}).load(in_folder(Path(sys.argv[1])), threads=1)\n"
        f"session.infer(numpy.zeros({SHAPE}, 'float32'))\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'onnx', 'scipy', 'sqlalchemy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(compiled(spelling))], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_onnxruntime_never_falls_back(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.create("backend", 'onnxruntime(device="cuda")')
    if backend.probe() is None:
        pytest.skip("this machine has onnxruntime's CUDA provider")
    assert "onnxruntime-gpu" in backend.probe()
    monkeypatch.setattr(OnnxRuntime, "probe", lambda self: None)
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        backend.load(in_folder(compiled("onnxruntime")), threads=1)


def test_eager_never_falls_back(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    backend = registry.create("backend", 'eager(device="cuda")')
    if backend.probe() is None:
        pytest.skip("this machine has a CUDA GPU")
    assert "sees no CUDA GPU" in backend.probe()
    monkeypatch.setattr(Eager, "probe", lambda self: None)
    with pytest.raises(BackendError, match=r"cannot put .* on cuda"):
        backend.load(in_folder(compiled("eager")), threads=1)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert registry.create("backend", 'eager(device="cuda", precision="bf16")').probe().startswith("an old GPU has no bfloat16")
    assert backend.probe() is None


def test_an_onnx_file_of_others_is_not_believed(exports: Any, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(exports["test_vit"].onnx.read_bytes())
    with pytest.raises(ArtifactError, match="does not say what its weights are"):
        registry.create("backend", "onnxruntime").load(in_folder(tmp_path), threads=1)


def test_bf16_without_instructions_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("edgejoule.compile.cpu.CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n")
    assert "no bfloat16" in registry.create("backend", 'eager(precision="bf16")').probe()
    assert registry.create("backend", "eager").probe() is None


@pytest.mark.parametrize(
    ("text", "able"),
    [
        ("flags : fpu avx512_bf16 sse", True),
        ("flags : fpu avx512f", False),
        ("Features : fp asimd bf16", True),
        ("Features : fp asimd", False),
        ("model name : bf16", None),
    ],
)
def test_flags(text: str, able: bool | None, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
    assert has_bf16(tmp_path / "cpuinfo") is able
    assert has_bf16(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("text", "exactly"),
    [("flags : sse2 avx_vnni", True), ("flags : sse2 avx2 avx512f", False), ("Features : asimd asimddp", None), ("model name : x", None)],
)
def test_who_sums_8_bit_products_without_saturating(text: str, exactly: bool | None, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"{text}\n")
    assert sums_exactly(tmp_path / "cpuinfo") is exactly


@pytest.mark.parametrize(
    "spelling", ['onnxruntime(precision="bf16")', 'eager(precision="int8")', 'openvino(device="CPU")', "openvino(streams=0)"]
)
def test_options_that_no_backend_takes(spelling: str) -> None:
    with pytest.raises(SpecError):
        registry.create("backend", spelling)


def test_streams() -> None:
    for spelling in ("eager",):
        with pytest.raises(BackendError, match="runs one stream"):
            registry.create("backend", spelling).load(in_folder(Path("nowhere")), threads=1, streams=2)


def test_a_reason_is_one_line_of_the_first_cause() -> None:
    outer = RuntimeError("long story\nof many lines")
    outer.__cause__ = ValueError("\x1b[96mException from src/a.cpp:1:\n\nonly 4-D tensors are supported.\nmore")
    assert reason(outer) == "only 4-D tensors are supported"
    assert reason(ValueError("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load failed")) == "Load failed"
    assert reason(MemoryError()) == "MemoryError"
    assert len(reason(ValueError("x" * 999))) == LONGEST
