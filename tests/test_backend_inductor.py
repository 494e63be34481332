"""The inductor backend: packages and programs compiled at load; what they compute and call, and which files and machines are refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import contracts, manifest, registry
from edgejoule.compile import aoti, aoti_source, cpu
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.records import Artifact
from edgejoule.seams import CompileContext
from tests.networks import in_folder, linear, live
from tests.test_backend_eager import run_alone

SHAPE = (2, 3, 160, 160)
SMALL = (2, 3, 8, 8)
PACKAGE, NOW = "inductor", "inductor(package=False)"
BF16 = "inductor(layout='channels_last', precision='bf16')"
INT8 = "inductor(precision='int8')"
missing = registry.create("backend", PACKAGE).probe()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(live("test_vit"), SHAPE, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The linear network's package."""
    return compile_to(PACKAGE, TorchExport(linear(), SMALL, tmp_path_factory.mktemp("export")), SMALL, tmp_path_factory.mktemp("artifact"))


def compile_to(spelling: str, export: Any, shape: tuple[int, int, int, int], folder: Path, notes: dict[str, str] | None = None) -> Artifact:
    images = np.random.default_rng(2).normal(size=(3, *shape[1:])).astype(np.float32)
    noted: dict[str, str] = {} if notes is None else notes
    context = CompileContext(shape=shape, workdir=folder, calibration=lambda: images, note=noted.__setitem__)
    registry.create("backend", spelling).compile(export, context)
    return listed(folder)


def listed(folder: Path) -> Artifact:
    files = manifest.hash_files(folder, [path.name for path in sorted(folder.iterdir())])
    return dataclasses.replace(in_folder(folder), files=files)


def sources_of(artifact: Artifact) -> str:
    with zipfile.ZipFile(Path(artifact.folder) / "model.pt2") as archive:
        return "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))


