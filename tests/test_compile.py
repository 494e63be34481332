"""Exporting a network once, and building an artifact that is whole, compared with its network, and found again."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import manifest
from edgejoule.compile import LEAVES
from edgejoule.compile.build import Material, build, build_key, find
from edgejoule.compile.export import TorchExport
from edgejoule.compile.truth import verify_parity
from edgejoule.errors import BackendError, DataError, ModelError, OutputError
from edgejoule.records import Outputs, Published, Variant, floats
from tests.networks import Matmul, linear, live, loaded_here, variant

ROOT = Path(__file__).parents[1]
FOUR = {"numpy": "2"}


class Untouchable:
    """An export that must not be made."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the export's {name} was asked for")


@pytest.fixture(autouse=True)
def matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAVES, "matmul", "tests.networks:Matmul")


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    path = tmp_path / "crops.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (11, 3, 8, 8), dtype=np.uint8))
    return path


def make(
    crops: Path, cache: Path, export: Any = None, of: Variant | None = None, backend: str = "matmul", batch: int = 3, **options: Any
) -> Any:
    export = export or TorchExport(linear(), (batch, 3, 8, 8), cache.parent / "export")
    options = {"outputs": loaded_here(), "threads": 1, **options}
    return build(of or variant(), backend, export, crops=crops, batch=batch, cache=cache, **options)


# ---------------------------------------------------------------- export


def test_onnx_computes_what_the_network_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import onnxruntime
    import torch

    module = live("test_vit")
    capfd.readouterr()
    export = TorchExport(module, (2, 3, 160, 160), tmp_path)
    session = onnxruntime.InferenceSession(str(export.onnx))
    assert capfd.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # the weights are inside
    images = torch.randn(2, 3, 160, 160)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        wanted = module(images).numpy()
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not any(parameter.dtype != torch.float32 for parameter in export.module.parameters())


def test_each_form_is_made_once_and_only_when_asked_for(tmp_path: Path) -> None:
    built = []
    export = TorchExport(lambda: built.append(1) or linear(), (1, 3, 8, 8), tmp_path)
    assert not built
    assert export.program is export.program and export.onnx == export.onnx and export.module is export.module
    assert built == [1]


def test_attention_that_the_exporter_cannot_translate_is_spelt_out(tmp_path: Path) -> None:
    import onnxruntime
    import torch
    from torch.nn import functional

    class Windows(torch.nn.Module):
        """(B, 3, 8, 8): attention among the 8 pixels of a row, as 5-D tensors (B, 1, 8, 8, 3)."""

        fused_attn = True

        def forward(self, x: Any) -> Any:
            q = x.permute(0, 2, 3, 1).unsqueeze(1)
            if self.fused_attn:
                mixed = functional.scaled_dot_product_attention(q, q, q)
            else:
                mixed = (q @ q.transpose(-2, -1) * 3**-0.5).softmax(-1) @ q
            return mixed.flatten(1)

    module = Windows()
    export = TorchExport(module, (1, 3, 8, 8), tmp_path)
    images = torch.randn(1, 3, 8, 8)
    (logits,) = onnxruntime.InferenceSession(str(export.onnx)).run(None, {"images": images.numpy()})
    assert np.allclose(logits, module(images).numpy(), atol=1e-5)
    assert module.fused_attn, "the caller's network was changed"


def test_a_network_that_cannot_be_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    class Moody(torch.nn.Module):
        runs = 0

        def forward(self, x: Any) -> Any:
            self.runs += 1
            return x.flatten(1) if x.sum() >= 0 else x.flatten(1) * 2

    module = Moody()
    export = TorchExport(module, (1, 3, 8, 8), tmp_path, "moody")
    with pytest.raises(ModelError, match=r"^torch\.export refuses moody \(.+\): its forward must not depend on the values of tensors$"):
        _ = export.program
    runs = module.runs
    with pytest.raises(ModelError, match=r"torch\.export refuses moody"):
        _ = export.onnx
    assert module.runs == runs, "a failure was tried again"
    assert capfd.readouterr() == ("", ""), "torch's own report belongs in the error, not around it"


