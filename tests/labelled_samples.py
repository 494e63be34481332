"""Small labelled sets as real files in the real formats, for tests: CIFAR-10's binary files, folders, WebDataset shards, Arrow.

Each writer returns what the leaf's ``path`` option takes. Every picture differs from every other, and its class can be told by its
colour, so that a tiny network learns it. Knows no tests and none of the package.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: label, then red, green and blue planes
NAMES = ("ant", "bee", "cat")


def pixels(label: int, number: int, size: tuple[int, int] = (32, 32)) -> np.ndarray[Any, Any]:
    """Picture ``number`` of class ``label``: (H, W, 3) uint8, the class's own colour and stripes under noise. ``size`` is (W, H)."""
    width, height = size
    random = np.random.default_rng([label, number])
    colour = np.random.default_rng([99, label]).integers(40, 216, 3)
    stripes = 30 * np.sin(np.arange(width) * (0.3 + 0.25 * label))[None, :, None]
    return np.clip(colour + stripes + random.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def encoded(label: int, number: int, size: tuple[int, int] = (32, 32), kind: str = "PNG", **options: Any) -> bytes:
    """The same picture as the bytes of a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels(label, number, size)).save(stream, kind, **options)
    return stream.getvalue()


def cifar10_records(labels: Sequence[int], first: int = 0) -> bytes:
    """Records in CIFAR-10's binary format; picture ``first + n`` for the n-th."""
    parts = (bytes([label]) + pixels(label, first + n).transpose(2, 0, 1).tobytes() for n, label in enumerate(labels))
    return b"".join(parts)


def write_cifar10(folder: Path, train: int = 50, test: int = 20) -> str:
    """CIFAR-10's binary version with ``train`` images over five batches and ``test`` images. Classes take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = min(5, train)  # an empty file is no batch
    cuts = [train * n // batches for n in range(batches + 1)]
    for n, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
        (folder / f"data_batch_{n}.bin").write_bytes(cifar10_records([i % 10 for i in range(start, stop)], start))
    (folder / "test_batch.bin").write_bytes(cifar10_records([i % 10 for i in range(test)], 1_000_000))
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")  # the original ends with an empty line
    return str(folder)


def write_imagefolder(
    folder: Path,
    each: int = 8,
    splits: Sequence[str] = (),
    classes: Sequence[str] = NAMES,
    size: tuple[int, int] = (24, 20),
    suffix: str = ".png",
) -> str:
    """``each`` pictures a class, in class folders directly below ``folder`` or below each of ``splits`` ("train", "val", "test")."""
    for which, split in enumerate(splits or ("",)):
        for label, name in enumerate(classes):
            home = folder / split / name
            home.mkdir(parents=True, exist_ok=True)
            for number in range(each):
                shown = Image.fromarray(pixels(label, which * 1000 + number, size))
                shown.save(home / f"{name}_{number:04d}{suffix}")
    return str(folder)


def write_webdataset(folder: Path, each: int = 16, shards: int = 2, classes: int = 3, name: str = "train", image: str = "png") -> str:
    """Shards by webdataset's own writer, ``each`` samples a shard, labels taking turns. Returns the brace pattern of the shards."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{name}-{shard:03d}.tar")) as writer:
            for number in range(shard * each, shard * each + each):
                label = number % classes
                first = 0 if name == "train" else 1000
                sample = {"__key__": f"{name}/{number:06d}", image: encoded(label, first + number, kind=image), "cls": label}
                writer.write(sample)
    return str(folder / f"{name}-{{000..{shards - 1:03d}}}.tar")


def write_huggingface(
    folder: Path,
    splits: Mapping[str, int] | None = None,
    names: Sequence[str] | None = NAMES,
    image: str = "image",
    label: str = "label",
) -> str:
    """A ``datasets`` folder by save_to_disk: a DatasetDict of ``splits`` (default train 24, test 9), or one Dataset for {"": n}.

    ``names`` None gives plain integer labels.
    """
    import datasets

    wanted = {"train": 24, "test": 9} if splits is None else splits
    count = len(names or NAMES)
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({image: datasets.Image(), label: kind})
    made = {}
    for which, (split, n) in enumerate(wanted.items()):
        labels = [i % count for i in range(n)]
        bytes_of = [{"bytes": encoded(each, which * 1000 + i), "path": None} for i, each in enumerate(labels)]
        made[split] = datasets.Dataset.from_dict({image: bytes_of, label: labels}, features=features)
    (made[""] if set(made) == {""} else datasets.DatasetDict(made)).save_to_disk(str(folder))
    return str(folder)
