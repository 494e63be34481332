"""Token merging and pruning: exact where theory says so, static, exportable, and training's masks mean what the cut does."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgejoule import contracts, registry
from edgejoule.errors import EdgejouleError, ModelError, SpecError
from edgejoule.optimize.fuse import Fuse
from edgejoule.optimize.impossible import IMPOSSIBLE
from edgejoule.optimize.merge_tokens import MergeTokens
from edgejoule.optimize.predictor import Predictor
from edgejoule.optimize.prune_tokens import PruneTokens
from edgejoule.optimize.token_attention import masked_softmax
from edgejoule.optimize.token_blocks import PruningBlock, counts
from edgejoule.seams import PassContext
from tests import families

PLAIN = ("vit", "vit_modern", "vit_pooled", "vit_relpos", "deit", "deit_distilled")
GRIDS = tuple(name for name in families.NETWORKS if name not in PLAIN)
Net = tuple[Any, Any]


@pytest.fixture(scope="module")
def networks() -> dict[str, Net]:
    return {name: families.network(name) for name in PLAIN}


def context(fit: Any = None) -> PassContext:
    return PassContext(fit=fit, teacher=None, data=None, seed=0, workdir=Path())


def unchanged_fit(network: nn.Module, spec: Any, **options: Any) -> nn.Module:
    return copy.deepcopy(network)


def answers(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def as_pass(one: Any, network: nn.Module, spec: Any, fit: Any = None) -> Any:
    changed, after = one(network, spec, context(fit))
    assert after == spec
    return changed


@pytest.mark.parametrize("name", PLAIN)
def test_identity_settings_change_no_logit(networks: dict[str, Net], name: str) -> None:
    network, spec = networks[name]
    images = families.images(spec, 3)
    for one in (MergeTokens(r=0), PruneTokens(keep=1.0), PruneTokens(keep=1.0, criterion="predictor")):
        changed = as_pass(one, network, spec)
        assert torch.allclose(answers(changed, images), answers(network, images), rtol=0, atol=1e-5)
        assert counts(changed) == counts(network)


@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos", "deit_distilled"])
@pytest.mark.parametrize("spelling", ["merge_tokens(r=3)", "prune_tokens"])
def test_the_contract_of_passes(networks: dict[str, Net], name: str, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"merge_tokens": "merge_tokens:MergeTokens", "prune_tokens": "prune_tokens:PruneTokens"}
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {key: f"edgejoule.optimize.{value}" for key, value in names.items()})
    network, spec = networks[name]
    images = families.images(spec, 2)
    contracts.check_pass(spelling, network, spec, context(), images)
    changed = as_pass(registry.create("pass", spelling), network, spec)
    assert distance(answers(changed, images), answers(network, images)) > 1e-4  # something was done
    assert {key: tuple(value.shape) for key, value in changed.state_dict().items()} == {
        key: tuple(value.shape) for key, value in network.state_dict().items()
    }


def test_counts_are_static_and_as_the_papers_say(networks: dict[str, Net]) -> None:
    network, spec = networks["vit"]
    assert counts(network) == (17, 17, 17)
    assert counts(as_pass(MergeTokens(r=3), network, spec)) == (14, 11, 8)
    assert counts(as_pass(MergeTokens(r=99), network, spec)) == (9, 5, 3)  # 16, 8, 4, 2 patch tokens
    assert counts(as_pass(PruneTokens(keep=0.7), network, spec)) == (13, 9, 9)  # ceil(11.2), ceil(7.84)
    assert counts(as_pass(PruneTokens(keep=0.5, layers=[2]), network, spec)) == (17, 9, 9)
    learned = as_pass(PruneTokens(keep=0.5, layers=(2,), criterion="predictor", epochs=1), network, spec, unchanged_fit)
    assert counts(learned) == (17, 17, 9)


@pytest.mark.parametrize("one", [MergeTokens(r=3), PruneTokens(keep=0.7)])
def test_counts_are_those_of_the_tensors(networks: dict[str, Net], one: Any) -> None:
    network, spec = networks["vit_modern"]
    changed = as_pass(one, network, spec)
    seen: list[int] = []
    for block in changed.blocks:
        block.mlp.register_forward_hook(lambda module, given, made: seen.append(made.shape[1]))
    answers(changed, families.images(spec, 1))
    expected = counts(changed)
    before = [*(19 for _ in range(1)), *expected[:-1]]
    assert tuple(seen) == (expected if isinstance(one, MergeTokens) else tuple(before))  # ToMe's MLP sees the merged tokens


def test_depth_twelve_prunes_before_blocks_3_6_9() -> None:
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(img_size=64, patch_size=8, embed_dim=16, depth=12, num_heads=2, num_classes=3).eval()
    spec = families.network("deit")[1]
    k1, k2, k3 = 1 + 45, 1 + 32, 1 + 22  # ceil(0.7 * 64), ceil(0.49 * 64), ceil(0.343 * 64)
    assert counts(as_pass(PruneTokens(), network, spec)) == (65, 65, k1, k1, k1, k2, k2, k2, k3, k3, k3, k3)
    learned = as_pass(PruneTokens(criterion="predictor", epochs=1), network, spec, unchanged_fit)
    assert counts(learned) == (65, 65, 65, k1, k1, k1, k2, k2, k2, k3, k3, k3)  # the predictor's tokens go as its block begins


def copies(network: Any) -> Tensor:
    """Images (1, 3, 32, 32) with rows of two kinds of patches by turns, eight copies each; positions are made to tell only the kind.

    Half of each row is in the set A and half in B: merging half of the tokens twice finds a copy for each.
    """
    from timm.layers import RelPosBias

    generator = torch.Generator().manual_seed(5)
    kinds = torch.randn(2, 3, 8, 8, generator=generator)
    rows = [kinds[row % 2].repeat(1, 1, 4) for row in range(4)]  # (3, 8, 32)
    if getattr(network, "pos_embed", None) is not None:
        told = torch.randn(2, network.pos_embed.shape[2], generator=generator)
        with torch.no_grad():
            network.pos_embed[:, -16:] = told[torch.arange(16) // 4 % 2]
    for block in network.blocks:
        if getattr(block.attn, "rel_pos", None) is not None:
            by_parity = torch.randn(2, 4, generator=generator) * 3  # of the rows' distance, for each head
            block.attn.rel_pos = RelPosBias((4, 4), num_heads=4)
            with torch.no_grad():
                block.attn.rel_pos.relative_position_bias_table.copy_(by_parity[torch.arange(7) % 2].repeat_interleave(7, dim=0))
    return torch.cat(rows, dim=1).unsqueeze(0)


@pytest.mark.parametrize("name", PLAIN)
def test_merging_exact_copies_changes_nothing_because_of_log_size(networks: dict[str, Net], name: str) -> None:
    network, spec = copy.deepcopy(networks[name][0]), networks[name][1]
    images = copies(network).double()
    network.double()
    network.blocks = network.blocks[:2]
    expected = answers(network, images)
    merged = as_pass(MergeTokens(r=8), network, spec)
    assert counts(merged)[1] == counts(network)[1] - 12
    assert distance(answers(merged, images), expected) < 1e-10
    if network.num_prefix_tokens:  # else either kind weighs the same, by number or by size
        careless = as_pass(MergeTokens(r=8, proportional=False), network, spec)
        assert distance(answers(careless, images), expected) > 1e-6


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("name", ["vit_pooled", "vit_relpos"])
def test_sizes_and_places_agree_and_a_mean_counts_by_size(networks: dict[str, Net], name: str, proportional: bool) -> None:
    network, spec = networks[name]
    merged = as_pass(MergeTokens(r=3, proportional=proportional), network, spec)
    x = merged.patch_embed(families.images(spec, 2))
    x = x if name == "vit_relpos" else merged._pos_embed(x)
    for block in merged.blocks[:-1]:
        x = block(x)
        assert x.sizes.sum(1).tolist() == [16.0, 16.0]
        assert torch.equal(x.sizes, nn.functional.one_hot(x.places, x.x.shape[1]).sum(1).float())
    whole = merged.blocks[-1](x)
    assert whole.shape == (2, 16, 48)
    assert [len(set(map(tuple, image.tolist()))) for image in whole] == [7, 7]  # 16 - 3 * 3 different ones


def test_relative_position_bias_of_merged_tokens_is_the_mean_of_their_pairs(networks: dict[str, Net]) -> None:
    network, spec = networks["vit_relpos"]
    merged = as_pass(MergeTokens(r=2), network, spec)
    block = merged.blocks[1]
    places = torch.arange(14).repeat(2)[:16].unsqueeze(0)  # tokens 14 and 15 went into 0 and 1
    sizes = torch.ones(1, 14)
    sizes[:, :2] = 2.0
    bias = block.attn.rel_pos.get_bias()[0]  # (h, 16, 16)
    made = block._bias(sizes, places, None)[0] - sizes.log()  # (h, 14, 14)
    members = [[0, 14], [1, 15], *([token] for token in range(2, 14))]
    for i, mine in enumerate(members):
        for j, others in enumerate(members):
            pairs = torch.stack([bias[:, a, b] for a in mine for b in others])
            assert torch.allclose(made[:, i, j], pairs.mean(0), atol=1e-6)


def test_pruned_relative_positions_are_rows_and_columns(networks: dict[str, Net]) -> None:
    network, spec = networks["vit_relpos"]
    pruned = as_pass(PruneTokens(keep=0.5, layers=[1]), network, spec)
    with torch.no_grad():
        x = network.patch_embed(families.images(spec, 2))
        state = pruned.blocks[0](x)
        whole = network.blocks[0](x)
        assert torch.allclose(state.x, whole.gather(1, state.origin.unsqueeze(-1).expand(-1, -1, 48)), atol=1e-5)
        bias = pruned.blocks[1]._bias(state, None)
        table = network.blocks[1].attn.rel_pos.get_bias()[0]
        for image, kept in enumerate(state.origin.tolist()):
            assert torch.equal(bias[image], table[:, kept][:, :, kept])


def test_attention_to_a_token_decides(networks: dict[str, Net]) -> None:
    """By hand, for the first layer that prunes: the class token's row of the softmax, mean over the heads."""
    network, spec = networks["deit"]
    pruned = as_pass(PruneTokens(keep=0.5, layers=[1]), network, spec)
    x = network._pos_embed(network.patch_embed(families.images(spec, 1)))
    block = network.blocks[0]
    query, key, _ = block.attn.qkv(block.norm1(x)).reshape(1, 17, 3, 3, 12).permute(2, 0, 3, 1, 4)
    paid = (query[:, :, :1] @ key.transpose(2, 3) * 12**-0.5).softmax(-1).mean(1)[0, 0, 1:]  # (16,)
    kept = set(paid.topk(8).indices.tolist())
    expected = block(x)[0, [0, *(1 + token for token in sorted(kept))]]
    state = pruned.blocks[0](x)
    assert torch.allclose(state.x[0].sort(0).values, expected.sort(0).values, atol=1e-5)


