"""A small data set in the ADEChallengeData2016 layout, made of real JPEG and PNG files. Knows no tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"training": [(90, 60), (60, 100), (300, 40)], "validation": [(80, 60), (50, 70)]}  # width, height


def write(root: Path) -> Path:
    """The folder that holds images/ and annotations/. Labels 0 (unlabelled) and several of 1..150, among them the last."""
    for split, sizes in SIZES.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes, start=1):
            labels = np.zeros((height, width), dtype=np.uint8)
            for stripe, value in enumerate((0, 1, 13, 77, 150)):
                labels[:, stripe * width // 5 : (stripe + 1) * width // 5] = value
            labels[: height // 4] = 2 + number
            # Grey follows the label, so that picture and labels can be seen to move together.
            pixels = np.repeat(labels[..., None], 3, axis=2)
            name = f"ADE_{'val' if split == 'validation' else 'train'}_{number:08d}"
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg", quality=100, subsampling=0)
            Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
    return root
