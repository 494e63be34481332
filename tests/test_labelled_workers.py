"""Every labelled split in worker processes, forked and started afresh: the same images as here."""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgejoule import registry

LEAVES = ("digits", "cifar10", "imagefolder", "huggingface", "webdataset")


def seen(images: Any) -> list[tuple[str, int, str]]:
    """What somebody sees of a split's first images."""
    found = []
    for index in range(min(len(images), 6)):
        image, label = images[index]
        found.append((images.key(index), label, hashlib.sha256(image.tobytes()).hexdigest()))
    return found


def mute(samples: Any) -> Any:
    """A batch as it is."""
    return samples


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_see_the_same_images(way: str, tmp_path: Path) -> None:
    from tests.test_leaves import data_of  # here: a worker that starts afresh imports this file, and need not import torch

    splits = [registry.create("data", data_of(name, tmp_path)).split("train") for name in LEAVES]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(way)) as pool:
        there = list(pool.map(seen, splits))
    assert there == [seen(split) for split in splits]


@pytest.mark.parametrize("name", LEAVES)
def test_a_data_loader_with_workers_sees_the_same_images(name: str, tmp_path: Path) -> None:
    import torch

    from tests.test_leaves import data_of

    images = registry.create("data", data_of(name, tmp_path)).split("train")
    images[0]  # whatever opens on first use is open before the fork
    loader: Any = torch.utils.data.DataLoader(images, batch_size=8, num_workers=2, collate_fn=mute)
    found = [(label, image.tobytes()) for batch in loader for image, label in batch]
    assert found[:80] == [(images[n][1], images[n][0].tobytes()) for n in range(min(80, len(images)))]
    assert len(found) == len(images)
