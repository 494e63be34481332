"""Box suppression and region pooling in torch alone, against their definitions written as plain loops."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from edgejoule import torchvision as shim
from edgejoule import torchvision_operators as operators

shim.ensure()
from torchvision import ops  # noqa: E402


def nms_in_loops(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for candidate in sorted(range(len(boxes)), key=lambda i: -float(scores[i])):  # sorted() keeps the order of equals
        x1, y1, x2, y2 = boxes[candidate].tolist()
        for other in kept:
            u1, v1, u2, v2 = boxes[other].tolist()
            shared = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            if union and shared / union > threshold:
                break
        else:
            kept.append(candidate)
    return kept


def boxes_in(count: int, side: float, seed: int) -> torch.Tensor:
    """(count, 4) float64, some of them small, some partly outside 0..side."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 2), generator=generator, dtype=torch.float64) * side * 1.2 - side * 0.1
    sizes = torch.rand((count, 2), generator=generator, dtype=torch.float64) ** 2 * side * 0.7
    return torch.cat([corners, corners + sizes], 1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 2, 40, 300])
def test_suppression_is_the_greedy_definition(count: int, threshold: float) -> None:
    boxes = boxes_in(count, 60.0, seed=count)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ops.nms(boxes, scores, threshold).tolist() == nms_in_loops(boxes, scores, threshold)


def test_suppression_takes_equal_scores_in_their_order() -> None:
    boxes = boxes_in(200, 60.0, seed=5).round()  # whole numbers: some boxes are empty, some intersections exactly at the threshold
    scores = (torch.rand(200, generator=torch.Generator().manual_seed(2)) * 4).round().double()
    assert len(set(scores.tolist())) <= 5
    assert ops.nms(boxes, scores, 0.25).tolist() == nms_in_loops(boxes, scores, 0.25)


def test_suppression_goes_on_past_one_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "SUPPRESSION_ROWS", 7)
    boxes, scores = boxes_in(100, 60.0, seed=8), torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert operators.nms(boxes, scores, 0.3).tolist() == nms_in_loops(boxes, scores, 0.3)


def test_suppression_of_nothing_and_of_wrong_shapes() -> None:
    none = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert none.shape == (0,) and none.dtype == torch.int64
    with pytest.raises(RuntimeError, match="shape"):
        operators.nms(torch.zeros(3, 5), torch.zeros(3), 0.5)
    with pytest.raises(RuntimeError, match="shape"):
        operators.nms(torch.zeros(3, 4), torch.zeros(2), 0.5)


@pytest.mark.parametrize("count", [50, 1500])  # torchvision takes classes apart by two different tricks
def test_classes_do_not_suppress_each_other(count: int) -> None:
    boxes = boxes_in(count, 60.0, seed=3)
    generator = torch.Generator().manual_seed(4)
    scores, classes = torch.rand(count, generator=generator, dtype=torch.float64), torch.randint(0, 7, (count,), generator=generator)
    expected = [
        int(one) for c in range(7) for one in (classes == c).nonzero()[:, 0][nms_in_loops(boxes[classes == c], scores[classes == c], 0.5)]
    ]
    kept = ops.batched_nms(boxes, scores, classes, 0.5)
    assert sorted(kept.tolist()) == sorted(expected)
    assert (scores[kept].diff() <= 0).all()


