"""The EdgeViT paper's baselines that timm lacks: counts, timm's model API, maps for dense prediction, formulas written out, exports."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from edgejoule import contracts, data
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ModelError
from edgejoule.optimize.fuse import fused_report
from edgejoule.records import Preprocessing
from edgejoule.screen.cost import count
from edgejoule.zoo import live, pvt_v1, t2t_vit, tnt, twins, uniformer
from edgejoule.zoo.timm import TimmModel

# Name: parameters here, MACs here; parameters and GMACs of the authors' code; parts of the authors' that are built and never used.
BASELINES = {
    "t2t_vit_7": (4_310_222, 1_146_863_616, 4_310_222, 1.147, 0),
    "t2t_vit_12": (6_941_902, 1_762_638_336, 6_941_902, 1.763, 0),
    "uniformer_tiny": (3_915_028, 605_184_768, 3_917_620, 0.605, 2 * (5 * 144 + 2 * 288)),  # layer scales
    "pvt_v1_tiny": (13_229_288, 1_932_911_616, 13_229_288, 1.933, 0),
    "tnt_tiny": (6_076_408, 1_403_721_984, 6_114_040, 1.404, 196 * 192),  # a table of zeros
    "twins_svt_tiny": (4_008_304, 555_171_840, 4_092_112, 0.555, 288 * 288 + 288 + 2 * 288),  # a reduction by 1, and its norm
}
PYRAMIDS = {
    "pvt_v1_tiny": ((64, 128, 320, 512), 12_714_240),
    "uniformer_tiny": ((36, 72, 144, 288), 3_625_452),
    "twins_svt_tiny": ((36, 72, 144, 288), 3_718_728),
}
FILES = (pvt_v1, t2t_vit, tnt, twins, uniformer)


def by_name(*quick: str) -> list[object]:
    """Every baseline as a parameter; those not named here are left to the long run."""
    return [pytest.param(name, marks=[pytest.mark.study] * (name not in quick)) for name in BASELINES]


ONE_OF_EACH = by_name("t2t_vit_7", "uniformer_tiny", "pvt_v1_tiny", "tnt_tiny", "twins_svt_tiny")


def make(name: str, seed: int = 0, **options: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TimmModel(name).build(**{"num_classes": 1000, **options})


@cache
def photos(preprocessing: Preprocessing) -> torch.Tensor:
    return torch.from_numpy(data.normalise(data.crops(live.PHOTOS, preprocessing), preprocessing))


def alive(name: str) -> tuple[nn.Module, torch.Tensor]:
    module, images = make(name), photos(TimmModel(name).spec().preprocessing)
    live.enliven(module, images, seed=0)
    return module, images


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", BASELINES)
def test_counts(name: str) -> None:
    params, macs, published_params, published_gmacs, unused = BASELINES[name]
    cost = count(make(name), (3, 224, 224))
    assert (cost.params, cost.macs) == (params, macs)
    assert cost.params + unused == published_params
    assert cost.params == pytest.approx(published_params, rel=0.025)
    assert cost.macs / 1e9 == pytest.approx(published_gmacs, abs=0.0006)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_follows_timms_model_api(name: str) -> None:
    contracts.check_model(lambda classes: make(name, num_classes=classes), (3, 224, 224))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_head_and_configuration(name: str) -> None:
    module = make(name, num_classes=0, drop_rate=0.1).eval()
    assert isinstance(module.get_classifier(), nn.Identity)
    images = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        features = module.forward_features(images)
        pooled = module.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, module.num_features) == (1, module.head_hidden_size)
        assert torch.equal(module(images), pooled)
        module.reset_classifier(5, "avg")
        assert module.num_classes == 5
        assert module(images).shape == (1, 5)
    if name not in ("uniformer_tiny", "twins_svt_tiny"):
        assert relative(module.forward_head(features, pre_logits=True), features[:, 1:].mean(dim=1)) < 1e-6
    config = module.default_cfg
    assert config == module.pretrained_cfg
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 0.9, "bicubic")
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["license"] == ("bsd-3-clause-clear" if name.startswith("t2t") else "apache-2.0")
    assert not config.get("url")
    assert not config.get("hf_hub_id")
    assert set(module.no_weight_decay()) <= {parameter for parameter, _ in module.named_parameters()}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_maps_for_dense_prediction(name: str) -> None:
    channels, params = PYRAMIDS[name]
    whole = make(name).eval()
    backbone = make(name, features_only=True).eval()
    assert tuple(backbone.feature_info.channels()) == channels
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert sum(parameter.numel() for parameter in backbone.parameters()) == params
    for height, width in ((224, 224), (256, 320)):
        images = torch.rand(1, 3, height, width)
        with torch.inference_mode():
            maps = backbone(images)
            logits = whole(images)
        assert [tuple(one.shape) for one in maps] == [
            (1, c, height // s, width // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
        ]
        assert logits.shape == (1, 1000)
    with torch.inference_mode():
        some = make(name, features_only=True, out_indices=(0, 2)).eval()(images)
        end, every = whole.forward_intermediates(images, norm=False)
        assert [tuple(one.shape) for one in some] == [tuple(maps[0].shape), tuple(maps[2].shape)]
        assert torch.allclose(some[1], maps[2], atol=1e-5)
        assert torch.allclose(every[2], maps[2], atol=1e-5)
        assert torch.allclose(end, whole.forward_features(images), atol=1e-5)


def test_pvt_under_a_detector_has_no_class_token_and_the_papers_size() -> None:
    backbone = make("pvt_v1_tiny", features_only=True)
    names = [name for name, _ in backbone.named_parameters()]
    assert not [name for name in names if "cls_token" in name or "head" in name or name.startswith("model.norm")]
    pyramid = 256 * (128 + 320 + 512) + 3 * 256 + 3 * (9 * 256**2 + 256) + (9 * 512 * 256 + 256) + (9 * 256**2 + 256)
    heads = 8 * (9 * 256**2 + 256) + (9 * 256 * 720 + 720) + (9 * 256 * 36 + 36)
    total = sum(parameter.numel() for parameter in backbone.parameters()) + pyramid + heads
    assert round(total / 1e6, 1) == 23.0  # RetinaNet with PVTv1-Tiny in EdgeViT's Table 5


@pytest.mark.parametrize("name", ["t2t_vit_7", "tnt_tiny"])
def test_maps_of_one_stride(name: str) -> None:
    backbone = make(name, features_only=True, out_indices=(1, 3)).eval()
    assert len(backbone.model.blocks) == 4
    with torch.inference_mode():
        maps = backbone(torch.rand(1, 3, 224, 224))
    width = 256 if name == "t2t_vit_7" else 192
    assert [tuple(one.shape) for one in maps] == [(1, width, 14, 14)] * 2


@pytest.mark.parametrize("name", ["pvt_v1_tiny", "uniformer_tiny", "t2t_vit_7"])
def test_other_forms_of_maps_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="expected NCHW"):
        make(name).forward_intermediates(torch.rand(1, 3, 224, 224), output_fmt="NLC")


def test_t2t_is_made_for_one_image_size() -> None:
    with pytest.raises(ModelError, match="256x320, but its positions are made for 224x224: build it with img_size"):
        make("t2t_vit_7")(torch.rand(1, 3, 256, 320))
    for size in ((256, 320), (100, 71)):  # windows overlap: seven along 100 pixels, not six sixteenths
        assert make("t2t_vit_7", img_size=size).eval()(torch.rand(1, 3, *size)).shape == (1, 1000)


def test_t2t_positions_are_sinusoids_and_stay_fixed() -> None:
    table = t2t_vit.sinusoids(7, 6)
    naive = [[(math.sin, math.cos)[c % 2](p / 10000 ** (2 * (c // 2) / 6)) for c in range(6)] for p in range(7)]
    assert torch.allclose(table, torch.tensor([naive]), atol=1e-6)
    module = make("t2t_vit_7")
    fixed = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert fixed == {"pos_embed", "tokens_to_token.attention1.w", "tokens_to_token.attention2.w"}
    w = module.tokens_to_token.attention1.w
    assert torch.allclose(w @ w.T, 32 * torch.eye(32), atol=1e-4)  # orthogonal rows of length sqrt(M)


def test_performer_written_out_pair_by_pair() -> None:
    torch.manual_seed(0)
    performer = t2t_vit.Performer(147)
    query, key, value = torch.randn(3, 2, 5, 64).mul(0.3).double()  # (B, N, D)
    w = performer.double().w.detach()
    features = [
        [[[float(torch.exp(r @ x - x @ x / 2)) / math.sqrt(32) for r in w] for x in image] for image in side] for side in (query, key)
    ]
    phi_q, phi_k = torch.tensor(features, dtype=torch.float64)  # (B, N, M)
    weights = torch.einsum("bim,bjm->bij", phi_q, phi_k)  # the N x N matrix that the performer never makes
    expected = (weights / weights.sum(dim=2, keepdim=True)) @ value
    assert torch.allclose(performer.attention(query, key, value), expected, atol=1e-6)


def test_random_features_estimate_the_exponential_of_the_product() -> None:
    """Lemma 1 of the Performers paper: with normal w of unit variance, phi(q)·phi(k) comes out as exp(q·k) over many draws."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 64).mul(0.08)
    performer = t2t_vit.Performer(1)
    estimates = []
    with torch.no_grad():
        for _ in range(300):
            performer.w.normal_()
            estimates.append(float((performer._features(query) * performer._features(key)).sum()))
    assert sum(estimates) / len(estimates) == pytest.approx(float(torch.exp(query @ key.transpose(1, 2))), rel=0.03)


