"""Learning classes from labelled images: the task that the loop trains, and how a classifier is judged on a split.

The labels' loss is cross-entropy with smoothing, or with soft targets where images are mixed; a distiller may add a teacher to it.
Knows no optimiser, no schedule and no data format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from edgejoule import torchvision
from edgejoule.bench import Event, Notify
from edgejoule.errors import BadImageError, DataError, SpecError, TrainingError
from edgejoule.records import Preprocessing
from edgejoule.seams import LabelledImages
from edgejoule.train import augment
from edgejoule.train.recipe import Recipe
from edgejoule.train.task import At, Distiller, Which

torchvision.ensure()  # a reading process that was spawned unpickles transforms of torchvision and timm

Sample: TypeAlias = tuple[torch.Tensor, int, int, int, int]  # image (C, H, W) float32, label, index, epoch, position
Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # the same, each (B, ...)
Floats: TypeAlias = npt.NDArray[np.float32]
Whole: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Augmented:
    """The training split by (epoch, position, index): an image, augmented as those numbers and the seed say, and its label."""

    images: LabelledImages
    transform: augment.Transform
    classes: int
    seed: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: tuple[int, int, int]) -> Sample:
        epoch, position, index = which
        image, label = self.images[index]
        _check_label(self.images, index, label, self.classes)
        with augment.drawing(self.seed, epoch, position, index):
            return self.transform(image), label, index, epoch, position


class Classification:
    """A ``Task``: an image's one class. ``preprocessing`` is the model's own, as the recipe changed it (``augment.preprocessing_for``)."""

    headline = "top1"

    def __init__(
        self,
        training: LabelledImages,
        validation: LabelledImages,
        classes: int,
        preprocessing: Preprocessing,
        recipe: Recipe,
        seed: int,
        distiller: Distiller | None = None,
        *,
        workers: int = 0,
        max_bad_images: int = 0,
    ) -> None:
        """``workers`` processes read the validation images, of which ``max_bad_images`` may be undecodable.

        Raises SpecError for a recipe of another kind, DataError for one class or none.
        """
        if recipe.kind != "classification":
            raise SpecError(f"the recipe {recipe.name} is for {recipe.kind}: choose one for classification")
        if classes < 2:
            raise DataError(f"there is nothing to learn from {classes} class: expected two or more")
        self.training = Augmented(training, augment.training_transform(preprocessing, recipe), classes, seed)
        self._validation, self._preprocessing, self._workers = validation, preprocessing, workers
        self._classes, self._distiller, self._most_bad = classes, distiller, max_bad_images
        self._mixing = augment.mixing(recipe, classes)
        self._smoothing = recipe.smoothing

    @property
    def period(self) -> int:
        return self._distiller.period if self._distiller else 0

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Images (B, C, H, W) float32; labels, indices, epochs and positions, each (B,) int64."""
        images, *numbers = zip(*samples, strict=True)
        labels, index, epoch, position = (torch.tensor(each, dtype=torch.int64) for each in numbers)
        return torch.stack(images), labels, index, epoch, position

    def begin(self, model: torch.nn.Module) -> torch.nn.Module:
        return self._distiller.begin(model) if self._distiller else model

    def end(self, model: torch.nn.Module) -> torch.nn.Module:
        return self._distiller.end(model) if self._distiller else model

    def loss(self, model: torch.nn.Module, batch: Batch, at: At) -> torch.Tensor:
        """() float32, mean over the batch. What mixing draws is a function of ``at.draws``; the loop seeds what the network draws."""
        images, labels, index, epoch, position = batch
        of_target: Callable[[torch.Tensor], torch.Tensor] = partial(_loss, target=labels, smoothing=self._smoothing)
        if self._mixing:
            images, soft = self._mixing(images, labels, at.draws)
            of_target = partial(_loss, target=soft, smoothing=0.0)  # the targets are smooth already
        outputs = model(images)
        for logits_of in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if logits_of.shape[-1] != self._classes:
                raise TrainingError(
                    f"the network answers with {logits_of.shape[-1]} logits, and there are {self._classes} classes: "
                    "let its function take num_classes, or give it that many outputs"
                )
        if self._distiller:
            return self._distiller.loss(model, images, outputs, of_target, Which(index, epoch, position), at)
        heads = outputs if isinstance(outputs, (tuple, list)) else (outputs,)  # DeiT and LeViT may give one for labels, one for a teacher
        return torch.stack([of_target(head) for head in heads]).mean()

    def scores(self, model: torch.nn.Module, device: torch.device) -> Mapping[str, float]:
        """``top1`` (a fraction) and ``loss`` (mean negative log-likelihood, nats, no smoothing) on the validation split.

        Images that cannot be decoded are left out. Raises BadImageError for one more than allowed, DataError where none is left.
        """
        right = counted = 0
        bad: list[int] = []
        loss = 0.0
        for scored, labels, missed in _scored(model, self._validation, self._preprocessing, device, self._classes, workers=self._workers):
            _count(self._validation, bad, missed, self._most_bad)
            right += int((scored.argmax(-1) == labels).sum())
            loss += float(cross_entropy(scored.double(), labels, reduction="sum"))
            counted += len(labels)
        if not counted:
            raise DataError("there is no image to judge the network by: the validation split is empty, or none of it can be decoded")
        return {"top1": right / counted, "loss": loss / counted}


