"""Two heads in training, one in the end, and the same answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgejoule import torchvision
from edgejoule.errors import TrainingError
from edgejoule.records import Preprocessing
from edgejoule.train import distil, heads
from edgejoule.train.task import At, Distiller, Which

torchvision.ensure()
import timm  # noqa: E402

from edgejoule import zoo  # noqa: E402, F401 - registers EdgeViT with timm

CLASSES = 4
SIZES = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
ONE_HEAD: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 32, 48), "num_heads": (1, 2, 2, 3), "depths": (1, 1, 1, 1)},
    "edgevit_digits": {},
    "resnet10t": {"channels": (8, 16, 24, 32), "stem_width": 8},
}
OWN_HEADS: dict[str, dict[str, Any]] = {
    "deit_tiny_distilled_patch16_224": VIT,
    "levit_conv_128s": {"img_size": 32, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (1, 2, 2)},
    "levit_128s": {"img_size": 32, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (1, 2, 2)},
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(name, num_classes=CLASSES, **{**ONE_HEAD, **OWN_HEADS}[name])
    return made


def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def distiller_of(text: str) -> Distiller:
    return distil.open_distiller(
        distil.parse(text),
        network("resnet10t"),
        teacher_preprocessing=SIZES,
        teacher_weights="file",
        student_preprocessing=SIZES,
        num_classes=CLASSES,
        seed=3,
    )


def trained(distiller: Distiller, model: nn.Module, steps: int = 3) -> nn.Module:
    module, numbers = distiller.begin(model).train(), torch.arange(8)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for _ in range(steps):
        outputs = module(images())
        where, at = Which(numbers, torch.zeros_like(numbers), numbers), At(3, 0, 0, 0, 1)
        loss = distiller.loss(module, images(), outputs, lambda z: functional.cross_entropy(z, numbers % CLASSES), where, at)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in module.parameters())
    return module


@pytest.mark.parametrize("name", ONE_HEAD)
def test_a_second_head_is_folded_away_and_the_answers_stay(name: str) -> None:
    model = network(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    distiller = distiller_of("hard(teacher='t', heads=2)")
    module = trained(distiller, model)
    outputs = module(images())
    assert isinstance(outputs, tuple) and [tuple(x.shape) for x in outputs] == [(8, CLASSES)] * 2
    with torch.no_grad():
        two = module.eval()(images())
        one = distiller.end(module).eval()(images())
    assert one is not two and (one - two).norm() <= 1e-6 * two.norm() and two.norm() > 1e-3
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert not any(isinstance(part, heads.TwoHeads) for part in model.modules())


@pytest.mark.parametrize("name", OWN_HEADS)
def test_a_network_with_a_distillation_head_of_its_own_uses_it(name: str) -> None:
    model = network(name)
    names = set(model.state_dict())
    distiller = distiller_of("soft(teacher='t')")
    module = trained(distiller, model)
    cls, dist = module(images())
    assert module is model and cls.shape == dist.shape == (8, CLASSES) and not torch.allclose(cls, dist)
    bare = distiller.end(module)
    assert set(bare.state_dict()) == names and isinstance(bare.train()(images()), torch.Tensor)
    assert isinstance(bare.eval()(images()), torch.Tensor)


@pytest.mark.parametrize("name", OWN_HEADS)
def test_one_head_can_be_asked_of_a_network_with_two(name: str) -> None:
    module = distiller_of("soft(teacher='t', heads=1)").begin(network(name)).train()
    assert isinstance(module(images()), torch.Tensor)


def test_in_eval_mode_an_own_pair_of_heads_is_averaged() -> None:
    model = network("deit_tiny_distilled_patch16_224").eval()
    with torch.no_grad():
        tokens = model.forward_features(images())  # type: ignore[operator]
        mean = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2  # type: ignore[operator]
        assert torch.allclose(model(images()), mean, atol=1e-6)


def test_a_single_head_stays_single_where_nobody_asks_for_two() -> None:
    model = network("resnet10t")
    assert distiller_of("soft(teacher='t')").begin(model) is model and isinstance(model.train()(images()), torch.Tensor)


def test_two_heads_and_maps_go_together() -> None:
    model = network("vit_tiny_patch16_224")
    names = set(model.state_dict())
    distiller = distiller_of("hard(teacher='t', heads=2) | features() | attention()")
    module = trained(distiller, model)
    assert isinstance(module(images())["logits"], tuple)
    with torch.no_grad():
        two = module.eval()(images())
        one = distiller.end(module).eval()(images())
    assert (one - two).norm() <= 1e-6 * two.norm() and set(model.state_dict()) == names


def test_the_second_head_is_drawn_by_the_seed_alone() -> None:
    weights = []
    for seed in (1, 1, 2):
        model = network("resnet10t")
        before = torch.get_rng_state()
        heads.add(model, seed)
        assert torch.equal(before, torch.get_rng_state())
        weights.append(model.fc.dist.weight)  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_copy_with_averaged_weights_folds_as_well() -> None:
    model = network("resnet10t")
    heads.add(model, 0)
    twin = copy.deepcopy(model)
    expected = twin.eval()(images())
    heads.fold(twin)
    heads.fold(twin)  # twice is once
    assert torch.allclose(twin(images()), expected, atol=1e-6) and isinstance(model.fc, heads.TwoHeads)


def test_a_network_without_one_linear_head_is_told_so() -> None:
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), nn.Linear(3, 2)):
        with pytest.raises(TrainingError, match="no single linear head"):
            heads.add(model, 0)
