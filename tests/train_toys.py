"""Toys to train: a few numbers for images, a network without BatchNorm, a task on them. Tests of the loop need nothing else.

    python -m tests.train_toys FOLDER '{"recipe": {…}, "settings": {…}, "kills": [{"kill_at": 3, "checkpoint_s": 0}]}' [FOLDER ASK …]

trains the toy in one process after another, each but the last one killed by SIGKILL: in the middle of a step (``kill_at``), or in the
middle of writing a checkpoint (``tear_at``). Then it writes ``end.pt`` and ``end.json``. It also is what ``accelerate launch`` starts.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgejoule import torchvision
from edgejoule.errors import BadImageError
from edgejoule.plain import encode

torchvision.ensure()
from timm.layers import DropPath  # noqa: E402

from edgejoule.train.loop import Settings, Trained, train  # noqa: E402
from edgejoule.train.order import seed_of  # noqa: E402
from edgejoule.train.recipe import Recipe  # noqa: E402
from edgejoule.train.task import At  # noqa: E402

CLASSES, WIDTH = 3, 6


class Toy(nn.Module):
    """(B, 6) -> (B, 3), with a residual branch that drop path drops, a norm and a parameter that does not decay."""

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.pos_embed = nn.Parameter(torch.randn(1, WIDTH) * 0.02)
            self.branch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
            self.head = nn.Linear(WIDTH, CLASSES)
        self.drop_path = DropPath(drop_path)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos_embed
        return self.head(x + self.drop_path(self.branch(x)))


@dataclass
class ToySamples:
    """``n`` images of ``WIDTH`` numbers, labelled by a fixed rule; ``noise`` is an augmentation, ``bad`` cannot be decoded."""

    n: int = 24
    noise: float = 0.0
    bad: tuple[int, ...] = ()
    seen: list[tuple[int, int, int]] = field(default_factory=list)  # only where there are no workers

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, which: tuple[int, int, int]) -> tuple[torch.Tensor, int, int]:
        _, _, index = which
        self.seen.append(which)
        if index in self.bad:
            raise BadImageError(f"cannot decode image-{index}.png: expected a picture")
        image = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        label = int(image[:CLASSES].argmax())
        drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed_of("noise", *which)))
        return image + self.noise * drawn, label, index


@dataclass
class ToyTask:
    """Cross-entropy on the toys. ``nan_at`` and ``kill_at`` are steps; ``interrupt_at`` is a step during which Ctrl-C comes."""

    training: ToySamples = field(default_factory=ToySamples)
    period: int = 0
    headline: str = "top1"
    nan_at: int = -1
    kill_at: int = -1
    interrupt_at: int = -1
    loss_scale: float = 1.0

    def collate(self, samples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels, _ = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def begin(self, model: nn.Module) -> nn.Module:
        return model

    def loss(self, model: nn.Module, batch: Any, at: At) -> torch.Tensor:
        assert model.training
        images, labels = batch
        loss = functional.cross_entropy(model(images).float(), labels) * self.loss_scale
        if at.step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if at.step == self.interrupt_at:
            self.interrupt_at = -1
            os.kill(os.getpid(), signal.SIGINT)
        return loss * float("nan") if at.step == self.nan_at else loss

    def scores(self, model: nn.Module, device: torch.device) -> Mapping[str, float]:
        assert not model.training
        images, labels = self.collate([self.training[0, 0, i] for i in range(self.training.n) if i not in self.training.bad])
        logits = model(images.to(device)).cpu()
        return {"top1": float((logits.argmax(1) == labels).float().mean()), "loss": float(functional.cross_entropy(logits, labels))}

    def end(self, model: nn.Module) -> nn.Module:
        return model


def recipe(**options: Any) -> Recipe:
    """Three epochs of six steps."""
    named = {"name": "toy", "kind": "classification", "about": "", "source": "", "expect": "", "cost": ""}
    return Recipe(**{**named, "epochs": 3.0, "batch": 4, "lr": 0.05, **options})


def settings(folder: Path, **options: Any) -> Settings:
    return Settings(**{"folder": folder, "key": "a run", "seed": 1, "device": "cpu", **options})


def train_toy(folder: Path, ask: Mapping[str, Any], kill_at: int = -1, **options: Any) -> Trained:
    task = ToyTask(ToySamples(**ask.get("task", {})), kill_at=kill_at)
    asked = settings(folder, **{**ask.get("settings", {}), **options})
    return train(Toy(ask.get("drop_path", 0.0)), task, recipe(**ask.get("recipe", {})), asked)


def tear(nth: int) -> None:
    """The process dies when it flushes for the n-th time: a file, of which half is there by then, or the folder after the renaming."""
    flushed = []

    def fsync(handle: int) -> None:
        flushed.append(handle)
        if len(flushed) == nth:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync  # the child's own


def main(folder: Path, ask: Mapping[str, Any]) -> None:
    for kill in ask.get("kills", ()):
        child = os.fork()  # before torch has started a thread, and without importing it again
        if not child:
            tear(kill.get("tear_at", 0))
            train_toy(folder, ask, kill.get("kill_at", -1), checkpoint_s=kill["checkpoint_s"])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"not killed: {kill}, status {status}")
    trained = train_toy(folder, ask)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(trained.module.state_dict(), folder / "end.pt")
        ended = {"epochs": encode(trained.epochs), "processes": trained.processes, "bad_images": trained.bad_images}
        (folder / "end.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    for folder, ask in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        main(Path(folder), json.loads(ask))
