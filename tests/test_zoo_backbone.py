"""The leaf backbone(name, size): which maps, refusals, weights random and from a file, the catalog's rows, and the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgejoule import compiling, zoo
from edgejoule.bench import Bench
from edgejoule.catalog import find_model, rows
from edgejoule.errors import ModelError, SpecError, UnknownNameError
from edgejoule.records import Artifact
from edgejoule.registry import create
from edgejoule.screen.cost import count
from edgejoule.study_file import MeasurePlan
from edgejoule.zoo import live
from edgejoule.zoo.backbone import Backbone, PooledMaps
from edgejoule.zoo.timm import TimmModel

ROWS = [spec.name for spec in rows() if spec.name.endswith(("_coco", "_ade20k"))]
CHANNELS = {
    "edgevit_xxs": (36, 72, 144, 288),
    "pvt_v1_tiny": (64, 128, 320, 512),
    "resnet18": (64, 128, 256, 512),  # its stem has a map too, at stride 2: not one of the four
    "resnet18_v1c": (64, 128, 256, 512),
    "mobilenetv2_100": (24, 32, 96, 320),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),  # made for one image size; channels last
}


def test_the_tables_have_their_rows() -> None:
    assert len(ROWS) == 14


@pytest.mark.parametrize("name", CHANNELS)
def test_the_result_is_the_mean_of_each_of_four_maps(name: str) -> None:
    leaf = Backbone(name, 64)
    module = leaf.build().eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        maps, averages = module.maps(images), module(images)
    assert [tuple(one.shape) for one in maps] == [(2, c, 64 // s, 64 // s) for c, s in zip(CHANNELS[name], (4, 8, 16, 32), strict=True)]
    expected = torch.cat([one.flatten(2).sum(2) / one[0, 0].numel() for one in maps], 1)
    torch.testing.assert_close(averages, expected, rtol=1e-4, atol=1e-5)
    assert leaf.spec().num_classes == sum(CHANNELS[name]) == averages.shape[1]
    assert not [path for path, _ in module.named_parameters() if "head" in path or path.endswith("fc.weight")]


def test_the_spec_prepares_images_as_the_network_does_but_for_their_size() -> None:
    spec, whole = Backbone("edgevit_s", 320).spec(), zoo.spec_of_timm("edgevit_s")
    assert (spec.name, spec.family, spec.dataset, spec.licence) == ("edgevit_s@320", "backbone", "unknown", "apache-2.0")
    assert spec.preprocessing.input_size == (3, 320, 320) and spec.preprocessing.crop_pct == 1.0
    assert (spec.preprocessing.mean, spec.preprocessing.std) == (whole.preprocessing.mean, whole.preprocessing.std)
    assert create("model", spec.builder) == Backbone("edgevit_s", 320)
    assert find_model(spec.builder).builder == spec.builder


def test_names_and_sizes_that_do_not_fit_are_refused() -> None:
    for ask in (Backbone.build, Backbone.spec, Backbone.config):
        with pytest.raises(UnknownNameError, match="did you mean edgevit_xxs"):
            ask(Backbone("edgevit_xxxs", 64))
    for size in (31, 4097, 0, -5):
        with pytest.raises(SpecError, match="expected 32 to 4096 pixels"):
            create("model", f'backbone(name="edgevit_xxs", size={size})')
    for name in ("vit_tiny_patch16_224", "t2t_vit_7"):
        with pytest.raises(ModelError, match="at strides 16; expected 4, 8, 16 and 32"):
            Backbone(name, 64).build()
    assert Backbone("edgevit_xxs", 33).build().eval()(torch.rand(1, 3, 33, 33)).shape == (1, 540)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_catalog_is_as_large_as_it_says(name: str) -> None:
    spec = find_model(name)
    assert spec.preprocessing.input_size == (3, *([800] * 2 if name.endswith("_coco") else [512] * 2))
    assert create("model", spec.builder).spec().num_classes == spec.num_classes
    cost = count(zoo.build_meta(spec), spec.preprocessing.input_size)
    assert cost.params / 1e6 == pytest.approx(spec.published.params_m, abs=0.006)
    assert cost.macs / 1e9 == pytest.approx(spec.published.macs_g, abs=0.006)


# Weights


@pytest.mark.parametrize("name", ["edgevit_xxs", "pvt_v2_b0"])
def test_live_weights_make_every_map_depend_on_the_image(name: str) -> None:
    module = zoo.build(zoo.identify(Backbone(name, 64).spec(), weights="random"))
    assert not module.training
    with torch.inference_mode():
        for one in module.maps(torch.randn(2, 3, 64, 64)):
            assert one.isfinite().all()
            assert float((one[0] - one[1]).norm() / one.norm()) > 0.01


def test_no_layer_inside_is_taken_for_a_head() -> None:
    """PVTv2-B0's maps have 512 channels together, and so has the layer of its last keys and values."""
    module = Backbone("pvt_v2_b0", 64).build()
    wide = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == 512]
    before = [part.weight.clone() for part in wide]
    assert before
    live.enliven(module, torch.randn(8, 3, 64, 64), seed=0)
    assert all(torch.equal(part.weight, old) for part, old in zip(wide, before, strict=True))


