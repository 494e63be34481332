"""What EdgeViT's mixing of positions costs: the formula of the paper's appendix, and the multiply-adds of the network as it is built.

Spatial operations are those that mix positions: depth-wise convolutions, the products of attention, propagation. Those that mix
channels (patch embeddings, 1x1 convolutions, projections, feed-forward networks: some 95 % of the network) are not in the formula.
Plain arithmetic on heights, widths and channels; a name is looked up in edgevit_variants.py and edgevit_ablations.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgejoule.errors import ModelError

POSITION_KERNEL, LOCAL_KERNEL = 3, 5  # sides of the released code's depth-wise convolutions, in tokens


@dataclass(frozen=True, slots=True)
class SpatialMacs:
    """The appendix's terms for one block, in multiply-adds; ``full_attention`` is what self-attention on all tokens would cost."""

    local: int
    attention: int
    propagation: int
    full_attention: int

    @property
    def total(self) -> int:
        """The bottleneck's three terms together."""
        return self.local + self.attention + self.propagation


@dataclass(frozen=True, slots=True)
class StageMacs:
    """Counted multiply-adds of the spatial operations of one stage, over all its blocks. ``stage`` counts from 1; sides in tokens."""

    stage: int
    blocks: int
    height: int
    width: int
    channels: int
    rate: int
    positions: int
    local: int
    attention: int
    propagation: int

    @property
    def total(self) -> int:
        """All four kinds together."""
        return self.positions + self.local + self.attention + self.propagation


@dataclass(frozen=True, slots=True)
class Term:
    """One line of the comparison: multiply-adds by the formula, as counted (None where nothing is), and why they differ."""

    term: str
    formula: int
    counted: int | None
    why: str


def spatial_macs(height: int, width: int, channels: int, rate: int, kernel: int = 3) -> SpatialMacs:
    """k^2 h w c + 2 (h w / r^2)^2 c + r^2 h w c, against 2 (h w)^2 c of self-attention (the paper's appendix): one block, one image.

    Where the rate divides a side no longer, delegates are counted whole, ceil(h / r) ceil(w / r). Raises ModelError below 1.
    """
    if min(height, width, channels, rate, kernel) < 1:
        raise ModelError(
            f"spatial_macs needs sides, channels, rate and kernel of at least 1, not {(height, width, channels, rate, kernel)}"
        )
    tokens, delegates = height * width, _windows(height, width, rate)
    return SpatialMacs(
        local=kernel**2 * tokens * channels,
        attention=2 * delegates**2 * channels,
        propagation=rate**2 * tokens * channels,
        full_attention=2 * tokens**2 * channels,
    )


def spatial_macs_counted(model: str | Any, size: tuple[int, int] = (224, 224)) -> tuple[StageMacs, ...]:
    """Stage by stage, for an EdgeViT or the name of one, at images of ``size`` (H, W) pixels: what its own operations cost.

    Interpolation, pooling, normalisation and softmax are not counted, as everywhere here. Raises ModelError for another network.
    """
    model = _model(model)
    parts, stages = model.parts, []
    for stage, (height, width, channels, rate, blocks) in enumerate(_shapes(model, size), start=1):
        tokens, delegates = height * width, _windows(height, width, rate)
        has_local = rate > 1 and parts.local != "none"
        local = LOCAL_KERNEL**2 * tokens * channels
        if parts.local == "lsa":
            local = _windows(height, width, parts.window) * 2 * parts.window**4 * channels
        queries = tokens if rate > 1 and parts.propagate == "none" else delegates
        spreads = rate > 1 and parts.propagate == "deconv"
        stages.append(
            StageMacs(
                *(stage, blocks, height, width, channels, rate),
                positions=blocks * POSITION_KERNEL**2 * tokens * channels * (2 if has_local else 1),
                local=blocks * local if has_local else 0,
                attention=blocks * 2 * queries * delegates * channels,
                propagation=blocks * delegates * rate**2 * channels if spreads else 0,
            )
        )
    return tuple(stages)


