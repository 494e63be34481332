"""In which order the training images are seen: a function of numbers, whatever the processes, accumulation and workers.

Epoch e has a permutation from (seed, e). Step k of it uses positions [k G, (k+1) G) of that order; process p of P takes its P-th part
of them, cut into equal micro-batches. Knows no images and no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edgejoule.errors import TrainingError

Draw = tuple[int, int, int]  # epoch (modulo the period), position in that epoch's order, index of the image


def seed_of(*what: int | str) -> int:
    """A seed in [0, 2^32) for what is named: equal names, equal seed, on every machine; unequal ones have nothing to do with each other."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True, slots=True)
class Order:
    """The order of ``images`` images in global batches of ``batch``, each image ``repeats`` times in a row."""

    images: int
    batch: int  # G: images of one optimiser step, of all processes and micro-batches
    seed: int
    repeats: int = 1
    period: int = 0  # epochs after which it repeats; 0: never

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    def numbered(self, epoch: int) -> int:
        """The epoch's number as samples know it."""
        return epoch % self.period if self.period else epoch

    def indices(self, epoch: int) -> torch.Tensor:
        """(N,) int64: the image at each position. With repeats r, N / r distinct images stand r times in a row."""
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.numbered(epoch)))
        permutation = torch.randperm(self.images, generator=generator)
        return permutation.repeat_interleave(self.repeats)[: self.images] if self.repeats > 1 else permutation


@dataclass(frozen=True, slots=True)
class Share:
    """What one process reads, from one step to another: an iterable of micro-batches, ``accumulate`` of them a step."""

    order: Order
    first: int  # step to begin with
    last: int  # step not to reach any more
    process: int = 0
    processes: int = 1
    accumulate: int = 1

    @property
    def micro_batch(self) -> int:
        return self.order.batch // (self.processes * self.accumulate)

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        order, shown = self.order, -1
        indices: list[int] = []
        for step in range(self.first, self.last):
            epoch, within = divmod(step, order.steps_per_epoch)
            if epoch != shown:
                shown, indices = epoch, order.indices(epoch).tolist()
            for position in self.positions(within):
                yield [(order.numbered(epoch), at, indices[at]) for at in range(position, position + self.micro_batch)]

    def positions(self, within: int) -> range:
        """Where in the epoch's order this process's micro-batches of the epoch's step ``within`` begin."""
        begin = within * self.order.batch + self.process * self.accumulate * self.micro_batch
        return range(begin, begin + self.accumulate * self.micro_batch, self.micro_batch)


def global_batch(images: int, batch: int, processes: int, accumulate: int) -> int:
    """G: the recipe's batch, or the whole set where that is smaller. Raises TrainingError where it cannot be divided equally."""
    if images < 1:
        raise TrainingError("the training split has no images: expected at least one")
    size, parts = min(batch, images), processes * accumulate
    if size < 1 or size % parts:
        whole = " (the whole training split)" if images < batch else ""
        raise TrainingError(
            f"a batch of {size} images{whole} cannot be divided by {processes} processes x {accumulate} accumulation steps:"
            f" choose a batch that is a multiple of {parts}, such as batch={max(size // parts, 1) * parts}, or accumulate less"
        )
    return size
