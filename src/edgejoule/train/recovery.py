"""A task for networks that passes changed: what is learned stays the task's own, and the network's parts have their say.

Before each forward, submodules with ``begin_step(step, steps)`` are told where training stands; after it, what ``penalty()`` of
submodules gives is added to the loss; layers with an attribute ``sparsity`` keep the zeros of their weights. Knows no pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgejoule.train.task import At, Samples, Task


class Recovery:
    """A ``Task`` around another one."""

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def headline(self) -> str:
        return self._task.headline

    @property
    def training(self) -> Samples:
        return self._task.training

    @property
    def period(self) -> int:
        return self._task.period

    def collate(self, samples: Sequence[Any]) -> Any:
        return self._task.collate(samples)

    def begin(self, model: torch.nn.Module) -> torch.nn.Module:
        begun = self._task.begin(model)
        for part in begun.modules():
            if getattr(part, "sparsity", None):
                keep_zeros(part.get_parameter("weight"))
        return begun

    def loss(self, model: torch.nn.Module, batch: Any, at: At) -> torch.Tensor:
        """() float32: the task's own loss and the penalties."""
        for part in model.modules():
            begin = getattr(part, "begin_step", None)
            if callable(begin):
                begin(at.step, at.steps)
        total = self._task.loss(model, batch, at)
        for part in model.modules():
            penalty = getattr(part, "penalty", None)
            if callable(penalty) and (extra := penalty()) is not None:
                total = total + extra
        return total

    def scores(self, model: torch.nn.Module, device: torch.device) -> Mapping[str, float]:
        return self._task.scores(model, device)

    def end(self, model: torch.nn.Module) -> torch.nn.Module:
        return self._task.end(model)


def keep_zeros(weight: torch.nn.Parameter) -> None:
    """No gradient reaches what is exactly zero now: optimisers that start at zero gradient and decay by a factor leave it there."""
    mask = (weight.detach() != 0).to(weight.dtype)
    weight.register_hook(lambda gradient: gradient * mask.to(gradient.device))  # type: ignore[no-untyped-call]
