"""Images in COCO's format as torchvision's detectors take them: tensors in [0, 1] and targets with boxes, labels and masks.

torchvision's own CocoDetection returns the annotations as they stand in the file; here they are checked (``coco_json``) and turned
into targets. Masks are drawn by pycocotools, so that they are the ones that the score is counted with. Knows no model and no score.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from edgejoule.datasets.coco_json import CocoAnnotation, CocoAnnotations, CocoImage, read_annotations
from edgejoule.datasets.pictures import read_picture
from edgejoule.errors import DataError

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]
LEAST_SIDE = 1.0  # px; a thinner box has no area to learn from, and log-encoded sides would run off


class CocoDetection(Dataset[Sample]):
    """Images below ``folder`` with the targets of a COCO annotation file, in the order of the image identities.

    A sample is ``(image, target)``: image (3, H, W) float32 in [0, 1]; target ``boxes`` (n, 4) float32, x1 y1 x2 y2 in pixels,
    clipped to the image; ``labels`` (n,) int64 in 1..K; ``masks`` (n, H, W) uint8 unless ``masks=False``; ``image_id`` () int64.
    Crowds and boxes with a side below one pixel are no targets (the score still counts them: ``truth`` holds all).
    An image without objects gives n = 0. ``flip_probability`` mirrors left to right, drawn anew for each (seed, epoch, index);
    ``transform(image, target)`` comes last. Workers that outlive an epoch (persistent_workers) keep the epoch they started with;
    ``sample`` is told what to draw by, and so is free of that.

    Raises DataError where the folder, an image, pycocotools or, with masks, an object's segmentation is missing or malformed,
    and BadImageError, which is one, for an image that cannot be read when its turn comes.
    """

    def __init__(
        self,
        folder: str | Path,
        annotations: str | Path | CocoAnnotations,
        *,
        masks: bool = True,
        flip_probability: float = 0.0,
        seed: int = 0,
        transform: Callable[[Tensor, Target], Sample] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.truth = annotations if isinstance(annotations, CocoAnnotations) else read_annotations(annotations)
        self.masks, self.flip_probability, self.seed, self.transform = masks, flip_probability, seed, transform
        self.epoch = 0
        self.image_ids = tuple(sorted(self.truth.images))
        self._labels = self.truth.labels
        self._check()

    def _check(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"no folder {self.folder}: expected the images that {self.truth.path} lists")
        if not 0 <= self.flip_probability <= 1 or self.seed < 0:
            raise DataError(
                f"flip_probability {self.flip_probability} with seed {self.seed} makes no sense: expected 0 to 1, and a seed from 0"
            )
        for image in self.truth.images.values():
            present = False
            with contextlib.suppress(ValueError):  # a name that no file can have
                present = os.path.isfile(self.folder / image.file_name)  # noqa: PTH113 - a fifth of pathlib's time, for 118,287 images
            if not present:
                raise DataError(f"no image {self.folder / image.file_name}: {self.truth.path} lists it as image {image.image_id}")
        self._check_masks()

    def _check_masks(self) -> None:
        if self.masks:
            pycocotools("mask")
            for annotation in (a for listed in self.truth.by_image.values() for a in listed):
                if annotation.segmentation is None and not annotation.crowd:
                    raise DataError(
                        f"{self.truth.path}: annotation {annotation.annotation_id} has no segmentation: add it, or ask for masks=False"
                    )

    def set_epoch(self, epoch: int) -> None:
        """Draw the flips of epoch ``epoch`` (0, 1, ...) from now on."""
        self.epoch = epoch

    def prepared(self, *, masks: bool, flip_probability: float = 0.0) -> CocoDetection:
        """The same images and annotations with other options. Raises DataError where masks are asked for and missing."""
        changed = copy.copy(self)
        changed.masks, changed.flip_probability = masks, flip_probability
        changed._check_masks()
        return changed

    def with_objects(self) -> tuple[int, ...]:
        """The indices of the images that have at least one target."""
        images = ((index, self.truth.images[image_id]) for index, image_id in enumerate(self.image_ids))
        return tuple(index for index, image in images if self._kept(image))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``. Raises IndexError beyond the end, BadImageError for a file that cannot be read."""
        index = range(len(self))[index]
        return self.sample(index, (self.seed, self.epoch, index))

    def sample(self, index: int, draws: Sequence[int]) -> Sample:
        """The sample at ``index``, flipped or not as the numbers ``draws`` say: equal numbers, equal sample. Raises BadImageError."""
        image = self.truth.images[self.image_ids[index]]
        picture = read_picture(self.folder / image.file_name, (image.width, image.height))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255  # (3, H, W)
        target = self._target(image)
        if np.random.default_rng(draws).random() < self.flip_probability:
            pixels, target = flip(pixels, target)
        return self.transform(pixels, target) if self.transform else (pixels, target)

    def _kept(self, image: CocoImage) -> list[tuple[CocoAnnotation, tuple[float, float, float, float]]]:
        return [(a, box) for a in self.truth.by_image[image.image_id] if not a.crowd and (box := _clipped(a, image))]

    def _target(self, image: CocoImage) -> Target:
        kept = self._kept(image)
        target = {
            "boxes": torch.tensor([box for _, box in kept], dtype=torch.float32).reshape(-1, 4),  # (n, 4)
            "labels": torch.tensor([self._labels[a.category_id] for a, _ in kept], dtype=torch.int64),  # (n,)
            "image_id": torch.tensor(image.image_id, dtype=torch.int64),  # ()
        }
        if self.masks:
            drawn = [torch.from_numpy(draw_mask(a.segmentation, image)) for a, _ in kept]
            target["masks"] = torch.stack(drawn) if drawn else torch.zeros((0, image.height, image.width), dtype=torch.uint8)  # (n, H, W)
        return target


