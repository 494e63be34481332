"""Exact fusion: each pattern on small random networks with its traps, then a member of every family of the catalog."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgejoule import catalog, data, zoo
from edgejoule.errors import ModelError
from edgejoule.optimize import fuse as fusing
from edgejoule.optimize.branches import PositionConv, distance
from edgejoule.optimize.folding import add_identity, takes_identity
from edgejoule.optimize.fuse import TOLERANCE, Fuse, Fused, fuse, fused_report
from edgejoule.records import ModelSpec
from edgejoule.seams import Pass, PassContext

SIZE = (4, 8, 8)
FAST = (  # one of each kind of rewrite, at their own input size
    *("levit_128s", "repvit_m0_9", "fastvit_t8", "twins_svt_small"),
    *('timm(name="efficientvit_m0.r224_in1k")', 'timm(name="edgevit_xxs")'),
)
MORE = (  # beside the catalog's families: our own architectures, and timm's with rewrites of their own
    *("edgevit_xs", "edgevit_s", "uniformer_tiny", "t2t_vit_7", "pvt_v1_tiny", "tnt_tiny", "twins_svt_tiny"),
    *("coat_tiny", "davit_tiny", "shvit_s1", "mobileone_s0", "repvgg_a0", "repghostnet_050", "ghostnetv3_100"),
)


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Norms with ordinary statistics, gains and biases; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value, low, high in (
                (part.running_mean, -0.5, 0.5),
                (part.running_var, 0.5, 2),
                (part.weight, 0.5, 1.5),
                (part.bias, -0.5, 0.5),
            ):
                if value is not None:
                    value.data.uniform_(low, high, generator=generator)
    network.eval()
    return network


class Net(nn.Module):
    """A network whose forward is given as a function of its parts and its images."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def checked(network: nn.Module, size: tuple[int, int, int] = SIZE) -> Fused:
    """What was fused; the input must be as it was, the outputs equal, and a second fusion must find nothing."""
    lively(network)
    before = copy.deepcopy(network.state_dict())
    fused, report = fused_report(network, size)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert distance(fused(images.clone()), network(images.clone())) < 1e-5
    again = fused_report(fused, size)[1]
    assert (again.norms, again.layer_scales, again.residuals, again.blocks, again.error) == (0, 0, 0, 0, 0.0)
    assert not fused.training
    return report


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


# ---------------------------------------------------------------- norms into the layer before


@settings(max_examples=12, deadline=None)
@given(
    groups=st.sampled_from((1, 2, 4)),
    wide=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    transposed=st.booleans(),
)
def test_a_norm_after_any_convolution(
    groups: int, wide: int, kernel: int, stride: int, padding: int, bias: bool, affine: bool, transposed: bool
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 4 * wide, kernel, stride, padding, groups=groups, bias=bias)
    report = checked(chain(conv, nn.BatchNorm2d(4 * wide, affine=affine), nn.ReLU()), (4, 9, 7))
    assert report.norms == 1
    assert report.left == ()


@settings(max_examples=12, deadline=None)
@given(
    groups=st.sampled_from((1, 2, 4)),
    wide=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
)
def test_a_norm_before_a_convolution_is_folded_only_where_nothing_is_padded(
    groups: int, wide: int, kernel: int, stride: int, padding: int, bias: bool
) -> None:
    conv = nn.Conv2d(4, 4 * wide, kernel, stride, padding, groups=groups, bias=bias)
    report = checked(chain(nn.ReLU(), nn.BatchNorm2d(4), conv), (4, 9, 7))
    assert report.norms == (0 if padding else 1)


def test_norms_around_linear_layers_and_their_views() -> None:
    network = Net(
        lambda n, x: n.head(n.last(n.norm(n.lin(x.flatten(2).transpose(1, 2)).flatten(0, 1)).reshape(x.shape[0], -1, 6).mean(1))),
        lin=nn.Linear(4, 6, bias=False),
        norm=nn.BatchNorm1d(6),
        last=nn.BatchNorm1d(6),
        head=nn.Linear(6, 3),
    )
    assert checked(network).norms == 2


