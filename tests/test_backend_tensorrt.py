"""What TensorRT is handed is strongly typed and computes what the network computes; what it needs where it is not, it says.

TensorRT itself is not to be had here: sessions run on tests/fakes/tensorrt.py, which has its signatures and onnxruntime's arithmetic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile.export import TorchExport
from edgejoule.compile.strongly_typed import write_strongly_typed
from edgejoule.compile.tensorrt import FACTS, FILE, PYTHON, TensorRt
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.seams import CompileContext
from tests.fakes import tensorrt as fake
from tests.networks import in_folder, live

SHAPE = (1, 3, 160, 160)
FLOAT, HALF, INT8 = 1, 10, 3  # onnx.TensorProto


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(live("test_vit"), SHAPE, tmp_path_factory.mktemp("export"), "test_vit")


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(1).normal(size=(4, *SHAPE[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def compiled(export: TorchExport, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """precision -> (folder, notes), made once."""
    made: dict[str, tuple[Path, dict[str, str]]] = {}

    def of(precision: str) -> tuple[Path, dict[str, str]]:
        if precision not in made:
            folder, notes = tmp_path_factory.mktemp(precision), {}
            context = CompileContext(SHAPE, folder, lambda: images, note=lambda what, chosen: notes.__setitem__(what, chosen))
            assert registry.create("backend", f"tensorrt(precision={precision!r})").compile(export, context) == folder / FILE
            made[precision] = folder, notes
        return made[precision]

    return of


def logits_of(file: Path, images: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file))
    return np.concatenate([session.run(None, {"images": images[i : i + 1]})[0] for i in range(len(images))])


def wanted(export: TorchExport, images: Any) -> Any:
    import torch

    with torch.inference_mode():
        return export.module(torch.from_numpy(images)).numpy()


def relative(logits: Any, reference: Any) -> float:
    return float((np.linalg.norm(logits - reference, axis=1) / np.linalg.norm(reference, axis=1)).max())


def typed(file: Path) -> tuple[Any, dict[str, int]]:
    """The file, and the type of every tensor in it, as ONNX infers it."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True)
    graph = model.graph
    types = {port.name: port.type.tensor_type.elem_type for port in (*graph.value_info, *graph.input, *graph.output)}
    return model, types | {weight.name: weight.data_type for weight in graph.initializer}


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-6), ("fp16", 1e-5, 1e-2), ("int8", 1e-4, 0.15)])
def test_what_is_handed_over_computes_the_network(
    precision: str, least: float, most: float, compiled: Any, export: TorchExport, images: Any
) -> None:
    assert least <= relative(logits_of(compiled(precision)[0] / FILE, images), logits_of(export.onnx, images)) < most


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_norms_are_float_and_everything_else_half(precision: str, compiled: Any) -> None:
    model, types = typed(compiled(precision)[0] / FILE)
    assert [types[port.name] for port in (*model.graph.input, *model.graph.output)] == [FLOAT, FLOAT]
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 13 and all(types[name] == FLOAT for node in norms for name in (*node.input, *node.output))
    others = [node for node in model.graph.node if node.op_type in ("Softmax", "Gelu", "Gemm", "MatMul", "Conv", "Add", "Mul")]
    assert len(others) > 60 and all(types[name] == HALF for node in others for name in node.output)
    assert sum(node.op_type == "Cast" for node in model.graph.node) <= 2 * len(norms) + 3  # none but around the norms and at the ports


def test_int8_is_symmetric_per_channel_and_of_products_with_weights_only(compiled: Any) -> None:
    from onnx import numpy_helper

    model, types = typed(compiled("int8")[0] / FILE)
    constants = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 3 * 20 and all(types[node.input[2]] == INT8 and not constants[node.input[2]].any() for node in pairs)
    made = {node.output[0]: node for node in pairs}
    reading = {
        node.op_type for node in model.graph.node for name in node.input if name in made and made[name].op_type == "DequantizeLinear"
    }
    assert reading <= {"Gemm", "Conv", "MatMul"}  # no norm, softmax, GELU, addition or attention product reads int8
    weights = [made[node.input[1]] for node in model.graph.node if node.op_type in ("Gemm", "Conv") and node.input[1] in made]
    assert len(weights) >= 20 and all(
        constants[dq.input[1]].size == max(constants[dq.input[0]].shape[i] for i in (0, 1))
        or constants[dq.input[1]].size in constants[dq.input[0]].shape
        for dq in weights
    )
    assert all(types[node.input[2]] == HALF for node in model.graph.node if node.op_type in ("Gemm", "Conv") and len(node.input) > 2)


def test_products_are_counted_by_what_their_types_say(compiled: Any) -> None:
    counts = {p: list(json.loads((compiled(p)[0] / FACTS).read_text()).values()) for p in ("fp32", "fp16", "int8")}
    assert counts["fp32"] == ["fp32"] * 26 and counts["fp16"] == ["fp16"] * 26
    assert len(counts["int8"]) == 26 and counts["int8"].count("int8") > 20 and set(counts["int8"]) <= {"int8", "fp16"}
    assert "quantizer" in compiled("int8")[1]


