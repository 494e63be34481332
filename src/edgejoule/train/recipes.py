"""The table of training recipes, and how a spelling as ``deit(epochs=100, batch=256)`` picks one and changes it.

Each recipe says where it comes from, what it should give and what it costs: figures of others are called published, and costs that
nobody measured here are called estimates. Knows no torch, no network and no data: recipes are data.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any

from edgejoule import registry
from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.train.recipe import Recipe

_DEIT = Recipe(
    name="deit",
    kind="classification",
    about="ImageNet-1K from random weights, as DeiT and the EdgeViT paper: 300 epochs of heavy augmentation, no teacher",
    source="Touvron et al. 2021 (arXiv 2012.12877), facebookresearch/deit; the EdgeViT release (Pan et al. 2022, arXiv 2205.03436) "
    "gives the same list. Theirs steps the schedule once an epoch, ours by optimiser step; "
    "both keep the averaged weights and report the others.",
    expect="published: EdgeViT-XXS 74.4 %, XS 77.5 %, S 81.0 % top-1 on ImageNet-1K (EdgeViT, Table 2); DeiT-Ti 72.2 %, DeiT-S 79.9 %",
    cost="estimate, nothing measured: 384 million images, 13 hours at an assumed 1,000 images/s for each of 8 GPUs; decoding must keep up",
    epochs=300,
    batch=1024,
    lr=5e-4,
    lr_batch=512,  # so 1e-3 at 1024
    weight_decay=0.05,
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
    ema=0.99996,
    evaluate_ema=False,
    crop_scale=(0.08, 1.0),
    color_jitter=(
        0.4,
        0.4,
        0.4,
        0.0,
    ),  # stated by the source, and left out by timm where RandAugment is on
    rand_augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    repeats=3,
    drop_path=0.1,
)

_CIFAR10_FINETUNE = Recipe(
    name="cifar10_finetune",
    kind="classification",
    about="pretrained weights to CIFAR-10 at the network's own input size: 15,000 steps of plain SGD, images resized whole and flipped",
    source="public scripts whose list of 13 models is that of E3P-ViT (Amanzhol & Park 2025, arXiv 2511.23166); that they are "
    "the authors' own is not proven, and the paper states no hyper-parameters. They normalise "
    "by ImageNet's mean and deviation, we by each model's own.",
    expect="inferred from the paper's SAM5, not published: on CIFAR-10 TinyViT-11M distilled about 98.0 %, LeViT_Conv_192 about 97.5 %",
    cost="estimate, nothing measured: 480,000 images of 224 px, half an hour at an assumed 300 images/s on one GPU",
    steps=15_000,
    batch=32,
    optimizer="sgd",
    lr=0.01,
    momentum=0.9,
    weight_decay=0.0,
    crop_pct=1.0,
)

_CIFAR10_LEVIT = Recipe(
    name="cifar10_levit",
    kind="classification",
    about="pretrained LeViT to CIFAR-10, which plain SGD serves badly: AdamW, 50 epochs, random crops and colour jitter, clipped gradients",
    source="the same scripts' second attempt at LeViT_192 and LeViT_Conv_192, its schedule corrected. Theirs is set up in steps and "
    "then stepped with the number of the epoch, so its learning rate stays between 1e-6 and 3.1e-6 for the whole run; "
    "ours moves by optimiser step.",
    expect="inferred from the paper's SAM5, not published: LeViT_Conv_192 about 97.5 % top-1; of their schedule, so ours may well differ",
    cost="estimate, nothing measured: 2.25 million images of 224 px, 2 hours at an assumed 300 images/s on one GPU",
    epochs=50,
    batch=32,
    lr=3e-4,
    weight_decay=0.05,
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-6,
    clip_norm=5.0,
    crop_scale=(0.08, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    crop_pct=1.0,
)

_DIGITS = Recipe(
    name="digits",
    kind="classification",
    about="scikit-learn's digits from random weights, on two cores: random crops, and no flip, since a mirrored digit is none",
    source="this project's own, chosen by the 193 validation images on two seeds: crops of 0.8 and more of an image (0.6 leaves a plain "
    "ViT at 93 %), 2e-3 with clipped gradients",
    expect="measured here, seed 0, on 374 test images: edgevit_digits 99.7 %, tiny_vit_digits 98.9 %, levit_digits 98.7 % "
    "(edgejoule run digits)",
    cost="measured here on two quiet cores: edgevit_digits 50 s, tiny_vit_digits 44 s, levit_digits 35 s",
    epochs=20,
    batch=32,
    lr=2e-3,
    weight_decay=0.05,
    warmup_epochs=2,
    warmup_lr=1e-6,
    min_lr=1e-6,
    clip_norm=1.0,
    crop_scale=(0.8, 1.0),
    hflip=0.0,
    smoothing=0.1,
)

_TINYVIT_FINETUNE = Recipe(
    name="tinyvit_finetune",
    kind="classification",
    about="a network pretrained on more classes to ImageNet-1K: 30 epochs, the lower the layer the slower, no mixing",
    source="TinyViT (Wu et al. 2022, arXiv 2207.10666), microsoft/Cream TinyViT/configs/22kto1k: 2.5e-4 for each 512 images, layer "
    "decay 0.8. Its configuration inherits the rest (RandAugment, erasing 0.25, smoothing 0.1, clip 5) from Swin's list; it also freezes "
    "BatchNorm's statistics, which this recipe cannot say.",
    expect="published, after 90 epochs of distillation on ImageNet-22k: TinyViT-5M 80.7 %, 11M 83.2 % top-1 on ImageNet-1K",
    cost="estimate, nothing measured: 38 million images, 1.3 hours at an assumed 1,000 images/s for each of 8 GPUs",
    epochs=30,
    batch=1024,
    lr=2.5e-4,
    lr_batch=512,
    weight_decay=1e-8,
    layer_decay=0.8,
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
    clip_norm=5.0,
    crop_scale=(0.08, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.0),  # left out by timm where RandAugment is on
    rand_augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    smoothing=0.1,
    drop_path=0.0,
)

_DENSE_1X = Recipe(
    name="dense_1x",
    kind="detection",
    about="RetinaNet or Mask R-CNN on COCO for 12 epochs, from a backbone pretrained on ImageNet-1K",
    source="the EdgeViT paper (arXiv 2205.03436): AdamW 1e-4, batch 16, 800/1333 px, 12 epochs. As whai362/PVT's "
    "retinanet_pvt_t_fpn_1x_coco.py: decay 1e-4 on everything, no clipping, and mmdetection's 1x schedule: steps at 8 and 11, "
    "linear warm-up of 500 steps from a thousandth",
    expect="published, RetinaNet AP / Mask R-CNN box AP on COCO: EdgeViT-XXS 38.7 / 39.9, XS 40.6 / 41.4, S 43.4 / 44.8 (Table 5)",
    cost="estimate, nothing measured: 1.4 million images of 800 px, 10 hours at an assumed 5 images/s for each of 8 GPUs",
    epochs=12,
    batch=16,
    lr=1e-4,
    weight_decay=1e-4,
    decay_all=True,
    schedule="steps",
    milestones=(8.0, 11.0),
    warmup_steps=500,
    warmup_lr=1e-7,
    size=800,
    longest=1333,
)

_ADESEGM_80K = Recipe(
    name="adesegm_80k",
    kind="segmentation",
    about="Semantic FPN on ADE20K for 80,000 steps, from a backbone pretrained on ImageNet-1K",
    source="the EdgeViT paper (arXiv 2205.03436): AdamW 1e-4, batch 16, 512 px crops, 80,000 steps; decay 1e-4 on everything and the "
    "polynomial schedule of power 0.9 as whai362/PVT's fpn_pvt_t_ade20k_40k.py, which doubles rate and batch and halves the steps",
    expect="published mIoU on ADE20K's validation: EdgeViT-XXS 39.7 %, XS 41.4 %, S 45.9 % (Table 6)",
    cost="estimate, nothing measured: 1.28 million crops of 512 px, 4.5 hours at an assumed 10 crops/s for each of 8 GPUs",
    steps=80_000,
    batch=16,
    lr=1e-4,
    weight_decay=1e-4,
    decay_all=True,
    schedule="poly",
    power=0.9,
    size=512,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_DEIT, _CIFAR10_FINETUNE, _CIFAR10_LEVIT, _DIGITS, _TINYVIT_FINETUNE, _DENSE_1X, _ADESEGM_80K)
}

# ---------------------------------------------------------------- a spelling, read and checked

_TEXTS = frozenset({"name", "kind", "about", "source", "expect", "cost"})  # what a recipe is, which no option changes
_DENSE_ONLY = frozenset({"size", "longest"})
_IMAGES_ONLY = frozenset(
    {"crop_scale", "crop_ratio", "color_jitter", "rand_augment", "erasing", "mixup", "cutmix", "mix_prob", "mix_switch", "smoothing"}
    | {"crop_pct"}
)
_WITHIN: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("hflip", "erasing", "mix_prob", "mix_switch", "momentum", "crop_scale"), (0, 1)),
    **dict.fromkeys(("smoothing", "ema", "drop_path"), (0, 0.99999999)),  # 1 would leave nothing to learn from, or with
    "color_jitter": (0, 1),
    "crop_pct": (0.01, 1),
    "layer_decay": (1e-6, 1),
    "crop_ratio": (0.01, 100),
    "batch": (1, 10**6),
    "repeats": (1, 1000),
    "lr": (1e-12, 1e6),
    "power": (1e-6, 100),
}
_MOST = 10**9  # of all others, which are at least 0
_HINTS = {key: hint for key, hint in typing.get_type_hints(Recipe).items() if key not in _TEXTS}


def find(text: str) -> Recipe:
    """The recipe that a spelling names, with the values that it changes.

    Raises UnknownNameError (with the nearest names) for a recipe or an option that is not there, SpecError for a value that makes no sense
    and for an option that would do nothing in a recipe of this kind.
    """
    call = registry.parse(text)
    if call.name not in RECIPES:
        raise UnknownNameError("training recipe", call.name, RECIPES, f"known: {', '.join(RECIPES)}")
    plain = RECIPES[call.name]
    unused = _DENSE_ONLY if plain.kind == "classification" else _IMAGES_ONLY
    takes = [key for key in _HINTS if key not in unused]
    for key in call.options:
        if key not in takes:
            raise UnknownNameError(f"option of {call.name} ({plain.kind})", key, takes, f"it takes {', '.join(takes)}")
    values = {key: _value(call.name, key, _HINTS[key], value) for key, value in call.options.items()}
    changed = dataclasses.replace(plain, **values)
    if changed == plain:
        return plain
    check(changed)
    return dataclasses.replace(
        changed,
        expect=f"nothing is stated for these options; of {plain.name} as it stands: {plain.expect}",
        cost=f"of {plain.name} as it stands: {plain.cost}",
    )


def canonical(text: str) -> str:
    """The one spelling of all that give the same recipe: only values that differ from the recipe's own, sorted. Raises as ``find``."""
    recipe = find(text)
    plain = RECIPES[recipe.name]
    changes = {key: value for key in _HINTS if (value := getattr(recipe, key)) != getattr(plain, key)}
    return str(registry.Call(recipe.name, {key: _short(value) for key, value in changes.items()}))