def test_a_norm_goes_through_the_mean_and_a_pick_into_all_heads() -> None:
    def forward(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = n.norm(x)
        return n.a(n.drop(x.mean((2, 3)))), n.b(x.flatten(2)[:, :, 5])

    network = Net(forward, norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5), a=nn.Linear(4, 3), b=nn.Linear(4, 2, bias=False))
    assert checked(network).norms == 1


def test_a_norm_that_one_of_its_readers_cannot_take_stays_whole() -> None:
    def forward(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = n.norm(x)
        return n.a(x.mean((2, 3))), n.b(x.amax((2, 3)))

    assert checked(Net(forward, norm=nn.BatchNorm2d(4), a=nn.Linear(4, 3), b=nn.Linear(4, 2))).norms == 0


def test_norms_on_both_sides_of_one_layer() -> None:
    assert (
        checked(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 2, 1))).norms
        == 3
    )


def test_timms_norm_keeps_its_activation() -> None:
    from timm.layers import BatchNormAct2d

    network = chain(nn.Conv2d(4, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 2, 1))
    assert checked(network).norms == 1
    assert isinstance(fuse(network, SIZE)[1], nn.ReLU)


# ---------------------------------------------------------------- what must stay


def test_a_convolution_whose_output_is_used_twice_keeps_its_norm() -> None:
    network = Net(lambda n, x: n.norm(y := n.conv(x)) + y.relu(), conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4))
    assert checked(network).norms == 0


def test_a_shared_convolution_keeps_its_norms() -> None:
    network = Net(
        lambda n, x: n.first(n.conv(x)) + n.second(n.conv(x.relu())),
        conv=nn.Conv2d(4, 4, 1),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
    )
    assert checked(network).norms == 0


