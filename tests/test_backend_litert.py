"""LiteRT: what it writes computes the network, int8 is safe for ViTs, and what was delegated is told. Run in its own environment."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile import litert
from edgejoule.compile.export import TorchExport
from edgejoule.compile.litert_graph import Operator, placement, precision
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.records import Placement
from edgejoule.seams import CompileContext
from tests.elsewhere import run_file_there
from tests.networks import in_folder

SHAPE = (2, 3, 16, 16)
INT8, STATIC = 'litert(precision="int8")', 'litert(precision="int8", mode="static")'
there = pytest.mark.skipif(not litert._runtime_is_here(), reason="run in its own environment by test_the_rest_there")
here = pytest.mark.skipif(litert._runtime_is_here(), reason="about an interpreter without LiteRT")


@here
def test_the_rest_there() -> None:
    run_file_there("litert", __file__)


def tiny() -> Any:
    """(B, 3, 16, 16) -> (B, 7): patches, a position embedding resampled from another size, attention, depthwise convolution, linear."""
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 16, 4, 4)
            self.place = torch.nn.Parameter(torch.randn(1, 16, 3, 3))
            self.around = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.norm = torch.nn.LayerNorm(16)
            self.qkv = torch.nn.Linear(16, 48)
            self.head = torch.nn.Linear(16, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x)  # (B, 16, 4, 4)
            x = x + torch.nn.functional.interpolate(self.place, (4, 4), mode="bicubic", antialias=True)
            x = (x + self.around(x)).flatten(2).transpose(1, 2)  # (B, 16, 16)
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head(torch.nn.functional.gelu(x).mean(1))

    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(tiny(), SHAPE, tmp_path_factory.mktemp("export"), "tiny")


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def compiled(export: TorchExport, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A spelling -> the folder of the compiled file, made once; ``notes.txt`` beside the folder holds what was noted."""
    made: dict[str, Path] = {}

    def folder_of(spelling: str) -> Path:
        if spelling not in made:
            folder, notes = tmp_path_factory.mktemp("artifact"), {}
            calibration = np.random.default_rng(2).normal(size=(5, *SHAPE[1:])).astype(np.float32)  # not a multiple of the batch
            context = CompileContext(SHAPE, folder, lambda: calibration, note=lambda what, chosen: notes.update({what: chosen}))
            assert registry.create("backend", spelling).compile(export, context) == folder / "model.tflite"
            assert [path.name for path in folder.iterdir()] == ["model.tflite"]
            made[spelling] = folder
            (folder.parent / f"{folder.name}.notes").write_text(str(notes))
        return made[spelling]

    return folder_of


