"""The leaf ``timm(name="levit_conv_192.fb_dist_in1k")``: any network of timm, and what timm says of its preprocessing.

Knows timm's names, options and configurations; knows no weights file and no hub (weights.py does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgejoule import torchvision
from edgejoule.errors import ModelError, UnknownNameError
from edgejoule.records import ModelSpec, Preprocessing

torchvision.ensure()
import timm  # noqa: E402
import timm.data  # noqa: E402
import timm.models  # noqa: E402

LONGEST = 600  # characters of another library's message


@dataclass(frozen=True, slots=True)
class TimmModel:
    """One of timm's networks, by its name with or without a weights tag."""

    name: str

    def build(self, num_classes: int = 1000, **options: Any) -> torch.nn.Module:
        """The module with timm's own random initialisation; ``options`` go to ``timm.create_model``.

        Raises UnknownNameError for a name that timm does not have and ModelError where timm cannot build it.
        """
        _require(self.name)
        try:
            module: torch.nn.Module = timm.create_model(self.name, num_classes=num_classes, **options)
        except (RuntimeError, TypeError, ValueError, AssertionError, KeyError, OSError) as error:
            raise ModelError(f"timm cannot build {self.name}: {_said(error)}; expected a name and options that timm takes") from error
        return module

    def config(self) -> dict[str, Any]:
        """timm's pretrained configuration of this name, as a plain dict. Raises UnknownNameError."""
        _require(self.name)
        found = timm.models.get_pretrained_cfg(self.name, allow_unregistered=True)
        if found is None:
            return {}
        return dict(found.to_dict())

    def spec(self) -> ModelSpec:
        """A catalog row without published numbers, preprocessing as timm says; a name without a tag gets timm's default tag."""
        config = self.config()
        tag = "" if "." in self.name else str(config.get("tag") or "")
        name = f"{self.name}.{tag}" if tag else self.name
        return ModelSpec(
            name=name,
            family=name.partition("_")[0],
            builder=f'timm(name="{name}")',
            preprocessing=preprocessing_of(config),
            num_classes=int(config.get("num_classes") or 1000),
            dataset="imagenet-1k" if config.get("num_classes", 1000) == 1000 else "unknown",
            licence=str(config.get("license") or "unknown"),
        )


def preprocessing_of(config: dict[str, Any]) -> Preprocessing:
    """timm's evaluation preprocessing for a pretrained configuration; timm's defaults (ImageNet, 224 px) for what it leaves out."""
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    channels, height, width = (int(side) for side in data["input_size"])
    mean, std = (tuple(float(value) for value in data[key]) for key in ("mean", "std"))
    return Preprocessing(
        input_size=(channels, height, width),
        mean=(mean[0], mean[1 % len(mean)], mean[2 % len(mean)]),
        std=(std[0], std[1 % len(std)], std[2 % len(std)]),
        interpolation=str(data["interpolation"]),
        crop_pct=float(data["crop_pct"]),
        crop_mode=str(data["crop_mode"]),
    )


def known_names() -> tuple[str, ...]:
    """Every architecture of the installed timm."""
    return tuple(timm.list_models())


def _require(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.models.is_model(architecture):
        raise UnknownNameError("timm model", name, known_names(), "timm.list_models() lists them")
    if not tag:
        return
    try:
        timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = list(timm.models.list_pretrained(f"{architecture}.*"))
        raise UnknownNameError("timm model", name, tags, f"timm has {', '.join(tags) or 'no weights tag for it'}") from error


def _said(error: BaseException) -> str:
    """Its message on one line; torch lists the keys that do not fit a network below the first line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
