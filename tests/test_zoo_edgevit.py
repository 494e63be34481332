"""EdgeViT: sizes, names and numbers of the released code, timm's API, odd input sizes, ablations, the complexity formula."""

from __future__ import annotations

import copy
import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgejoule import contracts, data, records, torchvision, zoo
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ModelError
from edgejoule.screen.cost import count
from edgejoule.zoo import edgevit_complexity, live
from edgejoule.zoo.edgevit import ConditionalPosition, EdgeViT, Parts
from edgejoule.zoo.edgevit_ablations import ABLATIONS
from edgejoule.zoo.edgevit_released import load_released_weights, our_name, released_name
from edgejoule.zoo.edgevit_variants import VARIANTS

torchvision.ensure()
import timm  # noqa: E402

TABLES = Path(__file__).parent / "data"
SIZE = (3, 224, 224)
# params and MACs: counted by others on the released code (paper variants: on that code with the paper's depths)
RELEASED = {
    "edgevit_xxs": (4_067_704, 551_262_816),
    "edgevit_xs": (6_770_056, 1_127_815_200),
    "edgevit_s": (13_108_168, 1_911_021_792),
    "edgevit_xs_paper": (7_262_680, 990_340_800),
    "edgevit_s_paper": (8_758_504, 1_369_920_672),
}
ABLATED = {
    "edgevit_xxs_no_la": (3_355_444, 339_413_472),
    "edgevit_xxs_no_la_05g": (3_943_180, 507_572_064),
    "edgevit_xxs_lsa": (4_192_120, 610_448_544),  # the authors' own file for this row: 4.19 M, 0.610 G
    "edgevit_xxs_center": (4_067_704, 551_262_816),
    "edgevit_xxs_avg": (4_067_704, 551_262_816),
    "edgevit_xxs_max": (4_067_704, 551_262_816),
    "edgevit_xxs_no_lp": (4_063_492, 631_320_192),
    "edgevit_xxs_no_lp_05g": (4_063_492, 579_627_936),
    "edgevit_xxs_bilinear": (4_064_572, 551_008_800),
}


