"""Importance against formulas computed by hand on a network of two layers; allocation by its properties."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.allocation import ALLOCATIONS, LEAST, allocate, least_ratio
from edgejoule.optimize.copies import copied
from edgejoule.optimize.criteria import BATCH, CRITERIA, importance, weight_importance
from edgejoule.optimize.groups import parameters_of
from edgejoule.optimize.neurons import find_neurons
from edgejoule.optimize.pruning import Choice, held_images
from edgejoule.seams import Held, PassContext
from tests import families

UNITS = 6


class Toy(nn.Module):
    """Images (B, 3, 2, 2) -> logits (B, 4), through six hidden neurons and a norm that must stand still."""

    def __init__(self) -> None:
        from timm.layers import Mlp

        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.mlp = Mlp(12, UNITS, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.mlp(self.norm(x).flatten(1))


@pytest.fixture
def toy() -> Any:
    torch.manual_seed(0)
    return Toy().double().eval()


@pytest.fixture
def held() -> Held:
    generator = torch.Generator().manual_seed(1)
    return Held(torch.randn(2 * BATCH, 3, 2, 2, generator=generator), torch.randint(0, 4, (2 * BATCH,), generator=generator))


def slopes(toy: Any, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(toy)
    nn.functional.cross_entropy(twin(images.double()), labels).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in twin.named_parameters()}


def by_hand(products: dict[str, torch.Tensor]) -> torch.Tensor:
    """(U,) the sum over what one neuron owns: its row of fc1, its bias, its column of fc2."""
    return products["mlp.fc1.weight"].sum(1) + products["mlp.fc1.bias"] + products["mlp.fc2.weight"].sum(0)


def test_magnitude_is_the_norm_of_what_a_neuron_owns(toy: Any) -> None:
    found = importance("magnitude", toy, find_neurons(toy))["mlp"]
    squares = {name: parameter.detach().square() for name, parameter in toy.named_parameters()}
    assert found.dtype == torch.float64 and torch.allclose(found, by_hand(squares).sqrt(), rtol=1e-12)


def test_taylor_is_the_mean_over_batches_of_the_first_order_change(toy: Any, held: Held) -> None:
    found = importance("taylor", toy, find_neurons(toy), held)["mlp"]
    expected = torch.zeros(UNITS, dtype=torch.float64)
    for start in (0, BATCH):
        grads = slopes(toy, held.images[start : start + BATCH], held.labels[start : start + BATCH])
        expected += by_hand({name: grad * toy.get_parameter(name).detach() for name, grad in grads.items()}).abs() / 2
    assert torch.allclose(found, expected, rtol=1e-9)


def test_taylor_is_the_change_of_the_loss_as_a_neuron_begins_to_leave(toy: Any, held: Held) -> None:
    """Against finite differences, which know no gradient: all that a neuron owns is shrunk by a millionth."""
    few = Held(held.images[:BATCH], held.labels[:BATCH])
    found = importance("taylor", toy, find_neurons(toy), few)["mlp"]
    step = 1e-6
    before = nn.functional.cross_entropy(toy(few.images.double()), few.labels)
    for unit in range(UNITS):
        twin = copy.deepcopy(toy)
        with torch.no_grad():
            twin.mlp.fc1.weight[unit] *= 1 - step
            twin.mlp.fc1.bias[unit] *= 1 - step
            twin.mlp.fc2.weight[:, unit] *= 1 - step
            after = nn.functional.cross_entropy(twin(few.images.double()), few.labels)
        assert float((after - before).detach().abs()) / step == pytest.approx(float(found[unit]), rel=1e-3, abs=1e-7)


def test_hessian_is_half_of_squared_gradients_of_single_images_times_squared_weights(toy: Any, held: Held) -> None:
    found = importance("hessian", toy, find_neurons(toy), held)["mlp"]
    expected = torch.zeros(UNITS, dtype=torch.float64)
    for image, label in zip(held.images, held.labels, strict=True):
        grads = slopes(toy, image[None], label[None])
        expected += by_hand({name: (grad * toy.get_parameter(name).detach()).square() for name, grad in grads.items()}) / 2
    assert torch.allclose(found, expected / len(held.images), rtol=1e-9)


def test_without_labels_the_networks_own_answers_are_the_truth(toy: Any, held: Held) -> None:
    answers = toy(held.images.double()).argmax(1)
    for criterion in ("taylor", "hessian"):
        own = importance(criterion, toy, find_neurons(toy), Held(held.images))["mlp"]
        told = importance(criterion, toy, find_neurons(toy), Held(held.images, answers))["mlp"]
        other = importance(criterion, toy, find_neurons(toy), Held(held.images, (answers + 1) % 4))["mlp"]
        assert torch.equal(own, told) and not torch.allclose(own, other)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_changes_nothing_and_gives_the_same_again(toy: Any, held: Held, criterion: str) -> None:
    state = {name: value.clone() for name, value in toy.state_dict().items()}
    with torch.inference_mode():  # as a caller may have it
        first = importance(criterion, toy, find_neurons(toy), held, seed=3)["mlp"]
    again = importance(criterion, toy, find_neurons(toy), held, seed=3)["mlp"]
    assert torch.equal(first, again) and first.shape == (UNITS,) and float(first.min()) >= 0
    assert all(torch.equal(state[name], value) for name, value in toy.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.parameters()) and not toy.training


def test_random_goes_by_its_seed(toy: Any) -> None:
    one, other = (importance("random", toy, find_neurons(toy), seed=seed)["mlp"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_single_weights_by_the_same_formulas(toy: Any, held: Held) -> None:
    name = "mlp.fc1.weight"
    weight = toy.get_parameter(name).detach()
    grads = [slopes(toy, held.images[s : s + BATCH], held.labels[s : s + BATCH])[name] for s in (0, BATCH)]
    assert torch.allclose(weight_importance("magnitude", toy, [name])[name], weight.abs())
    assert torch.allclose(weight_importance("taylor", toy, [name], held)[name], sum((g * weight).abs() for g in grads) / 2)
    singles = [slopes(toy, i[None], y[None])[name] for i, y in zip(held.images, held.labels, strict=True)]
    expected = sum((g * weight).square() / 2 for g in singles) / len(singles)
    assert torch.allclose(weight_importance("hessian", toy, [name], held)[name], expected)
    assert weight_importance("random", toy, [name])[name].shape == weight.shape


def test_a_network_that_keeps_biases_between_calls_can_be_weighed_and_copied() -> None:
    """Its second batch must not go back through the graph of its first, and a cache with a graph cannot be copied as it is."""
    network, spec = families.network("levit")
    network(families.images(spec))  # with gradients: the caches now hold a graph
    groups = find_neurons(network)
    scores = importance("taylor", network, groups, Held(families.images(spec, 2 * BATCH)))
    assert all(float(score.min()) > 0 for score in scores.values())
    assert copied(network) is not network


def test_what_cannot_be_weighed_is_said(toy: Any, held: Held) -> None:
    groups = find_neurons(toy)
    with pytest.raises(ModelError, match=r"labels go from 0 to 7.*4 classes"):
        importance("taylor", toy, groups, Held(held.images, torch.arange(16) % 10))
    with pytest.raises(ModelError, match="no images"):
        importance("taylor", toy, groups, Held(held.images[:0]))
    with torch.no_grad():
        toy.mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="mlp is not finite"):
        importance("magnitude", toy, groups)
    context = PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path())
    with pytest.raises(ModelError, match="needs images"):
        held_images("prune_ffn", "taylor", None, context)  # type: ignore[arg-type]


ROWS = st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(0, 1e3), min_size=1, max_size=40), min_size=1)
RATIO, ROUND = st.floats(0, 0.99), st.sampled_from((1, 2, 8))


@settings(max_examples=200, deadline=None)
@given(ROWS, RATIO, st.sampled_from(ALLOCATIONS), ROUND, st.integers(1, 50))
def test_less_goes_than_was_asked_and_something_stays(
    scores: dict[str, list[float]], ratio: float, how: str, round_to: int, params: int
) -> None:
    each = {name: params * (place + 1) for place, name in enumerate(scores)}
    dropped = allocate(scores, each, ratio, how, round_to)
    assert dropped.keys() == scores.keys()
    for name, row in scores.items():
        gone = dropped[name]
        kept = len(row) - len(gone)
        assert list(gone) == sorted(set(gone)) and all(0 <= unit < len(row) for unit in gone)
        assert kept >= 1 and (kept % round_to == 0 or kept == len(row))
        if gone:  # the lowest scores, and of equal ones the first
            stay = [unit for unit in range(len(row)) if unit not in gone]
            assert max((row[unit], unit) for unit in gone) < min((row[unit], unit) for unit in stay)
        if how == "uniform":
            assert len(gone) <= ratio * len(row) + 1e-6
        else:
            assert kept >= math.ceil(len(row) / LEAST)
    if how == "global":
        assert sum(len(dropped[name]) * each[name] for name in scores) <= ratio * sum(len(scores[n]) * each[n] for n in scores) + 1e-6


@settings(max_examples=100, deadline=None)
@given(ROWS, st.sampled_from(ALLOCATIONS), ROUND, RATIO, RATIO)
def test_a_higher_ratio_drops_what_a_lower_one_drops(
    scores: dict[str, list[float]], how: str, round_to: int, one: float, other: float
) -> None:
    each = dict.fromkeys(scores, 3)
    less, more = (allocate(scores, each, ratio, how, round_to) for ratio in sorted((one, other)))
    assert all(set(less[name]) <= set(more[name]) for name in scores)
    assert not any(allocate(scores, each, 0.0, how, round_to).values())


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from(ALLOCATIONS), ROUND)
def test_the_least_ratio_is_one_that_drops(scores: dict[str, list[float]], how: str, round_to: int) -> None:
    each = dict.fromkeys(scores, 3)
    least = least_ratio(scores, each, how, round_to)
    if least is None:
        assert not any(allocate(scores, each, 0.99, how, round_to).values())
    else:
        assert any(allocate(scores, each, least, how, round_to).values())
        assert not any(allocate(scores, each, least - 0.01, how, round_to).values())


def test_a_global_choice_takes_more_where_units_stand_out_less() -> None:
    """Group b has one important neuron and many idle ones; scaling a group's scores changes nothing."""
    scores = {"a": [1.0, 1.0, 1.0, 1.0], "b": [10.0, 0.1, 0.1, 0.1]}
    expected = {"a": (), "b": (1, 2)}
    assert allocate(scores, {"a": 5, "b": 5}, 0.25, "global", 1) == expected
    for size in (1e6, 1e-6):
        assert allocate({"a": [size] * 4, "b": scores["b"]}, {"a": 5, "b": 5}, 0.25, "global", 1) == expected
    assert allocate(scores, {"a": 5, "b": 5}, 0.25, "uniform", 1) == {"a": (0,), "b": (1,)}
    assert allocate({"a": [0.0] * 10}, {"a": 5}, 0.29, "uniform", 1) == {"a": (0, 1)}
    assert allocate({"a": [0.0] * 100}, {"a": 5}, 0.29, "uniform", 1)["a"] == tuple(range(29))  # 28.999… in floating point


def test_params_of_a_neuron_are_its_row_its_bias_and_its_column(toy: Any) -> None:
    (group,) = find_neurons(toy)
    assert parameters_of(toy, group) == 12 + 1 + 4


def test_options_that_mean_nothing_are_refused() -> None:
    sound = Choice("prune_ffn", "neurons", 0.3, "magnitude")
    assert sound.needs == frozenset() and dataclasses.replace(sound, criterion="hessian").needs == {"calibration"}
    for ratio in (1, 1.0, -0.1, float("nan"), "half", True):
        with pytest.raises(SpecError, match="expected a share from 0"):
            dataclasses.replace(sound, ratio=ratio)  # type: ignore[arg-type]
    for option in ("criterion", "allocation"):
        with pytest.raises(SpecError, match=f"{option}='guess': expected '"):
            dataclasses.replace(sound, **{option: "guess"})  # type: ignore[arg-type]
    for round_to in (0, -8, 1.5, True):
        with pytest.raises(SpecError, match="expected a whole number"):
            dataclasses.replace(sound, round_to=round_to)  # type: ignore[arg-type]
