"""Which images train, validate and test: by a hash of each image's key, so that a split is stable. No files, no images.

An image stays where it is when others are added, removed or listed in another order, and a larger ``validation`` never takes from
``test``. Fractions are of the hash's range, not of the set: of 1000 images with ``test=0.1`` about 100 are test images, give or take ten.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgejoule.errors import DataError, SpecError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
RULE = 1  # raise it with any change of what falls where: origins change then
Positions = npt.NDArray[np.int64]  # (N,)


def part_of(key: str, validation: float, test: float) -> Part:
    """The split that an image belongs to. ``key`` names it in its set: a path relative to the root, or its place in the original file.

    The first 8 bytes of sha256(key), as a fraction u of their range: test where u < ``test``, validation where u < test + validation.
    """
    share = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def cut(keys: Iterable[str], validation: float, test: float) -> dict[Part, Positions]:
    """The positions of the keys that fall into each split, in order."""
    numbers = {part: number for number, part in enumerate(PARTS)}
    found = np.fromiter((numbers[part_of(key, validation, test)] for key in keys), dtype=np.int8)
    return {part: np.flatnonzero(found == number).astype(np.int64) for part, number in numbers.items()}


def check_fractions(validation: float, test: float) -> None:
    """Raises SpecError unless both are at least 0 and leave something to train on."""
    if not (math.isfinite(validation + test) and validation >= 0 and test >= 0 and validation + test < 1):
        raise SpecError(
            f"validation={validation} and test={test} are no fractions of a set: expected at least 0 each and less than 1 together"
        )


def check_filled(dataset: str, part: str, positions: Positions, fraction: float) -> None:
    """Raises DataError where a split that was asked for is empty. A fraction of 0 asks for none."""
    if part not in PARTS:
        raise DataError(f"{dataset} has no split {part!r}: expected {', '.join(PARTS)}")
    if len(positions) == 0 and (part == "train" or fraction > 0):
        advice = "give it more images" if part == "train" else f"give it more images, or choose another {part}= (0 for none)"
        raise DataError(f"the {part} split of {dataset} is empty, as the set is too small to be cut by hash: {advice}")
