"""Attention within windows: equal to slow global attention under a mask that plain Python makes; exportable, cheaper, refused by name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from edgejoule.compile.export import TorchExport
from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize import groups
from edgejoule.optimize.heads import find_heads
from edgejoule.optimize.impossible import IMPOSSIBLE, family_of
from edgejoule.optimize.window_attention import WindowAttention
from edgejoule.optimize.windows import MASKED, WindowedAttention, seams
from edgejoule.screen.cost import count
from edgejoule.seams import PassContext
from tests import families

PLAIN = ("vit", "vit_modern", "vit_pooled", "vit_relpos", "deit", "deit_distilled")
CONTEXT = PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path("/nonexistent"))


def allowed(grid: tuple[int, int], size: int, shift: int | tuple[int, int], prefix: int) -> Tensor:
    """(P + N, P + N) bool: who sees whom. Shifted windows begin ``shift`` patches further, and the grid's border cuts them off."""
    down, right = (shift, shift) if isinstance(shift, int) else shift
    tokens = prefix + grid[0] * grid[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    for query, key in itertools.product(range(tokens - prefix), repeat=2):
        rows = (query // grid[1] - down) // size == (key // grid[1] - down) // size  # floors: -1 before the first window
        columns = (query % grid[1] - right) // size == (key % grid[1] - right) // size
        mask[prefix + query, prefix + key] = rows and columns
    return mask


def slow(network: Any, images: Tensor, masks: list[Tensor]) -> Tensor:
    """The unchanged network's logits (B, K) with each block's attention under its mask, block by block."""
    x = network.patch_embed(images)
    if hasattr(network, "_pos_embed"):
        x = network.norm_pre(network._pos_embed(x))
    elif network.cls_token is not None:
        x = torch.cat((network.cls_token.expand(len(x), -1, -1), x), dim=1)
    shared = getattr(network, "shared_rel_pos", None)
    shared_bias = shared.get_bias() if shared is not None else 0.0
    for block, mask in zip(network.blocks, masks, strict=True):
        added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        attn, gain = block.attn, getattr(block, "ls1", torch.nn.Identity())
        y = block.norm1(x)
        q, k, v = attn.qkv(y).reshape(len(y), y.shape[1], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale + added + shared_bias  # (B, heads, T, T)
        if getattr(attn, "rel_pos", None) is not None:
            scores = scores + attn.rel_pos.get_bias()
        x = x + gain(attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + getattr(block, "ls2", torch.nn.Identity())(block.mlp(block.norm2(x)))
    return network.forward_head(network.norm(x))


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("shift", "every"), [(True, 0), (False, 0), (True, 2)])
def test_equals_masked_global_attention(name: str, shift: bool, every: int) -> None:
    network, spec = families.network(name)
    images = families.images(spec, 2)
    twin, same = WindowAttention(size=2, shift=shift, every=every)(network, spec, CONTEXT)
    prefix, masks, windowed = network.num_prefix_tokens, [], 0
    for number in range(1, len(network.blocks) + 1):
        if every and number % every == 0:
            masks.append(allowed((4, 4), 4, 0, prefix))
            continue
        masks.append(allowed((4, 4), 2, 1 if shift and windowed % 2 else 0, prefix))
        windowed += 1
    with torch.no_grad():
        logits, expected, before = twin(images), slow(network, images, masks), network(images)
        assert error(slow(network, images, [torch.ones_like(mask) for mask in masks]), before) < 1e-5  # the slow network is the network
    assert error(logits, expected) < 1e-5
    assert error(logits, before) > 1e-3  # it did something
    assert same == spec and not twin.training
    assert type(twin.blocks[0].attn) is WindowedAttention and type(network.blocks[0].attn) is not WindowedAttention


def relpos(class_token: bool, shared: bool, kind: str) -> tuple[Any, Any]:
    """A transformer with relative positions of ordinary size, of each of timm's kinds."""
    _, spec = families.network("vit_relpos")
    torch.manual_seed(3)
    network = families._make("vit_relpos", class_token=class_token, shared_rel_pos=shared, rel_pos_type=kind, init_values=None)
    for name, value in network.named_parameters():
        if "table" in name or "rel_pos.mlp" in name:
            value.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    network.eval()
    return network, spec


@pytest.mark.parametrize(("class_token", "shared", "kind"), [(True, False, "bias"), (True, True, "mlp"), (False, True, "bias")])
def test_biases_are_gathered_for_each_window(class_token: bool, shared: bool, kind: str) -> None:
    network, spec = relpos(class_token, shared, kind)
    images = families.images(spec, 2)
    twin, _ = WindowAttention(size=2)(network, spec, CONTEXT)
    masks = [allowed((4, 4), 2, shift, int(class_token)) for shift in (0, 1, 0)]
    with torch.no_grad():
        assert error(twin(images), slow(network, images, masks)) < 1e-5


@pytest.mark.parametrize(
    ("grid", "shift", "effective"), [((6, 4), 0, (0, 0)), ((6, 4), 1, (1, 1)), ((6, 2), 1, (1, 0)), ((2, 6), 1, (0, 1))]
)
def test_grids_that_are_not_square(grid: tuple[int, int], shift: int, effective: tuple[int, int]) -> None:
    """Where one window spans the grid, nothing is shifted along that axis."""
    source = families.network("vit_modern")[0].blocks[0].attn
    x = torch.randn(3, 3 + grid[0] * grid[1], 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(x, attn_mask=allowed(grid, 2, effective, 3))
        assert error(WindowedAttention(source, grid, 2, shift, 3)(x), expected) < 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_a_window_of_the_whole_grid_is_the_identity(name: str) -> None:
    network, spec = families.network(name)
    images = families.images(spec, 2)
    with torch.no_grad():
        assert torch.equal(WindowAttention(size=4)(network, spec, CONTEXT)[0](images), network(images))
        block, x = network.blocks[1], torch.randn(2, network.num_prefix_tokens + 16, network.embed_dim)
        windowed = WindowedAttention(block.attn, (4, 4), 4, 2, network.num_prefix_tokens)  # the module itself too, its shift left out
        assert windowed.mask is None
        assert error(windowed(x), block.attn(x)) < 1e-5


def test_seams_are_those_of_swin() -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    theirs = SwinTransformerBlock(8, (8, 12), num_heads=2, window_size=4, shift_size=2).attn_mask
    assert torch.equal(seams((8, 12), 4, (2, 2)) == MASKED, theirs < 0)


@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos"])
def test_keeps_the_names_of_parts_and_trains(name: str) -> None:
    network, spec = families.network(name)
    twin, _ = WindowAttention(size=2)(network, spec, CONTEXT)
    paths = {path for path, _ in network.named_parameters()}
    assert {path for path, _ in twin.named_parameters()} == paths
    assert all(torch.equal(value, dict(network.named_parameters())[path]) for path, value in twin.named_parameters())
    twin.train()
    twin(families.images(spec, 2)).square().sum().backward()
    assert all(value.grad is not None for value in twin.parameters())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos"])
def test_exports_to_onnx(name: str, batch: int, tmp_path: Path) -> None:
    network, spec = families.network(name)
    twin, _ = WindowAttention(size=2)(network, spec, CONTEXT)
    images = families.images(spec, batch)
    file = TorchExport(twin, (batch, *spec.preprocessing.input_size), tmp_path, spec.name).onnx
    (logits,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert np.abs(logits - twin(images).numpy()).max() < 1e-4


def test_costs_less() -> None:
    """Scores and weighted sums of N patches and P others: (P + N)^2 pairs become P (P + N) + N (P + w^2), 2 C MACs each and block."""
    for name in PLAIN:
        network, spec = families.network(name)
        twin, _ = WindowAttention(size=2)(network, spec, CONTEXT)
        size, prefix, patches = spec.preprocessing.input_size, network.num_prefix_tokens, 16
        saved = (prefix + patches) ** 2 - prefix * (prefix + patches) - patches * (prefix + 4)
        fewer = count(network, size).macs - count(twin, size).macs
        assert fewer == 2 * network.embed_dim * saved * len(network.blocks)  # queries, keys and values are still projected once


def test_options_that_mean_nothing_are_refused() -> None:
    for options in ({"size": 0}, {"size": 2.0}, {"size": True}, {"every": -1}, {"every": 1.5}, {"shift": 1}):
        with pytest.raises(SpecError, match=next(iter(options))):
            WindowAttention(**options)  # type: ignore[arg-type]


def test_sizes_that_do_not_divide_are_named() -> None:
    network, spec = families.network("vit")
    with pytest.raises(ModelError, match="4x4 patches divide into windows of 1, 2, 4 to a side"):
        WindowAttention(size=3)(network, spec, CONTEXT)


def test_other_families_are_refused_with_a_reason() -> None:
    for name in families.NETWORKS:
        network, spec = families.network(name)
        known = family_of(network) in IMPOSSIBLE["window_attention"]
        assert known == (name not in PLAIN)
        if known:
            with pytest.raises(ModelError, match="window_attention cannot work on"):
                WindowAttention(size=2)(network, spec, CONTEXT)


def test_blocks_that_another_pass_made_are_refused() -> None:
    network, spec = families.network("vit")
    once, _ = WindowAttention(size=2)(network, spec, CONTEXT)
    with pytest.raises(ModelError, match="block 0 is made of WindowedAttention"):
        WindowAttention(size=2)(once, spec, CONTEXT)
    named = dataclasses.replace(spec, name="net")
    with pytest.raises(ModelError, match="it is no plain transformer"):
        WindowAttention(size=2)(torch.nn.Sequential(torch.nn.Flatten()), named, CONTEXT)


@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos", "shared"])
def test_pruned_heads_stay_pruned(name: str) -> None:
    """Heads out and windowed is heads silenced and windowed."""
    network, spec = relpos(True, True, "bias") if name == "shared" else families.network(name)
    pruned, silenced = copy.deepcopy(network), copy.deepcopy(network)
    for group in find_heads(network):
        groups.silence(silenced, group, [0, 2])
        groups.remove(pruned, group, [0, 2])
    images = families.images(spec, 2)
    with torch.no_grad():
        one, other = (WindowAttention(size=2)(net, spec, CONTEXT)[0](images) for net in (pruned, silenced))
    assert error(one, other) < 1e-5