def check(recipe: Recipe) -> None:
    """Raises SpecError, naming the option, for the first value that makes no sense: each by itself, then those that belong together."""
    for key in _HINTS:
        value = getattr(recipe, key)
        least, most = _WITHIN.get(key, (0, _MOST))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not least <= number <= most:  # false for NaN, too
                raise _wrong(recipe.name, key, value, f"from {_short(least)} to {_short(most)}")
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(recipe, key)
        if not 0 < low <= high:
            raise _wrong(recipe.name, key, (low, high), "the smaller one first, above 0")
    if not recipe.epochs and not recipe.steps:
        raise SpecError(f"{recipe.name}: epochs and steps are both 0: give one of them, as in {recipe.name}(epochs=10)")
    if recipe.warmup_epochs and recipe.warmup_steps:
        raise SpecError(f"{recipe.name}: warmup_epochs and warmup_steps are both given: set one of them to 0")
    if recipe.color_jitter[3] > 0.5:
        raise _wrong(recipe.name, "color_jitter", recipe.color_jitter, "a hue, the last one, of at most 0.5")
    if list(recipe.milestones) != sorted(set(recipe.milestones)) or (recipe.schedule == "steps") != bool(recipe.milestones):
        raise _wrong(recipe.name, "milestones", recipe.milestones, "rising epochs where schedule is 'steps', and () elsewhere")
    if recipe.rand_augment and not re.fullmatch(r"(rand|augmix|original|originalr|v0|v0r|3a)(-[a-z]+[\d.]*[a-z]*)*", recipe.rand_augment):
        raise _wrong(recipe.name, "rand_augment", recipe.rand_augment, "timm's spelling, as in 'rand-m9-mstd0.5-inc1'")


