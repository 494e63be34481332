"""Quantising whole ONNX files: what runs in int8, what stays float, and that the answers stand, on networks that can be trusted."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgejoule.compile.export import TorchExport
from edgejoule.compile.quantize import Options, quantize_onnx
from edgejoule.compile.quantize.score import logits_of, relative_error
from edgejoule.errors import BackendError
from edgejoule.seams import CompileContext, Held
from tests.networks import live

SIZE = 32


@dataclasses.dataclass(frozen=True)
class Trained:
    """A digits classifier as ONNX, and images (N, 3, 32, 32) that it was not trained on."""

    path: Path
    images: Any
    labels: Any


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    import torch
    from sklearn.datasets import load_digits

    from edgejoule.zoo.digits import vit_digits

    scans = load_digits()
    images = np.kron(scans.images / 8.0 - 1.0, np.ones((4, 4))).astype(np.float32)[:, None].repeat(3, axis=1)  # (N, 3, 32, 32)
    labels = scans.target.astype(np.int64)
    torch.manual_seed(0)
    module = vit_digits(num_classes=10, depth=2, embed_dim=64, num_heads=2, class_token=False, global_pool="avg")
    for parameter in (*module.parameters(), module.patch_embed.proj.weight.flatten(1)):
        if parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter.detach())  # learns in a few steps, where timm's small weights take hundreds
    torch.nn.init.normal_(module.pos_embed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=120)
    order = np.random.default_rng(0)
    for _ in range(120):
        batch = order.integers(0, 1200, 64)
        loss = torch.nn.functional.cross_entropy(module(torch.from_numpy(images[batch])), torch.from_numpy(labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path = TorchExport(module, (1, 3, SIZE, SIZE), tmp_path_factory.mktemp("digits")).onnx
    return Trained(path, images[1200:], labels[1200:])


def context(network: Trained, folder: Path, labelled: bool = True, **changes: Any) -> CompileContext:
    held = Held(network.images[24:224], network.labels[24:224] if labelled else None)
    found = CompileContext((1, 3, SIZE, SIZE), folder, lambda: network.images[:24], held=lambda: held)
    return dataclasses.replace(found, **changes)


def top1(path: Path, network: Trained) -> float:
    return float((logits_of(path, network.images[224:], 1).argmax(axis=1) == network.labels[224:]).mean())


def operators(path: Path, folder: Path) -> collections.Counter[str]:
    """What onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def sources_of(model: Any, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """{node: the operators that made its inputs}; "constant" for a weight in the file."""
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return {node.name: [made.get(name, "constant") for name in node.input if name] for node in model.graph.node if node.op_type in kinds}


def test_a_trained_vit_keeps_its_top1_on_images_that_chose_nothing(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    chosen = quantize_onnx(digits.path, context(digits, tmp_path), Options(), target)
    before, after = top1(digits.path, digits), top1(target, digits)
    assert before > 0.75 and after >= before - 0.02
    assert chosen.within_budget and chosen.drop_kind == "top-1" and chosen.held == 200 and chosen.sessions <= 24
    assert chosen.quantized == chosen.products == 10 and chosen.error is not None and chosen.error < 0.05
    assert chosen.naive_error is not None and chosen.error <= chosen.naive_error
    assert target.stat().st_size < 0.45 * digits.path.stat().st_size
    notes = chosen.notes()
    assert notes["quantized"] == "10 of 10 products with weights" and "200 images" in notes["held-out error"] and "minmax" in notes["tried"]


def test_only_linear_and_convolution_read_rounded_values(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    quantize_onnx(digits.path, context(digits, tmp_path), Options(smoothing="off", ranges="minmax"), target)
    model = onnx.load(target)
    products = sources_of(model, ("Gemm", "Conv"))
    assert len(products) == 10 and all(made == ["DequantizeLinear"] * 3 for made in products.values())
    others = sources_of(model, ("Add", "LayerNormalization", "Softmax", "Gelu", "MatMul", "Mul"))
    assert len(others) >= 16 and not any("DequantizeLinear" in made for made in others.values())
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kinds]
    assert collections.Counter(kinds[name] for name in stored) == {onnx.TensorProto.INT8: 10, onnx.TensorProto.INT32: 10}


def test_onnxruntime_multiplies_in_int8(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    quantize_onnx(digits.path, context(digits, tmp_path), Options(smoothing="off", ranges="minmax", outputs="conv"), target)
    found = operators(target, tmp_path)
    assert found["QGemm"] == 9 and found["QLinearConv"] == 1 and found["Gemm"] == found["Conv"] == 0


def test_signed_activations_are_symmetric_and_biases_may_stay_float(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    quantize_onnx(digits.path, context(digits, tmp_path), Options(smoothing="off", ranges="minmax", activations="s8", bias="float"), target)
    model = onnx.load(target)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert not any(tensor.data_type == onnx.TensorProto.INT32 for tensor in model.graph.initializer)
    assert relative_error(logits_of(target, digits.images[:20], 1), logits_of(digits.path, digits.images[:20], 1)) < 0.06


def sabotaged(network: Trained, folder: Path) -> Trained:
    """The same network, but for one channel before the head: it is ten thousand times as large, and the head's weight for it is zero."""
    model = onnx.load(network.path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    gain, head = (np.array(numpy_helper.to_array(constants[name])) for name in ("fc_norm.weight", "head.weight"))
    gain[7] *= 10000
    head[:, 7] = 0
    constants["fc_norm.weight"].CopyFrom(numpy_helper.from_array(gain, "fc_norm.weight"))
    constants["head.weight"].CopyFrom(numpy_helper.from_array(head, "head.weight"))
    onnx.save(model, folder / "sabotaged.onnx")
    return dataclasses.replace(network, path=folder / "sabotaged.onnx")


def test_the_search_finds_the_layer_that_breaks_the_budget(digits: Trained, tmp_path: Path) -> None:
    broken, target = sabotaged(digits, tmp_path), tmp_path / "q.onnx"
    options = Options(smoothing="off", ranges="minmax", search=False)
    without = quantize_onnx(broken.path, context(broken, tmp_path), options, target)
    assert without.drop_pct is not None and without.drop_pct > 5 and not without.within_budget
    lines: list[str] = []
    found = quantize_onnx(broken.path, context(broken, tmp_path, notify=lines.append), dataclasses.replace(options, search=True), target)
    assert found.within_budget and found.drop_pct is not None and found.drop_pct <= 1.0
    assert len(found.kept_float) == 1 and found.quantized == 9 and found.sessions <= 24
    (culprit,) = [node for node in onnx.load(target).graph.node if node.name == found.kept_float[0]]
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(target).graph.initializer}
    assert sorted(shapes[culprit.input[1]]) == [10, 64]
    assert top1(target, broken) >= top1(broken.path, broken) - 0.02
    assert any("ranking" in line for line in lines) and found.kept_float[0] in found.notes()["kept in float"]


def test_without_labels_the_float_networks_answers_are_the_truth(digits: Trained, tmp_path: Path) -> None:
    options = Options(smoothing="off", ranges="minmax")
    chosen = quantize_onnx(digits.path, context(digits, tmp_path, labelled=False), options, tmp_path / "q.onnx")
    assert chosen.drop_kind == "agreement" and chosen.drop_pct is not None and 0 <= chosen.drop_pct <= 1


def test_where_nothing_is_held_out_a_third_of_the_calibration_images_is(digits: Trained, tmp_path: Path) -> None:
    options = Options(smoothing="off", ranges="minmax")
    chosen = quantize_onnx(digits.path, context(digits, tmp_path, held=None), options, tmp_path / "q.onnx")
    assert chosen.held == 8 and chosen.drop_kind == "agreement"


def test_the_same_inputs_give_the_same_file(digits: Trained, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        quantize_onnx(digits.path, context(digits, tmp_path), Options(smoothing=0.5, ranges="mse"), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_a_static_batch_is_filled_up(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((7, 3, 160, 160)).astype(np.float32)
    source = TorchExport(live("test_efficientnet"), (2, 3, 160, 160), tmp_path / "float").onnx
    options = Options(smoothing="off", ranges="percentile", outputs="conv", search=False)
    found = CompileContext((2, 3, 160, 160), tmp_path, lambda: images)
    chosen = quantize_onnx(source, found, options, tmp_path / "q.onnx")
    assert chosen.held == 2 and chosen.error is not None and chosen.error < 0.12
    assert operators(tmp_path / "q.onnx", tmp_path)["QLinearConv"] == 17


def test_the_careless_way_rounds_the_residual_stream_too(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    chosen = quantize_onnx(digits.path, context(digits, tmp_path), Options(scope="all"), target)
    assert any("DequantizeLinear" in made for made in sources_of(onnx.load(target), ("Add",)).values())
    safe = quantize_onnx(digits.path, context(digits, tmp_path), Options(), tmp_path / "safe.onnx")
    assert chosen.error is not None and safe.error is not None and safe.error < 0.7 * chosen.error


def test_attention_products_are_rounded_where_asked(digits: Trained, tmp_path: Path) -> None:
    target = tmp_path / "q.onnx"
    options = Options(scope="attention", smoothing="off", ranges="minmax", search=False)
    chosen = quantize_onnx(digits.path, context(digits, tmp_path), options, target)
    made = sources_of(onnx.load(target), ("MatMul",))
    assert len(made) == 4 and all(kinds == ["DequantizeLinear"] * 2 for kinds in made.values())
    assert chosen.error is not None and chosen.error < 0.1


def test_nncf_gives_ranges_and_biases_and_the_file_is_ours(digits: Trained, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    target = tmp_path / "q.onnx"
    chosen = quantize_onnx(digits.path, context(digits, tmp_path), Options(quantizer="nncf", smoothing="off"), target)
    assert chosen.quantizer == chosen.ranges == "nncf" and chosen.error is not None and chosen.error < 0.06
    assert operators(target, tmp_path)["QGemm"] == 9
    made = sources_of(onnx.load(target), ("MatMul", "Add", "Softmax"))
    assert not any("DequantizeLinear" in kinds for kinds in made.values())


def test_a_network_without_products_is_refused(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["logits"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "relu.onnx")
    images = np.zeros((3, 3, 4, 4), dtype=np.float32)
    with pytest.raises(BackendError, match="no linear layer or convolution"):
        quantize_onnx(tmp_path / "relu.onnx", CompileContext((1, 3, 4, 4), tmp_path, lambda: images), Options(), tmp_path / "q.onnx")


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    images = np.zeros((3, 3, 4, 4), dtype=np.float32)
    with pytest.raises(BackendError, match="precision='fp32'"):
        quantize_onnx(tmp_path / "bad.onnx", CompileContext((1, 3, 4, 4), tmp_path, lambda: images), Options(), tmp_path / "q.onnx")