def images_of(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def error_of(session: Any, export: TorchExport, images: Any) -> float:
    import torch

    with torch.no_grad():
        wanted = export.module(torch.from_numpy(images)).numpy()
    return float(np.linalg.norm(session.infer(images)["logits"] - wanted) / np.linalg.norm(wanted))


# ---------------------------------------------------------------- what is compiled


def test_a_package_is_the_network_and_leaves_nothing_beside_it(vit: TorchExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "artifact"
    scratch.mkdir()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before, weights = dict(os.environ), [p.clone() for p in vit.module.parameters()]
    artifact = compile_to(PACKAGE, vit, SHAPE, folder)
    assert not list(scratch.iterdir()) and [file.name for file in artifact.files] == ["model.pt2"] and dict(os.environ) == before
    assert all((p == w).all() for p, w in zip(vit.module.parameters(), weights, strict=True))
    session = registry.create("backend", PACKAGE).load(artifact, threads=1)
    images = images_of(SHAPE)
    assert error_of(session, vit, images) < 1e-4
    first = session.infer(images)["logits"]
    kept = first.copy()
    session.infer(-images)
    assert (first == kept).all()
    info, placed = session.info(), session.audit(images)
    assert info.precision == "fp32" and info.threads == 1 and info.runtime.endswith("aotinductor")
    assert [(port.name, port.shape, port.dtype) for port in (*info.inputs, *info.outputs)] == [
        ("images", SHAPE, "float32"),
        ("logits", (2, 1000), "float32"),
    ]
    # torch would write the number of threads of the process that compiles into the code
    assert "#pragma omp parallel" in (sources := sources_of(artifact)) and "num_threads(" not in re.sub(r"omp_get_\w+", "", sources)
    assert placed.precisions == {"fp32": 26} and placed.delegated == placed.nodes > 26 and placed.fallbacks == {}
    assert np.abs(run_alone(registry.create("backend", PACKAGE).handover(artifact).python, folder, images) - kept).max() < 1e-3
    session.close()
    with pytest.raises(BackendError):
        session.infer(images)


def test_the_threads_are_those_that_were_asked_for(small: Artifact) -> None:
    backend = registry.create("backend", PACKAGE)
    assert [backend.load(small, threads=n).info().threads for n in (2, 1)] == [2, 1]


def test_bf16_in_channels_last(tmp_path: Path) -> None:
    backend = registry.create("backend", BF16)
    if backend.probe() is not None:
        pytest.skip(backend.probe())
    export = TorchExport(live("test_efficientnet"), SHAPE, tmp_path / "export")
    (tmp_path / "work").mkdir()
    session = backend.load(compile_to(BF16, export, SHAPE, tmp_path / "work"), threads=1)
    assert 1e-4 < error_of(session, export, images_of(SHAPE)) < 5e-2
    assert session.info().precision == "bf16" and session.audit(images_of(SHAPE)).precisions == {"bf16": 18}


@needs_torchao
def test_int8_quantises_all_products_with_weights_and_nothing_else(vit: TorchExport, tmp_path: Path) -> None:
    notes: dict[str, str] = {}
    session = registry.create("backend", INT8).load(compile_to(INT8, vit, SHAPE, tmp_path, notes), threads=1)
    assert 1e-3 < error_of(session, vit, images_of(SHAPE)) < 0.1
    assert session.info().precision == "int8" and session.audit(images_of(SHAPE)).precisions == {"int8": 26}
    assert "2 images" in notes["int8"] and notes["held-out search"] == "graphs run: 1, on 1 images"


def test_a_program_compiled_at_load(tmp_path: Path) -> None:
    export = TorchExport(linear(), SMALL, tmp_path / "export")
    (tmp_path / "work").mkdir()
    contracts.check_backend(NOW, export, SMALL, images_of(SMALL), tmp_path / "work")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("damage", ["junk", "cut", "gone"])
@pytest.mark.parametrize("told", [False, True])
def test_damaged_files(damage: str, told: bool, small: Artifact, tmp_path: Path) -> None:
    whole = (Path(small.folder) / "model.pt2").read_bytes()
    if damage != "gone":
        (tmp_path / "model.pt2").write_bytes(b"no model" * 99 if damage == "junk" else whole[: len(whole) // 2])
    broken = listed(tmp_path) if told else dataclasses.replace(small, folder=str(tmp_path))
    with pytest.raises(ArtifactError, match="compile again"):
        registry.create("backend", PACKAGE).load(broken, threads=1)


def test_code_that_the_manifest_does_not_know_is_not_run(small: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Path] = []
    monkeypatch.setattr(aoti, "load_package", ran.append)
    other = dataclasses.replace(small.files[0], sha256="0" * 64)
    for files in ((other,), ()):
        with pytest.raises(ArtifactError, match="is not the file in its manifest"):
            registry.create("backend", PACKAGE).load(dataclasses.replace(small, files=files), threads=1)
    assert ran == []


def test_a_processor_without_the_instructions_is_told_so(small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.create("backend", PACKAGE)
    used = aoti_source.metadata(Path(small.folder) / "model.pt2")[aoti_source.FACTS]["instructions"]
    if not used:
        pytest.skip("this system does not name its processor's instructions")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags : fpu {' '.join(used[1:])}\n")
    with pytest.raises(ArtifactError, match=rf"instructions that this processor lacks \({used[0]}\): compile on this machine"):
        backend.load(small, threads=1)
    (tmp_path / "cpuinfo").write_text(f"flags : more {' '.join(used)}\n")
    backend.load(small, threads=1)


def test_another_machine_is_refused(small: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv128")
    with pytest.raises(ArtifactError, match="and this is riscv128"):
        aoti.check_machine(Path(small.folder) / "model.pt2")


def test_another_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    path = packed(tmp_path, metadata={"AOTI_DEVICE_KEY": "cuda", "AOTI_COMPUTE_CAPABILITY": "90"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(ArtifactError, match="compute capability 90, and this GPU has 86"):
        aoti.check_machine(path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert aoti.check_machine(path)["images"] == [1]


def test_a_package_of_others_is_not_believed(small: Artifact, tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(small.folder) / "model.pt2") as old, zipfile.ZipFile(tmp_path / "model.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, "{}" if name.endswith("_metadata.json") else old.read(name))
    with pytest.raises(ArtifactError, match="edgejoule did not write it"):
        registry.create("backend", PACKAGE).load(listed(tmp_path), threads=1)


def test_images_that_do_not_fit_and_streams(small: Artifact) -> None:
    backend = registry.create("backend", PACKAGE)
    session = backend.load(small, threads=1)
    with pytest.raises(BackendError, match=r"expected float32 \(2, 3, 8, 8\)"):
        session.infer(images_of(SMALL)[:1])
    with pytest.raises(BackendError, match="images are float64"):
        session.infer(images_of(SMALL).astype(np.float64))
    with pytest.raises(BackendError, match="device='cuda'"):
        _ = session.device_time_s
    with pytest.raises(BackendError, match="runs one stream"):
        backend.load(small, threads=1, streams=2)


@pytest.mark.parametrize("options", ["precision='int8', device='cuda'", "precision='int8', package=False", "max_autotune=True"])
def test_options_that_do_not_go_together(options: str) -> None:
    with pytest.raises(SpecError):
        registry.create("backend", f"inductor({options})")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TF32" in registry.create("backend", "inductor(precision='tf32')").probe()
    if registry.create("backend", "eager(device='cuda')").probe() is not None:
        assert "sees no CUDA GPU" in registry.create("backend", "inductor(device='cuda')").probe()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torchao", "triton") else find(name))
    assert "pip install 'torchao==0.18.*'" in registry.create("backend", INT8).probe()
    assert "triton" in str(aoti.lacking_to_compile("fp16", "cuda", True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not there" in registry.create("backend", PACKAGE).probe()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "is for x86, this is aarch64" in registry.create("backend", INT8).probe()


def test_a_package_runs_where_no_compiler_is(small: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert registry.create("backend", PACKAGE).load(small, threads=1).infer(images_of(SMALL))["logits"].shape == (2, 5)


def test_the_toolchain_names_compiler_and_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = registry.create("backend", PACKAGE)
    here = backend.toolchain()
    assert here["torch"] and here["c++"] and set(here) >= {"instructions"}
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : avx2\nFeatures : asimd\n")
    assert backend.toolchain()["instructions"] != here["instructions"]
    assert "c++" not in registry.create("backend", NOW).toolchain()


# ---------------------------------------------------------------- the source of a package

SOURCE = """
    constants_info_[0].name = "w_half";
    constants_info_[0].dtype = cached_torch_dtype_float16;
    constants_info_[0].shape = {8, 8};
    constants_info_[1].name = "bias";
    constants_info_[1].dtype = static_cast<int32_t>(cached_torch_dtype_float32);
    constants_info_[1].shape = {8};
    constants_info_[2].name = "w_full";
    constants_info_[2].dtype = static_cast<int32_t>(cached_torch_dtype_float32);
    constants_info_[2].shape = {8, 8};
static inline void call_triton_poi_fused_gelu_0(
    call_triton_poi_fused_gelu_0(buf0, 8L, stream, kernels, this->device_idx_);
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(buf1, bias, buf0, wrap_with_raii_handle_if_needed(w_half), 1L, 1L));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(buf2, buf1, w_full));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_bmm_out(buf3, buf1, buf2));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_convolution(buf3, w_full, &bias, 0));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_topk(buf3, 1));
    aoti_torch_proxy_executor_call_function(proxy_executor, 0, 0, nullptr, 2, tensors);
    aoti_torch_empty_strided(2, sizes, strides, 1, 1, 0, &handle);
"""


def packed(folder: Path, source: str = SOURCE, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "model.pt2"
    facts = json.dumps({"images": [1], "logits": [1], "instructions": []})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/a.wrapper.cpp", source)
        archive.writestr("m/a.wrapper_metadata.json", json.dumps({aoti_source.FACTS: facts, **(metadata or {})}))
    return path


def test_calls_are_read_from_the_source(tmp_path: Path) -> None:
    path = packed(tmp_path)
    found = aoti_source.placement(path, "cuda", {"matmul": "fp32", "conv": "tf32"})
    assert (found.nodes, found.delegated, found.fallbacks) == (7, 6, {"topk": 1})
    assert found.precisions == {"fp16": 1, "fp32": 1, "tf32": 1}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/other.txt", "")
    with pytest.raises(ArtifactError, match="does not hold the source"):
        aoti_source.placement(path, "cuda", {})


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.skipif(not has_cuda(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_the_contract_on_a_real_gpu(precision: str, package: bool, vit: TorchExport, tmp_path: Path) -> None:
    contracts.check_backend(f"inductor(device='cuda', package={package}, precision={precision!r})", vit, SHAPE, images_of(SHAPE), tmp_path)
