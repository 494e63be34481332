"""A second head that only training needs: the first learns the labels, the second the teacher, and in the end they are one again.

Networks with a distillation head of their own (DeiT's token, LeViT, EfficientFormer, RepViT, …: timm's ``set_distilled_training``)
use that. A network with one linear head on its pooled features gets a second beside it, trained as LeViT's (arXiv 2104.01136); the
mean of two linear maps is the linear map of the mean weights, so that it is deployed with the parameters and MACs it had.
Knows no losses and no teacher.
"""

from __future__ import annotations

import torch
from torch import nn

from edgejoule.errors import TrainingError


class TwoHeads(nn.Module):
    """In the place of a linear head: (cls, dist) in training, their mean in eval mode."""

    def __init__(self, cls: nn.Linear, dist: nn.Linear) -> None:
        super().__init__()
        self.cls, self.dist = cls, dist

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, D) -> (B, K), in training twice."""
        cls, dist = self.cls(x), self.dist(x)
        return (cls, dist) if self.training else (cls + dist) / 2

    def folded(self) -> nn.Linear:
        """((W1 + W2) / 2, (b1 + b2) / 2), in the first head's place in memory."""
        with torch.no_grad():
            for mine, other in zip(self.cls.parameters(), self.dist.parameters(), strict=True):
                mine.copy_((mine + other) / 2)
        return self.cls


def has_own(network: nn.Module) -> bool:
    """Whether the network was made with a distillation head."""
    return callable(getattr(network, "set_distilled_training", None))


def add(network: nn.Module, seed: int) -> None:
    """Put a second head beside the network's linear one. The new weights are drawn by ``seed``: a normal of 0.02, cut at 2 sigma.

    Raises TrainingError for a network whose head is not one linear layer at its end.
    """
    name, head = _head_of(network)
    generator = torch.Generator().manual_seed(seed)
    second = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta").to_empty(device="cpu")
    nn.init.trunc_normal_(second.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
    if second.bias is not None:
        nn.init.zeros_(second.bias)
    network.set_submodule(name, TwoHeads(head, second.to(head.weight)))


def fold(network: nn.Module) -> None:
    """Undo ``add``: one linear head again, whose answers are the mean that two heads gave in eval mode. Nothing to undo is fine."""
    for name, part in list(network.named_modules()):
        if isinstance(part, TwoHeads):
            network.set_submodule(name, part.folded())


def _head_of(network: nn.Module) -> tuple[str, nn.Linear]:
    ask = getattr(network, "get_classifier", None)
    classifier = ask() if callable(ask) else None
    if isinstance(classifier, nn.Linear):
        for name, part in network.named_modules():
            if part is classifier and name:
                return name, classifier
    raise TrainingError(
        f"{type(network).__name__} has no single linear head that a second could stand beside: leave heads=2 out, "
        "or choose a student with a distillation head of its own"
    )
