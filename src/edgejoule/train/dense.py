"""Detection on COCO's format and segmentation on ADE20K's, as tasks for the loop. The network comes with its head on.

A detector is one that takes images of any size and targets, and answers with its losses: torchvision's. A segmenter gives logits for
each pixel. Both are judged on whole images by the measure of their benchmark (mAP, mIoU), one image at a time, so that no padding by a
neighbour changes a score. Knows no zoo, no optimiser and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from edgejoule.datasets.ade20k import IGNORE, MEAN, STD, Ade20k
from edgejoule.datasets.average_precision import evaluate_detections
from edgejoule.datasets.coco import CocoDetection, collate
from edgejoule.datasets.mean_iou import MeanIoU, predicted_classes, resize_logits
from edgejoule.errors import BadImageError, TrainingError
from edgejoule.train.recipe import Recipe
from edgejoule.train.task import At

Target = dict[str, Tensor]
# COCOeval's names to ours, by kind: boxes first, since a detector's headline is theirs.
BOX_SCORES = {"AP": "map", "AP50": "map50", "AP75": "map75", "APs": "map_small", "APm": "map_medium", "APl": "map_large"}


class DenseSamples:
    """A training split for the loop: what is drawn for a sample depends on (seed, epoch, position, index) alone.

    ``chosen`` are the images of the split that training sees, in their order.
    """

    def __init__(self, split: CocoDetection | Ade20k, chosen: Sequence[int], seed: int) -> None:
        self.split, self.chosen, self.seed = split, tuple(chosen), seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, which: tuple[int, int, int]) -> tuple[Tensor, Any]:
        """(epoch, position, index) -> (image, target or labels). Raises BadImageError, which names the file."""
        epoch, position, index = which
        return self.split.sample(self.chosen[index], (self.seed, epoch, position, index))


class Detection:
    """RetinaNet or Mask R-CNN on boxes, and masks where the head has them. Implements ``task.Task``.

    Images go in as they are, mirrored with the recipe's ``hflip``; the network's own transform resizes them to ``recipe.size`` on the
    short side and at most ``recipe.longest`` on the long one (0: as the network stands). Images without a target are left out of
    training, as the 1x schedule leaves them out, and not out of validation. Masks are read and scored where the network draws them.
    ``frozen_statistics`` keeps the batch norms of a pretrained backbone at their running averages,
    which the few large images of a step would spoil.

    The loss is the sum of the network's losses. RetinaNet's are means over images, so that splitting a batch over processes or
    accumulation steps changes them only by the padding of small images to the largest beside them; those of Mask R-CNN are means over
    sampled boxes, and depend a little on the split.
    Raises TrainingError where recipe, splits and network do not fit together.
    """

    headline = "map"
    period = 0

    def __init__(
        self,
        training: CocoDetection,
        validation: CocoDetection,
        recipe: Recipe,
        seed: int = 0,
        *,
        frozen_statistics: bool = False,
        workers: int = 0,
    ) -> None:
        _require_kind(recipe, "detection")
        names = [dict(zip(s.truth.category_ids, s.truth.category_names, strict=True)) for s in (training, validation)]
        if names[0] != names[1]:
            raise TrainingError(
                f"{training.truth.path} and {validation.truth.path} list different categories: expected the same in both, "
                "since labels are numbered by them"
            )
        _present(validation.with_objects(), validation.truth.path)
        split = training.prepared(masks=training.masks, flip_probability=recipe.hflip)
        self.training = DenseSamples(split, _present(split.with_objects(), training.truth.path), seed)
        self.validation = validation.prepared(masks=False)  # of an image that is judged, its masks are not drawn but counted
        self.recipe, self.frozen_statistics, self.workers = recipe, frozen_statistics, workers
        self._has_masks = training.masks, validation.masks
        self._judged: tuple[str, ...] = ("bbox",)

    def collate(self, samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
        """Images (3, H, W) of any size and their targets, as two lists."""
        return collate(samples)

    def begin(self, model: nn.Module) -> nn.Module:
        """The network itself, with the recipe's image size written into its transform. From now on masks are read where it draws them."""
        transform: Any = getattr(model, "transform", None)
        if not hasattr(transform, "min_size") or not hasattr(transform, "max_size"):
            raise TrainingError(f"{type(model).__name__} is no detector: expected one of torchvision's kind: choose a head for detection")
        draws_masks = _draws_masks(model)
        if draws_masks and not self._has_masks[0]:
            raise TrainingError(
                "the network draws masks and the training data are read without: ask for coco(masks=True), or for retinanet"
            )
        if self.recipe.size:
            transform.min_size = (self.recipe.size,)
        if self.recipe.longest:
            transform.max_size = self.recipe.longest
        split = self.training.split
        if isinstance(split, CocoDetection):
            self.training.split = split.prepared(masks=draws_masks, flip_probability=split.flip_probability)
        self._judged = ("bbox", "segm") if draws_masks and self._has_masks[1] else ("bbox",)
        return model

    def loss(self, model: nn.Module, batch: tuple[list[Tensor], list[Target]], at: At) -> Tensor:
        """() float32: the sum of all losses. What the network draws (sampled boxes, drop path) comes from the generators the loop seeds."""
        images, targets = batch
        if self.frozen_statistics:
            freeze_statistics(model)
        losses: Mapping[str, Tensor] = model(images, targets)
        return torch.stack([value.float() for value in losses.values()]).sum()

    def scores(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        """COCO's average precisions as fractions: ``map`` and its parts of boxes, ``mask_map`` and its parts of masks.

        A part is absent where the validation split has no object of that size. Raises BadImageError for an image that cannot be read:
        leaving it out would change the measure.
        """
        found = evaluate_detections(self.validation.truth, self._predictions(model, device), self._judged)
        names = {"bbox": BOX_SCORES, "segm": {key: f"mask_{name}" for key, name in BOX_SCORES.items()}}
        return {names[kind][key]: value for kind in found for key, value in found[kind].items() if value is not None}

    def _predictions(self, model: nn.Module, device: torch.device) -> Iterator[tuple[int, Target]]:
        for image, target in _whole(self.validation, self.workers):
            with torch.inference_mode():
                (output,) = model([image.to(device)])
            yield int(target["image_id"]), output

    def end(self, model: nn.Module) -> nn.Module:
        """The network as it is deployed: the one that was trained."""
        return model


class Segmentation:
    """A class for each pixel: Semantic FPN. Implements ``task.Task``.

    Crops of ``recipe.size`` (0: the split's own), scaled, cut and mirrored as ``datasets.ade20k`` says, and normalised with the network's
    ``mean`` and ``std`` once ``begin`` has seen it; a network that states none gets ImageNet's. The loss is cross-entropy on logits brought
    to the labels' size, summed over the labelled pixels and divided by all pixels: mmsegmentation's mean (``avg_non_ignore=False``),
    which is a mean over images, so that splitting a batch changes nothing.
    Raises TrainingError where recipe, splits and network do not fit together.
    """

    headline = "miou"
    period = 0

    def __init__(
        self,
        training: Ade20k,
        validation: Ade20k,
        recipe: Recipe,
        seed: int = 0,
        *,
        workers: int = 0,
    ) -> None:
        _require_kind(recipe, "segmentation")
        if training.classes != validation.classes:
            raise TrainingError(f"training has {training.classes} classes and validation {validation.classes}: expected equal numbers")
        if not training.training or validation.training:
            raise TrainingError("expected crops to train on and whole images to be judged by: give the splits train and validation")
        self.classes, self.size, self.workers = training.classes, recipe.size or training.size, workers
        self.training = DenseSamples(training.prepared(size=self.size), range(len(training)), seed)
        self.validation = validation.prepared(size=self.size)

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, size, size) and labels (B, size, size) int64, 255 ignored."""
        return torch.stack([image for image, _ in samples]), torch.stack([labels for _, labels in samples])

    def begin(self, model: nn.Module) -> nn.Module:
        """The network itself. From now on images are normalised as it expects them."""
        normalised = {"mean": getattr(model, "mean", MEAN), "std": getattr(model, "std", STD)}
        if isinstance(self.training.split, Ade20k):
            self.training.split = self.training.split.prepared(size=self.size, **normalised)
        self.validation = self.validation.prepared(size=self.size, **normalised)
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], at: At) -> Tensor:
        """() float32: cross-entropy over the labelled pixels of the batch, divided by all its pixels."""
        images, labels = batch  # (B, 3, H, W), (B, H, W)
        logits = resize_logits(model(images), (labels.shape[-2], labels.shape[-1])).float()  # (B, K, H, W)
        if logits.shape[1] != self.classes:
            raise TrainingError(f"the network gives {logits.shape[1]} classes and the data have {self.classes}: build it with as many")
        return functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labels.numel()

    def scores(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        """``miou`` and ``pixel_accuracy`` as fractions, on the labels at their full size, one image at a time. Raises BadImageError."""
        counted = MeanIoU(self.classes, IGNORE)
        for image, labels in _whole(self.validation, self.workers):
            with torch.inference_mode():
                logits = model(image[None].to(device)).float()  # (1, K, h, w)
            counted.add(predicted_classes(logits, (labels.shape[0], labels.shape[1]))[0], labels.to(device))
        found = counted.scores()
        if found.miou is None or found.pixel_accuracy is None:
            raise TrainingError("the validation split has no labelled pixel: expected label maps to be judged by")
        return {"miou": found.miou, "pixel_accuracy": found.pixel_accuracy}

    def end(self, model: nn.Module) -> nn.Module:
        """The network as it is deployed: the one that was trained."""
        return model


def freeze_statistics(model: nn.Module) -> None:
    """Batch norms of the backbone use and keep their running averages; their gains and offsets still learn."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and ".backbone." in f".{name}.":
            module.eval()


class _Whole(Dataset[Any]):
    """A validation split; a bad image comes back as its error, since an error that leaves a worker is wrapped into a traceback."""

    def __init__(self, split: CocoDetection | Ade20k) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.split[index]
        except BadImageError as error:
            return error


def _whole(split: CocoDetection | Ade20k, workers: int) -> Iterator[tuple[Tensor, Any]]:
    """Every sample of a split in order, with the images as they are."""
    for sample in DataLoader(_Whole(split), batch_size=None, num_workers=workers):
        if isinstance(sample, BadImageError):
            raise sample
        yield sample


def _draws_masks(model: nn.Module) -> bool:
    heads: Any = getattr(model, "roi_heads", None)
    return heads is not None and bool(heads.has_mask())


def _present(indices: Sequence[int], path: Any) -> Sequence[int]:
    if not indices:
        raise TrainingError(f"{path} has no object of at least a pixel: expected annotations to learn from and to be judged by")
    return indices


def _require_kind(recipe: Recipe, kind: str) -> None:
    if recipe.kind != kind:
        raise TrainingError(f"the recipe {recipe.name} is for {recipe.kind} and the data are for {kind}: choose a recipe for {kind}")
