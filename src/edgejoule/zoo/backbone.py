"""Feature maps, and the leaf ``backbone(name="edgevit_xxs", size=800)``: what detectors and segmenters build on, without their heads.

It is what EdgeViT's Tables 7 and 8 measure: four maps at strides 4 to 32, at the input size of the dense task. Each map is
averaged over its positions, so that every map is computed and the result is small; the averages stand where a classifier's
logits would, and the rest of the pipeline needs to know no more. The heads of dense.py stand on the same ``FeatureMaps``.
Knows no head and no data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgejoule.errors import ModelError, SpecError
from edgejoule.records import ModelSpec
from edgejoule.zoo.timm import TimmModel, preprocessing_of

STRIDES = (4, 8, 16, 32)
SMALLEST, LARGEST = 32, 4096  # pixels a side
# Names of ours for a timm network with options. The segmentation toolbox behind Table 6 takes the ResNet whose stem is three
# 3x3 convolutions (version "1c", He et al., Bag of Tricks, 2019, stem C) where its detection twin keeps the single 7x7 one.
BACKBONES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "resnet18_v1c": ("resnet18", {"stem_type": "deep", "stem_width": 32}),
}


class FeatureMaps(nn.Module):
    """Images (B, 3, H, W) to four maps (B, C_i, H/stride, W/stride) in the order of ``STRIDES``; sides round as the backbone rounds them.

    ``channels`` are the C_i; ``mean`` and ``std`` are what the backbone's images are normalised with. ``body`` is a network made
    with timm's ``features_only=True``, or with maps and ``feature_info`` as those have. Raises ModelError where a stride is missing.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.positions = _positions(body)
        channels: list[int] = body.feature_info.channels()  # type: ignore[union-attr, operator]
        self.channels = tuple(channels[position] for position in self.positions)
        config: Any = getattr(body, "pretrained_cfg", None) or {}
        known = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        preprocessing = preprocessing_of(known or {"input_size": (3, 224, 224)})  # a body of no library: ImageNet's mean and deviation
        self.mean, self.std = preprocessing.mean, preprocessing.std

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.body(images)
        chosen = [maps[position] for position in self.positions]
        if getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            return [one.permute(0, 3, 1, 2).contiguous() for one in chosen]
        return chosen


def feature_maps(backbone: str | nn.Module, **options: Any) -> FeatureMaps:
    """The four maps of a backbone: a name of timm's, of ours or of ``BACKBONES``, or a module that has ``feature_info``.

    ``options`` go to ``timm.create_model`` (``pretrained=True``, ``drop_path_rate=0.1``). Without its classifier and final norm.
    Raises UnknownNameError for a name that nobody knows, ModelError for a network without maps at strides 4, 8, 16 and 32.
    """
    if isinstance(backbone, FeatureMaps):
        return backbone
    if not isinstance(backbone, str):
        return FeatureMaps(backbone)
    name, own = BACKBONES.get(backbone, (backbone, {}))
    settings = {**own, **options}
    with torch.device("meta"):  # which of its maps have these strides is known only once it is built; this costs no memory
        trial = _body(name, **{**settings, "pretrained": False})
    indices: Sequence[int] = trial.feature_info.out_indices  # type: ignore[union-attr, assignment]
    chosen = tuple(indices[position] for position in _positions(trial, backbone))
    return FeatureMaps(_body(name, out_indices=chosen, **settings))


def _body(name: str, **options: Any) -> nn.Module:
    try:
        return TimmModel(name).build(features_only=True, **options)
    except NotImplementedError as error:
        raise ModelError(f"{name} gives no feature maps ({error}): choose a network with four stages, such as edgevit_xxs") from error


