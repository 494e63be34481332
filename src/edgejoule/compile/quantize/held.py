"""The images that quantisation's choices are judged by: split from those of calibration, and as files for a worker. Judges nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.seams import CompileContext, Held


def calibration_and_held(context: CompileContext) -> tuple[Any, Held]:
    """Images (N, C, H, W) to calibrate on and images to choose by: never the same ones, unless there are fewer than three."""
    images = context.calibration()
    if context.held is not None:
        return images, context.held()
    if len(images) < 3:
        return images, Held(images)
    third = np.arange(len(images)) % 3 == 2
    return images[~third], Held(images[third])


def only_held(context: CompileContext) -> Held:
    """For what calibrates nothing. All images would then be free to judge by, but a budget is judged by the same ones in every backend."""
    return context.held() if context.held is not None else calibration_and_held(context)[1]


def save(held: Held, folder: Path) -> Mapping[str, str]:
    """Writes them into ``folder``; the entries of a worker's job that ``load`` reads."""
    arrays = {"held": held.images, "labels": held.labels}
    paths = {name: str(folder / f"{name}.npy") for name, array in arrays.items() if array is not None}
    for name, path in paths.items():
        np.save(path, arrays[name])
    return paths


def load(job: Mapping[str, Any]) -> Held:
    return Held(np.load(job["held"]), np.load(job["labels"]) if "labels" in job else None)
