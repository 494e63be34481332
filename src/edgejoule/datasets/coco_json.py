"""A COCO annotation file, checked and typed: images, categories as labels 1..K, annotations by image.

pycocotools reads whatever it is given: a polygon with a huge or undefined coordinate ends the process, and run lengths that do not
fill the image yield whatever was in memory. So nothing unchecked leaves this file. Knows no pixels, no torch and no pycocotools.
Format: the data format page of the COCO consortium (images, categories, annotations with bbox xywh, segmentation, area, iscrowd).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgejoule.errors import DataError

MOST_PIXELS = 2**28  # 16384 x 16384: a mask of more is a slip of the file, not a photograph
MOST_ID = 2**63 - 1  # identities travel as int64
FARTHEST = 1e9  # px; a box beyond it is a slip, and float32 would round it
REACH = 10  # polygons may leave the image by this many times its longer side; pycocotools allocates by the distance


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image: its file below the image folder, and its size in pixels."""

    image_id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class CocoAnnotation:
    """One object. ``segmentation``: polygons ([[x, y, ...], ...]), run lengths ({"size", "counts"}), or None where there is none."""

    annotation_id: int
    image_id: int
    category_id: int
    box_xywh: tuple[float, float, float, float]  # px, from the upper left corner
    area: float  # px², of the mask
    crowd: bool
    segmentation: Any


@dataclass(frozen=True, slots=True)
class CocoAnnotations:
    """A whole file. ``category_ids[label - 1]`` is a label's category: labels are 1..K in the order of the identities."""

    path: Path
    images: Mapping[int, CocoImage]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    by_image: Mapping[int, tuple[CocoAnnotation, ...]]

    @property
    def labels(self) -> dict[int, int]:
        """{category identity: label 1..K}."""
        return {category: label for label, category in enumerate(self.category_ids, start=1)}


def read_annotations(path: str | Path) -> CocoAnnotations:
    """The annotations of a COCO ``instances_*.json``. Raises DataError, which names the file and the entry, for anything amiss."""
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"no annotation file {file}: expected COCO's instances_*.json") from error
    except OSError as error:
        raise DataError(f"cannot read the annotation file {file} ({error.strerror or error}): check the path and its rights") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error}): expected COCO's instances_*.json, complete") from error
    return _Reader(file).whole(content)


