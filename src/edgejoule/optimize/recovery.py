"""What passes that learn have in common: how long, how fast, and the call of ``context.fit``. Knows no loop and no data."""

from __future__ import annotations

from torch import nn

from edgejoule.errors import SpecError
from edgejoule.optimize.copies import copied
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext

MOST_EPOCHS = 100_000.0


def check_length(name: str, epochs: float, lr: float) -> None:
    """Raises SpecError for a length or a rate that makes no sense."""
    if not 0.0 <= epochs <= MOST_EPOCHS:
        raise SpecError(f"{name}: epochs={epochs!r} does not fit, expected a number from 0 to {MOST_EPOCHS:g}")
    if not 0.0 < lr <= 1000.0:
        raise SpecError(f"{name}: lr={lr!r} does not fit, expected a factor above 0 of the training recipe's rate")


def recovered(name: str, module: nn.Module, spec: ModelSpec, context: PassContext, epochs: float, lr: float, distill: str) -> nn.Module:
    """A copy, trained for so many epochs (none: as it was), in eval mode. Raises SpecError where there is nothing to train on."""
    if epochs == 0:
        return copied(module)
    if context.fit is None:
        raise SpecError(f"{name} needs training data: name it with --data, or in a study's table [train]")
    trained: nn.Module = context.fit(copied(module), spec, epochs=epochs, lr=lr, distill=distill)
    return trained