def tiny(**options: Any) -> EdgeViT:
    """Every kind of part, in a fraction of a second: stages of rates 4, 2, 2 and 1."""
    torch.manual_seed(0)
    return EdgeViT(**{"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "heads": (1, 2, 3, 4), "num_classes": 5, **options}).eval()


def alive(model: nn.Module) -> nn.Module:
    """Every weight and statistic at an ordinary value, drawn afresh."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1:
                centre = 1.0 if name.endswith(("weight", "running_var")) else 0.0
                tensor.copy_(centre + torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=generator))
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel() if "propagate" not in name else 1
                tensor.normal_(0.0, fan_in**-0.5, generator=generator)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Sizes and names


@pytest.mark.parametrize(("name", "params", "macs"), [(name, *both) for name, both in {**RELEASED, **ABLATED}.items()])
def test_parameters_and_macs(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cost = count(model, SIZE)
    assert (cost.params, cost.macs) == (params, macs)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    assert count(model, SIZE).macs == macs


def test_every_name_is_tested_and_the_rescaled_ones_are_of_the_released_size() -> None:
    assert set(RELEASED) == set(VARIANTS) and set(ABLATED) == set(ABLATIONS)
    for name, (_, macs) in ABLATED.items():
        if f"{name}_05g" not in ABLATED:
            assert 0.50e9 <= macs <= 0.611e9, name


def test_heads_change_no_parameters() -> None:
    with torch.device("meta"):
        assert count(timm.create_model("edgevit_xs", heads=(1, 2, 4, 8)), SIZE).params == RELEASED["edgevit_xs"][0]


def released_table(name: str) -> dict[str, tuple[int, ...]]:
    with (TABLES / f"{name}_state_dict.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return {row["name"]: () if row["shape"] == "scalar" else tuple(map(int, row["shape"].split("x"))) for row in rows}


@pytest.mark.parametrize("name", ["edgevit_xxs", "edgevit_xs", "edgevit_s"])
def test_every_released_tensor_has_one_partner_of_its_shape(name: str) -> None:
    table = released_table(name)
    with torch.device("meta"):
        ours = {key: tuple(tensor.shape) for key, tensor in timm.create_model(name).state_dict().items()}
    assert {our_name(key): shape for key, shape in table.items()} == ours
    assert {released_name(key): shape for key, shape in ours.items()} == table


def test_configuration_says_how_images_are_prepared() -> None:
    spec = zoo.spec_of_timm("edgevit_s")
    assert spec.preprocessing == records.Preprocessing(
        SIZE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation="bicubic", crop_pct=0.875
    )
    assert (spec.family, spec.licence) == ("edgevit", "apache-2.0")


# Released checkpoints


def checkpoint(name: str = "edgevit_xxs") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, shape in released_table(name).items():
        is_count = key.endswith("num_batches_tracked")
        state[key] = torch.tensor(7) if is_count else 0.5 + torch.rand(shape, generator=generator) / (10 if len(shape) > 1 else 1)
    return state


@pytest.mark.parametrize("form", ["plain.pth", "model.pth", "state.safetensors"])
def test_a_released_checkpoint_goes_in(form: str, tmp_path: Path) -> None:
    state, path = checkpoint(), tmp_path / form
    if form.endswith("safetensors"):
        from safetensors.torch import save_file

        save_file(state, path)
    else:  # training writes an averaged copy beside the model; the released evaluation does not use it
        average = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        torch.save({"model": state, "model_ema": average, "epoch": 3} if form == "model.pth" else state, path)
    model = timm.create_model("edgevit_xxs").eval()
    before = model(images(1, 3, 32, 32))
    load_released_weights(model, path)
    assert not torch.equal(model(images(1, 3, 32, 32)), before)
    assert {released_name(key): tensor for key, tensor in model.state_dict().items()}.keys() == state.keys()
    assert all(torch.equal(tensor, state[released_name(key)]) for key, tensor in model.state_dict().items())


def test_a_weights_file_in_released_names_loads_by_name_of_the_network(tmp_path: Path) -> None:
    torch.save(checkpoint(), path := tmp_path / "weights.pth")
    module = zoo.build(zoo.identify(zoo.spec_of_timm("edgevit_xxs"), weights=str(path)))
    directly = timm.create_model("edgevit_xxs")
    load_released_weights(directly, path)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), directly.state_dict().values(), strict=True))


def test_a_checkpoint_that_does_not_fit_names_every_key(tmp_path: Path) -> None:
    state = checkpoint()
    gone = ["blocks1.0.LocalAgg.attn.weight", "blocks3.2.SelfAttn.attn.LocalProp.bias", "patch_embed2.norm.bias"]
    for key in gone:
        del state[key]
    state["blocks3.3.SelfAttn.norm1.weight"] = torch.ones(144)
    state["pos_embed"] = torch.ones(1)
    state["head.weight"] = torch.ones(10, 288)
    torch.save(state, path := tmp_path / "weights.pth")
    model = timm.create_model("edgevit_xxs")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError) as caught:
        load_released_weights(model, path)
    for key in (*gone, "blocks3.3.SelfAttn.norm1.weight", "pos_embed", "head.weight (10, 288) instead of (1000, 288)"):
        assert key in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_one_wrong_key_is_enough(tmp_path: Path) -> None:
    whole = checkpoint()
    wrong = {
        "missing: head.bias": {key: tensor for key, tensor in whole.items() if key != "head.bias"},
        "unexpected: more.bias": {**whole, "more.bias": torch.ones(1)},
        "mis-shaped: norm.bias": {**whole, "norm.bias": torch.ones(1)},
    }
    model = timm.create_model("edgevit_xxs")
    for says, state in wrong.items():
        torch.save(state, path := tmp_path / "weights.pth")
        with pytest.raises(ModelError, match=says):
            load_released_weights(model, path)


def test_files_and_models_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (bad := tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    (damaged := tmp_path / "bad.safetensors").write_bytes(b"not a safe one, and long enough")
    torch.save(tiny(), code := tmp_path / "code.pth")
    torch.save({"model": {"epoch": 3}}, empty := tmp_path / "empty.pth")
    for path, says in (
        (bad, "cannot read"),
        (damaged, "cannot read"),
        (code, "cannot read"),
        (empty, "state dictionary"),
        (tmp_path / "none.pth", "no weights file"),
    ):
        with pytest.raises(ModelError, match=says):
            load_released_weights(tiny(), path)
    with pytest.raises(ModelError, match="Linear"):
        load_released_weights(nn.Linear(1, 1), bad)
    fused = tiny()
    fused.stages[0].blocks[0].sparse.position.fuse()
    with pytest.raises(ModelError, match="then fuse"):
        load_released_weights(fused, bad)


# Numbers


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def batch_norm(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """x: (B, C, H, W)."""
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def depth_wise(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """Sum over the taps of shifted images, zeros beyond the border. x: (B, C, H, W)."""
    kernel, (height, width) = conv.weight.shape[-1], x.shape[-2:]
    reach = kernel // 2
    wide = torch.zeros(*x.shape[:2], height + 2 * reach, width + 2 * reach)
    wide[:, :, reach : reach + height, reach : reach + width] = x
    out = torch.zeros_like(x) + conv.bias[:, None, None]
    for i in range(kernel):
        for j in range(kernel):
            out = out + conv.weight[:, 0, i, j, None, None] * wide[:, :, i : i + height, j : j + width]
    return out


def linear(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A linear layer, or a 1x1 convolution, on the last axis."""
    return x @ layer.weight.reshape(layer.weight.shape[0], -1).T + layer.bias


def feed_forward(x: torch.Tensor, mlp: nn.Module) -> torch.Tensor:
    hidden = linear(x, mlp.fc1)
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), mlp.fc2)