def pixel(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """One bilinear sample of (C, H, W) -> (C,), with the rules of torchvision's kernel at the rim."""
    height, width = plane.shape[-2:]
    if y < -1.0 or y > height or x < -1.0 or x > width:
        return plane.new_zeros(plane.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = plane[:, top, left] * (1 - across) + plane[:, top, right] * across
    lower = plane[:, bottom, left] * (1 - across) + plane[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def roi_align_in_loops(
    images: torch.Tensor, rois: torch.Tensor, scale: float, bins_y: int, bins_x: int, ratio: int, aligned: bool
) -> torch.Tensor:
    pooled = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0.0) for corner in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        down, across = (ratio, ratio) if ratio > 0 else (math.ceil(height / bins_y), math.ceil(width / bins_x))
        for row in range(bins_y):
            for column in range(bins_x):
                total = images.new_zeros(images.shape[1])
                for i in range(down):
                    for j in range(across):
                        y = y1 + (row + (i + 0.5) / down) * height / bins_y
                        x = x1 + (column + (j + 0.5) / across) * width / bins_x
                        total = total + pixel(images[int(image)], y, x)
                pooled.append(total / max(down * across, 1))
    return torch.stack(pooled).view(len(rois), bins_y, bins_x, images.shape[1]).permute(0, 3, 1, 2)


def regions(scale: float) -> torch.Tensor:
    """(K, 5) on 13 x 17 pixels and two images: small, large, partly and wholly outside, a point."""
    given = torch.tensor(
        [[0, 0, 17, 13], [-6, -5, 30, 20], [40, 2, 60, 9], [3.3, 4.4, 3.3, 4.4], [16.2, 12.1, 17, 13]], dtype=torch.float64
    )
    corners = torch.cat([boxes_in(6, 15.0, seed=11), given]) / scale
    images = torch.arange(len(corners), dtype=torch.float64)[:, None] % 2
    return torch.cat([images, corners], 1)


@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("scale", "bins"), [(1.0, (2, 3)), (0.25, (7, 7)), (2.0, (1, 1))])
def test_region_pooling_is_its_definition(ratio: int, aligned: bool, scale: float, bins: tuple[int, int]) -> None:
    images = torch.randn((2, 3, 13, 17), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pooled = ops.roi_align(images, regions(scale), bins, scale, ratio, aligned)
    expected = roi_align_in_loops(images, regions(scale), scale, *bins, ratio, aligned)
    assert float(expected.abs().max()) > 0.5
    torch.testing.assert_close(pooled, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradients_of_region_pooling_are_those_of_its_definition(ratio: int) -> None:
    gradients = []
    for pool in (ops.roi_align, lambda x, r, bins, scale, *rest: roi_align_in_loops(x, r, scale, *bins, *rest)):
        images = torch.randn((2, 3, 13, 17), generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
        (pool(images, regions(0.5), (3, 2), 0.5, ratio, True).sin().sum()).backward()
        gradients.append(images.grad)
    assert float(gradients[0].abs().max()) > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_region_pooling_of_nothing_of_low_precision_and_of_shapes_alone() -> None:
    images = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert ops.roi_align(images, torch.zeros(0, 5), 7).shape == (0, 4, 7, 7)
    one = torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]])
    exact, rounded = ops.roi_align(images, one, 2), ops.roi_align(images.bfloat16(), one.bfloat16(), 2)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
    assert ops.roi_align(images.to("meta"), one.to("meta"), 7, 1.0, 2).shape == (1, 4, 7, 7)
    assert ops.roi_align(images, torch.tensor([[0.0, 5.0, 5.0, 2.0, 2.0]]), 2, aligned=True).abs().max() == 0  # inside out: no samples
    with pytest.raises(RuntimeError, match="regions"):
        operators.roi_align(images, torch.zeros(1, 4), 1.0, 2, 2, 2, False)


def test_region_pooling_takes_the_load_of_a_detector() -> None:
    """1000 regions of 256 channels in 7 x 7 bins; torchvision's Python version would want (K, C, 7, 7, H, W) numbers: 400 GB here."""
    images = torch.ones(1, 256, 100, 100)
    rois = torch.cat([torch.zeros(1000, 1), boxes_in(1000, 100.0, seed=1).clamp(1, 98).float()], 1)
    for ratio in (2, 0):
        torch.testing.assert_close(ops.roi_align(images, rois, 7, 1.0, ratio), torch.ones(1000, 256, 7, 7))


def test_other_missing_operators_say_so() -> None:
    if shim.ensure() == "native":
        pytest.skip("torchvision's own operators are all there")
    with pytest.raises(RuntimeError, match="custom C\\+\\+ ops"):
        ops.deform_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.zeros(1, 1, 3, 3), padding=1)


def test_a_native_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads its library keeps its operators: nothing is declared and nothing replaced."""
    monkeypatch.setattr(shim, "_library", None)
    monkeypatch.setattr(sys.modules["torchvision.extension"], "_has_ops", lambda: True)
    monkeypatch.setattr(shim, "_implement", lambda library: pytest.fail("replaced an operator"))
    monkeypatch.setattr(shim, "_declare", lambda: pytest.fail("declared an operator"))
    assert shim.ensure() == "native"


def test_somebody_elses_declarations_are_completed() -> None:
    """Another package may have made torchvision importable by declaring the two operators first, without code."""
    script = """
import torch
other = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        other.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from edgejoule import torchvision as shim
shim.ensure(); shim.ensure()
import torchvision
assert torchvision.ops.nms(torch.tensor([[0., 0, 2, 2], [0, 0, 2, 2.1]]), torch.tensor([.1, .2]), .5).tolist() == [1]
"""
    if shim.ensure() == "native":
        pytest.skip("torchvision's own operators are all there")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
