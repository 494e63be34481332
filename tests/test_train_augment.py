"""Augmentation as a function of numbers: equal to timm's where nothing is random, repeatable where it is, and no draw left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgejoule import torchvision
from edgejoule.errors import DataError, SpecError
from edgejoule.records import Preprocessing
from edgejoule.train.recipe import Recipe
from edgejoule.train.recipes import find

torchvision.ensure()
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import Mixup, create_transform  # noqa: E402

from edgejoule.train import augment  # noqa: E402

SMALL = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=0.875)
QUIET = dataclasses.replace(find("digits"), crop_scale=(1.0, 1.0), hflip=0.0)
HEAVY = find("deit")


def picture(width: int = 12, height: int = 12, seed: int = 0) -> Any:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def timm_evaluation(preprocessing: Preprocessing) -> Any:
    p = preprocessing
    return create_transform(p.input_size, crop_pct=p.crop_pct, interpolation=p.interpolation, mean=p.mean, std=p.std, crop_mode=p.crop_mode)


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def drawn(transform: augment.Transform, image: Any, *numbers: int) -> torch.Tensor:
    with augment.drawing(*numbers):
        return transform(image)


# ---------------------------------------------------------------- where nothing is random


@pytest.mark.parametrize("size", [(12, 12), (17, 11), (8, 8), (9, 30)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_an_evaluation_image_is_timms_to_the_last_bit(size: tuple[int, int], crop_pct: float) -> None:
    preprocessing = dataclasses.replace(SMALL, crop_pct=crop_pct)
    image = picture(*size)
    assert torch.equal(augment.evaluation_transform(preprocessing)(image), timm_evaluation(preprocessing)(image))


@pytest.mark.parametrize("size", [(12, 12), (17, 11)])
def test_without_augmentation_a_training_image_is_the_evaluation_image(size: tuple[int, int]) -> None:
    image = picture(*size)
    assert torch.equal(augment.training_transform(SMALL, QUIET)(image), augment.evaluation_transform(SMALL)(image))


def test_with_a_flip_alone_a_training_image_is_the_evaluation_image_or_its_mirror() -> None:
    transform = augment.training_transform(SMALL, dataclasses.replace(QUIET, hflip=0.5))
    image, plain = picture(), augment.evaluation_transform(SMALL)(picture())
    seen = [drawn(transform, image, 0, 0, 0, index) for index in range(16)]
    straight = [torch.equal(each, plain) for each in seen]
    assert all(one or torch.equal(each, plain.flip(-1)) for one, each in zip(straight, seen, strict=True))
    assert 0 < sum(straight) < 16


def test_the_recipes_crop_replaces_the_models_own_and_nothing_else() -> None:
    changed = augment.preprocessing_for(SMALL, dataclasses.replace(QUIET, crop_pct=1.0))
    assert changed == dataclasses.replace(SMALL, crop_pct=1.0)
    assert augment.preprocessing_for(SMALL, QUIET) is SMALL


# ---------------------------------------------------------------- where much is


def test_a_training_image_is_what_timm_makes_of_the_same_draws() -> None:
    recipe = dataclasses.replace(HEAVY, erasing=1.0)
    theirs = create_transform(
        SMALL.input_size,
        is_training=True,
        scale=(0.08, 1.0),
        ratio=(0.75, 4 / 3),
        hflip=0.5,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        mean=SMALL.mean,
        std=SMALL.std,
        re_prob=1.0,
        re_mode="pixel",
    )
    ours = augment.training_transform(SMALL, recipe)
    for index in range(8):
        assert torch.equal(drawn(ours, picture(20, 16), 3, index), drawn(theirs, picture(20, 16), 3, index))


def test_colour_jitter_is_left_out_where_randaugment_is_on() -> None:
    assert "ColorJitter" not in str(augment.training_transform(SMALL, HEAVY))
    assert "ColorJitter" in str(augment.training_transform(SMALL, find("cifar10_levit")))


def test_equal_numbers_give_equal_images_and_any_other_number_another() -> None:
    transform, image = augment.training_transform(SMALL, HEAVY), picture(32, 32)
    first = drawn(transform, image, 1, 2, 3, 4)
    assert torch.equal(first, drawn(transform, image, 1, 2, 3, 4))
    for other in [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 2, 3)]:
        assert not torch.equal(first, drawn(transform, image, *other))


SCRIPT = """
from tests.test_train_augment import HEAVY, SMALL, augment, drawn, hashed, picture
print(hashed(augment.training_transform(SMALL, HEAVY)))
"""


def hashed(transform: augment.Transform) -> str:
    made = [drawn(transform, picture(20, 16), 7, 0, position, position) for position in range(4)]
    return hashlib.sha256(torch.stack(made).numpy().tobytes()).hexdigest()


def test_another_process_makes_the_same_images() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == hashed(augment.training_transform(SMALL, HEAVY))


def test_a_transform_travels_to_workers() -> None:
    for recipe in (QUIET, HEAVY, find("cifar10_levit"), find("cifar10_finetune")):
        transform = augment.training_transform(SMALL, recipe)
        assert hashed(pickle.loads(pickle.dumps(transform))) == hashed(transform)


def test_drawing_leaves_every_generator_where_it_was_even_when_something_breaks() -> None:
    before = states()
    with augment.drawing(1, 2):
        random.random(), np.random.rand(), torch.rand(1)
    with pytest.raises(ZeroDivisionError), augment.drawing(1, 2):
        torch.rand(1) / (1 // 0)
    assert states() == before


def test_drawings_inside_one_another_go_on_where_they_were() -> None:
    with augment.drawing(5):
        plain = torch.rand(1), torch.rand(1)
    with augment.drawing(5):
        first = torch.rand(1)
        with augment.drawing(6):
            torch.rand(9)
        assert (first, torch.rand(1)) == plain


def test_a_trailing_zero_is_a_number_too() -> None:
    draws = set()
    for numbers in [(), (0,), (0, 0), (1,), (1, 0), (1, 2), (1, 2, 0)]:
        with augment.drawing(*numbers):
            draws.add((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert len(draws) == 7


def test_what_timm_cannot_read_is_one_of_our_errors() -> None:
    with pytest.raises(SpecError, match="rand-x9"):
        augment.training_transform(SMALL, dataclasses.replace(HEAVY, rand_augment="rand-x9"))
    with pytest.raises(DataError, match="RGB"):
        augment.training_transform(dataclasses.replace(SMALL, input_size=(1, 8, 8)), HEAVY)
    with pytest.raises(DataError, match="RGB"):
        augment.evaluation_transform(dataclasses.replace(SMALL, input_size=(1, 8, 8)))


# ---------------------------------------------------------------- batches


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 8, 8, generator=made), torch.randint(0, 5, (size,), generator=made)


def recipe(**changes: Any) -> Recipe:
    return dataclasses.replace(HEAVY, **changes)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms_and_leaves_its_arguments_and_the_generators_alone(mixup: float, cutmix: float) -> None:
    images, labels = batch(6)
    kept, before = images.clone(), states()
    mix = augment.mixing(recipe(mixup=mixup, cutmix=cutmix), 5)
    assert mix is not None
    mixed, target = mix(images, labels, (0, 1, 2))
    assert torch.equal(images, kept) and states() == before
    with augment.drawing(0, 1, 2):
        theirs = Mixup(mixup, cutmix, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=5)(images.clone(), labels)
    assert torch.equal(mixed, theirs[0]) and torch.equal(target, theirs[1])
    assert not torch.equal(mixed, images)


def test_mixing_is_a_function_of_its_numbers() -> None:
    mix = augment.mixing(HEAVY, 5)
    assert mix is not None
    made = [mix(*batch(4), (0, 0, position))[1] for position in (0, 1, 0)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_odd_image_out_stays_as_it_is(size: int) -> None:
    mix = augment.mixing(recipe(cutmix=0.0), 5)
    assert mix is not None
    images, labels = batch(size)
    mixed, target = mix(images, labels, (0, 0, 0))
    assert torch.equal(mixed[-1], images[-1])
    assert target[-1].argmax() == labels[-1] and float(target[-1].max()) == pytest.approx(0.92)  # 0.9 + 0.1 / 5
    assert target.sum(-1).tolist() == pytest.approx([1.0] * size)
    assert size == 1 or not torch.equal(mixed[:-1], images[:-1])


def test_a_recipe_that_mixes_nothing_has_no_mixing() -> None:
    assert augment.mixing(QUIET, 5) is None
    assert augment.mixing(recipe(mix_prob=0.0), 5) is None
