"""A small data set in COCO's format, made of real files: JPEGs of several kinds and an instances_*.json. Knows no tests.

Five images: colour, grey, CMYK, stored on its side with an EXIF orientation, and one without annotations. Categories 3, 17, 44, 90
(44 has no object). Polygons, one object of two parts, compressed run lengths, a crowd in plain run lengths, an annotation with id 0, a
sliver thinner than a pixel, and objects below 32², up to 96² and above.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = {139: (200, 160), 285: (180, 140), 632: (160, 120), 724: (120, 200), 9999: (64, 48)}  # width, height by image identity
CATEGORIES = {90: "toothbrush", 3: "car", 44: "bottle", 17: "cat"}  # out of order, as files may have them


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def counts_of(mask: np.ndarray[Any, Any]) -> list[int]:
    """Plain run lengths, column by column, starting with the number of zeros."""
    flat = mask.T.ravel()
    lengths = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def compressed(mask: np.ndarray[Any, Any]) -> str:
    from pycocotools import mask as codec

    return codec.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode("ascii")


def blank(image_id: int) -> np.ndarray[Any, Any]:
    width, height = SIZES[image_id]
    return np.zeros((height, width), dtype=np.uint8)


def annotations() -> list[dict[str, Any]]:
    def entry(number: int, image: int, category: int, box: list[float], segmentation: Any, area: float, crowd: int = 0) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "segmentation": segmentation,
            "area": area,
            "iscrowd": crowd,
        }

    crowd, disc = blank(285), blank(632)
    crowd[80:130, 20:160] = 1
    rows, columns = np.ogrid[:120, :160]
    disc[(rows - 60) ** 2 + (columns - 80) ** 2 <= 30**2] = 1
    return [
        entry(0, 139, 3, [10.25, 20.5, 20, 22], [rectangle(10.25, 20.5, 20, 22)], 440.0),  # small
        entry(7, 139, 17, [60, 30, 120, 110], [rectangle(60, 30, 120, 110)], 13200.0),  # large
        entry(8, 139, 17, [5, 100, 50, 40], [rectangle(5, 100, 20, 40), rectangle(35, 100, 20, 40)], 1600.0),  # medium, two parts
        entry(9, 139, 3, [190, 10, 0.4, 60], [rectangle(190, 10, 0.4, 60)], 24.0, 1),  # a sliver, marked as crowd: no target
        entry(20, 285, 90, [30, 10, 50, 50], [rectangle(30, 10, 50, 50)], 2500.0),  # medium
        entry(21, 285, 90, [20, 80, 140, 50], {"size": [140, 180], "counts": counts_of(crowd)}, 7000.0, 1),
        entry(30, 632, 3, [50, 30, 61, 61], {"size": [120, 160], "counts": compressed(disc)}, float(disc.sum())),  # medium
        entry(40, 724, 17, [10, 120, 25, 30], [rectangle(10, 120, 25, 30)], 750.0),  # small
        entry(41, 724, 90, [10, 5, 105, 100], [rectangle(10, 5, 105, 100)], 10500.0),  # large
    ]


def content() -> dict[str, Any]:
    return {
        "info": {"description": "sample"},
        "licenses": [],
        "images": [{"id": key, "file_name": f"{key:012d}.jpg", "width": w, "height": h} for key, (w, h) in SIZES.items()],
        "categories": [{"id": key, "name": name, "supercategory": "thing"} for key, name in CATEGORIES.items()],
        "annotations": annotations(),
    }


def write(root: Path) -> tuple[Path, Path]:
    """The folder of images and the annotation file."""
    images, file = root / "val2017", root / "annotations" / "instances_val2017.json"
    images.mkdir(parents=True)
    file.parent.mkdir()
    random = np.random.default_rng(0)
    for key, (width, height) in SIZES.items():
        # A gradient with some noise: JPEG keeps it closely, and left, right, up and down can be told apart.
        ramp = np.linspace(0, 200, width)[None, :, None] * [1, 0.5, 0.2] + np.linspace(0, 50, height)[:, None, None]
        pixels = np.clip(ramp + random.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)
        picture, options = Image.fromarray(pixels), {}
        if key == 285:
            picture = picture.convert("L")
        if key == 632:
            picture = picture.convert("CMYK")
        if key == 724:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            exif = Image.Exif()
            exif[0x0112] = 6  # "turn clockwise to view": undoes the turn above
            options = {"exif": exif}
        picture.save(images / f"{key:012d}.jpg", quality=95, **options)
    file.write_text(json.dumps(content()))
    return images, file
