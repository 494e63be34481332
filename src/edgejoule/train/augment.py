"""What happens to an image before a network sees it: random in training, a function of numbers, and fixed in evaluation.

timm's transforms, RandAugment, random erasing and mixup are used as they are; they draw from the global generators of python, numpy and
torch, so ``drawing`` seeds those from numbers for as long as one image (or one batch) takes, and puts them back.
Where nothing is random, a training image is the evaluation image, pixel by pixel. Knows no dataset, no network and no optimiser.
timm is imported when it is called, so that evaluating needs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgejoule import data, torchvision
from edgejoule.errors import DataError, SpecError
from edgejoule.records import Preprocessing
from edgejoule.train.recipe import Recipe

Transform = Callable[[Any], torch.Tensor]  # PIL image, RGB -> (C, H, W) float32


def preprocessing_for(preprocessing: Preprocessing, recipe: Recipe) -> Preprocessing:
    """The model's own preprocessing, with the recipe's ``crop_pct`` where it states one: used in training and in every evaluation after."""
    return preprocessing if recipe.crop_pct is None else dataclasses.replace(preprocessing, crop_pct=recipe.crop_pct)


# ---------------------------------------------------------------- draws that are functions of numbers


@contextlib.contextmanager
def drawing(*numbers: int) -> Iterator[None]:
    """Within, the global generators of python, numpy and torch's CPU stand where ``numbers`` put them; after, where they stood before.

    Numbers are whole and at least 0. Different lists of numbers give unrelated draws. ``torch.manual_seed`` is not used: it would seed
    every accelerator, too, and put none of them back.
    """
    # The count goes first, because SeedSequence reads (1, 2) and (1, 2, 0) as the same.
    words = np.random.SeedSequence((len(numbers), *numbers)).generate_state(4, np.uint32).tolist()
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(words[0])
        np.random.seed(words[1])
        torch.default_generator.manual_seed(words[2] << 32 | words[3])
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


# ---------------------------------------------------------------- one image


@dataclass(frozen=True, slots=True)
class Cropped:
    """The evaluation's resizing and cropping, still a PIL image. Equal to timm's."""

    preprocessing: Preprocessing

    def __call__(self, image: Any) -> Any:
        return data.crop(image, self.preprocessing)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """PIL image -> (C, H, W) float32, by ``edgejoule.data``: what a compiled network is given too."""

    preprocessing: Preprocessing

    def __call__(self, image: Any) -> torch.Tensor:
        crop = np.asarray(data.crop(image, self.preprocessing), dtype=np.uint8)  # (H, W, C)
        return torch.from_numpy(data.normalise(crop.transpose(2, 0, 1)[None], self.preprocessing)[0])


def evaluation_transform(preprocessing: Preprocessing) -> Transform:
    """A picklable function, PIL image -> (C, H, W) float32: resized, centre-cropped, normalised. Raises DataError where it is called."""
    _check_colour(preprocessing)
    return Evaluated(preprocessing)


def training_transform(preprocessing: Preprocessing, recipe: Recipe) -> Transform:
    """A picklable function, PIL image -> (C, H, W) float32; it draws from the global generators (see ``drawing``).

    In the order of timm: crop and flip; RandAugment, or colour jitter; normalise; erase. ``crop_scale`` (1, 1) is the evaluation's own
    crop in place of a random one. timm leaves colour jitter out where RandAugment is on, as DeiT's training did. An erased rectangle is
    filled with normal noise for each pixel, as DeiT's. Raises DataError for a network that is not given RGB, SpecError for a
    RandAugment spelling that timm cannot read.
    """
    torchvision.ensure()
    from timm.data import create_transform
    from torchvision.transforms import Compose

    _check_colour(preprocessing)
    if not _random(recipe):
        return Evaluated(preprocessing)
    try:
        first, second, last = create_transform(
            preprocessing.input_size,
            is_training=True,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter if any(recipe.color_jitter) else None,
            auto_augment=recipe.rand_augment or None,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=recipe.erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"timm cannot make the augmentation of the recipe {recipe.name} (rand_augment={recipe.rand_augment!r}, "
            f"color_jitter={recipe.color_jitter}, interpolation {preprocessing.interpolation!r}): {error}"
        ) from error
    if recipe.crop_scale == (1.0, 1.0):
        first.transforms[0] = Cropped(preprocessing)
    whole: Transform = Compose([*first.transforms, *second.transforms, *last.transforms])
    return whole


def _random(recipe: Recipe) -> bool:
    jitter = any(recipe.color_jitter) or recipe.rand_augment
    return bool(recipe.crop_scale != (1.0, 1.0) or recipe.hflip or jitter or recipe.erasing)


def _check_colour(preprocessing: Preprocessing) -> None:
    if preprocessing.input_size[0] != 3:
        raise DataError(f"cannot make images of {preprocessing.input_size[0]} channels: expected a model that takes RGB")


# ---------------------------------------------------------------- a batch


@dataclass(frozen=True, slots=True)
class Mixing:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) by timm, one draw a batch, as a function of numbers.

    Each image is mixed with the one that stands as far from the other end of the batch, so batches are mixed within a process: with
    mixing on, the number of processes and of accumulation steps does change what is seen.
    """

    mixup: float
    cutmix: float
    prob: float
    switch: float
    smoothing: float
    classes: int

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, draws: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W), (B,) -> mixed images (B, C, H, W) and targets (B, K) float32; what was given stays as it is.

        timm pairs images, so the last one of an odd batch is left unmixed.
        """
        from timm.data import Mixup

        mix = Mixup(self.mixup, self.cutmix, None, self.prob, self.switch, "batch", True, self.smoothing, self.classes)
        pairs = len(labels) // 2 * 2
        whole, target = images.clone(), torch.empty((len(labels), self.classes), device=images.device)
        with drawing(*draws):
            if pairs:
                _, target[:pairs] = mix(whole[:pairs], labels[:pairs])
        if pairs < len(labels):
            mix.mixup_enabled = False
            last = slice(pairs, None)
            target[last] = mix(whole[last].repeat(2, 1, 1, 1), labels[last].repeat(2))[1][:1]
        return whole, target


def mixing(recipe: Recipe, classes: int) -> Mixing | None:
    """What the recipe says about mixing images; None where it says nothing."""
    if not (recipe.mixup or recipe.cutmix) or not recipe.mix_prob:
        return None
    return Mixing(recipe.mixup, recipe.cutmix, recipe.mix_prob, recipe.mix_switch, recipe.smoothing, classes)
