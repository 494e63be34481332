"""Heads leave without a trace: for every class of attention, networks without some heads and with those heads silenced agree."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edgejoule.torchvision import ensure  # noqa: E402

ensure()
from timm.layers import Attention  # noqa: E402
from timm.layers.attention2d import MultiQueryAttention2d  # noqa: E402
from timm.models.tnt import TNT  # noqa: E402
from timm.models.twins import Twins  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.models.vision_transformer_relpos import VisionTransformerRelPos  # noqa: E402

from edgejoule.errors import ModelError  # noqa: E402
from edgejoule.optimize.branches import distance  # noqa: E402
from edgejoule.optimize.copies import adopt  # noqa: E402
from edgejoule.optimize.fuse import fuse, photo_like  # noqa: E402
from edgejoule.optimize.groups import Group, parameters_of, remove, silence, sums  # noqa: E402
from edgejoule.optimize.heads import ADAPTERS, find_heads  # noqa: E402
from edgejoule.optimize.pruned_attention import PaddedLayerNorm, PrunedCascade  # noqa: E402
from edgejoule.optimize.token_attention import opened  # noqa: E402
from edgejoule.optimize.windows import WindowedAttention  # noqa: E402
from edgejoule.zoo import live  # noqa: E402
from edgejoule.zoo.edgevit import EdgeViT  # noqa: E402
from edgejoule.zoo.pvt_v1 import PyramidVisionTransformer  # noqa: E402
from edgejoule.zoo.t2t_vit import T2TViT  # noqa: E402
from tests import families  # noqa: E402

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
EDGE = {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "heads": (2, 2, 3, 4), "num_classes": 10}


def gated(**options: Any) -> Any:
    module = VisionTransformer(**options)
    for block in module.blocks:
        block.attn = Attention(options["embed_dim"], options["num_heads"], gated=True)
    return module


def multi_query(**options: Any) -> Any:
    attention = MultiQueryAttention2d(32, num_heads=4, key_dim=6, value_dim=8, **options)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 4, 4), attention, torch.nn.Flatten(), torch.nn.Linear(2048, 10)).eval()


# classes of attention, and forms of one, that the families lack: (class, input side, options)
OTHERS: Mapping[str, tuple[Any, int, Mapping[str, Any]]] = {
    "gated": (gated, 32, VIT),
    "multi_query": (multi_query, 32, {}),
    "multi_query_strided": (multi_query, 32, {"query_strides": 2, "kv_stride": 2}),
    "relpos_mlp": (VisionTransformerRelPos, 32, {**VIT, "rel_pos_type": "mlp"}),
    "relpos_shared": (VisionTransformerRelPos, 32, {**VIT, "shared_rel_pos": True}),
    "edgevit_lsa": (EdgeViT, 64, {**EDGE, "local": "lsa", "window": 3}),
    "edgevit_center": (EdgeViT, 64, {**EDGE, "delegate": "center"}),
    "edgevit_no_lp": (EdgeViT, 64, {**EDGE, "propagate": "none"}),
    "edgevit_bilinear": (EdgeViT, 64, {**EDGE, "propagate": "bilinear"}),
    "pvt_v1": (PyramidVisionTransformer, 64, {"img_size": 64, "num_classes": 10}),
    "pvt_v2_linear": (families.PyramidVisionTransformerV2, 64, {**families.NETWORKS["pvt_v2"][2], "linear": True, "num_classes": 10}),
    "t2t_vit": (T2TViT, 64, {"depth": 2, "img_size": 64, "num_classes": 10, "qk_scale": 0.2}),
    "twins": (Twins, 64, {"embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 3, 4), "depths": (2, 2, 2, 1), "wss": (2, 2, 2, 2)}),
    "tnt": (TNT, 32, {"img_size": 32, "embed_dim": 48, "inner_dim": 16, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 3}),
}
# and what other passes put in their place: (network, class of attention that is replaced by ...)
REPLACED = ("vit_modern windowed", "relpos_shared windowed", "vit_relpos windowed", "vit_relpos open")
FUSED = ("levit", "levit_conv", "efficientvit_msra", "efficientvit_mit", "efficientformerv2", "edgevit", "fastvit", "tiny_vit")
CASES = (*families.NETWORKS, *OTHERS, *REPLACED, *(f"{name} fused" for name in FUSED))


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    """Made once each: (network in eval mode, images)."""
    return {}


def network(case: str, made: dict[str, Any]) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    if case not in made:
        name, _, how = case.partition(" ")
        if name in OTHERS:
            kind, side, options = OTHERS[name]
            torch.manual_seed(0)
            module = kind(**options)
            live.enliven(module, photo_like(16, (3, side, side)), seed=0)
            images = photo_like(2, (3, side, side))
        else:
            module, spec = families.network(name)
            images = families.images(spec)
        made[case] = (changed(module, images, how), images)
    return made[case]


def changed(module: Any, images: Any, how: str) -> Any:
    """As it comes out of another pass."""
    if how == "fused":
        return fuse(module, tuple(images.shape[1:]))
    for block in module.blocks if how else ():
        block.attn = WindowedAttention(block.attn, (4, 4), 2, 1, module.num_prefix_tokens) if how == "windowed" else Tokens(block.attn)
    return module


class Tokens(torch.nn.Module):
    """The open form of an attention by itself: its tokens alone."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.open = opened(attention, "tests")

    def forward(self, x: Any, **_: Any) -> Any:
        return self.open(x, self.open.positions(None)).x


