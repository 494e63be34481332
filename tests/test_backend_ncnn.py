"""ncnn: the rewriting to four dimensions is exact; what ncnn lacks is named; what it runs is what it says."""

from __future__ import annotations

import itertools
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import environments, registry, zoo
from edgejoule.compile import ncnn as leaf
from edgejoule.compile import ncnn_net
from edgejoule.compile.export import TorchExport, export_program
from edgejoule.compile.rank4 import MOST, rank4, swaps
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.seams import CompileContext
from tests.networks import in_folder

SHAPE = (2, 3, 32, 32)
HERE = environments.python_of("ncnn") == sys.executable
ROOT = Path(__file__).parents[1]
needs_ncnn = pytest.mark.skipif(not HERE, reason=environments.missing("ncnn") or "runs in the Python of the environment ncnn")
REWRITTEN = {
    "vit_digits": 32,
    "edgevit_digits": 32,
    "levit_digits": 32,
    "tiny_vit_digits": 32,
    "mobilevit_xxs": 64,
    "test_vit": 160,
    "efficientvit_b0": 64,
}


def network(name: str) -> Any:
    return zoo.build(zoo.identify(zoo.spec_of_timm(name), weights="random"))


def relative(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


def ranks(graph_module: Any, images: Any) -> int:
    """The most dimensions of any tensor that the graph makes."""
    import torch

    class Watch(torch.fx.Interpreter):
        most = 0

        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            found = result if isinstance(result, (tuple, list)) else [result]
            Watch.most = max(Watch.most, *(one.ndim for one in found if isinstance(one, torch.Tensor)), 0)
            return result

    with torch.no_grad():
        Watch(graph_module).run(images)
    return Watch.most


def check_rewriting(module: Any, shape: tuple[int, int, int, int], bound: float = 0.0) -> Any:
    """The rewritten graph, after finding it within ``bound`` of the module and of four dimensions at most."""
    import torch

    torch.manual_seed(1)
    images = torch.randn(shape, dtype=torch.float64)  # rounding would hide small mistakes
    module = module.eval().double()
    with torch.no_grad():
        module.train().eval()(images)  # LeViT caches its attention biases
    rewritten = rank4(export_program(module, shape, "the network", torch.float64))
    with torch.no_grad():
        wanted = module(images)
        assert float(wanted.std()) > 1e-2
        assert relative(rewritten(images), wanted) <= bound
    assert ranks(rewritten, images) <= MOST
    return rewritten


# ---------------------------------------------------------------- the rewriting


@pytest.mark.parametrize(("name", "size"), REWRITTEN.items())
def test_the_rewritten_network_is_the_network(name: str, size: int) -> None:
    check_rewriting(network(name), (1, 3, size, size), 1e-12)


def test_windows_and_shifts_are_rewritten() -> None:
    import timm

    options = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 7}
    swin = timm.create_model("swin_tiny_patch4_window7_224", **options).eval()
    check_rewriting(swin, (1, 3, 64, 64), 1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 4, 3, 2, 5), (2, 3, 2, 3, 2, 3)])
def test_swaps_make_every_permutation(shape: tuple[int, ...]) -> None:
    flat = np.arange(math.prod(shape))
    for order in itertools.permutations(range(len(shape))):
        moved = flat
        for view in swaps(shape, order):
            moved = moved.reshape(view).transpose(0, 2, 1, 3).ravel()
        assert (moved == flat.reshape(shape).transpose(order).ravel()).all(), order


def test_heads_cost_one_permutation() -> None:
    assert len(swaps((1, 197, 3, 6, 64), (2, 0, 3, 1, 4))) == 1  # (B, N, 3, H, D) -> (3, B, H, N, D)
    assert len(swaps((1, 8, 7, 8, 7, 96), (0, 1, 3, 2, 4, 5))) == 1  # windows