def _value(name: str, key: str, hint: Any, value: Any) -> Any:
    """The value as the record holds it: floats as floats, lists as tuples. Raises SpecError for another type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
    if origin is typing.Literal:
        if value not in options or not isinstance(value, str):
            raise _wrong(name, key, value, f"one of {', '.join(options)}")
        return value
    if origin is tuple:
        count = None if Ellipsis in options else len(options)
        if not isinstance(value, (tuple, list)) or (count is not None and len(value) != count):
            raise _wrong(name, key, value, f"{count} numbers, as in ({', '.join(['1.0'] * count)})" if count else "numbers, as in (8, 11)")
        return tuple(_value(name, key, float, item) for item in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if hint is float and (whole or isinstance(value, float)):
        if not abs(value) <= _MOST:
            raise _wrong(name, key, value, f"a number of at most {_MOST}")
        return float(value)
    if (hint is int and whole) or (hint in (bool, str) and isinstance(value, hint)):
        return value
    expected = {float: "a number", int: "a whole number", bool: "True or False", str: "text"}[hint]
    raise _wrong(name, key, value, expected)


def _wrong(name: str, key: str, value: Any, expected: str) -> SpecError:
    return SpecError(f"{name}: {key}={str(_short(value))[:40]!s} does not fit, expected {expected}")


def _short(value: Any) -> Any:
    """Numbers without an empty fraction: 100.0 is written 100."""
    if isinstance(value, tuple):
        return tuple(map(_short, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value
