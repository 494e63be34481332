"""What a training run is made of, how far it is, and how both come back from a checkpoint.

Knows accelerate, the optimiser and the checkpoint's content; not in which order things happen, which is ``loop.py``.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object, set_seed
from torch import nn

from edgejoule import torchvision
from edgejoule.bench import Event, Notify
from edgejoule.errors import TrainingError
from edgejoule.plain import decode, encode
from edgejoule.records import Epoch
from edgejoule.train import checkpoint
from edgejoule.train.journal import STAGE
from edgejoule.train.optimiser import create_optimizer, create_schedule, warmup_steps
from edgejoule.train.order import Order, Share, global_batch, seed_of
from edgejoule.train.reading import BadImages
from edgejoule.train.recipe import Recipe
from edgejoule.train.task import At, Task

torchvision.ensure()
from timm.scheduler.scheduler import Scheduler  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

LONGEST_WAIT = timedelta(days=1)  # of the other processes while the main one evaluates


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how a run is trained. Only ``seed`` and ``mixed_precision`` change what comes out by more than rounding."""

    folder: Path  # checkpoint.pt and tensorboard/ go here; all nodes must see it
    key: str  # identity of the run: a checkpoint with another key is refused
    seed: int
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = 1  # micro-batches per optimiser step and process
    workers: int = 0  # processes that read images, per process
    checkpoint_s: float = 60.0  # at least this often, and at every epoch's end
    max_bad_images: int = 0
    device: Literal["auto", "cpu"] = "auto"


class Objective(nn.Module):
    """The network with its loss as the output: what DDP and autocast wrap, so that a task may use the network as it likes."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self._loss = network, task.loss

    def forward(self, batch: Any, at: At) -> torch.Tensor:
        return self._loss(self.network, batch, at)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a run is made of; nothing here is replaced while it goes on."""

    accelerator: Accelerator
    task: Task
    recipe: Recipe
    settings: Settings
    order: Order
    steps: int  # of the whole run
    network: nn.Module  # what task.begin() gave
    objective: Any  # Objective, wrapped by accelerate
    optimizer: Any  # wrapped by accelerate
    schedule: Scheduler
    average: ModelEmaV3 | None

    @property
    def epochs(self) -> int:
        """The last one may be partial."""
        return math.ceil(self.steps / self.order.steps_per_epoch)

    def epoch_end(self, number: int) -> int:
        """Steps done when epoch ``number`` (from 1) has ended."""
        return min(number * self.order.steps_per_epoch, self.steps)

    def share(self, first: int) -> Share:
        """What this process reads from step ``first`` on."""
        accelerator = self.accelerator
        return Share(self.order, first, self.steps, accelerator.process_index, accelerator.num_processes, self.settings.accumulate)

    @property
    def result(self) -> nn.Module:
        """The network with the weights that the run is judged by."""
        return self.average.module if self.average is not None and self.recipe.evaluate_ema else self.network


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    bad: BadImages
    step: int = 0
    loss_sum: float = 0.0  # of this epoch's steps
    losses: int = 0
    seconds: float = 0.0
    epochs: list[Epoch] = field(default_factory=list)
    pending: list[torch.Tensor] = field(default_factory=list)  # losses not looked at yet, which would wait for the GPU
    overflows: int = 0  # fp16: losses in a row that were no number
    last_loss: float = math.nan
    saved_at: float = field(default_factory=time.monotonic)
    counted_at: float = field(default_factory=time.monotonic)

    def count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds, self.counted_at = self.seconds + now - self.counted_at, now


def create_accelerator(settings: Settings) -> Accelerator:
    """accelerate, asked for exactly what the settings say. Raises TrainingError for what this machine cannot do."""
    if settings.accumulate < 1 or settings.workers < 0 or settings.max_bad_images < 0:
        raise TrainingError(
            f"cannot train with accumulate={settings.accumulate}, workers={settings.workers},"
            f" max_bad_images={settings.max_bad_images}: expected at least 1, 0 and 0"
        )
    # Its states are shared by all Accelerators of a process, and refuse another precision or device than the first one's.
    launched = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not launched)
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            cpu=settings.device == "cpu",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.accumulate, sync_with_dataloader=False),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise TrainingError(f"cannot train with {_asked(settings)} ({error}): expected what this machine can do") from error
    if settings.mixed_precision != "no" and not accelerator.native_amp:  # it would train in float32 without a word
        raise TrainingError(f"{accelerator.device.type} cannot train with {_asked(settings)}: use mixed precision 'no' or 'bf16'")
    return accelerator