def _positions(body: nn.Module, name: str = "") -> tuple[int, ...]:
    """Which of a network's maps have ``STRIDES``; of several at one stride the last, which has seen most."""
    name = name or type(body).__name__
    information = getattr(body, "feature_info", None)
    if not callable(getattr(information, "reduction", None)):
        raise ModelError(f"{name} gives no list of feature maps; expected a network made with features_only=True")
    strides: list[int] = information.reduction()  # type: ignore[union-attr]
    found = {stride: position for position, stride in enumerate(strides)}
    if not set(STRIDES) <= set(found):
        have = ", ".join(map(str, found))
        raise ModelError(f"{name} has feature maps at strides {have}; expected 4, 8, 16 and 32: choose a network with four stages")
    return tuple(found[stride] for stride in STRIDES)


class PooledMaps(nn.Module):
    """(B, C, H, W) -> (B, sum of the maps' channels): each map's average, in the order of the strides."""

    def __init__(self, maps: FeatureMaps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.mean(dim=(2, 3)) for one in self.maps(images)], dim=1)  # each map is (B, C_i, H_i, W_i)

    def get_classifier(self) -> nn.Module:
        """timm's question for the head: there is none, and no layer that happens to be as wide as the result is one."""
        return nn.Identity()


@dataclass(frozen=True, slots=True)
class Backbone:
    """``name`` is a network of timm's, of ours or of ``BACKBONES`` with four maps; ``size`` is the side of the square image in pixels."""

    name: str
    size: int = 512

    def __post_init__(self) -> None:
        if not SMALLEST <= self.size <= LARGEST:
            raise SpecError(f"backbone(size={self.size}) does not fit: expected {SMALLEST} to {LARGEST} pixels")

    def build(self, num_classes: int = 0, **options: Any) -> nn.Module:
        """The maps and their averages. ``num_classes`` is ignored: there is no classifier.

        With ``pretrained=True`` all of it must come out of the file; a classifier there is passed over. Raises UnknownNameError for the
        name, ModelError for a network without such maps and for weights that are not its own.
        """
        state = torch.get_rng_state()
        module = PooledMaps(self._maps(**options))
        if options.get("pretrained"):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                _require_loaded(module, PooledMaps(self._maps()), self.name)
        return module

    def _maps(self, **options: Any) -> FeatureMaps:
        # Networks whose windows or positions depend on the image's size must be told it; the others do not take the option.
        sized = {"img_size": self.size} if self.config().get("fixed_input_size") else {}
        return feature_maps(self.name, **sized, **options)

    def config(self) -> dict[str, Any]:
        """timm's configuration of the whole network: its weights fit the part. Raises UnknownNameError."""
        if self.name not in BACKBONES:
            return TimmModel(self.name).config()
        config = TimmModel(BACKBONES[self.name][0]).config()  # its weights do not fit a network with other options
        return {key: value for key, value in config.items() if key not in ("hf_hub_id", "url", "file")}

    def spec(self) -> ModelSpec:
        """A catalog row without published numbers, preprocessing as timm says but for the size."""
        with torch.device("meta"):
            channels = self._maps().channels
        preprocessing = preprocessing_of(self.config())
        return ModelSpec(
            name=f"{self.name}@{self.size}",
            family="backbone",
            builder=f'backbone(name="{self.name}", size={self.size})',
            preprocessing=replace(preprocessing, input_size=(preprocessing.input_size[0], self.size, self.size), crop_pct=1.0),
            num_classes=sum(channels),
            dataset="unknown",
            licence=str(self.config().get("license") or "unknown"),
        )


def _require_loaded(module: nn.Module, fresh: nn.Module, name: str) -> None:
    """ModelError where a weight still is what the seed drew: timm loads into a part of a network without asking for every tensor."""
    drawn = [
        ours
        for (ours, loaded), random in zip(module.named_parameters(), fresh.parameters(), strict=True)
        if loaded.requires_grad and torch.equal(loaded, random) and not bool((loaded == loaded.flatten()[0]).all())
    ]
    if drawn:
        raise ModelError(
            f"the weights file lacks {len(drawn)} of the tensors of {name}, such as {drawn[0].removeprefix('maps.body.')}: "
            "expected its own, with or without a classifier"
        )
