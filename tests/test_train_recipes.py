"""Recipes are data: what the table says, and which spellings mean the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import SpecError, UnknownNameError
from edgejoule.train.recipe import Recipe
from edgejoule.train.recipes import RECIPES, canonical, check, find


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_recipe_makes_sense_and_says_whose_figures_it_states(recipe: Recipe) -> None:
    check(recipe)
    assert recipe.about and recipe.source
    assert recipe.expect.startswith(("published", "inferred", "measured"))
    assert recipe.cost.startswith(("estimate", "measured"))
    assert find(recipe.name) is recipe


def test_deit_is_the_list_of_its_paper() -> None:
    recipe = find("deit")
    assert recipe.lr * recipe.batch / recipe.lr_batch == pytest.approx(1e-3)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.min_lr) == (300, 5, 0.05, 1e-5)
    assert (recipe.mixup, recipe.cutmix, recipe.erasing, recipe.smoothing, recipe.repeats) == (0.8, 1.0, 0.25, 0.1, 3)
    assert recipe.ema == 0.99996 and not recipe.evaluate_ema


def test_the_cifar_recipes_are_the_fact_sheets() -> None:
    plain = find("cifar10_finetune")
    assert (plain.optimizer, plain.lr, plain.momentum, plain.weight_decay, plain.batch, plain.steps) == ("sgd", 0.01, 0.9, 0, 32, 15_000)
    assert (plain.schedule, plain.min_lr, plain.warmup_epochs, plain.crop_pct, plain.crop_scale) == ("cosine", 0, 0, 1.0, (1.0, 1.0))
    levit = find("cifar10_levit")
    assert (levit.optimizer, levit.lr, levit.weight_decay, levit.epochs, levit.clip_norm) == ("adamw", 3e-4, 0.05, 50, 5.0)
    assert (levit.crop_scale, levit.color_jitter) == ((0.08, 1.0), (0.4, 0.4, 0.4, 0.1))
    assert (levit.warmup_epochs, levit.warmup_lr, levit.min_lr) == (5, 1e-6, 1e-6)


def test_a_digit_is_never_mirrored() -> None:
    assert find("digits").hflip == 0


def test_an_option_changes_its_value_and_takes_back_what_was_expected() -> None:
    changed = find("deit(epochs=100, batch=256)")
    assert (changed.epochs, changed.batch, changed.mixup) == (100.0, 256, 0.8)
    assert "nothing is stated" in changed.expect and "74.4" in changed.expect


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deit", "deit"),
        ("deit()", "deit"),
        ("deit(epochs=300)", "deit"),
        ("deit( batch=1024, epochs=300.0)", "deit"),
        ("deit(epochs=100.0, batch=256)", "deit(batch=256, epochs=100)"),
        ("deit(crop_scale=[0.2, 1])", "deit(crop_scale=(0.2, 1))"),
        ("deit(drop_path=None)", "deit(drop_path=None)"),
        ("dense_1x(milestones=[6])", "dense_1x(milestones=(6,))"),
        ("digits(lr=1e-4)", "digits(lr=0.0001)"),
    ],
)
def test_recipes_that_are_equal_are_spelt_alike(text: str, expected: str) -> None:
    assert canonical(text) == expected
    assert find(expected) == find(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("diet", "did you mean deit"),
        ("deit(epoch=3)", "did you mean epochs"),
        ("deit(name='other')", "no option"),
        ("deit(size=512)", "no option"),  # of detection and segmentation: it would do nothing
        ("dense_1x(mixup=0.8)", "no option"),
        ("deit(batch=0)", "batch=0"),
        ("deit(batch=1.5)", "a whole number"),
        ("deit(batch=True)", "a whole number"),
        ("deit(batch='many')", "a whole number"),
        ("deit(epochs=0)", "both 0"),
        ("deit(epochs=-1)", "epochs=-1"),
        ("deit(epochs=1e999)", "epochs=inf"),
        ("deit(epochs=10**9)", "literal"),
        (f"deit(epochs={10**400})", "at most"),
        (f"deit(batch={10**400})", "batch"),
        ("deit(hflip=1.5)", "from 0 to 1"),
        ("deit(smoothing=1)", "smoothing"),
        ("deit(crop_scale=(1.0, 0.08))", "smaller one first"),
        ("deit(crop_scale=(0.08, 2))", "from 0 to 1"),
        ("deit(crop_scale=(0.0, 1.0))", "above 0"),
        ("deit(crop_scale=0.5)", "2 numbers"),
        ("deit(color_jitter=(0.4, 0.4, 0.4, 0.6))", "hue"),
        ("deit(optimizer='lion')", "one of adamw, sgd"),
        ("deit(optimizer=['adamw'])", "one of adamw, sgd"),
        ("deit(decay_all=1)", "True or False"),
        ("deit(rand_augment='random')", "timm's spelling"),
        ("deit(rand_augment=9)", "text"),
        ("deit(crop_pct=0)", "crop_pct"),
        ("deit(warmup_steps=10)", "one of them"),
        ("dense_1x(milestones=(11, 8))", "rising"),
        ("deit(milestones=(8,))", "milestones"),
        ("dense_1x(milestones=())", "milestones"),
        ("deit(3)", "need their names"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        find(text)
    assert said in str(caught.value) and len(str(caught.value)) < 900


def test_an_unknown_recipe_has_its_own_error() -> None:
    with pytest.raises(UnknownNameError) as caught:
        find("digit")
    assert "digits" in caught.value.nearest


LITERALS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.floats(), max_size=4))
OPTIONS = [field.name for field in dataclasses.fields(Recipe)]


@given(st.sampled_from(sorted(RECIPES)), st.dictionaries(st.sampled_from(OPTIONS), LITERALS, max_size=3))
@settings(deadline=None)
def test_any_spelling_is_read_or_refused_and_its_canonical_form_means_the_same(name: str, options: dict[str, Any]) -> None:
    text = f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    try:
        recipe = find(text)
    except SpecError:
        return
    short = canonical(text)
    assert find(short) == recipe
    assert canonical(short) == short


NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.floats(0.1, 1000),
        "batch": st.integers(1, 4096),
        "lr": st.floats(1e-9, 10),
        "hflip": st.floats(0, 1),
        "crop_pct": st.one_of(st.none(), st.floats(0.1, 1)),
        "crop_scale": st.floats(0.01, 1).map(lambda low: (low, 1)),
        "decay_all": st.booleans(),
    },
)


@given(NUMBERS)
@settings(deadline=None)
def test_good_values_are_kept_to_the_last_digit(options: dict[str, Any]) -> None:
    text = f"deit({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    recipe = find(canonical(text))
    assert {key: getattr(recipe, key) for key in options} == options


def test_the_table_imports_no_torch() -> None:
    code = "import sys, edgejoule.train.recipes; print('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
