"""torchvision's two compiled operators that detectors need, in torch alone: box suppression and region pooling. Knows no model.

Both follow the definition of torchvision's own CPU kernels, element by element. They stand in where those kernels cannot
load (torchvision.py decides that); elsewhere nothing imports them. Region pooling is a sum of few weighted pixels for
each output element, which is what an embedding bag computes: no crop, no sample and no dense weight is ever stored.
"""

from __future__ import annotations

import torch
from torch.nn import functional

NMS_SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
QNMS_SCHEMA = "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
ROI_ALIGN_SCHEMA = (
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor"
)
SUPPRESSION_ROWS = 512  # overlaps are computed for so many boxes at a time: 512 x 5000 numbers are 10 MB


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression: indices (K,) int64 of the boxes kept, by falling score, equal scores in their given order.

    ``dets`` (N, 4) are x1, y1, x2, y2 and ``scores`` (N,). A box goes where its intersection over union with a kept box of a
    higher score is more than the threshold (never where both are empty). Raises RuntimeError for other shapes, as torchvision does.
    """
    _expect(dets.ndim == 2 and dets.shape[1] == 4, f"boxes should have shape (N, 4), got {tuple(dets.shape)}")
    _expect(scores.shape == dets.shape[:1], f"scores should have shape ({len(dets)},), got {tuple(scores.shape)}")
    order = scores.sort(stable=True, descending=True).indices
    boxes = _at_least_float32(dets.detach().cpu())[order.cpu()]  # (N, 4)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    alive = kept.numpy()  # the same memory; walking over rows is many times faster there
    for start in range(0, len(boxes), SUPPRESSION_ROWS):
        candidates = kept[start : start + SUPPRESSION_ROWS].nonzero()[:, 0] + start
        overlaps = (_iou(boxes[candidates], boxes[start:]).double() > iou_threshold).numpy()  # (candidates, N - start)
        for row, box in enumerate(candidates.tolist()):
            if alive[box]:
                alive[box + 1 :] &= ~overlaps[row, box + 1 - start :]
    return order[kept.to(order.device)]


def _iou(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(A, 4), (B, 4) -> (A, B); NaN where both boxes are empty."""
    widths, heights = (
        (torch.minimum(left[:, None, axis + 2], right[:, axis + 2]) - torch.maximum(left[:, None, axis], right[:, axis])).clamp_(min=0)
        for axis in (0, 1)
    )
    intersection = widths * heights
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (left, right)]
    return intersection / (areas[0][:, None] + areas[1] - intersection)


def roi_align(
    input: torch.Tensor,  # noqa: A002  torchvision's name
    rois: torch.Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """Averages of bilinear samples in a grid of bins over each region (He et al., Mask R-CNN, section 3): (K, C, PH, PW).

    ``input`` (N, C, H, W); ``rois`` (K, 5) are an image's index and x1, y1, x2, y2, which ``spatial_scale`` takes to pixels of
    ``input``. A bin has ``sampling_ratio`` squared samples or, at 0 and below, about one a pixel. Samples more than one pixel outside
    count as zero. ``aligned`` shifts by half a pixel. Gradients reach ``input`` only, as torchvision's do.
    """
    _expect(rois.ndim == 2 and rois.shape[1] == 5, f"regions should have shape (K, 5), got {tuple(rois.shape)}")
    batch, channels, height, width = input.shape
    pixels = _at_least_float32(input).permute(0, 2, 3, 1).reshape(batch * height * width, channels)  # (N·H·W, C)
    regions = rois.detach().to(pixels.dtype)
    first_rows = regions[:, 0].long() * height  # (K,), of each region's image
    corners = regions[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)  # (K, 4)
    starts, sizes = corners[:, :2], corners[:, 2:] - corners[:, :2]  # (K, 2): x, y
    if not aligned:
        sizes = sizes.clamp(min=1.0)
    if len(rois) == 0:
        return input.new_zeros((0, channels, pooled_height, pooled_width))
    dense, groups = sampling_ratio <= 0, _groups(sizes, pooled_height, pooled_width, sampling_ratio)
    indices, weights, bag_sizes = [], [], []
    for chosen, samples_y, samples_x in groups:
        ys, y_weights = _axis(starts[chosen, 1], sizes[chosen, 1], pooled_height, samples_y, height, dense)  # (k, PH, Y)
        xs, x_weights = _axis(starts[chosen, 0], sizes[chosen, 0], pooled_width, samples_x, width, dense)  # (k, PW, X)
        rows = ys + first_rows[chosen, None, None]
        indices.append((rows[:, :, None, :, None] * width + xs[:, None, :, None, :]).flatten())  # (k, PH, PW, Y, X) before
        weights.append((y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]).flatten())
        bag_sizes.append(torch.full((len(chosen) * pooled_height * pooled_width,), ys.shape[-1] * xs.shape[-1], device=input.device))
    sizes_in_pixels = torch.cat(bag_sizes)  # (K·PH·PW,)
    first_pixels = sizes_in_pixels.cumsum(0) - sizes_in_pixels
    sums = functional.embedding_bag(torch.cat(indices), pixels, first_pixels, mode="sum", per_sample_weights=torch.cat(weights))
    place = torch.cat([chosen for chosen, _, _ in groups]).argsort()  # back from groups to the given order
    pooled = sums.view(len(rois), pooled_height, pooled_width, channels)[place]
    return pooled.permute(0, 3, 1, 2).contiguous().to(input.dtype)


