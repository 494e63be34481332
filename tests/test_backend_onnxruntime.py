"""ONNX Runtime in int8: what it computes, what its own profile says it ran, and the optimisation that corrupts quantised attention."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile import onnxruntime as leaf
from edgejoule.compile.export import TorchExport
from edgejoule.compile.onnxruntime_int8 import OVERFLOW, compare_with_plain, widen_softmax
from edgejoule.compile.onnxruntime_sessions import open_session, placement
from edgejoule.compile.quantize import Chosen
from edgejoule.errors import BackendError, SpecError
from edgejoule.records import Placement
from edgejoule.seams import CompileContext
from tests.networks import in_folder, live

BATCH = 2
SHAPE = (BATCH, 3, 160, 160)
STATIC = 'onnxruntime(precision="int8", search=False, smoothing="off", ranges="minmax")'
ATTENTION = 'onnxruntime(precision="int8", scope="attention", search=False, smoothing="off", ranges="minmax")'
DYNAMIC = 'onnxruntime(precision="int8", mode="dynamic")'
NETWORKS = ("test_vit", "test_efficientnet")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchExport]:
    return {name: TorchExport(live(name), SHAPE, tmp_path_factory.mktemp(name), name) for name in NETWORKS}


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def compiled(exports: dict[str, TorchExport], images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(spelling, network) -> the folder of the compiled file and its notes, made once."""
    made: dict[tuple[str, str], tuple[Path, dict[str, str]]] = {}

    def folder_of(spelling: str, network: str = "test_vit") -> tuple[Path, dict[str, str]]:
        if (spelling, network) not in made:
            folder, notes = tmp_path_factory.mktemp("artifact"), dict[str, str]()
            seen = np.concatenate([images, images[:, :, ::-1, ::-1] * 0.9])
            context = CompileContext(shape=SHAPE, workdir=folder, calibration=lambda: seen, note=notes.__setitem__)
            registry.create("backend", spelling).compile(exports[network], context)
            made[spelling, network] = folder, notes
        return made[spelling, network]

    return folder_of


def load(spelling: str, folder: Path, **options: Any) -> Any:
    return registry.create("backend", spelling).load(in_folder(folder), **{"threads": 1, **options})


def reference(export: TorchExport, images: Any) -> Any:
    import torch

    with torch.no_grad():
        return export.module(torch.from_numpy(images)).numpy()


def relative(logits: Any, wanted: Any) -> float:
    return float((np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


def weighted_modules(export: TorchExport) -> int:
    import torch

    return sum(isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)) for part in export.module.modules())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("spelling", [STATIC, ATTENTION, DYNAMIC])
def test_int8_stays_near_the_network(spelling: str, network: str, exports: Any, compiled: Any, images: Any) -> None:
    folder, _ = compiled(spelling, network)
    session = load(spelling, folder)
    logits = session.infer(images)["logits"]
    assert 1e-3 < relative(logits, reference(exports[network], images)) < 0.1  # corrupted attention is at 0.2 and more
    assert session.info().precision == "int8" and [path.name for path in folder.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("spelling", "kind"), [("onnxruntime", "fp32"), (STATIC, "int8")])
def test_the_audit_counts_every_product_with_weights(
    spelling: str, kind: str, network: str, exports: Any, compiled: Any, images: Any
) -> None:
    found = load(spelling, compiled(spelling, network)[0]).audit(images)
    assert found.precisions == {kind: weighted_modules(exports[network])}  # 12 products of two activations are none of them
    assert found.nodes == found.delegated > 20 and found.fallbacks == {}


def test_grouped_convolutions_stay_in_float_where_activations_are_dynamic(exports: Any, compiled: Any, images: Any) -> None:
    grouped = sum(getattr(part, "groups", 1) > 1 for part in exports["test_efficientnet"].module.modules())
    found = load(DYNAMIC, compiled(DYNAMIC, "test_efficientnet")[0]).audit(images)
    assert found.precisions == {"int8": weighted_modules(exports["test_efficientnet"]) - grouped, "fp32": grouped}