def test_t2t_scale_of_the_published_weights_changes_attention() -> None:
    images = torch.rand(1, 3, 224, 224)
    usual, published = make("t2t_vit_7").eval(), make("t2t_vit_7", qk_scale=256**-0.5).eval()
    assert (usual.blocks[0].attn.scale, published.blocks[0].attn.scale) == (64**-0.5, 1 / 16)
    with torch.inference_mode():
        assert relative(published(images), usual(images)) > 1e-6


def test_pvt_reduces_keys_and_values_and_not_queries() -> None:
    torch.manual_seed(0)
    attention = pvt_v1.ReducedAttention(8, heads=2, reduction=2).double()
    height, width = 4, 6
    x = torch.randn(1, height * width, 8, dtype=torch.float64)
    image = x[0].reshape(height, width, 8)
    summary = []
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            window = image[row : row + 2, column : column + 2]  # (2, 2, C)
            taps = torch.einsum("ijc,ocij->o", window, attention.sr.weight) + attention.sr.bias
            summary.append((taps - taps.mean()) / (taps.var(unbiased=False) + 1e-5).sqrt())
    source = torch.stack(summary) * attention.norm.weight + attention.norm.bias  # (6, C)
    query = x[0] @ attention.q.weight.T + attention.q.bias
    key, value = (source @ attention.kv.weight.T + attention.kv.bias).split(8, dim=1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[:, head] @ key[:, head].T / math.sqrt(4)
        heads.append(scores.softmax(dim=1) @ value[:, head])
    expected = torch.cat(heads, dim=1) @ attention.proj.weight.T + attention.proj.bias
    assert torch.allclose(attention(x, (height, width))[0], expected)
    attention.fused_attn = False
    assert torch.allclose(attention(x, (height, width))[0], expected)


def test_pvt_resamples_learned_positions_and_keeps_the_class_tokens() -> None:
    stage = make("pvt_v1_tiny").stages[3]
    with torch.no_grad():
        stage.pos_embed[0, 1:] = torch.arange(7.0).repeat_interleave(7)[:, None]  # the row's number
        stage.pos_embed[0, 0] = 99.0
        assert stage._positions((7, 7)) is stage.pos_embed
        table = stage._positions((14, 10))
    assert table.shape == (1, 1 + 14 * 10, 512)
    assert torch.all(table[0, 0] == 99.0)
    rows = table[0, 1:].reshape(14, 10, 512)
    expected = ((torch.arange(14) + 0.5) / 2 - 0.5).clamp(0, 6)  # halfway between neighbours' centres
    assert torch.allclose(rows, expected[:, None, None].expand_as(rows), atol=1e-5)


@pytest.mark.parametrize(("name", "positions"), [("uniformer_tiny", 11), ("twins_svt_tiny", 4)])
def test_fusing_the_position_convolutions_gives_the_same_logits(name: str, positions: int) -> None:
    module, images = alive(name)
    fused, told = fused_report(module, (3, 224, 224))
    with torch.inference_mode():
        assert relative(fused(images[:2]), module(images[:2])) < 1e-5
    assert told.residuals == positions


@pytest.mark.parametrize("name", ["pvt_v1_tiny", "uniformer_tiny", "t2t_vit_7"])
def test_a_pooling_that_does_not_exist_is_refused(name: str) -> None:
    """Anything unknown used to be taken for the mean."""
    with pytest.raises(ModelError, match="not by 'max'"):
        make(name, global_pool="max")
    module = make(name)
    with pytest.raises(ModelError, match="not by 'fast'"):
        module.reset_classifier(5, "fast")
    if name == "uniformer_tiny":
        with pytest.raises(ModelError, match="pool by 'avg', or ask for num_classes=0"):
            module.reset_classifier(5, "")
        module.reset_classifier(0, "")
        assert module.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 288, 2, 2)