def naive_block(x: torch.Tensor, block: nn.Module, rate: int, heads: int) -> torch.Tensor:
    """The facts of the released block, step by step: (B, C, H, W), sides multiples of the rate."""
    local, sparse = block.local, block.sparse
    last, first = (0, 2, 3, 1), (0, 3, 1, 2)
    x = x + depth_wise(x, local.position.conv)
    y = linear(batch_norm(x, local.norm1).permute(last), local.pw1).permute(first)
    x = x + linear(depth_wise(y, local.dw).permute(last), local.pw2).permute(first)
    x = x + feed_forward(batch_norm(x, local.norm2).permute(last), local.mlp).permute(first)
    x = (x + depth_wise(x, sparse.position.conv)).permute(last)  # (B, H, W, C)
    dim = x.shape[-1]
    picked = layer_norm(x, sparse.attn.norm, 1e-6)[:, ::rate, ::rate]  # all tokens normalised, the top-left ones picked
    q, k, v = linear(picked, sparse.attn.qkv).flatten(1, 2).split(dim, dim=-1)  # each (B, n, C)
    mixed = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(dim // heads)).exp()
        mixed[..., part] = scores / scores.sum(-1, keepdim=True) @ v[..., part]
    mixed = mixed.reshape(picked.shape)
    spread = torch.zeros_like(x)
    for i in range(rate):
        for j in range(rate):  # every delegate writes its window, each position with its own weight
            spread[:, i::rate, j::rate] = mixed * sparse.attn.propagate.conv.weight[:, 0, i, j] + sparse.attn.propagate.conv.bias
    x = x + linear(layer_norm(spread, sparse.attn.propagate.norm, 1e-5), sparse.attn.proj)
    x = x + feed_forward(layer_norm(x, sparse.norm2, 1e-6), sparse.mlp)
    return x.permute(first)


@pytest.mark.parametrize(("stage", "rate", "heads"), [(0, 4, 1), (2, 2, 3)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_computes_what_the_facts_say(stage: int, rate: int, heads: int, fused: bool) -> None:
    block = alive(tiny()).stages[stage].blocks[0]
    block.sparse.attn.fused_attn = fused
    x = images(2, (8, 16, 24)[stage], 8, 12)  # (B, C, H, W)
    with torch.no_grad():
        assert far(block(x), naive_block(x, block, rate, heads)) < 1e-5


def test_the_whole_is_its_parts() -> None:
    model = alive(tiny())
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        y = x
        for stage, patch in zip(model.stages, (4, 2, 2, 2), strict=True):
            b, c, h, w = y.shape
            patches = y.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, C p p)
            y = layer_norm(linear(patches, stage.patch_embed.proj), stage.patch_embed.norm, 1e-5).permute(0, 3, 1, 2)
            y = stage.blocks(y)
        pooled = batch_norm(y, model.norm).mean((2, 3))
        assert far(model(x), linear(pooled, model.head)) < 1e-5
    eps = {
        (type(part).__name__, name.split(".")[-2], part.eps) for name, part in model.named_modules() if hasattr(part, "eps") and "." in name
    }
    assert eps == {
        *(("LayerNorm", owner, 1e-5) for owner in ("patch_embed", "propagate")),
        *(("LayerNorm", owner, 1e-6) for owner in ("attn", "sparse")),
        ("BatchNorm2d", "local", 1e-5),
    }
    last = model.stages[3].blocks[0]
    assert isinstance(last.local, nn.Identity) and last.sparse.attn.propagate is None


def test_drop_path_rises_linearly_and_spares_the_positions() -> None:
    model = timm.create_model("edgevit_xxs", drop_path_rate=0.12)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [{round(part.drop_prob, 6) for part in block.modules() if type(part).__name__ == "DropPath"} for block in blocks]
    assert rates == [set(), {0.02}, {0.04}, {0.06}, {0.08}, {0.1}, {0.12}]
    assert blocks[3].local.drop_path is not None and type(blocks[6].local) is nn.Identity


def test_initialisation() -> None:
    model = timm.create_model("edgevit_s")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(0.018 < float(m.weight.detach().std()) < 0.022 and not m.bias.any() for m in linears)
    convolution = model.stages[2].blocks[0].local.pw1  # torch's default draw: uniform within 1 / sqrt(fan-in)
    assert float(convolution.weight.detach().abs().max()) == pytest.approx(240**-0.5, rel=0.01)


def test_fusing_the_positions_changes_nothing() -> None:
    model = alive(tiny())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        fused = copy.deepcopy(model)
        for part in fused.modules():
            if isinstance(part, ConditionalPosition):
                assert part.fuse().fuse() is part
        assert far(fused(x), before) < 1e-5
        assert torch.equal(model(x), before)
        part = model.stages[0].blocks[0].local.position
        assert far(copy.deepcopy(part).fuse()(images(1, 8, 5, 7)), images(1, 8, 5, 7) + part.conv(images(1, 8, 5, 7))) < 1e-6


# timm's API


def test_the_model_contract() -> None:
    contracts.check_model(lambda classes: timm.create_model("edgevit_xxs", num_classes=classes), SIZE)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (512, 512), (225, 190)])