def of(function: Callable[[Any], Any]) -> Any:
    """A module of (1, 6, 5, 8) -> (1, n)."""
    import torch

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x).flatten(1) * 2.0

    return Module()


def five(x: Any) -> Any:
    return x.view(1, 2, 3, 5, 2, 4)


PIECES: dict[str, Callable[[Any], Any]] = {
    "every second": lambda x: x[:, ::2, :, ::2],
    "every third from the second of an odd length": lambda x: x[:, :, 1::3],
    "the last alone": lambda x: x[:, :, 4::7],
    "from the end": lambda x: five(x)[..., -3:-1],
    "unbind": lambda x: five(x).permute(4, 0, 2, 1, 3, 5).unbind(0)[1],
    "select behind others": lambda x: five(x).select(2, -1),
    "chunk": lambda x: five(x).chunk(2, dim=-1)[1],
    "split of unlike sizes": lambda x: five(x).split([1, 2], dim=2)[1],
    "add with broadcasting": lambda x: five(x).transpose(1, 2).contiguous() + x[:, :3, 0, 0].view(1, 3, 1, 1, 1, 1),
    "by element": lambda x: five(x).permute(0, 2, 4, 1, 3, 5).sigmoid() * 0.5,
}


@pytest.mark.parametrize("what", PIECES)
def test_pieces_are_exact(what: str) -> None:
    check_rewriting(of(PIECES[what]), (1, 6, 5, 8))


@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, True), (True, False)])
def test_a_batch_norm_behind_a_linear_layer_goes_into_it(bias: bool, affine: bool) -> None:
    import torch

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(8, 12, bias=bias), torch.nn.BatchNorm1d(12, affine=affine)
            torch.nn.init.normal_(self.norm.running_mean)
            torch.nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
            if affine:
                torch.nn.init.normal_(self.norm.weight)
                torch.nn.init.normal_(self.norm.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.linear(x.flatten(1, 2))
            return self.norm(tokens.flatten(0, 1)).reshape_as(tokens).mean(1)

    torch.manual_seed(0)
    rewritten = check_rewriting(Normed(), (1, 6, 5, 8), 1e-12)
    assert not any("batch_norm" in str(node.target) for node in rewritten.graph.nodes if node.op == "call_function")


def test_what_has_four_dimensions_stays_as_it_is() -> None:
    program = export_program(network("test_efficientnet"), (1, 3, 160, 160), "the network")

    def called(graph: Any) -> list[str]:
        return [str(node.target) for node in graph.nodes if node.op == "call_function" and "dropout" not in str(node.target)]

    assert called(rank4(program).graph) == called(program.module(check_guards=False).graph)


# ---------------------------------------------------------------- what needs no ncnn


def test_an_absent_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if HERE:
        pytest.skip("this Python has ncnn")
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    assert "edgejoule doctor --install ncnn" in registry.create("backend", "ncnn").probe()
    with pytest.raises(BackendError, match="doctor --install ncnn"):
        registry.create("backend", "ncnn").compile(None, CompileContext(SHAPE, tmp_path, lambda: None))
    with pytest.raises(BackendError, match="edgejoule doctor --install ncnn"):  # an artifact of an environment that is gone
        leaf._import_ncnn()


def test_half_precision_is_refused_where_ncnn_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "multiplies in float32 on x86_64" in registry.create("backend", 'ncnn(precision="fp16")').probe()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "multiplies" not in (registry.create("backend", 'ncnn(precision="fp16")').probe() or "")


def test_streams_are_refused() -> None:
    with pytest.raises(BackendError, match="one process a stream"):
        registry.create("backend", "ncnn").load(in_folder(Path("nowhere")), threads=1, streams=2)


@pytest.mark.parametrize("error", [0.5, float("inf"), float("nan")])
def test_another_result_than_the_networks_is_refused(error: float) -> None:
    with pytest.raises(BackendError, match="something else than the network"):
        leaf._check({"error": error}, 1e-3)


def test_layers_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.param"
    path.write_text("7767517\n3 3\nInput in0 0 1 in0\nGemm g 1 1 in0 1 2=0 5=1 7=16\nMatMul m 2 1 1 in0 out0 0=1\n")
    found = ncnn_net.read_layers(path)
    assert [(layer.kind, layer.bottoms, layer.tops) for layer in found[1:]] == [
        ("Gemm", ("in0",), ("1",)),
        ("MatMul", ("1", "in0"), ("out0",)),
    ]
    assert [layer.has_weights for layer in found] == [False, True, False]
    path.write_text("not a model")
    with pytest.raises(ArtifactError, match="7767517"):
        ncnn_net.read_layers(path)


# ---------------------------------------------------------------- with ncnn


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """precision -> (the network, the folder of its artifact), made once."""
    done: dict[str, tuple[Any, Path]] = {}

    def of_precision(precision: str) -> tuple[Any, Path]:
        if precision not in done:
            export = TorchExport(network("vit_digits"), SHAPE, tmp_path_factory.mktemp("export"))
            folder = tmp_path_factory.mktemp("artifact")
            context = CompileContext(SHAPE, folder, lambda: None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(platform, "machine", lambda: "aarch64")  # which fp16 is made for; the file is the same
                entry = registry.create("backend", f"ncnn(precision={precision!r})").compile(export, context)
            assert entry.parent == folder and {path.name for path in folder.iterdir()} == {ncnn_net.PARAM, ncnn_net.BIN, leaf.FACTS}
            done[precision] = export.module, folder
        return done[precision]

    return of_precision


def session_of(made: Any, precision: str) -> Any:
    return registry.create("backend", f"ncnn(precision={precision!r})").load(in_folder(made(precision)[1]), threads=1)


def reference(module: Any, images: Any) -> Any:
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images)).numpy()


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def can_half() -> bool:
    import ncnn

    return bool(ncnn.cpu_support_arm_asimdhp())