def explain(model: str | Any = "edgevit_xxs", size: tuple[int, int] = (224, 224), kernel: int = 3) -> tuple[Term, ...]:
    """The formula beside the counted operations, summed over all blocks of a network, and why each pair differs. Raises ModelError."""
    model = _model(model)
    paper = [(blocks, spatial_macs(h, w, c, r, kernel)) for h, w, c, r, blocks in _shapes(model, size)]
    local, attention, propagation, full = (
        sum(blocks * getattr(terms, name) for blocks, terms in paper) for name in ("local", "attention", "propagation", "full_attention")
    )
    stages = spatial_macs_counted(model, size)
    counted = {name: sum(getattr(s, name) for s in stages) for name in ("positions", "local", "attention", "propagation", "total")}
    total = local + attention + propagation
    return (
        Term("local aggregation, k^2 h w c", local, counted["local"], _why_local(model, kernel)),
        Term("attention between delegates, 2 (h w / r^2)^2 c", attention, counted["attention"], _why_attention(model)),
        Term("local propagation, r^2 h w c", propagation, counted["propagation"], _why_propagation(model)),
        Term(
            "positional convolutions, not in the formula",
            0,
            counted["positions"],
            "depth-wise 3 x 3, 9 h w c each, one before attention and one before any local aggregation: the formula leaves them out",
        ),
        Term("all spatial operations", total, counted["total"], "the lines above together"),
        Term(
            "self-attention on all tokens, 2 h^2 w^2 c",
            full,
            None,
            f"what the bottleneck stands for: {full / total:.1f} times its formula, {full / counted['total']:.1f} times what is counted",
        ),
    )


def _why_local(model: Any, kernel: int) -> str:
    if model.parts.local == "none":
        return "this network has no local aggregation"
    if model.parts.local == "lsa":
        return f"this network has attention in {model.parts.window} x {model.parts.window} windows instead, 2 T^2 h w c for a side T"
    ratio = LOCAL_KERNEL**2 / kernel**2
    same = f"the code's kernel is 5 x 5, not k = {kernel}: {ratio:.2f} times" if kernel != LOCAL_KERNEL else "the kernel is the code's"
    return f"{same}; stages of rate 1 have no local aggregation, and the formula counts it there too"


def _why_attention(model: Any) -> str:
    two = "the 2 stands for two products, scores and weighted sum, one multiply-add each for every pair and channel"
    if model.parts.propagate == "none":
        return f"{two}; here every token asks, not only delegates: 2 h w (h w / r^2) c"
    return f"equal: {two} (not for two operations in a multiply-add); softmax is counted in neither"


def _why_propagation(model: Any) -> str:
    if model.parts.propagate != "deconv":
        return f"this network propagates by {model.parts.propagate}: nothing that is counted as multiply-adds"
    return (
        "a transposed convolution with stride = kernel = r writes each of h w outputs of c channels once: h w c, r^2 times less"
        " than the formula, which charges a full r x r filter for each output; stages of rate 1 have none"
    )


def _shapes(model: Any, size: tuple[int, int]) -> Iterator[tuple[int, int, int, int, int]]:
    """(height, width, channels, rate, blocks) of each stage; sides in tokens."""
    height, width = size
    if min(size) < 1:
        raise ModelError(f"an image has sides of at least one pixel, not {size[0]} x {size[1]}")
    for patch, channels, rate, blocks in zip((4, 2, 2, 2), model.dims, model.rates, model.depths, strict=True):
        height, width = -(-height // patch), -(-width // patch)
        yield height, width, channels, rate, blocks


def _windows(height: int, width: int, side: int) -> int:
    return -(-height // side) * -(-width // side)


def _model(model: str | Any) -> Any:
    """The EdgeViT itself, or one without memory for a name."""
    from edgejoule.zoo.edgevit import EdgeViT

    if isinstance(model, str):
        import torch

        from edgejoule.zoo.edgevit_ablations import ABLATIONS
        from edgejoule.zoo.edgevit_variants import VARIANTS

        options = {**VARIANTS, **{name: options for name, (options, _) in ABLATIONS.items()}}
        if model not in options:
            raise ModelError(f"no EdgeViT is called {model!r}: choose one of {', '.join(options)}")
        with torch.device("meta"):
            model = EdgeViT(**options[model])
    if not isinstance(model, EdgeViT):
        raise ModelError(f"the formula is for EdgeViT's blocks, not for {type(model).__name__}: give an EdgeViT or its name")
    return model