def relative(logits: Any, export: TorchExport, images: Any) -> float:
    import torch

    with torch.no_grad():
        wanted = export.module(torch.from_numpy(images)).numpy()
    assert np.linalg.norm(wanted, axis=1).min() > 0.1
    return float((np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def load(spelling: str, folder: Path) -> Any:
    return registry.create("backend", spelling).load(in_folder(folder), threads=1)


@there
@pytest.mark.parametrize(
    ("spelling", "least", "most", "kinds"),
    [
        ("litert", 0, 1e-5, {"fp32": 4}),
        (INT8, 1e-4, 0.05, {"int8": 3, "fp32": 1}),  # depthwise convolution stays float
        (STATIC, 1e-4, 0.1, {"int8": 4}),
    ],
)
def test_it_computes_the_network_and_tells_what_it_runs(
    spelling: str, least: float, most: float, kinds: dict[str, int], export: Any, compiled: Any, images: Any
) -> None:
    session = load(spelling, compiled(spelling))
    logits = session.infer(images)["logits"]
    assert logits.dtype == np.float32 and logits.shape == (2, 7)
    assert least <= relative(logits, export, images) < most
    info, found = session.info(), session.audit(images)
    assert info.precision == max(kinds, key=lambda kind: kinds[kind]) and info.providers == ("xnnpack",) and info.threads == 1
    assert info.runtime.startswith("ai-edge-litert 2.")
    assert [(one.shape, one.dtype) for one in (*info.inputs, *info.outputs)] == [(SHAPE, "float32"), ((2, 7), "float32")]
    assert found.precisions == kinds and found.fallbacks == {} and found.delegated == found.nodes > 10


@there
def test_what_was_chosen_is_noted(compiled: Any) -> None:
    notes = {spelling: Path(f"{compiled(spelling)}.notes").read_text() for spelling in ("litert", INT8, STATIC)}
    assert notes["litert"] == "{}"
    assert "row by row at run time" in notes[INT8] and "asymmetric by calibration" in notes[STATIC]
    assert "'quantized': '3 of 4 products with weights'" in notes[INT8] and "'quantized': '4 of 4" in notes[STATIC]
    assert "'always in float': '1 DEPTHWISE_CONV_2D'" in notes[INT8] and "always in float" not in notes[STATIC]
    assert all("'held-out search': 'files run: 1, on 1 images'" in notes[spelling] for spelling in (INT8, STATIC)), "every third of five"


@there
def test_without_a_delegate_its_own_kernels_run_everything(export: Any, compiled: Any, images: Any) -> None:
    session = load('litert(delegate="none")', compiled("litert"))
    assert relative(session.infer(images)["logits"], export, images) < 1e-5
    found = session.audit(images)
    assert session.info().providers == ("cpu",) and found.delegated == found.nodes and found.fallbacks == {}


@there
def test_the_result_is_not_overwritten_by_the_next(compiled: Any, images: Any) -> None:
    session = load("litert", compiled("litert"))
    first = session.infer(images)["logits"]
    kept = first.copy()
    session.infer(np.ascontiguousarray(images[::-1]))
    assert (first == kept).all()


@there
def test_images_that_do_not_fit(compiled: Any, images: Any) -> None:
    session = load("litert", compiled("litert"))
    with pytest.raises(BackendError, match=r"expected float32 \(2, 3, 16, 16\)"):
        session.infer(images[:1])
    with pytest.raises(BackendError, match="images are float64"):
        session.infer(images.astype(np.float64))


@there
@pytest.mark.parametrize("damage", ["junk", "cut", "empty", "gone"])
def test_damaged_files(damage: str, compiled: Any, tmp_path: Path) -> None:
    whole = (compiled("litert") / "model.tflite").read_bytes()
    content = {"junk": b"no model" * 99, "cut": whole[: len(whole) // 2], "empty": b""}
    if damage in content:
        (tmp_path / "model.tflite").write_bytes(content[damage])
    with pytest.raises(ArtifactError, match="compile again"):
        load("litert", tmp_path)


@there
def test_loading_imports_no_torch(compiled: Any) -> None:
    script = (
        "import sys, numpy; from tests.networks import in_folder; from edgejoule import registry; from pathlib import Path\n"
        "session = registry.create('backend', 'litert').load(in_folder(Path(sys.argv[1])), threads=1)\n"
        f"session.infer(numpy.zeros({SHAPE}, 'float32')); session.audit(numpy.zeros({SHAPE}, 'float32'))\n"
        "print(sorted({'torch', 'jax', 'litert_torch', 'scipy', 'onnx', 'sqlalchemy'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", script, str(compiled("litert"))]
    done = subprocess.run(argv, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@there
@pytest.mark.parametrize("spelling", ["litert", INT8, 'litert(delegate="none")'])
def test_the_handover_runs_the_file_without_us(spelling: str, compiled: Any, images: Any, tmp_path: Path) -> None:
    folder = compiled("litert" if "none" in spelling else spelling)
    how = registry.create("backend", spelling).handover(dataclasses.replace(in_folder(folder)))
    assert len(how.python.splitlines()) <= 10 and how.install.startswith("pip install ai-edge-litert")
    np.save(tmp_path / "images.npy", images)
    end = f"import sys, numpy\nnumpy.save({str(tmp_path / 'logits.npy')!r}, run(numpy.load({str(tmp_path / 'images.npy')!r})))\n"
    end += "assert not {'edgejoule', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", f"{how.python}\n{end}"], cwd=folder, check=True, capture_output=True)
    wanted = load(spelling, folder).infer(images)["logits"]
    assert np.allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)


@there
def test_a_network_that_it_cannot_convert_is_told(tmp_path: Path) -> None:
    import torch

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(x[:, 0])[1]

    context = CompileContext(SHAPE, tmp_path / "work", lambda: None)
    (tmp_path / "work").mkdir()
    with pytest.raises(BackendError, match=r"litert-torch cannot convert the network .*use another backend"):
        registry.create("backend", "litert").compile(TorchExport(Odd(), SHAPE, tmp_path, "odd"), context)
    assert not list((tmp_path / "work").iterdir())


@there
def test_the_edge_tpu_is_given_integers_only(export: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    fake = tmp_path / "bin" / "edgetpu_compiler"
    fake.write_text("#!/bin/sh\ncp $4 $3/model_edgetpu.tflite && echo said > $3/model_edgetpu.log\n")
    fake.chmod(0o755)
    backend = registry.create("backend", 'litert(precision="int8", mode="static", delegate="edgetpu")')
    context = CompileContext(SHAPE, tmp_path / "work", lambda: images)
    with pytest.raises(BackendError, match="edgetpu_compiler is not installed"):
        backend.compile(export, context)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    backend.compile(export, context)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["model.tflite"]
    session = load('litert(delegate="none")', tmp_path / "work")
    assert session.infer(images)["logits"].dtype == np.float32  # float at both ends
    assert session.audit(images).precisions == {"int8": 4}
    fake.write_text("#!/bin/sh\necho 'no such operator' >&2; exit 1\n")
    with pytest.raises(BackendError, match=r"edgetpu_compiler refuses the network \(no such operator\)"):
        litert._compile_for_edgetpu(tmp_path / "work" / "model.tflite")


# ---------------------------------------------------------------- what needs no LiteRT


@pytest.mark.parametrize("delegate", ["gpu", "edgetpu"])
def test_a_delegate_that_is_not_there_says_what_it_needs(delegate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ', precision="int8", mode="static"' if delegate == "edgetpu" else ""
    backend = registry.create("backend", f'litert(delegate="{delegate}"{options})')
    assert backend.device == delegate
    monkeypatch.setattr(litert, "_runtime_is_here", lambda: True)
    said = backend.probe()
    assert "use delegate='xnnpack'" in said and litert.LIBRARIES[delegate][1] in said
    with pytest.raises(BackendError, match="delegate cannot be loaded"):
        backend.load(in_folder(tmp_path), threads=1)


@here
def test_an_interpreter_without_litert_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="litert is not in this installation but in its own environment"):
        registry.create("backend", "litert").load(in_folder(tmp_path), threads=1)
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    assert registry.create("backend", "litert").probe().endswith("edgejoule doctor --install litert")
    with pytest.raises(BackendError, match="edgejoule doctor --install litert"):
        registry.create("backend", "litert").compile(None, CompileContext(SHAPE, tmp_path, lambda: None))


def test_one_stream() -> None:
    with pytest.raises(BackendError, match="runs one stream, 2 were asked for"):
        registry.create("backend", "litert").load(in_folder(Path("nowhere")), threads=1, streams=2)


@pytest.mark.parametrize(
    "spelling", ['litert(mode="static")', 'litert(delegate="edgetpu")', 'litert(precision="fp16")', 'litert(delegate="nnapi")']
)
def test_options_that_make_no_sense(spelling: str) -> None:
    with pytest.raises(SpecError):
        registry.create("backend", spelling)


def graph(*parts: tuple[str, tuple[int, ...], tuple[int, ...], str]) -> list[Operator]:
    return [Operator(name, entry, leave, dict.fromkeys(entry, kind)) for name, entry, leave, kind in parts]


def test_delegated_operators_are_those_between_a_parts_ends() -> None:
    # 0 is the image; 10, 11 are weights. The delegate takes the first convolution and, after a custom operator, the rest but one.
    own = graph(
        ("CONV_2D", (0, 10, -1), (1,), "int8"),
        ("CUSTOM", (1,), (2,), "float32"),
        ("ADD", (2, 1), (3,), "float32"),
        ("FULLY_CONNECTED", (3, 11), (4,), "float32"),
        ("SOFTMAX", (4,), (5,), "float32"),
    )
    parts = graph(("DELEGATE", (0, 10), (1,), "float32"), ("DELEGATE", (2, 1, 11), (4,), "float32"))
    found = placement([*own, *parts])
    assert found == Placement(5, 3, {"CUSTOM": 1, "SOFTMAX": 1}, {"int8": 1, "fp32": 1})
    assert placement(own) == Placement(5, 0, {"CONV_2D": 1, "CUSTOM": 1, "ADD": 1, "FULLY_CONNECTED": 1, "SOFTMAX": 1}, found.precisions)
    assert placement(own, delegated=False) == Placement(5, 5, {}, found.precisions)


def test_only_products_with_weights_have_a_precision_and_stored_integers_are_none() -> None:
    own = graph(
        ("BATCH_MATMUL", (0, 1), (2,), "float32"),  # 1 is computed by nobody: weights
        ("BATCH_MATMUL", (2, 2), (3,), "float32"),  # attention
        ("DEQUANTIZE", (10,), (4,), "int8"),
        ("FULLY_CONNECTED", (3, 4), (5,), "float32"),  # integers in the file, floats multiplied
        ("DEPTHWISE_CONV_2D", (5, 11), (6,), "int8"),
        ("TRANSPOSE_CONV", (12, 13, 6), (7,), "uint8"),
    )
    found = placement(own)
    assert found.precisions == {"fp32": 2, "int8": 2}
    assert precision(Placement(1, 1)) == "fp32" and precision(Placement(3, 3, {}, {"fp32": 1, "int8": 2})) == "int8"
