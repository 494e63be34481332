"""Learning classes: losses against timm's own, draws that depend on numbers only, and scores that leave bad images out."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgejoule import torchvision
from edgejoule.errors import BadImageError, DataError, SpecError
from edgejoule.records import Preprocessing
from edgejoule.train.recipe import Recipe
from edgejoule.train.recipes import find

torchvision.ensure()
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from edgejoule.train import augment  # noqa: E402
from edgejoule.train.classification import Classification, logits  # noqa: E402
from edgejoule.train.task import At, Which  # noqa: E402

CPU = torch.device("cpu")
SMALL = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3, crop_pct=1.0)
QUIET = dataclasses.replace(find("digits"), crop_scale=(1.0, 1.0), smoothing=0.0)
HEAVY = find("deit")
AT = At(seed=3, epoch=1, position=8, step=5, steps=9)


class Coloured:
    """Images of 10 x 10 px, three classes by brightness; some cannot be decoded. Opened by worker processes, too."""

    def __init__(self, count: int = 12, bad: tuple[int, ...] = (), label: int | None = None) -> None:
        self.count, self.bad, self.label = count, bad, label

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self.bad:
            raise BadImageError(f"cannot read {self.key(index)}")
        pixels = np.random.default_rng(index).integers(0, 60, (10, 10, 3), dtype=np.uint8) + np.uint8(80 * (index % 3))
        return Image.fromarray(pixels), index % 3 if self.label is None else self.label

    def key(self, index: int) -> str:
        return f"picture {index}"


class Network(nn.Module):
    """(B, 3, 8, 8) -> (B, 3), or as many heads in training."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.heads = nn.ParameterList([nn.Parameter(torch.randn(192, 3, generator=made) / 14) for _ in range(heads)])

    def forward(self, images: torch.Tensor) -> Any:
        found = [images.flatten(1) @ head for head in self.heads]
        if len(found) == 1:
            return found[0]
        return tuple(found) if self.training else sum(found) / len(found)


def task(recipe: Recipe = QUIET, training: Any = None, validation: Any = None, distiller: Any = None, seed: int = 0) -> Classification:
    return Classification(training or Coloured(), validation or Coloured(), 3, SMALL, recipe, seed, distiller)


def batch(one: Classification, count: int = 4) -> Any:
    return one.collate([one.training[0, position, position] for position in range(count)])


# ---------------------------------------------------------------- samples


def test_a_sample_says_which_image_it_is_and_collates_into_tensors() -> None:
    one = task()
    images, labels, index, epoch, position = one.collate([one.training[2, 7, 1], one.training[2, 8, 5]])
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert [each.tolist() for each in (labels, index, epoch, position)] == [[1, 2], [1, 5], [2, 2], [7, 8]]
    assert {each.dtype for each in (labels, index, epoch, position)} == {torch.int64}
    assert len(one.training) == 12


def test_a_sample_depends_on_its_numbers_and_the_seed_alone() -> None:
    one, again, other = task(HEAVY), task(HEAVY), task(HEAVY, seed=1)
    again.training[0, 0, 3]  # whatever was drawn before
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = one.training[1, 2, 3][0]
    assert torch.equal(first, again.training[1, 2, 3][0])
    assert not torch.equal(first, other.training[1, 2, 3][0])
    assert not torch.equal(first, one.training[2, 2, 3][0])
    assert not torch.equal(first, one.training[1, 3, 3][0])