@pytest.mark.parametrize(
    ("returns", "seen"),
    [(lambda x: (x, x), "a tuple"), (lambda x: {"logits": x}, "a dict"), (lambda x: x, r"a tensor of shape \(1, 3, 8, 8\)")],
)
def test_what_is_no_classifier(returns: Any, seen: str, tmp_path: Path) -> None:
    import torch

    class Other(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return returns(x)

    with pytest.raises(ModelError, match=f"other returns {seen} in eval mode, expected logits"):
        _ = TorchExport(Other(), (1, 3, 8, 8), tmp_path, "other").module


def test_an_input_size_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not run on images of shape"):
        _ = TorchExport(linear(), (1, 3, 9, 9), tmp_path).module


# ---------------------------------------------------------------- the key


def test_key_is_of_what_shapes_the_file_and_of_nothing_else() -> None:
    plain, spec = variant(), variant().spec
    key = build_key(plain, 'openvino(precision="bf16", streams=2)', 1, FOUR)
    assert key == build_key(plain, "openvino( streams=2,precision='bf16' )", 1, FOUR)
    named = dataclasses.replace(
        spec, name="other", aliases=("b",), published=Published(80.0, 1.0, 1.0, "x"), builder='custom(target="tests.networks:linear")'
    )
    assert key == build_key(dataclasses.replace(plain, spec=named), 'openvino(precision="bf16", streams=2)', 1, FOUR)
    assert key != build_key(plain, "openvino", 1, FOUR)
    base = build_key(plain, "openvino", 1, FOUR)
    size = dataclasses.replace(spec.preprocessing, input_size=(3, 9, 9))
    mean = dataclasses.replace(spec.preprocessing, mean=(0.0, 0.0, 0.0))
    others = {
        build_key(plain, "openvino", 2, FOUR),
        build_key(plain, "openvino", 1, {"numpy": "3"}),
        *(
            build_key(dataclasses.replace(plain, **change), "openvino", 1, FOUR)
            for change in ({"recipe": "fuse"}, {"seed": 1}, {"weights_id": "w"})
        ),
        *(
            build_key(dataclasses.replace(plain, spec=dataclasses.replace(spec, **change)), "openvino", 1, FOUR)
            for change in ({"num_classes": 10}, {"builder": "timm(name='x')"}, {"preprocessing": size}, {"preprocessing": mean})
        ),
    }
    assert len(others | {base}) == 10


# ---------------------------------------------------------------- building


def test_an_artifact_is_whole_and_compared(crops: Path, tmp_path: Path) -> None:
    made = make(crops, tmp_path / "cache")
    assert made == manifest.read(tmp_path / "cache" / "artifacts" / made.build_key)
    assert [file.name for file in made.files] == ["weights.json"] and made.batch == 3 and made.backend == "matmul"
    assert made.parity.n == 11 and made.parity.max_rel < 1e-6 and made.parity.top1_agreement == 1.0 and made.parity.reference_rms > 0.1
    assert made.info.providers == ("numpy",) and made.toolchain == {"numpy": np.__version__}
    assert [caveat.code for caveat in made.caveats] == ["weights_random"]
    assert find(tmp_path / "cache", made.build_key) == made
    assert {path.name for path in (tmp_path / "cache" / "artifacts").iterdir()} == {made.build_key, f".{made.build_key}.lock"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "eager"])