def test_features(height: int, width: int) -> None:
    model = timm.create_model("edgevit_xxs", features_only=True, out_indices=(0, 2, 3)).eval()
    assert model.feature_info.channels() == [36, 144, 288] and model.feature_info.reduction() == [4, 16, 32]
    with torch.no_grad():
        maps = model(images(1, 3, height, width))
    sides = [(math.ceil(height / r), math.ceil(width / r)) for r in (4, 16, 32)]
    assert [tuple(m.shape) for m in maps] == [(1, c, *side) for c, side in zip((36, 144, 288), sides, strict=True)]


def test_intermediates_are_the_features() -> None:
    model = alive(tiny())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
        assert torch.equal(final, model.forward_features(x)) and torch.equal(maps[-1], final) and len(maps) == 4
        short = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(short, maps[:2], strict=True))
        with pytest.raises(ModelError, match="NCHW"):
            model.forward_intermediates(x, output_fmt="NLC")
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
        assert torch.equal(pruned(x), maps[1]) and pruned.num_features == 16
        getter = timm.create_model("edgevit_xxs", features_only=True, feature_cls="getter", out_indices=(1, 2)).eval()
        assert [m.shape[1] for m in getter(images(1, 3, 64, 64))] == [72, 144]


def test_heads_and_pooling() -> None:
    model = tiny(in_chans=4, drop_rate=0.5)
    x = images(2, 4, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
        assert model.get_classifier() is model.head and model.num_classes == 5
        model.reset_classifier(3, "")
        assert tuple(model(x).shape) == (2, 3, 2, 2)
        assert torch.allclose(model(x).mean((2, 3)), model.head(features.mean((2, 3))), atol=1e-5)
        model.reset_classifier(0, "avg")
        assert torch.equal(model(x), features.mean((2, 3))) and isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ModelError, match="pools"):
        model.reset_classifier(3, "max")
    assert model.no_weight_decay() == set()


