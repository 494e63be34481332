"""Zeros in weights: how many, where, and where never; the shapes stay, and training keeps the zeros."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.conv import _ConvNd

from edgejoule import contracts, registry, zoo
from edgejoule.architecture import described, restored, tensors_of
from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.prune_weights import PruneWeights, largest, prunable, two_of_four
from edgejoule.seams import Held, PassContext
from tests import families


def context(**changes: Any) -> PassContext:
    return dataclasses.replace(PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path()), **changes)


def thinned(module: Any) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if hasattr(part, "sparsity")}


def outputs(module: Any, spec: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(families.images(spec))
    return found


@pytest.mark.parametrize("name", families.NETWORKS)
def test_half_of_each_layer_and_none_of_the_stem_and_the_head(name: str) -> None:
    module, spec = families.network(name)
    pruned, same = PruneWeights()(module, spec, context())
    layers = thinned(pruned)
    assert same is spec and not pruned.training and layers
    for path, layer in layers.items():
        old = module.get_submodule(path).weight.detach()
        zero = layer.weight == 0
        assert layer.sparsity == "0.5" and int(zero.sum()) == old.numel() // 2
        assert torch.equal(layer.weight[~zero], old[~zero]) and float(old[zero].abs().max()) <= float(old[~zero].abs().min())
        depthwise = isinstance(layer, _ConvNd) and layer.weight.shape[1] == 1 < layer.groups
        assert not depthwise and layer.weight.shape[1] != 3 and layer.weight.shape[0] != families.CLASSES
    for path, value in pruned.state_dict().items():
        if path.removesuffix(".weight") not in layers:
            assert torch.equal(value, module.state_dict()[path]), path
    assert float((outputs(pruned, spec) - outputs(module, spec)).norm() / outputs(module, spec).norm()) > 1e-3
    matrices = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    zeros = sum(int((part.weight == 0).sum()) for part in layers.values())
    assert 0.25 < zeros / matrices <= 0.5  # the greater part of the network takes part, whatever its layers are called


@pytest.mark.parametrize("name", families.NETWORKS)
def test_two_of_four(name: str) -> None:
    module, spec = families.network(name)
    pruned, _ = PruneWeights(pattern="2:4")(module, spec, context())
    layers = thinned(pruned)
    assert layers
    for path, layer in layers.items():
        old = module.get_submodule(path).weight.detach()
        fours = layer.weight.detach().movedim(1, -1).reshape(-1, 4)
        known = old.movedim(1, -1).reshape(-1, 4)
        assert layer.sparsity == "2:4" and bool(((fours != 0).sum(1) <= 2).all())
        assert torch.equal(fours.abs().sum(1), known.abs().topk(2).values.sum(1))
    assert not [path for path, layer in prunable(module, spec) if layer.weight.shape[1] % 4 == 0 and path not in layers]


@pytest.mark.parametrize("name", ["deit", "levit", "efficientvit_msra", "fastvit"])
@pytest.mark.parametrize("spelling", ["prune_weights", 'prune_weights(pattern="2:4")', 'prune_weights(criterion="random",ratio=0.8)'])
def test_the_contract_holds_and_the_network_can_be_written_down(name: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"prune_weights": "edgejoule.optimize.prune_weights:PruneWeights"})
    module, spec = families.network(name)
    contracts.check_pass(spelling, module, spec, context(), families.images(spec))
    pruned, _ = registry.create("pass", spelling)(module, spec, context())
    again = restored(zoo.build(zoo.identify(spec, weights="random")), described(pruned, module), tensors_of(pruned, module))
    assert torch.equal(outputs(again, spec), outputs(pruned, spec))
    assert {path: part.sparsity for path, part in thinned(again).items()} == {path: part.sparsity for path, part in thinned(pruned).items()}


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_criteria_that_look_at_the_loss(criterion: str) -> None:
    module, spec = families.network("tiny_vit")
    call = PruneWeights(0.5, criterion=criterion)  # type: ignore[arg-type]
    assert call.needs == {"calibration"} and PruneWeights().needs == frozenset()
    pruned, _ = call(module, spec, context(data=lambda spec, n: Held(families.images(spec, 8))))
    plain, _ = PruneWeights(0.5)(module, spec, context())
    differ = 0
    for path, layer in thinned(pruned).items():
        zeros = layer.weight == 0
        assert int(zeros.sum()) == zeros.numel() // 2
        differ += int((zeros != (plain.get_submodule(path).weight == 0)).sum())
    assert differ > 0
    with pytest.raises(ModelError, match=r"prune_weights cannot work on tests_tiny_vit: criterion='.*' needs images"):
        call(module, spec, context())


def test_pruning_again_changes_nothing_and_less_brings_nothing_back() -> None:
    module, spec = families.network("levit")
    once, _ = PruneWeights(0.6)(module, spec, context())
    for ratio in (0.6, 0.3):
        again, _ = PruneWeights(ratio)(once, spec, context())
        assert all(torch.equal(value, once.state_dict()[name]) for name, value in again.state_dict().items())
    more, _ = PruneWeights(0.8, criterion="random")(once, spec, context())
    for path, layer in thinned(more).items():
        assert bool((layer.weight == 0)[once.get_submodule(path).weight == 0].all())


def test_a_ratio_of_zero_is_the_identity() -> None:
    module, spec = families.network("levit")
    pruned, _ = PruneWeights(0.0)(module, spec, context())
    assert pruned is not module and not thinned(pruned) and torch.equal(outputs(pruned, spec), outputs(module, spec))


def test_training_keeps_the_zeros() -> None:
    """What the training loop does with layers that carry ``sparsity``."""
    from edgejoule.train.recovery import keep_zeros

    module, spec = families.network("deit")
    pruned, _ = PruneWeights(pattern="2:4")(module, spec, context())
    begun = copy.deepcopy(pruned)
    for part in thinned(begun).values():
        keep_zeros(part.get_parameter("weight"))
    begun(families.images(spec)).square().sum().backward()
    with torch.no_grad():
        for parameter in begun.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=0.1)
    for path, part in thinned(begun).items():
        before = pruned.get_parameter(f"{path}.weight")
        assert bool((part.weight[before == 0] == 0).all()) and not torch.equal(part.weight, before)


SHAPE = st.sampled_from([(3, 8), (1, 4), (2, 12, 1, 1), (4, 4, 3, 3), (5, 16, 7)])


@settings(max_examples=60, deadline=None)
@given(SHAPE, st.integers(0, 99))
def test_two_of_every_four_neighbours_along_the_input(shape: tuple[int, ...], seed: int) -> None:
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).double()  # with ties
    keep = two_of_four(scores)
    assert keep.shape == scores.shape
    for start in range(0, shape[1], 4):
        kept, row = keep[:, start : start + 4], scores[:, start : start + 4]
        assert bool((kept.sum(1) == 2).all())
        assert torch.equal((row * kept).sum(1), row.sort(dim=1).values[:, 2:].sum(1))


@settings(max_examples=60, deadline=None)
@given(SHAPE, st.floats(0, 0.999), st.integers(0, 99))
def test_the_largest_stay(shape: tuple[int, ...], ratio: float, seed: int) -> None:
    scores = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).double()
    keep = largest(scores, ratio)
    gone = int((~keep).sum())
    assert gone <= ratio * scores.numel() + 1e-6 < gone + 1.001
    assert gone == 0 or float(scores[~keep].max()) <= float(scores[keep].min())


def test_what_makes_no_sense_is_said() -> None:
    module, spec = families.network("deit")
    for ratio in (1, -0.5, float("inf")):
        with pytest.raises(SpecError, match="expected a share from 0"):
            PruneWeights(ratio)
    with pytest.raises(SpecError, match="a half by itself"):
        PruneWeights(0.3, "2:4")
    with pytest.raises(SpecError, match=r"pattern='1:4'"):
        PruneWeights(pattern="1:4")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"criterion='l1'"):
        PruneWeights(criterion="l1")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="less than one weight"):
        PruneWeights(1e-9)(module, spec, context())
    with pytest.raises(ModelError, match="no layer that takes the pattern"):
        PruneWeights(pattern="2:4")(nn.Sequential(nn.Linear(6, 5)), spec, context())
    said: list[str] = []
    PruneWeights()(module, spec, context(notify=said.append))
    assert said[0].startswith("prune_weights: ") and said[0].endswith("parameters are zeros, in 8 layers")
