"""The joint of optimising and its verb: recipes that learn, the cache, what is saved, what is refused, and that nothing is made twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgejoule import optimizing, teaching, zoo
from edgejoule.bench import Bench
from edgejoule.catalog import find_model
from edgejoule.errors import DataError, ModelError, OutputError, SpecError, TrainingError, UnknownNameError
from edgejoule.optimize import recipe as recipes
from edgejoule.records import Variant
from edgejoule.seams import PassContext
from edgejoule.study_file import OptimizePlan, parse_study
from edgejoule.train.recovery import keep_zeros
from edgejoule.trained import write_weights

MODEL = 'timm(name="vit_digits")'
SHORT = OptimizePlan(data="digits", train="digits(batch=64)")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights, as training leaves it: random ones, which for these tests are as good."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    spec = replace(find_model(MODEL), dataset="digits", published=None)
    write_weights(zoo.build(zoo.identify(spec, weights="random")), path, spec)
    return str(path)


def made(recipe: str, weights: str, cache: Path, plan: OptimizePlan = SHORT, **options: Any) -> Variant:
    return optimizing.optimize(find_model(MODEL), weights, recipe, plan, Bench(cache=cache, **options))


def test_a_recipe_that_learns_is_made_once_and_the_same_again_elsewhere(weights: str, tmp_path: Path) -> None:
    said: list[str] = []
    first = made("finetune(epochs=0.2)", weights, tmp_path / "a", notify=lambda event: said.append(event.text))
    assert first.optimized and first.spec.published is None and any("0.2 epochs of digits" in line for line in said)
    said.clear()
    assert made("finetune( epochs = 0.2 )", weights, tmp_path / "a", notify=lambda event: said.append(event.text)) == first and not said
    again = made("finetune(epochs=0.2)", weights, tmp_path / "b")
    one, other = (optimizing.network(first, Bench(cache=tmp_path / name)) for name in "ab")
    plain = zoo.build(zoo.identify(find_model(MODEL), weights=weights))
    assert again.optimized == first.optimized
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.head.weight, plain.head.weight)
    assert not list((tmp_path / "a" / "optimized").glob(".*.work"))


def test_what_decides_a_network_decides_its_key(weights: str, tmp_path: Path) -> None:
    keys = {made("finetune(epochs=0)", weights, tmp_path, plan).optimized for plan in (SHORT, replace(SHORT, train="digits(batch=32)"))}
    keys.add(made("finetune(epochs=0, lr=0.1)", weights, tmp_path).optimized)
    keys.add(made("finetune(epochs=0)", weights, tmp_path, seed=1).optimized)
    assert len(keys) == 4


def test_a_teacher_is_the_network_that_the_recipe_began_with(weights: str, tmp_path: Path) -> None:
    found = made("finetune(epochs=0) | distill(epochs=0.1)", weights, tmp_path)
    assert len(list((tmp_path / "optimized").glob("[!.]*"))) == 2  # what recipes begin with is kept for others
    assert found.label == "vit_digits | finetune(epochs=0) | distill(epochs=0.1)"
    with pytest.raises(TrainingError, match="random weights, which teach nothing"):
        made("distill(epochs=0.1)", "random", tmp_path)


@pytest.mark.parametrize("recipe", ["distill(epochs=0.05)", "prune_tokens(epochs=0.05)", "qat(distill='soft', epochs=0.05)"])
def test_the_teacher_decides_the_key_of_whatever_learns_from_it(recipe: str, weights: str, tmp_path: Path) -> None:
    taught = replace(SHORT, teacher=MODEL, trained=((MODEL, weights),))
    assert made(recipe, weights, tmp_path).optimized != made(recipe, weights, tmp_path, taught).optimized
    with pytest.raises(UnknownNameError, match="nobody"):
        optimizing.check([recipe], replace(SHORT, teacher="nobody"))


def test_a_trained_teacher_is_known_by_its_name(weights: str) -> None:
    text = "soft(alpha=0.5, teacher='timm(name=\"vit_digits\")')"
    known = [('timm(name="levit_digits")', "no.safetensors"), (MODEL, weights)]
    assert repr(weights) in teaching.with_teacher(text, "", known) and teaching.with_teacher(text, "", known[:1]) == text
    assert teaching.teacher_id(teaching.with_teacher(text, "", known)) == zoo.identify(find_model(MODEL), 0, weights).weights_id
    assert teaching.teacher_id("soft(alpha=0.5)") == ""
    assert teaching.with_teacher("soft(alpha=0.5)", MODEL, ()) == text


def test_what_a_recipe_lacks_is_said_before_any_work(weights: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no labelled data"):
        made("finetune", weights, tmp_path, OptimizePlan())
    with pytest.raises(SpecError, match="is for detection"):
        optimizing.check(["finetune"], replace(SHORT, train="dense_1x"))
    with pytest.raises(DataError, match="train it on this data first"):
        optimizing.optimize(find_model("edgevit_xxs"), "random", "finetune", SHORT, Bench(cache=tmp_path))
    with pytest.raises(SpecError, match="epochs=-1"):
        optimizing.check(["finetune(epochs=-1)"], SHORT)


def test_a_killed_run_goes_on_from_its_checkpoint(weights: str, tmp_path: Path) -> None:
    """The recipe is killed while it trains; made again it gives what an undisturbed run gives, bit for bit."""
    killing = (
        "import os, signal\nfrom edgejoule.train import loop, run\nkept = run.keep\n"
        "def keep(parts, progress):\n    kept(parts, progress)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "run.keep = loop.keep = keep\n"
    )
    script = (
        "import sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"  # sums of two threads' parts may be rounded otherwise
        "from edgejoule import optimizing\nfrom edgejoule.bench import Bench\nfrom edgejoule.catalog import find_model\n"
        "from edgejoule.study_file import OptimizePlan\n"
        "plan, bench = OptimizePlan(data='digits', train='digits(batch=64)'), Bench(cache=Path(sys.argv[3]))\n"
        "made = optimizing.optimize(find_model(sys.argv[1]), sys.argv[2], 'finetune(epochs=1.5)', plan, bench)\n"
        "optimizing.save(made, Path(sys.argv[4]), bench)\n"
    )

    def ran(code: str, cache: str, out: str) -> int:
        words = [sys.executable, "-c", code, MODEL, weights, str(tmp_path / cache), str(tmp_path / out)]
        return subprocess.run(words, capture_output=True, check=False).returncode

    assert ran(killing + script, "killed", "none") == -9
    (left,) = (tmp_path / "killed" / "optimized").glob(".*.work/fit-1/checkpoint.pt")
    assert left.is_file()
    assert ran(script, "killed", "resumed") == 0 == ran(script, "whole", "whole-out")
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (tmp_path / "whole-out" / "model.safetensors").read_bytes()


def test_a_network_that_is_gone_from_the_cache_says_so(weights: str, tmp_path: Path) -> None:
    variant = made("finetune(epochs=0)", weights, tmp_path)
    with pytest.raises(ModelError, match="no longer in the cache"):
        optimizing.network(variant, Bench(cache=tmp_path / "elsewhere"))


def test_zeros_stay_zero_while_the_rest_learns() -> None:
    layer = torch.nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight[0, :2] = 0.0
    keep_zeros(layer.weight)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimiser.zero_grad()
        layer(torch.ones(3, 4)).square().sum().backward()
        optimiser.step()
    assert torch.equal(layer.weight[0, :2], torch.zeros(2)) and not torch.equal(layer.weight, before)


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"EDGEJOULE_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "edgejoule", *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_the_verb_saves_a_network_that_is_a_model_for_the_other_verbs(weights: str, tmp_path: Path) -> None:
    words = ("optimize", MODEL, "--weights", weights, "--data", "digits", "--recipe", "finetune(epochs=0.1)", "--out", "small", "--json")
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["variant"] == "vit_digits | finetune(epochs=0.1)" and found["before"]["macs"] == found["after"]["macs"] > 1e6
    assert 0 <= found["after"]["top1"]["low"] <= found["after"]["top1"]["value"] <= 1 and found["after"]["top1"]["n"] == 374
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["architecture.json", "model.safetensors"]
    made = run("compile", "small", "--images", "photos(n=2)", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    variant = json.loads(made.stdout)["artifacts"][0]["variant"]
    assert variant["spec"]["name"] == found["variant"] and variant["weights_id"].startswith("optimized:")
    again = run(*words, cwd=tmp_path)
    assert again.returncode == 2 and "name a new folder" in again.stderr
    assert run("optimize", MODEL, cwd=tmp_path).returncode == 2


def test_a_saved_network_needs_no_training_code(weights: str, tmp_path: Path) -> None:
    variant = made("finetune(epochs=0)", weights, tmp_path)
    folder = optimizing.save(variant, tmp_path / "saved", Bench(cache=tmp_path))
    with pytest.raises(OutputError, match="there already"):
        optimizing.save(variant, folder, Bench(cache=tmp_path))
    script = (
        "import sys\n"
        "for name in ('accelerate', 'edgejoule.train', 'edgejoule.optimize', 'sklearn'):\n    sys.modules[name] = None\n"
        "import pickle\npickle.load = pickle.loads = None\n"
        "from edgejoule import zoo\nfrom edgejoule.catalog import find_model\n"
        "print(type(zoo.build(zoo.identify(find_model(sys.argv[1])))).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "VisionTransformer", done.stderr


def test_a_saved_network_is_optimised_further_and_needs_its_folder_no_more(weights: str, tmp_path: Path) -> None:
    bench = Bench(cache=tmp_path / "cache")
    first = optimizing.save(made("prune_ffn(ratio=0.5)", weights, tmp_path / "cache"), tmp_path / "first", bench)
    further = optimizing.optimize(find_model(str(first)), "auto", "prune_heads(ratio=0.5)", OptimizePlan(), bench)
    assert further.label == "vit_digits | prune_ffn(ratio=0.5) | prune_heads(ratio=0.5)"
    both = made("prune_ffn(ratio=0.5) | prune_heads(ratio=0.5)", weights, tmp_path / "cache")
    second = optimizing.save(further, tmp_path / "second", bench)
    shutil.rmtree(first)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(zoo.load(second)(images), optimizing.network(both, bench)(images), rtol=1e-5, atol=1e-6)
    assert str(tmp_path) not in (second / "architecture.json").read_text()


def test_an_order_that_makes_no_sense_is_refused_across_saved_networks(weights: str, tmp_path: Path) -> None:
    bench = Bench(cache=tmp_path / "cache")
    folder = optimizing.save(made("merge_tokens(r=2)", weights, tmp_path / "cache"), tmp_path / "merged", bench)
    with pytest.raises(SpecError, match="prune_heads cannot follow merge_tokens"):
        optimizing.optimize(find_model(str(folder)), "auto", "prune_heads(ratio=0.5)", OptimizePlan(), bench)


def test_what_does_not_come_back_is_neither_kept_nor_found_again(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = zoo.load

    def other(folder: Path, allow_code: bool = False) -> Any:
        module = whole(folder, allow_code)
        module.head.weight.data.add_(1.0)
        return module

    monkeypatch.setattr(zoo, "load", other)
    for _ in range(2):
        with pytest.raises(ModelError, match="cannot be written down"):
            made("prune_ffn(ratio=0.5)", weights, tmp_path)
    assert not list((tmp_path / "optimized").glob("[!.]*"))


def test_code_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    spec = replace(find_model(MODEL), builder="custom(target='mine:net')")
    with pytest.raises(SpecError, match="code of your own"):
        optimizing.check_saveable(spec)


def test_a_convolutional_network_has_no_layer_to_try(tmp_path: Path) -> None:
    from edgejoule.sensitivity import sensitivity, trials_of

    spec = find_model('timm(name="resnet18")')
    with pytest.raises(ModelError, match="no pass knows a layer of"):
        sensitivity(spec, "random", OptimizePlan(), "", Bench(cache=tmp_path))
    trials = trials_of(zoo.build(zoo.identify(find_model(MODEL), weights="random")))
    assert {trial.recipe.partition("(")[0] for trial in trials} == {"prune_heads", "prune_ffn", "prune_tokens", "qat"}


def test_sensitivity_says_what_each_layer_costs_and_saves(weights: str, tmp_path: Path) -> None:
    from edgejoule import sensitivity as joint

    spec = find_model(MODEL)
    bench = Bench(cache=tmp_path)
    wanted = ("prune_ffn(layers=['blocks.0.mlp'], ratio=0.5)", "prune_heads(layers=['blocks.3.attn'], ratio=0.5)")
    some = tuple(trial for trial in joint.trials_of(zoo.build(zoo.identify(spec, weights=weights))) if trial.recipe in wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "trials_of", lambda module: some)
        rows, failures = joint.sensitivity(spec, weights, SHORT, "onnxruntime", bench)
    assert not failures and [row.layer for row in rows] == ["blocks.0.mlp", "blocks.3.attn"]
    assert all(0.03 < row.saved_macs < 0.1 and 0.03 < row.saved_bytes < 0.1 and row.saved_time is not None for row in rows)
    assert all(row.drop_points.low is not None and row.n_images == 193 for row in rows)


def test_the_recipes_of_a_study_may_be_for_some_of_its_models() -> None:
    from edgejoule.errors import StudyError
    from edgejoule.study import optimize_plan, recipes_for

    text = """