def test_layer_groups_cover_every_parameter() -> None:
    model = tiny()
    for coarse in (False, True):
        groups = model.group_matcher(coarse)
        patterns = [groups["stem"]] + ([groups["blocks"]] if coarse else [pattern for pattern, _ in groups["blocks"]])
        rest = [name for name, _ in model.named_parameters() if not any(re.match(pattern, name) for pattern in patterns)]
        assert {name.partition(".")[0] for name in rest} == ({"norm", "head"} if coarse else {"head"})
    from timm.models import group_parameters

    assert len(group_parameters(model, model.group_matcher())) > 5


def test_checkpointing_gives_the_same_gradients() -> None:
    plain = alive(tiny(drop_path_rate=0.3)).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        torch.manual_seed(5)
        model(images(2, 3, 64, 64)).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


VARIED = [
    {},
    {"local": "lsa"},
    {"local": "none", "propagate": "bilinear"},
    {"delegate": "avg", "propagate": "none"},
    {"delegate": "center"},
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_trace_and_compile() -> None:
    model = alive(tiny(depths=(1, 1, 1, 1)))
    x = images(2, 3, 72, 64)
    with torch.no_grad():
        wanted = model(x)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=8)},)).module()
        assert far(exported(x), wanted) < 1e-6
        assert tuple(exported(images(3, 3, 72, 64)).shape) == (3, 5)
        assert far(torch.jit.trace(model, x, check_trace=False)(x), wanted) < 1e-6
        torch._dynamo.reset()
        assert far(torch.compile(model, backend="eager", fullgraph=True)(x), wanted) < 1e-6


NAMES = ("edgevit_xxs", "edgevit_xs", "edgevit_s")  # the others are long: make test-all


@pytest.mark.parametrize("name", [name if name in NAMES else pytest.param(name, marks=pytest.mark.study) for name in (*RELEASED, *ABLATED)])
def test_backends_compute_the_same(name: str, tmp_path: Path) -> None:
    module = zoo.build(zoo.identify(zoo.spec_of_timm(name), weights="random"))
    export = TorchExport(module, (2, *SIZE), tmp_path / "export")
    for spelling in ("onnxruntime", "openvino"):
        (tmp_path / spelling).mkdir()
        contracts.check_backend(spelling, export, (2, *SIZE), images(2, *SIZE).numpy(), tmp_path / spelling)


# Any size, and ablations


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (31, 30), (1, 1), (224, 192)])
@pytest.mark.parametrize("options", [*VARIED, {"delegate": "max"}], ids=str)
def test_any_size_works_and_both_ways_of_attention_agree(size: tuple[int, int], options: dict[str, Any]) -> None:
    model = alive(tiny(**options))
    x = images(2, 3, *size)
    with torch.no_grad():
        logits = model(x)
        for part in model.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        assert bool(logits.isfinite().all()) and far(model(x), logits) < 1e-5
        assert far(model(x[:1]), logits[:1]) < 1e-5


