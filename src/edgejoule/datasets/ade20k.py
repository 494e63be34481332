"""Images and label maps in the ADEChallengeData2016 layout, prepared as mmsegmentation's and PVT's Semantic FPN recipes do.

    images/{training,validation}/NAME.jpg    annotations/{training,validation}/NAME.png    0 unlabelled, 1..150 classes

Differences from mmsegmentation: no photometric distortion, and Pillow's bilinear filter, which averages when it shrinks.
Knows no model and no score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edgejoule.datasets.pictures import read_picture
from edgejoule.errors import BadImageError, DataError

CLASSES = 150
IGNORE = 255
LONGEST_FACTOR = 4  # the long side is at most 4 times the short side's target: mmsegmentation's scale (2048, 512)
SCALES = (0.5, 2.0)
LARGEST_SHARE = 0.75  # of a crop's labelled pixels that one class may fill, in CROP_TRIES tries: mmsegmentation's cat_max_ratio
CROP_TRIES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
Labels = npt.NDArray[np.uint8]  # (H, W), 0..K-1, 255 ignored


class Ade20k(Dataset[tuple[Tensor, Tensor]]):
    """One split of a folder in ADE20K's layout, sorted by name.

    A sample is ``(image, labels)``: image (3, h, w) float32, ``(x / 255 - mean) / std``; labels (H, W) int64 in 0..K-1, 255 ignored
    (files hold 0 for unlabelled and classes from 1; 255 there is ignored too).
    The training split is scaled so that its short side is ``size`` times a factor drawn from 0.5..2 (the long side at most four times
    that), cut to ``size`` x ``size``, mirrored half the time and padded with the mean and 255: here h = H = w = W = size.
    Every draw depends on (seed, epoch, index) alone. Other splits are scaled to a short side of ``size``, each side then rounded up to
    ``multiple``, and keep their labels at the original size: bring logits there with ``mean_iou.resize_logits``, one image a batch.
    ``training`` overrules what the split's name says. Workers that outlive an epoch (persistent_workers) keep the epoch they started with;
    ``sample`` is told what to draw by, and so is free of that.

    Raises DataError where folders are missing or files unpaired, and BadImageError, which is one, for files that are damaged, of
    unequal size or with classes beyond ``classes`` when their turn comes.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["training", "validation"] = "validation",
        *,
        size: int = 512,
        multiple: int = 32,
        classes: int = CLASSES,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        seed: int = 0,
        training: bool | None = None,
    ) -> None:
        if not 1 <= classes < IGNORE or multiple < 1 or seed < 0:
            raise DataError(
                f"cannot prepare images with multiple={multiple}, classes={classes}, seed={seed}: "
                f"expected whole numbers from 1, classes below {IGNORE}, a seed from 0"
            )
        self.multiple, self.classes, self.seed, self.epoch = multiple, classes, seed, 0
        self.training = split == "training" if training is None else training
        self._prepare(size, mean, std)
        self.pairs = _pairs(Path(root).expanduser(), split)

    def _prepare(self, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if size < 1 or len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise DataError(
                f"cannot prepare images with size={size}, mean={mean}, std={std}: "
                "expected a whole number from 1, three means and three positive deviations"
            )
        self.size = size
        self._mean, self._std = (torch.tensor([float(v) for v in values]).reshape(3, 1, 1) for values in (mean, std))  # (3, 1, 1)

    def prepared(self, *, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Ade20k:
        """The same files at another size and normalisation. Raises DataError as the constructor does."""
        changed = copy.copy(self)
        changed._prepare(size, mean, std)
        return changed

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops of epoch ``epoch`` (0, 1, ...) from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The sample at ``index``. Raises IndexError beyond the end, BadImageError for files that cannot be used."""
        index = range(len(self))[index]
        return self.sample(index, (self.seed, self.epoch, index))

    def sample(self, index: int, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The sample at ``index``, cut and flipped as the numbers ``draws`` say: equal numbers, equal sample. Raises BadImageError."""
        image_path, label_path = self.pairs[index]
        labels = read_labels(label_path, self.classes)  # (H, W)
        picture = read_picture(image_path, (labels.shape[1], labels.shape[0]))
        if self.training:
            return self._training_sample(picture, labels, np.random.default_rng(draws))
        width, height = (math.ceil(side / self.multiple) * self.multiple for side in _scaled(picture.size, self.size))
        return self._normalised(_resized(picture, (width, height))), torch.from_numpy(labels.astype(np.int64))

    def _training_sample(self, picture: Any, labels: Labels, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        from PIL import Image

        width, height = _scaled(picture.size, self.size * random.uniform(*SCALES))
        resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
        labels = np.asarray(resized)  # (height, width)
        left, top = _corner(labels, self.size, random)
        right, bottom = min(left + self.size, width), min(top + self.size, height)
        image = self._normalised(_resized(picture, (width, height)).crop((left, top, right, bottom)))  # (3, <= size, <= size)
        part = torch.from_numpy(labels[top:bottom, left:right].astype(np.int64))
        if random.random() < 0.5:
            image, part = image.flip(-1), part.flip(-1)
        rest = (0, self.size - part.shape[1], 0, self.size - part.shape[0])  # on the right and below
        return torch.nn.functional.pad(image, rest), torch.nn.functional.pad(part, rest, value=IGNORE)

    def _normalised(self, picture: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255  # (3, H, W)
        return (pixels - self._mean) / self._std


def read_labels(path: Path, classes: int = CLASSES) -> Labels:
    """A label map (H, W) uint8: file values 1..classes become 0..classes-1, 0 and 255 become 255.

    Raises BadImageError where the file is missing, damaged, not 8 bits a pixel, or holds another value.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise BadImageError(f"no label map {path}: expected a PNG beside each image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"cannot read the label map {path} ({error}): mend or remove it") from error
    if mode not in ("L", "P"):  # a palette's indices are the labels
        raise BadImageError(f"{path} is of mode {mode}: expected label maps with one 8-bit value a pixel")
    if (beyond := values[(values > classes) & (values != IGNORE)]).size:
        raise BadImageError(f"{path} holds class {beyond.max()}: expected 1..{classes}, and 0 or {IGNORE} for what is not labelled")
    return np.where((values == 0) | (values == IGNORE), np.uint8(IGNORE), values - np.uint8(1)).astype(np.uint8)


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    found: list[dict[str, Path]] = []
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        folder = root / kind / split
        if not folder.is_dir():
            raise DataError(f"no folder {folder}: expected ADE20K's layout, images/{split}/*.jpg and annotations/{split}/*.png")
        found.append({f.stem: f for f in sorted(folder.iterdir()) if f.suffix.lower() == suffix and not f.name.startswith(".")})
    images, labels = found
    if not images and not labels:
        raise DataError(f"no images in {root / 'images' / split}: expected files *.jpg, each with a label map *.png of its name")
    if alone := sorted(images.keys() ^ labels.keys()):
        path, other = (images[alone[0]], "label map") if alone[0] in images else (labels[alone[0]], "image")
        raise DataError(f"{path} has no {other} ({len(images)} images, {len(labels)} label maps): expected one of the same name for each")
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def _scaled(size: tuple[int, int], short: float) -> tuple[int, int]:
    """``size`` (width, height) scaled so that the short side is ``short``, or the long side four times that if it would exceed it."""
    factor = min(short / min(size), LONGEST_FACTOR * short / max(size))
    width, height = (max(1, int(side * factor + 0.5)) for side in size)
    return width, height


def _resized(picture: Any, size: tuple[int, int]) -> Any:
    from PIL import Image

    return picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)


def _corner(labels: Labels, size: int, random: np.random.Generator) -> tuple[int, int]:
    """The upper left corner of a crop, drawn until no class fills three quarters of its labelled pixels; the last try at worst."""
    height, width = labels.shape
    left = top = 0
    for _ in range(CROP_TRIES):
        left, top = (int(random.integers(0, max(side - size, 0) + 1)) for side in (width, height))
        counts = np.bincount(labels[top : top + size, left : left + size].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if np.count_nonzero(counts) > 1 and counts.max() < LARGEST_SHARE * counts.sum():
            break
    return left, top
