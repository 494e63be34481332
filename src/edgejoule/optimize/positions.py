"""Tables of relative positions at another resolution: resampled where they say the same about the same part of the picture.

A bias belongs to an offset between two tokens. On a grid of R tokens to a side the offset d spans d / R of the picture (or window); on a
grid of R' it is the offset d R' / R that spans as much, so the new table at d' is the old one at d' R / R'. Offset 0 stays offset 0, and
doubling a grid and halving it again gives the old table back exactly. (Interpolating such tables as images, half a pixel in, moves
offset 0.) Cubic convolution of Keys, IEEE Trans. ASSP 29(6), 1981, with a = -1/2, beyond the last sample a straight line.
Pure tensors: knows no network.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _keys(distance: Tensor) -> Tensor:
    """Keys' kernel (his equation 15) at distances of less than 2 samples: exact for polynomials of degree 2."""
    t = distance.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, far)


def cubic(points: Tensor, samples: int, mirrored: bool) -> Tensor:
    """(M, samples) float64: row m times the samples is their value at ``points[m]``, in units of samples from the first.

    Points lie in [-1, samples]. Left of the first sample the samples are ``mirrored`` (an even function), or go on as a straight line.
    """
    points = points.double()
    weights = torch.zeros(len(points), samples, dtype=torch.float64)
    rows, last = torch.arange(len(points)), samples - 1
    if last == 0:
        return weights + 1
    for tap in range(-1, 3):
        place = points.floor().long() + tap
        share = _keys(points - place)  # (M,)
        if mirrored:
            place = place.abs()
        inside = place.clamp(0, last)
        beyond = ((place - inside).abs()).double()  # samples past an end: the line through the last two goes on
        inward = torch.where(inside == 0, 1, last - 1)
        weights.index_put_((rows, inside), share * (1 + beyond), accumulate=True)
        weights.index_put_((rows, inward), -share * beyond, accumulate=True)
    return weights


def resample_offsets(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Biases by absolute offset (LeViT, Graham et al. 2021, §4.3; also TinyViT, EfficientViT, EfficientFormerV2), by rows and heads.

    (heads, h w) of a grid ``old`` = (h, w), entry dy w + dx -> (heads, h' w') of the grid ``new``. Exact for offsets that both have.
    """
    rows, columns = (cubic(torch.arange(n) * (o / n), o, mirrored=True) for o, n in zip(old, new, strict=True))
    values = table.detach().double().reshape(-1, *old)  # (heads, h, w)
    return (rows.to(table.device) @ values @ columns.to(table.device).T).flatten(1).to(table.dtype)


def resample_signed(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Biases by signed offset (Swin, Liu et al. 2021, equation 4): windows ``old`` = (h, w) -> ``new``.

    ((2 h - 1) (2 w - 1) + extra, heads), offset -(h - 1) first -> the same at the new window; ``extra`` rows at the end (a class
    token's biases) stay as they are.
    """
    area = (2 * old[0] - 1) * (2 * old[1] - 1)
    values = table.detach()[:area].double().T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)  # (heads, 2 h - 1, 2 w - 1)
    rows, columns = (
        cubic((o - 1) + torch.arange(1 - n, n) * (o / n), 2 * o - 1, mirrored=False).to(table.device) for o, n in zip(old, new, strict=True)
    )
    moved = (rows @ values @ columns.T).flatten(1).T.to(table.dtype)  # ((2 h' - 1) (2 w' - 1), heads)
    return torch.cat((moved, table.detach()[area:]))


def offset_index(side: tuple[int, int], stride: int) -> Tensor:
    """(N_q, N_k) int64: the entry of a table by absolute offset that a query and a key use; queries stand ``stride`` keys apart."""
    keys = torch.stack(torch.meshgrid(torch.arange(side[0]), torch.arange(side[1]), indexing="ij"))  # (2, h, w)
    queries = keys[:, ::stride, ::stride]
    apart = (queries.flatten(1).unsqueeze(2) - keys.flatten(1).unsqueeze(1)).abs()  # (2, N_q, N_k)
    return apart[0] * side[1] + apart[1]