def logits(
    model: torch.nn.Module,
    images: LabelledImages,
    preprocessing: Preprocessing,
    device: torch.device,
    batch: int = 64,
    notify: Notify | None = None,
    *,
    workers: int = 0,
    max_bad_images: int | None = None,
) -> tuple[Floats, Whole, tuple[int, ...]]:
    """Logits (N, K) of all images that can be decoded, in their order, their labels (N,), and the indices of those that cannot.

    The network runs in evaluation mode, in float32, and is left in the mode it was in. A network with two heads answers with their mean,
    as DeiT's does. Raises BadImageError for more bad images than allowed (None: any), DataError where no image is left.
    """
    found: list[torch.Tensor] = []
    labelled: list[torch.Tensor] = []
    bad: list[int] = []
    done = 0
    for scored, labels, missed in _scored(model, images, preprocessing, device, None, batch, workers):
        found.append(scored)
        labelled.append(labels)
        _count(images, bad, missed, max_bad_images)
        done += len(labels) + len(missed)
        if notify:
            notify(Event("evaluate", f"{done} of {len(images)} images", done, len(images)))
    if not sum(map(len, found)):
        raise DataError("there is no image to judge the network by: the split is empty, or none of it can be decoded")
    return torch.cat([part for part in found if len(part)]).numpy(), torch.cat(labelled).numpy(), tuple(bad)


@dataclass(frozen=True, slots=True)
class _Judged(Dataset[tuple[int, torch.Tensor | None, int]]):
    """A split as a network is judged by: (index, image (C, H, W) or None where it cannot be decoded, label)."""

    images: LabelledImages
    transform: augment.Transform
    classes: int | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, int]:
        try:
            image, label = self.images[index]
        except BadImageError:
            return index, None, -1
        _check_label(self.images, index, label, self.classes)
        return index, self.transform(image), label


def _scored(
    model: torch.nn.Module,
    images: LabelledImages,
    preprocessing: Preprocessing,
    device: torch.device,
    classes: int | None,
    batch: int = 64,
    workers: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Logits (B, K) float32 and labels (B,) on the CPU, and the indices that could not be decoded, batch by batch."""
    judged = _Judged(images, augment.evaluation_transform(preprocessing), classes)
    generator = torch.Generator().manual_seed(0)  # else the loader draws a number from the global generator
    mode = model.training
    model.eval()
    try:
        for samples in DataLoader(judged, batch, num_workers=workers, collate_fn=list, generator=generator):
            good = [(image, label) for _, image, label in samples if image is not None]
            bad = [index for index, image, _ in samples if image is None]
            labels = torch.tensor([label for _, label in good], dtype=torch.int64)
            scored = torch.empty((0, 1))
            if good:
                with torch.no_grad():  # not inference_mode: networks that keep what they computed could not train on with it
                    outputs = model(torch.stack([image for image, _ in good]).to(device))
                heads = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                scored = torch.stack([head.float().cpu() for head in heads]).mean(0)
            yield scored, labels, bad
    finally:
        model.train(mode)


def _count(images: LabelledImages, bad: list[int], missed: Sequence[int], most: int | None) -> None:
    bad += missed
    if most is not None and len(bad) > most:
        raise BadImageError(
            f"cannot decode {images.key(bad[most])} ({most} such images are allowed): mend it, or raise max_bad_images, --max-bad-images"
        )


def _loss(scored: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    # In float32 under autocast, too: half precision cannot add up a thousand classes.
    return cross_entropy(scored.float(), target, label_smoothing=smoothing)


def _check_label(images: LabelledImages, index: int, label: int, classes: int | None) -> None:
    if classes is not None and not 0 <= label < classes:
        raise DataError(f"{images.key(index)} has the label {label}, and there are {classes} classes: expected 0 to {classes - 1}")