def collate(batch: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Samples of any size as two lists, images and targets, as torchvision's detectors take them: ``DataLoader(collate_fn=collate)``."""
    return [image for image, _ in batch], [target for _, target in batch]


def flip(image: Tensor, target: Target) -> Sample:
    """The image (3, H, W) and its target, mirrored left to right. Nothing is changed in place."""
    mirrored = dict(target)
    x1, y1, x2, y2 = target["boxes"].unbind(1)  # each (n,)
    mirrored["boxes"] = torch.stack((image.shape[-1] - x2, y1, image.shape[-1] - x1, y2), dim=1)  # (n, 4)
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(-1)  # (n, H, W)
    return image.flip(-1), mirrored


def run_lengths(segmentation: Any, image: CocoImage) -> dict[str, Any]:
    """A checked segmentation as pycocotools' compressed run lengths: ``{"size": [H, W], "counts": bytes}``."""
    mask = pycocotools("mask")
    if isinstance(segmentation, list):
        merged: dict[str, Any] = mask.merge(mask.frPyObjects(segmentation, image.height, image.width))
        return merged
    counts = segmentation["counts"]
    if isinstance(counts, str):
        return {"size": segmentation["size"], "counts": counts.encode("ascii")}
    compressed: dict[str, Any] = mask.frPyObjects(segmentation, image.height, image.width)
    return compressed


def draw_mask(segmentation: Any, image: CocoImage) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A checked segmentation as pixels: (H, W) uint8, 0 or 1."""
    return np.ascontiguousarray(pycocotools("mask").decode(run_lengths(segmentation, image)), dtype=np.uint8)


def pycocotools(part: str) -> Any:
    """The module ``pycocotools.<part>``. Raises DataError, with the remedy, where it is not installed."""
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError as error:
        raise DataError("COCO masks and scores need pycocotools, which is not installed: pip install 'edgejoule[dense]'") from error


def _clipped(annotation: CocoAnnotation, image: CocoImage) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 inside the image, or None where less than one pixel is left of a side."""
    x, y, width, height = annotation.box_xywh
    x1, x2 = (min(max(side, 0.0), float(image.width)) for side in (x, x + width))
    y1, y2 = (min(max(side, 0.0), float(image.height)) for side in (y, y + height))
    return (x1, y1, x2, y2) if x2 - x1 >= LEAST_SIDE and y2 - y1 >= LEAST_SIDE else None
