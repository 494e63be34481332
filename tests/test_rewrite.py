"""Rewriting OpenVINO graphs: the same numbers in the order in which the runtime is fast, and left alone where they would not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")

from edgejoule.compile.export import TorchExport
from edgejoule.compile.openvino_attention import rewrite_attention
from edgejoule.compile.openvino_import import core, import_openvino
from edgejoule.compile.openvino_maps import rewrite_maps
from edgejoule.compile.openvino_moves import rewrite_moves
from edgejoule.compile.openvino_patches import rewrite_patches
from edgejoule.compile.openvino_restore import weighted_names
from edgejoule.compile.openvino_rewrite import fold_constants, rewrite
from edgejoule.compile.openvino_shapes import keep_axes, rewrite_masks, rewrite_norms
from tests.networks import live

openvino = import_openvino()
op = openvino.opset13
PRODUCTS = {"MatMul", "Softmax", "SoftMax"}
EXACT = 1e-5  # relative, in float32
RANDOM = np.random.default_rng(0)


def run(model: Any, *inputs: Any) -> Any:
    request = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return np.array(request.infer(list(inputs))[0])


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def of(*values: int) -> Any:
    return op.constant(np.array(values))


def normal(*shape: int) -> Any:
    return RANDOM.normal(size=shape).astype(np.float32)


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def kernels(model: Any) -> set[str]:
    """The kinds of kernel that the plugin runs."""
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return {node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()}


def attention(transposed: bool = True, interleaved: bool = False, leak: bool = False, int8: bool = False) -> Any:
    """(B, N, D) -> (B, N, D): timm's attention as exporters write it; ``interleaved``: each head's q, k, v lie together (TinyViT)."""
    batch, tokens, heads, width, dim = 2, 5, 2, 6, 12
    x = op.parameter([batch, tokens, dim], np.float32)
    weights = op.constant(normal(dim, 3 * dim))
    if int8:
        whole = op.convert(op.constant(RANDOM.integers(-127, 127, (dim, 3 * dim)).astype(np.int8)), "f32")
        weights = op.multiply(whole, op.constant(np.abs(normal(1, 3 * dim)) / 64))
    linear = op.add(op.matmul(x, weights, False, False), op.constant(normal(3 * dim)))
    shape, order = ((heads, 3), (3, 0, 2, 1, 4)) if interleaved else ((3, heads), (2, 0, 3, 1, 4))
    parts = op.split(op.transpose(op.reshape(linear, of(batch, tokens, *shape, width), False), of(*order)), op.constant(0), 3)
    q, k, v = (op.squeeze(part, of(0)) for part in parts.outputs())
    scale = op.constant(np.float32(0.7))
    if transposed:
        scores = op.matmul(op.multiply(q, scale), op.multiply(op.transpose(k, of(0, 1, 3, 2)), scale), False, False)
    else:
        scores = op.matmul(op.multiply(q, scale), k, False, True)
    found = op.reshape(op.transpose(op.matmul(op.softmax(scores, -1), v, False, False), of(0, 2, 1, 3)), of(batch, tokens, dim), False)
    if leak:
        found = op.add(found, op.reduce_mean(linear, of(2), True))
    return openvino.Model([op.result(found)], [x])


@pytest.mark.parametrize("options", [{}, {"transposed": False}, {"interleaved": True}, {"int8": True}], ids=str)
def test_attention_is_put_in_order_and_answers_the_same(options: dict[str, bool]) -> None:
    model = attention(**options)
    images, names = normal(2, 5, 12), weighted_names(model)
    wanted = run(model, images)
    assert rewrite_attention(model) == 1
    model.validate_nodes_and_infer_types()
    assert distance(run(model, images), wanted) < EXACT
    assert "Multiply" not in kinds(model) or options.get("int8"), "the scale is in the weights"
    assert weighted_names(model) == names
    if options.get("int8"):
        kept = {node.get_element_type().to_string() for node in model.get_ops() if node.get_type_name() == "Constant"}
        assert "i8" in kept, "int8 weights stay int8"


def test_attention_whose_layer_something_else_reads_is_left_alone() -> None:
    model = attention(leak=True)
    before = kinds(model)
    assert rewrite_attention(model) == 0
    assert kinds(model) == before


@pytest.mark.parametrize("swapped", [False, True])
def test_attention_over_tokens_in_another_order_is_left_alone(swapped: bool) -> None:
    x, keys = op.parameter([1, 4, 8], np.float32), op.parameter([1, 2, 4, 4], np.float32)
    linear = op.matmul(x, op.constant(normal(8, 8)), False, False)
    tokens = op.gather(linear, of(0, 2, 1, 3) if swapped else of(0, 1, 2, 3), op.constant(1))
    queries = op.transpose(op.reshape(tokens, of(1, 4, 2, 4), False), of(0, 2, 1, 3))
    model = openvino.Model([op.result(op.matmul(queries, keys, False, True))], [x, keys])
    assert rewrite_attention(model) == int(not swapped)


def attention_over_maps(turned: bool = True, split: bool = True, quantised: bool = False, kept: bool = False) -> Any:
    """(B, C, 3, 4) -> (B, C', 3, 4): LeViT's attention; ``turned``: the transposes are operators, not attributes of the products."""
    heads, key, value, tokens = 2, 4, 6, 12
    x = op.parameter([2, 8, 3, 4], np.float32)

    def maps(width: int) -> Any:
        return op.convolution(x, op.constant(normal(heads * width, 8, 1, 1)), [1, 1], [0, 0], [0, 0], [1, 1])

    if split:
        view = op.reshape(maps(2 * key + value), of(2, heads, 2 * key + value, tokens), False)
        q, k, v = op.variadic_split(view, of(2), of(key, key, value)).outputs()
    else:
        q, k, v = (op.reshape(maps(width), of(2, heads, width, tokens), False) for width in (key, key, value))
    if quantised:
        v = op.fake_quantize(v, *(op.constant(np.float32(n)) for n in (-2, 2.5, -2, 2.5)), 256)
    scores = op.matmul(op.transpose(q, of(0, 1, 3, 2)), k, False, False) if turned else op.matmul(q, k, True, False)
    masked = op.add(op.multiply(scores, op.constant(np.float32(0.7))), op.constant(normal(heads, tokens, tokens)))
    weights = op.softmax(masked, -1)
    product = op.matmul(v, op.transpose(weights, of(0, 1, 3, 2)), False, False) if turned else op.matmul(v, weights, False, True)
    found = op.hswish(op.reshape(product, of(2, heads * value, 3, 4), False))
    results = [op.result(found)] + ([op.result(weights)] if kept else [])
    return openvino.Model(results, [x])


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_attention_over_maps_is_written_over_tokens_and_becomes_one_kernel(turned: bool, split: bool) -> None:
    model = attention_over_maps(turned, split)
    images, names = normal(2, 8, 3, 4), weighted_names(model)
    wanted = run(model, images)
    assert rewrite_maps(model) == 1
    model.validate_nodes_and_infer_types()
    assert distance(run(model, images), wanted) < EXACT
    assert set(weighted_names(model)) == set(names) and rewrite_maps(model) == 0
    usual = attention()
    rewrite_attention(usual)
    if not PRODUCTS & kernels(usual):  # the plugin has such a kernel for this processor
        assert not PRODUCTS & kernels(model)


def linear_attention(heads: int = 2, foreign: bool = False) -> Any:
    """(B, C, 3, 4) -> (B, C', 3, 4): EfficientViT's, without softmax; ``foreign``: its heads come from an input of their own."""
    width, tokens = 5, 12
    x, views = op.parameter([2, 8, 3, 4], np.float32), op.parameter([2, heads, 3 * width, tokens], np.float32)
    maps = op.convolution(x, op.constant(normal(heads * 3 * width, 8, 1, 1)), [1, 1], [0, 0], [0, 0], [1, 1])
    view = views if foreign else op.reshape(maps, of(2, heads, 3 * width, tokens), False)
    q, k, v = op.split(op.transpose(view, of(0, 1, 3, 2)), op.constant(-1), 3).outputs()
    product = op.matmul(op.relu(q), op.matmul(op.relu(k), v, True, False), False, False)
    rows = product if foreign else op.reshape(op.transpose(product, of(0, 1, 3, 2)), of(2, heads * width, 3, 4), False)
    return openvino.Model([op.result(rows)], [views if foreign else x])


def test_heads_are_taken_apart_behind_a_maps_channels_and_put_together_there() -> None:
    model, images = linear_attention(), normal(2, 8, 3, 4)
    wanted = run(model, images)
    assert rewrite_maps(model) == 2
    model.validate_nodes_and_infer_types()
    orders = [node.input_value(1).get_node().data.tolist() for node in model.get_ordered_ops() if node.get_type_name() == "Transpose"]
    assert orders == [[0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3], [0, 3, 1, 2]]
    assert distance(run(model, images), wanted) < EXACT
    assert rewrite_maps(model) == 0


def test_transposed_heads_that_are_no_maps_stay() -> None:
    assert rewrite_maps(linear_attention(foreign=True)) == 0


@pytest.mark.parametrize("options", [{"quantised": True}, {"kept": True}], ids=str)
def test_quantised_factors_or_probabilities_that_are_read_elsewhere_stay(options: dict[str, bool]) -> None:
    model = attention_over_maps(**options)
    before = kinds(model)
    assert rewrite_maps(model) == 0
    assert kinds(model) == before


def test_a_patch_embedding_becomes_a_linear_layer_of_the_same_name() -> None:
    x = op.parameter([2, 3, 8, 12], np.float32)
    quantised = op.fake_quantize(x, *(op.constant(np.float32(n)) for n in (-2, 2.5, -2, 2.5)), 256)
    weights = op.constant(normal(5, 3, 4, 4))
    embedded = op.convolution(quantised, weights, [4, 4], [0, 0], [0, 0], [1, 1])
    embedded.set_friendly_name("patches")
    tokens = op.transpose(op.reshape(op.add(embedded, op.constant(normal(1, 5, 1, 1))), of(2, 5, 6), False), of(0, 2, 1))
    model = openvino.Model([op.result(tokens)], [x])
    images = normal(2, 3, 8, 12)
    wanted = run(model, images)
    assert rewrite_patches(model) == 1
    assert "Convolution" not in kinds(model)
    assert weighted_names(model) == ("patches",)
    assert distance(run(model, images), wanted) < EXACT


@pytest.mark.parametrize(("stride", "pads"), [(2, 0), (4, 2)])
def test_a_convolution_that_overlaps_or_pads_stays_one(stride: int, pads: int) -> None:
    x = op.parameter([1, 3, 12, 12], np.float32)
    found = op.convolution(x, op.constant(normal(5, 3, 4, 4)), [stride] * 2, [pads] * 2, [pads] * 2, [1, 1])
    model = openvino.Model([op.result(op.transpose(found, of(0, 2, 3, 1)))], [x])
    assert rewrite_patches(model) == 0


def test_norms_masks_and_quantisers_find_their_shapes_and_answer_the_same() -> None:
    x = op.parameter([1, 4, 4, 6], np.float32)
    norm = op.multiply(op.mvn(x, of(-1), True, 1e-6, "INSIDE_SQRT"), op.constant(normal(6)))
    windows = op.reshape(op.transpose(op.reshape(norm, of(1, 2, 2, 2, 2, 6), False), of(0, 1, 3, 2, 4, 5)), of(4, 4, 6), False)
    smooth = op.multiply(windows, op.constant(np.abs(normal(1, 1, 6))))
    quantised = op.fake_quantize(smooth, *(op.constant(np.float32(n)) for n in (-2, 2.5, -2, 2.5)), 256)
    linear = op.matmul(quantised, op.constant(normal(6, 12)), False, False)
    scores = op.transpose(op.reshape(linear, of(4, 4, 3, 4), False), of(0, 2, 1, 3))
    masked = op.add(op.reshape(scores, of(1, 4, 3, 4, 4), False), op.constant(normal(1, 4, 1, 4, 4)))
    model = openvino.Model([op.result(op.softmax(op.reshape(masked, of(4, 3, 4, 4), False), -1))], [x])
    images = normal(1, 4, 4, 6)
    wanted = run(model, images)
    assert (rewrite_norms(model), rewrite_masks(model), rewrite_moves(model)) == (1, 1, 1)
    model.validate_nodes_and_infer_types()
    order = kinds(model)
    constants = {tuple(node.shape) for node in model.get_ops() if node.get_type_name() == "Constant"}
    assert (4, 1, 4, 4) in constants, "the mask, once for all heads"
    assert order.index("FakeQuantize") < order.index("Transpose")
    assert distance(run(model, images), wanted) < EXACT


def test_a_quantiser_stays_behind_a_move_that_takes_its_channels_elsewhere() -> None:
    x = op.parameter([1, 4, 6], np.float32)
    smooth = op.multiply(op.transpose(x, of(0, 2, 1)), op.constant(np.abs(normal(1, 1, 4))))
    model = openvino.Model([op.result(op.fake_quantize(smooth, *(op.constant(np.float32(n)) for n in (-2, 2, -2, 2)), 256))], [x])
    assert rewrite_moves(model) == 0


def test_a_quantiser_of_attention_or_behind_a_reshape_alone_stays() -> None:
    x, bounds = op.parameter([1, 4, 6], np.float32), [op.constant(np.float32(n)) for n in (-2, 2, -2, 2)]
    heads = op.transpose(op.reshape(x, of(1, 4, 2, 3), False), of(0, 2, 1, 3))
    queries = op.fake_quantize(heads, *bounds, 256)
    rows = op.fake_quantize(op.reshape(x, of(4, 6), False), *bounds, 256)
    model = openvino.Model([op.result(op.matmul(queries, queries, False, True)), op.result(rows)], [x])
    assert rewrite_moves(model) == 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: TorchExport(live(name), (2, 3, 160, 160), tmp_path_factory.mktemp(name)).onnx


@pytest.mark.parametrize(("name", "attentions"), [("test_vit", 1), ("test_efficientnet", 0)])
def test_a_whole_network_answers_the_same(exported: Callable[[str], Path], name: str, attentions: int) -> None:
    model = core().read_model(exported(name))
    images = normal(2, 3, 160, 160)
    wanted, products = run(model, images), len(weighted_names(fold_constants(model.clone())))
    done = rewrite(model, fold=True)
    assert (done.get("attentions", 0) > 0) == bool(attentions), done
    assert distance(run(model, images), wanted) < EXACT
    assert len(weighted_names(model)) == products


def pooled() -> tuple[Any, Callable[[Any], Any]]:
    """(B, N, C) -> (B, C), pooled, smoothed and quantised as before an int8 classifier; and the same in numpy."""
    factors, low, high = RANDOM.uniform(0.6, 1.6, (1, 256)).astype(np.float32), -3.0, 3.1
    x = op.parameter([1, 49, 256], np.float32)
    mean = op.reduce_mean(op.multiply(x, op.constant(np.float32(2))), of(1), keep_dims=False)
    bounds = [op.constant(np.float32(bound)) for bound in (low, high, low, high)]
    model = openvino.Model([op.result(op.fake_quantize(op.multiply(mean, op.constant(factors)), *bounds, 256))], [x])

    def wanted(tokens: Any) -> Any:
        step = (high - low) / 255
        return np.round((np.clip(2 * tokens.mean(1) * factors, low, high) - low) / step) * step + low

    return model, wanted


def test_pooled_tokens_that_are_smoothed_and_quantised_are_right() -> None:
    model, wanted = pooled()
    tokens = normal(1, 49, 256) + normal(256)
    assert keep_axes(model) == 1 and keep_axes(model) == 0
    assert distance(run(model, tokens), wanted(tokens)) < 1e-2
