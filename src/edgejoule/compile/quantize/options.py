"""What may be asked of quantisation, and what it chose. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

OVER_BUDGET = "over budget"  # the note that becomes a caveat
MOST_NAMES = 12  # names of layers that a note spells out; the rest are counted


@dataclass(frozen=True)
class Options:
    """How to quantise. The defaults keep a ViT's answers: choices are made on held-out images, within ``max_drop_pct``.

    ``scope``: "linear" quantises Gemm, Conv and MatMul with constant weights; "attention" the products of activations too; "all"
    whatever onnxruntime can. ``outputs``: "conv" quantises what convolutions give as well, without which onnxruntime runs them in
    float; other runtimes want inputs only. ``smoothing``: "auto" tries off, alpha 0.15, 0.5, 0.95 and "fold"; a float is
    SmoothQuant's alpha. ``activations``: "u8" asymmetric (x86 onnxruntime, OpenVINO), "s8" symmetric (TensorRT). ``search``: put
    back to float what hurts until the budget is met. ``weights``: "mse" clips each output channel where that loses less.
    ``weight_bits`` 7 avoids saturation on x86 without VNNI. ``bias``: onnxruntime needs int32, TensorRT float.
    """

    quantizer: Literal["onnxruntime", "nncf"] = "onnxruntime"
    scope: Literal["linear", "attention", "all"] = "linear"
    smoothing: Literal["auto", "off", "fold"] | float = "auto"
    ranges: Literal["auto", "minmax", "percentile", "mse"] = "auto"
    activations: Literal["u8", "s8"] = "u8"
    outputs: Literal["none", "conv"] = "none"
    search: bool = True
    weights: Literal["max", "mse"] = "max"
    weight_bits: Literal[7, 8] = 8
    bias: Literal["int32", "float"] = "int32"

    def __post_init__(self) -> None:
        if not isinstance(self.smoothing, str) and not 0.0 <= self.smoothing <= 1.0:
            raise ValueError(f"smoothing={self.smoothing}, expected auto, off, fold or an alpha from 0 to 1")


@dataclass(frozen=True)
class Chosen:
    """What ``quantize_onnx`` chose, and what it cost on the held-out images."""

    quantizer: str
    smoothing: str  # "off", "0.5", "fold"
    ranges: str  # "minmax", "percentile", "mse"
    quantized: int  # products with weights that run in int8
    products: int  # of so many
    kept_float: tuple[str, ...] = ()  # names of those that do not
    error: float | None = None  # mean over held-out images of ||quantised - float|| / ||float||, on logits
    naive_error: float | None = None  # of the same set of products with min-max ranges and no smoothing
    drop_pct: float | None = None  # top-1 (with labels) or agreement lost on the held-out images, in points
    drop_kind: str = ""  # "top-1" or "agreement"
    held: int = 0  # images that this was judged by
    tried: Mapping[str, float] | None = None  # candidate -> error
    sessions: int = 0  # candidate files that were run
    within_budget: bool = True

    def notes(self) -> Mapping[str, str]:
        """For ``CompileContext.note``: what -> chosen, in words."""
        notes = {
            "quantizer": self.quantizer,
            "smoothing": self.smoothing,
            "ranges": self.ranges,
            "quantized": f"{self.quantized} of {self.products} products with weights",
        }
        if self.kept_float:
            more = len(self.kept_float) - MOST_NAMES
            notes["kept in float"] = ", ".join(self.kept_float[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        if self.error is not None and self.drop_pct is not None:
            notes["held-out error"] = f"{self.error:.2g} of the logits' norm ({self.held} images)"
            one = f"one image of {self.held} is {100 / self.held:.2g}, and always allowed" if self.held else "of no image"
            notes["held-out drop"] = f"{self.drop_pct:.3g} points of {self.drop_kind} ({one})"
            if not self.within_budget:
                notes[OVER_BUDGET] = f"{self.drop_pct:.3g} points of {self.drop_kind} are lost on {self.held} held-out images"
        if self.naive_error is not None:
            notes["held-out error, min-max without smoothing"] = f"{self.naive_error:.2g}"
        if self.tried:
            notes["tried"] = ", ".join(f"{name} {error:.2g}" for name, error in self.tried.items())
        return notes
