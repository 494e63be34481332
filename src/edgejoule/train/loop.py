"""The training loop: from a network, a task and a recipe to trained weights, on one core or many GPUs, by Hugging Face accelerate.

Read ``train`` top to bottom. Whatever is random is a function of (seed, epoch, position), so a run that was killed goes on as if it had
not been, and neither processes nor workers nor accumulation change the images of a step. Knows no data set, no loss and no store.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, send_to_device, set_seed
from torch import nn

from edgejoule import torchvision
from edgejoule.bench import Notify
from edgejoule.errors import EdgejouleError, TrainingError
from edgejoule.records import Epoch
from edgejoule.train.interrupt import Interrupt
from edgejoule.train.journal import Journal, open_journal, silent_journal
from edgejoule.train.optimiser import current_lr
from edgejoule.train.order import seed_of
from edgejoule.train.reading import batches
from edgejoule.train.recipe import Recipe
from edgejoule.train.run import Parts, Progress, Settings, create_accelerator, keep, prepare, resume
from edgejoule.train.task import At, Task

torchvision.ensure()
from timm.utils.clip_grad import dispatch_clip_grad  # noqa: E402

__all__ = ["Settings", "Trained", "train"]

GATHER_STEPS = 100  # between two countings of bad images over all processes
OVERFLOWS = 25  # fp16: losses in a row that may be no number; the scaler starts at 2^16 and halves with each
VERSIONS = ("torch", "timm", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run ended with."""

    module: nn.Module  # as deployed: float32, on the CPU, in eval mode; the averaged weights where the recipe says so
    epochs: tuple[Epoch, ...]  # those before a resume too
    steps: int
    seconds: float  # spent training and evaluating, over all sittings
    processes: int
    mixed_precision: str
    bad_images: int  # distinct ones
    versions: Mapping[str, str]


def train(
    module: nn.Module,
    task: Task,
    recipe: Recipe,
    settings: Settings,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    notify: Notify = lambda event: None,
) -> Trained:
    """Trains a copy of ``module``; goes on where the checkpoint in ``settings.folder`` ends, if there is one.

    ``on_epoch`` is called in the main process when an epoch has ended, and again for the same epoch if the run was killed right after.
    Raises TrainingError, BadImageError, DataError, OutputError; KeyboardInterrupt after writing a checkpoint.
    """
    accelerator = create_accelerator(settings)
    with undisturbed_randomness(accelerator.device):
        parts = prepare(accelerator, module, task, recipe, settings, notify)
        progress = resume(parts)
        with journal_of(parts, progress, notify) as journal, Interrupt() as interrupt:
            try:
                micro_batches = batches(task, parts.share(progress.step), progress.bad, settings.workers, accelerator.device)
                while len(progress.epochs) < parts.epochs:
                    if progress.step < parts.epoch_end(len(progress.epochs) + 1):
                        update(parts, progress, micro_batches, interrupt)
                        report(parts, progress, journal)
                    else:
                        close_epoch(parts, progress, journal, interrupt, on_epoch)
                    if time.monotonic() - progress.saved_at >= settings.checkpoint_s:
                        save(parts, progress)
            except KeyboardInterrupt:
                save(parts, progress)
                raise
        return finish(parts, progress)


# ---------------------------------------------------------------- one step


def update(parts: Parts, progress: Progress, micro_batches: Iterator[Any], interrupt: Interrupt) -> None:
    """One optimiser step over all processes and micro-batches."""
    accelerator, order, share = parts.accelerator, parts.order, parts.share(progress.step)
    epoch, within = divmod(progress.step, order.steps_per_epoch)
    with interrupt.allowed():
        loaded = [next(micro_batches) for _ in share.positions(within)]
    with failures_explained(share.micro_batch):
        parts.schedule.step_update(progress.step)
        total = torch.zeros((), device=accelerator.device)
        for position, batch in zip(share.positions(within), loaded, strict=True):
            at = At(parts.settings.seed, order.numbered(epoch), position, progress.step, parts.steps)
            seed_draws(seed_of("draws", *at.draws), accelerator.device)
            with accelerator.accumulate(parts.objective):
                loss = parts.objective(send_to_device(batch, accelerator.device, non_blocking=True), at)
                accelerator.backward(loss)
                total += loss.detach().float() / parts.settings.accumulate
        clip(parts)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        if parts.average is not None:
            parts.average.update(parts.network)
    progress.pending.append(accelerator.reduce(total, reduction="mean"))
    progress.step += 1
    if progress.step % GATHER_STEPS == 0:
        progress.bad.gather(accelerator)


def seed_draws(seed: int, device: torch.device) -> None:
    """Drop path and dropout become a function of numbers, too."""
    if device.type != "cpu":
        set_seed(seed)
        return
    # As set_seed does, but for the stack trace that torch keeps whenever it seeds a GPU that is not in use: a millisecond a step.
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def clip(parts: Parts) -> None:
    """By the norm of all gradients, or each unit's gradient by its weights' norm (AGC, Brock et al. 2021, arXiv 2102.06171)."""
    if parts.recipe.clip_norm:
        parts.accelerator.unscale_gradients(parts.optimizer)
        dispatch_clip_grad(parts.network.parameters(), parts.recipe.clip_norm, mode=parts.recipe.clip)