def built(name: str) -> Any:
    """T2T-ViT, shared positions by an MLP, Swin v2's order of norms, norm and gate after attention: for images of 32 x 32."""
    from timm.layers import Attention
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    from edgejoule.zoo.t2t_vit import T2TViT

    torch.manual_seed(0)
    plain = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    if name == "t2t":
        network = T2TViT(img_size=64, depth=3, num_classes=10)
    elif name == "shared":
        network = VisionTransformerRelPos(**plain, shared_rel_pos=True, init_values=0.5, class_token=True)
    elif name == "post_norm":
        network = VisionTransformer(**plain, block_fn=ResPostBlock, init_values=0.1)
    else:
        network = VisionTransformer(**plain, scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True)
        for block in network.blocks:
            block.attn = Attention(32, num_heads=2, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("name", ["t2t", "shared", "post_norm", "gated"])
def test_more_architectures(name: str) -> None:
    network, (_, spec) = built(name), families.network("deit")
    side = 64 if name == "t2t" else 32
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = answers(network, images)
    for none, some in ((MergeTokens(r=0), MergeTokens(r=2)), (PruneTokens(keep=1.0), PruneTokens(keep=0.7))):
        assert distance(answers(as_pass(none, network, spec), images), expected) < 1e-5
        changed = as_pass(some, network, spec)
        assert counts(changed)[-1] < counts(network)[-1]
        assert 1e-5 < distance(answers(changed, images), expected) < 10
        if name == "shared":
            torch.export.export(changed, (images,), strict=False)


@pytest.mark.parametrize("name", ["vit_modern", "vit_relpos", "shared"])
def test_with_fewer_heads_before_and_after(networks: dict[str, Net], name: str) -> None:
    """Heads 0 and 2 of the second block go: first them, then tokens, or the other way round, is one network."""
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    from edgejoule.optimize.groups import remove
    from edgejoule.optimize.heads import ADAPTERS

    network, spec = networks["vit_relpos" if name == "shared" else name]
    if name == "shared":
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 10, "rel_pos_type": "bias"}
        torch.manual_seed(0)
        network = VisionTransformerRelPos(**options, shared_rel_pos=True, qk_norm=True, init_values=0.5).eval()
        nn.init.normal_(network.shared_rel_pos.relative_position_bias_table)
    images = families.images(spec, 2)

    def fewer(whole: Any) -> Any:
        twin = copy.deepcopy(whole)
        part = twin.blocks[1].attn
        remove(twin, ADAPTERS[f"{type(part).__module__}.{type(part).__name__}"]("blocks.1.attn", part), [0, 2])
        return twin

    plain = fewer(network)
    for none, some in ((MergeTokens(r=0), MergeTokens(r=3)), (PruneTokens(keep=1.0), PruneTokens(layers=[1]))):
        assert torch.allclose(answers(as_pass(none, plain, spec), images), answers(plain, images), rtol=0, atol=1e-5)
        first, last = as_pass(some, plain, spec), fewer(as_pass(some, network, spec))
        assert distance(answers(first, images), answers(last, images)) < 1e-5
    assert distance(answers(plain, images), answers(network, images)) > 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_it_can_be_written_down_and_made_again(networks: dict[str, Net], name: str) -> None:
    from edgejoule import architecture

    network, spec = networks[name]
    images = families.images(spec, 2)
    for one in (MergeTokens(r=3), PruneTokens(keep=0.7), PruneTokens(keep=0.7, criterion="predictor", epochs=1)):
        changed = as_pass(one, network, spec, unchanged_fit)
        fresh = families.network(name)[0]
        told, tensors = architecture.described(changed, fresh), architecture.tensors_of(changed, fresh)
        again = architecture.restored(fresh, told, tensors)
        assert torch.equal(answers(again, images), answers(changed, images))
        assert counts(again) == counts(changed)


