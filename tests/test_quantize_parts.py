"""The parts of quantisation alone: ranges, float edits of norms, what is found in a graph, the search for layers to leave in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgejoule.compile.quantize import Options, search
from edgejoule.compile.quantize.convolutions import given_by_convolutions
from edgejoule.compile.quantize.graph import Graph, clean
from edgejoule.compile.quantize.norms import find_norms
from edgejoule.compile.quantize.observe import Observed, observe
from edgejoule.compile.quantize.options import Chosen
from edgejoule.compile.quantize.qdq import Plan, write
from edgejoule.compile.quantize.ranges import Scale, activation_scale, scale_of, weight_scale
from edgejoule.compile.quantize.score import Score, logits_of, relative_error
from edgejoule.compile.quantize.sensitivity import rank
from edgejoule.compile.quantize.smoothing import repq, smooth, smoothquant

RNG = np.random.default_rng(0)


def network(folder: Path, shape: tuple[int, ...], nodes: list[Any], constants: dict[str, Any], outputs: int = 4) -> Path:
    """An ONNX file from "images" of ``shape`` to "logits" (1, outputs)."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in (("images", shape), ("logits", (1, outputs)))]
    initializers = [
        numpy_helper.from_array(np.asarray(v, dtype=np.float32 if np.asarray(v).dtype.kind == "f" else np.int64), n)
        for n, v in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    path = folder / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def token_network(folder: Path, **changes: Any) -> Path:
    """(1, 3, 8, 8): a padded convolution, tokens (1, 64, 16), LayerNorm with outlier channels, two products of it, a mean, a head.

    One of the two has no bias; a third branch reads the norm through a roll along the tokens.
    """
    gain = np.exp(RNG.standard_normal(16))
    gain[3] = 40.0
    nodes = [
        helper.make_node("Conv", ["images", "cw", "cb"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "tokens"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["t"], perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["t", "gain", "shift"], ["n"], name="norm", axis=-1),
        helper.make_node("MatMul", ["n", "qw"], ["qm"], name="q"),
        helper.make_node("Add", ["qm", "qb"], ["q"]),
        helper.make_node("MatMul", ["n", "kw"], ["k"], name="k"),
        helper.make_node("Slice", ["n", "a0", "a1", "a1"], ["r0"]),
        helper.make_node("Slice", ["n", "a1", "a9", "a1"], ["r1"]),
        helper.make_node("Concat", ["r1", "r0"], ["rolled"], axis=1),
        helper.make_node("MatMul", ["rolled", "vw"], ["v"], name="v"),
        helper.make_node("Add", ["q", "k"], ["s0"]),
        helper.make_node("Add", ["s0", "v"], ["s"]),
        helper.make_node("ReduceMean", ["s", "one"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "hw", "hb"], ["logits"], name="head"),
    ]
    constants = {
        "cw": RNG.standard_normal((16, 3, 3, 3)),
        "cb": RNG.standard_normal(16),
        "tokens": np.array([1, 16, 64]),
        "gain": gain,
        "shift": RNG.standard_normal(16),
        "qw": RNG.standard_normal((16, 8)),
        "qb": RNG.standard_normal(8),
        "kw": RNG.standard_normal((16, 8)),
        "vw": RNG.standard_normal((16, 8)),
        "hw": RNG.standard_normal((8, 4)),
        "hb": RNG.standard_normal(4),
        "a0": np.array([0]),
        "a1": np.array([1]),
        "a9": np.array([1 << 30]),
        "one": np.array([1]),
        **changes,
    }
    return network(folder, (1, 3, 8, 8), nodes, constants)


def images(n: int = 6) -> Any:
    return np.random.default_rng(1).standard_normal((n, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("how", [0.15, 0.5, 0.95, "fold"])
def test_smoothing_leaves_the_float_network_as_it_was(how: float | str, tmp_path: Path) -> None:
    source = token_network(tmp_path)
    graph = clean(source, tmp_path)
    (norm,) = find_norms(graph)
    assert len(norm.products) == 3 and norm.shiftable and norm.channels == 16
    tensors = {product.source: product.source_axis for product in norm.products}
    seen = observe(graph, tensors, images(), 1, tmp_path)
    edited, after = smooth(graph, [norm], seen, how)
    onnx.save(edited.model, tmp_path / "edited.onnx")
    assert relative_error(logits_of(tmp_path / "edited.onnx", images(), 1), logits_of(source, images(), 1)) < 1e-5
    again = observe(edited, tensors, images(), 1, tmp_path)
    for name in tensors:  # what was foretold of the edited graph is what flows in it
        width = (after[name].high - after[name].low).max()
        assert np.abs(again[name].high - after[name].high).max() < 1e-4 * width
        assert np.abs(again[name].low - after[name].low).max() < 1e-4 * width
        assert activation_scale(after[name], "minmax", False).scale < 0.8 * activation_scale(seen[name], "minmax", False).scale


def test_smoothing_pays_where_a_norm_has_outlier_channels(tmp_path: Path) -> None:
    source = token_network(tmp_path)
    graph = clean(source, tmp_path)
    tensors: dict[str, int | None] = {product.source: product.source_axis for product in graph.products}
    seen = observe(graph, tensors, images(), 1, tmp_path)
    wanted, names = logits_of(source, images(), 1), {product.name for product in graph.products if product.op != "Conv"}
    errors = {}
    for how in ("off", 0.5, "fold"):
        edited, after = (graph, seen) if how == "off" else smooth(graph, find_norms(graph), seen, how)
        write(edited, Plan({name: activation_scale(after[name], "minmax", False) for name in after}), names, tmp_path / "q.onnx")
        errors[how] = relative_error(logits_of(tmp_path / "q.onnx", images(), 1), wanted)
    assert errors[0.5] < 0.8 * errors["off"] and errors["fold"] < 0.8 * errors["off"]


def test_a_norm_that_something_else_reads_is_left_alone(tmp_path: Path) -> None:
    path = token_network(tmp_path)
    model = onnx.load(path)
    added = next(node for node in model.graph.node if list(node.output) == ["t"])
    assert added.op_type == "Transpose"
    relu = helper.make_node("Relu", ["n"], ["rn"])
    total = helper.make_node("ReduceMean", ["rn", "both"], ["rm"], keepdims=0)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "both"))
    last = model.graph.node[-1]
    last.output[0] = "l0"
    model.graph.node.extend([relu, total, helper.make_node("Add", ["l0", "rm"], ["logits"])])
    onnx.save(model, path)
    assert find_norms(clean(path, tmp_path)) == ()


def test_a_norm_joined_with_values_of_another_source_is_left_alone(tmp_path: Path) -> None:
    path = token_network(tmp_path)
    model = onnx.load(path)
    roll = next(node for node in model.graph.node if node.op_type == "Concat")
    roll.input[1] = "foreign"
    model.graph.node.insert(4, helper.make_node("Slice", ["t", "a0", "a1", "a1"], ["foreign"]))  # tokens before the norm
    onnx.save(model, path)
    assert find_norms(clean(path, tmp_path)) == ()


def test_zero_padding_behind_a_norm_forbids_shifts_but_not_scales(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["images", "g"], ["x"]),
        helper.make_node("Add", ["x", "b"], ["n"], name="affine"),
        helper.make_node("Conv", ["n", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c", "space"], ["logits"], keepdims=0),
    ]
    channel = RNG.standard_normal((2, 3, 1, 1)) + 3
    constants = {"g": channel[:1], "b": channel[1:], "w": RNG.standard_normal((4, 3, 3, 3)), "space": np.array([2, 3])}
    source = network(tmp_path, (1, 3, 8, 8), nodes, constants)
    graph = clean(source, tmp_path)
    (norm,) = find_norms(graph)
    assert not norm.shiftable and norm.channels == 3
    seen = observe(graph, {"n": 1}, images(), 1, tmp_path)
    onnx.save(smooth(graph, [norm], seen, "fold")[0].model, tmp_path / "edited.onnx")
    assert relative_error(logits_of(tmp_path / "edited.onnx", images(), 1), logits_of(source, images(), 1)) < 1e-5


def test_smoothquant_is_equation_four() -> None:
    low, high, weights = np.array([-8.0, -1.0]), np.array([2.0, 1.0]), np.array([0.5, 2.0])
    found = smoothquant(low, high, weights, 0.5)
    assert found[0] / found[1] == pytest.approx(np.sqrt(8 / 0.5) / np.sqrt(1 / 2))


def test_folding_brings_all_channels_to_one_scale_and_zero_point() -> None:
    low, high = np.array([-8.0, 0.0, 5.0]), np.array([2.0, 1.0, 6.0])
    divisor, offset = repq(low, high, shiftable=True)
    assert np.ptp((low + offset) / divisor) < 1e-9 and np.ptp((high + offset) / divisor) < 1e-9
    dead, at = repq(np.array([-1.0, -1.0, 0.3]), np.array([1.0, 1.0, 0.3]), shiftable=True)
    assert np.isfinite(dead).all() and (dead > 0).all() and np.abs(((at) / dead)[:2]).max() < 1e-9


def histogram(values: Any) -> Observed:
    low, high = np.array([values.min()]), np.array([values.max()])
    counts = np.histogram(values, bins=2048, range=(float(low[0]), float(high[0])))[0]
    return Observed(None, low, high, counts[None].astype(np.float64))


@pytest.mark.parametrize("signed", [False, True])
def test_mse_ranges_lose_least_and_percentiles_cut_outliers(signed: bool) -> None:
    values = np.concatenate([RNG.standard_normal(20000), [300.0]])
    seen = histogram(values)
    scales = {method: activation_scale(seen, method, signed) for method in ("minmax", "percentile 99.9", "mse")}
    error = {method: np.square(values - scale.rounded(values)).mean() for method, scale in scales.items()}
    assert error["mse"] <= min(error.values()) * 1.02
    assert scales["percentile 99.9"].scale < 0.1 * scales["minmax"].scale
    bell = histogram(RNG.standard_normal(20000))
    assert activation_scale(bell, "mse", signed).scale == pytest.approx(activation_scale(bell, "minmax", signed).scale, rel=0.35)


def test_zero_is_exact_and_ranges_cover_it() -> None:
    for low, high in ((2.0, 6.0), (-6.0, -2.0), (-1.0, 3.0), (0.0, 0.0)):
        scale = scale_of(low, high, signed=False)
        assert scale.rounded(np.zeros(1))[0] == 0.0 and 0 <= scale.zero_point <= 255
        ends = scale.rounded(np.array([min(low, 0.0), max(high, 0.0)]))
        assert np.abs(ends - [min(low, 0.0), max(high, 0.0)]).max() <= scale.scale
    assert scale_of(-4.0, 1.0, signed=True) == Scale(float(np.float32(4 / 127)), 0, True)


def test_clipped_weights_are_never_worse_and_seven_bits_stay_within_63() -> None:
    weight = RNG.standard_normal((6, 50))
    weight[2, 0] = 90.0
    errors = {}
    for clip in (False, True):
        scales = weight_scale(weight, 0, 8, clip)[:, None]
        errors[clip] = np.square(weight - np.clip(np.rint(weight / scales), -127, 127) * scales).sum(axis=1)
    assert (errors[True] <= errors[False] + 1e-6).all()
    assert np.abs(np.rint(weight / weight_scale(weight, 0, 7, False)[:, None])).max() == 63


def test_histograms_of_channels_and_of_the_whole_agree(tmp_path: Path) -> None:
    graph = clean(token_network(tmp_path), tmp_path)
    (norm,) = find_norms(graph)
    name, axis = norm.products[0].source, norm.products[0].source_axis
    by_channel = observe(graph, {name: axis}, images(), 1, tmp_path)[name]
    whole = observe(graph, {name: None}, images(), 1, tmp_path)[name]
    assert by_channel.low.shape == (16,) and by_channel.low.min() == whole.low[0] and by_channel.high.max() == whole.high[0]
    for method in ("minmax", "percentile 99.9", "mse"):
        first, second = activation_scale(by_channel, method, False), activation_scale(whole, method, False)
        assert first.scale == pytest.approx(second.scale, rel=0.1)


def test_a_residual_that_a_product_reads_too_stays_float(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["images"], ["x"]),
        helper.make_node("MatMul", ["x", "w0"], ["stream"], name="first"),
        helper.make_node("MatMul", ["stream", "w1"], ["branch"], name="second"),
        helper.make_node("Relu", ["branch"], ["relu"]),
        helper.make_node("Add", ["stream", "relu"], ["logits"], name="residual"),
    ]
    constants = {"w0": RNG.standard_normal((192, 4)), "w1": RNG.standard_normal((4, 4))}
    graph = clean(network(tmp_path, (1, 3, 8, 8), nodes, constants), tmp_path)
    seen = observe(graph, {product.source: None for product in graph.products}, images(), 1, tmp_path)
    scales = {name: activation_scale(found, "minmax", False) for name, found in seen.items()}
    write(graph, Plan(scales), [product.name for product in graph.products], tmp_path / "q.onnx")
    by_output = {node.output[0]: node for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert by_output["branch"].input[0] == "stream_dequantized" and list(by_output["logits"].input) == ["stream", "relu"]


def test_a_large_bias_over_tiny_weights_fits_into_int32(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["images"], ["x"]), helper.make_node("Gemm", ["x", "w", "b"], ["logits"], name="head")]
    weight = RNG.standard_normal((192, 4))
    weight[:, 1] *= 1e-12
    source = network(tmp_path, (1, 3, 8, 8), nodes, {"w": weight, "b": np.array([1.0, 1000.0, -1.0, 0.0])})
    graph = clean(source, tmp_path)
    seen = observe(graph, {product.source: None for product in graph.products}, images(), 1, tmp_path)
    scales = {name: activation_scale(found, "minmax", False) for name, found in seen.items()}
    write(graph, Plan(scales), [product.name for product in graph.products], tmp_path / "q.onnx")
    assert relative_error(logits_of(tmp_path / "q.onnx", images(), 1), logits_of(source, images(), 1)) < 0.01


def test_a_convolution_before_a_division_keeps_float_and_a_rectifier_joins_its_convolution(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "w0"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], ["b"], name="second"),
        helper.make_node("Conv", ["r", "w2"], ["p"], name="third"),
        helper.make_node("Abs", ["p"], ["pa"]),
        helper.make_node("Add", ["pa", "eps"], ["pe"]),
        helper.make_node("Div", ["b", "pe"], ["d"]),
        helper.make_node("ReduceMean", ["d", "space"], ["logits"], keepdims=0),
    ]
    constants = {"w0": RNG.standard_normal((4, 3, 1, 1)), "w1": RNG.standard_normal((4, 4, 1, 1)), "eps": np.array([1.0])}
    constants["w2"] = RNG.standard_normal((4, 4, 1, 1))
    graph = clean(network(tmp_path, (1, 3, 8, 8), nodes, {**constants, "space": np.array([2, 3])}), tmp_path)
    given, delicate = given_by_convolutions(graph)
    assert given == {"first": "r"} and delicate == {"second", "third"}


