"""The torchscript backend, full and mobile-lite: what it computes, what it says of itself, and which files it refuses to run."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import contracts, manifest, registry
from edgejoule.compile import torchscript
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.records import Artifact
from edgejoule.seams import CompileContext
from tests.networks import in_folder, linear, live

SHAPE = (2, 3, 160, 160)
SMALL = (2, 3, 8, 8)
FULL, LITE, OPTIMIZED = "torchscript", "torchscript(lite=True)", "torchscript(optimize=True)"
SPELLINGS = (FULL, LITE, OPTIMIZED)
NETWORKS = ("test_vit", "test_efficientnet")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchExport]:
    return {name: TorchExport(live(name), SHAPE, tmp_path_factory.mktemp(name), name) for name in NETWORKS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """{spelling: the linear network's artifact}."""
    return {spelling: compile_to(spelling, linear(), SMALL, tmp_path_factory.mktemp("artifact")) for spelling in SPELLINGS}


def compile_to(spelling: str, network: Any, shape: tuple[int, int, int, int], folder: Path) -> Artifact:
    export = network if isinstance(network, TorchExport) else TorchExport(network, shape, folder)
    registry.create("backend", spelling).compile(export, CompileContext(shape=shape, workdir=folder, calibration=lambda: None))
    return listed(folder)


def listed(folder: Path) -> Artifact:
    """An artifact whose manifest lists what lies in the folder."""
    files = manifest.hash_files(folder, [path.name for path in sorted(folder.iterdir())])
    return dataclasses.replace(in_folder(folder), files=files)


def images_of(shape: tuple[int, int, int, int]) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_contract(spelling: str, exports: dict[str, TorchExport], tmp_path: Path) -> None:
    contracts.check_backend(spelling, exports["test_vit"], SHAPE, images_of(SHAPE), tmp_path)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fp32_is_the_network(spelling: str, network: str, exports: dict[str, TorchExport], tmp_path: Path) -> None:
    import torch

    session = registry.create("backend", spelling).load(compile_to(spelling, exports[network], SHAPE, tmp_path), threads=1)
    images = images_of(SHAPE)
    with torch.no_grad():
        wanted = exports[network].module(torch.from_numpy(images)).numpy()
    assert 0.1 < wanted.std() < 10
    for _ in range(3):  # profiled, compiled, and as it stays
        logits = session.infer(images)["logits"]
        assert logits.dtype == np.float32 and logits.shape == wanted.shape
        assert np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_info(spelling: str, compiled: dict[str, Artifact]) -> None:
    info = registry.create("backend", spelling).load(compiled[spelling], threads=1).info()
    assert info.threads == 1 and info.providers == ("cpu",) and info.precision == "fp32"
    assert info.runtime.startswith("torch 2") and info.runtime.endswith("lite") == (spelling == LITE)
    assert [(port.name, port.shape, port.dtype) for port in info.inputs] == [("images", SMALL, "float32")]
    assert [(port.name, port.shape, port.dtype) for port in info.outputs] == [("logits", (2, 5), "float32")]


def test_what_runs_is_what_was_asked_for(exports: dict[str, TorchExport], tmp_path: Path) -> None:
    """The full interpreter runs lite files too, and gives the same logits unoptimised: only the loaded module tells."""
    modules = {}
    for spelling in SPELLINGS:
        (tmp_path / spelling).mkdir()
        made = compile_to(spelling, exports["test_efficientnet"], SHAPE, tmp_path / spelling)
        modules[spelling] = registry.create("backend", spelling).load(made, threads=1)._module
    assert type(modules[LITE]).__name__ == "LiteScriptModule"
    assert [*modules[FULL].parameters()] == [] and "aten::batch_norm" not in str(modules[FULL].inlined_graph)  # frozen and folded
    assert "mkldnn_convolution" not in str(modules[FULL].graph)
    assert "mkldnn_convolution" in str(modules[OPTIMIZED].graph)


@pytest.mark.parametrize("lite", [False, True])
def test_precision_is_read_back(lite: bool, tmp_path: Path) -> None:
    import torch

    class Narrow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear().to(torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 8, 8) -> (B, 5)
            return self.inner(x.bfloat16()).float()

    class Handed:
        module = Narrow().eval()  # an export's own module would be cast to float32

    spelling = f"torchscript(lite={lite})"
    context = CompileContext(shape=SMALL, workdir=tmp_path, calibration=lambda: None)
    registry.create("backend", spelling).compile(Handed(), context)
    assert registry.create("backend", spelling).load(listed(tmp_path), threads=1).info().precision == "bf16+fp32"


def test_numbers_of_the_formula_are_no_weights(tmp_path: Path) -> None:
    """A trace holds the factor of ``x @ y * 0.25`` as a float64 tensor without dimensions; float32 it stays in torch."""
    import torch

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 8, 8) -> (B, 5)
            return self.inner(x) * 0.25

    assert registry.create("backend", FULL).load(compile_to(FULL, Scaled().eval(), SMALL, tmp_path), 1).info().precision == "fp32"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_infer(spelling: str, compiled: dict[str, Artifact]) -> None:
    session = registry.create("backend", spelling).load(compiled[spelling], threads=1)
    images = images_of(SMALL)
    first = session.infer(images)["logits"]
    kept = first.copy()
    session.infer(np.ascontiguousarray(images[::-1]))
    assert (first == kept).all()
    with pytest.raises(BackendError, match=r"expected float32 \(2, 3, 8, 8\)"):
        session.infer(images[:1])
    with pytest.raises(BackendError, match="images are float64"):
        session.infer(images.astype(np.float64))
    session.close()
    with pytest.raises(BackendError):
        session.infer(images)


