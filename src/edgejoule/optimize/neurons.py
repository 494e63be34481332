"""Where the hidden neurons of feed-forward networks are: one group of units a block, by one table of classes.

A hidden neuron is written by one layer, passes through what works on each channel alone (activations, batch norms, depth-wise
convolutions) and is read by one layer: then it can leave without a trace. Whatever mixes the hidden neurons on their way, such as
squeeze-and-excitation, a LayerNorm over them or global response normalisation, couples them: such a block gives no group.
Also finds the expanded channels of inverted residuals. Knows networks that were fused before. Knows no importance and no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from edgejoule.optimize.groups import Group, blocks_of, layers_within, reads, writes


@dataclass(frozen=True, slots=True)
class Ffn:
    """How a class is built, by the names of its children; a child may be a container of one layer, its norm and its activation.

    ``passes`` is all that may stand between, in whatever state a network has it (an Identity, None).
    """

    gives: tuple[str, ...]
    passes: tuple[str, ...]
    takes: str
    packed: int = 1  # hidden widths that one layer writes side by side: 2 where its second half is the gate of the first


GATED = ("act", "norm")
ADAPTERS: Mapping[str, Ffn] = {
    "timm.layers.mlp.Mlp": Ffn(("fc1",), ("act", "norm"), "fc2"),
    "timm.layers.mlp.ConvMlp": Ffn(("fc1",), ("norm", "act"), "fc2"),
    "timm.layers.mlp.GluMlp": Ffn(("fc1",), GATED, "fc2", packed=2),
    "timm.layers.mlp.SwiGLU": Ffn(("fc1_g", "fc1_x"), GATED, "fc2"),
    "timm.models.levit.LevitMlp": Ffn(("ln1",), ("act",), "ln2"),
    "timm.models.tiny_vit.NormMlp": Ffn(("fc1",), ("act",), "fc2"),
    "timm.models.tiny_vit.MBConv": Ffn(("conv1",), ("act1", "conv2", "act2"), "conv3"),
    "timm.models.efficientvit_msra.ConvMlp": Ffn(("pw1",), ("act",), "pw2"),
    "timm.models.efficientvit_mit.MBConv": Ffn(("inverted_conv",), ("depth_conv",), "point_conv"),
    "timm.models.efficientvit_mit.FusedMBConv": Ffn(("spatial_conv",), (), "point_conv"),
    "timm.models.efficientvit_mit.ConvBlock": Ffn(("conv1",), (), "conv2"),
    "timm.models.pvt_v2.MlpWithDepthwiseConv": Ffn(("fc1",), ("relu", "dwconv", "act"), "fc2"),
    "timm.models.efficientformer_v2.ConvMlpWithNorm": Ffn(("fc1",), ("mid",), "fc2"),
    "timm.models.fastvit.ConvMlp": Ffn(("fc1",), ("act",), "fc2"),  # its depth-wise ``conv`` comes before
    "timm.models.repvit.RepVitMlp": Ffn(("conv1",), ("act",), "conv2"),
    "timm.models.swiftformer.Mlp": Ffn(("fc1",), ("act",), "fc2"),
    "timm.models.swiftformer.ConvEncoder": Ffn(("pwconv1",), ("act",), "pwconv2"),
    "timm.models.swiftformer.LocalRepresentation": Ffn(("pwconv1",), ("act",), "pwconv2"),
    "timm.models.byobnet.BottleneckBlock": Ffn(("conv1_1x1",), ("conv2_kxk", "conv2b_kxk", "attn"), "conv3_1x1"),
    "timm.models._efficientnet_blocks.InvertedResidual": Ffn(("conv_pw",), ("bn1", "conv_dw", "bn2", "aa", "se"), "conv_pwl"),
    "timm.models._efficientnet_blocks.EdgeResidual": Ffn(("conv_exp",), ("bn1", "aa", "se"), "conv_pwl"),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": Ffn(("pw_exp",), ("dw_mid", "se"), "pw_proj"),
}
NO_FFN = frozenset({"timm.layers.pos_embed_rel.RelPosMlp"})  # what is below computes positions, not features


def find_neurons(root: nn.Module) -> tuple[Group, ...]:
    """A group for each feed-forward network below ``root`` or ``root`` itself, in the order of its modules; none where nothing is known.

    Blocks whose hidden neurons are coupled, or whose layers have other shapes than the table expects, are left out.
    """
    return tuple(group for name, part, adapter in _blocks("", root) if (group := _group(name, part, adapter)) is not None)


def _blocks(path: str, part: nn.Module) -> Iterator[tuple[str, nn.Module, Ffn]]:
    """What the table knows, with its name in the network. A module that stands in two places is found in the first."""
    seen: set[nn.Module] = set()
    above = ""  # of what computes no features
    for name, module in part.named_modules(prefix=path):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if above and name.startswith(above):
            continue
        if kind in NO_FFN:
            above = f"{name}."
        elif kind in ADAPTERS and module not in seen:
            seen.add(module)
            yield name, module, ADAPTERS[kind]


def _group(name: str, block: nn.Module, adapter: Ffn) -> Group | None:
    """The group of one block, or None where its hidden neurons are not free."""
    parts = block._modules
    between = [child for child in adapter.passes if parts.get(child) is not None]
    units = _inputs(parts.get(adapter.takes))
    if units is None or any(_outputs(parts.get(child)) != adapter.packed * units for child in adapter.gives):
        return None
    if not all(_alone(block.get_submodule(child), units) for child in between):
        return None
    single = blocks_of(units, 1)  # (U, 1)
    written = torch.cat([single + half * units for half in range(adapter.packed)], dim=1)  # (U, packed)
    given = tuple(cut for child in adapter.gives for cut in writes(block, child, written))
    passed = tuple(cut for child in between for cut in writes(block, child, single))
    readers = reads(block, adapter.takes, single)
    return Group(name, "neurons", units, (*given, *passed, *readers), readers)


def _outputs(part: nn.Module | None) -> int | None:
    """How many channels the one dense layer in a part writes, where nothing else in it mixes them."""
    layer = _dense(part)
    if layer is None or part is None or not all(_harmless(other) for other in part.modules() if other is not layer):
        return None
    return int(layer.weight.shape[0])


def _inputs(part: nn.Module | None) -> int | None:
    layer = _dense(part)
    return None if layer is None else int(layer.weight.shape[1])


def _dense(part: nn.Module | None) -> Any:
    """The one linear layer or ungrouped convolution in a part."""
    if part is None:
        return None
    found = [layer for _, layer in layers_within(part) if isinstance(layer, (nn.Linear, _ConvNd))]
    plain = len(found) == 1 and not isinstance(found[0], _ConvTransposeNd) and getattr(found[0], "groups", 1) == 1
    return found[0] if plain else None


def _alone(part: nn.Module, units: int) -> bool:
    """Whether a part works on each of its channels by itself."""
    return all(_harmless(module) or _depthwise(module, units) for module in part.modules())


def _depthwise(module: nn.Module, units: int) -> bool:
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return False
    return module.groups == module.in_channels == module.out_channels == units


def _harmless(module: nn.Module) -> bool:
    """Whether a module, its children apart, treats all channels alike or each by itself. A tensor of one number is no channel's own."""
    if isinstance(module, _BatchNorm):
        return True
    own: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    is_norm = "norm" in type(module).__name__.lower() and (bool(own) or not module._modules)  # other than a container such as ConvNorm
    return not is_norm and all(value.numel() == 1 for value in own)
