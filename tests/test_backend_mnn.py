"""MNN: what it runs is what it says, found out by running; nothing reports to its vendor; damaged files are refused."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import environments, registry, zoo
from edgejoule.compile import mnn as leaf
from edgejoule.compile import mnn_module
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.seams import CompileContext
from tests.networks import in_folder

SHAPE = (2, 3, 32, 32)
HERE = environments.python_of("mnn") == sys.executable
ON_ARM = platform.machine().lower() in leaf.ARM
ROOT = Path(__file__).parents[1]
PRECISIONS = ("fp32", "fp16", "int8")
needs_mnn = pytest.mark.skipif(not HERE, reason=environments.missing("mnn") or "runs in the Python of the environment mnn")


def spelling(precision: str) -> str:
    return f"mnn(precision={precision!r})"


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_weights_that_would_be_unpacked_are_refused(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert f"unpacks {precision} weights to float32 on x86_64" in registry.create("backend", spelling(precision)).probe()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "unpacks" not in (registry.create("backend", spelling(precision)).probe() or "")


def test_an_absent_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if HERE:
        pytest.skip("this Python has MNN")
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(BackendError, match="doctor --install mnn"):
        registry.create("backend", "mnn").compile(None, CompileContext(SHAPE, tmp_path, lambda: None))
    with pytest.raises(BackendError, match="edgejoule doctor --install mnn"):  # an artifact of an environment that is gone
        mnn_module.import_mnn()


def test_streams_are_refused() -> None:
    with pytest.raises(BackendError, match="one process a stream"):
        registry.create("backend", "mnn").load(in_folder(Path("nowhere")), threads=1, streams=2)


def test_the_vendors_command_line_is_never_imported() -> None:
    for name in ("mnn.py", "mnn_module.py", "mnn_worker.py"):
        lines = (Path(leaf.__file__).parent / name).read_text().splitlines()
        assert not [line for line in lines if line.strip().startswith(("import", "from")) and "MNN.tools" in line]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """precision -> (the network, the folder of its artifact), made once."""
    done: dict[str, tuple[Any, Path]] = {}
    module = zoo.build(zoo.identify(zoo.spec_of_timm("vit_digits"), weights="random"))
    export = TorchExport(module, SHAPE, tmp_path_factory.mktemp("export"))

    def of_precision(precision: str) -> tuple[Any, Path]:
        if precision not in done:
            folder = tmp_path_factory.mktemp("artifact")
            context = CompileContext(SHAPE, folder, lambda: None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(platform, "machine", lambda: "aarch64")  # which these are made for; the file is the same
                entry = registry.create("backend", spelling(precision)).compile(export, context)
            assert entry.parent == folder and {path.name for path in folder.iterdir()} == {mnn_module.FILE, mnn_module.PROOF, leaf.FACTS}
            done[precision] = export.module, folder
        return done[precision]

    return of_precision


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


def relative(logits: Any, module: Any, images: Any) -> float:
    import torch

    with torch.no_grad():
        wanted = module(torch.from_numpy(images)).numpy()
    assert wanted.std() > 0.05
    return float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))


@needs_mnn
@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-3), ("fp16", 5e-5, 2e-2), ("int8", 1e-3, 0.1)])
def test_a_batch_is_the_networks_and_the_precision_is_found_out(precision: str, least: float, most: float, made: Any, images: Any) -> None:
    module, folder = made(precision)
    session = registry.create("backend", spelling(precision)).load(in_folder(folder), threads=1)
    first = session.infer(images)["logits"]
    kept = first.copy()
    assert first.shape == (2, 10) and first.dtype == np.float32
    assert least <= relative(first, module, images) < most
    session.infer(images[::-1].copy())
    assert (first == kept).all()
    info, placement = session.info(), session.audit(images)
    if precision == "fp32" or not ON_ARM:  # on x86 the weights are half or int8, and the products are not
        assert info.precision == "fp32" and placement.precisions == {"fp32": 18}  # patches, four blocks of four, classifier
    assert placement.nodes == placement.delegated > 18 and not placement.fallbacks
    assert info.threads == 1 and info.runtime.startswith("MNN 3.") and [port.shape for port in info.outputs] == [(2, 10)]
    for wrong in (images[:1], images.astype(np.float64)):
        with pytest.raises(BackendError, match="expected float32"):
            session.infer(wrong)


@pytest.mark.parametrize(
    ("pointwise", "spatial", "asked", "said"),
    [
        (1e-7, 1e-7, "fp32", "fp32"),
        (1e-7, 1e-3, "fp32", "reduced"),
        (1e-3, 1e-3, "fp32", "reduced"),
        (1e-3, 1e-3, "int8", "int8"),
        (1e-7, 1e-3, "int8", "fp32"),
        (1e-7, 1e-7, "fp16", "fp32"),
    ],
)
def test_the_precision_is_the_proofs_not_what_was_asked_for(pointwise: float, spatial: float, asked: str, said: str) -> None:
    assert leaf._precision({"pointwise": pointwise, "spatial": spatial}, asked) == said


@needs_mnn
def test_a_proof_that_is_not_linear_is_not_float32(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = mnn_module.forward

    def coarse(mnn: Any, module: Any, images: Any) -> list[Any]:
        step = np.abs(images).max() / 127  # what dynamic quantisation does to an input
        return forward(mnn, module, np.round(images / step).astype(np.float32) * step)

    monkeypatch.setattr(mnn_module, "forward", coarse)
    for asked, said in (("int8", "int8"), ("fp32", "reduced")):
        assert registry.create("backend", spelling(asked)).load(in_folder(made(asked)[1]), threads=1).info().precision == said


@needs_mnn
def test_int8_and_fp16_files_are_smaller(made: Any) -> None:
    full, half, quarter = ((made(precision)[1] / mnn_module.FILE).stat().st_size for precision in PRECISIONS)
    assert half < 0.6 * full and quarter < 0.4 * full


@needs_mnn
@pytest.mark.parametrize("damage", ["junk", "cut", "gone"])
@pytest.mark.parametrize("name", [mnn_module.FILE, mnn_module.PROOF, leaf.FACTS])
def test_damaged_files_are_refused(name: str, damage: str, made: Any, tmp_path: Path) -> None:
    for file in made("fp32")[1].iterdir():
        whole = file.read_bytes()
        content = {"junk": b"no model" * 99, "cut": whole[: len(whole) // 2], "gone": b""}[damage] if file.name == name else whole
        if content:
            (tmp_path / file.name).write_bytes(content)
    with pytest.raises(ArtifactError):
        registry.create("backend", "mnn").load(in_folder(tmp_path), threads=1)


@needs_mnn
def test_what_the_converter_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    job = {"do": "convert", "folder": str(tmp_path), "source": str(tmp_path / "model.onnx"), "precision": "fp32"}
    with pytest.raises(BackendError, match=r"mnnconvert refuses the network|was killed by"):
        environments.run("mnn", leaf.WORKER, job, 60.0)


@needs_mnn
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_handover_runs_without_edgejoule(precision: str, made: Any, images: Any, tmp_path: Path) -> None:
    folder = made(precision)[1]
    backend = registry.create("backend", spelling(precision))
    given = backend.handover(in_folder(folder))
    assert len(given.python.splitlines()) <= 10 and "model.mnn" in given.cpp and given.install.startswith("pip install MNN")
    np.save(tmp_path / "images.npy", images)
    tail = f"import sys\nnp.save({str(tmp_path / 'logits.npy')!r}, run(np.load({str(tmp_path / 'images.npy')!r})))\n"
    tail += "assert not {'edgejoule', 'torch', 'aliyun', 'MNN.tools'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-I", "-c", given.python + tail], cwd=folder, check=True)
    logits = backend.load(in_folder(folder), threads=1).infer(images)["logits"]
    assert np.allclose(np.load(tmp_path / "logits.npy"), logits, rtol=1e-5, atol=1e-6)


@needs_mnn
def test_loading_imports_no_torch_and_no_reporter(made: Any) -> None:
    script = (
        "import sys, numpy; from tests.networks import in_folder; from edgejoule import registry; from pathlib import Path\n"
        "session = registry.create('backend', 'mnn').load(in_folder(Path(sys.argv[1])), threads=1)\n"
        f"session.infer(numpy.zeros({SHAPE}, 'float32'))\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'onnx', 'scipy', 'sqlalchemy', 'MNN.tools', 'aliyun'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(made("fp32")[1])], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(HERE or environments.missing("mnn") is not None, reason=environments.missing("mnn") or "this is its Python")
def test_all_of_this_in_its_own_environment() -> None:
    argv = environments.argv_of("mnn", "pytest")
    assert argv is not None
    done = subprocess.run([*argv, "-q", "-x", __file__], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
