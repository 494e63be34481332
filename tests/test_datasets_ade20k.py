"""ADE20K's layout: what a sample is, what damaged files say, and a mIoU that perfect predictions bring to exactly 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from edgejoule.datasets import ade20k
from edgejoule.datasets.ade20k import IGNORE, Ade20k, read_labels
from edgejoule.datasets.mean_iou import MeanIoU, predicted_classes, resize_logits
from edgejoule.errors import DataError
from tests import ade20k_sample


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ade20k_sample.write(tmp_path_factory.mktemp("ade"))


# ---------------------------------------------------------------- ADE20K


def test_labels_go_from_zero_and_what_is_unlabelled_is_ignored(scenes: Path) -> None:
    labels = read_labels(scenes / "annotations/validation/ADE_val_00000001.png")  # (60, 80)
    assert labels.shape == (60, 80) and labels[30, [5, 20, 40, 60, 75]].tolist() == [IGNORE, 0, 12, 76, 149]
    assert labels[0, 40] == 2


def test_a_validation_sample_is_scaled_and_keeps_its_labels(scenes: Path) -> None:
    dataset = Ade20k(scenes, "validation", size=128)
    shapes = [(tuple(image.shape), tuple(labels.shape)) for image, labels in (dataset[0], dataset[1])]
    assert shapes == [((3, 128, 192), (60, 80)), ((3, 192, 128), (70, 50))]  # 170.7 and 179.2 rounded up to 32s
    image, labels = dataset[0]
    assert image.dtype == torch.float32 and labels.dtype == torch.int64
    exact = Ade20k(scenes, "validation", size=128, multiple=1)
    assert [tuple(exact[i][0].shape) for i in range(2)] == [(3, 128, 171), (3, 179, 128)]
    long = Ade20k(scenes, "training", size=64, multiple=1, training=False)
    assert tuple(long[2][0].shape) == (3, 34, 256)  # 300 x 40: the long side stops at four times the target


def test_images_are_normalised_by_channel(scenes: Path) -> None:
    plain = Ade20k(scenes, "validation", size=64, mean=(0, 0, 0), std=(1, 1, 1))[0][0]
    image = Ade20k(scenes, "validation", size=64)[0][0]
    assert float(plain.min()) >= 0 and float(plain.max()) <= 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    assert torch.allclose(image * std + mean, plain, atol=1e-6)


def test_training_crops_are_seeded_and_keep_picture_and_labels_together(scenes: Path) -> None:
    def crops(seed: int, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        dataset = Ade20k(scenes, "training", size=64, seed=seed, mean=(0, 0, 0), std=(1, 1, 1))
        dataset.set_epoch(epoch)
        return [dataset[index] for index in range(len(dataset))]

    first, again = crops(0, 0), crops(0, 0)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(first, crops(0, 1), strict=True))
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(first, crops(1, 0), strict=True))
    padded = flipped = 0
    for image, labels in (pair for epoch in range(8) for pair in crops(0, epoch)):
        assert {int(value) for value in labels.unique()} <= {0, 2, 3, 4, 12, 76, 149, IGNORE}  # never a value between two classes
        assert image.shape == (3, 64, 64) and labels.shape == (64, 64) and labels.dtype == torch.int64
        # The pictures' grey is the label's value in the file: nearly equal where no edge was blurred into it.
        inside = labels != IGNORE
        assert ((image[0] * 255 - labels - 1).abs()[inside] < 6).float().mean() > 0.75
        padded += bool((labels[-1] == IGNORE).all())
        bottom = labels[min(63, 40)]
        seen = [int(v) for v in bottom[bottom != IGNORE]]
        flipped += seen == sorted(seen, reverse=True) and len(set(seen)) > 1
    assert padded and flipped  # both happen in 24 samples


def test_padding_is_the_mean_and_ignored(scenes: Path) -> None:
    image, labels = Ade20k(scenes, "training", size=64, seed=3)[2]  # 300 x 40 always leaves room below
    assert (labels[-1] == IGNORE).all() and float(image[:, -1].abs().max()) == 0


def test_training_batches_stack(scenes: Path) -> None:
    images, labels = next(iter(DataLoader(Ade20k(scenes, "training", size=32), batch_size=3)))
    assert images.shape == (3, 3, 32, 32) and labels.shape == (3, 32, 32)


def test_crops_of_one_class_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ade20k_sample.write(tmp_path)
    labels = np.full((40, 300), 5, dtype=np.uint8)
    labels[:, 200:] = 6  # most random crops of this strip hold one class alone
    Image.fromarray(labels).save(root / "annotations/training/ADE_train_00000003.png")
    dataset = Ade20k(root, "training", size=16)

    def alone(tries: int) -> int:
        monkeypatch.setattr(ade20k, "CROP_TRIES", tries)
        count = 0
        for epoch in range(40):
            dataset.set_epoch(epoch)
            kept = dataset[2][1]
            count += len(kept[kept != IGNORE].unique()) < 2
        return count

    assert alone(10) * 2 < alone(1)


def _swap(root: Path, kind: str, image: Image.Image) -> None:
    suffix = "png" if kind == "annotations" else "jpg"
    image.save(root / kind / "validation" / f"ADE_val_00000001.{suffix}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda root: (root / "annotations/validation/ADE_val_00000001.png").unlink(),
            r"00000001\.jpg has no label map \(2 images, 1 label",
        ),
        (lambda root: (root / "images/validation/ADE_val_00000002.jpg").unlink(), r"00000002\.png has no image"),
        (lambda root: [f.unlink() for f in root.rglob("*_val_*")], "no images"),
        (lambda root: (root / "images").rename(root / "pictures"), "no folder .*images.validation"),
        (lambda root: _swap(root, "annotations", Image.new("L", (80, 60), 151)), r"00000001\.png holds class 151"),
        (lambda root: _swap(root, "annotations", Image.new("RGB", (80, 60))), r"00000001\.png is of mode RGB"),
        (lambda root: _swap(root, "annotations", Image.new("L", (60, 80))), r"00000001\.jpg is 80 x 60 .* 60 x 80"),
        (lambda root: (root / "images/validation/ADE_val_00000001.jpg").write_bytes(b"\xff\xd8\xff"), r"cannot read .*00000001\.jpg"),
        (lambda root: (root / "annotations/validation/ADE_val_00000001.png").write_bytes(b"x"), r"cannot read .*00000001\.png"),
    ],
)
def test_damaged_scenes_are_named(tmp_path: Path, change: Callable[[Path], Any], says: str) -> None:
    root = ade20k_sample.write(tmp_path)
    change(root)
    with pytest.raises(DataError, match=says):
        Ade20k(root, "validation", size=32)[0]


def test_a_file_value_of_255_is_ignored_as_mmsegmentation_does(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 255).save(tmp_path / "all.png")
    assert (read_labels(tmp_path / "all.png") == IGNORE).all()
    with pytest.raises(DataError, match="no label map"):
        read_labels(tmp_path / "none.png")


@pytest.mark.parametrize("options", [{"classes": 255}, {"size": 0}, {"std": (0, 1, 1)}, {"seed": -1}, {"mean": (0.5,)}, {"multiple": 0}])
def test_odd_options_are_refused(scenes: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot prepare"):
        Ade20k(scenes, **options)


# ---------------------------------------------------------------- mIoU


def test_perfect_logits_score_exactly_one_through_the_whole_path(scenes: Path) -> None:
    meter = MeanIoU()
    worse = MeanIoU()
    dataset = Ade20k(scenes, "validation", size=64)
    for index in range(len(dataset)):
        _, labels = dataset[index]
        known = torch.where(labels == IGNORE, 0, labels)
        logits = torch.nn.functional.one_hot(known, 150).permute(2, 0, 1)[None].float()  # (1, 150, H, W)
        meter.add(predicted_classes(logits, tuple(labels.shape)), labels[None])
        worse.add(predicted_classes(logits.roll(6, -1), tuple(labels.shape)), labels[None])
    scores = meter.scores()
    assert scores.miou == 1 and scores.pixel_accuracy == 1
    assert {index for index, value in enumerate(scores.iou) if value is not None} == {0, 2, 3, 12, 76, 149}
    assert 0.3 < worse.scores().miou < 0.95 and 0.3 < worse.scores().pixel_accuracy < 0.95  # type: ignore[operator]


def test_miou_by_hand() -> None:
    meter = MeanIoU(classes=5)
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    meter.add(torch.tensor([[0, 1, 1, 1], [2, 3, 4, 99]]), labels)  # beneath 255 anything goes
    assert meter.confusion.dtype == torch.int64 and int(meter.confusion.sum()) == 6
    assert (int(meter.confusion[0, 1]), int(meter.confusion[1, 0]), int(meter.confusion[2, 3])) == (1, 0, 1)  # row: label
    scores = meter.scores()
    assert scores.iou == (1 / 2, 2 / 3, 1 / 2, 0.0, None)
    assert scores.miou == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 0) / 4) and scores.pixel_accuracy == 4 / 6


def test_batches_add_up_and_shuffled_labels_score_less() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (6, 20, 30), generator=random)
    found = torch.where(torch.rand(labels.shape, generator=random) < 0.8, labels, torch.randint(0, 7, labels.shape, generator=random))
    whole, parts, shuffled = MeanIoU(7), MeanIoU(7), MeanIoU(7)
    whole.add(found, labels)
    shuffled.add((found + 1) % 7, labels)
    for one, truth in zip(found, labels.to(torch.uint8), strict=True):
        parts.add(one, truth)
    assert torch.equal(whole.confusion, parts.confusion) and whole.scores() == parts.scores()
    assert 0.6 < whole.scores().miou < 0.8 and shuffled.scores().miou < 0.1  # type: ignore[operator]


def test_nothing_labelled_is_none_and_nonsense_is_refused() -> None:
    meter = MeanIoU(classes=3)
    assert meter.scores().miou is None and meter.scores().pixel_accuracy is None
    meter.add(torch.zeros(2, 2, dtype=torch.int64), torch.full((2, 2), 255))
    assert meter.scores().miou is None
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    for predictions, labels, says in (
        (zeros, torch.zeros(2, 3, dtype=torch.int64), "differ"),
        (zeros.float(), zeros, "whole numbers"),
        (zeros + 3, zeros, "predictions go from 3"),
        (zeros, zeros - 1, "labels go from -1"),
    ):
        with pytest.raises(DataError, match=says):
            meter.add(predictions, labels)
    with pytest.raises(DataError, match="ignored"):
        MeanIoU(classes=3, ignore=2)
    with pytest.raises(DataError, match="logits"):
        resize_logits(torch.zeros(3, 4, 4), (8, 8))
