"""Pass: a network for square images of another size, with the same weights; positions are resampled.

What depends on the size is changed by the modules that the network has, so fused and pruned networks work too. Absolute positions:
bicubic, class tokens apart (timm). Biases by offset: ``positions.py``. Windows: Swin's and TinyViT's grow and shrink with the map, as many
to a side as before (7 at 224 pixels is 12 at 384, as in the published networks); EfficientViT's (MSRA) stay, but are never larger than
the map; those of ``window_attention`` stay. Networks that take any size only get another spec.
Knows nothing of accuracy at the new size: let ``finetune`` or ``distill`` follow. The crop's share of the picture (crop_pct) stays.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.copies import copied
from edgejoule.optimize.impossible import refuse
from edgejoule.optimize.positions import offset_index, resample_offsets, resample_signed
from edgejoule.optimize.windows import WindowedAttention
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext
from edgejoule.torchvision import ensure

ensure()
from timm.layers import PatchEmbed, to_2tuple  # noqa: E402
from timm.models.levit import Downsample  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402

MOST = 8192  # pixels
TRIES, STEP = 4, 16  # sizes that are tried on either side of one that does not work; pixels between them where there are no patches
WRONG = (ModelError, RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # what networks raise at sizes that they do not take


@dataclass(frozen=True)
class Resize:
    """``resize(px=192)``: images of 192x192 pixels. The size that the network has is the identity, bit for bit.

    Raises SpecError for a size that is none, ModelError naming sizes that work where this one does not.
    """

    px: int = 192

    def __post_init__(self) -> None:
        if type(self.px) is not int or not 1 <= self.px <= MOST:
            raise SpecError(f"resize's px is {self.px!r}: it is the side of a square image in pixels, one whole number from 1 to {MOST}")

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset()

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A copy in eval mode for (B, C, px, px), and the spec with that input size."""
        refuse("resize", module, spec.name)
        channels, height, width = spec.preprocessing.input_size
        if height != width:
            raise ModelError(f"resize cannot work on {spec.name}: it takes {height}x{width} images, and only square ones can be resized")
        if self.px == height:
            return copied(module), spec
        try:
            twin = resized(module, channels, height, self.px)
        except WRONG as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:160]
            sizes = _neighbours(module, channels, height, self.px)
            advice = (
                f"sizes near it that work are {' and '.join(map(str, sizes))}" if sizes else "no size near it works either: leave it out"
            )
            raise ModelError(f"resize(px={self.px}) does not work on {spec.name} ({said}): {advice}") from error
        preprocessing = dataclasses.replace(spec.preprocessing, input_size=(channels, self.px, self.px))
        return twin, dataclasses.replace(spec, preprocessing=preprocessing)


def resized(module: nn.Module, channels: int, old: int, px: int) -> nn.Module:
    """A copy of a network for ``old`` pixels, in eval mode, that has run at ``px``. Raises what the network raises where it cannot."""
    twin: Any = copied(module)
    embed = getattr(twin, "patch_embed", None)
    patch = _patch(twin)
    if patch is not None and px % patch and not embed.dynamic_img_pad:  # type: ignore[union-attr]
        raise ModelError(f"patches of {patch} pixels would leave out the border")
    like = next(twin.parameters())
    blocks = [part for part in twin.modules() if _has_own_window(part)]
    counts = _window_counts(twin, blocks, like.new_zeros(1, channels, old, old))
    tables = [_Table(part) for part in twin.modules() if _table_name(part)]
    if hasattr(twin, "set_input_size"):
        _set_input_size(twin, px)
    for table in tables:
        table.follow()
    for part in twin.modules():
        if isinstance(part, WindowedAttention):
            part.set_grid(embed.grid_size)  # type: ignore[union-attr]
    with _before_each(twin, lambda part, x: _fit(part, x, counts)), torch.no_grad():
        twin(like.new_zeros(1, channels, px, px))
    for part in twin.modules():
        _forget(part)
    return twin  # type: ignore[no-any-return]


