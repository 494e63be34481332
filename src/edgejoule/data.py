"""Images in: real photographs or a folder, through a model's own preprocessing, as uint8 crops that travel to a device.

``photos(n=32, seed=0)`` cuts seeded random pieces out of two real photographs; ``folder(path="...", n=None, seed=0)`` takes
a user's own. Crops are kept by content and by origin, so that a resumed run decodes nothing. Boards use ``read_crops`` and
``normalise``, which need numpy only; the rest imports Pillow (and scikit-learn for the photographs) when called.
Knows no labels, no network and no clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgejoule import registry
from edgejoule.errors import DataError, OutputError, SpecError, UnknownNameError
from edgejoule.plain import digest
from edgejoule.records import Preprocessing

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
LAYOUT = 1  # raise it with any change of how a source or the preprocessing makes crops: stored crops are then made anew
MOST = 100_000
Crops = npt.NDArray[np.uint8]  # (N, C, H, W)


class Source(Protocol):
    """Where images come from. ``origin`` is equal exactly when ``images`` would give the same ones."""

    def images(self) -> Iterator[Any]: ...  # PIL images, RGB

    def origin(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Photos:
    """``n`` pieces of scikit-learn's two photographs (a temple and a flower, 427 x 640): seeded positions, sizes and flips."""

    n: int = 32
    seed: int = 0

    def images(self) -> Iterator[Any]:
        """Yields RGB pieces of varied size, at least 160 px on each side. Raises DataError where scikit-learn is missing."""
        from PIL import Image, ImageOps

        try:
            from sklearn.datasets import load_sample_images
        except ImportError as error:
            raise DataError("photos needs scikit-learn, which is not installed: pip install 'edgejoule[host]'") from error
        photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        random = np.random.default_rng(self.seed)
        for index in range(self.n):
            photograph = photographs[index % len(photographs)]
            width, height = (int(random.integers(160, side + 1)) for side in photograph.size)
            left, top = (int(random.integers(0, side - part + 1)) for side, part in zip(photograph.size, (width, height), strict=True))
            piece = photograph.crop((left, top, left + width, top + height))
            yield ImageOps.mirror(piece) if random.random() < 0.5 else piece

    def origin(self) -> str:
        return f"photos(n={self.n}, seed={self.seed})"


@dataclass(frozen=True, slots=True)
class Folder:
    """The images below a folder, sorted by path; ``n`` of them, drawn by ``seed``, or all."""

    path: str
    n: int | None = None
    seed: int = 0

    def images(self) -> Iterator[Any]:
        """Yields RGB images. Raises DataError for an empty folder, too few images, or a file that cannot be read (it is named)."""
        from PIL import Image

        for file in self._files():
            try:
                with Image.open(file) as image:
                    yield image.convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"cannot read the image {file} ({error}): mend or remove it") from error

    def origin(self) -> str:
        """Names, sizes and modification times: a changed file is noticed without reading it."""
        root = Path(self.path).expanduser()
        return digest([[str(f.relative_to(root)), (s := f.stat()).st_size, s.st_mtime_ns] for f in self._files()])

    def _files(self) -> list[Path]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"no folder {self.path}: expected a folder that holds images")
        found = sorted(f for f in root.rglob("*") if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())
        if not found:
            raise DataError(f"no images below {self.path}: expected files such as .jpg or .png")
        if self.n is None:
            return found
        if self.n > len(found):
            raise DataError(f"{self.path} holds {len(found)} images, and n={self.n} were asked for: ask for at most {len(found)}")
        chosen = np.random.default_rng(self.seed).choice(len(found), size=self.n, replace=False)
        return [found[index] for index in sorted(chosen)]


SOURCES: dict[str, type[Photos] | type[Folder]] = {"photos": Photos, "folder": Folder}


def source(text: str) -> Source:
    """The images that a spelling names. Raises UnknownNameError and SpecError."""
    call = registry.parse(text)
    if call.name not in SOURCES:
        raise UnknownNameError("image source", call.name, SOURCES, f"known: {', '.join(SOURCES)}")
    options = dict(call.options)
    if "path" in options and not isinstance(options["path"], str):
        raise SpecError(f"cannot read {text!r}: path must be text")
    for key, least in (("n", 1), ("seed", 0)):
        value = options.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST):
            raise SpecError(f"cannot read {text!r}: {key} must be a whole number from {least} to {MOST}")
    if call.name == "photos" and options.get("n", 1) is None:
        raise SpecError(f"cannot read {text!r}: n must be a whole number from 1 to {MOST}")
    try:
        return SOURCES[call.name](**options)
    except TypeError as error:
        fields = {"photos": "n, seed", "folder": "path, n, seed"}[call.name]
        raise SpecError(
            f"cannot read {text!r}: {call.name} takes {fields}" + (" and needs path" if call.name == "folder" else "")
        ) from error