def network(body: str, folder: Path) -> TorchExport:
    """Convolution, then ``body`` of its large activations x (1, 8, 4, 4), then a linear layer."""
    import torch

    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(128, 5)

        def forward(self, images: Any) -> Any:
            x = self.first(images) * 900.0
            return self.head(eval(body, {"torch": torch, "x": x}).flatten(1))

    return TorchExport(Large().eval(), (1, 3, 8, 8), folder)


@pytest.mark.parametrize(
    "norm",
    ["x * torch.rsqrt(x.pow(2).mean((1, 2, 3), keepdim=True) + 1e-6)", "x / torch.sqrt((x * x).mean((1, 2, 3), keepdim=True))"],
)
def test_what_leaves_half_precisions_range_stays_in_float32(norm: str, tmp_path: Path) -> None:
    """The squares are near a million: rounded to half precision they would be infinite, and the logits nothing but the bias."""
    import onnx
    import onnxruntime

    export = network(norm, tmp_path / "export")
    small = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    TensorRt("fp16").compile(export, CompileContext((1, 3, 8, 8), tmp_path, lambda: small))
    assert relative(logits_of(tmp_path / FILE, small), wanted(export, small)) < 1e-2
    model, types = typed(tmp_path / FILE)
    names = [name for node in model.graph.node for name in node.output if types[name] in (FLOAT, HALF)]
    del model.graph.output[:]
    model.graph.output.extend([onnx.helper.make_tensor_value_info(name, types[name], None) for name in names])
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": small})
    largest = {name: np.abs(values.astype(np.float64)).max() for name, values in zip(names, found, strict=True)}
    assert max(largest.values()) > 1e5 and all(types[name] == FLOAT for name, value in largest.items() if value > 30000)
    assert HALF in types.values()