def test_ranking_names_the_product_whose_input_has_an_outlier(tmp_path: Path) -> None:
    graph = clean(token_network(tmp_path), tmp_path)
    sources = {product.source: None for product in graph.products}
    seen = observe(graph, sources, images(), 1, tmp_path)
    scales = {name: activation_scale(found, "minmax", False) for name, found in seen.items()}
    head = next(product for product in graph.products if product.output == "logits")
    spoiled = {**scales, head.source: Scale(1e3, 0, False)}
    ranked = rank(graph, Plan(spoiled), [product.name for product in graph.products], images(), 1, tmp_path)
    assert ranked[0][0] == head.name and ranked[0][1] > 10 * ranked[1][1] and all(error > 0 for _, error in ranked)


NAMES = tuple("abcdefghijklmnopqrst")


def searched(bad: set[str], runs: int = search.MOST_RUNS, others: int = 0) -> tuple[search.Found, int]:
    """The drop is ten points for every bad product that is not in float."""
    asked: list[frozenset[str]] = []

    def score(kept: frozenset[str]) -> Score:
        asked.append(kept)
        return Score(0.1, 10.0 * len(bad - kept))

    return search.unquantize(NAMES, score(frozenset()), score, lambda found: found.drop_pct <= 1, runs, others), len(asked) - 1