def test_a_real_network_through_a_real_backend(backend: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos.npy"
    np.save(photos, np.random.default_rng(0).integers(0, 256, (3, 3, 160, 160), dtype=np.uint8))
    export = TorchExport(live("test_vit"), (2, 3, 160, 160), tmp_path / "export")
    made = make(photos, tmp_path / "cache", export, variant("test_vit", 160), backend, batch=2)
    assert made.parity.n == 3 and made.parity.max_rel < 1e-4
    assert {caveat.code for caveat in made.caveats} == {"weights_random"}
    assert "torch" in made.toolchain and "edgejoule" in made.toolchain


def test_what_was_built_is_found_without_touching_the_network(crops: Path, tmp_path: Path) -> None:
    made = make(crops, tmp_path / "cache")
    again = make(crops, tmp_path / "cache", Untouchable(), outputs=Untouchable())
    assert again == made
    renamed = variant("another name")
    assert make(crops, tmp_path / "cache", Untouchable(), renamed).variant == renamed


def test_a_damaged_artifact_is_built_again(crops: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(crops, tmp_path / "cache")
    (Path(made.folder) / "weights.json").write_text("[]")
    assert make(crops, tmp_path / "cache") == made
    assert [record.message.count("weights.json is not the file that was compiled") for record in caplog.records] == [1]


def test_a_killed_build_leaves_nothing_that_counts(crops: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; import edgejoule.compile\n"
        "from edgejoule.compile.build import build; from tests.networks import *\n"
        "edgejoule.compile.LEAVES['matmul'] = 'tests.networks:Matmul'\n"
        "class Export: module = linear()\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build(variant(), 'matmul', Export, crops=Path(sys.argv[1]), batch=3, cache=Path(sys.argv[2]), threads=1, outputs=die)\n"
    )
    cache = tmp_path / "cache"
    died = subprocess.run([sys.executable, "-c", script, str(crops), str(cache)], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    left = [path for path in (cache / "artifacts").iterdir() if path.is_dir()]
    assert len(left) == 1 and list(left[0].rglob("weights.json")), "the build died before it had written anything"
    made = make(crops, cache)
    assert [path for path in (cache / "artifacts").iterdir() if path.is_dir()] == [Path(made.folder)]


def test_two_builders_of_the_same_compile_once(crops: Path, tmp_path: Path) -> None:
    log, made = tmp_path / "log.txt", []
    backend = f"matmul(log={str(log)!r})"
    export = TorchExport(linear(), (3, 3, 8, 8), tmp_path)
    _ = export.module
    threads = [threading.Thread(target=lambda: made.append(make(crops, tmp_path / "cache", export, backend=backend))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text() == "compiled\n"
    assert len(made) == 4 and len({artifact.sha256 for artifact in made}) == 1


# ---------------------------------------------------------------- doubts


def answer(**changes: Any) -> Any:
    return loaded_here(lambda outputs: dataclasses.replace(outputs, **{key: change(outputs) for key, change in changes.items()}))


def test_doubts_become_caveats(crops: Path, tmp_path: Path) -> None:
    other = answer(
        info=lambda o: dataclasses.replace(o.info, precision="bf16"), logits=lambda o: floats(1.01 * value for value in o.logits)
    )
    made = make(crops, tmp_path / "a", outputs=other, of=variant(weights="pretrained"))
    assert {caveat.code for caveat in made.caveats} == {"precision_differs", "parity_low"}
    amplified = answer(logits=lambda o: floats(1.002 * value for value in o.logits))
    made = make(crops, tmp_path / "c", outputs=amplified, of=variant(weights="pretrained"))
    assert made.caveats == (), "a network that amplifies rounding is called broken"
    blind = linear()
    for parameter in blind.parameters():
        parameter.data.zero_()
    made = make(crops, tmp_path / "b", TorchExport(blind, (3, 3, 8, 8), tmp_path))
    assert {caveat.code for caveat in made.caveats} == {"weights_random", "parity_blind"}
    assert json.loads((Path(made.folder) / manifest.NAME).read_text())["parity"]["max_rel"] == 0.0


def test_logits_that_are_not_finite_are_refused(crops: Path, tmp_path: Path) -> None:
    broken = answer(logits=lambda o: floats([float("nan"), *list(o.logits)[1:]]))
    with pytest.raises(BackendError, match="the compiled file's logits are not finite"):
        make(crops, tmp_path / "cache", outputs=broken)
    module = linear()
    module[1].bias.data[0] = float("inf")
    with pytest.raises(ModelError, match="the network's own logits are not finite"):
        make(crops, tmp_path / "cache", TorchExport(module, (3, 3, 8, 8), tmp_path))
    assert [path for path in (tmp_path / "cache" / "artifacts").iterdir() if path.is_dir()] == []


def test_parity() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 5.0]], dtype=np.float32)
    parity = verify_parity(reference, np.array([[3.0, 3.0], [1.0, 5.0]]))
    assert parity.n == 2 and parity.max_abs == 1.0 and parity.max_rel == pytest.approx(0.2)
    assert parity.top1_agreement == 0.5  # the first image's logits are now equal, and the first class wins
    assert parity.reference_rms == pytest.approx(np.sqrt(50 / 4))
    assert verify_parity(reference * 0, reference * 0).max_rel == 0.0
    with pytest.raises(BackendError, match="shape"):
        verify_parity(reference, reference[:1])


# ---------------------------------------------------------------- what can go wrong


def test_a_backend_that_is_not_there(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matmul, "probe", lambda self: "numpy is asleep: wake it")
    with pytest.raises(BackendError, match="matmul cannot be used here: numpy is asleep: wake it"):
        make(crops, tmp_path / "cache")


def test_what_was_never_run_is_judged_once_its_runtime_is_here(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(Matmul, "runs_here", lambda self: "it runs on a Mac only: go there", raising=False)
    written = make(crops, cache, outputs=lambda *_: pytest.fail("it was run"))
    assert [doubt.code for doubt in written.caveats] == ["weights_random", "not_run"] and written.parity is None
    assert make(crops, cache, Untouchable()).build_key == written.build_key
    monkeypatch.setattr(Matmul, "runs_here", lambda self: None)
    judged = make(crops, cache)
    assert judged.parity is not None and "not_run" not in {doubt.code for doubt in judged.caveats}
    assert judged.sha256 == written.sha256


def test_int8_is_judged_anew_on_a_processor_that_sums_otherwise(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, again in (("int8", True), ("fp32", False)):
        keys = set()
        for sums in (True, False, True):
            monkeypatch.setattr("edgejoule.compile.cpu.sums_exactly", lambda sums=sums: sums)
            keys.add(make(crops, tmp_path / "cache", backend=f"matmul(precision='{precision}')").build_key)
        assert len(keys) == 1 + again


@pytest.mark.parametrize(("weights", "allowed"), [("random", 100.0), ("file", 2.0)])
def test_random_weights_have_no_budget(weights: Any, allowed: float, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their classes are near ties: what a search would put back to float by equal answers is drawn by lot."""
    seen, real = [], Matmul.compile

    def compile_and_tell(self: Any, export: Any, context: Any) -> Any:
        seen.append(context.max_drop_pct)
        return real(self, export, context)

    monkeypatch.setattr(Matmul, "compile", compile_and_tell)
    images = np.load(crops)
    material = Material("these", lambda: images, lambda: (images, None), 2.0)
    of = dataclasses.replace(variant(), weights=weights)
    made = make(crops, tmp_path / "cache", of=of, backend="matmul(precision='int8')", material=material)
    assert seen == [allowed] and made.notes["budget_pct"] == "2" and ("budget" in made.notes) is (weights == "random")


def test_a_backend_that_breaks_its_word(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matmul, "compile", lambda self, export, context: 1 / 0)
    with pytest.raises(BackendError, match=r"matmul failed to compile linear \(division by zero\)"):
        make(crops, tmp_path / "cache")

    def no_library(self: Any, export: Any, context: Any) -> Path:
        raise OSError("libmatmul.so: cannot open shared object file")

    monkeypatch.setattr(Matmul, "compile", no_library)
    with pytest.raises(BackendError, match=r"libmatmul\.so"):
        make(crops, tmp_path / "cache")
    monkeypatch.setattr(Matmul, "compile", lambda self, export, context: tmp_path / "elsewhere")
    with pytest.raises(BackendError, match="which is not there"):
        make(crops, tmp_path / "cache")


def test_a_disk_that_is_full(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, export: Any, context: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Matmul, "compile", full)
    with pytest.raises(OutputError, match=r"cannot write .* \(No space left on device\): free some space"):
        make(crops, tmp_path / "cache")


def test_a_library_that_fails_on_a_full_disk(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matmul, "compile", lambda self, export, context: 1 / 0)
    monkeypatch.setattr("edgejoule.compile.cache.FULL_BYTES", 1 << 62)
    with pytest.raises(OutputError, match=r"the disk of .* is full"):
        make(crops, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(crops: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        make(crops, tmp_path / "cache")


def test_images_that_do_not_fit(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="8"):
        make(crops, tmp_path / "cache", of=variant(size=9))
    np.save(crops, np.zeros((0, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(DataError):
        make(crops, tmp_path / "cache")


def test_the_caller_keeps_its_network(crops: Path, tmp_path: Path) -> None:
    module = linear()
    before = copy.deepcopy(module.state_dict())
    make(crops, tmp_path / "cache", TorchExport(module, (3, 3, 8, 8), tmp_path), backend="eager")
    assert all((before[name] == value).all() for name, value in module.state_dict().items())


def test_outputs_are_of_the_images_asked_for(crops: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def outputs(folder: Path, images: Path, threads: int) -> Outputs:
        seen.append((np.load(images), threads))
        return loaded_here()(folder, images, threads)

    make(crops, tmp_path / "cache", outputs=outputs, threads=2)
    ((images, threads),) = seen
    assert (images == np.load(crops)[:32]).all() and images.dtype == np.uint8 and threads == 2