# ---------------------------------------------------------------- a model's own preprocessing


def crops(images: str, preprocessing: Preprocessing) -> Crops:
    """The images of a source after resizing and cropping: uint8 (N, C, H, W), not yet normalised.

    Equal to what timm's evaluation transform gives before it scales and normalises. Raises DataError and SpecError.
    """
    if preprocessing.input_size[0] != 3:
        raise DataError(f"cannot make images of {preprocessing.input_size[0]} channels: expected a model that takes RGB")
    made = [np.asarray(crop(image, preprocessing), dtype=np.uint8) for image in source(images).images()]
    return np.ascontiguousarray(np.stack(made).transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)


def crop(image: Any, preprocessing: Preprocessing) -> Any:
    """One PIL image, resized by its short side to size / crop_pct (both sides in ``squash`` mode) and cut in the centre.

    Raises DataError for a crop mode, a shape or an interpolation that is not known here.
    """
    from PIL import Image

    _, height, width = preprocessing.input_size
    modes = {"bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS", "nearest": "NEAREST", "box": "BOX", "hamming": "HAMMING"}
    if preprocessing.interpolation not in modes:
        raise DataError(f"cannot resize by {preprocessing.interpolation!r}: expected one of {', '.join(modes)}")
    resample = Image.Resampling[modes[preprocessing.interpolation]]
    target = math.floor(height / preprocessing.crop_pct), math.floor(width / preprocessing.crop_pct)
    if preprocessing.crop_mode == "squash":
        size = (target[1], target[0])
    elif preprocessing.crop_mode == "center" and height == width:
        short, long = sorted(image.size)
        longer = int(target[0] * long / short)
        size = (target[0], longer) if image.width <= image.height else (longer, target[0])
    else:
        raise DataError(f"cannot crop {height} x {width} in mode {preprocessing.crop_mode!r}: expected a square in mode center, or squash")
    resized = image if image.size == size else image.resize(size, resample)
    left, top = round((resized.width - width) / 2.0), round((resized.height - height) / 2.0)
    return resized.crop((left, top, left + width, top + height))


def normalise(crops: Crops, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """uint8 (N, C, H, W) -> float32 (N, C, H, W): (x / 255 - mean) / std by channel. Raises DataError for another shape or type."""
    if crops.ndim != 4 or crops.dtype != np.uint8 or crops.shape[1:] != preprocessing.input_size:
        raise DataError(
            f"cannot normalise {crops.dtype} {crops.shape}: expected uint8 (N, {', '.join(map(str, preprocessing.input_size))})"
        )
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(1, -1, 1, 1)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(1, -1, 1, 1)
    images = crops.astype(np.float32)
    images /= np.float32(255)
    images -= mean
    images /= std
    return images


# ---------------------------------------------------------------- crops on disk


def write_crops(images: str, preprocessing: Preprocessing, folder: Path) -> tuple[Path, str]:
    """The crops as ``<sha256>.npy`` in ``folder``, and their sha256; made once for a source and a preprocessing, then reused.

    Two processes may write at once. Raises DataError and SpecError for the images, OutputError where nothing can be written.
    """
    note = folder / f"{_origin_key(images, preprocessing)}.origin"
    with contextlib.suppress(OSError, ValueError):
        sha256 = note.read_text(encoding="ascii").strip()
        path = folder / f"{sha256}.npy"
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path, sha256
    buffer = io.BytesIO()
    np.save(buffer, crops(images, preprocessing), allow_pickle=False)
    content = buffer.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / f"{sha256}.npy"
    write_whole(path, content)
    write_whole(note, sha256.encode("ascii"))
    return path, sha256


def read_crops(path: Path) -> Crops:
    """uint8 (N, C, H, W) from a file that ``write_crops`` wrote. Raises DataError for anything else."""
    try:
        with Path(path).open("rb") as stream:
            stored = np.load(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the images {path} ({error}): make them again") from error
    if not isinstance(stored, np.ndarray) or stored.dtype != np.uint8 or stored.ndim != 4 or 0 in stored.shape:
        raise DataError(f"{path} holds no images: expected a uint8 array (N, C, H, W)")
    return stored


def _origin_key(images: str, preprocessing: Preprocessing) -> str:
    import PIL

    # Pillow's resampling is part of what made the pixels.
    return digest([LAYOUT, registry.canonical(images), source(images).origin(), preprocessing, PIL.__version__])


def write_whole(path: Path, content: bytes) -> None:
    """All or nothing: readers never see half a file. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"cannot write {path} ({error.strerror or error}): free some space, or name another cache folder in EDGEJOULE_CACHE"
        ) from error