@pytest.mark.parametrize("one", [MergeTokens(r=3), PruneTokens(keep=0.7)])
def test_before_and_after_fuse(networks: dict[str, Net], one: Any) -> None:
    network, spec = networks["vit_modern"]
    images = families.images(spec, 2)
    expected = answers(as_pass(one, network, spec), images)
    fused = Fuse()(network, spec, context())[0]
    assert distance(answers(as_pass(one, fused, spec), images), expected) < 1e-4
    assert distance(answers(Fuse()(as_pass(one, network, spec), spec, context())[0], images), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "one", "batch"),
    [("vit", MergeTokens(r=3), 1), ("vit_relpos", MergeTokens(r=3), 3), ("vit_modern", PruneTokens(), 1), ("vit_relpos", PruneTokens(), 3)],
    ids=["merge-1", "merge_relpos-3", "prune-1", "prune_relpos-3"],
)
def test_the_same_answers_in_runtimes(networks: dict[str, Net], name: str, one: Any, batch: int, tmp_path: Path) -> None:
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    from edgejoule.compile.export import TorchExport

    network, spec = networks[name]
    changed = as_pass(one, network, spec)
    images = families.images(spec, batch)
    expected = answers(changed, images)
    path = TorchExport(changed, tuple(images.shape), tmp_path).onnx
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert distance(found, expected) < 1e-4
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert distance(torch.from_numpy(np.array(compiled([images.numpy()])[0])), expected) < 1e-4