def test_what_was_chosen_is_noted(compiled: Any) -> None:
    for spelling in (STATIC, ATTENTION):
        notes = compiled(spelling)[1]
        assert notes["quantized"].startswith("26 of 26") and notes["optimised against plain"].endswith("of the logits' norm apart")
        assert "softmax ranges widened" not in notes  # a softmax is float on one side at least


def test_an_audit_leaves_no_file_behind(compiled: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compiled(STATIC)[0]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    load(STATIC, folder).audit(images)
    assert list(tmp_path.iterdir()) == [] and [path.name for path in folder.iterdir()] == ["model.onnx"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(BackendError, match="cannot profile"):
        load(STATIC, folder).audit(images)


def node(op: str, provider: str, *tensors: dict[str, list[int]], parameters: int = 0) -> dict[str, Any]:
    told = {"op_name": op, "provider": provider, "input_type_shape": list(tensors), "parameter_size": str(parameters)}
    return {"cat": "Node", "name": f"{op}_kernel_time", "args": told}


def test_a_profile_says_what_fell_back_and_which_products_have_weights() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "a_fence_before", "args": {"op_name": "MatMul"}},
        node("MatMul", cuda, {"float16": [1, 8, 16]}, {"float16": [16, 32]}, parameters=1024),
        node("MatMul", cuda, {"float": [1, 8, 16]}),  # its weight was packed beforehand
        node("FusedMatMul", cuda, {"float": [1, 2, 8, 16]}, {"float": [1, 2, 8, 16]}),  # of two activations
        node(
            "QLinearMatMul", cuda, {"uint8": [2, 8, 16]}, {"float": []}, {"uint8": []}, {"uint8": [2, 16, 8]}, {"float": []}, parameters=15
        ),
        node("DynamicQuantizeMatMul", cpu, {"float": [8, 16]}, {"float": [32]}, {"int8": [32]}, parameters=160),
        node("ConvInteger", cpu, {"uint8": [1, 3, 8, 8]}, {"uint8": [4, 3, 1, 1]}, {"uint8": []}, parameters=13),
        node("Softmax", cpu, {"float": [1, 2, 8, 8]}),
    ]
    assert placement(events, cuda) == Placement(
        7, 4, {"DynamicQuantizeMatMul": 1, "ConvInteger": 1, "Softmax": 1}, {"fp16": 1, "fp32": 1, "int8": 2}
    )


def test_a_file_that_runs_mostly_in_float_is_not_called_int8(exports: Any, images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(leaf, "audit_file", lambda *args, **kwargs: Placement(9, 9, {}, {"int8": 2, "fp32": 3}))
    context = CompileContext(shape=SHAPE, workdir=tmp_path, calibration=lambda: images[:1])  # fewer than a batch
    registry.create("backend", DYNAMIC).compile(exports["test_vit"], context)
    assert load(DYNAMIC, tmp_path).info().precision == "fp32+int8"


def test_threads_may_call_at_once(compiled: Any, images: Any) -> None:
    session = load(STATIC, compiled(STATIC)[0], threads=2, streams=2)
    feeds = [np.ascontiguousarray(images * scale) for scale in (1.0, 0.5, -1.0, 2.0)]
    alone = [session.infer(feed)["logits"] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda feed: session.infer(feed)["logits"], feeds * 4))
    assert all(np.allclose(logits, alone[place % 4], atol=1e-5) for place, logits in enumerate(together))
    assert not np.allclose(alone[0], alone[1], atol=1e-3)


@pytest.mark.parametrize(("threads", "streams", "intra"), [(4, 1, 4), (4, 2, 3), (4, 4, 1), (1, 3, 1)])
def test_workers_and_callers_are_the_threads(threads: int, streams: int, intra: int, compiled: Any) -> None:
    session = load("onnxruntime", compiled("onnxruntime")[0], threads=threads, streams=streams)
    assert session._session.get_session_options().intra_op_num_threads == intra
    assert session.info().threads == max(threads, streams)