def dropped(group: Group) -> list[int]:
    """The first of two or three, else two that are no neighbours, so that one stays between; of many channels every third."""
    return [0] if group.units < 4 else list(range(1, group.units, 2 if group.units < 16 else 3))


def logits(module: Any, images: Any) -> Any:
    with torch.no_grad():
        return module(images.clone())


def pruned(module: Any, out: Mapping[str, list[int]], surgery: Any) -> Any:
    twin = copy.deepcopy(module)
    for group in find_heads(twin):
        surgery(twin, group, out[group.name])
    return twin


def size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("case", CASES)
def test_heads_that_are_out_are_heads_that_are_silent(case: str, networks: dict[str, Any]) -> None:
    module, images = network(case, networks)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    groups = find_heads(module)
    out = {group.name: dropped(group) for group in groups}
    assert groups
    plain = logits(module, images)
    small, quiet = pruned(module, out, remove), pruned(module, out, silence)
    found, expected = logits(small, images), logits(quiet, images)
    assert distance(found, expected) < 1e-5
    assert distance(found, plain) > 1e-3
    assert distance(logits(small.double(), images.double()), logits(quiet.double(), images.double())) < 1e-6
    assert size(small) < size(module)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    assert torch.equal(logits(module, images), plain)


@pytest.mark.parametrize("case", CASES)
def test_each_group_alone_matters_and_agrees(case: str, networks: dict[str, Any]) -> None:
    """So that no adapter hides behind another one's effect."""
    module, images = network(case, networks)
    exact, double = copy.deepcopy(module).double(), images.double()
    plain = logits(exact, double)
    for group in find_heads(exact):
        small, quiet = copy.deepcopy(exact), copy.deepcopy(exact)
        remove(small, group, dropped(group))
        silence(quiet, group, dropped(group))
        assert distance(logits(small, double), logits(quiet, double)) < 1e-6, group.name
        assert distance(logits(small, double), plain) > 1e-5, group.name
        fallen = size(module) - size(small)
        assert abs(fallen - len(dropped(group)) * parameters_of(module, group)) <= 0.1 * fallen, group.name


@pytest.mark.parametrize("case", [name for name in CASES if " " not in name])
def test_pruned_networks_export_and_are_pruned_again(case: str, networks: dict[str, Any]) -> None:
    module, images = network(case, networks)
    once = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
    again = find_heads(once)
    out = {group.name: [group.units - 1] for group in again}
    names = {group.name for group in find_heads(module) if group.units - len(dropped(group)) > 1}
    assert {group.name for group in again} == names
    if again:
        twice, quiet = pruned(once, out, remove).double(), pruned(once, out, silence).double()
        assert size(twice) < size(once)
        assert distance(logits(twice, images.double()), logits(quiet, images.double())) < 1e-6
    last = pruned(once, out, remove)
    program = torch.export.export(last, (images,), strict=False)
    assert distance(logits(program.module(), images), logits(last, images)) < 1e-5


def test_every_adapter_is_exercised(networks: dict[str, Any]) -> None:
    seen = set()
    for case in CASES:
        module, _ = network(case, networks)
        small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
        for root in (module, small):
            seen |= {f"{type(part).__module__}.{type(part).__qualname__}" for part in root.modules()} & set(ADAPTERS)
    assert seen == set(ADAPTERS)


def test_attention_without_its_fast_path_agrees(networks: dict[str, Any]) -> None:
    for case in ("vit_relpos", "relpos_shared", "pvt_v2", "pvt_v1", "fastvit", "t2t_vit", "twins"):
        module, images = network(case, networks)
        small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
        slow = copy.deepcopy(small)
        for part in slow.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        assert distance(logits(slow, images), logits(small, images)) < 1e-5