[study]
name = "some"
[screen]
models = ['timm(name="vit_digits")', 'timm(name="levit_digits")']
[optimize]
recipes = ["", "fuse"]
models = ['timm(name="vit_digits")']
[train]
data = "digits"
"""
    study = parse_study(text, "s.toml")
    assert [recipes_for(find_model(name), study) for name in study.screen.models] == [("", "fuse"), ("",)]
    assert (optimize_plan(study).data, optimize_plan(study).train) == ("digits", "digits")
    with pytest.raises(StudyError, match=r"optimize.models: 'edgevit' is none"):
        parse_study(text.replace("models = ['timm(name=\"vit_digits\")']\n[train]", "models = ['edgevit']\n[train]"), "s.toml")
    with pytest.raises(StudyError, match="unknown key"):
        parse_study(text.replace("[train]", 'trained = [["a", "b"]]\n[train]'), "s.toml")


def test_identity_settings_leave_the_network_as_it_is(tmp_path: Path) -> None:
    spec = find_model(MODEL)
    module = zoo.build(zoo.identify(spec, weights="random"))
    context = PassContext(None, None, None, 0, tmp_path)
    for text in ("finetune(epochs=0)", "distill(epochs=0)"):
        changed, _ = recipes.apply(text, module, spec, context)
        assert changed is not module and torch.equal(changed.head.weight, module.head.weight)