@pytest.mark.parametrize("bad", [{"a"}, {"a", "b"}, {"c"}, {"b", "e"}, {"a", "g"}, {"j"}])
def test_the_search_leaves_only_the_culprits_in_float(bad: set[str]) -> None:
    found, runs = searched(bad)
    assert found.kept_float == bad and found.score.drop_pct == 0 and found.runs == runs <= search.MOST_RUNS


def test_the_search_gives_up_before_half_of_the_network_is_float() -> None:
    found, runs = searched(set(NAMES))
    assert len(found.kept_float) == 10 and found.score.drop_pct == 100 and runs <= search.MOST_RUNS
    found, runs = searched(set(NAMES), others=10)
    assert len(found.kept_float) == 5  # 15 of 30 with the ten that were float before
    assert searched(set(NAMES), others=20)[0].kept_float == frozenset()
    found, runs = searched({"t"})
    assert found.kept_float == frozenset() and found.score.drop_pct == 10  # nothing helped: nothing is given up for it


def test_the_search_keeps_to_its_runs() -> None:
    found, runs = searched({"g", "h"}, runs=4)
    assert runs <= 4 and found.runs == runs


def test_notes_say_what_was_chosen_in_words() -> None:
    chosen = Chosen(
        "onnxruntime",
        "0.5",
        "mse",
        46,
        50,
        tuple(f"layer{n}" for n in range(14)),
        0.031,
        0.05,
        2.0,
        "top-1",
        64,
        {"minmax": 0.05},
        9,
        False,
    )
    notes = chosen.notes()
    assert notes["quantized"] == "46 of 50 products with weights" and notes["kept in float"].endswith("layer11 and 2 more")
    assert "2 points of top-1 are lost on 64" in notes["over budget"] and notes["tried"] == "minmax 0.05"
    assert all(isinstance(value, str) for value in notes.values())


def test_an_alpha_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        Options(smoothing=1.5)


def test_constants_that_exporters_share_are_given_to_each_reader(tmp_path: Path) -> None:
    ones = np.ones(16)
    graph = clean(token_network(tmp_path, gain=ones, shift=ones), tmp_path)
    model = graph.model
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    node.input[2] = node.input[1]
    shared = tmp_path / "shared.onnx"
    onnx.save(model, shared)
    folder = tmp_path / "again"
    folder.mkdir()
    again = clean(shared, folder)
    norm = next(node for node in again.model.graph.node if node.op_type == "LayerNormalization")
    assert norm.input[1] != norm.input[2] and isinstance(again, Graph)


def test_candidates_are_judged_by_the_arithmetic_that_they_will_run_in() -> None:
    import onnxruntime

    from edgejoule.compile.onnxruntime_sessions import INT8_CONFIG
    from edgejoule.compile.quantize.observe import session_options

    judged = session_options(onnxruntime)
    assert INT8_CONFIG and all(judged.get_session_config_entry(key) == value for key, value in INT8_CONFIG.items())