@dataclasses.dataclass
class Steps:
    """A fit that is five steps of Adam on random images, as the training loop asks: begin_step, forward, penalty."""

    steps: int = 5
    lr: float = 0.02
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)
    penalties: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, module: nn.Module, spec: Any, **options: Any) -> nn.Module:
        self.seen = options
        network = copy.deepcopy(module).train()
        torch.manual_seed(1)
        images = torch.randn(8, *spec.preprocessing.input_size)
        optimiser = torch.optim.Adam([p for name, p in network.named_parameters() if "predictor" in name], lr=self.lr)
        for step in range(self.steps):
            for part in network.modules():
                if hasattr(part, "begin_step"):
                    part.begin_step(step, self.steps)
            network(images)
            asked = [part.penalty() for part in network.modules() if hasattr(part, "penalty")]
            loss = torch.stack([found for found in asked if found is not None]).sum()
            self.penalties.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return network.eval()


def ratio_loss(network: nn.Module, images: Tensor) -> float:
    """Mean over draws; leaves the network in eval mode."""
    network.train()
    torch.manual_seed(7)
    total = 0.0
    with torch.no_grad():
        for _ in range(20):
            network(images)
            total += sum(float(part.penalty()) for part in network.modules() if isinstance(part, Predictor))
    network.eval()
    return total / 20