def test_tied_weights_keep_their_norms() -> None:
    network = Net(lambda n, x: n.norm(n.a(x)) + n.b(x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    network.b.weight = network.a.weight
    assert checked(network).norms == 0


def test_a_shared_norm_stays() -> None:
    network = Net(lambda n, x: n.norm(n.a(x)) + n.norm(n.b(x)), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    assert checked(network).norms == 0


def test_nothing_is_folded_through_an_activation_or_a_residual() -> None:
    assert checked(chain(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))).norms == 0
    added = Net(lambda n, x: n.conv(n.norm(x) + x), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert checked(added).norms == 0
    kept = Net(lambda n, x: (y := n.norm(x)) + n.conv(y), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert checked(kept).norms == 0
    between = Net(lambda n, x: n.norm(n.conv(x) + x), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert checked(between).norms == 0


def test_a_convolution_that_is_changed_in_place_keeps_its_norm() -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        y = n.conv(x)
        y += x
        out: Tensor = n.norm(y)
        return out

    assert checked(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))).norms == 0


def test_a_norm_that_is_an_output_stays() -> None:
    network = Net(lambda n, x: (y := n.norm(x), n.conv(y)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert checked(network).norms == 0


def test_a_norm_without_running_statistics_stays() -> None:
    assert checked(chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))).norms == 0


def test_a_view_that_mixes_channels_and_positions_stops_the_fold() -> None:
    network = Net(lambda n, x: n.norm(n.conv(x).permute(0, 2, 3, 1).reshape(-1, 4, 64)), conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm1d(4))
    assert checked(network).norms == 0


def test_a_norm_over_tokens_is_none_over_channels() -> None:
    network = Net(lambda n, x: n.norm(n.lin(x.flatten(2))), lin=nn.Linear(64, 4), norm=nn.BatchNorm1d(4))  # (B, 4 tokens, 4 channels)
    assert checked(network).norms == 0


def test_a_forward_of_ones_own_may_not_read_a_new_bias() -> None:
    class Unbiased(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight, None, self.stride, self.padding)

    assert checked(chain(Unbiased(4, 4, 1, bias=False), nn.BatchNorm2d(4))).norms == 0


def test_a_scaled_weight_is_not_the_layers_own() -> None:
    network = chain(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    lively(network)
    assert fused_report(network, SIZE)[1].norms == 0


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_a_norm_whose_statistics_another_module_reads_stays(eps: float) -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(n.conv(x), n.norm.running_mean, n.norm.running_var, n.norm.weight, n.norm.bias, eps=eps)

    assert checked(Net(forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))).left == ("norm",)


def test_a_layer_whose_weight_alone_is_read_gets_no_bias() -> None:
    network = Net(lambda n, x: n.norm(nn.functional.conv2d(x, n.conv.weight)), conv=nn.Conv2d(4, 4, 1, bias=False), norm=nn.BatchNorm2d(4))
    assert checked(network).norms == 0


def test_a_norm_with_a_hook_stays() -> None:
    network = chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    network.get_submodule("1").register_forward_hook(lambda module, args, out: 2 * out)
    assert checked(network).norms == 0


# ---------------------------------------------------------------- layer scales, residuals, branches


def test_layer_scales_go_into_the_layer_before_them() -> None:
    from timm.layers import LayerScale, LayerScale2d

    network = Net(
        lambda n, x: n.norm(n.flat(n.lin((x + n.scale(n.conv(x))).flatten(2).transpose(1, 2)))),
        conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        scale=LayerScale2d(4, 0.3),
        lin=nn.Linear(4, 6),
        flat=LayerScale(6, 0.7, inplace=True),
        norm=nn.LayerNorm(6),
    )
    report = checked(network)
    assert (report.layer_scales, report.norms) == (2, 0)
    assert fuse(network, SIZE).conv.bias is None  # a factor alone needs no bias


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_identity_in_a_kernel(groups: int) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=groups)
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = images + conv(images)
        assert takes_identity(conv)
        add_identity(conv)
        assert distance(conv(images), expected) < 1e-6
    for wrong in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 3, padding="same"), nn.Linear(4, 4)):
        assert not takes_identity(wrong)


@pytest.mark.parametrize("name", ["coat", "davit", "efficientvit_msra", "twins"])
def test_residual_convolutions_of_timm(name: str) -> None:
    from timm.models import coat, davit, efficientvit_msra, twins

    tokens = {"coat": 1, "twins": 0}
    network: nn.Module
    if name in tokens:
        part = coat.ConvPosEnc(4) if name == "coat" else twins.PosConv(4, 4)

        def forward(n: Any, x: Tensor) -> Tensor:  # the same map of 8 x 8, and a class token before it
            flat = x.flatten(2).transpose(1, 2)
            out: Tensor = n.part(torch.cat((flat[:, : tokens[name]], flat), 1), (8, 8))
            return out

        network = Net(forward, part=part)
    elif name == "davit":
        network = chain(davit.ConvPosEnc(4), davit.ConvPosEnc(4, act=True))
    else:
        network = chain(efficientvit_msra.ResidualDrop(efficientvit_msra.ConvNorm(4, 4, 3, 1, 1, groups=4)))
    assert checked(network).residuals == 1
    if name in tokens:
        assert isinstance(fuse(network, SIZE).part, PositionConv)


def test_a_stem_that_is_no_residual_stays() -> None:
    from timm.models import twins

    network = Net(lambda n, x: n.part(x.flatten(2).transpose(1, 2), (8, 8)), part=twins.PosConv(4, 4, stride=2))
    assert checked(network).residuals == 0