@needs_ncnn
@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-5), ("fp16", 2e-5, 5e-3)])
def test_a_batch_is_the_networks(precision: str, least: float, most: float, made: Any, images: Any) -> None:
    session = session_of(made, precision)
    logits, wanted = session.infer(images)["logits"], reference(made(precision)[0], images)
    assert logits.shape == (2, 10) and logits.dtype == np.float32 and wanted.std() > 0.05
    assert least <= np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < most
    assert (session.infer(images[::-1].copy())["logits"][::-1] == logits).all()
    info = session.info()
    assert info.precision == (precision if can_half() else "fp32") and info.threads == 1 and info.runtime.startswith("ncnn 1.")
    assert [port.shape for port in (*info.inputs, *info.outputs)] == [SHAPE, (2, 10)]
    for wrong in (images[:1], images.astype(np.float64)):
        with pytest.raises(BackendError, match="expected float32"):
            session.infer(wrong)


@needs_ncnn
def test_the_audit_tells_what_layers_compute_in(made: Any, images: Any) -> None:
    session = session_of(made, "fp32")
    full = session.audit(images)
    assert full.nodes == full.delegated > 40 and not full.fallbacks
    assert full.precisions == {"fp32": 18}  # patches, four blocks of four, classifier
    if not can_half():
        assert session_of(made, "fp16").audit(images).precisions == {"fp32": 18}  # asked for fp16, and not believed
    session._net = ncnn_net.load(session._ncnn, made("fp16")[1], False, 1)  # rounds its weights to half, as a processor with half does
    assert session.audit(images).precisions == {"fp16": 18}