@pytest.mark.parametrize("spelling", [FULL, LITE])
@pytest.mark.parametrize("damage", ["junk", "cut", "gone"])
@pytest.mark.parametrize("told", [False, True])
def test_damaged_files(spelling: str, damage: str, told: bool, compiled: dict[str, Artifact], tmp_path: Path) -> None:
    made = compiled[spelling]
    for file in Path(made.folder).iterdir():
        whole = file.read_bytes()
        if damage != "gone":
            (tmp_path / file.name).write_bytes(b"no model" * 99 if damage == "junk" else whole[: len(whole) // 2])
    broken = listed(tmp_path) if told else dataclasses.replace(made, folder=str(tmp_path))
    with pytest.raises(ArtifactError, match="compile again"):
        registry.create("backend", spelling).load(broken, threads=1)


@pytest.mark.parametrize("spelling", [FULL, LITE])
def test_code_that_the_manifest_does_not_know_is_not_run(
    spelling: str, compiled: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole, runnable file: another network's, or one that no manifest lists."""
    ran: list[Path] = []
    monkeypatch.setattr(torchscript, "_load", lambda path, lite: ran.append(path))
    other = compile_to(spelling, linear(classes=7), SMALL, tmp_path)
    for files in (compiled[spelling].files, ()):
        with pytest.raises(ArtifactError, match="is not the file in its manifest"):
            registry.create("backend", spelling).load(dataclasses.replace(other, files=files), threads=1)
    assert ran == []


@pytest.mark.parametrize("lite", [False, True])
def test_a_file_of_others_is_not_believed(lite: bool, tmp_path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = torch.jit.freeze(torch.jit.trace(linear(), torch.zeros(SMALL)))
        if lite:
            foreign._save_for_lite_interpreter(str(tmp_path / "model.ptl"))
        else:
            foreign.save(str(tmp_path / "model.pt"))
    with pytest.raises(ArtifactError, match="edgejoule did not write it"):
        registry.create("backend", f"torchscript(lite={lite})").load(listed(tmp_path), threads=1)


def branching(threshold: float) -> Any:
    import torch

    class Branching(torch.nn.Module):
        """Doubles bright images, halves the others: a trace keeps one of both."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 8, 8) -> (B, 5)
            return self.inner(x * 2 if x.mean() > threshold else x / 2)

    return Branching().eval()


@pytest.mark.parametrize("threshold", [-0.5, 0.5])
def test_a_trace_that_fixes_values_is_refused(threshold: float, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="depends on the values of tensors"):
        compile_to(FULL, branching(threshold), SMALL, tmp_path)
    assert not any(tmp_path.iterdir())
    compile_to(FULL, branching(-100.0), SMALL, tmp_path)  # never taken: the trace is the network


def test_a_network_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    import torch

    class Logarithm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 8, 8) -> (B, 3)
            return (x.mean((2, 3)) + 0.5).log()

    with pytest.raises(BackendError, match="nan"):
        compile_to(FULL, Logarithm().eval(), SMALL, tmp_path)


def test_what_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    import torch

    class Listing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.flatten(1) if not torch.jit.is_tracing() else object()

    with pytest.raises(BackendError, match=r"torch\.jit\.trace refuses the network"):
        compile_to(FULL, Listing().eval(), SMALL, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # an OSError of its own, which the caller knows how to tell
        context = CompileContext(shape=SMALL, workdir=tmp_path / "gone", calibration=lambda: None)
        registry.create("backend", FULL).compile(TorchExport(linear(), SMALL, tmp_path), context)


def test_deprecations_stay_quiet(exports: dict[str, TorchExport], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spelling in SPELLINGS:
            (tmp_path / spelling).mkdir()
            made = compile_to(spelling, linear(), SMALL, tmp_path / spelling)
            registry.create("backend", spelling).load(made, threads=1).infer(images_of(SMALL))


def test_a_board_needs_torch_and_nothing_else(compiled: dict[str, Artifact], tmp_path: Path) -> None:
    folder = tmp_path / "board"
    shutil.copytree(compiled[LITE].folder, folder)
    script = (
        "import sys, numpy; from tests.test_backend_torchscript import listed; from pathlib import Path; from edgejoule import registry\n"
        "before = set(sys.modules)\n"
        f"session = registry.create('backend', {LITE!r}).load(listed(Path(sys.argv[1])), threads=1)\n"
        f"session.infer(numpy.zeros({SMALL}, 'float32'))\n"
        "print('torch' in before, sorted({'torch', 'torchvision', 'timm', 'onnx', 'scipy', 'sqlalchemy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False ['torch']"
    assert "eprecat" not in done.stderr


def test_a_torch_without_the_lite_interpreter(monkeypatch: pytest.MonkeyPatch, compiled: dict[str, Artifact], tmp_path: Path) -> None:
    import torch

    assert registry.create("backend", LITE).probe() is None
    for kind in torch.jit.RecursiveScriptModule.__mro__:
        if torchscript.LITE_SAVER in vars(kind):
            monkeypatch.delattr(kind, torchscript.LITE_SAVER)
    assert "no mobile-lite files any more" in registry.create("backend", LITE).probe()
    assert registry.create("backend", FULL).probe() is None
    with pytest.raises(BackendError, match="no mobile-lite files any more"):
        compile_to(LITE, linear(), SMALL, tmp_path)
    with pytest.raises(BackendError, match="no mobile-lite files any more"):
        registry.create("backend", LITE).load(compiled[LITE], threads=1)


@pytest.mark.parametrize("options", ['precision="bf16"', 'device="cuda"', "lite=True, optimize=True"])
def test_options_that_it_does_not_take(options: str) -> None:
    with pytest.raises(SpecError):
        registry.create("backend", f"torchscript({options})")


def test_streams(compiled: dict[str, Artifact]) -> None:
    with pytest.raises(BackendError, match="runs one stream"):
        registry.create("backend", FULL).load(compiled[FULL], threads=1, streams=2)