@pytest.mark.parametrize("name", ["t2t_vit_7", "uniformer_tiny"])
def test_attention_written_out_equals_fused(name: str) -> None:
    module, images = alive(name)
    with torch.inference_mode():
        logits = module(images[:2])
        parts = [part for part in module.modules() if getattr(part, "fused_attn", False)]
        assert parts
        for part in parts:
            part.fused_attn = False
        assert relative(module(images[:2]), logits) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_drop_path_grows_over_the_blocks_and_acts_in_training_only(name: str) -> None:
    plain, dropping = make(name), make(name, drop_path_rate=0.3)
    rates = [part.drop_prob for part in dropping.modules() if type(part).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    images = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), dropping.eval()(images))
        dropping.train()
        assert not torch.equal(dropping(images), dropping(images))


@pytest.mark.parametrize("name", ["t2t_vit_7", "uniformer_tiny", "pvt_v1_tiny"])
def test_gradients_with_checkpointing_are_the_same(name: str) -> None:
    images = torch.rand(2, 3, 224, 224)
    gradients = []
    for enable in (False, True):
        module = make(name).train()
        module.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # the dropout of T2T's stem
        module(images).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert float(gradients[0].norm()) > 0
    assert relative(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("name", by_name("t2t_vit_7", "pvt_v1_tiny"))
def test_onnx_file_gives_the_same_live_logits(name: str, tmp_path: Path) -> None:
    import onnxruntime

    module, images = alive(name)
    with torch.inference_mode():
        logits = module(images[:2])
    assert float(logits.std()) > 0.5
    assert relative(logits[0], logits[1]) > 0.01  # an image changes them
    form = TorchExport(module, (1, 3, 224, 224), tmp_path, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(form.onnx, options)
    for image, expected in zip(images[:2], logits, strict=True):
        (found,) = session.run(None, {"images": image[None].numpy()})
        assert relative(torch.from_numpy(found)[0], expected) < 1e-3


def test_heads_which_no_count_sees() -> None:
    assert [stage.blocks[0].attn.heads for stage in make("pvt_v1_tiny").stages] == [1, 2, 5, 8]
    assert [stage.blocks[0].attn.num_heads for stage in make("uniformer_tiny").stages[2:]] == [4, 8]  # of 36 channels
    assert [stage[0].attn.num_heads for stage in make("twins_svt_tiny").blocks] == [2, 4, 8, 16]
    block = make("tnt_tiny").blocks[0]
    assert (block.attn_in.num_heads, block.attn_out.num_heads) == (2, 3)


def test_each_file_registers_only_its_baselines() -> None:
    registered = {name for file in FILES for name in file.__all__}
    assert registered == set(BASELINES)
