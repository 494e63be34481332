"""What a training recipe says: one frozen record of plain values, with where they come from and what they should give.

Knows the grammar ``deit(epochs=100, batch=256)`` for a recipe with other values. No torch: recipes are data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classification", "detection", "segmentation"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained. Lengths are in epochs (passes over the training split) unless ``steps`` is given.

    The peak learning rate is ``lr * batch / lr_batch`` where ``lr_batch`` is not 0 (the linear rule of the source), else ``lr``.
    ``batch`` counts the images of one optimiser step over all processes and accumulation steps, so that neither changes the result.
    """

    name: str
    kind: Kind
    about: str
    source: str  # who says so: paper, file, commit
    expect: str  # the result it should give, and whose figure that is
    cost: str  # on which machine, how long: measured or estimate
    # length
    epochs: float = 0.0
    steps: int = 0  # optimiser steps; overrules epochs where not 0
    batch: int = 128
    # optimiser
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    lr_batch: int = 0
    weight_decay: float = 0.05  # not on biases, norms and what the network's no_weight_decay() names, unless decay_all
    decay_all: bool = False
    momentum: float = 0.9  # of sgd
    layer_decay: float = 1.0  # the factor of the learning rate from one layer to the one before it
    # schedule, by optimiser step
    schedule: Literal["cosine", "poly", "steps", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    power: float = 0.9  # of poly
    milestones: tuple[float, ...] = ()  # of steps: epochs after which the rate falls to a tenth
    # stability
    clip_norm: float = 0.0  # 0: not clipped
    clip: Literal["norm", "agc"] = "norm"
    ema: float = 0.0  # decay of the averaged weights per step; 0: none kept
    evaluate_ema: bool = True  # where kept: the averaged weights are the result
    # images, for classification
    crop_scale: tuple[float, float] = (1.0, 1.0)  # share of the image's area that a random crop has; (1, 1): the evaluation's own crop
    crop_ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    hflip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    rand_augment: str = ""  # timm's spelling: "rand-m9-mstd0.5-inc1"
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    smoothing: float = 0.0
    repeats: int = 1  # repeated augmentation: how often an image stands in one epoch's order
    crop_pct: float | None = None  # of the evaluation's preprocessing; None: the model's own
    # network
    drop_path: float | None = None  # None: the network's own
    # images, for dense tasks
    size: int = 0  # short side (detection) or square crop (segmentation)
    longest: int = 0  # long side at most (detection)
