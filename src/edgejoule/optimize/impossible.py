"""Which pass cannot work on which family, and why: the one table. A pass asks ``refuse`` first; the contract tests read the same table.

A family is a network's architecture, by the module of its class (``family_of``). Knows no pass's working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgejoule.errors import ModelError

BYOB = {"MobileVitBlock": "mobilevit", "MobileVitV2Block": "mobilevitv2"}  # both are timm's ByobNet

# what keeps every token of a family in its place: the reasons of both merge_tokens and prune_tokens
NEEDS_ALL_TOKENS = {
    "swin_transformer": "its windows, their shifts and the joining of 2x2 tokens between stages need every token in its place of a grid",
    "tiny_vit": "its windows, and a depth-wise convolution in every attention block, need every token in its place of a grid",
    "efficientvit_msra": "its windows, and depth-wise convolutions before attention and MLP, need every token in its place of a grid",
    "levit": "between stages every second row and column of tokens asks, and biases belong to pairs of places: it needs the whole grid",
    "mobilevit": "its tokens are pixels of a map that go back to their places for the convolutions between its blocks",
    "mobilevitv2": "its tokens are pixels of a map that go back to their places for the convolutions between its blocks",
    "efficientvit_mit": "convolutions over the map work on its queries, keys and values before they meet: they need the whole grid",
    "pvt_v2": "a depth-wise convolution in every MLP, and strided ones that make the keys, need every token in its place of a grid",
    "pvt_v1": "strided convolutions over the grid of tokens make its keys, and another joins them between stages",
    "edgenext": "its attention is between channels, and convolutions need every token in its place of a grid",
    "fastvit": "convolutions mix and embed its tokens in every block, and need every one in its place of a grid",
    "efficientformer_v2": "depth-wise convolutions on its attention's values need every token in its place of a grid",
    "edgevit": "depth-wise convolutions gather and spread what one token for each window learns: they need the whole grid",
    "uniformer": "a depth-wise convolution in every block gives positions, and needs every token in its place of a grid",
    "twins": "its windows, strided convolutions for keys and convolutions for positions need every token in its place of a grid",
    "tnt": "in every block each patch token is added to by the pixels of its own patch, which a merged or dropped one does not have",
    "efficientnet": "it has no tokens: it is made of convolutions",
}

# pass -> family -> why; ``REST`` is every family that the pass does not name in its own table of adapters
REST = "*"
IMPOSSIBLE: Mapping[str, Mapping[str, str]] = {
    "prune_heads": {
        "swiftformer": "its attention has one head, and normalises that head's channels together",
        "metaformer": "it mixes tokens by pooling and convolutions: it has no attention",
        "efficientnet": "it has no attention: it is made of convolutions",
        "repvit": "it has no attention: it is made of convolutions",
        "resnet": "it has no attention: it is made of convolutions",
    },
    "prune_ffn": {},
    "prune_weights": {},
    "resize": {},
    "window_attention": {
        "swin_transformer": "its attention stays within shifted windows already",
        "tiny_vit": "its attention stays within windows already",
        "efficientvit_msra": "its attention stays within windows already",
        "levit": "each of its stages attends over another map (14, 7 and 4 to a side at 224 pixels), which no one window divides, and "
        "between stages its queries lie on a coarser grid than its keys",
        "mobilevit": "its attention joins the pixels at one place of all 2x2 patches, not the tokens of one grid",
        "mobilevitv2": "its attention is linear in the number of tokens: no product of all tokens with all is there to be cut",
        "efficientvit_mit": "its attention is linear in the number of tokens: no product of all tokens with all is there to be cut",
        "pvt_v2": "in all stages but the last its keys lie on a coarser grid than its queries: a window of queries has no window of keys",
        "edgenext": "its attention is between channels, not between tokens",
        "fastvit": "it mixes tokens by convolutions, and attends only over maps of 1/32 of the image's side or less",
        "efficientformer_v2": "its blocks attend over 7x7 tokens at 224 pixels, as few as a window has",
        "edgevit": "its attention is sparse already: one token for each window attends, and spreads what it learns",
    },
    "merge_tokens": {**NEEDS_ALL_TOKENS, "eva": "its keys are turned by their place (rotary positions), and merged tokens have several"},
    "prune_tokens": {**NEEDS_ALL_TOKENS, "eva": "its keys are turned by their place (rotary positions), and images keep different ones"},
    "qat": {},
}


def family_of(module: Any) -> str:
    """The architecture of a network: vision_transformer, deit, swin_transformer, levit, mobilevit, edgevit, …"""
    name = type(module).__module__.rpartition(".")[2]
    if name == "byobnet":
        return next((BYOB[type(part).__name__] for part in module.modules() if type(part).__name__ in BYOB), name)
    return name


def reason(name: str, module: Any) -> str | None:
    """Why a pass cannot work on a network; None where nothing speaks against it."""
    table = IMPOSSIBLE.get(name, {})
    return table.get(family_of(module), table.get(REST))


def refuse(name: str, module: Any, model: str) -> None:
    """Raises ModelError with the reason where the pass ``name`` cannot work on the network that is called ``model``."""
    if (why := reason(name, module)) is not None:
        raise ModelError(f"{name} cannot work on {model}: {why}; leave it out of the recipe")
