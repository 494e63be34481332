"""scikit-learn's handwritten digits: 1797 real scans that need no download. The default data set. Knows no network.

A copy of the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998): 32 x 32 bitmaps, counted in
4 x 4 blocks, so 8 x 8 numbers from 0 to 16. Its thirteen writers stand in all three splits: what a network scores on the test split says
little of other people's handwriting.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgejoule.datasets.labelled import Split, origin_of, split_of
from edgejoule.datasets.split import Part, Positions, cut
from edgejoule.errors import DataError

VALIDATION, TEST = 0.1, 0.2
MISSING = "digits needs scikit-learn, which is not installed: pip install 'edgejoule[host]'"


@dataclass(frozen=True, eq=False)
class Scans:
    """The scans in scikit-learn's order."""

    pixels: npt.NDArray[np.uint8]  # (N, 8, 8), 0..255
    labels: npt.NDArray[np.int64]  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, position: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[position]).convert("RGB")

    def label(self, position: int) -> int:
        return int(self.labels[position])

    def key(self, position: int) -> str:
        return f"digits/{position}"


@dataclass(frozen=True)
class Digits:
    """Ten classes, "0" to "9", of 8 x 8 grey images. Split by hash: a fifth tests, a tenth validates.

    The ink v of 0..16 becomes v * 255 / 16, rounded: white on black, and no two values fall together.
    """

    @property
    def kind(self) -> Literal["classification"]:
        return "classification"

    @property
    def dataset(self) -> str:
        return "digits"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("0123456789")

    def probe(self) -> str | None:
        from importlib.util import find_spec

        return None if find_spec("sklearn") else MISSING

    def origin(self) -> str:
        """A hash of pixels, labels and the rule of the split. Raises DataError where scikit-learn is missing."""
        return origin_of(f"digits {VALIDATION} {TEST}", self._scans.pixels, self._scans.labels)

    def split(self, name: Part) -> Split:
        """Raises DataError where scikit-learn is missing, or for another name."""
        return split_of(self.dataset, self._scans, self._parts, name, 1)

    @functools.cached_property
    def _scans(self) -> Scans:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(MISSING) from error
        found = load_digits()
        ink = found.images.astype(np.int64)  # (N, 8, 8), 0..16
        return Scans(((ink * 255 + 8) // 16).astype(np.uint8), found.target.astype(np.int64))

    @functools.cached_property
    def _parts(self) -> dict[Part, Positions]:
        return cut((self._scans.key(n) for n in range(len(self._scans))), VALIDATION, TEST)