def _set_input_size(twin: Any, px: int) -> None:
    """timm's own method; its account of the builder's arguments stays the builder's, for the size is the spec's affair."""
    records = {name: vars(twin).get(name) for name in ("_traits", "_model_args")}
    windows: dict[str, Any] = {}
    if type(twin) is SwinTransformer:
        grid = px // twin.patch_embed.patch_size[0]
        windows["window_size"] = tuple(_swin_window(stage, grid, number) for number, stage in enumerate(twin.layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own interpolation of tables, which ours replaces
        twin.set_input_size(img_size=(px, px), **windows)
    for name, record in records.items():
        if record is None:
            vars(twin).pop(name, None)
        else:
            setattr(twin, name, record)


def _swin_window(stage: Any, grid: int, number: int) -> tuple[int, int]:
    """As many windows to a side as before, each just large enough for the stage's new map."""
    block = stage.blocks[0]
    side = math.ceil(grid / 2**number)  # each stage but the first halves it, and pads an odd one
    high, wide = (_grown(old, window, side) for old, window in zip(block.input_resolution, block.window_size, strict=True))
    return high, wide


def _grown(old: int, window: int, new: int) -> int:
    """The side of windows that cover a map of ``new`` with as many as windows of ``window`` need for ``old``."""
    return math.ceil(new / math.ceil(old / window))


class _Table:
    """A module's table of biases as it was; ``follow`` makes the module's table anew where its side has changed since."""

    def __init__(self, part: Any) -> None:
        self.part, self.name = part, _table_name(part)
        self.values: Tensor = getattr(part, self.name).detach().clone()
        self.side = self._side()

    def _side(self) -> tuple[int, int]:
        high, wide = to_2tuple(self.part.resolution if self.name == "attention_biases" else self.part.window_size)
        return int(high), int(wide)

    def follow(self) -> None:
        if (side := self._side()) == self.side:
            return
        resample = resample_offsets if self.name == "attention_biases" else resample_signed
        grows = getattr(self.part, self.name).requires_grad
        setattr(self.part, self.name, nn.Parameter(resample(self.values, self.side, side), requires_grad=grows))


def _table_name(part: nn.Module) -> str:
    """The name of a module's table of biases by offset, absolute (by head and offset) or signed (by offset and head); "" without one."""
    for name, beside in (("attention_biases", "resolution"), ("relative_position_bias_table", "window_size")):
        if isinstance(table := getattr(part, name, None), nn.Parameter) and table.ndim == 2 and hasattr(part, beside):
            return name
    return ""


def _has_own_window(part: Any) -> bool:
    """TinyViT's blocks: they cut windows of ``window_size`` from maps (B, H, W, C) of any size for an attention by absolute offset."""
    return isinstance(getattr(part, "window_size", None), int) and _table_name(getattr(part, "attn", part)) == "attention_biases"


def _window_counts(twin: nn.Module, blocks: Sequence[Any], images: Tensor) -> dict[int, int]:
    """id of a block -> how many windows its map has to a side."""
    counts: dict[int, int] = {}

    def look(part: Any, x: Tensor) -> None:
        if _has_own_window(part):
            counts[id(part)] = math.ceil(x.shape[1] / part.window_size)

    if blocks:
        with _before_each(twin, look), torch.no_grad():
            twin(images)
    return counts


def _fit(part: Any, x: Tensor, counts: dict[int, int]) -> None:
    """Makes a module ready for the map that it is about to be given."""
    if id(part) in counts:
        part.window_size = math.ceil(x.shape[1] / counts[id(part)])
        _set_resolution(part.attn, part.window_size)
    elif type(part) is Downsample:  # LeViT's, on tokens
        part.resolution = (math.isqrt(x.shape[1]),) * 2
    elif _table_name(part) == "attention_biases":
        side = x.shape[2] if x.ndim == 4 else math.isqrt(x.shape[1])  # (B, C, H, W) or (B, N, C)
        if (first := getattr(part, "stride_conv", None)) is not None:  # EfficientFormerV2 attends on a smaller map
            side = math.ceil(side / next(layer.stride[0] for layer in first.modules() if isinstance(layer, nn.Conv2d)))
        _set_resolution(part, side)


def _set_resolution(part: Any, side: int) -> None:
    """Another side of the map that an attention by absolute offset looks at: its table, its index and its own counts."""
    table, new = _Table(part), (side, side)
    if table.side == new:
        return
    stride = 2 if hasattr(part, "resolution2") else getattr(part, "stride", 1)  # of queries among keys
    part.resolution = side if isinstance(part.resolution, int) else new
    if hasattr(part, "N"):  # EfficientFormerV2 keeps counts
        part.N = side * side
    if hasattr(part, "resolution2"):
        part.resolution2 = (math.ceil(side / stride),) * 2
        part.N2 = part.resolution2[0] ** 2
    table.follow()
    index = offset_index(new, stride).to(part.attention_bias_idxs.device)
    part.register_buffer("attention_bias_idxs", index, persistent="attention_bias_idxs" not in part._non_persistent_buffers_set)
    _forget(part)


def _forget(part: Any) -> None:
    """Biases that are kept between evaluations."""
    if "attention_bias_cache" in vars(part):
        part.attention_bias_cache = {}


@contextmanager
def _before_each(twin: nn.Module, see: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """``see(module, its first input)`` before each module of a network runs; nothing of it stays on the network."""
    handles = [
        part.register_forward_pre_hook(lambda part, inputs: see(part, inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None)
        for part in twin.modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _patch(twin: Any) -> int | None:
    """The side of a network's patches in pixels; None where it begins with convolutions that overlap."""
    embed = getattr(twin, "patch_embed", None)
    return int(embed.patch_size[0]) if isinstance(embed, PatchEmbed) else None


def _neighbours(module: nn.Module, channels: int, old: int, px: int) -> tuple[int, ...]:
    """The nearest sizes on both sides of one, among multiples of the patch or of ``STEP``, that a network works at."""
    step, found = _patch(module) or STEP, []
    for sizes in ([px // step * step - n * step for n in range(TRIES)], [(px // step + 1 + n) * step for n in range(TRIES)]):
        for size in sizes:
            if size < 1 or size == px:
                continue
            try:
                resized(module, channels, old, size)
            except WRONG:
                continue
            found.append(size)
            break
    return tuple(sorted(found))