@pytest.mark.parametrize("spelling", ["onnxruntime", STATIC])
def test_the_hand_over_runs_without_edgejoule(spelling: str, compiled: Any, images: Any, tmp_path: Path) -> None:
    folder = compiled(spelling)[0]
    told = registry.create("backend", spelling).handover(in_folder(folder))
    np.save(tmp_path / "images.npy", images)
    after = (
        "import sys, numpy\nnumpy.save(sys.argv[2], run(numpy.load(sys.argv[1])))\nassert not {'edgejoule', 'torch'} & set(sys.modules)\n"
    )
    argv = [sys.executable, "-I", "-c", told.python + after, str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    subprocess.run(argv, cwd=folder, check=True, timeout=60)
    assert np.allclose(np.load(tmp_path / "logits.npy"), load(spelling, folder).infer(images)["logits"], atol=1e-5)
    assert len(told.python.splitlines()) <= 10 and "onnxruntime" in told.install
    assert 'ORT_TSTR("model.onnx")' in told.cpp and told.cpp.count("{") == told.cpp.count("}")
    assert ("x64quantprecision" in told.python) == ("x64quantprecision" in told.cpp) == (spelling == STATIC)


@pytest.mark.parametrize(
    "spelling",
    [
        'onnxruntime(mode="dynamic")',
        'onnxruntime(scope="all")',
        'onnxruntime(precision="int8", mode="dynamic", search=False)',
        'onnxruntime(precision="fp16")',
        'onnxruntime(precision="int8", smoothing="most")',
    ],
)
def test_options_that_do_not_go_together(spelling: str) -> None:
    with pytest.raises(SpecError):
        registry.create("backend", spelling)


def test_int8_on_a_gpu_is_refused() -> None:
    assert "use tensorrt" in registry.create("backend", 'onnxruntime(precision="int8", device="cuda")').probe()


# ---------------------------------------------------------------- the optimisation that corrupts (docs/decisions/0009)


def softmax_file(path: Path, values: Any, scale: float, quantized: bool = True, moved: bool = False) -> Path:
    """(1, 3, 8, D) -> Q, DQ -> Softmax -> Q, DQ -> (1, 24 D): all that there is between two quantised attention products."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    depth = values.shape[-1]
    step = float(values.max() - values.min()) / 255
    constants = {"step": np.float32(step), "zero": np.uint8(round(-float(values.min()) / step)), "scale": np.float32(scale)}
    constants |= {"nil": np.uint8(0), "flat": np.array([1, -1])}
    nodes = [("QuantizeLinear", ["x", "step", "zero"], "xq"), ("DequantizeLinear", ["xq", "step", "zero"], "xd")] if quantized else []
    nodes += [("Softmax", ["xd" if quantized else "x"], "s")]
    nodes += [("Transpose", ["s"], "t")] if moved else []
    last = "t" if moved else "s"
    nodes += [("QuantizeLinear", [last, "scale", "nil"], "q"), ("DequantizeLinear", ["q", "scale", "nil"], "d")] if quantized else []
    nodes += [("Reshape", ["d" if quantized else last, "flat"], "logits")]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes],
        "softmax",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, depth])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 24 * depth])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def run(path: Path, values: Any, plain: bool = False) -> Any:
    return open_session(path, "cpu", 1, int8=True, plain=plain).run(None, {"x": values})[0]


@pytest.fixture
def calm() -> Any:
    """Attention scores that are nearly equal, as in a network with random weights."""
    return np.random.default_rng(0).normal(scale=0.02, size=(1, 3, 8, 101)).astype(np.float32)


@pytest.mark.parametrize("moved", [False, True])
def test_a_quantised_softmax_of_nearly_equal_scores_is_kept_from_overflowing(moved: bool, calm: Any, tmp_path: Path) -> None:
    import onnx

    path = softmax_file(tmp_path / "model.onnx", calm, scale=1.1 / 101 / 255, moved=moved)
    plain = run(path, calm, plain=True)
    assert relative(plain, run(softmax_file(tmp_path / "float.onnx", calm, 1.0, quantized=False, moved=moved), calm)) < 0.01
    spoiled = relative(run(path, calm), plain)
    model = onnx.load(path)
    assert widen_softmax(model) == 1 and widen_softmax(model) == 0
    onnx.save(model, path)
    assert relative(run(path, calm), plain) < 0.01
    if spoiled < 0.5 and not moved:
        pytest.skip(f"this onnxruntime computes it right (error {spoiled:.2g}): widening could go")


@pytest.mark.parametrize(("factor", "sound"), [(0.98, False), (1.01, True)])
def test_the_overflow_begins_where_the_decision_says(factor: float, sound: bool, calm: Any, tmp_path: Path) -> None:
    import onnx

    assert math.isclose(OVERFLOW, 1 / 148.41, rel_tol=1e-4)
    path = softmax_file(tmp_path / "model.onnx", calm, scale=factor * OVERFLOW / 101)
    apart = relative(run(path, calm), run(path, calm, plain=True))
    if not sound and apart < 0.01:
        pytest.skip("this onnxruntime computes it right")
    assert (apart < 0.01) is sound
    assert (widen_softmax(onnx.load(path)) == 0) is sound


def test_a_file_that_optimising_corrupts_is_not_given_out(calm: Any, tmp_path: Path) -> None:
    exact = softmax_file(tmp_path / "float.onnx", calm, 1.0, quantized=False)
    sound = softmax_file(tmp_path / "sound.onnx", calm, scale=1.1 * OVERFLOW / 101)
    assert compare_with_plain(exact, sound, calm, 1) < 0.01
    corrupt = softmax_file(tmp_path / "corrupt.onnx", calm, scale=1.1 / 101 / 255)
    if relative(run(corrupt, calm), run(corrupt, calm, plain=True)) < 0.5:
        pytest.skip("this onnxruntime computes it right")
    with pytest.raises(BackendError, match="optimisations change this int8 file's logits by 1 of their norm"):
        compare_with_plain(exact, corrupt, calm, 1)


def quantize_everything_around_softmax(source: Path, context: CompileContext, options: Any, target: Path) -> Chosen:
    """As onnxruntime's own quantiser does when it is asked for linear, convolution and MatMul: the file that was seen to break."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter([{"images": context.calibration()[:BATCH]}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    clean = target.with_name("clean.onnx")
    quant_pre_process(str(source), str(clean), skip_symbolic_shape=True)
    quantize_static(clean, target, Reader(), op_types_to_quantize=["MatMul", "Gemm", "Conv"], per_channel=True, weight_type=QuantType.QInt8)
    return Chosen("onnxruntime", "off", "minmax", 26, 26)


def test_the_network_that_optimising_corrupted_is_mended_or_refused(
    exports: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgejoule.compile.quantize.quantize_onnx", quantize_everything_around_softmax)
    notes: dict[str, str] = {}
    context = CompileContext(shape=SHAPE, workdir=tmp_path, calibration=lambda: images, note=notes.__setitem__)
    backend, export = registry.create("backend", STATIC), exports["test_vit"]
    backend.compile(export, context)
    assert notes["softmax ranges widened"].startswith("6,")
    assert relative(load(STATIC, tmp_path).infer(images)["logits"], reference(export, images)) < 0.1
    monkeypatch.setattr("edgejoule.compile.onnxruntime_int8.widen_softmax", lambda model: 0)
    try:
        backend.compile(export, context)
    except BackendError as error:
        assert "onnxruntime's optimisations change this int8 file's logits" in str(error)
    else:
        pytest.skip("this onnxruntime computes it right")