@needs_ncnn
@pytest.mark.parametrize("damage", ["junk", "cut", "gone"])
@pytest.mark.parametrize("name", [ncnn_net.PARAM, ncnn_net.BIN, leaf.FACTS])
def test_damaged_files_are_refused(name: str, damage: str, made: Any, tmp_path: Path) -> None:
    for file in made("fp32")[1].iterdir():
        whole = file.read_bytes()
        content = {"junk": b"no model" * 99, "cut": whole[: len(whole) // 2], "gone": b""}[damage] if file.name == name else whole
        if content:
            (tmp_path / file.name).write_bytes(content)
    with pytest.raises(ArtifactError):
        registry.create("backend", "ncnn").load(in_folder(tmp_path), threads=1)


@needs_ncnn
def test_what_ncnn_lacks_is_named(tmp_path: Path) -> None:
    import torch

    class Strange(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0(x).mean((2, 3))

    context = CompileContext((1, 3, 32, 32), tmp_path, lambda: None)
    with pytest.raises(BackendError, match=r"ncnn has no layer for .*i0"):
        registry.create("backend", "ncnn").compile(TorchExport(Strange().eval(), context.shape, tmp_path / "export"), context)
    assert not any(path.suffix in (".param", ".bin") for path in tmp_path.iterdir())


@needs_ncnn
def test_a_crash_of_ncnn_is_an_error_that_names_the_signal(tmp_path: Path) -> None:
    (tmp_path / ncnn_net.PARAM).write_text("7767517\n2 2\nInput in0 0 1 in0\nReshape r 1 1 in0 out0 0=4096 1=4096 2=4096\n")
    (tmp_path / ncnn_net.BIN).write_bytes(b"")
    np.save(tmp_path / "images.npy", np.zeros((1, 3, 4, 4), np.float32))
    np.save(tmp_path / "logits.npy", np.zeros((1, 5), np.float32))
    with pytest.raises(BackendError, match=r"SIG|ncnn cannot run|cannot load"):
        environments.run("ncnn", leaf.WORKER, {"do": "run", "folder": str(tmp_path), "half": False}, 60.0)


@needs_ncnn
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_handover_runs_without_edgejoule(precision: str, made: Any, images: Any, tmp_path: Path) -> None:
    folder = made(precision)[1]
    given = registry.create("backend", f"ncnn(precision={precision!r})").handover(in_folder(folder))
    assert len(given.python.splitlines()) <= 10 and "model.param" in given.cpp and given.install.startswith("pip install ncnn")
    np.save(tmp_path / "images.npy", images)
    tail = f"import sys\nnp.save({str(tmp_path / 'logits.npy')!r}, run(np.load({str(tmp_path / 'images.npy')!r})))\n"
    tail += "assert not {'edgejoule', 'torch'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-I", "-c", given.python + tail], cwd=folder, check=True)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), session_of(made, precision).infer(images)["logits"])


@needs_ncnn
def test_loading_imports_no_torch(made: Any) -> None:
    script = (
        "import sys, numpy; from tests.networks import in_folder; from edgejoule import registry; from pathlib import Path\n"
        "session = registry.create('backend', 'ncnn').load(in_folder(Path(sys.argv[1])), threads=1)\n"
        f"session.infer(numpy.zeros({SHAPE}, 'float32'))\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'onnx', 'scipy', 'sqlalchemy', 'pnnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(made("fp32")[1])], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_ncnn
def test_facts_of_another_file_are_not_believed(made: Any, tmp_path: Path) -> None:
    for file in made("fp32")[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((tmp_path / leaf.FACTS).read_text())
    (tmp_path / leaf.FACTS).write_text(json.dumps({**facts, "sha256": {ncnn_net.PARAM: "0" * 64, ncnn_net.BIN: "0" * 64}}))
    with pytest.raises(ArtifactError, match="not the file that was compiled"):
        registry.create("backend", "ncnn").load(in_folder(tmp_path), threads=1)


@pytest.mark.skipif(HERE or environments.missing("ncnn") is not None, reason=environments.missing("ncnn") or "this is its Python")
def test_all_of_this_in_its_own_environment() -> None:
    argv = environments.argv_of("ncnn", "pytest")
    assert argv is not None
    done = subprocess.run([*argv, "-q", "-x", __file__], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
