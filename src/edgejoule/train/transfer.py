"""Intermediate maps of any network, and the parts that let a student's maps be compared with its teacher's. No losses.

A network gives its maps by timm's ``forward_intermediates`` (nearly all of timm, EdgeViT), else by hooks on the modules that its
``feature_info`` names. The maps come out of the same forward pass as the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from edgejoule.errors import TrainingError
from edgejoule.train.distil import Pairs

Shapes = list[tuple[int, int, int]]  # (C, H, W) of each intermediate map, from the image to the logits
SPACED = 4  # maps at most, where nobody says how many


class Tapped(nn.Module):
    """A network that in training gives ``{"logits": …, "features": [projected maps], "attention": [maps]}``, in eval mode its logits.

    ``features`` are the indices of maps (B, C, H, W) that a 1x1 convolution brings to the teacher's width where widths differ
    (FitNets' regressor, arXiv 1412.6550); ``attention`` those that are handed on as they are. All of it runs in one ``forward``, as
    data-parallel training demands.
    """

    def __init__(self, network: nn.Module, features: Sequence[int], attention: Sequence[int], projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.projections = nn.ModuleList(projections)
        self.features, self.attention = tuple(features), tuple(attention)

    def forward(self, images: torch.Tensor) -> Any:
        """(B, C, H, W) -> logits (B, K) in eval mode, else the dictionary above."""
        if not self.training:
            return self.network(images)
        wanted = sorted({*self.features, *self.attention})
        logits, maps = answer_with_maps(self.network, images, wanted)
        found = dict(zip(wanted, maps, strict=True))
        projected = [project(found[index]) for project, index in zip(self.projections, self.features, strict=True)]
        return {"logits": logits, "features": projected, "attention": [found[index] for index in self.attention]}

    def no_weight_decay(self) -> set[str]:
        """The names that the network exempts, as they are spelt from here."""
        ask: Callable[[], Iterable[str]] = getattr(self.network, "no_weight_decay", set)
        return {f"network.{name}" for name in ask()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layer of a parameter, for layer-wise learning rates; the projections count with the head, last."""
        from timm.models._manipulate import group_parameters

        matcher = getattr(self.network, "group_matcher", None)
        if not callable(matcher):
            raise TrainingError("the student does not say which layer a parameter is in: train it with layer_decay=1")
        layers = group_parameters(self.network, matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: (float(layers.get(name.removeprefix("network."), last)),)


def answer_with_maps(network: nn.Module, images: torch.Tensor, indices: Sequence[int] | None) -> tuple[Any, list[torch.Tensor]]:
    """Images (B, C, H, W) -> what the network answers, and its intermediate maps (B, C', H', W') at ``indices`` (None: all), in order.

    Raises TrainingError for a network that gives none.
    """
    intermediates, head = (getattr(network, name, None) for name in ("forward_intermediates", "forward_head"))
    if callable(intermediates) and callable(head):
        final, maps = intermediates(images, indices=None if indices is None else list(indices), output_fmt="NCHW")
        return head(final), list(maps)
    stages = getattr(network, "feature_info", None)
    if not stages or not all(isinstance(stage, dict) and "module" in stage for stage in stages):
        raise TrainingError(
            f"{type(network).__name__} gives no intermediate maps (forward_intermediates, feature_info): leave transfer out"
        )
    chosen = list(stages) if indices is None else [stages[index] for index in indices]
    return _hooked(network, images, chosen)


def shapes_of(network: nn.Module, input_size: tuple[int, int, int], who: str) -> Shapes:
    """(C, H, W) of every intermediate map at an input size (C, H, W), found by running the network once in eval mode.

    Raises TrainingError where it gives none, where they are no maps, or where they come with another answer than the network's own.
    """
    device = next(network.parameters()).device
    was_training = network.training
    images = torch.linspace(-1.0, 1.0, 2 * math.prod(input_size), device=device).view(2, *input_size)
    try:
        with torch.no_grad():
            network.eval()
            answer, maps = answer_with_maps(network, images, None)
            own = network(images)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise TrainingError(f"{who} gives no intermediate maps ({_short(error)}): leave features and attention out") from error
    finally:
        network.train(was_training)
    if not isinstance(answer, torch.Tensor) or answer.shape != own.shape or not torch.allclose(answer, own, rtol=1e-3, atol=1e-5):
        raise TrainingError(f"{who} answers otherwise when its intermediate maps are taken: leave features and attention out")
    if not maps or any(x.dim() != 4 for x in maps):
        raise TrainingError(f"{who} gives no maps (B, C, H, W): leave features and attention out")
    return [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]


def pairs_of(layers: Any, student: Shapes, teacher: Shapes) -> Pairs:
    """Which map of the student is compared with which of the teacher.

    ``layers`` n: of each network the maps at the depths 1/n, 2/n, … 1 of its list; 0: up to four, as both have; or the pairs
    themselves, where a negative index counts from the last. Raises TrainingError for maps that are not there.
    """
    if not isinstance(layers, int):
        return tuple((_index(s, student, "student"), _index(t, teacher, "teacher")) for s, t in layers)
    count = layers or min(SPACED, len(student), len(teacher))
    if count > min(len(student), len(teacher)):
        raise TrainingError(f"{count} layers were asked for, and student and teacher have {len(student)} and {len(teacher)}: ask for fewer")
    return tuple((_spaced(j, count, student), _spaced(j, count, teacher)) for j in range(count))


def projections_of(pairs: Pairs, student: Shapes, teacher: Shapes, seed: int) -> list[nn.Module]:
    """For each pair a 1x1 convolution from the student's width to the teacher's, or nothing where they are equal. Weights by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return [_projection(student[s][0], teacher[t][0], generator) for s, t in pairs]


def _projection(width: int, wanted: int, generator: torch.Generator) -> nn.Module:
    if width == wanted:
        return nn.Identity()
    convolution = nn.Conv2d(width, wanted, 1, device="meta").to_empty(device="cpu")
    bound = 1.0 / math.sqrt(width)  # torch's own for a convolution of one tap
    for parameter in convolution.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return convolution


def _hooked(network: nn.Module, images: torch.Tensor, stages: Sequence[dict[str, Any]]) -> tuple[Any, list[torch.Tensor]]:
    """One forward pass with hooks that are gone after it."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, made: Any) -> None:
            found[name] = made

        return hook

    with ExitStack() as hooks:
        for stage in stages:
            hooks.callback(network.get_submodule(stage["module"]).register_forward_hook(keep(stage["module"])).remove)
        answer = network(images)
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    return answer, [_as_map(found[stage["module"]], int(stage["num_chs"]), prefix) for stage in stages]


def _as_map(x: torch.Tensor, channels: int, prefix: int) -> torch.Tensor:
    """(B, C, H, W), (B, H, W, C) or tokens (B, prefix + H H, C) -> (B, C, H, W)."""
    if x.dim() == 4:
        return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)
    if x.dim() == 3 and math.isqrt(x.shape[1] - prefix) ** 2 == x.shape[1] - prefix:
        side = math.isqrt(x.shape[1] - prefix)
        return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], -1, side, side)
    raise TrainingError(f"an intermediate output of shape {tuple(x.shape)} is no map and no square of tokens: leave transfer out")


def _index(index: int, shapes: Shapes, who: str) -> int:
    if not -len(shapes) <= index < len(shapes):
        raise TrainingError(f"the {who} has {len(shapes)} intermediate maps, and number {index} was asked for: count from 0")
    return index % len(shapes)


def _spaced(position: int, count: int, shapes: Shapes) -> int:
    return -(-(position + 1) * len(shapes) // count) - 1


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
