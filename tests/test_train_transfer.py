"""Maps of networks of any family, compared with a teacher's, and what is left of it all in the end: nothing."""

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
from edgejoule.train import distil, losses, transfer
from edgejoule.train.task import At, Which

torchvision.ensure()
import timm  # noqa: E402

from edgejoule import zoo  # noqa: E402, F401 - registers EdgeViT with timm

CLASSES = 4
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
SMALL = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
LARGE = Preprocessing((3, 48, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {**VIT, "img_size": 32},
    "deit_tiny_distilled_patch16_224": {**VIT, "img_size": 32},
    "levit_conv_128s": {"img_size": 32, "embed_dim": (16, 24, 32), "key_dim": 8, "depth": (1, 1, 1), "num_heads": (1, 2, 2)},
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 32, 48), "num_heads": (1, 2, 2, 3), "depths": (1, 1, 1, 1)},
    "edgevit_digits": {},
    "resnet10t": {"channels": (8, 16, 24, 32), "stem_width": 8},
}


def network(name: str, size: int = 32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {**FAMILIES[name], **options}
    if "img_size" in given:
        given["img_size"] = size
    made: nn.Module = timm.create_model(name, num_classes=CLASSES, **given)
    return made


class Plain(nn.Module):
    """A network that only says by feature_info where its maps are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, CLASSES)
        self.num_classes = CLASSES
        self.feature_info = [{"num_chs": 6, "reduction": 4, "module": "stem"}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stem(x).mean((2, 3)))
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_gives_its_maps_with_the_answer_it_gives_alone(name: str) -> None:
    module = network(name).eval()
    shapes = transfer.shapes_of(module, (3, 32, 32), name)
    assert len(shapes) >= 3 and all(len(shape) == 3 for shape in shapes)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        answer, maps = transfer.answer_with_maps(module, images, [0, len(shapes) - 1])
        assert torch.allclose(answer, module(images), atol=1e-5)
    assert [tuple(x.shape[1:]) for x in maps] == [shapes[0], shapes[-1]]


def test_a_network_without_forward_intermediates_is_heard_by_hooks_that_are_gone_afterwards() -> None:
    module = Plain()
    assert transfer.shapes_of(module, (3, 32, 32), "it") == [(6, 8, 8)]
    assert not module.stem._forward_hooks and module.training  # as it was
    answer, (found,) = transfer.answer_with_maps(module, images := torch.randn(2, 3, 16, 16), [0])
    assert torch.equal(found, module.stem(images)) and torch.equal(answer, module(images))


def test_tokens_become_maps() -> None:
    tokens = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3)
    found = transfer._as_map(tokens, 3, 1)
    assert found.shape == (2, 3, 3, 3) and torch.equal(found[0, :, 0, 1], tokens[0, 2])
    with pytest.raises(TrainingError, match="no square"):
        transfer._as_map(tokens, 3, 0)


def test_a_network_that_gives_no_maps_is_told_so() -> None:
    with pytest.raises(TrainingError, match="no intermediate maps"):
        transfer.shapes_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (3, 8, 8), "it")


def test_layers_are_equally_spaced_in_depth_and_end_with_the_last() -> None:
    four, twelve = [(1, 1, 1)] * 4, [(1, 1, 1)] * 12
    assert transfer.pairs_of(1, four, twelve) == ((3, 11),)
    assert transfer.pairs_of(0, four, twelve) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert transfer.pairs_of(0, twelve[:2], twelve) == ((0, 5), (1, 11))
    assert transfer.pairs_of([[0, -1], (-2, 3)], four, twelve) == ((0, 11), (2, 3))
    for layers in (5, [[4, 0]], [[0, -13]]):
        with pytest.raises(TrainingError, match=r"layers|number"):
            transfer.pairs_of(layers, four, twelve)


def test_the_feature_loss_is_twice_one_minus_the_correlation() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 3)
    assert losses.feature_loss(x, 5 * x + 2) == pytest.approx(0, abs=1e-4)
    assert losses.feature_loss(x, -x) == pytest.approx(4, rel=1e-3)


def test_maps_of_different_sizes_meet_at_the_smaller_one() -> None:
    small = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    large = functional.interpolate(small, scale_factor=2)
    assert losses.feature_loss(large, small) == pytest.approx(0, abs=1e-6)
    a, b = losses.at_one_size(torch.zeros(1, 2, 8, 3), torch.zeros(1, 5, 4, 6))
    assert a.shape == (1, 2, 4, 3) and b.shape == (1, 5, 4, 3)


def test_the_attention_loss_is_that_of_the_released_code() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 4, 4), torch.randn(3, 9, 4, 4)

    def at(z: torch.Tensor) -> torch.Tensor:
        return functional.normalize(z.pow(2).mean(1).view(z.shape[0], -1))

    assert losses.attention_loss(x, y) == pytest.approx((at(x) - at(y)).pow(2).mean().item(), rel=1e-5)
    assert losses.attention_loss(1e-18 * x, 1e15 * y) == pytest.approx(losses.attention_loss(x, y).item(), rel=1e-4)


PAIRS = [("edgevit_digits", "vit_tiny_patch16_224"), ("vit_tiny_patch16_224", "resnet10t"), ("levit_conv_128s", "tiny_vit_5m_224")]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_student_of_any_family_learns_the_maps_of_any_other(student: str, teacher: str) -> None:
    plan = distil.parse("features(teacher='t', weight=2.0) | attention() | soft(alpha=0.5)")
    model = network(student)
    names, before = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    distiller = distil.open_distiller(
        plan,
        network(teacher, size=48),
        teacher_preprocessing=LARGE,
        teacher_weights="file",
        student_preprocessing=SMALL,
        num_classes=CLASSES,
    )
    module = distiller.begin(model).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(8)
    where, at = Which(numbers, torch.zeros_like(numbers), numbers), At(0, 0, 0, 0, 1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    seen = []
    for _ in range(12):
        loss = distiller.loss(module, images, module(images), lambda z: functional.cross_entropy(z, numbers % CLASSES), where, at)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)  # nothing that a process group would wait for
    assert seen[-1] < 0.8 * seen[0]
    bare = distiller.end(module)
    assert bare is model and set(bare.state_dict()) == names and sum(p.numel() for p in bare.parameters()) == before
    module.eval(), bare.eval()
    assert torch.equal(module(images), bare(images))
    assert isinstance(bare.train()(images), torch.Tensor)


def test_a_teacher_of_maps_alone_may_know_other_classes() -> None:
    torch.manual_seed(0)
    options = {**FAMILIES["resnet10t"], "num_classes": 9}
    given: dict[str, Any] = {"teacher_preprocessing": SMALL, "teacher_weights": "pretrained", "student_preprocessing": SMALL}
    teacher = timm.create_model("resnet10t", **options)
    with pytest.raises(TrainingError, match="knows 9 classes"):
        distil.open_distiller(distil.parse("hard(teacher='t') | attention()"), teacher, num_classes=CLASSES, **given)
    distiller = distil.open_distiller(distil.parse("attention(teacher='t')"), teacher, num_classes=CLASSES, **given)
    module, numbers = distiller.begin(network("resnet10t")).train(), torch.arange(2)
    images = torch.randn(2, 3, 32, 32)
    loss = distiller.loss(module, images, module(images), torch.mean, Which(numbers, numbers, numbers), At(0, 0, 0, 0, 1))
    assert torch.isfinite(loss)


def test_projections_stand_only_where_widths_differ_and_are_drawn_by_the_seed() -> None:
    made = [transfer.projections_of(((0, 0), (0, 1)), [(6, 2, 2)], [(6, 9, 9), (8, 1, 1)], seed) for seed in (1, 1, 2)]
    assert isinstance(made[0][0], nn.Identity)
    weights = [parts[1].weight for parts in made]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    before = torch.get_rng_state()
    transfer.projections_of(((0, 0),), [(6, 2, 2)], [(8, 1, 1)], 0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_wrapped_network_still_says_what_is_not_decayed_and_which_layer_is_which() -> None:
    from timm.optim import param_groups_layer_decay

    model = network("vit_tiny_patch16_224")
    alone = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    module = transfer.Tapped(model, [3], [], [nn.Conv2d(24, 7, 1)])
    assert module.no_weight_decay() == {f"network.{name}" for name in model.no_weight_decay()}  # type: ignore[operator]
    wrapped = {id(p): g["lr_scale"] for g in param_groups_layer_decay(module, layer_decay=0.5) for p in g["params"]}
    assert {key: wrapped[key] for key in alone} == alone and wrapped[id(module.projections[0].weight)] == 1.0
    assert copy.deepcopy(module).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, CLASSES)
