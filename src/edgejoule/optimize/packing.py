"""Whole numbers of 4 bits, two to a byte: how weights of few bits are kept. Pure tensors; knows no layer and no scale."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 8  # -8..7 is kept as 0..15
RADIX = 16


def pack(values: Tensor) -> Tensor:
    """(..., I) int8 in -8..7 as (..., ceil(I / 2)) uint8: the even places in the low half of a byte, the odd ones in the high half.

    An odd I leaves half a byte of zero at the end. Raises ValueError for numbers outside.
    """
    if values.numel() and (int(values.min()) < -SHIFT or int(values.max()) >= RADIX - SHIFT):
        raise ValueError(f"numbers from {int(values.min())} to {int(values.max())}: 4 bits hold -8 to 7")
    places = (values.to(torch.int16) + SHIFT).to(torch.uint8)  # (..., I)
    if places.shape[-1] % 2:
        places = torch.nn.functional.pad(places, (0, 1), value=SHIFT)
    return places[..., 0::2] + RADIX * places[..., 1::2]


def unpack(packed: Tensor, width: int) -> Tensor:
    """The (..., width) int8 numbers that ``pack`` put into (..., ceil(width / 2)) uint8. Whole-number arithmetic that exporters know."""
    wide = packed.to(torch.int32)
    high = torch.div(wide, RADIX, rounding_mode="floor")
    places = torch.stack((wide - RADIX * high, high), dim=-1).flatten(-2)  # (..., 2 * ceil(width / 2))
    return (places[..., :width] - SHIFT).to(torch.int8)