@pytest.mark.parametrize("name", ["vit", "vit_relpos"])
def test_a_predictor_learns_the_ratio(networks: dict[str, Net], name: str) -> None:
    network, spec = networks[name]
    images = families.images(spec, 4)
    one = PruneTokens(keep=0.9, criterion="predictor", epochs=2)
    assert one.needs == {"training", "teacher"}
    fresh, fit = as_pass(one, network, spec, unchanged_fit), Steps()
    trained = as_pass(one, network, spec, fit)
    assert fit.seen == {"epochs": 2, "distill": "soft(alpha=0.5)"}
    assert ratio_loss(trained, images) < 0.7 * ratio_loss(fresh, images)
    assert counts(trained) == counts(fresh)
    assert not any(part.training for part in trained.modules())
    assert torch.equal(answers(trained, images), answers(as_pass(one, network, spec, Steps()), images))  # and the same again
    assert all(part.penalty() is None for part in trained.modules() if isinstance(part, Predictor))


def test_gradients_reach_the_predictor_through_attention_alone(networks: dict[str, Net]) -> None:
    network, spec = networks["deit_distilled"]
    made = as_pass(PruneTokens(criterion="predictor", epochs=1), network, spec, unchanged_fit).train()
    torch.manual_seed(0)
    made(families.images(spec, 2)).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for name, p in made.named_parameters() if "predictor" in name)


def test_a_predictor_sees_only_the_living_and_its_penalty_is_the_papers() -> None:
    torch.manual_seed(0)
    predictor = Predictor(8, share=0.5, parts=3).double()
    for parameter in predictor.parameters():
        nn.init.normal_(parameter)
    patches = torch.randn(2, 6, 8, dtype=torch.float64)
    alive = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]).double()
    for image in range(2):
        living = alive[image].bool()
        masked, cut = predictor(patches, alive)[image, living], predictor(patches[image : image + 1, living])[0]
        assert torch.allclose(masked, cut)
        assert not torch.allclose(cut, predictor(patches)[image, living])  # the dead would have had a say
    for _ in range(5):
        decided = predictor.decide(patches, alive)
        assert not decided[alive == 0].any()
        assert set(decided.flatten().tolist()) <= {0.0, 1.0}
        penalty = predictor.penalty()
        assert penalty is not None
        assert penalty.item() == pytest.approx(2.0 / 3 * sum((row.mean().item() - 0.5) ** 2 for row in decided) / 2)
        assert predictor.penalty() is None  # asked once
    predictor.decide(patches, alive)
    assert predictor.eval().penalty() is None  # nothing of a forward that nobody asked about is left


@pytest.mark.parametrize("name", PLAIN)
def test_masks_in_training_are_the_cut_in_eval(networks: dict[str, Net], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tokens kept, the network that masks them gives the logits of the one that lacks them."""
    network, spec = copy.deepcopy(networks[name][0]).double(), networks[name][1]  # no rounding that could swap near equal scores
    images = families.images(spec, 3).double()
    made = as_pass(PruneTokens(keep=0.6, criterion="predictor", epochs=1), network, spec, unchanged_fit).double()
    stages = [block for block in made.blocks if isinstance(block, PruningBlock) and block.predictor is not None]
    keep = [count - made.num_prefix_tokens for count in counts(made)][-len(stages) :]
    assert len(set(keep)) == len(stages)  # every stage drops some
    alive: list[Tensor] = []

    def the_best(chances: Tensor, hard: bool, dim: int) -> Tensor:
        """Keeps as many of the living as eval does."""
        scores = chances[..., 0] if not alive else chances[..., 0].masked_fill(alive[-1] == 0, -torch.inf)
        mask = torch.zeros_like(scores).scatter(1, scores.topk(keep[len(alive)], dim=1).indices, 1.0)
        alive.append(mask)
        return torch.stack([mask, 1 - mask], dim=-1)

    expected = answers(made, images)
    made.train()
    for part in made.modules():
        if isinstance(part, nn.Dropout):  # timm's relative positions by an MLP have some
            part.eval()
    monkeypatch.setattr("edgejoule.optimize.predictor.functional.gumbel_softmax", the_best)
    found = answers(made, images)
    assert [int(mask.sum(1)[0]) for mask in alive] == keep
    assert distance(found, expected) < 1e-10
    assert distance(found, answers(network, images)) > 1e-3


def test_masked_softmax_is_softmax_over_the_living_and_oneself() -> None:
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 30
    alive = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    found = masked_softmax(logits, alive)
    for token in range(4):
        seen = sorted({0, 2, token})
        expected = torch.zeros(2, 4)
        expected[:, seen] = logits[0, :, token, seen].softmax(-1)
        assert torch.allclose(found[0, :, token], expected, atol=1e-6)


def test_the_dead_are_told_what_their_coming_alive_would_change() -> None:
    """Also where they are all that anyone would look at: the formula's own derivative would be 1e20 there."""
    draw = torch.Generator().manual_seed(0)
    logits, values, wanted = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((1, 2, 4, 4), (1, 2, 4, 3), (1, 2, 4, 3))
    )
    logits[..., 1] += 50
    alive = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)

    def gain(alive: torch.Tensor) -> torch.Tensor:
        return (wanted * (masked_softmax(logits, alive) @ values)).sum()

    gain(alive).backward()
    assert alive.grad is not None
    for dead in (1, 3):
        revived = alive.detach().clone()
        revived[0, dead] = 1.0
        assert alive.grad[0, dead].item() == pytest.approx((gain(revived) - gain(alive)).item(), rel=1e-9)
    shares = masked_softmax(logits, alive).detach()
    for token in (0, 2):  # the formula's own: share (value - output), from every token but itself
        moved = shares[..., token, None] * (values[:, :, None, token] - shares @ values)
        moved[:, :, token] = 0.0
        assert alive.grad[0, token].item() == pytest.approx((wanted * moved).sum().item(), rel=1e-9)


