"""The joint of calibration: from a spelling to the images that quantisation is calibrated on, and others that its choices are judged by.

Neither are ever the images that an artifact is tested on: photographs are other pieces of them (another seed), labelled data gives its
train and validation splits. Nothing is read before a backend asks for it. Knows no backend.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from edgejoule import data, registry
from edgejoule.compile.build import Material
from edgejoule.errors import DataError, SpecError
from edgejoule.plain import digest
from edgejoule.records import ModelSpec

if TYPE_CHECKING:
    from edgejoule.seams import LabelledData, LabelledImages

AUTO = "photos(n=96, seed=1)"
CALIBRATE, HOLD = 64, 256  # images: ranges settle with a few dozen, a drop of a point in accuracy needs hundreds
EVERY = 3  # of so many unlabelled images in a row one is held out: folders are sorted, often by what they show


def resolve(spec: ModelSpec, spelling: str) -> str:
    """``auto`` as what it means for a model: digits for a network of digits, else photographs."""
    if spelling != "auto":
        return registry.canonical(spelling)
    return "digits" if spec.dataset == "digits" else AUTO


def material(spec: ModelSpec, spelling: str, max_drop_pct: float) -> Material:
    """Images by a model's own preprocessing. Raises SpecError for what names no images and DataError where they cannot be had."""
    text = resolve(spec, spelling)
    if registry.parse(text).name in data.SOURCES:
        return _unlabelled(spec, text, max_drop_pct)
    return _labelled(spec, text, max_drop_pct)


def samples(spec: ModelSpec, spelling: str, n: int) -> tuple[data.Crops, Any]:
    """Up to n images to learn from, never tested ones: uint8 (n, C, H, W), and labels (n,) int64 or None. Raises as ``material`` does."""
    text = resolve(spec, spelling)
    if registry.parse(text).name not in data.SOURCES:
        return _drawn(_fitting(spec, text).split("train"), spec, n)
    crops = data.crops(text, spec.preprocessing)
    return crops[np.arange(len(crops)) % EVERY != 1][:n], None


def identity(spec: ModelSpec, spelling: str) -> str:
    """Equal where ``samples`` are, as far as names and files tell."""
    text = resolve(spec, spelling)
    if registry.parse(text).name in data.SOURCES:
        return digest([text, data.source(text).origin()])
    return digest([text, _open(text).origin()])


def check(spelling: str) -> None:
    """Raises SpecError or UnknownNameError for what names no images, DataError for data that is not there."""
    if spelling == "auto":
        return
    call = registry.parse(spelling)
    if call.name in data.SOURCES:
        data.source(spelling)
    elif (missing := _open(spelling).probe()) is not None:
        raise DataError(f"{spelling} cannot be calibrated on: {missing}")


def _unlabelled(spec: ModelSpec, text: str, max_drop_pct: float) -> Material:
    @cache
    def crops() -> data.Crops:
        made = data.crops(text, spec.preprocessing)
        if len(made) < 2:
            raise DataError(f"{text} holds {len(made)} image: calibration needs at least 2, better 64")
        return made

    def part(held: bool) -> data.Crops:
        chosen: data.Crops = crops()[(np.arange(len(crops())) % EVERY == 1) == held]
        return chosen

    identity = digest([text, data.source(text).origin(), spec.preprocessing, f"one of {EVERY}"])
    # What the user names may be the very images that files are compared on: then only those held out are not calibrated on.
    return Material(identity, lambda: part(held=False), lambda: (part(held=True), None), max_drop_pct, compared=text != AUTO)


def _labelled(spec: ModelSpec, text: str, max_drop_pct: float) -> Material:
    labelled = _fitting(spec, text)
    identity = digest([text, labelled.origin(), spec.preprocessing, CALIBRATE, HOLD])

    @cache
    def held() -> tuple[data.Crops, Any]:
        images = labelled.split("validation")
        if not len(images):
            raise DataError(f"{text} has no validation images to judge quantisation by: name a set that has some")
        return _drawn(images, spec, HOLD)

    return Material(identity, lambda: _drawn(labelled.split("train"), spec, CALIBRATE)[0], held, max_drop_pct, compared=True)


def _fitting(spec: ModelSpec, text: str) -> LabelledData:
    """Labelled data with the model's classes. Raises SpecError and DataError."""
    labelled = _open(text)
    if spec.num_classes != len(labelled.classes):
        raise DataError(
            f"{spec.name} tells {spec.num_classes} classes apart and {labelled.dataset} has {len(labelled.classes)}: calibrate on the data "
            'that it was trained on, or on plain images, as in folder(path="...")'
        )
    return labelled


def _open(text: str) -> LabelledData:
    from edgejoule.teaching import open_data

    if registry.parse(text).name not in registry.names("data"):
        known = ", ".join((*data.SOURCES, *registry.names("data")))
        raise SpecError(f"{text} names no images to calibrate on: expected one of {known}")
    labelled = open_data(text)
    if labelled.kind != "classification":
        raise DataError(f"{text} is a {labelled.kind} set, and classifiers are quantised: name labelled images, such as digits")
    return labelled


def _drawn(images: LabelledImages, spec: ModelSpec, most: int) -> tuple[data.Crops, Any]:
    """Up to ``most`` of the images, drawn without replacement: uint8 (n, C, H, W) and labels (n,) int64.

    In the order of the draw: sets are sorted by class, and whoever takes the first few of these must not get those of one class.
    """
    places = np.random.default_rng(0).choice(len(images), size=min(most, len(images)), replace=False)
    read = [images[int(place)] for place in places]
    crops = np.stack([np.asarray(data.crop(image, spec.preprocessing), dtype=np.uint8) for image, _ in read])  # (n, H, W, C)
    return np.ascontiguousarray(crops.transpose(0, 3, 1, 2)), np.asarray([label for _, label in read], dtype=np.int64)