def test_a_rewrite_that_computes_something_else_is_not_taken() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) + self.b(x)
            return out

        def fuse(self) -> nn.Module:
            return self.a

    class Broken(Wrong):
        def fuse(self) -> nn.Module:
            raise RuntimeError("not for this one")

    class Right(Wrong):
        def fuse(self) -> nn.Module:
            with torch.no_grad():
                self.a.weight += self.b.weight
                self.a.bias += self.b.bias
            return self.a

    report = checked(chain(Wrong(), Right(), Broken()))
    assert (report.blocks, report.left) == (1, ("0", "2"))


def test_branches_of_timm_become_one_convolution() -> None:
    from timm.models import byobnet, fastvit, repvit

    for block in (
        fastvit.MobileOneBlock(4, 4, 3, num_conv_branches=2),
        repvit.RepVggDw(4, 3),
        repvit.RepVggDw(4, 3, legacy=True),
        byobnet.RepVggBlock(4, 4, 3),
    ):
        network = chain(block)
        assert checked(network).blocks == 1
        assert sum(isinstance(part, nn.Conv2d) for part in fuse(network, SIZE).modules()) == 1


# ---------------------------------------------------------------- errors, the pass, whole networks


def test_a_fusion_that_changes_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = lively(chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    monkeypatch.setattr(fusing, "fold_into_preceding", lambda layer, affine: None)
    with pytest.raises(ModelError, match=r"fusing my_net would change its outputs"):
        fused_report(network, SIZE, "my_net")


def test_networks_that_do_not_run_or_export_are_named() -> None:
    with pytest.raises(ModelError, match=r"Sequential does not run on images of shape \(2, 3, 8, 8\)"):
        fuse(lively(chain(nn.Conv2d(4, 4, 1))), (3, 8, 8))
    network = Net(lambda n, x: n.norm(x) if x.sum() > 0 else x, norm=nn.BatchNorm2d(4))
    with pytest.raises(ModelError, match=r"torch.export refuses Net"):
        fuse(lively(network), SIZE)


def test_networks_that_cannot_be_copied_or_are_too_coarse_are_named() -> None:
    network = lively(chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(ModelError, match=r"Sequential is in bfloat16, too coarse to fuse"):
        fuse(copy.deepcopy(network).bfloat16(), SIZE)
    network.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"Sequential cannot be copied \(cannot pickle"):
        fuse(network, SIZE)


def test_a_network_that_changes_its_images_is_compared_on_the_same() -> None:
    report = checked(chain(nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert report.norms == 1 and report.exact_error is None


def test_rounding_that_a_network_blows_up_itself_is_told() -> None:
    """Outputs of about 1 as the difference of two thousands: float32 keeps them to 3e-5, the fused layer to 1e-7."""

    def cancelling(forward: Any) -> nn.Module:
        network: Any = lively(Net(forward, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)))
        network.conv.bias.data.fill_(1000)
        network.norm.running_mean.fill_(1000)
        return network  # type: ignore[no-any-return]

    report = fused_report(cancelling(lambda n, x: n.norm(n.conv(x))), SIZE)[1]
    assert report.norms == 1
    assert report.exact_error is not None and report.exact_error < 1e-6 < TOLERANCE < report.error
    single = torch.eye(6)  # no parameter, no buffer: it stays float32, and float64 cannot decide
    with pytest.raises(ModelError, match="would change its outputs"):
        fuse(cancelling(lambda n, x: n.norm(n.conv(x)) @ single), SIZE)


def test_a_network_that_keeps_results_of_its_parameters_can_be_fused() -> None:
    """LeViT's attention keeps its biases between evaluations, here with their history, which torch refuses to copy."""
    from timm.models.levit import Attention

    attention = Attention(4, 2, num_heads=2, act_layer=nn.Hardswish, resolution=8, use_conv=True)
    attention(torch.zeros(1, *SIZE))
    lively(attention)  # its train() gives None
    attention(torch.zeros(1, *SIZE))
    assert next(iter(attention.attention_bias_cache.values())).grad_fn is not None
    assert checked(attention).norms == 2


def built(name: str) -> tuple[nn.Module, ModelSpec]:
    spec = catalog.find_model(name)
    return zoo.build(zoo.identify(spec, weights="random")), spec


def context(folder: Path) -> PassContext:
    return PassContext(fit=None, teacher=None, data=None, seed=0, workdir=folder)


def families() -> list[str]:
    """The smallest member of every family."""
    rows = sorted(catalog.rows(), key=lambda row: (row.published and row.published.macs_g) or 1e9, reverse=True)
    return sorted({row.family: row.name for row in rows}.values())


def photos(spec: ModelSpec) -> Tensor:
    return torch.from_numpy(data.normalise(data.crops("photos(n=2, seed=99)", spec.preprocessing), spec.preprocessing))


def check_whole(name: str, folder: Path) -> nn.Module:
    """Equal on images that the fusion did not see, in the network's own arithmetic or, where that is not exact enough, in float64."""
    network, spec = built(name)
    fused, same = Fuse()(network, spec, context(folder))
    images = photos(spec)
    with torch.no_grad():
        error = distance(fused(images), network(images))
        if error > TOLERANCE:
            error = distance(copy.deepcopy(fused).double()(images.double()), copy.deepcopy(network).double()(images.double()))
    assert error <= TOLERANCE, error
    assert same == spec
    again = fused_report(fused, spec.preprocessing.input_size, name, images)[1]
    assert (again.norms, again.layer_scales, again.residuals, again.blocks, again.error) == (0, 0, 0, 0, 0.0)
    return fused


@pytest.mark.parametrize("name", FAST)
def test_representative_networks(name: str, tmp_path: Path) -> None:
    fused = check_whole(name, tmp_path)
    assert not [part for part in fused.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.study
@pytest.mark.parametrize("name", ["levit_conv_128", "levit_conv_192"])
def test_a_network_that_blows_up_rounding_is_judged_without_rounding(name: str, tmp_path: Path) -> None:
    """With random weights these amplify rounding by five orders on noise, and by two on photographs."""
    network, spec = built(name)
    on_noise = fused_report(network, spec.preprocessing.input_size, name)[1]
    assert on_noise.exact_error is not None and on_noise.exact_error < 1e-7 < TOLERANCE < on_noise.error
    on_photos = fused_report(network, spec.preprocessing.input_size, name, photos(spec))[1]
    assert on_photos.error < 1e-4
    assert Fuse()(network, spec, context(tmp_path))[1] == spec


@pytest.mark.study
@pytest.mark.parametrize("name", [*(name for name in families() if name not in FAST), *(f'timm(name="{name}")' for name in MORE)])
def test_every_family(name: str, tmp_path: Path) -> None:
    check_whole(name, tmp_path)


def test_the_pass_is_a_pass() -> None:
    assert isinstance(Fuse(), Pass)
    assert Fuse().needs == frozenset()


@pytest.mark.parametrize("name", ['timm(name="edgevit_xxs")', 'timm(name="test_efficientnet.r160_in1k")'])
def test_a_fused_network_is_still_timms_and_runs_elsewhere(name: str, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from edgejoule.compile.export import TorchExport

    network, spec = built(name)
    fused, _ = Fuse()(network, spec, context(tmp_path))
    images = photos(spec)
    with torch.no_grad():
        expected = network(images).numpy()
    file = TorchExport(fused, (2, *spec.preprocessing.input_size), tmp_path, name).onnx
    (logits,) = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(["logits"], {"images": images.numpy()})
    assert np.linalg.norm(logits - expected) <= 2e-5 * np.linalg.norm(expected)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(file).graph.node}
    with torch.no_grad():
        parts = fused.forward_head(fused.forward_features(images))
        assert distance(parts, torch.from_numpy(expected)) < 1e-4
        fused.reset_classifier(3)
        assert fused.eval()(images).shape == (2, 3)
