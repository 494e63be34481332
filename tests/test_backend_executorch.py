"""ExecuTorch: the rewriting is exact, one delegate takes a whole ViT, the plan belongs to its bytes, and what is damaged is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgejoule import environments
from edgejoule.compile import executorch, executorch_rewrites, executorch_worker
from edgejoule.compile.executorch import ExecuTorch
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.seams import CompileContext
from tests.networks import in_folder

SHAPE = (2, 3, 32, 32)
ROOT = Path(__file__).parents[1]
EXACT = 1e-5


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def tiny_vit() -> Any:
    """(B, 3, 32, 32) -> (B, 10): a transformer of one block, whose every branch takes part."""
    from edgejoule.torchvision import ensure

    ensure()
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, num_classes=10, init_values=1.0).eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("norm1.weight") else 0.0, 0.5)
        else:
            torch.nn.init.xavier_normal_(parameter.view(len(parameter), -1), 1.5)
    return module


# ---------------------------------------------------------------- rewriting, wherever torch is


class Attending(torch.nn.Module):
    """Every operator of the table, with what each does not know as well."""

    def __init__(self, causal: bool = False, masked: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.plane = torch.nn.LayerNorm(12, eps=1e-3), torch.nn.LayerNorm((7, 12))
        self.qkv, self.scale = torch.nn.Linear(12, 36), torch.nn.Parameter(torch.randn(1))
        self.register_buffer("mask", torch.randn(1, 1, 7, 7) if masked else None)
        self.causal = causal
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, x: Any) -> Any:  # (B, 7, 12)
        q, k, v = self.qkv(self.plane(self.norm(x * 3 + 5))).reshape(-1, 7, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        out = out.transpose(1, 2).reshape(-1, 7, 12)
        left, right = (out @ out.transpose(1, 2) @ out).chunk(2, dim=-1)
        parts = left.split([2, 4], dim=-1)[1] + right.split(4, dim=-1)[0]
        last = parts[:, -1].unsqueeze(1).expand(-1, 7, -1).expand(x.shape[0], 7, 4).unsqueeze(-1).squeeze(-1)
        return (last @ torch.ones(4, 3)) * 2 * self.scale + left.mean(1)[:, None, :3] + left[:, None].mean((2, 3))[:, None]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"masked": True}])
def test_a_rewritten_program_computes_the_same(options: dict[str, bool]) -> None:
    module, x = Attending(**options).eval(), torch.randn(2, 7, 12)
    program = torch.export.export(module, (x,), strict=False)
    rewritten = program.run_decompositions(dict(executorch_rewrites.table()))
    with torch.no_grad():
        assert relative(rewritten.module()(x).numpy(), module(x).numpy()) < EXACT


def test_what_the_delegate_lacks_is_gone_from_a_rewritten_vit() -> None:
    program = torch.export.export(tiny_vit(), (torch.zeros(SHAPE),), strict=False)
    before = {str(node.target) for node in program.graph.nodes}
    after = {str(node.target) for node in program.run_decompositions(dict(executorch_rewrites.table())).graph.nodes}
    lacking = {"aten.layer_norm.default", "aten.scaled_dot_product_attention.default", "aten.unbind.int", "aten.select.int"}
    assert lacking <= before and not lacking & after
    assert not {name for name in after if "native_layer_norm" in name or "squeeze" in name or "safe_softmax" in name}


def test_each_spelling_is_torchs() -> None:
    torch.manual_seed(0)
    x, spelt = torch.randn(2, 5, 6), executorch_rewrites
    assert torch.equal(spelt.select(x, -1, -2), x.select(-1, -2))
    assert [tuple(part.shape) for part in spelt.chunk(x, 4, 1)] == [tuple(part.shape) for part in x.chunk(4, 1)]
    assert all(map(torch.equal, spelt.split(x, 4, -1), x.split(4, -1)))
    assert torch.equal(spelt.unsqueeze(x, -1), x.unsqueeze(-1)) and torch.equal(spelt.unsqueeze(x, 0), x[None])
    assert spelt.squeeze(x, 0) is None and torch.equal(spelt.squeeze(x[:1], 0), x[0])
    assert spelt.expand(x, [2, -1, 6]) is not None and spelt.expand(x[:1], [2, 5, 6]) is None and spelt.expand(x, [1, 2, 5, 6]) is None
    assert spelt.multiply(torch.ones(2, dtype=torch.int64), 2) is None
    assert spelt.matmul(x, x[0].T) is None and spelt.layer_norm(x, (5, 6)) is None
    images = torch.randn(2, 3, 4, 5)
    for dims, keepdim in [((2, 3), False), ((1, 3), True), ((1,), False), ((-1,), True)]:
        assert torch.allclose(spelt.mean(images, dims, keepdim), images.mean(dims, keepdim), atol=1e-6)
    assert spelt.mean(images, (2, 3), True) is None and spelt.mean(images, None) is None
    far = 1000 + x  # a variance of squares less a square would lose all digits here
    assert torch.allclose(spelt.layer_norm(far, (6,)), torch.nn.functional.layer_norm(far, (6,)), atol=2e-3)


# ---------------------------------------------------------------- what the plan says


def graph(*nodes: tuple[str, str, str, int, int]) -> dict[str, Any]:
    """An XNNPACK graph of (operator, input's type, weights' type, rows of weights, bias): as the flatbuffer compiler tells it."""
    values: list[Any] = []
    found = []
    for operator, images, weights, rows, bias in nodes:
        first = len(values)
        values.append({"xvalue_union": {"datatype": f"xnn_datatype_{images}", "dims": [7, 8], "id_out": first}})
        inner = {"datatype": f"xnn_datatype_{weights}", "dims": [rows, 8], "id_out": first + 1}
        values.append({"xvalue_union": {"tensor_value": inner, "quant_params": {}} if weights != "fp32" else inner})
        found.append({"xnode_union_type": operator, "xnode_union": {"input1_id": first, "filter_id": first + 1, "bias_id": bias}})
    return {"xvalues": values, "xnodes": [*found, {"xnode_union_type": "XNNAdd", "xnode_union": {}}]}


def test_products_are_counted_by_the_types_that_they_read() -> None:
    told = graph(
        ("XNNFullyConnected", "qdint8", "qcint8", 9, 3),
        ("XNNConv2d", "qint8", "qcint8", 9, 3),
        ("XNNDepthwiseConv2d", "fp32", "fp32", 1, 3),
        ("XNNFullyConnected", "fp32", "qcint8", 9, 3),
        ("XNNFullyConnected", "fp32", "fp32", 1, executorch_worker.NO_BIAS),  # the mean of a LayerNorm
        ("XNNFullyConnected", "fp32", "fp32", 1, 3),  # a classifier of one class
    )
    assert list(executorch_worker.products(told)) == ["int8", "int8", "fp32", "fp32+qcint8", "fp32"]


def test_a_batch_norm_that_was_spelt_as_a_convolution_is_no_product() -> None:
    told = graph(("XNNDepthwiseConv2d", "fp32", "fp32", 1, 3), ("XNNDepthwiseConv2d", "fp32", "fp32", 1, 3))
    for value, side in ((1, 1), (3, 3)):
        told["xvalues"][value]["xvalue_union"]["dims"] = [1, side, side, 8]
    assert list(executorch_worker.products(told)) == ["fp32"]


def test_what_flatbuffers_write_for_infinity_is_read() -> None:
    told = executorch_worker.BARE.sub(r': "\1"', '{"output_min": 0.0, "output_max": inf, "a": -inf,\n "b":nan, "info": "inform"}')
    assert json.loads(told) == {"output_min": 0.0, "output_max": "inf", "a": "-inf", "b": "nan", "info": "inform"}


@pytest.mark.parametrize(("products", "precision"), [({"int8": 25, "fp32": 1}, "int8"), ({"int8": 1, "fp32": 2}, "fp32"), ({}, "unknown")])
def test_the_precision_is_that_of_most_products(products: dict[str, int], precision: str) -> None:
    assert executorch._precision(products) == precision


def write_plan(folder: Path, content: bytes = b"program", **changes: Any) -> None:
    plan = {"nodes": 3, "delegated": 2, "fallbacks": {"mul": 1}, "precisions": {"fp32": 1}, "delegates": ["XnnpackBackend"]}
    (folder / executorch.FILE).write_bytes(content)
    (folder / executorch.PLAN).write_text(json.dumps({**plan, "sha256": hashlib.sha256(b"program").hexdigest(), **changes}))


def test_a_plan_belongs_to_the_bytes_of_one_program(tmp_path: Path) -> None:
    write_plan(tmp_path)
    assert executorch._read_plan(tmp_path)["nodes"] == 3
    write_plan(tmp_path, b"another program")
    with pytest.raises(ArtifactError, match=r"not the program that plan\.json describes"):
        executorch._read_plan(tmp_path)
    (tmp_path / executorch.PLAN).write_text("not a plan")
    with pytest.raises(ArtifactError, match="no sound"):
        executorch._read_plan(tmp_path)
    (tmp_path / executorch.PLAN).write_text("[]")
    with pytest.raises(ArtifactError, match="no sound"):
        executorch._read_plan(tmp_path)
    (tmp_path / executorch.FILE).unlink()
    with pytest.raises(ArtifactError, match="no sound"):
        executorch._read_plan(tmp_path)


# ---------------------------------------------------------------- threads, options, what is missing


class Pool:
    """ExecuTorch's pool of threads, as its bindings show it."""

    threads = 2

    def _threadpool_get_thread_count(self) -> int:
        return self.threads

    def _unsafe_reset_threadpool(self, threads: int) -> None:
        self.threads = threads


