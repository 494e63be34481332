"""Every family by every pass: the contract, the identity setting, or the reason in the table of what cannot work.

A pair is judged on a tiny network with live weights: its input is left alone, the result runs, exports, and is the same again by its seed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from edgejoule import contracts, optimizing, registry
from edgejoule.bench import Bench
from edgejoule.errors import ModelError
from edgejoule.optimize import LEAVES, impossible
from edgejoule.seams import PassContext
from edgejoule.study_file import OptimizePlan
from edgejoule.zoo.optimized import contents, load
from tests import families

FAMILIES = (
    *("vit", "deit", "deit_distilled", "vit_relpos", "swin", "levit", "levit_conv", "tiny_vit", "mobilevit", "mobilevitv2"),
    *("efficientvit_mit", "efficientvit_msra", "pvt_v2", "edgenext", "fastvit", "efficientformerv2", "edgevit"),
)
# pass -> a spelling that changes something, and the one that changes nothing (None: every setting changes something, or none does)
SPELLINGS: dict[str, tuple[str, str | None]] = {
    "fuse": ("fuse", "fuse"),
    "resize": ("resize(px={other})", "resize(px={own})"),
    "window_attention": ("window_attention(size=2)", "window_attention(size={grid})"),
    "prune_heads": ("prune_heads(ratio=0.5)", "prune_heads(ratio=0)"),
    "prune_ffn": ("prune_ffn(ratio=0.5)", "prune_ffn(ratio=0)"),
    "prune_weights": ("prune_weights(ratio=0.5)", "prune_weights(ratio=0)"),
    "merge_tokens": ("merge_tokens(r=6)", "merge_tokens(r=0)"),
    "prune_tokens": ("prune_tokens(keep=0.7)", "prune_tokens(keep=1.0)"),
    "distill": ("distill(epochs=0.03, lr=0.1)", "distill(epochs=0)"),
    "finetune": ("finetune(epochs=0.03, lr=0.1)", "finetune(epochs=0)"),
    "qat": ("qat(epochs=0)", "qat(bits=32, epochs=0)"),
}
CHANGES_NOTHING = ("fuse",)
LEARNING = OptimizePlan(data="digits", train="digits(batch=32)")


def test_every_pass_is_judged_here() -> None:
    assert set(SPELLINGS) == set(LEAVES)


def test_the_table_names_passes_and_families_that_are_there() -> None:
    assert set(impossible.IMPOSSIBLE) <= set(LEAVES)
    for reasons in impossible.IMPOSSIBLE.values():
        assert all(why.strip() and not why.endswith(".") for why in reasons.values())


@cache
def network(family: str) -> tuple[Any, Any]:
    return families.network(family)


def context(module: Any, spec: Any, workdir: Path) -> PassContext:
    """With a teacher, digits to learn from, and as many steps as a fraction of an epoch has."""
    fit = optimizing.Fitting(LEARNING, (module, spec), False, 0, "test", workdir, Bench(), [])
    return PassContext(fit, (module, spec), lambda spec, n: drawn(spec, n), 0, workdir)


def drawn(spec: Any, n: int) -> Any:
    from edgejoule.seams import Held

    return Held(families.images(spec, min(n, 8)))


def spelled(text: str, spec: Any) -> str:
    side = spec.preprocessing.input_size[1]
    return text.format(own=side, other=side * 2, grid=side // 8)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_every_pass(family: str, name: str, tmp_path: Path) -> None:
    module, spec = network(family)
    images = families.images(spec)
    text, identity = (part and spelled(part, spec) for part in SPELLINGS[name])
    assert text is not None
    if (why := impossible.reason(name, module)) is not None:
        with pytest.raises(ModelError, match="leave it out of the recipe") as caught:
            registry.create("pass", text)(module, spec, context(module, spec, tmp_path))
        assert why in str(caught.value) and spec.name in str(caught.value)
        return
    contracts.check_pass(text, module, spec, context(module, spec, tmp_path / "a"), images)
    changed, after = registry.create("pass", text)(module, spec, context(module, spec, tmp_path / "b"))
    for file, content in contents(changed, after, text, {}).items():
        (tmp_path / file).write_bytes(content)
    with torch.no_grad():
        before, seen = module(images), families.images(after)
        assert distance(load(tmp_path)(seen), changed(seen)) < 1e-6
        if after.preprocessing == spec.preprocessing:
            assert (distance(changed(images), before) > 1e-4) is (name not in CHANGES_NOTHING)
        if identity is not None:
            same, _ = registry.create("pass", identity)(module, spec, context(module, spec, tmp_path / "c"))
            assert distance(same(images), before) < 2e-5


def distance(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())