class Numbered:
    """The training samples in their order, for a plain DataLoader."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Any:
        return self.samples[0, position, position]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers: int) -> None:
    one = task(HEAVY)
    loaded = list(DataLoader(Numbered(one.training), 4, num_workers=workers, collate_fn=one.collate))  # type: ignore[arg-type]
    here = list(DataLoader(Numbered(one.training), 4, collate_fn=one.collate))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for ours, theirs in zip(loaded, here, strict=True) for a, b in zip(ours, theirs, strict=True))


def test_the_training_samples_travel_to_workers() -> None:
    one = task(HEAVY)
    assert torch.equal(pickle.loads(pickle.dumps(one.training))[0, 1, 2][0], one.training[0, 1, 2][0])


def test_a_bad_image_is_the_loops_to_count() -> None:
    with pytest.raises(BadImageError, match="picture 1"):
        task(training=Coloured(bad=(1,))).training[0, 0, 1]


def test_a_label_that_is_no_class_names_its_image() -> None:
    with pytest.raises(DataError, match="picture 2 has the label 3"):
        task(training=Coloured(label=3)).training[0, 0, 2]
    with pytest.raises(DataError, match="picture 0 has the label -1"):
        task(validation=Coloured(label=-1)).scores(Network(), CPU)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_timms_cross_entropy(smoothing: float) -> None:
    one, network = task(dataclasses.replace(QUIET, smoothing=smoothing)), Network().train()
    made = batch(one)
    expected = LabelSmoothingCrossEntropy(smoothing)(network(made[0]), made[1])
    assert one.loss(network, made, AT).item() == pytest.approx(expected.item(), rel=1e-6)


def test_mixed_images_are_learned_with_mixed_targets_drawn_from_where_training_stands() -> None:
    recipe = dataclasses.replace(QUIET, mixup=0.8, cutmix=1.0, smoothing=0.1)
    one, network = task(recipe), Network().train()
    made, kept = batch(one), batch(one)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = one.loss(network, made, AT)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    mix = augment.mixing(recipe, 3)
    assert mix is not None
    images, target = mix(made[0], made[1], AT.draws)
    expected = SoftTargetCrossEntropy()(network(images), target)
    assert first.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(made, kept, strict=True))
    assert one.loss(network, made, dataclasses.replace(AT, position=12)).item() != first.item()
    assert one.loss(network, made, dataclasses.replace(AT, step=99)).item() == first.item()


class Halved(Network):
    """Answers in half precision, as a network does whose forward pass alone is autocast."""

    def forward(self, images: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(images)


def test_half_precision_logits_are_added_up_in_float32() -> None:
    one, network = task(), Halved().train()
    made = batch(one)
    loss, halves = one.loss(network, made, AT), network(made[0])
    assert halves.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy(halves.float(), made[1]).item(), rel=1e-6)


def test_two_heads_both_learn_the_label_where_nobody_teaches() -> None:
    one, network = task(), Network(heads=2).train()
    made = batch(one)
    expected = sum(cross_entropy(head, made[1]) for head in network(made[0])) / 2
    loss = one.loss(network, made, AT)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert all(head.grad is not None and head.grad.abs().sum() > 0 for head in network.heads)


def test_the_loss_goes_down() -> None:
    one, network = task(), Network().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = one.loss(network, batch(one, 12), AT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert one.scores(network.eval(), CPU)["top1"] == 1.0


# ---------------------------------------------------------------- a teacher


class Heard:
    """A distiller that notes what it is told."""

    period = 4

    def __init__(self) -> None:
        self.heard: dict[str, Any] = {}

    def begin(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.Identity())

    def end(self, model: nn.Module) -> nn.Module:
        return model[0]  # type: ignore[index]

    def loss(
        self, model: nn.Module, images: torch.Tensor, outputs: Any, of_target: Callable[[Any], torch.Tensor], which: Which, at: At
    ) -> torch.Tensor:
        self.heard = {"images": images, "outputs": outputs, "which": which, "at": at}
        return 2 * of_target(outputs)


def test_a_teacher_hears_what_the_network_saw_and_said() -> None:
    teacher = Heard()
    recipe = dataclasses.replace(QUIET, mixup=0.8, smoothing=0.1)
    one, network = task(recipe, distiller=teacher), Network()
    assert one.period == 4 and task().period == 0
    wrapped = one.begin(network).train()
    assert wrapped is not network and one.end(wrapped) is network
    made = batch(one)
    loss = one.loss(wrapped, made, AT)
    assert loss.item() == pytest.approx(2 * task(recipe).loss(network, made, AT).item(), rel=1e-6)
    assert not torch.equal(teacher.heard["images"], made[0])  # as mixed
    assert torch.equal(teacher.heard["outputs"], wrapped(teacher.heard["images"]))
    assert teacher.heard["which"] == Which(made[2], made[3], made[4]) and teacher.heard["at"] is AT


def test_without_a_teacher_the_network_is_trained_as_it_is() -> None:
    network = Network()
    assert task().begin(network) is network and task().end(network) is network


# ---------------------------------------------------------------- scores


def reference(network: nn.Module, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    transform = augment.evaluation_transform(SMALL)
    images = torch.stack([transform(Coloured()[index][0]) for index in indices])
    return network.eval()(images).detach(), torch.tensor([index % 3 for index in indices])


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_are_top1_and_likelihood_of_the_images_that_can_be_decoded(workers: int) -> None:
    network = Network()
    one = Classification(Coloured(), Coloured(bad=(2, 7)), 3, SMALL, HEAVY, 0, workers=workers, max_bad_images=2)
    scored, labels = reference(network, [index for index in range(12) if index not in (2, 7)])
    scores = one.scores(network, CPU)
    assert scores["top1"] == pytest.approx(float((scored.argmax(-1) == labels).float().mean()))
    assert scores["loss"] == pytest.approx(float(cross_entropy(scored, labels)), rel=1e-5)  # no smoothing, no mixing
    assert set(scores) == {"top1", "loss"} and 0 < scores["top1"] < 1


def test_logits_stand_in_the_order_of_the_images_and_bad_ones_are_named() -> None:
    network, events = Network(heads=2).train(), []
    before = torch.get_rng_state().tolist()
    found, labels, bad = logits(network, Coloured(bad=(0, 3, 4)), SMALL, CPU, batch=2, notify=events.append)
    assert network.training and torch.get_rng_state().tolist() == before
    scored, expected = reference(network, [1, 2, *range(5, 12)])
    assert found.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_allclose(found, scored.numpy(), rtol=1e-5, atol=1e-6)
    assert labels.tolist() == expected.tolist() and bad == (0, 3, 4)
    assert [event.done for event in events] == [2, 4, 6, 8, 10, 12] and events[-1].total == 12


def test_a_batch_of_bad_images_only_is_passed_over() -> None:
    found, _, bad = logits(Network(), Coloured(bad=(0, 1)), SMALL, CPU, batch=2)
    assert found.shape == (10, 3) and bad == (0, 1)


def test_with_nothing_to_judge_by_there_is_no_score() -> None:
    nothing = Coloured(2, bad=(0, 1))
    with pytest.raises(DataError, match="no image to judge"):
        Classification(Coloured(), nothing, 3, SMALL, QUIET, 0, max_bad_images=2).scores(Network(), CPU)
    with pytest.raises(BadImageError, match=r"picture 1 \(1 such images are allowed"):
        Classification(Coloured(), nothing, 3, SMALL, QUIET, 0, max_bad_images=1).scores(Network(), CPU)
    with pytest.raises(BadImageError, match="picture 0"):
        logits(Network(), nothing, SMALL, CPU, max_bad_images=0)
    with pytest.raises(DataError, match="no image to judge"):
        logits(Network(), nothing, SMALL, CPU)
    with pytest.raises(DataError, match="no image to judge"):
        logits(Network(), Coloured(0), SMALL, CPU)


def test_what_cannot_be_trained_is_said_at_once() -> None:
    with pytest.raises(SpecError, match="for detection"):
        task(find("dense_1x"))
    with pytest.raises(DataError, match="two or more"):
        Classification(Coloured(), Coloured(), 1, SMALL, QUIET, 0)


def test_the_headline_is_a_score() -> None:
    one = task()
    assert one.headline in one.scores(Network(), CPU)
    assert math.isfinite(one.scores(Network(), CPU)["loss"])
