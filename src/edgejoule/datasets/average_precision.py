"""mAP of boxes and masks in COCO's sense, counted by pycocotools' COCOeval. Knows no model and no files but the annotations.

Predictions are torchvision's, image by image; masks become run lengths as they come, so that a generator over a whole data set
needs the memory of one image's masks.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.datasets.coco import CocoDetection, pycocotools, run_lengths
from edgejoule.datasets.coco_json import CocoAnnotations, CocoImage, read_annotations
from edgejoule.errors import DataError

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # the first six of COCOeval's twelve, in its order
KINDS = ("bbox", "segm")
MASK_THRESHOLD = 0.5
DIGITS = 12  # COCOeval adds 2.2e-16 to its denominators: without rounding, a perfect score is 0.9999999999999998
Scores = dict[str, dict[str, float | None]]


def evaluate_detections(
    truth: CocoDetection | CocoAnnotations | str | Path,
    predictions: Mapping[int, Mapping[str, Any]] | Iterable[tuple[int, Mapping[str, Any]]],
    kinds: Sequence[str] = KINDS,
) -> Scores:
    """COCO's average precisions as fractions: ``{"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "segm": {...}}``.

    ``predictions``: image identity -> ``boxes`` (n, 4) x1 y1 x2 y2 in pixels, ``scores`` (n,), ``labels`` (n,) in 1..K and, for
    ``segm``, ``masks`` (n, 1, H, W) or (n, H, W), pasted into the image and cut at 0.5; a mapping, or pairs as they come.
    All images of the annotation file count: one without a prediction has found nothing. At most the 100 best of an image and category
    count. AP is the mean over IoU 0.50:0.05:0.95, categories and 101 recalls; s, m, l: areas below 32², up to 96², above (px²).
    A value is None where the truth has no object of that size (nor crowds count as such). Prints nothing.

    Raises DataError for predictions of unknown images or labels, of other shapes or not finite, and for objects without a mask in ``segm``.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise DataError(f"cannot score {unknown[0]!r}: expected {' or '.join(KINDS)}")
    if isinstance(truth, CocoDetection):
        truth = truth.truth
    elif not isinstance(truth, CocoAnnotations):
        truth = read_annotations(truth)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    seen: set[int] = set()
    for image_id, output in predictions.items() if isinstance(predictions, Mapping) else predictions:
        if (number := int(image_id)) in seen:
            raise DataError(f"image {number} is predicted twice: give each image of {truth.path} once")
        seen.add(number)
        for kind, entries in _entries(truth, number, output, found).items():
            found[kind] += entries
    return {kind: _score(truth, entries, kind) for kind, entries in found.items()}


def _entries(truth: CocoAnnotations, image_id: int, output: Mapping[str, Any], kinds: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """One image's detections in COCO's result format, by kind."""
    if image_id not in truth.images:
        raise DataError(f"a prediction is of image {image_id}, which {truth.path} does not list: use the image_id of the targets")
    image = truth.images[image_id]
    boxes, scores, labels = (_array(output, key, image_id) for key in ("boxes", "scores", "labels"))
    if boxes.shape != (len(labels), 4) or scores.shape != labels.shape or labels.ndim != 1:
        raise DataError(
            f"the prediction of image {image_id} has boxes {boxes.shape}, scores {scores.shape}, labels {labels.shape}: "
            "expected (n, 4), (n,), (n,)"
        )
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise DataError(f"the prediction of image {image_id} holds values that are not finite: check the weights and the input's scale")
    if len(labels) and not (labels.min() >= 1 and labels.max() <= len(truth.category_ids)):
        raise DataError(
            f"the prediction of image {image_id} has labels outside 1..{len(truth.category_ids)}: expected those of {truth.path}"
        )
    facts = [
        {"image_id": image_id, "category_id": truth.category_ids[int(label) - 1], "score": float(score), "iscrowd": 0}
        for label, score in zip(labels, scores, strict=True)
    ]
    made: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        shapes = _boxes(boxes) if kind == "bbox" else _masks(output, image, len(labels))
        made[kind] = [{**fact, **shape} for fact, shape in zip(facts, shapes, strict=True)]
    return made


def _boxes(boxes: Any) -> list[dict[str, Any]]:
    corners = boxes.astype(np.float64)  # (n, 4)
    sides = corners[:, 2:] - corners[:, :2]  # (n, 2)
    return [
        {"bbox": [*corner[:2].tolist(), *side.tolist()], "area": float(side.prod())} for corner, side in zip(corners, sides, strict=True)
    ]


def _masks(output: Mapping[str, Any], image: CocoImage, n: int) -> list[dict[str, Any]]:
    masks = _array(output, "masks", image.image_id)
    if masks.shape not in {(n, 1, image.height, image.width), (n, image.height, image.width)}:
        raise DataError(
            f"the prediction of image {image.image_id} has masks {masks.shape}: expected ({n}, 1, {image.height}, {image.width}), "
            "pasted into the image"
        )
    codec = pycocotools("mask")
    solid = (masks.reshape(n, image.height, image.width) > MASK_THRESHOLD).astype(np.uint8)  # (n, H, W)
    coded = [codec.encode(np.asfortranarray(one)) for one in solid]
    return [{"segmentation": one, "area": float(codec.area(one)), "bbox": codec.toBbox(one).tolist()} for one in coded]


def _array(output: Mapping[str, Any], key: str, image_id: int) -> Any:
    if key not in output:
        raise DataError(f"the prediction of image {image_id} has no {key!r}: expected torchvision's boxes, scores, labels (and masks)")
    value = output[key]
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(f"the prediction of image {image_id} has {key!r} of type {array.dtype}: expected numbers")
    return array


def _score(truth: CocoAnnotations, entries: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    evaluation = pycocotools("cocoeval").COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there; stdout is for our own output
        counted = evaluation(_index(truth, _objects(truth, kind)), _index(truth, entries), kind)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return {name: None if value < 0 else round(float(value), DIGITS) for name, value in zip(NAMES, counted.stats, strict=False)}


def _objects(truth: CocoAnnotations, kind: str) -> list[dict[str, Any]]:
    """The truth in COCO's form, crowds included; for masks, the segmentations as run lengths."""
    objects = []
    for annotation in (a for listed in truth.by_image.values() for a in listed):
        if kind == "segm" and annotation.segmentation is None:
            raise DataError(f"{truth.path}: annotation {annotation.annotation_id} has no segmentation to score masks with: score bbox only")
        shape = {"segmentation": run_lengths(annotation.segmentation, truth.images[annotation.image_id])} if kind == "segm" else {}
        fact = {"image_id": annotation.image_id, "category_id": annotation.category_id, "area": annotation.area}
        objects.append({**fact, **shape, "bbox": list(annotation.box_xywh), "iscrowd": int(annotation.crowd)})
    return objects


def _index(truth: CocoAnnotations, entries: list[dict[str, Any]]) -> Any:
    """A pycocotools COCO of these entries, numbered from 1: COCOeval takes a match with number 0 for no match."""
    coco = pycocotools("coco").COCO()
    coco.dataset = {
        "images": [{"id": image.image_id, "width": image.width, "height": image.height} for image in truth.images.values()],
        "categories": [{"id": category} for category in truth.category_ids],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(entries, start=1)],
    }
    coco.createIndex()
    return coco