def _asked(settings: Settings) -> str:
    return f"mixed precision {settings.mixed_precision!r} on device {settings.device!r}"


def prepare(accelerator: Accelerator, module: nn.Module, task: Task, recipe: Recipe, settings: Settings, notify: Notify) -> Parts:
    """Everything in its place and on its device, with the weights of ``module``, which itself is left alone. Raises TrainingError."""
    images = len(task.training)
    batch = global_batch(images, recipe.batch, accelerator.num_processes, settings.accumulate)
    order = Order(images, batch, settings.seed, recipe.repeats, task.period)
    steps = recipe.steps or round(recipe.epochs * order.steps_per_epoch)
    if steps < 1:
        raise TrainingError(f"recipe {recipe.name} has nothing to do: {recipe.epochs:g} epochs are {steps} steps, expected at least one")
    warm = warmup_steps(recipe, order.steps_per_epoch)
    if warm >= steps and accelerator.is_main_process:
        notify(Event(STAGE, f"the warm-up of {warm} steps is not over when training ends, after {steps}"))

    set_seed(seed_of("begin", settings.seed))
    network = task.begin(copy.deepcopy(module)).to(accelerator.device).train()
    average = ModelEmaV3(network, decay=recipe.ema) if recipe.ema else None
    optimizer = create_optimizer(network, recipe, batch)
    schedule = create_schedule(optimizer, recipe, steps, order.steps_per_epoch)
    objective, prepared = accelerator.prepare(Objective(network, task), optimizer)
    return Parts(accelerator, task, recipe, settings, order, steps, network, objective, prepared, schedule, average)


# ---------------------------------------------------------------- to a checkpoint and back


def keep(parts: Parts, progress: Progress) -> None:
    """Writes a checkpoint; the main process does, without asking the others. Raises OutputError."""
    progress.count_seconds()
    scaler = parts.accelerator.scaler
    if parts.accelerator.is_main_process:
        content = {
            "network": parts.network.state_dict(),
            "average": None if parts.average is None else parts.average.module.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": progress.step,
            "loss_sum": progress.loss_sum,
            "losses": progress.losses,
            "seconds": progress.seconds,
            "epochs": encode(progress.epochs),
            "bad": dict(progress.bad.found),
        }
        checkpoint.save(parts.settings.folder, parts.settings.key, content)
    progress.saved_at = time.monotonic()


def resume(parts: Parts) -> Progress:
    """The progress and the state of the last checkpoint, or of the beginning. Raises TrainingError for one that does not fit."""
    settings, progress = parts.settings, Progress(BadImages(parts.settings.max_bad_images))
    stored = checkpoint.load(settings.folder, settings.key)
    if stored is not None:
        try:
            _restore(parts, progress, stored)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            path, reason = settings.folder / checkpoint.NAME, " ".join(str(error).split())[:200]
            raise TrainingError(f"the checkpoint {path} does not fit this run ({reason}): delete it to begin anew") from error
    if len(set(gather_object([progress.step]))) > 1:
        raise TrainingError(f"not all processes see the same checkpoint in {settings.folder}: expected a folder that all nodes share")
    return progress


def _restore(parts: Parts, progress: Progress, stored: dict[str, Any]) -> None:
    progress.step, progress.loss_sum, progress.losses = stored["step"], stored["loss_sum"], stored["losses"]
    progress.seconds, progress.epochs = stored["seconds"], [decode(Epoch, epoch) for epoch in stored["epochs"]]
    if not 0 <= progress.step <= parts.steps:
        raise ValueError(f"it is at step {progress.step} of {parts.steps}")
    parts.network.load_state_dict(stored["network"])
    if parts.average is not None:
        parts.average.module.load_state_dict(stored["average"])
    parts.optimizer.load_state_dict(stored["optimizer"])
    if parts.accelerator.scaler is not None and stored["scaler"]:
        parts.accelerator.scaler.load_state_dict(stored["scaler"])
    progress.bad.add(stored["bad"])