def test_padding_is_to_the_right_and_below() -> None:
    """An image one row short of a patch gives what the same image with that row in zeros gives, in the first stage."""
    model = alive(tiny())
    x = images(1, 3, 63, 62)
    whole = nn.functional.pad(x, (0, 2, 0, 1))
    with torch.no_grad():
        assert torch.equal(model.stages[0](x), model.stages[0](whole))


@pytest.mark.parametrize("delegate", ["top_left", "center", "avg", "max"])
@pytest.mark.parametrize("propagate", ["deconv", "bilinear", "none"])
def test_delegates_and_propagation(delegate: str, propagate: str) -> None:
    """Against a direct definition, window by window, with windows that the border cuts off."""
    model = alive(tiny(delegate=delegate, propagate=propagate))
    attn = model.stages[0].blocks[0].sparse.attn
    x = images(1, 8, 6, 9)  # rate 4: windows of 4 and 2 rows, of 4, 4 and 1 columns
    rows, columns = [(0, 4), (4, 6)], [(0, 4), (4, 8), (8, 9)]
    with torch.no_grad():
        tokens = layer_norm(x.permute(0, 2, 3, 1), attn.norm, 1e-6)[0]  # (H, W, C)
        picked = []
        for top, bottom in rows:
            for left, right in columns:
                window = tokens[top:bottom, left:right].reshape(-1, 8)
                middle = tokens[min(top + 2, 5), min(left + 2, 8)]
                picked.append({"top_left": window[0], "center": middle, "avg": window.mean(0), "max": window.amax(0)}[delegate])
        delegates = torch.stack(picked)  # (6, C)
        if propagate == "none":
            q, (k, v) = linear(tokens.reshape(-1, 8), attn.q), linear(delegates, attn.kv).split(8, dim=-1)
        else:
            q, k, v = linear(delegates, attn.qkv).split(8, dim=-1)
        out = (q @ k.T / math.sqrt(8)).softmax(-1) @ v
        if propagate == "deconv":
            taps = attn.propagate.conv.weight[:, 0]  # (C, 4, 4)
            spread = torch.stack([out[i // 4 * 3 + j // 4] * taps[:, i % 4, j % 4] for i in range(6) for j in range(9)])
            out = layer_norm(spread + attn.propagate.conv.bias, attn.propagate.norm, 1e-5)
        elif propagate == "bilinear":

            def at(i: int, j: int) -> torch.Tensor:
                y, x = min(max((i + 0.5) / 4 - 0.5, 0), 1), min(max((j + 0.5) / 4 - 0.5, 0), 2)
                top, left = min(int(y), 0), min(int(x), 1)
                corners = [(top + a, left + b, (1 - abs(y - top - a)) * (1 - abs(x - left - b))) for a in (0, 1) for b in (0, 1)]
                return sum((out[r * 3 + c] * share for r, c, share in corners), torch.zeros(8))

            spread = torch.stack([at(i, j) for i in range(6) for j in range(9)])
            out = layer_norm(spread, attn.propagate.norm, 1e-5)
        assert far(attn(x)[0], linear(out, attn.proj)) < 1e-5


def test_window_attention_stays_in_its_window() -> None:
    attn = alive(tiny(local="lsa")).stages[0].blocks[0].local.attn
    x = images(2, 8, 9, 15)  # windows of 7 and 2 rows, of 7, 7 and 1 columns
    with torch.no_grad():
        tokens = layer_norm(x.permute(0, 2, 3, 1), attn.norm, 1e-6)
        wanted = torch.zeros_like(tokens)
        for top in (0, 7):
            for left in (0, 7, 14):
                part = tokens[:, top : top + 7, left : left + 7]
                q, k, v = linear(part.flatten(1, 2), attn.qkv).split(8, dim=-1)
                out = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v
                wanted[:, top : top + 7, left : left + 7] = linear(out, attn.proj).reshape(part.shape)
        assert far(attn(x).reshape(wanted.shape), wanted) < 1e-5


def test_options_that_make_no_network_are_refused() -> None:
    for options, says in (
        ({"local": "mlp"}, "conv, lsa, none"),
        ({"delegate": "mean"}, "delegate='mean'"),
        ({"propagate": "nearest"}, "bilinear"),
        ({"window": 0}, "window"),
        ({"depths": (1, 1, 1)}, "four"),
        ({"heads": (1, 2, 5, 4)}, "multiples"),
    ):
        with pytest.raises(ModelError, match=says):
            tiny(**options)
    assert Parts() == Parts("conv", "top_left", "deconv", 7)


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_come_alive(name: str) -> None:
    module = timm.create_model(name, num_classes=10)
    prep = zoo.spec_of_timm(name).preprocessing
    x = torch.from_numpy(data.normalise(data.crops("photos(n=8)", prep), prep))[:, :, :96, :100].contiguous()
    live.enliven(module, x, seed=1)
    with torch.no_grad():
        logits = module(x)
    assert bool(logits.isfinite().all()) and float(logits.std(0).mean()) > 1e-3


# The formula of the appendix


@pytest.mark.parametrize("size", [(224, 224), (230, 197)])
@pytest.mark.parametrize("name", ["edgevit_xxs", "edgevit_s", *ABLATIONS])
def test_counted_spatial_macs_are_those_of_the_real_modules(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found: dict[tuple[int, str], int] = {}
    where: list[tuple[int, str]] = []

    def note(index: int, name: str) -> Any:
        def before(part: nn.Module, inputs: Any) -> None:
            where.append((index, "attention" if name.endswith("sparse.attn") else "local"))

        return before

    def add(key: tuple[int, str], macs: int) -> None:
        found[key] = found.get(key, 0) + macs

    def convolved(index: int, term: str) -> Any:
        def after(part: Any, inputs: Any, output: torch.Tensor) -> None:
            positions = inputs[0] if isinstance(part, nn.ConvTranspose2d) else output
            add((index, term), positions.numel() * part.weight[0].numel())

        return after

    attention = nn.functional.scaled_dot_product_attention

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        add(where[-1], q.numel() * k.shape[-2] * 2)
        return attention(q, k, v, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counting)
    for index, stage in enumerate(model.stages):
        for part_name, part in stage.blocks.named_modules():
            if part_name.endswith(".attn"):
                part.register_forward_pre_hook(note(index, part_name))
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) and part.groups > 1:
                term = "positions" if "position" in part_name else "local" if part_name.endswith("dw") else "propagation"
                part.register_forward_hook(convolved(index, term))
    model(torch.empty(1, 3, *size, device="meta"))
    for row in edgevit_complexity.spatial_macs_counted(name, size):
        for term in ("positions", "local", "attention", "propagation"):
            assert getattr(row, term) == found.get((row.stage - 1, term), 0), (row.stage, term)


def test_the_formula_and_its_explanation() -> None:
    terms = edgevit_complexity.spatial_macs(56, 56, 36, rate=4)
    assert terms.local == 9 * 3136 * 36 and terms.attention == 2 * 196**2 * 36 and terms.propagation == 16 * 3136 * 36
    assert terms.full_attention == 2 * 3136**2 * 36 and terms.total == terms.local + terms.attention + terms.propagation
    rows = {row.term.partition(",")[0]: row for row in edgevit_complexity.explain("edgevit_xxs")}
    assert rows["attention between delegates"].counted == rows["attention between delegates"].formula
    assert "5 x 5" in rows["local aggregation"].why and "r^2 times less" in rows["local propagation"].why
    assert rows["local propagation"].counted == 112_896 + 56_448 + 3 * 28_224
    assert rows["all spatial operations"].counted == sum(s.total for s in edgevit_complexity.spatial_macs_counted("edgevit_xxs"))
    assert all(row.why for name in ABLATIONS for row in edgevit_complexity.explain(name))
    with pytest.raises(ModelError, match="at least 1"):
        edgevit_complexity.spatial_macs(56, 56, 36, rate=0)
    with pytest.raises(ModelError, match="edgevit_xs_paper"):
        edgevit_complexity.explain("edgevit_m")
    with pytest.raises(ModelError, match="Linear"):
        edgevit_complexity.spatial_macs_counted(nn.Linear(1, 1))