class _Reader:
    """Checks one file; every complaint names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def whole(self, content: Any) -> CocoAnnotations:
        if not isinstance(content, dict):
            raise self.wrong("the file", "an object with images, categories and annotations")
        images = {image.image_id: image for image in self.unique("images", map(self.image, self.entries(content, "images")))}
        categories = dict(sorted(self.unique("categories", map(self.category, self.entries(content, "categories")))))
        found: dict[int, list[CocoAnnotation]] = {image_id: [] for image_id in images}
        entries = (self.annotation(entry, images, categories) for entry in self.entries(content, "annotations"))
        for annotation in self.unique("annotations", entries):
            found[annotation.image_id].append(annotation)
        by_image = {image_id: tuple(annotations) for image_id, annotations in found.items()}
        return CocoAnnotations(self.path, images, tuple(categories), tuple(categories.values()), by_image)

    def wrong(self, where: str, expected: str) -> DataError:
        return DataError(f"{self.path}: {where} cannot be used: expected {expected}")

    def entries(self, content: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        listed = content.get(key)
        if not isinstance(listed, list):
            raise self.wrong(f"{key!r}", f"a list {key!r}, as in COCO's instances_*.json")
        for position, entry in enumerate(listed):
            if not isinstance(entry, dict) or not _whole(entry.get("id"), -MOST_ID, MOST_ID):
                raise self.wrong(f"{key}[{position}]", "an object with a whole number as its id")
            yield entry

    def unique(self, key: str, entries: Iterable[Any]) -> Iterator[Any]:
        seen: set[int] = set()
        for entry in entries:
            identity = {"images": "image_id", "annotations": "annotation_id"}.get(key)
            number = getattr(entry, identity) if identity else entry[0]
            if number in seen:
                raise self.wrong(f"the id {number} in {key}, which is there twice,", "each id once")
            seen.add(number)
            yield entry

    def image(self, entry: dict[str, Any]) -> CocoImage:
        name, width, height = _values(entry, "file_name", "width", "height")
        if not isinstance(name, str) or not name:
            raise self.wrong(f"image {entry['id']}", "a file_name")
        if not _whole(width, 1, MOST_PIXELS) or not _whole(height, 1, MOST_PIXELS) or width * height > MOST_PIXELS:
            raise self.wrong(f"image {entry['id']}", f"width and height in pixels, whole numbers, at most {MOST_PIXELS} pixels together")
        return CocoImage(entry["id"], name, width, height)

    def category(self, entry: dict[str, Any]) -> tuple[int, str]:
        if not isinstance(entry.get("name"), str):
            raise self.wrong(f"category {entry['id']}", "a name")
        return entry["id"], entry["name"]

    def annotation(self, entry: dict[str, Any], images: dict[int, CocoImage], categories: dict[int, str]) -> CocoAnnotation:
        where = f"annotation {entry['id']}"
        image_id, category_id, box, area = _values(entry, "image_id", "category_id", "bbox", "area")
        if not _whole(image_id, -MOST_ID, MOST_ID) or image_id not in images:
            raise self.wrong(f"{where} of image {str(image_id)[:40]}", "an image_id that the file lists under images")
        if not _whole(category_id, -MOST_ID, MOST_ID) or category_id not in categories:
            raise self.wrong(f"{where} of category {str(category_id)[:40]}", "a category_id that the file lists under categories")
        if not isinstance(box, list) or len(box) != 4 or not _within(box, FARTHEST) or min(box[2:]) < 0:
            raise self.wrong(where, "bbox as [x, y, width, height] in pixels, finite, no side below 0")
        if not _within([area], FARTHEST) or area < 0:
            raise self.wrong(where, "area in square pixels, finite and not below 0")
        crowd = entry.get("iscrowd", 0)
        if type(crowd) not in (int, bool) or crowd not in (0, 1):
            raise self.wrong(where, "iscrowd 0 or 1")
        segmentation = self.segmentation(entry.get("segmentation"), images[image_id], where)
        x, y, width, height = map(float, box)
        return CocoAnnotation(entry["id"], image_id, category_id, (x, y, width, height), float(area), bool(crowd), segmentation)

    def segmentation(self, value: Any, image: CocoImage, where: str) -> Any:
        if value is None or value == []:
            return None
        if isinstance(value, list):
            limit = float(REACH * max(image.width, image.height))
            for part in value:
                if not isinstance(part, list) or len(part) % 2 or not _within(part, limit):
                    raise self.wrong(where, f"polygons as [x, y, ...], pairs of finite numbers no farther out than {limit:g} pixels")
            # Fewer than three corners enclose nothing, and pycocotools would take four numbers for a box.
            if not (polygons := [part for part in value if len(part) >= 6]):
                raise self.wrong(where, "a polygon of at least three corners")
            return polygons
        if not isinstance(value, dict) or value.get("size") != [image.height, image.width]:
            raise self.wrong(where, f"polygons, or run lengths with size [{image.height}, {image.width}] as the image has")
        if not fills(value.get("counts"), image.width * image.height):
            raise self.wrong(where, f"run lengths that add up to the image's {image.width * image.height} pixels")
        return {"size": [image.height, image.width], "counts": value["counts"]}


def fills(counts: Any, pixels: int) -> bool:
    """Whether run lengths, as a list or as COCO's compressed text, are well formed and add up to ``pixels``."""
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    return isinstance(counts, list) and all(_whole(count, 0, pixels) for count in counts) and sum(counts) == pixels


def _run_lengths(text: str) -> list[int] | None:
    """COCO's compressed run lengths: characters from '0' carry 5 bits each, least first, with 32 for "more follows".

    The last character's bit 16 is the sign; from the fourth on, a number is the difference to the one two before it.
    None where a character is none of the 64, a number does not end, or it is absurdly long.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return None if shift else lengths


def _values(entry: dict[str, Any], *keys: str) -> list[Any]:
    return [entry.get(key) for key in keys]


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _within(values: list[Any], limit: float) -> bool:
    """Whether all are numbers, none undefined, none beyond ``limit``. An undefined one may hide from min and max, not from the sum."""
    if not set(map(type, values)) <= {int, float}:
        return False
    return not values or (bool(-limit <= min(values) and max(values) <= limit) and sum(values) == sum(values))
