"""DynamicViT's prediction module: which patch tokens stay, learned with masks in training and cut off at a static count afterwards.

Source: Rao et al., DynamicViT, NeurIPS 2021, arXiv 2106.02034, sections 3.2 and 3.3. Knows no blocks, no training loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RATIO_WEIGHT = 2.0  # of the ratio loss beside the others, section 4.1
DEVIATION = 0.02  # of the linear layers' first weights


class Predictor(nn.Module):
    """Scores (B, n) of patch tokens (B, n, C): half local features, half their mean over the tokens that are kept (equations 2 to 6).

    In training it draws masks by ``decide`` and asks for a penalty; in eval mode its scores rank the tokens. ``share`` is the share of
    all patch tokens that should stay, ``parts`` how many predictors the network has: the ratio loss is a mean over them.
    """

    _ratio_loss: Tensor | None = None  # from a training forward to ``penalty`` right after it, and no longer

    def __init__(self, dim: int, share: float, parts: int) -> None:
        super().__init__()
        self.share, self.weight = share, RATIO_WEIGHT / parts
        self.norm = nn.LayerNorm(dim)
        self.features = nn.Linear(dim, dim)
        self.local = dim // 2
        narrow = max(1, dim // 4)
        self.hidden1, self.hidden2, self.out = nn.Linear(dim, self.local), nn.Linear(self.local, narrow), nn.Linear(narrow, 2)
        self.activation = nn.GELU()
        for layer in (self.features, self.hidden1, self.hidden2, self.out):
            nn.init.trunc_normal_(layer.weight, std=DEVIATION)
            nn.init.zeros_(layer.bias)

    def forward(self, patches: Tensor, alive: Tensor | None = None) -> Tensor:
        """(B, n) the log of the probability that a token of (B, n, C) stays. ``alive`` (B, n), 0 or 1: None where all do."""
        return self._chances(patches, alive)[..., 0]

    def decide(self, patches: Tensor, alive: Tensor) -> Tensor:
        """(B, n) 0 or 1, differentiable: a draw from torch's global generator (straight-through Gumbel softmax); the dead stay so."""
        drawn = functional.gumbel_softmax(self._chances(patches, alive), hard=True, dim=-1)[..., 0]  # (B, n)
        decided: Tensor = drawn * alive
        self._ratio_loss = (decided.mean(dim=1) - self.share).square().mean()  # equation 14, one of its parts
        return decided

    def penalty(self) -> Tensor | None:
        """() the weighted ratio loss of the training forward before, once; None where there was none."""
        loss, self._ratio_loss = self._ratio_loss, None
        return None if loss is None else self.weight * loss

    def train(self, mode: bool = True) -> Predictor:
        """As every module's; a loss that nobody asked for is forgotten."""
        self._ratio_loss = None
        super().train(mode)
        return self

    def _chances(self, patches: Tensor, alive: Tensor | None) -> Tensor:
        """(B, n, 2) log-probabilities of staying and of going."""
        x = self.activation(self.features(self.norm(patches)))  # (B, n, C)
        local, shared = x[..., : self.local], x[..., self.local :]
        if alive is None:
            mean = shared.mean(dim=1, keepdim=True)  # (B, 1, C - C/2)
        else:
            living = alive.unsqueeze(-1)  # (B, n, 1)
            mean = (shared * living).sum(dim=1, keepdim=True) / living.sum(dim=1, keepdim=True).clamp_min(1.0)
        x = torch.cat([local, mean.expand(-1, x.shape[1], -1)], dim=-1)  # (B, n, C)
        x = self.activation(self.hidden2(self.activation(self.hidden1(x))))  # (B, n, C/4)
        chances: Tensor = self.out(x).log_softmax(dim=-1)
        return chances


class LivingNorm(nn.Module):
    """The layer norm, or none, between the last block and a head that averages the patch tokens: in training, only the living count.

    Dead tokens become 0 and living ones grow by n over their number, so that the plain mean over all n is the mean over the living.
    Stands in for the network's own norm, with its tensors.
    """

    prefix: int
    normalises: bool
    eps: float
    weight: Any
    bias: Any

    def forward(self, tokens: Any) -> Tensor:
        """(B, N, C) tokens, or what the last block gives in training: tokens and which of them live (B, N)."""
        x, alive = (tokens, None) if isinstance(tokens, Tensor) else (tokens.x, tokens.alive)
        if self.normalises:
            x = functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        if alive is None:
            return x
        living = alive[:, self.prefix :]  # (B, n)
        factor = living * (living.shape[1] / living.sum(dim=1, keepdim=True).clamp_min(1.0))
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] * factor.unsqueeze(-1)], dim=1)
