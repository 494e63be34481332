"""The eager backend's layouts, precisions and audit, its script for others, and what it does on a GPU (against a fake where none is)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import contracts, registry
from edgejoule.compile import cpu, torch_program
from edgejoule.compile.cuda import GpuRun
from edgejoule.compile.export import TorchExport
from edgejoule.compile.torch_audit import audit
from edgejoule.errors import BackendError
from edgejoule.seams import CompileContext
from tests.networks import in_folder, linear, live

SHAPE = (2, 3, 160, 160)
SMALL = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def conv_export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(live("test_efficientnet"), SHAPE, tmp_path_factory.mktemp("export"))


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """torch's switches are process-wide."""
    yield
    torch_program.set_products(False)


def images_of(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def compile_to(spelling: str, export: Any, shape: tuple[int, int, int, int], folder: Path) -> Any:
    registry.create("backend", spelling).compile(export, CompileContext(shape=shape, workdir=folder, calibration=lambda: None))
    return in_folder(folder)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------- layouts and precisions


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_channels_last_weights_compute_the_network(precision: str, conv_export: TorchExport, tmp_path: Path) -> None:
    import torch

    backend = registry.create("backend", f"eager(precision={precision!r}, layout='channels_last')")
    if backend.probe() is not None:
        pytest.skip(backend.probe())
    session = backend.load(compile_to(f"eager(precision={precision!r}, layout='channels_last')", conv_export, SHAPE, tmp_path), threads=1)
    images = images_of(SHAPE)
    with torch.no_grad():
        wanted = conv_export.module(torch.from_numpy(images)).numpy()
    error = np.linalg.norm(session.infer(images)["logits"] - wanted) / np.linalg.norm(wanted)
    assert error < (1e-4 if precision == "fp32" else 5e-2)
    weights = [w for w in session._module.state_dict().values() if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert session.info().precision == precision and session.info().inputs[0].dtype == "float32"
    assert all(p.is_contiguous() for p in conv_export.module.parameters())  # the shared network stays as it was


def test_tensors_cached_outside_the_buffers_are_cast_too(tmp_path: Path) -> None:
    """LeViT keeps its attention biases in a dict; float32 there would make the sum float32, and the program half bfloat16."""
    import torch

    class Caching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()
            self.held = {"cpu": torch.ones(5)}
            self.plain = torch.ones(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 8, 8) -> (B, 5)
            return (self.inner(x) + self.held["cpu"]) * self.plain

    module = Caching().eval()
    twin = torch_program.prepared(module, "fp16", "contiguous", SMALL)
    assert {twin.inner.held["cpu"].dtype, twin.inner.plain.dtype, twin.inner.inner[1].weight.dtype} == {torch.float16}
    assert module.held["cpu"].dtype == module.plain.dtype == torch.float32
    program = torch_program.program_of(TorchExport(module, SMALL, tmp_path), "fp16", "contiguous", SMALL)
    assert torch_program.precision_of(program, "cpu") == "fp16"
    kinds = {node.meta["val"].dtype for node in program.graph.nodes if str(node.target).startswith("aten.add")}
    assert kinds == {torch.float16}


def test_float32_products_on_a_gpu_are_told_by_torchs_switches(tmp_path: Path) -> None:
    import torch

    program = TorchExport(linear(), SMALL, tmp_path).program
    for tf32, word in ((True, "tf32"), (False, "fp32")):
        torch_program.set_products(tf32)
        assert torch_program.float32_products() == {"matmul": word, "conv": word}
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32  # torch raises where old and new differ
        assert torch_program.precision_of(program, "cuda") == word
    assert torch_program.precision_of(program, "cpu") == "fp32"


def test_products_are_set_for_a_while(tmp_path: Path) -> None:
    import torch

    torch_program.set_products(False)
    torch.backends.cudnn.allow_tf32 = True  # torch's own default: convolutions in TF32, matrix products not
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with torch_program.products_set(True):
        assert torch_program.float32_products() == {"matmul": "tf32", "conv": "tf32"}
    assert torch_program.float32_products() == {"matmul": "fp32", "conv": "tf32"} and torch.get_float32_matmul_precision() == "highest"


def test_float16_and_tf32_are_refused_where_they_would_be_emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    half, rounded = (registry.create("backend", f"eager(precision={word!r})") for word in ("fp16", "tf32"))
    assert "no float16 instructions" in half.probe() and "device='cuda'" in rounded.probe()
    (tmp_path / "cpuinfo").write_text("flags : fpu f16c avx512f\n")
    assert "no float16 instructions" in half.probe()
    for able in ("flags : fpu avx512_fp16", "Features : fp asimd asimdhp"):
        (tmp_path / "cpuinfo").write_text(able + "\n")
        assert half.probe() is None and cpu.has_fp16() is True
    with pytest.raises(BackendError, match="TF32 products"):
        rounded.load(in_folder(tmp_path), threads=1)


def test_an_old_gpu_has_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert registry.create("backend", "eager(precision='tf32', device='cuda')").probe().startswith("an old GPU has no TF32")
    assert registry.create("backend", "eager(precision='fp16', device='cuda')").probe() is None


# ---------------------------------------------------------------- audit


class Mixed:
    """Two linear layers, one of them in bfloat16 and used through a view, a product of activations and a convolution."""

    def __init__(self) -> None:
        import torch

        torch.manual_seed(0)
        self.first, self.kernel = torch.randn(8, 8), torch.randn(3, 3, 1, 1)
        self.second = torch.randn(8, 8).bfloat16()

    def __call__(self, x: Any) -> Any:  # (B, 3, 8, 8) -> (B, 3, 8, 8)
        import torch

        x = torch.conv2d(x, self.kernel)
        y = x @ self.first.t() if x.ndim == 2 else torch.nn.functional.linear(x, self.first)
        z = torch.nn.functional.linear(y.bfloat16(), self.second.reshape(64).reshape(8, 8))
        return torch.matmul(z.float(), y.reshape(y.shape).transpose(2, 3)).softmax(-1)


def test_the_audit_counts_products_with_weights_by_their_type() -> None:
    import torch

    found = audit(Mixed(), torch.randn(SMALL), "cpu")
    assert found.precisions == {"fp32": 2, "bf16": 1}  # the product of two activations is none of them
    assert found.delegated == found.nodes >= 7 and found.fallbacks == {}  # three products, the matmul, two casts, softmax


def test_the_audit_names_what_runs_elsewhere() -> None:
    import torch

    found = audit(Mixed(), torch.randn(SMALL), "cuda")  # asked for, and yet all of it runs on the processor
    assert found.delegated == 0 and sum(found.fallbacks.values()) == found.nodes and found.fallbacks["linear"] == 2


def test_the_audit_of_a_session(conv_export: TorchExport, tmp_path: Path) -> None:
    session = registry.create("backend", "eager").load(compile_to("eager", conv_export, SHAPE, tmp_path), threads=1)
    images = images_of(SHAPE)
    before = session.infer(images)["logits"]
    assert session.audit(images).precisions == {"fp32": 18}
    assert (session.infer(images)["logits"] == before).all()
    with pytest.raises(BackendError, match="device='cuda'"):
        _ = session.device_time_s


# ---------------------------------------------------------------- hand-over


@pytest.mark.parametrize("spelling", ["eager", "eager(layout='channels_last')"])
def test_its_file_runs_without_edgejoule(spelling: str, conv_export: TorchExport, tmp_path: Path) -> None:
    artifact = compile_to(spelling, conv_export, SHAPE, tmp_path)
    backend, images = registry.create("backend", spelling), images_of(SHAPE)
    told = backend.handover(artifact)
    assert told.install.startswith("pip install torch==") and len(told.python.splitlines()) <= 10
    logits = run_alone(told.python, tmp_path, images)
    wanted = backend.load(artifact, threads=1).infer(images)["logits"]
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()


def run_alone(script: str, folder: Path, images: Any) -> Any:
    """The logits of a hand-over's ``run``, in a process that never sees edgejoule."""
    np.save(folder / "images.npy", images)
    lines = [script, "import sys, numpy", 'numpy.save("logits.npy", run(numpy.load("images.npy")))', 'print("edgejoule" in sys.modules)']
    done = subprocess.run([sys.executable, "-I", "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "False", done.stderr
    return np.load(folder / "logits.npy")


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_script_for_a_gpu_sets_the_products(precision: str, tmp_path: Path) -> None:
    told = registry.create("backend", f"eager(device='cuda', precision={precision!r})").handover(in_folder(tmp_path)).python
    compile(told, "handover", "exec")
    assert (f"allow_tf32 = {precision == 'tf32'}") in told and 'move_to_device_pass(program, "cuda")' in told and ".cuda()" in told


# ---------------------------------------------------------------- on a GPU


class FakeGraph:
    """A CUDA graph as a processor can play it: replaying writes to the tensors that were there when it was captured."""

    made: list[FakeGraph]
    run: GpuRun
    fails = False

    def __init__(self) -> None:
        FakeGraph.made.append(self)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.run._logits.copy_(self.run._call(self.run._images))


class FakeEvent:
    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at: int | None = None

    def record(self) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        assert self.at == FakeEvent.clock, "the host waits for the last event"

    def elapsed_time(self, other: Any) -> float:
        if self.at is None:
            raise RuntimeError("the event was not recorded")
        return float(other.at - self.at)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda on the processor: enough of it for what GpuRun calls."""
    import torch

    FakeGraph.made, FakeGraph.fails = [], False
    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kind: empty(*shape, **kind))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kind: zeros(*shape, **kind))

    class Stream:
        def wait_stream(self, other: Any) -> None:
            assert isinstance(other, Stream)

    @contextlib.contextmanager
    def capturing(graph: FakeGraph) -> Iterator[None]:
        if FakeGraph.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    names = {"Stream": Stream, "current_stream": Stream, "Event": FakeEvent, "CUDAGraph": FakeGraph, "graph": capturing}
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def gpu_run(graphs: bool) -> tuple[GpuRun, Any]:
    module = linear()
    run = FakeGraph.run = GpuRun.__new__(GpuRun)
    GpuRun.__init__(run, module, SMALL, graphs)
    return run, module


@pytest.mark.parametrize("graphs", [True, False])
def test_an_inference_on_a_gpu_copies_runs_and_copies_back(graphs: bool, fake_gpu: None) -> None:
    import torch

    run, module = gpu_run(graphs)
    one, two = images_of(SMALL), -images_of(SMALL)
    first, second = run(one), run(two)
    with torch.inference_mode():
        for logits, images in ((first, one), (second, two)):
            assert np.allclose(logits, module(torch.from_numpy(images)).numpy(), atol=1e-6)
    assert run.device_time_s == 1e-3  # one tick of the fake clock, in milliseconds: from before the network to after it
    assert [graph.replays for graph in FakeGraph.made] == ([3] if graphs else [])  # once to try it, and twice


def test_the_time_of_no_inference_is_an_error(fake_gpu: None) -> None:
    run, _ = gpu_run(False)
    with pytest.raises(BackendError, match="call infer first"):
        _ = run.device_time_s


def test_what_cannot_be_captured_is_never_run_without_a_graph_in_silence(fake_gpu: None) -> None:
    FakeGraph.fails = True
    with pytest.raises(BackendError, match=r"cannot be captured in a CUDA graph \(operation not permitted.*graphs=False"):
        gpu_run(True)
    gpu_run(False)


def test_a_gpu_without_memory_says_so(fake_gpu: None) -> None:
    def full(images: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(BackendError, match=r"out of memory.*free some memory"):
        GpuRun(full, SMALL, True)


@pytest.mark.skipif(not has_cuda(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_the_contract_on_a_real_gpu(precision: str, layout: str, graphs: bool, conv_export: TorchExport, tmp_path: Path) -> None:
    spelling = f"eager(device='cuda', graphs={graphs}, layout={layout!r}, precision={precision!r})"
    contracts.check_backend(spelling, conv_export, SHAPE, images_of(SHAPE), tmp_path)
    (tmp_path / "again").mkdir()
    backend = registry.create("backend", spelling)
    if backend.probe() is None:
        session = backend.load(compile_to(spelling, conv_export, SHAPE, tmp_path / "again"), threads=1)
        session.infer(images_of(SHAPE))
        assert 0 < session.device_time_s < 1
        placed = session.audit(images_of(SHAPE))
        assert placed.fallbacks == {} and placed.precisions == {precision: 18}
