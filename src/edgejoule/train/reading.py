"""Reads training samples in worker processes, passes over images that cannot be decoded, and counts them.

Knows the order's triples and the task's samples and collate; no network. What went wrong travels beside the batch as plain
values, because an exception that crosses a process comes out with a traceback for a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

from edgejoule.errors import BadImageError, DataError, EdgejouleError, TrainingError
from edgejoule.train.order import Draw, Share
from edgejoule.train.task import Samples, Task


@dataclass(frozen=True, slots=True)
class Read:
    """One sample (or one collated batch), the bad images met on the way {index: what was wrong}, and what stopped it, if anything."""

    content: Any
    bad: dict[int, str]
    failure: str = ""

    def pin_memory(self) -> Read:
        """The loader pins tensors and containers by itself, and anything else by this method."""
        return Read(pin_memory(self.content), self.bad, self.failure)  # type: ignore[no-untyped-call]


class Readable(Dataset[Read]):
    """The task's samples, with the next image (index + 1 modulo N) in the place of one that cannot be decoded."""

    def __init__(self, samples: Samples, most_bad: int) -> None:
        self.samples, self.most_bad = samples, most_bad

    def __getitem__(self, which: Draw) -> Read:
        epoch, position, index = which
        bad: dict[int, str] = {}
        while len(bad) <= self.most_bad and len(bad) < len(self.samples):
            try:
                return Read(self.samples[epoch, position, index], bad)
            except BadImageError as error:
                bad[index] = str(error)
                index = (index + 1) % len(self.samples)
            except EdgejouleError as error:
                return Read(None, bad, str(error))
        return Read(None, bad)


@dataclass(frozen=True, slots=True)
class Collated:
    """The task's collate, carrying on what happened to the samples. Picklable, for workers."""

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, read: Sequence[Read]) -> Read:
        bad = {index: said for one in read for index, said in one.bad.items()}
        failure = next((one.failure for one in read if one.failure), "")
        complete = not failure and all(one.content is not None for one in read)
        return Read(self.collate([one.content for one in read]) if complete else None, bad, failure)


@dataclass(slots=True)
class BadImages:
    """The distinct images that could not be decoded {index: what was wrong}, and how many are allowed."""

    most: int
    found: dict[int, str] = field(default_factory=dict)

    def add(self, bad: dict[int, str]) -> None:
        """Raises BadImageError, naming the file and the option, as soon as there are more than allowed."""
        for index, said in bad.items():
            self.found.setdefault(index, said)
        if len(self.found) > self.most:
            said = list(self.found.values())[self.most]
            allowed = f"{self.most} such image{'s are' if self.most != 1 else ' is'} allowed"
            raise BadImageError(f"{said} ({allowed}: mend the file, or raise max_bad_images, --max-bad-images)")

    def gather(self, accelerator: Accelerator) -> None:
        """Every process learns what all have found; all of them must call this at the same step."""
        if accelerator.num_processes > 1:
            for bad in gather_object([dict(self.found)]):
                self.add(bad)


def batches(task: Task, share: Share, bad: BadImages, workers: int, device: torch.device) -> Iterator[Any]:
    """The collated micro-batches of a share, on the CPU. Raises BadImageError, DataError and TrainingError (a worker died)."""
    loader = DataLoader(
        Readable(task.training, bad.most),
        batch_sampler=share,  # any iterable of lists serves
        num_workers=workers,
        collate_fn=Collated(task.collate),
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the loader draws a number from the global generator
    )
    reader = iter(loader)
    while True:
        try:
            read: Read = next(reader)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            if "Too many open files" in str(error) or "ancdata" in str(error):
                raise TrainingError(
                    f"too many files are open with {workers} workers that read images: raise the limit (ulimit -n 8192), or use fewer"
                ) from error
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(f"a process that reads images died ({error}): free some memory, or use fewer workers") from error
        bad.add(read.bad)
        if read.content is None:
            raise DataError(read.failure or "none of the training images can be decoded: expected at least one")
        yield read.content
