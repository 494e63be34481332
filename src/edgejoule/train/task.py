"""The seam between the loop and what is learned. A task turns a batch into a loss and judges a network; it knows no optimiser.

Every random draw of a task is a function of the numbers it is handed (seed, epoch, position, step), never of what was drawn before:
so a run that was killed and one that was not see the same images, whatever the number of worker processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class At:
    """Where training stands when a loss is computed. ``draws`` seeds whatever the loss draws, and says all that it may depend on."""

    seed: int
    epoch: int  # from 0, modulo the task's period where it has one
    position: int  # of the micro-batch's first image in the epoch's order, over all processes
    step: int  # optimiser steps done since the beginning
    steps: int  # optimiser steps in all

    @property
    def draws(self) -> tuple[int, int, int]:
        return self.seed, self.epoch, self.position


@dataclass(frozen=True, slots=True)
class Which:
    """The images of a micro-batch, and the numbers that their draws were made from."""

    index: torch.Tensor  # (B,) int64, of the image in the training split
    epoch: torch.Tensor  # (B,) int64, from 0, modulo the task's period where it has one
    position: torch.Tensor  # (B,) int64, in that epoch's order, over all processes


class Samples(Protocol):
    """The training split, as the loop's DataLoader sees it. Picklable, for workers."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: tuple[int, int, int]) -> Any: ...

    # (epoch from 0 modulo the period, position in that epoch's order, index of the image) -> one sample; raises BadImageError


class Task(Protocol):
    """What is learned."""

    @property
    def headline(self) -> str: ...  # the score that an epoch is judged by, higher is better: "top1", "map", "miou"
    @property
    def training(self) -> Samples: ...
    @property
    def period(self) -> int: ...  # epochs after which the order and every draw repeat; 0: never
    def collate(self, samples: Sequence[Any]) -> Any: ...  # a batch: tensors in any nesting of tuples, lists and dicts
    def begin(self, model: torch.nn.Module) -> torch.nn.Module: ...
    # The module that is optimised: the network itself, or the network with parts that only training needs (a second head, projections).
    def loss(self, model: torch.nn.Module, batch: Any, at: At) -> torch.Tensor: ...  # () float32; model is in training mode
    def scores(self, model: torch.nn.Module, device: torch.device) -> Mapping[str, float]: ...
    # on the validation split, fractions; model is what begin() gave, in eval mode, here with the averaged weights where the recipe says so
    def end(self, model: torch.nn.Module) -> torch.nn.Module: ...  # what begin() added, taken off or folded in: as it is deployed


class Distiller(Protocol):
    """What a classification task learns from beside its labels: a teacher."""

    @property
    def period(self) -> int: ...  # epochs after which order and draws repeat, for answers that are kept; 0: never
    def begin(self, model: torch.nn.Module) -> torch.nn.Module: ...  # as Task.begin
    def loss(
        self,
        model: torch.nn.Module,
        images: torch.Tensor,
        outputs: Any,
        target_loss: Callable[[torch.Tensor], torch.Tensor],
        which: Which,
        at: At,
    ) -> torch.Tensor: ...
    # images (B, C, H, W) as model saw them, outputs as it gave them (its training mode may give more than logits),
    # target_loss from logits (B, K) to the labels' own loss; () float32
    def end(self, model: torch.nn.Module) -> torch.nn.Module: ...  # as Task.end