def test_epochs_also_train_what_attention_left(networks: dict[str, Net]) -> None:
    network, spec = networks["deit"]
    asked: list[dict[str, Any]] = []

    def fit(module: nn.Module, spec: Any, **options: Any) -> nn.Module:
        asked.append(options)
        return module

    one = PruneTokens(epochs=0.5)
    assert one.needs == {"training", "teacher"}
    assert PruneTokens().needs == MergeTokens().needs == frozenset()
    as_pass(one, network, spec, fit)
    assert asked == [{"epochs": 0.5, "distill": "soft(alpha=0.5)"}]
    with pytest.raises(SpecError, match="epochs=0"):
        as_pass(one, network, spec)


@pytest.mark.parametrize("name", GRIDS)
def test_networks_on_a_grid_are_refused_with_the_reason(name: str) -> None:
    network, spec = families.network(name)
    for one, own in ((MergeTokens(), "merge_tokens"), (PruneTokens(), "prune_tokens")):
        with pytest.raises(ModelError) as caught:
            as_pass(one, network, spec)
        assert any(why in str(caught.value) for why in IMPOSSIBLE[own].values())


def test_other_blocks_and_a_second_reduction_are_refused(networks: dict[str, Net]) -> None:
    from timm.models.vision_transformer import DiffAttention, ParallelScalingBlock, ParallelThingsBlock, VisionTransformer

    _, spec = networks["deit"]
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    for options in ({"block_fn": ParallelScalingBlock}, {"block_fn": ParallelThingsBlock}, {"attn_layer": DiffAttention}):
        with pytest.raises(ModelError, match="leave it out"):
            as_pass(MergeTokens(), VisionTransformer(**size, **options), spec)
    once = as_pass(MergeTokens(), *networks["deit"])
    with pytest.raises(ModelError, match="fewer already"):
        as_pass(PruneTokens(), once, spec)
    with pytest.raises(ModelError, match=r"expected some of 1 to 1"):
        as_pass(PruneTokens(layers=[0]), *networks["deit"])


@pytest.mark.parametrize(
    "spelling",
    [
        *("merge_tokens(r=-1)", "merge_tokens(r=2.5)", "merge_tokens(r=True)", "merge_tokens(proportional=1)"),
        *("prune_tokens(keep=0)", "prune_tokens(keep=1.5)", 'prune_tokens(criterion="norm")', "prune_tokens(epochs=-1)"),
        *("prune_tokens(layers=3)", "prune_tokens(layers=[])", "prune_tokens(layers=[2, 1])", 'prune_tokens(layers="1")'),
        'prune_tokens(criterion="predictor")',
    ],
)
def test_bad_options_say_what_is_expected(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"merge_tokens": "merge_tokens:MergeTokens", "prune_tokens": "prune_tokens:PruneTokens"}
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {key: f"edgejoule.optimize.{value}" for key, value in names.items()})
    with pytest.raises(EdgejouleError, match=r"expected|epochs"):
        registry.create("pass", spelling)
    assert registry.create("pass", "prune_tokens(layers=[1, 2])").layers == (1, 2)
