"""Another input size: tables against the functions that they sample, networks against timm's own of that size, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize import groups
from edgejoule.optimize.fuse import Fuse
from edgejoule.optimize.heads import find_heads
from edgejoule.optimize.positions import cubic, offset_index, resample_offsets, resample_signed
from edgejoule.optimize.resize import Resize, _grown
from edgejoule.optimize.window_attention import WindowAttention
from edgejoule.seams import PassContext
from tests import families

CONTEXT = PassContext(fit=None, teacher=None, data=None, seed=0, workdir=Path("/nonexistent"))
# families whose builders take the size, and how much larger a network they are asked for
SIZED = {
    **{
        name: (48, {"img_size": 48})
        for name in ("vit", "vit_modern", "vit_pooled", "vit_relpos", "deit", "deit_distilled", "levit", "levit_conv")
    },
    "swin": (48, {"img_size": 48, "window_size": 6}),
    "tiny_vit": (64, {"window_sizes": (8, 8, 4, 2)}),
    "efficientvit_msra": (160, {"img_size": 160}),
    "efficientformerv2": (96, {"img_size": 96}),
}
SIZELESS = ("mobilevit", "mobilevitv2", "efficientvit_mit", "pvt_v2", "edgenext", "fastvit", "edgevit")


def smooth(y: float, x: float) -> float:
    """An even function of both offsets, in sides of the map: what a trained table may look like."""
    return math.exp(-3 * (y * y + 0.6 * x * x)) + 0.3 * math.cos(2 * y) * math.cos(x)


def slanted(y: float, x: float) -> float:
    """One that knows left from right."""
    return smooth(y, x) + 0.4 * math.sin(1.5 * y) - 0.2 * x


def sampled(function: Callable[[float, float], float], places: list[tuple[float, float]]) -> Tensor:
    return torch.tensor([[function(y, x) for y, x in places]] * 2)  # (2 heads, offsets)


def absolute(side: int) -> list[tuple[float, float]]:
    return [(y / side, x / side) for y, x in itertools.product(range(side), repeat=2)]


def signed(side: int) -> list[tuple[float, float]]:
    return [(y / side, x / side) for y, x in itertools.product(range(1 - side, side), repeat=2)]


@pytest.mark.parametrize(("old", "new"), [(14, 18), (14, 28), (14, 9), (7, 12), (12, 7)])
def test_tables_follow_the_function_that_they_sample(old: int, new: int) -> None:
    even = sampled(smooth, absolute(old))
    wanted = sampled(smooth, absolute(new))
    got = resample_offsets(even, (old, old), (new, new))
    assert (got - wanted).abs().max() < 0.02
    as_image = torch.nn.functional.interpolate(even.reshape(1, 2, old, old), (new, new), mode="bicubic", antialias=True).reshape(2, -1)
    assert (got - wanted).abs().max() < 0.5 * (as_image - wanted).abs().max()  # which moves offset 0
    assert torch.equal(got[:, 0], even[:, 0])
    table = torch.cat((sampled(slanted, signed(old)).T, torch.tensor([[5.0, 6.0], [7.0, 8.0], [9.0, 10.0]])))  # a class token's at the end
    moved = resample_signed(table, (old, old), (new, new))
    assert (moved[:-3] - sampled(slanted, signed(new)).T).abs().max() < 0.03
    assert torch.equal(moved[-3:], table[-3:])


def test_tables_are_even() -> None:
    """Between offsets 0 and 1 a parabola is itself: what lies left of offset 0 mirrors what lies right of it."""
    table = torch.tensor([[y * y + x * x for y, x in itertools.product(range(7), repeat=2)]]).float()
    got = resample_offsets(table, (7, 7), (14, 14)).reshape(14, 14)
    wanted = (torch.arange(14) / 2) ** 2
    assert torch.allclose(got[:11, :11], (wanted.unsqueeze(1) + wanted)[:11, :11], atol=1e-5)


def test_tables_that_are_not_square() -> None:
    places = [(y / 6, x / 9) for y, x in itertools.product(range(6), range(9))]
    wanted = [(y / 8, x / 7) for y, x in itertools.product(range(8), range(7))]
    assert (resample_offsets(sampled(smooth, places), (6, 9), (8, 7)) - sampled(smooth, wanted)).abs().max() < 0.03


@pytest.mark.parametrize("side", [1, 2, 7])
def test_doubling_and_halving_gives_the_table_back(side: int) -> None:
    table = torch.randn(3, side * side, generator=torch.Generator().manual_seed(0))
    there = resample_offsets(table, (side, side), (2 * side, 2 * side))
    assert torch.allclose(resample_offsets(there, (2 * side, 2 * side), (side, side)), table, atol=1e-6)
    table = torch.randn((2 * side - 1) ** 2 + 3, 3, generator=torch.Generator().manual_seed(0))
    there = resample_signed(table, (side, side), (2 * side, 2 * side))
    assert torch.allclose(resample_signed(there, (2 * side, 2 * side), (side, side)), table, atol=1e-6)


def test_cubic_convolution_is_exact_for_lines_and_between_for_parabolas() -> None:
    samples = torch.arange(6).double()
    points = torch.tensor([-1.0, -0.3, 0.0, 1.7, 3.5, 5.0, 5.4, 6.0])
    assert torch.allclose(cubic(points, 6, mirrored=False) @ (2 * samples - 3), 2 * points.double() - 3)
    inside = points[3:5].double()
    assert torch.allclose(cubic(inside, 6, mirrored=False) @ samples**2, inside**2)
    assert torch.allclose(cubic(torch.tensor([0.5]), 6, mirrored=True) @ samples**2, torch.tensor([0.25]).double())


def test_offsets_by_plain_python() -> None:
    for (high, wide), stride in (((3, 4), 1), ((5, 4), 2), ((1, 1), 2)):
        keys = list(itertools.product(range(high), range(wide)))
        queries = [key for key in keys if key[0] % stride == 0 and key[1] % stride == 0]
        wanted = [[abs(q[0] - k[0]) * wide + abs(q[1] - k[1]) for k in keys] for q in queries]
        assert offset_index((high, wide), stride).tolist() == wanted


def tensors(network: Any) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


@pytest.mark.parametrize("name", SIZED)
def test_is_the_network_that_timm_builds_for_the_size(name: str) -> None:
    """Same shapes, same indices and masks; with the same weights, the same logits. And back again: the first one."""
    network, spec = families.network(name)
    px, options = SIZED[name]
    twin, resized = Resize(px)(network, spec, CONTEXT)
    assert resized.preprocessing.input_size == (3, px, px) and resized.preprocessing.crop_pct == spec.preprocessing.crop_pct
    theirs = families._make(name, **options)
    theirs.load_state_dict(twin.state_dict())
    theirs.eval()
    ours, built = tensors(twin), tensors(theirs)
    assert ours.keys() == built.keys()
    assert all(torch.equal(ours[key], built[key]) for key in ours), [key for key in ours if not torch.equal(ours[key], built[key])]
    images = families.images(resized, 2)
    with torch.no_grad():
        assert torch.equal(twin(images), theirs(images))
    assert all(not part._forward_pre_hooks for part in twin.modules())


@pytest.mark.parametrize("name", SIZED)
def test_there_and_back(name: str) -> None:
    """Twice as large and back: tables by offset exactly as they were, absolute positions as far as they are smooth."""
    network, spec = families.network(name)
    px = spec.preprocessing.input_size[1]
    if getattr(network, "pos_embed", None) is not None:
        prefix, ramp = network.num_prefix_tokens, torch.linspace(-1, 1, 4)
        wave = torch.stack((ramp.repeat_interleave(4), ramp.repeat(4)), -1).sin()  # (16, 2)
        network.pos_embed.data[:, prefix:] = wave.repeat(1, network.embed_dim // 2)
    there, larger = Resize(2 * px)(network, spec, CONTEXT)
    back, same = Resize(px)(there, larger, CONTEXT)
    assert same == spec
    for key, value in tensors(network).items():
        assert torch.allclose(tensors(back)[key], value, atol=0.15 if key == "pos_embed" else 1e-5), key
    if getattr(network, "pos_embed", None) is not None:
        assert torch.equal(there.pos_embed[:, :prefix], network.pos_embed[:, :prefix])


def tables_of(network: Any) -> list[tuple[Any, int]]:
    """The attentions with a bias by offset, and the side of the map or window that they look at."""
    found = []
    for part in network.modules():
        if hasattr(part, "attention_biases"):
            found.append((part, part.resolution if isinstance(part.resolution, int) else part.resolution[0]))
        elif hasattr(part, "relative_position_bias_table"):
            found.append((part, part.window_size[0]))
    return found


BIASED = {  # sides of 4 and more, so that a table samples a function
    **{name: (96, {"img_size": 96}) for name in ("levit", "levit_conv")},
    "efficientvit_msra": (96, {"img_size": 96, "window_size": (7, 7, 7)}),
    "efficientformerv2": (256, {"img_size": 256}),
    "tiny_vit": (32, {"window_sizes": (4, 8, 4, 2)}),
    "swin": (32, {"window_size": 8}),
}


@pytest.mark.parametrize("name", BIASED)
def test_biases_of_a_network_follow_a_function(name: str) -> None:
    """What an attention adds for two tokens is a function of their offset in sides of its map or window: the same one at both sizes."""
    px, options = BIASED[name]
    function, offsets = (slanted, signed) if name == "swin" else (smooth, absolute)
    network, found = families._make(name, **options), 0
    for part, side in tables_of(network):
        table = part.relative_position_bias_table.T if name == "swin" else part.attention_biases
        table.data[:] = sampled(function, offsets(side))[0]
    spec = families.network(name)[1]
    spec = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, input_size=(3, px, px)))
    twin, _ = Resize(px * 3 // 2 if name != "efficientformerv2" else 384)(network, spec, CONTEXT)
    for (part, side), (_, before) in zip(tables_of(twin), tables_of(network), strict=True):
        if before < 4:
            continue
        found += side != before
        dense = part._get_rel_pos_bias()[0, 0] if name == "swin" else part.attention_biases[0, part.attention_bias_idxs]  # (N_q, N_k)
        wide = math.isqrt(len(dense))  # queries in a row: all places, or every second one
        step = math.ceil(side / wide)
        for q, k in itertools.product(range(0, len(dense), 3), range(0, dense.shape[1], 3)):
            y, x = q // wide * step - k // side, q % wide * step - k % side
            assert abs(dense[q, k].item() - function(y / side, x / side)) < 0.05, (type(part).__name__, y, x)
    assert found


def repeated(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C, 2 H, 2 W): each patch twice in both directions."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.repeat_interleave(2, 2).repeat_interleave(2, 4).reshape(b, c, 2 * h, 2 * w)


@pytest.mark.parametrize("name", ["vit", "vit_modern", "vit_pooled", "deit_distilled"])
def test_sees_the_same_in_the_same_patches(name: str) -> None:
    """Attention averages: four copies of each patch weigh as one, if each copy's position is about the patch's own."""
    network, spec = families.network(name)
    ramp = torch.linspace(-1, 1, 4)
    prefix = network.num_prefix_tokens
    network.pos_embed.data[:, prefix:] += torch.stack((ramp.repeat_interleave(4), ramp.repeat(4)), -1).repeat(1, network.embed_dim // 2)
    network.pos_embed.data[:, :prefix] *= 3
    for block in network.blocks:  # prefix tokens see the patches alone as keys: their own weight would change with the number of patches
        block.attn.qkv.weight.data[:48] *= 0.5
    twin, _ = Resize(64)(network, spec, CONTEXT)
    shuffled = copy.deepcopy(twin)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled.pos_embed.data[:, prefix:] = shuffled.pos_embed.data[:, prefix:][:, order]
    images = families.images(spec, 8)
    with torch.no_grad():
        before, after, wrong = network(images), twin(repeated(images, 8)), shuffled(repeated(images, 8))
    alike = [float(torch.nn.functional.cosine_similarity(before - before.mean(0), x - x.mean(0)).mean()) for x in (after, wrong)]
    assert alike[0] > 0.9 and 1 - alike[0] < 0.5 * (1 - alike[1])


@pytest.mark.parametrize("name", families.NETWORKS)
def test_its_own_size_is_the_identity(name: str) -> None:
    network, spec = families.network(name)
    images = families.images(spec, 2)
    network(images)  # some attentions keep biases with a history, which torch would not copy
    twin, same = Resize(spec.preprocessing.input_size[1])(network, spec, CONTEXT)
    assert twin is not network and same == spec and not twin.training
    with torch.no_grad():
        assert torch.equal(twin(images), network(images))


@pytest.mark.parametrize("name", SIZELESS)
def test_networks_of_any_size_get_another_spec(name: str) -> None:
    network, spec = families.network(name)
    twin, resized = Resize(96)(network, spec, CONTEXT)
    assert resized.preprocessing.input_size == (3, 96, 96)
    assert all(torch.equal(value, tensors(network)[key]) for key, value in tensors(twin).items())
    with torch.no_grad():
        images = families.images(resized, 2)
        assert torch.equal(twin(images), network(images))


def test_windows_grow_with_the_map() -> None:
    """As in the networks that were published for 384 pixels: Swin's 7 becomes 12, TinyViT's 7, 14, 7 become 12, 24, 12."""
    assert [_grown(old, window, new) for old, window, new in ((56, 7, 96), (7, 7, 12), (28, 7, 48), (14, 14, 24))] == [12, 12, 12, 24]
    assert _grown(7, 7, 8) == 8  # not 7, for which the map would be padded to 14
    network, spec = families.network("swin")
    twin, _ = Resize(40)(network, spec, CONTEXT)  # maps of 20 and 10 tokens instead of 16 and 8
    assert [stage.blocks[0].window_size for stage in twin.layers] == [(5, 5), (5, 5)]
    assert [stage.blocks[1].shift_size for stage in twin.layers] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "px"), [("levit", 48), ("tiny_vit", 48), ("efficientvit_msra", 96), ("vit_modern", 48), ("efficientformerv2", 96)]
)
def test_after_fusing(name: str, px: int) -> None:
    """Fused and resized is resized and fused: what was folded does not know the size."""
    network, spec = families.network(name)
    fused, _ = Fuse()(network, spec, CONTEXT)
    one, resized = Resize(px)(fused, spec, CONTEXT)
    images = families.images(resized, 2)
    with torch.no_grad():
        other = Resize(px)(network, spec, CONTEXT)[0](images)
        assert float((one(images) - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos", "swin", "levit", "tiny_vit", "efficientvit_msra", "efficientformerv2"])
def test_after_pruning_heads(name: str) -> None:
    """Heads out and resized is heads silenced and resized: tables with fewer rows are resampled row by row."""
    network, spec = families.network(name)
    pruned, silenced = copy.deepcopy(network), copy.deepcopy(network)
    for group in find_heads(network):
        if group.units > 1:
            groups.silence(silenced, group, [0])
            groups.remove(pruned, group, [0])
    px = spec.preprocessing.input_size[1]
    one, resized = Resize(2 * px)(pruned, spec, CONTEXT)
    other, _ = Resize(2 * px)(silenced, spec, CONTEXT)
    images = families.images(resized, 2)
    with torch.no_grad():
        assert float((one(images) - other(images)).norm() / other(images).norm()) < 1e-5
        assert float((one(images) - Resize(2 * px)(network, spec, CONTEXT)[0](images)).norm()) > 1e-3


def test_after_window_attention() -> None:
    """The windows stay, the grid grows; sizes whose grid they do not tile are refused, naming those that they do."""
    for name in ("vit_modern", "vit_relpos"):
        network, spec = families.network(name)
        windowed, _ = WindowAttention(size=2)(network, spec, CONTEXT)
        one, resized = Resize(48)(windowed, spec, CONTEXT)
        other, _ = WindowAttention(size=2)(Resize(48)(network, spec, CONTEXT)[0], resized, CONTEXT)
        images = families.images(resized, 2)
        with torch.no_grad():
            assert torch.equal(one(images), other(images))
        with pytest.raises(ModelError, match=r"do not tile 5x5.*work are 32 and 48"):
            Resize(40)(windowed, spec, CONTEXT)


@pytest.mark.parametrize(
    ("name", "px", "said"),
    [
        ("deit", 36, r"patches of 8 pixels would leave out the border\): sizes near it that work are 32 and 40"),
        ("efficientformerv2", 72, "work are 64 and 96"),
        ("pvt_v2", 8, "works? (are|either)"),
    ],
)
def test_sizes_that_do_not_work_name_some_that_do(name: str, px: int, said: str) -> None:
    network, spec = families.network(name)
    with pytest.raises(ModelError, match=said) as raised:
        Resize(px)(network, spec, CONTEXT)
    assert str(raised.value).startswith(f"resize(px={px}) does not work on {spec.name} (")


def test_sizes_that_are_none_are_refused() -> None:
    for px in (0, -32, 1.5, True, "224", (192, 224)):
        with pytest.raises(SpecError, match="px"):
            Resize(px)  # type: ignore[arg-type]
    network, spec = families.network("pvt_v2")
    wide = dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, input_size=(3, 64, 96)))
    with pytest.raises(ModelError, match="takes 64x96 images"):
        Resize(64)(network, wide, CONTEXT)


@pytest.mark.parametrize("name", ["levit", "swin", "tiny_vit", "efficientvit_msra", "efficientformerv2", "vit_relpos"])
def test_exports(name: str) -> None:
    network, spec = families.network(name)
    twin, resized = Resize(64 if spec.preprocessing.input_size[1] == 32 else 96)(network, spec, CONTEXT)
    images = families.images(resized, 1)
    program = torch.export.export(twin, (images.clone(),), strict=False)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), twin(images), atol=1e-5)
