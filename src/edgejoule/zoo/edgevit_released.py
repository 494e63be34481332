"""Released EdgeViT checkpoints: the names of their tensors, and loading them into ours. Knows no architecture but by its names.

The released names are those of the official repository's state dict: ``patch_embed1.proj.weight``, ``blocks3.0.LocalAgg.conv1.weight``,
``blocks3.0.SelfAttn.attn.LocalProp.weight`` … Every tensor has exactly one partner in ours, of the same shape. The authors published
no weights; whoever trained that code has such files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from edgejoule.errors import ModelError
from edgejoule.zoo.weights import read_state

LOCAL = {"pos_embed": "position.conv", "norm1": "norm1", "conv1": "pw1", "attn": "dw", "conv2": "pw2", "norm2": "norm2", "mlp": "mlp"}
GLOBAL = {
    "pos_embed": "position.conv",
    "norm1": "attn.norm",
    "attn.qkv": "attn.qkv",
    "attn.LocalProp": "attn.propagate.conv",
    "attn.norm": "attn.propagate.norm",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp": "mlp",
}
_BLOCK = re.compile(r"blocks(\d+)\.(\d+)\.(LocalAgg|SelfAttn)\.((?:attn\.)?[^.]+)\.(.+)")
_LOCAL_ATTN = re.compile(r"blocks(\d+)\.(\d+)\.LocalAgg\.attn\.(weight|bias)")
_PATCH = re.compile(r"patch_embed(\d+)\.(.+)")


def our_name(released: str) -> str | None:
    """Our name of a released tensor; None for a name that the released code does not have."""
    if found := _PATCH.fullmatch(released):
        return f"stages.{int(found[1]) - 1}.patch_embed.{found[2]}"
    if found := _LOCAL_ATTN.fullmatch(released):  # the 5x5 convolution is called attn, and has no parts as SelfAttn's attn has
        return f"stages.{int(found[1]) - 1}.blocks.{found[2]}.local.{LOCAL['attn']}.{found[3]}"
    if found := _BLOCK.fullmatch(released):
        names, ours = (LOCAL, "local") if found[3] == "LocalAgg" else (GLOBAL, "sparse")
        part = names.get(found[4])
        return part and f"stages.{int(found[1]) - 1}.blocks.{found[2]}.{ours}.{part}.{found[5]}"
    return released if released.partition(".")[0] in ("norm", "head") else None


def renamed(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A state dict in our names, and the released name of each; names that are not released ones stay as they are."""
    names = {name: our_name(name) or name for name in state}
    return {names[name]: tensor for name, tensor in state.items()}, {ours: name for name, ours in names.items()}


def checkpoint_filter_fn(state: dict[str, torch.Tensor], model: Any = None) -> dict[str, torch.Tensor]:
    """timm's hook for weights files: released names become ours, our own stay. Fit is judged afterwards, by timm."""
    return renamed(state)[0]


def load_released_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Load a checkpoint in the released names (.pth or .pt: a plain state dict, or one under ``model``; or safetensors) into an EdgeViT.

    A training checkpoint's averaged copy (``model_ema``) is passed over: the released evaluation uses ``model``. The file may hold
    tensors and plain Python values only (``weights_only``). The model changes only if every tensor fits.
    Raises ModelError, naming every missing, unexpected or mis-shaped key; or where the file is unreadable, the model no EdgeViT or fused.
    """
    from edgejoule.zoo.edgevit import ConditionalPosition, EdgeViT

    if not isinstance(model, EdgeViT):
        raise ModelError(f"released EdgeViT weights do not belong in a {type(model).__name__}: build edgevit_xxs, edgevit_xs or edgevit_s")
    if any(isinstance(part, ConditionalPosition) and part.fused for part in model.modules()):
        raise ModelError("this EdgeViT is fused already, and released weights are not: load them first, then fuse")
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}: name a .pth, .pt or .safetensors file")
    state, released_names = renamed(read_state(path, use_ema=False))
    wanted = model.state_dict()
    missing = [released_name(name) for name in wanted if name not in state]
    unexpected = [released_names[name] for name in state if name not in wanted]
    misshaped = [
        f"{released_names[name]} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if missing or unexpected or misshaped:
        found = "; ".join(
            _listed(*pair) for pair in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)) if pair[1]
        )
        raise ModelError(
            f"{path.name} does not fit this EdgeViT ({found}): expected the {len(wanted)} tensors of the same variant and number of classes"
            " (load into a 1000-class model, then reset_classifier)"
        )
    model.load_state_dict(state)


def released_name(ours: str) -> str:
    """The released name of one of our tensors; our own name where the released code has no such tensor (ablations)."""
    found = re.fullmatch(r"stages\.(\d+)\.(?:patch_embed\.(.+)|blocks\.(\d+)\.(local|sparse)\.(.+))", ours)
    if found is None:
        return ours
    stage = int(found[1]) + 1
    if found[2]:
        return f"patch_embed{stage}.{found[2]}"
    names, group = (LOCAL, "LocalAgg") if found[4] == "local" else (GLOBAL, "SelfAttn")
    for released, part in names.items():
        if found[5].startswith(f"{part}."):
            return f"blocks{stage}.{found[3]}.{group}.{released}{found[5].removeprefix(part)}"
    return ours


def _listed(what: str, keys: Iterable[str]) -> str:
    return f"{what}: {', '.join(keys)}"
