"""Hidden neurons out of every family: what is left computes as if they were zero, exports, and can be written down."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgejoule.torchvision import ensure

ensure()
import timm  # noqa: E402
from timm.layers import ConvMlp, GluMlp, LayerNorm2d, Mlp, SwiGLU  # noqa: E402
from timm.models.efficientvit_mit import EfficientVitLarge  # noqa: E402
from timm.models.repvit import RepVit  # noqa: E402
from timm.models.swiftformer import SwiftFormer  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from edgejoule import contracts, registry, zoo  # noqa: E402
from edgejoule.architecture import described, restored, tensors_of  # noqa: E402
from edgejoule.errors import ModelError, SpecError  # noqa: E402
from edgejoule.optimize.allocation import allocate  # noqa: E402
from edgejoule.optimize.criteria import importance  # noqa: E402
from edgejoule.optimize.fuse import Fuse  # noqa: E402
from edgejoule.optimize.groups import parameters_of, remove, silence  # noqa: E402
from edgejoule.optimize.neurons import ADAPTERS, find_neurons  # noqa: E402
from edgejoule.optimize.prune_ffn import PruneFfn  # noqa: E402
from edgejoule.optimize.prune_heads import PruneHeads  # noqa: E402
from edgejoule.seams import Held, PassContext  # noqa: E402
from edgejoule.zoo.live import enliven  # noqa: E402
from tests import families  # noqa: E402

VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": families.CLASSES}
WIDE = {"num_classes": families.CLASSES}
# networks for the rows of the table that no family of the tests has
OTHERS: Mapping[str, Callable[[], Any]] = {
    "glu": lambda: VisionTransformer(mlp_layer=GluMlp, **VIT),
    "swiglu": lambda: VisionTransformer(mlp_layer=SwiGLU, **VIT),
    "efficientvit_large": lambda: EfficientVitLarge(widths=(8, 16, 24, 32, 48), depths=(1,) * 5, head_dim=8, head_widths=(64, 64), **WIDE),
    "repvit": lambda: RepVit(embed_dim=(16, 32), depth=(2, 2), **WIDE),
    "swiftformer": lambda: SwiftFormer(layers=(1, 2, 1, 1), embed_dims=(16, 24, 32, 48), mlp_ratios=2, **WIDE),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", **WIDE),
    "mobilenetv4": lambda: timm.create_model("mobilenetv4_conv_small_035", **WIDE),
    "efficientnet": lambda: timm.create_model("test_efficientnet", **WIDE),
}
FOLDED = ("levit", "tiny_vit", "efficientvit_mit", "fastvit", "efficientformerv2")


def network(name: str) -> tuple[Any, Any]:
    """A live network in eval mode and its spec."""
    if name in families.NETWORKS:
        return families.network(name)
    spec = dataclasses.replace(families.network("mobilevitv2")[1], name=name)  # 64 px, ten classes
    torch.manual_seed(0)
    module = OTHERS[name]()
    enliven(module, families.images(spec, 8), seed=0)
    return module, spec


def context(seed: int = 0, **changes: Any) -> PassContext:
    return dataclasses.replace(PassContext(fit=None, teacher=None, data=None, seed=seed, workdir=Path()), **changes)


def held(spec: Any, n: int) -> Held:
    return Held(families.images(spec, n))


def outputs(module: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = module(images.clone())
    return found


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def doubled(module: Any) -> Any:
    """In float64. Constants that were computed in float32 and kept stay: the same ones in every copy."""
    twin = copy.deepcopy(module).double()
    twin.train()
    twin.eval()
    return twin


def params(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def float64() -> Any:
    """Tensors that forwards make by themselves are float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [*families.NETWORKS, *OTHERS])
def test_what_is_left_computes_what_the_network_does_without_those_neurons(name: str) -> None:
    module, spec = network(name)
    plain, images = doubled(module), families.images(spec).double()
    groups = find_neurons(plain)
    scores = {key: values.tolist() for key, values in importance("magnitude", plain, groups).items()}
    dropped = allocate(scores, {group.name: parameters_of(plain, group) for group in groups}, 0.4)
    masked = copy.deepcopy(plain)
    for group in groups:
        silence(masked, group, dropped[group.name])
    found, same = PruneFfn(ratio=0.4, round_to=1)(plain, spec, context())
    with float64():
        before, expected, after = outputs(plain, images), outputs(masked, images), outputs(found, images)
    assert same is spec and not found.training
    assert distance(after, expected) < 1e-6 and distance(after, before) > 1e-3
    gone = sum(len(dropped[group.name]) * parameters_of(plain, group) for group in groups)
    assert params(found) == params(plain) - gone < params(plain)
    assert [group.units for group in find_neurons(found)] == [group.units - len(dropped[group.name]) for group in groups]