def _groups(sizes: torch.Tensor, bins_y: int, bins_x: int, sampling_ratio: int) -> list[tuple[torch.Tensor, int, int]]:
    """Which regions (k,) have the same number of samples in a bin, and how many down and across: 0 in a region turned inside out."""
    if sampling_ratio > 0:
        return [(torch.arange(len(sizes), device=sizes.device), sampling_ratio, sampling_ratio)]
    per_bin = (sizes / sizes.new_tensor([bins_x, bins_y])).ceil().nan_to_num(0.0, 0.0, 0.0).clamp(min=0).long()
    grids, group = torch.unique(per_bin, dim=0, return_inverse=True)  # (G, 2): across, down; (K,)
    return [((group == g).nonzero()[:, 0], down, across) for g, (across, down) in enumerate(grids.tolist())]


def _axis(
    starts: torch.Tensor, sizes: torch.Tensor, bins: int, samples: int, length: int, dense: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along one axis: the pixels that each bin's samples touch and their shares in the bin's average, both (k, bins, pixels).

    Bilinear weights, validity and the average are each a product of one factor down and one across, so axes can be done apart.
    ``dense`` says that samples are at most a pixel apart: neighbours then share pixels, and every pixel is listed once.
    """
    bin_sizes = (sizes / bins)[:, None]  # (k, 1)
    inside = (torch.arange(samples, device=starts.device) + 0.5).to(starts.dtype) / max(samples, 1)
    first = starts[:, None] + torch.arange(bins, device=starts.device).to(starts.dtype) * bin_sizes  # (k, bins)
    at = first[:, :, None] + inside * bin_sizes[:, :, None]  # (k, bins, samples)
    valid = (at >= -1.0) & (at <= length)
    at = at.nan_to_num().clamp(0.0, length - 1.0)
    low = at.floor()
    share = at - low
    touched = torch.cat([low, (low + 1).clamp(max=length - 1.0)], -1).long()  # (k, bins, 2·samples)
    weights = torch.cat([1.0 - share, share], -1) * torch.cat([valid, valid], -1) / max(samples, 1)
    if not dense or samples <= 2:
        return touched, weights
    window = touched[:, :, :1] + torch.arange(samples + 2, device=starts.device)  # one pixel more than needed, against rounding
    shares = weights.new_zeros(window.shape).scatter_add(-1, touched - touched[:, :, :1], weights)
    return window.clamp(max=length - 1), shares


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _expect(fact: bool, otherwise: str) -> None:
    """RuntimeError, as the kernels raise it for whoever called torchvision: no user of ours comes here."""
    if not fact:
        raise RuntimeError(otherwise)
