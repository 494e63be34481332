"""Recipes: read, refused, applied in order, carried through compiling and studies, and their errors one model's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edgejoule import compiling, optimizing, zoo
from edgejoule.bench import Bench
from edgejoule.compile.build import build_key
from edgejoule.errors import ModelError, SpecError, StudyError, UnknownNameError
from edgejoule.optimize import recipe
from edgejoule.records import Artifact, Failure
from edgejoule.seams import PassContext
from edgejoule.study_file import MeasurePlan, OptimizePlan, parse_study

STUDY = """
[study]
name = "recipes"
[screen]
models = ['timm(name="test_vit")']
[optimize]
recipes = ["", "double(times=2) | double"]
"""


@dataclass(frozen=True)
class Double:
    """Multiplies the head's weights by two to the ``times``."""

    times: int = 1
    needs: frozenset[str] = frozenset()

    def __call__(self, module: Any, spec: Any, context: PassContext) -> tuple[Any, Any]:
        import copy

        twin = copy.deepcopy(module)
        for parameter in twin.get_classifier().parameters():
            parameter.data.mul_(2.0**self.times)
        return twin, spec


@dataclass(frozen=True)
class Trained:
    """Asks for what no verb provides yet."""

    needs: frozenset[str] = frozenset({"training"})

    def __call__(self, module: Any, spec: Any, context: PassContext) -> tuple[Any, Any]:
        return module, spec


@dataclass(frozen=True)
class Broken:
    """Raises what no pass should, or gives another input size."""

    resize: bool = False
    needs: frozenset[str] = frozenset()

    def __call__(self, module: Any, spec: Any, context: PassContext) -> tuple[Any, Any]:
        if not self.resize:
            raise KeyError("weight")
        import copy

        other = dataclasses.replace(spec.preprocessing, input_size=(3, 96, 96))
        return copy.deepcopy(module), dataclasses.replace(spec, preprocessing=other)


@dataclass(frozen=True)
class Anything:
    """Takes the place of a pass where only its name counts."""

    px: int = 0
    needs: frozenset[str] = frozenset()


@pytest.fixture(autouse=True)
def three_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {cls.__name__.lower(): f"{__name__}:{cls.__name__}" for cls in (Double, Trained, Broken)}
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"fuse": "edgejoule.optimize.fuse:Fuse"} | ours)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_passes_run_in_order_on_a_copy(tmp_path: Path) -> None:
    spec = zoo.spec_of_timm("test_vit")
    module = zoo.build(zoo.identify(spec, weights="random"))
    context = PassContext(None, None, None, 0, tmp_path)
    with torch.inference_mode():
        before = module(images())
        changed, _ = recipe.apply("double(times=2) | double", module, spec, context)
        assert torch.allclose(changed(images()), 8 * before, rtol=1e-5)
        assert torch.equal(module(images()), before)
    assert recipe.apply("", module, spec, context)[0] is module


def test_what_cannot_be_done_is_said_before_any_work() -> None:
    with pytest.raises(UnknownNameError, match="no pass is called 'fues': did you mean fuse"):
        optimizing.check(["fues"], OptimizePlan())
    with pytest.raises(SpecError, match="the pass trained needs training"):
        optimizing.check(["double | trained"], OptimizePlan())
    with pytest.raises(SpecError, match="times"):
        optimizing.check(["double(times='a')"], OptimizePlan())
    with pytest.raises(StudyError, match=r"s.toml, line 7, optimize.recipes: cannot read"):
        parse_study(STUDY.replace("| double", "| 3"), "s.toml")
    with pytest.raises(StudyError, match="at least one recipe"):
        parse_study(STUDY.replace('["", "double(times=2) | double"]', "[]"), "s.toml")


def test_a_recipe_is_part_of_the_artifact(tmp_path: Path) -> None:
    study = parse_study(STUDY, "s.toml")
    spec = zoo.spec_of_timm("test_vit")
    made = []
    for text in study.optimize.recipes:
        made += list(compiling.compile_model(spec, ["onnxruntime"], MeasurePlan(), "random", Bench(cache=tmp_path), text))
    plain, doubled = made
    assert isinstance(plain, Artifact) and isinstance(doubled, Artifact)
    assert plain.sha256 != doubled.sha256 and plain.variant.recipe == ""
    assert doubled.variant.label == "test_vit.r160_in1k | double(times=2) | double"
    assert doubled.parity is not None and doubled.parity.max_rel < 1e-4 and plain.parity is not None
    assert doubled.parity.reference_rms == pytest.approx(8 * plain.parity.reference_rms, rel=1e-4)
    keys = [build_key(dataclasses.replace(plain.variant, recipe=text), "onnxruntime", 1, {}) for text in ("double", "double( )", "")]
    assert keys[0] == keys[1] != keys[2]


def test_a_pass_that_fails_is_one_models_failure(tmp_path: Path) -> None:
    spec = zoo.spec_of_timm("test_vit")
    (failure,) = compiling.compile_model(spec, ["onnxruntime"], MeasurePlan(), "random", Bench(cache=tmp_path), "broken( )")
    assert isinstance(failure, Failure) and "raised KeyError" in failure.reason and failure.variant.endswith("| broken")
    with pytest.raises(ModelError, match="raised KeyError"):
        optimizing.network(dataclasses.replace(zoo.identify(spec, weights="random"), recipe="broken"), Bench())


def test_a_pass_may_give_the_network_other_images(tmp_path: Path) -> None:
    spec = zoo.spec_of_timm("test_efficientnet")
    (artifact,) = compiling.compile_model(spec, ["onnxruntime"], MeasurePlan(), "random", Bench(cache=tmp_path), "broken(resize=True)")
    assert isinstance(artifact, Artifact) and artifact.variant.spec.preprocessing.input_size == (3, 96, 96)
    assert artifact.info.inputs[0].shape == (1, 3, 96, 96) and artifact.variant.spec.published is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qat | fuse", "put qat last"),
        ("merge_tokens | resize(px=64)", "resize first"),
        ("prune_weights | prune_ffn", "prune structures first"),
        ("merge_tokens | prune_tokens", "one or the other"),
    ],
)
def test_orders_that_make_no_sense_are_refused_with_the_reason(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("qat", "merge_tokens", "prune_tokens", "prune_weights", "prune_ffn", "resize")
    monkeypatch.setattr(
        "edgejoule.optimize.LEAVES", {"fuse": "edgejoule.optimize.fuse:Fuse"} | dict.fromkeys(names, f"{__name__}:Anything")
    )
    with pytest.raises(SpecError, match=f"cannot follow .*{said}"):
        recipe.check(text)