@pytest.mark.parametrize("name", [*families.NETWORKS, *OTHERS])
def test_the_contract_holds_and_the_network_can_be_written_down(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"prune_ffn": "edgejoule.optimize.prune_ffn:PruneFfn"})
    module, spec = network(name)
    images = families.images(spec)
    contracts.check_pass('prune_ffn(ratio=0.4, criterion="random")', module, spec, context(), images)
    once, _ = PruneFfn(ratio=0.4)(module, spec, context())
    twice, _ = PruneFfn(ratio=0.4)(once, spec, context())
    assert params(twice) < params(once) < params(module)
    again = restored(network(name)[0], described(twice, module), tensors_of(twice, module))
    assert torch.equal(outputs(again, images), outputs(twice, images))


def test_every_row_of_the_table_is_tested() -> None:
    found = set()
    for name in (*families.NETWORKS, *OTHERS):
        module, _ = network(name)
        for group in find_neurons(module):
            kind = type(module.get_submodule(group.name))
            found.add(f"{kind.__module__}.{kind.__qualname__}")
    assert found == set(ADAPTERS)


@pytest.mark.parametrize("name", FOLDED)
def test_a_network_that_was_fused_is_pruned_as_well(name: str) -> None:
    module, spec = network(name)
    fused, _ = Fuse()(module, spec, context())
    assert [group.units for group in find_neurons(fused)] == [group.units for group in find_neurons(module)]
    fused, images = doubled(fused), families.images(spec).double()
    masked, cut = copy.deepcopy(fused), copy.deepcopy(fused)
    for group in find_neurons(fused):
        dropped = range(1, group.units, 3)
        silence(masked, group, dropped)
        remove(cut, group, dropped)
    with float64():
        assert distance(outputs(cut, images), outputs(masked, images)) < 1e-6
        assert distance(outputs(cut, images), outputs(fused, images)) > 1e-3


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "hessian", "random"])
@pytest.mark.parametrize("how", ["uniform", "global"])
def test_every_criterion_and_allocation(criterion: str, how: str) -> None:
    module, spec = families.network("tiny_vit")
    call = PruneFfn(0.5, criterion, how)  # type: ignore[arg-type]
    assert call.needs == ({"calibration"} if criterion in ("taylor", "hessian") else set())
    said: list[str] = []
    pruned, _ = call(module, spec, context(data=lambda spec, n: held(spec, 8), notify=said.append))
    units = [group.units for group in find_neurons(pruned)]
    before = [group.units for group in find_neurons(module)]
    assert all(unit % 8 == 0 and unit >= old / 8 for unit, old in zip(units, before, strict=True)) and 0.5 <= sum(units) / sum(before) < 0.6
    assert (how == "uniform") == (units == [old // 2 for old in before]) and len(set(before)) > 1
    share = 100 - 100 * sum(units) / sum(before)
    assert said[-1] == f"prune_ffn: {share:.0f} % of {sum(before):,} neurons in 5 groups"


def test_the_important_neurons_stay() -> None:
    """On the network itself: without the neurons that Taylor's criterion calls idle the outputs move less than without random ones."""
    module, spec = families.network("deit")
    images = families.images(spec, 8)
    before = outputs(module, images)
    moved = {}
    for criterion in ("taylor", "hessian", "random"):
        pruned, _ = PruneFfn(0.3, criterion, round_to=1)(module, spec, context(data=held))
        moved[criterion] = distance(outputs(pruned, images), before)
    assert moved["taylor"] < moved["random"] and moved["hessian"] < moved["random"]


def test_a_ratio_of_zero_is_the_identity_and_asks_for_nothing() -> None:
    module, spec = families.network("levit")
    images = families.images(spec)
    pruned, _ = PruneFfn(0.0, "taylor")(module, spec, context())  # no data are there
    assert pruned is not module and torch.equal(outputs(pruned, images), outputs(module, images))


def test_other_seeds_are_other_networks() -> None:
    module, spec = families.network("deit")
    images = families.images(spec)
    one, other = (PruneFfn(0.5, "random")(module, spec, context(seed))[0] for seed in (0, 1))
    assert distance(outputs(one, images), outputs(other, images)) > 1e-3


class Block(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp


class SubMlp(Mlp):  # type: ignore[misc]
    """May compute anything: the table knows classes by their own names."""


@pytest.mark.parametrize(
    "mlp",
    [
        Mlp(8, 16, norm_layer=nn.LayerNorm),
        ConvMlp(8, 16, norm_layer=LayerNorm2d),
        ConvMlp(8, 16, norm_layer=lambda width, **options: nn.GroupNorm(1, width, affine=False)),
        Mlp(8, 16, act_layer=lambda: nn.PReLU(16)),
        SubMlp(8, 16),
        timm.create_model("mobilenetv3_small_050").blocks[3][0],
        timm.create_model("mobilevit_xxs").stages[0],
    ],
    ids=["norm", "conv norm", "bare norm", "activation", "subclass", "squeeze and excite", "no expansion"],
)
def test_coupled_neurons_stay(mlp: Any) -> None:
    couples = mlp if isinstance(mlp, nn.Sequential) else Block(mlp)
    found = find_neurons(couples)
    assert found == () if not isinstance(mlp, nn.Sequential) else len(found) == 1


def test_batch_norms_between_are_cut_too() -> None:
    torch.manual_seed(0)
    block = Block(ConvMlp(8, 16, norm_layer=nn.BatchNorm2d)).eval()
    (group,) = find_neurons(block)
    remove(block, group, range(0, 16, 2))
    assert block.mlp.norm.num_features == 8 and block.mlp(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)


def test_positions_are_no_features() -> None:
    module, _ = families.network("vit_relpos")
    assert [group.name for group in find_neurons(module)] == [f"blocks.{i}.mlp" for i in range(3)]


def test_what_cannot_be_pruned_is_said() -> None:
    module, spec = families.network("deit")
    with pytest.raises(ModelError, match=r"prune_ffn cannot work on tests_deit: ratio=0\.01 would drop none.*ratio=0\.06 is the lowest"):
        PruneFfn(0.01)(module, spec, context())
    assert params(PruneFfn(0.06)(module, spec, context())[0]) < params(module)
    with pytest.raises(ModelError, match="cannot shrink to a multiple of 256: lower round_to"):
        PruneFfn(0.5, round_to=256)(module, spec, context())
    with pytest.raises(ModelError, match=r"cannot work on tests_deit: criterion='taylor' needs images"):
        PruneFfn(0.5, "taylor")(module, spec, context())
    with pytest.raises(ModelError, match="no block of two or more neurons that are known to be free"):
        PruneFfn()(nn.Linear(4, 4), spec, context())


def test_options_in_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {"prune_ffn": "edgejoule.optimize.prune_ffn:PruneFfn", "prune_heads": "edgejoule.optimize.prune_heads:PruneHeads"}
    monkeypatch.setattr("edgejoule.optimize.LEAVES", leaves)
    assert registry.create("pass", "prune_ffn") == PruneFfn(0.3, "magnitude", "uniform", 8)
    assert registry.create("pass", "prune_heads") == PruneHeads(0.3, "magnitude", "uniform", 1)
    for wrong in ("prune_ffn(ratio=1)", 'prune_ffn(criterion="l1")', "prune_heads(ratio=-0.1)", "prune_heads(round_to=0)"):
        with pytest.raises(SpecError):
            registry.create("pass", wrong)


# ---------------------------------------------------------------- heads


def test_heads_leave_by_their_share_and_never_silently_none() -> None:
    from edgejoule.optimize.heads import find_heads

    module, spec = families.network("vit")  # four heads in each of three blocks
    said: list[str] = []
    pruned, same = PruneHeads(0.3)(module, spec, context(notify=said.append))
    assert (
        same is spec
        and [group.units for group in find_heads(pruned)] == [3, 3, 3]
        and said == ["prune_heads: 25 % of 12 heads in 3 groups"]
    )
    with pytest.raises(ModelError, match=r"ratio=0\.2 would drop none of the heads in its 3 groups .*has 4\): ratio=0\.25 is the lowest"):
        PruneHeads(0.2)(module, spec, context())
    with pytest.raises(ModelError, match="no block of two or more heads that are known to be free"):
        PruneHeads()(nn.Linear(4, 4), spec, context())


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "hessian", "random"])
def test_heads_by_every_criterion_as_if_they_were_silent(criterion: str) -> None:
    from edgejoule.optimize.heads import find_heads

    module, spec = families.network("vit")
    plain, images = doubled(module), families.images(spec).double()
    few = held(spec, 8)
    groups = find_heads(plain)
    scores = {key: values.tolist() for key, values in importance(criterion, plain, groups, few, 0).items()}
    dropped = allocate(scores, {group.name: parameters_of(plain, group) for group in groups}, 0.5, "global")
    masked = copy.deepcopy(plain)
    for group in groups:
        silence(masked, group, dropped[group.name])
    pruned, _ = PruneHeads(0.5, criterion, "global")(plain, spec, context(data=lambda spec, n: few))  # type: ignore[arg-type]
    after = outputs(pruned, images)
    assert distance(after, outputs(masked, images)) < 1e-6 and distance(after, outputs(plain, images)) > 1e-3
    assert sum(map(len, dropped.values())) == 6 and params(pruned) < params(plain)


def test_the_contract_holds_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"prune_heads": "edgejoule.optimize.prune_heads:PruneHeads"})
    module, spec = families.network("vit")
    contracts.check_pass('prune_heads(ratio=0.5, criterion="random")', module, spec, context(), families.images(spec))
    assert torch.equal(outputs(PruneHeads(0.0)(module, spec, context())[0], families.images(spec)), outputs(module, families.images(spec)))


def test_both_passes_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    module, spec = families.network("vit")
    pruned, _ = PruneFfn(0.5)(*PruneHeads(0.5)(module, spec, context()), context())
    base = zoo.build(zoo.identify(spec, weights="random"))
    again = restored(base, described(pruned, module), tensors_of(pruned, module))
    assert torch.equal(outputs(again, families.images(spec)), outputs(pruned, families.images(spec)))
