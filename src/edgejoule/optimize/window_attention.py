"""Pass: plain Vision Transformers attend within windows, shifted in every other block, as Swin does; the weights stay as they are.

The network computes something else afterwards: it forgets what patches of different windows told each other. Let ``finetune`` or
``distill`` follow in the recipe. Windows of the whole grid change nothing. Knows plain transformers (one grid of patches for all
blocks, with or without prefix tokens); others are in ``impossible.py``. Trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.copies import copied
from edgejoule.optimize.impossible import refuse
from edgejoule.optimize.pruned_attention import PrunedRelPosAttention
from edgejoule.optimize.windows import WindowedAttention, dividing
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext
from edgejoule.torchvision import ensure

ensure()
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import Block, ResPostBlock  # noqa: E402
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock  # noqa: E402

BLOCKS = (Block, ResPostBlock, RelPosBlock, ResPostRelPosBlock)
ATTENTIONS = (Attention, RelPosAttention, PrunedRelPosAttention)


@dataclass(frozen=True)
class WindowAttention:
    """``window_attention(size=7)``: windows of 7x7 patches, those of every second windowed block shifted by 3 (size // 2).

    ``every=n`` leaves each n-th block global (the last of every n, as in ViTDet, §3); 0 leaves none. Raises SpecError for options
    that mean nothing, ModelError where windows of this size do not tile the grid and for networks that it does not know.
    """

    size: int = 7
    shift: bool = True
    every: int = 0

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise SpecError(f"window_attention's size is {self.size!r}: it is a window's side in patches, a whole number from 1 on")
        if type(self.every) is not int or self.every < 0:
            raise SpecError(f"window_attention's every is {self.every!r}: it is a whole number, 0 where no block stays global")
        if type(self.shift) is not bool:
            raise SpecError(f"window_attention's shift is {self.shift!r}: it is true or false")

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset()

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A copy in eval mode with attention within windows, and the spec as it is."""
        refuse("window_attention", module, spec.name)
        twin: Any = copied(module)
        grid = grid_of(twin, spec)
        if self.size not in dividing(grid):
            named = ", ".join(map(str, dividing(grid)))
            raise ModelError(
                f"window_attention(size={self.size}) cannot work on {spec.name}: its {grid[0]}x{grid[1]} patches divide into windows "
                f"of {named} to a side"
            )
        if grid == (self.size, self.size):  # one window is all of the grid
            return twin, spec
        windowed = 0
        for number, block in enumerate(twin.blocks, 1):
            if self.every and number % self.every == 0:
                continue
            shift = self.size // 2 if self.shift and windowed % 2 else 0
            block.attn = WindowedAttention(block.attn, grid, self.size, shift, twin.num_prefix_tokens)
            windowed += 1
        return twin, spec


def grid_of(network: Any, spec: ModelSpec) -> tuple[int, int]:
    """Rows and columns of a plain transformer's patches. Raises ModelError for networks that are none, with the reason."""
    blocks, embed = getattr(network, "blocks", ()), getattr(network, "patch_embed", None)
    if not blocks or not hasattr(embed, "dynamic_feat_size") or not hasattr(network, "num_prefix_tokens"):
        raise ModelError(
            f"window_attention cannot work on {spec.name}: it is no plain transformer, with one grid of patches and a row of blocks; "
            "leave it out of the recipe"
        )
    for name, block in blocks.named_children():
        if type(block) not in BLOCKS or type(block.attn) not in ATTENTIONS:
            kind = type(getattr(block, "attn", block)).__name__ if type(block) in BLOCKS else type(block).__name__
            raise ModelError(
                f"window_attention cannot work on {spec.name}: its block {name} is made of {kind}, not of timm's plain attention; "
                "put window_attention before passes that replace blocks, or leave it out of the recipe"
            )
    high, wide = embed.dynamic_feat_size(spec.preprocessing.input_size[1:])  # type: ignore[union-attr]
    return int(high), int(wide)