def settle(parts: Parts, progress: Progress) -> None:
    """Looks at the losses since the last look. Raises TrainingError for one that is no number."""
    losses = torch.stack(progress.pending).tolist() if progress.pending else []
    first, progress.pending = progress.step - len(losses), []
    for step, loss in enumerate(losses, first + 1):
        if math.isfinite(loss):
            progress.loss_sum, progress.losses = progress.loss_sum + loss, progress.losses + 1
            progress.last_loss, progress.overflows = loss, 0
            continue
        progress.overflows += 1
        # With fp16 the gradients of such a loss are no numbers either, and the scaler has skipped the step.
        if parts.settings.mixed_precision != "fp16" or progress.overflows > OVERFLOWS:
            raise TrainingError(
                f"the loss of step {step} of {parts.steps} is {loss}, expected a number: lower the learning rate (lr={parts.recipe.lr:g}),"
                f" warm up longer, clip gradients, or change the mixed precision ({parts.settings.mixed_precision!r})"
            )


def report(parts: Parts, progress: Progress, journal: Journal) -> None:
    if journal.due(progress.step):
        settle(parts, progress)
        epochs = progress.step / parts.order.steps_per_epoch
        journal.step(progress.step, epochs, progress.last_loss, current_lr(parts.optimizer))


def save(parts: Parts, progress: Progress) -> None:
    """A checkpoint holds no loss that nobody has looked at. Raises TrainingError and OutputError."""
    settle(parts, progress)
    keep(parts, progress)


# ---------------------------------------------------------------- an epoch's end


def close_epoch(parts: Parts, progress: Progress, journal: Journal, interrupt: Interrupt, on_epoch: Callable[[Epoch], None]) -> None:
    """Counts, judges, tells, and writes a checkpoint."""
    settle(parts, progress)
    began, accelerator, number = time.monotonic(), parts.accelerator, len(progress.epochs) + 1
    progress.bad.gather(accelerator)
    with interrupt.allowed():
        scores = evaluate(parts)
    progress.count_seconds()
    epoch = Epoch(
        number=number,
        step=progress.step,
        loss=progress.loss_sum / progress.losses if progress.losses else math.nan,
        lr=current_lr(parts.optimizer),
        seconds=progress.seconds - sum(earlier.seconds for earlier in progress.epochs),
        images=(progress.step - parts.epoch_end(number - 1)) * parts.order.batch,
        scores=scores,
        bad_images=len(progress.bad.found),
    )
    if accelerator.is_main_process:
        journal.epoch(epoch)
        on_epoch(epoch)
    progress.epochs.append(epoch)
    progress.loss_sum, progress.losses = 0.0, 0
    save(parts, progress)
    journal.paused(time.monotonic() - began)


def evaluate(parts: Parts) -> dict[str, float]:
    """The main process judges the network, the others wait for what it says; where it fails they must not wait for ever."""
    said: list[dict[str, float] | EdgejouleError] = [{}]
    if parts.accelerator.is_main_process:
        try:
            with torch.no_grad():
                scores = parts.task.scores(parts.result.eval(), parts.accelerator.device)
            said = [{name: float(value) for name, value in scores.items()}]
        except EdgejouleError as error:
            said = [error]
        parts.network.train()
    broadcast_object_list(said)
    if isinstance(said[0], EdgejouleError):
        raise said[0]
    return said[0]


def finish(parts: Parts, progress: Progress) -> Trained:
    """The network as it is deployed, and how it came about."""
    return Trained(
        module=parts.task.end(parts.result).to("cpu").float().eval(),
        epochs=tuple(progress.epochs),
        steps=progress.step,
        seconds=progress.seconds,
        processes=parts.accelerator.num_processes,
        mixed_precision=parts.settings.mixed_precision,
        bad_images=len(progress.bad.found),
        versions={name: importlib.metadata.version(name) for name in VERSIONS},
    )


# ---------------------------------------------------------------- around it


def journal_of(parts: Parts, progress: Progress, notify: Notify) -> contextlib.AbstractContextManager[Journal]:
    if parts.accelerator.is_main_process:
        return open_journal(parts.settings.folder, notify, parts.steps, parts.order.batch, progress.step)
    return silent_journal(parts.steps, parts.order.batch, progress.step)


@contextlib.contextmanager
def undisturbed_randomness(device: torch.device) -> Iterator[None]:
    """What the caller would have drawn next from Python, numpy and torch (the CPU's and this device's generator), it draws still."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def failures_explained(images: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if not isinstance(error, torch.OutOfMemoryError):
            said = " ".join(str(error).split())[:300]
            raise TrainingError(
                f"the network failed on a batch of {images} images ({type(error).__name__}: {said}): "
                "batch norms need two images or more at once; other failures are the network's own"
            ) from error
        raise TrainingError(
            f"the device has no memory for {images} images at once: raise accumulate (--accumulate), or use mixed precision"
        ) from error
