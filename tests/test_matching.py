"""Bipartite soft matching against plain Python written from the paper (arXiv 2210.09461, section 3), one pair at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgejoule.optimize import matching

Groups = list[tuple[list[int], list[float], float]]  # for each token: what it is made of, its values, its size


def slow(keys: list[list[float]], values: list[list[float]], sizes: list[float], r: int, prefix: int) -> Groups:
    """One image. The five steps of the paper: split in two sets by turns, one edge each, the r best, merge, put together."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    ours, theirs = list(range(prefix, len(keys), 2)), list(range(prefix + 1, len(keys), 2))
    edges = {a: max(theirs, key=lambda b: cosine(keys[a], keys[b])) for a in ours}
    leaving = sorted(ours, key=lambda a: -cosine(keys[a], keys[edges[a]]))[:r]
    made: Groups = []
    for token in [*range(prefix), *(a for a in ours if a not in leaving), *theirs]:
        members = [token, *(a for a in leaving if edges[a] == token)]
        size = sum(sizes[m] for m in members)
        mean = [sum(sizes[m] * values[m][d] for m in members) / size for d in range(len(values[0]))]
        made.append((sorted(members), mean, size))
    return made


def draw(seed: int, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (B, N, 4), values (B, N, 3) and whole sizes (B, N), float64."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, tokens, dim, generator=generator, dtype=torch.float64) for dim in (4, 3))
    return keys, values, torch.randint(1, 5, (batch, tokens), generator=generator).double()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), patches=st.integers(2, 17), prefix=st.integers(0, 3), wish=st.integers(1, 9))
def test_as_plain_python_merges(seed: int, patches: int, prefix: int, wish: int) -> None:
    keys, values, sizes = draw(seed, 2, patches + prefix)
    r = matching.merges(patches + prefix, prefix, wish)
    assert r == min(wish, patches // 2)
    pairs = matching.match(keys, r, prefix)
    merged, counted = matching.averaged(values, sizes, pairs)
    places = matching.destinations(patches + prefix, pairs)
    for image in range(2):
        expected = slow(keys[image].tolist(), values[image].tolist(), sizes[image].tolist(), r, prefix)
        assert len(expected) == merged.shape[1] == patches + prefix - r
        for token, (members, mean, size) in enumerate(expected):
            assert torch.nonzero(places[image] == token).flatten().tolist() == members
            assert merged[image, token].tolist() == pytest.approx(mean, abs=1e-9)
            assert counted[image, token].item() == size
    assert torch.equal(counted.sum(1), sizes.sum(1))


def test_at_most_half_of_the_patch_tokens_go() -> None:
    assert matching.merges(197, 1, 300) == 98
    assert matching.merges(18, 2, 8) == 8
    assert matching.merges(3, 2, 8) == 0  # one patch token has no partner
    assert matching.merges(17, 1, 0) == 0


def test_prefix_tokens_never_merge_even_where_they_are_copies() -> None:
    keys = torch.ones(1, 7, 4)  # all alike
    pairs = matching.match(keys, 2, 3)
    values = torch.arange(7.0).reshape(1, 7, 1)
    merged, sizes = matching.averaged(values, torch.ones(1, 7), pairs)
    assert merged[0, :3, 0].tolist() == [0.0, 1.0, 2.0]
    assert sizes[0, :3].tolist() == [1.0, 1.0, 1.0]
    assert sizes.sum() == 7


def test_length_of_keys_does_not_matter_and_zeros_are_no_error() -> None:
    keys, _, _ = draw(3, 1, 12)
    scaled = keys * torch.rand(1, 12, 1, dtype=torch.float64).add(0.5)
    for a, b in zip(matching.match(keys, 4, 0)[:3], matching.match(scaled, 4, 0)[:3], strict=True):
        assert torch.equal(a, b)
    keys[:, 2] = 0.0
    pairs = matching.match(keys, 6, 0)
    assert sorted(pairs.source[0].tolist()) == list(range(6))
