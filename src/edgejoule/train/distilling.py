"""A distillation at work: from a student's outputs and its teacher's to one loss, and the parts that only training needs.

    loss = (1 - alpha) L(labels) + alpha L(teacher) [+ weight L(maps)]      one alpha for each of hard and soft, taken off the labels

With two heads the class head learns the labels and the distillation head the teacher (DeiT, arXiv 2012.12877, 4); with one, it learns
both. Knows the teacher, its cache, the losses and the maps; no optimiser and no data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgejoule.errors import TrainingError
from edgejoule.plain import digest
from edgejoule.records import Preprocessing
from edgejoule.train import heads, losses, transfer
from edgejoule.train.distil import Attention, Features, Pairs, Plan
from edgejoule.train.logit_cache import Answers, LogitCache
from edgejoule.train.task import At, Which
from edgejoule.train.teacher import Teacher

Targets = tuple[torch.Tensor, torch.Tensor]  # the teacher's first answers (B,) int64, its probabilities (B, K) float32 at the temperature


class Distillation:
    """A Distiller (``task.py``)."""

    def __init__(self, plan: Plan, teacher: Teacher, cache: LogitCache | None, seed: int) -> None:
        self._plan, self._teacher, self._cache, self._seed = plan, teacher, cache, seed
        self._num_classes = teacher.num_classes or 0
        self._input_size = teacher.student_size
        self._features = next((part for part in plan.parts if isinstance(part, Features)), None)
        self._attention = next((part for part in plan.parts if isinstance(part, Attention)), None)
        self._pairs: tuple[Pairs, Pairs] = ((), ())  # of features, of attention

    @property
    def period(self) -> int:
        return self._plan.shared.cache_epochs

    def begin(self, model: nn.Module) -> nn.Module:
        """The student with what training adds. Raises TrainingError where it has no place for it, or gives no maps."""
        wanted = self._plan.shared.heads
        if self._plan.answers and wanted != 1:
            if heads.has_own(model):
                model.set_distilled_training(True)  # type: ignore[operator]
            elif wanted == 2:
                heads.add(model, self._seed)
        if self._features is None and self._attention is None:
            return model
        student = transfer.shapes_of(model, self._input_size, "the student")
        teacher = self._teacher.shapes()
        features, attention = (
            transfer.pairs_of(part.layers, student, teacher) if part else () for part in (self._features, self._attention)
        )
        self._pairs = features, attention
        projections = transfer.projections_of(features, student, teacher, self._seed)
        device = next(model.parameters()).device
        return transfer.Tapped(model, [s for s, _ in features], [s for s, _ in attention], projections).to(device)

    def loss(
        self,
        model: nn.Module,
        images: torch.Tensor,
        outputs: Any,
        target_loss: Callable[[torch.Tensor], torch.Tensor],
        which: Which,
        at: At,
    ) -> torch.Tensor:
        """The whole loss of a micro-batch, () float32. Raises TrainingError for a teacher that does not fit, OutputError on a full disk."""
        answer = outputs["logits"] if isinstance(outputs, dict) else outputs
        cls, dist = answer if isinstance(answer, (tuple, list)) else (answer, answer)
        total = self._plan.label_share * target_loss(cls).float()
        if isinstance(outputs, dict):
            logits, transferred = self._transfer_loss(images, outputs)
            targets = self._targets_of(logits)
            total = total + transferred
        else:
            targets = self._answers(images, which, at)
        if self._plan.hard:
            total = total + self._plan.hard.alpha * losses.hard_loss(dist, targets[0])
        if soft := self._plan.soft:
            total = total + soft.alpha * losses.soft_loss(dist, targets[1], soft.temperature, soft.average)
        return total

    def end(self, model: nn.Module) -> nn.Module:
        """The student alone, with the architecture, parameters and MACs that it came with."""
        network = model.network if isinstance(model, transfer.Tapped) else model
        heads.fold(network)
        if heads.has_own(network):
            network.set_distilled_training(False)  # type: ignore[operator]
        if self._cache:
            self._cache.close()
        return network

    def _answers(self, images: torch.Tensor, which: Which, at: At) -> Targets:
        """What the teacher says of these images: from disk where it was asked before."""
        if self._cache is None:
            return self._targets_of(self._teacher.logits(images))
        if at.seed != self._seed:
            raise TrainingError(f"the cache is of seed {self._seed}, and the images are drawn by seed {at.seed}: open it with that seed")
        found = self._cache.read(which, at.position)
        if found is None:
            found = self._cache.write(which, at.position, self._targets_of(self._teacher.logits(images))[1])
        return self._on(found, images.device)

    def _targets_of(self, logits: torch.Tensor) -> Targets:
        return logits.argmax(1), torch.softmax(logits / _temperature(self._plan), dim=1)

    def _on(self, found: Answers, device: torch.device) -> Targets:
        found = Answers(found.probabilities.to(device), found.classes.to(device))
        return found.first(), found.dense(self._num_classes)

    def _transfer_loss(self, images: torch.Tensor, outputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's logits (B, K), and the weighted means over layers of both losses of maps."""
        features, attention = self._pairs
        wanted = sorted({t for _, t in (*features, *attention)})
        logits, maps = self._teacher.logits_and_maps(images, wanted)
        teacher = dict(zip(wanted, maps, strict=True))
        total = torch.zeros((), device=images.device)
        for part, pairs, key, of in (
            (self._features, features, "features", losses.feature_loss),
            (self._attention, attention, "attention", losses.attention_loss),
        ):
            if part:
                found = [of(ours, teacher[t]) for ours, (_, t) in zip(outputs[key], pairs, strict=True)]
                total = total + part.weight * torch.stack(found).mean()
        return logits, total


def open_cache(
    plan: Plan, num_classes: int, seed: int, folder: Path | None, identity: Mapping[str, Any], preprocessing: Preprocessing
) -> LogitCache | None:
    """Where a plan's answers are kept; None where it keeps none. Hard answers alone need one class an image."""
    if folder is None or not plan.shared.cache_epochs:
        return None
    top_k = plan.shared.top_k if plan.soft else 1
    about = {
        "run": dict(identity),
        "seed": seed,
        "teacher": plan.shared.teacher,
        "temperature": _temperature(plan),
        "student": dataclasses.asdict(preprocessing),
    }
    try:
        digest(about)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"the identity of cached answers must be plain values ({error}): give text, numbers, lists") from error
    return LogitCache(folder, about, num_classes, top_k, plan.shared.cache_epochs)


def _temperature(plan: Plan) -> float:
    return float(plan.soft.temperature) if plan.soft else 1.0
