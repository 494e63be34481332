"""Networks out of catalog rows: alive random weights, pretrained files from the hub's cache, a user's own files and code."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from edgejoule import data, registry, zoo
from edgejoule.catalog import find_model
from edgejoule.errors import ModelError, SpecError
from edgejoule.records import ModelSpec, Variant
from edgejoule.zoo import live, weights
from edgejoule.zoo.custom import CustomModel
from edgejoule.zoo.timm import TimmModel

TINY = "test_vit.r160_in1k"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and no network, whatever the machine has."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(weights, "hub_reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def tiny() -> ModelSpec:
    return find_model(f'timm(name="{TINY}")')


def photos(spec: ModelSpec, n: int = 2) -> torch.Tensor:
    """(n, C, H, W), normalised; other pieces than the ones that set the statistics."""
    crops = data.crops(f"photos(n={n}, seed=99)", spec.preprocessing)
    return torch.from_numpy(data.normalise(crops, spec.preprocessing))


@pytest.mark.parametrize(
    "name",
    [
        "levit_conv_192",
        "tiny_vit_5m",
        "efficientformerv2_s0",
        "mobilenetv4_hybrid_medium",
        "edgenext_xx_small",
        "poolformerv2_s12",
        'timm(name="hiera_tiny_224")',
        'timm(name="test_vit")',
        'timm(name="test_efficientnet")',
    ],
)
def test_random_weights_are_alive(name: str) -> None:
    spec = find_model(name)
    module = zoo.build(zoo.identify(spec, weights="random"))
    assert not module.training and {p.dtype for p in module.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = module(photos(spec))  # (2, K)
    assert logits.shape == (2, spec.num_classes) and torch.isfinite(logits).all()
    assert 0.1 < float(logits.square().mean().sqrt()) < 10
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) > 0.02
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            assert not part.training and part.momentum is not None
            assert float(part.weight.detach().abs().min()) > 0.1 and float(part.running_var.min()) > 0
    dead = [name for name, p in module.named_parameters() if p.numel() > 1 and float(p.detach().abs().max()) < 1e-4]
    assert not dead


def test_a_seed_gives_the_same_weights_and_leaves_torchs_generator_alone() -> None:
    first, same, other = (zoo.identify(tiny(), seed, "random") for seed in (3, 3, 4))
    assert first == same and first.weights_id != other.weights_id and "3" in first.weights_id and str(live.VERSION) in first.weights_id
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    states = [weights.state_sha256(zoo.build(variant)) for variant in (first, same, other)]
    assert torch.equal(torch.rand(3), expected)
    assert states[0] == states[1] != states[2]


def test_without_hub_or_cache_the_weights_are_random_or_refused() -> None:
    assert zoo.identify(tiny()).weights == "random"
    with pytest.raises(ModelError, match="go online once"):
        zoo.identify(tiny(), weights="pretrained")


def hub_cache(root: Path, state: dict[str, torch.Tensor]) -> str:
    """The layout in which huggingface_hub keeps a downloaded file: a blob by its sha256, and a link to it in a snapshot."""
    repository = root / f"models--timm--{TINY}"
    source = root / "model.safetensors"
    root.mkdir(parents=True, exist_ok=True)
    save_file(state, source)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    source.rename(repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / sha256)
    return sha256


def test_pretrained_weights_come_from_the_hubs_cache_through_timm(tmp_path: Path) -> None:
    state = zoo.build(zoo.identify(tiny(), seed=7, weights="random")).state_dict()
    sha256 = hub_cache(tmp_path / "hub", {name: tensor.contiguous() for name, tensor in state.items()})
    variant = zoo.identify(tiny())
    assert (variant.weights, variant.weights_id) == ("pretrained", sha256)
    built = zoo.build(variant).state_dict()
    assert all(torch.equal(built[name], state[name]) for name in state)
    assert zoo.identify(tiny(), weights="random").weights == "random"
    ten = zoo.build(replace(variant, spec=replace(tiny(), num_classes=10)))
    assert ten(photos(tiny())).shape == (2, 10)
    blob = next((tmp_path / "hub").rglob(f"blobs/{sha256}"))
    blob.write_bytes(blob.read_bytes()[:-4] + b"oops")
    with pytest.raises(ModelError, match="damaged"):
        zoo.build(variant)


def test_the_cache_is_found_by_its_environment_variable_and_offline_mode_asks_nobody(tmp_path: Path) -> None:
    sha256 = hub_cache(tmp_path / "hub", TimmModel(TINY).build().state_dict())
    script = """
        import socket, urllib.request
        from edgejoule import zoo
        from edgejoule.catalog import find_model
        def refuse(*a, **k): raise AssertionError("asked the network")
        urllib.request.urlopen = socket.getaddrinfo = refuse
        for name in ("test_vit.r160_in1k", "test_efficientnet.r160_in1k"):
            variant = zoo.identify(find_model(f'timm(name="{name}")'))
            print(variant.weights, variant.weights_id)
            zoo.build(variant)
    """
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == [f"pretrained {sha256}", f"random {live.identity(0)}"]


def test_an_unreachable_hub_is_given_up_quickly(tmp_path: Path) -> None:
    script = """
        import time
        from edgejoule.zoo import weights
        started = time.monotonic()
        assert not weights.hub_reachable() and not weights.hub_reachable()
        assert time.monotonic() - started < 4
    """
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True)


def test_a_users_file_is_identified_by_its_content(tmp_path: Path) -> None:
    source = zoo.build(zoo.identify(tiny(), seed=5, weights="random"))
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "mine.pth")
    save_file(state, tmp_path / "mine.safetensors")
    for name in ("mine.pth", "mine.safetensors"):
        variant = zoo.identify(tiny(), weights=str(tmp_path / name))
        assert variant.weights == "file" and variant.weights_id == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert weights.state_sha256(zoo.build(variant)) == weights.state_sha256(source)
    (tmp_path / "mine.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="has changed"):
        zoo.build(variant)
    with pytest.raises(ModelError, match="not known any more"):
        zoo.build(replace(variant, weights_id="0" * 64))


def test_a_fine_tuned_file_keeps_its_own_head(tmp_path: Path) -> None:
    ten = replace(tiny(), num_classes=10)
    source = zoo.build(zoo.identify(ten, weights="random"))
    torch.save(source.state_dict(), tmp_path / "ten.pth")
    built = zoo.build(zoo.identify(ten, weights=str(tmp_path / "ten.pth")))
    assert weights.state_sha256(built) == weights.state_sha256(source)


class Dangerous:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("pwned"),))  # type: ignore[return-value]


def test_a_file_that_is_unsafe_damaged_or_foreign_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Dangerous()}, "unsafe.pth")
    Path("damaged.safetensors").write_bytes(b"\xff" * 20)
    Path("empty.pth").write_bytes(b"")
    torch.save({"epoch": 3}, "numbers.pth")
    torch.save({"head.weight": torch.zeros(2, 2)}, "foreign.pth")
    for name in ("unsafe.pth", "damaged.safetensors", "empty.pth", "numbers.pth", "foreign.pth"):
        with pytest.raises(ModelError, match=r"expected|cannot build"):
            zoo.build(zoo.identify(tiny(), weights=name))
    assert not Path("pwned").exists()
    Path("weights.npz").write_bytes(b"")
    for name in ("weights.npz", "absent.pth", "sometimes"):
        with pytest.raises(ModelError, match="expected"):
            zoo.identify(tiny(), weights=name)


def test_a_users_own_code_keeps_its_own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_zoo_test.py").write_text(
        textwrap.dedent("""
        import torch
        def network(num_classes):
            return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, num_classes))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="num_classes"):
        CustomModel("mine_of_zoo_test:network").spec()
    spec = replace(tiny(), name="mine", builder='custom(target="mine_of_zoo_test:network")', num_classes=5)
    variant, again = zoo.identify(spec), zoo.identify(spec)
    assert variant == again and variant.weights == "file" and variant != zoo.identify(spec, seed=1)
    assert zoo.build(variant)(photos(spec)).shape == (2, 5)
    with pytest.raises(ModelError, match="other weights than before"):
        zoo.build(replace(variant, seed=1))
    torch.save(zoo.build(variant).state_dict(), tmp_path / "mine.pth")
    from_file = zoo.build(zoo.identify(spec, weights=str(tmp_path / "mine.pth")))
    assert weights.state_sha256(from_file) == weights.state_sha256(zoo.build(variant))
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="does not fit mine"):
        zoo.build(zoo.identify(spec, weights=str(tmp_path / "other.pth")))


