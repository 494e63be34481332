"""mIoU and pixel accuracy from a confusion matrix that grows batch by batch. Knows no files and no model.

IoU of a class = hits / (labelled + predicted - hits), over all pixels of all images whose label is not ignored (as mmsegmentation and
the ADE20K benchmark count it; not a mean over images).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgejoule.errors import DataError


@dataclass(frozen=True, slots=True)
class SegmentationScores:
    """Fractions 0..1. None: no pixel was labelled (``iou``: the class is neither labelled nor predicted anywhere)."""

    miou: float | None
    pixel_accuracy: float | None
    iou: tuple[float | None, ...]  # by class, 0..K-1


class MeanIoU:
    """The confusion matrix (K, K), int64: row = label, column = prediction, in pixels. ``add`` batches, then ask for ``scores``."""

    def __init__(self, classes: int = 150, ignore: int = 255) -> None:
        if classes < 1 or 0 <= ignore < classes:
            raise DataError(
                f"cannot count {classes} classes with the label {ignore} ignored: expected at least one, and none of them ignored"
            )
        self.classes, self.ignore = classes, ignore
        self.confusion = torch.zeros((classes, classes), dtype=torch.int64)  # (K, K)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: predicted classes (B, H, W) or (H, W), whole numbers in 0..K-1, and labels of the same shape.

        Raises DataError for other shapes, types, or classes beyond K (predictions on ignored pixels are not looked at).
        """
        if predictions.shape != labels.shape:
            raise DataError(
                f"predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ: "
                "expected equal shapes (resize the logits to the labels, then take the largest)"
            )
        if predictions.is_floating_point() or labels.is_floating_point():
            raise DataError(
                f"cannot count classes of type {predictions.dtype} and {labels.dtype}: expected whole numbers (argmax over logits)"
            )
        counted = labels != self.ignore
        truth, found = labels[counted].long(), predictions[counted].long()  # (pixels,)
        for name, values in (("labels", truth), ("predictions", found)):
            if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < self.classes):
                raise DataError(f"the {name} go from {int(values.min())} to {int(values.max())}: expected classes 0..{self.classes - 1}")
        pairs = torch.bincount(truth * self.classes + found.to(truth.device), minlength=self.classes**2)
        self.confusion += pairs.reshape(self.classes, self.classes).cpu()

    def scores(self) -> SegmentationScores:
        """mIoU over the classes that are labelled or predicted somewhere, pixel accuracy, and each class's IoU."""
        hits = self.confusion.diag()  # (K,)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits  # (K,)
        iou = tuple(hit / whole if whole else None for hit, whole in zip(hits.tolist(), union.tolist(), strict=True))
        present = [value for value in iou if value is not None]
        pixels = int(self.confusion.sum())
        return SegmentationScores(
            miou=sum(present) / len(present) if present else None,
            pixel_accuracy=int(hits.sum()) / pixels if pixels else None,
            iou=iou,
        )


def resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (B, K, h, w) at the labels' size (H, W): bilinear, corners not aligned, as mmsegmentation does -> (B, K, H, W)."""
    if logits.ndim != 4:
        raise DataError(f"cannot resize logits {tuple(logits.shape)}: expected (B, K, h, w)")
    return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def predicted_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The most likely class of each pixel at the labels' size (H, W): logits (B, K, h, w) -> (B, H, W) int64."""
    return resize_logits(logits, size).argmax(dim=1)