def saved(name: str, path: Path, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = TimmModel(name).build(**options).state_dict()
    torch.save(state, path)
    return state


@pytest.mark.parametrize("name", ["edgevit_xxs", "pvt_v2_b0", "pvt_v1_tiny"])
def test_a_file_of_the_whole_network_fills_the_part(name: str, tmp_path: Path) -> None:
    state = saved(name, tmp_path / "whole.pth")
    variant = zoo.identify(Backbone(name, 64).spec(), weights=str(tmp_path / "whole.pth"))
    module = zoo.build(variant)
    assert variant.weights == "file" and isinstance(module, PooledMaps)
    whole = TimmModel(name).build().eval()
    whole.load_state_dict(state)
    if name == "pvt_v1_tiny":
        whole.stages[3].drop_class_token()  # dense prediction has none
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = whole.forward_intermediates(images, intermediates_only=True)
        for found, map_ in zip(module.maps(images), expected, strict=True):
            torch.testing.assert_close(found, map_)


def test_a_file_without_the_classifier_will_do(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in saved("edgevit_xxs", tmp_path / "w.pth").items() if not key.startswith(("head", "norm"))}
    torch.save(state, tmp_path / "w.pth")
    module = zoo.build(zoo.identify(Backbone("edgevit_xxs", 64).spec(), weights=str(tmp_path / "w.pth")))
    assert torch.equal(next(module.parameters()), state["stages.0.patch_embed.norm.weight"])


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """timm fills part of a network with what fits and says nothing of the rest, which would stay random under the file's name."""
    path, spec = tmp_path / "w.pth", Backbone("edgevit_xxs", 64).spec()
    state = saved("edgevit_xxs", path)
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("stages.3.blocks.1")}, path)
    with pytest.raises(ModelError, match=r"lacks \d+ of the tensors of edgevit_xxs, such as stages_3.blocks.1"):
        zoo.build(zoo.identify(spec, weights=str(path)))
    torch.save({"a.weight": torch.ones(3)}, path)
    with pytest.raises(ModelError, match="expected its own, with or without a classifier"):
        zoo.build(zoo.identify(spec, weights=str(path)))
    saved("edgevit_xs", path)
    with pytest.raises(ModelError, match="edgevit_xxs"):
        zoo.build(zoo.identify(spec, weights=str(path)))


def test_weights_of_the_plain_resnet_are_not_offered_for_the_deep_stem() -> None:
    assert "hf_hub_id" in TimmModel("resnet18").config()
    assert "hf_hub_id" not in Backbone("resnet18_v1c", 64).config()
    assert zoo.identify(Backbone("resnet18_v1c", 64).spec()).weights == "random"


# The pipeline


def test_a_backbone_goes_through_the_pipeline(tmp_path: Path) -> None:
    plan = MeasurePlan(threads=1)
    spec = find_model('backbone(name="edgevit_xxs", size=64)')
    (made,) = compiling.compile_model(spec, ["onnxruntime"], plan, "random", Bench(cache=tmp_path))
    assert isinstance(made, Artifact), made
    assert made.variant.spec.name == "edgevit_xxs@64"
    assert made.parity is not None and made.parity.max_rel < 1e-3