def test_pruned_networks_train(networks: dict[str, Any]) -> None:
    for case in ("vit_relpos", "pvt_v2", "efficientvit_msra", "edgenext", "edgevit"):
        module, images = network(case, networks)
        small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
        small.train()
        small(images).square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters() if p.requires_grad)


def test_what_stands_in_is_all_in_plain_attributes_children_and_tensors(networks: dict[str, Any]) -> None:
    """As a saved network is put together again: no constructor is called."""
    for case in ("vit_relpos", "pvt_v2", "pvt_v1", "efficientvit_msra", "edgenext", "edgevit", "fastvit", "twins"):
        module, images = network(case, networks)
        small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
        expected, found = logits(small, images), 0
        for name, part in list(small.named_modules()):
            if type(part).__module__ == "edgejoule.optimize.pruned_attention":
                parent, _, last = name.rpartition(".")
                setattr(small.get_submodule(parent), last, adopt(type(part), part))
                found += 1
        assert found
        assert torch.equal(logits(small, images), expected)


def test_the_biases_kept_from_earlier_calls_are_forgotten(networks: dict[str, Any]) -> None:
    for case in ("levit", "tiny_vit", "efficientformerv2", "efficientvit_msra"):
        module = copy.deepcopy(network(case, networks)[0])
        images = network(case, networks)[1]
        logits(module, images)  # fills the caches
        small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
        kept = [len(part.attention_bias_cache) for part in small.modules() if hasattr(part, "attention_bias_cache")]
        assert kept
        names = {group.name for group in find_heads(module)}
        assert all(not small.get_submodule(name).attention_bias_cache for name in names)


def test_the_cascade_skips_what_is_out(networks: dict[str, Any]) -> None:
    module, images = network("efficientvit_msra", networks)
    small = copy.deepcopy(module)
    group = next(group for group in find_heads(small) if group.units == 4)
    remove(small, group, [1])
    block = small.get_submodule(group.name)
    assert isinstance(block, PrunedCascade)
    assert (block.chunks, block.all_chunks, block.num_heads) == ((0, 2, 3), 4, 3)
    again = next(found for found in find_heads(small) if found.name == group.name)
    remove(small, again, [1])  # of 0, 2 and 3 it is 2
    block = small.get_submodule(group.name)
    assert (block.chunks, block.all_chunks, len(block.qkvs), len(block.dws)) == ((0, 3), 4, 2, 2)
    quiet = copy.deepcopy(module)
    silence(quiet, group, [1, 2])
    assert distance(logits(small.double(), images.double()), logits(quiet.double(), images.double())) < 1e-6


def test_a_pruned_cascade_takes_other_resolutions(networks: dict[str, Any]) -> None:
    module, _ = network("efficientvit_msra", networks)
    small = pruned(module, {group.name: dropped(group) for group in find_heads(module)}, remove)
    block = next(part for part in small.modules() if isinstance(part, PrunedCascade))
    block.set_resolution(3)
    x = torch.randn(1, block.proj[1].conv.out_channels, 3, 3)
    with torch.no_grad():
        assert block(x).shape == x.shape


def test_a_padded_norm_counts_missing_channels_as_zeros() -> None:
    norm = torch.nn.LayerNorm(6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 6)
    x[..., 4:] = 0.0
    padded = adopt(PaddedLayerNorm, norm, width=6)
    padded.weight, padded.bias = (torch.nn.Parameter(p[:4].detach()) for p in (norm.weight, norm.bias))
    assert torch.allclose(padded(x[..., :4]), norm(x)[..., :4], atol=1e-6)


def test_sums_follow_ownership(networks: dict[str, Any]) -> None:
    """Ones summed over a unit are its parameters; in a cascade too, where each head has layers of its own."""
    for case in ("vit", "levit", "efficientvit_msra", "swin"):
        module, _ = network(case, networks)
        ones = {name: torch.ones_like(p) for name, p in module.named_parameters()}
        for group in find_heads(module):
            found = sums(module, group, ones)
            assert len(found) == group.units
            assert int(found.mean()) == parameters_of(module, group)


def test_norms_over_all_heads_and_losing_all_heads_are_refused(networks: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="scale_norm"):
        find_heads(VisionTransformer(**VIT, scale_attn_norm=True))
    module, _ = network("vit", networks)
    group = find_heads(module)[0]
    with pytest.raises(ModelError, match="prune less"):
        remove(copy.deepcopy(module), group, range(group.units))
