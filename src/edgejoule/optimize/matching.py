"""Bipartite soft matching: which tokens are alike enough to become one, and what becomes of them. Pure maths on tensors.

Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461, section 3. Every shape is static, so that all
exporters take it: sums over merged tokens are products with a small one-hot matrix, not scatters with duplicates. Knows no network.

The patch tokens alternate between the sets A and B (the first in A). The prefix tokens (class, distillation, registers) are in
neither and lead every result; behind them come the tokens of A that stay, in their order, then all of B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Match(NamedTuple):
    """What goes where. Places count from 0 in A or in B, as named. |A| is ceil(patches / 2), |B| is floor(patches / 2)."""

    source: Tensor  # (B, r) int64: the tokens of A that leave
    target: Tensor  # (B, r) int64: the tokens of B that they go into
    rest: Tensor  # (B, |A| - r) int64, ascending: the tokens of A that stay
    prefix: int


def merges(tokens: int, prefix: int, r: int) -> int:
    """How many of r merges can be made with so many tokens, prefix included: at most half of the patch tokens go (section 3)."""
    return min(r, (tokens - prefix) // 2)


def match(keys: Tensor, r: int, prefix: int) -> Match:
    """The r most similar pairs, one for each token of A at most. ``keys`` (B, N, D), ``r`` as ``merges`` allows, at least 1.

    Similarity is the keys' cosine. Of equal ones the runtime's order decides: exact copies may pair otherwise elsewhere.
    """
    unit = keys / keys.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12)  # (B, N, D)
    patches = unit[:, prefix:]
    similarity = patches[:, 0::2] @ patches[:, 1::2].transpose(1, 2)  # (B, |A|, |B|)
    best, partner = similarity.max(dim=-1)  # (B, |A|) each
    order = best.topk(best.shape[1], dim=-1).indices  # (B, |A|): one sort, so that no token is in both parts
    source = order[:, :r]
    rest = order[:, r:].sort(dim=-1).values  # the order of the image: the next block's neighbours fall into different sets
    return Match(source, partner.gather(1, source), rest, prefix)


def summed(values: Tensor, pairs: Match) -> Tensor:
    """(B, N, D) to (B, N - r, D): the merged tokens' values are added up."""
    prefix = pairs.prefix
    patches = values[:, prefix:]
    ours, theirs = patches[:, 0::2], patches[:, 1::2]  # (B, |A|, D), (B, |B|, D)
    going = one_hot(pairs.target, theirs.shape[1]).to(values.dtype)  # (B, |B|, r)
    return torch.cat([values[:, :prefix], taken(ours, pairs.rest), theirs + going @ taken(ours, pairs.source)], dim=1)


def averaged(values: Tensor, sizes: Tensor, pairs: Match) -> tuple[Tensor, Tensor]:
    """The merged tokens (B, N - r, D), means weighted by size, and their sizes (B, N - r), from (B, N, D) and (B, N)."""
    weights = sizes.unsqueeze(-1)  # (B, N, 1)
    total = summed(torch.cat([values * weights, weights], dim=-1), pairs)  # (B, N - r, D + 1)
    return total[..., :-1] / total[..., -1:], total[..., -1]


def destinations(tokens: int, pairs: Match) -> Tensor:
    """(B, N) int64: the place, among the N - r tokens after merging, of each of the N = ``tokens`` before."""
    prefix, device = pairs.prefix, pairs.rest.device
    stay, leave = pairs.rest.shape[1], pairs.source.shape[1]
    ours, batch = stay + leave, pairs.rest.shape[0]
    among = one_hot(torch.cat([pairs.rest, pairs.source], dim=1), ours).to(pairs.rest.dtype)  # (B, |A|, |A|)
    first = torch.arange(stay, device=device).expand(batch, -1)  # (B, |A| - r)
    new = (among @ torch.cat([first, stay + pairs.target], dim=1).unsqueeze(-1)).squeeze(-1)  # (B, |A|)
    theirs = torch.arange(stay, stay + tokens - prefix - ours, device=device).expand(batch, -1)  # (B, |B|)
    place = torch.arange(tokens - prefix, device=device)
    interleaved = torch.cat([new, theirs], dim=1)[:, place // 2 + place % 2 * ours]  # (B, N - P)
    return torch.cat([torch.arange(prefix, device=device).expand(batch, -1), prefix + interleaved], dim=1)


def one_hot(places: Tensor, count: int) -> Tensor:
    """(B, M) int64 to (B, count, M) bool: column m is true in row ``places[m]``."""
    return places.unsqueeze(1) == torch.arange(count, device=places.device).reshape(1, -1, 1)


def taken(values: Tensor, places: Tensor) -> Tensor:
    """The tokens (B, M, D) at ``places`` (B, M) of ``values`` (B, N, D)."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