def test_meta_networks_take_no_memory_and_leaves_refuse_nonsense() -> None:
    module = zoo.build_meta(find_model("vit_base"))
    assert all(parameter.is_meta for parameter in module.parameters()) and not module.training
    assert set(registry.names("model")) >= {"timm", "custom"}
    with pytest.raises(SpecError):
        zoo.build_meta(replace(tiny(), builder='timm(name="hf-hub:someone/else")'))
    with pytest.raises(SpecError):
        zoo.build_meta(replace(tiny(), builder='custom(target="no colon")'))


def test_a_cpu_torch_can_import_torchvision() -> None:
    script = "from edgejoule import torchvision as t; assert t.ensure() in ('native', 'shim'); import torchvision.transforms"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_twins_with_random_weights_are_two_networks() -> None:
    plain, distilled = (zoo.build(zoo.identify(find_model(name), weights="random")) for name in ("tiny_vit_5m", "tiny_vit_5m_distilled"))
    assert not torch.equal(plain.head.fc.weight, distilled.head.fc.weight)


@pytest.mark.parametrize("name", ["levit_192", "levit_conv_128s"])
def test_random_networks_are_not_chaotic(name: str) -> None:
    """Rounding alone must not change the logits: else a compiled file could not be told from a wrong one."""
    variant = zoo.identify(find_model(name), weights="random")
    module = zoo.build(variant)
    images = torch.from_numpy(data.normalise(data.crops("photos(n=8)", variant.spec.preprocessing), variant.spec.preprocessing))
    with torch.inference_mode():
        single = module(images).double()  # (B, K)
        module.train()  # LeViT keeps float32 biases between evaluations
        exact = module.eval().double()(images.double())
    assert float((single - exact).norm() / exact.norm()) < 3e-4


def test_what_a_third_partys_leaf_raises_becomes_one_models_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def build(self, num_classes: int) -> torch.nn.Module:
            raise RuntimeError("two\nlines")

    monkeypatch.setattr("edgejoule.registry.create", lambda kind, text: Broken())
    spec = find_model("vit_tiny")
    for call in (zoo.identify, zoo.build_meta, lambda one: zoo.build(Variant(one, "random", "seed0"))):
        with pytest.raises(ModelError, match="RuntimeError: two lines"):
            call(spec)
    with pytest.raises(SpecError, match="cannot describe itself"):
        find_model("custom_leaf(option=1)")