def small_quantised(folder: Path, kind: str, zero: int, bias: str) -> Path:
    """images (1, 4) -> Q/DQ -> Gemm with int8 weights -> logits (1, 2)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "scale": np.float32(0.1),
        "zero": np.array(zero, kind),
        "w": np.array([[3, -4], [5, 6], [-7, 8], [9, 1]], np.int8),
        "w_scale": np.float32([0.02, 0.03]),
        "w_zero": np.zeros(2, np.int8),
        "b": np.int32([100, -200]),
        "b_scale": np.float32([0.002, 0.003]),
        "b_float": np.float32([0.2, -0.6]),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "dq"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["weight"], "dw", axis=1),
        helper.make_node("DequantizeLinear", ["b", "b_scale"], ["bias"], "db", axis=0),
        helper.make_node("Gemm", ["x", "weight", bias], ["logits"], "gemm"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n]) for name, n in (("images", 4), ("logits", 2))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    path = folder / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_biases_in_int32_are_written_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    source, target = small_quantised(tmp_path, "int8", 0, "bias"), tmp_path / FILE
    assert write_strongly_typed(source, target, "fp32") == {"gemm": "int8"}
    x = np.float32([[1.0, -2.0, 0.5, 3.0]])
    model, types = typed(target)
    assert 6 not in types.values() and [node.name for node in model.graph.node] == ["q", "dq", "dw", "gemm"]  # 6: INT32
    assert np.allclose(logits_of(target, x), logits_of(source, x), atol=1e-6)


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 128), ("uint8", 0), ("int8", 3)])
def test_asymmetric_quantisation_is_refused(kind: str, zero: int, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="not symmetric int8"):
        write_strongly_typed(small_quantised(tmp_path, kind, zero, "b_float"), tmp_path / FILE, "fp16")


# ---------------------------------------------------------------- without TensorRT, and with a stand-in for it


def test_what_is_missing_is_said_and_loading_says_the_same(compiled: Any) -> None:
    backend = TensorRt()
    if (why := backend.runs_here()) is None:
        pytest.skip("this machine has TensorRT")
    assert backend.probe() is None and "\n" not in why and "JetPack" in why
    with pytest.raises(BackendError) as caught:
        backend.load(in_folder(compiled("fp16")[0]), threads=1)
    assert str(caught.value) == why
    with pytest.raises(SpecError):
        registry.create("backend", "tensorrt(workspace_mib=-1)")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """(version, layers) -> what was built; TensorRT and CUDA are importable after the call."""

    def put(version: str = "10.3.0", layers: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        found, built = fake.modules(version, layers)
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setenv("EDGEJOULE_CACHE", str(tmp_path / "cache"))
        return built

    return put


@pytest.mark.parametrize("version", ["10.3.0", "11.1.0.106"])
def test_a_session_computes_and_builds_its_engine_once(
    version: str, stand_in: Any, compiled: Any, images: Any, export: TorchExport
) -> None:
    built, folder = stand_in(version), compiled("fp16")[0]
    backend = registry.create("backend", "tensorrt(workspace_mib=512)")
    session = backend.load(in_folder(folder), threads=1)
    before = images[:1].copy()
    first = session.infer(images[:1])["logits"]
    kept = first.copy()
    strided = np.asfortranarray(images[1:2])
    assert relative(session.infer(strided)["logits"], wanted(export, images[1:2])) < 1e-2
    assert first.dtype == np.float32 and first.shape == (1, 1000) and (first == kept).all() and (images[:1] == before).all()
    assert relative(first, wanted(export, images[:1])) < 1e-2
    info = session.info()
    assert (info.precision, info.providers, info.runtime, info.threads) == ("fp16", ("Orin Nano",), f"tensorrt {version}", 1)
    assert [(port.name, port.shape, port.dtype) for port in (*info.inputs, *info.outputs)] == [
        ("images", SHAPE, "float32"),
        ("logits", (1, 1000), "float32"),
    ]
    for wrong in (images, images[:1].astype(np.float64), images[:1, :, :-1]):
        with pytest.raises(BackendError, match="expected float32"):
            session.infer(wrong)
    assert built["memory"]
    session.close()
    assert not built["memory"]  # all device memory is given back
    (config,) = built["configs"]
    assert built["flags"] == [2] and config.cleared == ["TF32"] and config.limits == {"WORKSPACE": 512 * 2**20}
    assert config.profiling_verbosity == "DETAILED"
    backend.load(in_folder(folder), threads=1).close()
    assert len(built["configs"]) == 1  # from the cache
    registry.create("backend", "tensorrt").load(in_folder(folder), threads=1).close()
    assert len(built["configs"]) == 2  # another limit is another engine


def test_a_damaged_engine_in_the_cache_is_built_again(stand_in: Any, compiled: Any, images: Any, tmp_path: Path) -> None:
    built = stand_in()
    for _ in range(2):
        session = TensorRt().load(in_folder(compiled("fp16")[0]), threads=1)
        assert np.isfinite(session.infer(images[:1])["logits"]).all()
        (engine,) = (tmp_path / "cache" / "engines").iterdir()
        engine.write_bytes(b"cut")
    assert len(built["configs"]) == 2


def test_precision_and_placement_are_the_engines_own_words(stand_in: Any, compiled: Any, images: Any) -> None:
    names = list(json.loads((compiled("int8")[0] / FACTS).read_text()))
    said = [("gemm", "Int8", name) for name in names[:20]] + [("gemm", "Half", name) for name in names[20:]] + [("kgen", "Half", "softmax")]
    layers = [
        {"LayerType": kind, "Inputs": [{"Format/Datatype": dtype}], "Metadata": f"[ONNX Layer: {name}]"} for kind, dtype, name in said
    ]
    stand_in(layers=layers)
    session = TensorRt("int8").load(in_folder(compiled("int8")[0]), threads=1)
    placement = session.audit(images[:1])
    assert (placement.nodes, placement.precisions) == (27, {"int8": 20, "fp16": 6}) and session.info().precision == "int8"
    stand_in(layers=[{**layer, "Inputs": [{"Format/Datatype": "Half"}]} for layer in layers])
    assert TensorRt("int8").load(in_folder(compiled("int8")[0]), threads=1).info().precision == "fp16"  # as it ran, not as asked


def test_files_and_machines_that_do_not_fit(stand_in: Any, compiled: Any, tmp_path: Path) -> None:
    stand_in()
    for name, content in ((FILE, b"not a model"), (FACTS, b"not a model"), (FILE, b"")):
        for file in compiled("fp16")[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="compile again"):
            TensorRt().load(in_folder(tmp_path), threads=1)
    with pytest.raises(BackendError, match="one stream"):
        TensorRt().load(in_folder(compiled("fp16")[0]), threads=1, streams=2)
    stand_in("8.6.1")
    assert "strongly typed" in str(TensorRt().runs_here())
    sys.modules["cuda.bindings.runtime"].cudaGetDeviceCount = lambda: (100,)  # type: ignore[attr-defined]
    stand_in("10.3.0")
    sys.modules["cuda.bindings.runtime"].cudaGetDeviceCount = lambda: (100,)  # type: ignore[attr-defined]
    assert "no GPU" in str(TensorRt().runs_here())


def test_the_handover_runs_without_edgejoule(stand_in: Any, compiled: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built, folder = stand_in(), compiled("fp16")[0]
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "edgejoule", None)  # an import of it would fail
    scope: dict[str, Any] = {}
    exec(PYTHON, scope)
    assert (scope["run"](images[:1]) == logits_of(folder / FILE, images[:1])).all() and not built["memory"]
    how = TensorRt().handover(in_folder(folder))
    assert how.python == PYTHON and "enqueueV3" in how.cpp and "trtexec" in how.cpp and "pip install tensorrt" in how.install