def test_threads_are_set_for_the_process_and_never_under_an_open_session(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    assert executorch._set_threads(pool, 1) == 1 == pool.threads
    monkeypatch.setattr(executorch, "_OPEN", {"a session"})
    assert executorch._set_threads(pool, 1) == 1 and executorch._set_threads(pool, 0) == 1
    with pytest.raises(BackendError, match="one pool of threads a process, of 1 here"):
        executorch._set_threads(pool, 2)
    assert pool.threads == 1


def test_options_and_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 is for partitioner='xnnpack'"):
        ExecuTorch(precision="int8", partitioner="coreml")
    assert [ExecuTorch(partitioner=name).device for name in ("xnnpack", "qnn", "vulkan")] == ["cpu", "npu", "gpu"]
    with pytest.raises(BackendError, match="runs one stream"):
        ExecuTorch().load(in_folder(tmp_path), threads=1, streams=2)
    monkeypatch.setattr(environments, "missing", lambda name: None)
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    assert "QNN_SDK_ROOT" in (ExecuTorch(partitioner="qnn").probe() or "") and ExecuTorch().probe() is None
    monkeypatch.setattr(environments, "missing", lambda name: f"the environment {name} is not installed")
    assert ExecuTorch().probe() == "the environment executorch is not installed"
    with pytest.raises(BackendError, match="is not installed"):
        ExecuTorch().compile(None, CompileContext(SHAPE, tmp_path, lambda: None))  # type: ignore[arg-type]


# ---------------------------------------------------------------- with the environment


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(tiny_vit(), SHAPE, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def compiled(export: TorchExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fp32/, int8/ and portable/, each an artifact, and images.npy."""
    if (missing := environments.missing("executorch")) is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("compiled")
    np.save(folder / "images.npy", np.random.default_rng(1).normal(size=SHAPE).astype(np.float32))
    calibration = np.random.default_rng(2).normal(size=(3, *SHAPE[1:])).astype(np.float32)
    backends = {"fp32": ExecuTorch(), "int8": ExecuTorch(precision="int8"), "portable": ExecuTorch(partitioner="none")}
    for name, backend in backends.items():
        (folder / name).mkdir()
        notes: dict[str, str] = {}
        path = backend.compile(export, CompileContext(SHAPE, folder / name, lambda: calibration, note=notes.__setitem__))
        assert notes.get("held-out search") == ("graphs run: 1, on 1 images" if name == "int8" else None)
        assert path == folder / name / executorch.FILE
        assert {file.name for file in path.parent.iterdir()} == {executorch.FILE, executorch.PLAN}
    return folder


LOADED = """
import dataclasses, json, sys
from pathlib import Path
import numpy as np
from edgejoule.compile.executorch import ExecuTorch
from edgejoule.errors import ArtifactError, BackendError
from tests.networks import in_folder
folder, said = Path(sys.argv[1]), {}
images = np.load(folder / "images.npy")
def load(name, threads=1):
    return ExecuTorch().load(in_folder(folder / name), threads)
def refusal(work):
    try:
        work()
    except (ArtifactError, BackendError) as error:
        return f"{type(error).__name__}: {error}"
for name in ("fp32", "int8", "portable"):
    session = load(name)
    logits = session.infer(images)["logits"]
    kept = logits.copy()
    session.infer(np.ascontiguousarray(images[::-1]))
    said[name] = {"logits": kept.tolist(), "type": str(kept.dtype), "info": dataclasses.asdict(session.info())}
    said[name]["placement"] = dataclasses.asdict(session.audit(images))
    said[name]["overwritten"] = bool((kept != logits).any())
    said[name]["refused"] = [refusal(lambda: session.infer(images[:1])), refusal(lambda: session.infer(images.astype("float64")))]
    said["pool"] = refusal(lambda: load("fp32", 2))
    session.close()
said["packages"] = sorted({"executorch.exir", "torchao", "timm", "onnx", "scipy"} & set(sys.modules))
two = load("fp32", 2)
said["two"] = two.info().threads
said["close"] = float(abs(two.infer(images)["logits"] - np.float32(said["fp32"]["logits"])).max())
two.close()
content, plan = (folder / "fp32/model.pte").read_bytes(), json.loads((folder / "fp32/plan.json").read_text())
for name, changed in {"junk": b"no model" * 99, "cut": content[: len(content) // 2], "weights": content[:-5000] + bytes(5000)}.items():
    (folder / name).mkdir()
    (folder / name / "model.pte").write_bytes(changed)
    (folder / name / "plan.json").write_text(json.dumps(plan))
    said[name] = [refusal(lambda: load(name))]
    if name != "weights":  # the runtime itself sees these two
        import hashlib
        (folder / name / "plan.json").write_text(json.dumps({**plan, "sha256": hashlib.sha256(changed).hexdigest()}))
        said[name].append(refusal(lambda: load(name)))
(folder / "fp32/plan.json").write_text(json.dumps({**plan, "delegates": ["TeapotBackend"]}))
said["delegate"] = refusal(lambda: load("fp32"))
(folder / "fp32/plan.json").write_text(json.dumps(plan))
print(json.dumps(said))
"""


def there(*argv: str, cwd: Path = ROOT) -> Any:
    """What a script prints in the environment, as JSON."""
    python = environments.python_of("executorch")
    assert python is not None
    done = subprocess.run([python, *argv], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said(compiled: Path) -> Any:
    """All that sessions in the environment said of the files, in one process."""
    return there("-c", LOADED, str(compiled))


@pytest.fixture(scope="module")
def wanted(export: TorchExport, compiled: Path) -> Any:
    with torch.no_grad():
        return export.module(torch.from_numpy(np.load(compiled / "images.npy"))).numpy()


def test_fp32_is_the_network_and_one_delegate_takes_all_of_it(said: Any, wanted: Any) -> None:
    told = said["fp32"]
    assert told["type"] == "float32" and relative(np.float32(told["logits"]), wanted) < EXACT
    assert told["info"]["precision"] == "fp32" and told["info"]["providers"] == ["XnnpackBackend"]
    assert told["info"]["threads"] == 1 and told["info"]["runtime"].startswith("executorch 1.")
    assert told["info"]["inputs"] == [{"name": "images", "shape": list(SHAPE), "dtype": "float32"}]
    assert told["info"]["outputs"] == [{"name": "logits", "shape": [2, 10], "dtype": "float32"}]
    assert told["placement"]["delegated"] == told["placement"]["nodes"] > 30 and told["placement"]["fallbacks"] == {}
    assert told["placement"]["precisions"] == {"fp32": 6}  # patch embedding, qkv, projection, two of the MLP, head


def test_int8_is_int8_in_every_product_with_weights(said: Any, wanted: Any) -> None:
    told = said["int8"]
    assert 1e-4 < relative(np.float32(told["logits"]), wanted) < 0.1
    assert told["info"]["precision"] == "int8" and told["placement"]["precisions"] == {"int8": 6}
    assert told["placement"]["fallbacks"] == {}


def test_portable_operators_are_fallbacks_by_name(said: Any, wanted: Any) -> None:
    told = said["portable"]
    assert relative(np.float32(told["logits"]), wanted) < EXACT
    assert told["placement"]["delegated"] == 0 and told["info"]["providers"] == ["portable"]
    assert told["placement"]["fallbacks"]["native_layer_norm"] == 3 and set(told["placement"]["precisions"]) == {"fp32"}


def test_results_are_copies_and_images_must_fit(said: Any) -> None:
    for name in ("fp32", "int8", "portable"):
        assert not said[name]["overwritten"]
        assert "expected float32 (2, 3, 32, 32)" in said[name]["refused"][0] and "images are float64" in said[name]["refused"][1]


def test_the_pool_of_threads_is_the_sessions(said: Any) -> None:
    assert said["pool"].startswith("BackendError: executorch has one pool of threads a process, of 1 here")
    assert said["two"] == 2 and said["close"] < 1e-4


def test_loading_imports_no_compiler(said: Any) -> None:
    assert said["packages"] == []


@pytest.mark.parametrize("damage", ["junk", "cut", "weights"])
def test_damaged_files_are_refused_by_their_hash_and_by_the_runtime(damage: str, said: Any) -> None:
    assert "not the program that plan.json describes" in said[damage][0]
    assert all(line.startswith("ArtifactError: executorch cannot load") for line in said[damage][1:])


def test_a_delegate_that_the_runtime_lacks_is_named(said: Any) -> None:
    assert said["delegate"].startswith("BackendError: this executorch was built without TeapotBackend (it has ")


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_the_handed_over_lines_run_without_edgejoule(name: str, compiled: Path, said: Any) -> None:
    artifact = dataclasses.replace(in_folder(compiled / name), batch=2)
    told = ExecuTorch().handover(artifact)
    assert len(told.python.splitlines()) <= 10 and "model.pte" in told.cpp and told.install.startswith("pip install executorch==")
    script = told.python + (
        "import json, sys\n"
        "logits = run(np.load('../images.npy'))\n"
        "assert not [module for module in sys.modules if module.startswith('edgejoule')]\n"
        "print(json.dumps(logits.tolist()))"
    )
    assert np.allclose(there("-I", "-W", "ignore", "-c", script, cwd=compiled / name), said[name]["logits"], atol=1e-5)
