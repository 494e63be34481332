"""A changed network is written down as plain values and tensors, and comes back the same; what is no such description is refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read_tensors
from torch import nn

from edgejoule import zoo
from edgejoule.architecture import described, restored, tensors_of
from edgejoule.errors import EdgejouleError, ModelError
from edgejoule.optimize.fuse import fuse
from edgejoule.zoo.optimized import ARCHITECTURE, WEIGHTS, OptimizedModel, base_of, contents, load
from tests import families


@pytest.mark.parametrize("name", ["levit_conv", "fastvit", "efficientvit_msra", "edgevit", "vit_modern"])
def test_a_rewritten_network_comes_back_bit_for_bit(name: str) -> None:
    module, spec = families.network(name)
    changed = fuse(module, spec.preprocessing.input_size)
    changes = json.loads(json.dumps(described(changed, base_of(spec))))
    again = restored(base_of(spec), changes, tensors_of(changed, base_of(spec)))
    images = families.images(spec)
    with torch.no_grad():
        assert torch.equal(again(images), changed(images))
    assert changes and [name for name, _ in again.named_parameters()] == [name for name, _ in changed.named_parameters()]


def test_what_is_as_its_builder_made_it_needs_no_words() -> None:
    module, spec = families.network("vit")
    assert described(module, base_of(spec)) == {}


def test_attributes_buffers_missing_biases_and_new_modules_are_kept() -> None:
    module, spec = families.network("vit")
    changed = copy.deepcopy(module)
    changed.blocks[0].attn.num_heads = 2
    changed.blocks[0].attn.head_dim = 24
    changed.blocks[1].mlp.fc1.bias = None
    changed.blocks[1].mlp.act = nn.SiLU()
    changed.blocks[2].register_buffer("table", torch.arange(3), persistent=False)
    changed.blocks[2].norm1.sizes = ((1, 2), [3], {"a": 1.5})
    again = restored(base_of(spec), json.loads(json.dumps(described(changed, base_of(spec)))), tensors_of(changed, base_of(spec)))
    assert again.blocks[0].attn.num_heads == 2 and again.blocks[1].mlp.fc1.bias is None and type(again.blocks[1].mlp.act) is nn.SiLU
    assert torch.equal(again.blocks[2].table, torch.arange(3)) and "blocks.2.table" not in again.state_dict()
    assert again.blocks[2].norm1.sizes == ((1, 2), [3], {"a": 1.5})


def _hook(module: Any) -> None:
    module.register_forward_hook(lambda part, args, out: out)


def _function(module: Any) -> None:
    module.blocks[0].mlp.extra = lambda x: x


def _foreign(module: Any) -> None:
    module.blocks[0].mlp.act = type("Own", (nn.Module,), {})()


@pytest.mark.parametrize(("spoil", "said"), [(_hook, "hook"), (_function, "numbers, texts"), (_foreign, "expected a class of torch")])
def test_what_cannot_be_written_down_is_refused(spoil: Callable[[Any], None], said: str) -> None:
    module, spec = families.network("vit")
    changed = copy.deepcopy(module)
    spoil(changed)
    with pytest.raises(ModelError, match=said):
        described(changed, base_of(spec))


def saved(folder: Path) -> tuple[Any, Any]:
    module, spec = families.network("levit")
    changed = fuse(module, spec.preprocessing.input_size)
    for name, content in contents(changed, spec, "fuse", {"seed": 0}).items():
        (folder / name).write_bytes(content)
    return changed, spec


def test_a_folder_is_a_model_of_the_catalogs_kind(tmp_path: Path) -> None:
    from edgejoule.catalog import find_model

    changed, spec = saved(tmp_path)
    found = find_model(str(tmp_path))
    assert found.name == f"{spec.name} | fuse" and found.num_classes == 10 and found.published is None
    variant = zoo.identify(found)
    images = families.images(spec)
    with torch.no_grad():
        assert torch.equal(zoo.build(variant)(images), changed(images))
    (tmp_path / ARCHITECTURE).write_bytes((tmp_path / ARCHITECTURE).read_bytes() + b"\n")
    with pytest.raises(ModelError, match="another network than before"):
        zoo.build(variant)
    with pytest.raises(ModelError, match="takes no options"):
        OptimizedModel(str(tmp_path)).build(num_classes=7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class": "os.system"}, "is not here"),
        ({"class": "torch.nn.functional.relu"}, "is not here"),
        ({"class": "edgejoule.nowhere.Thing"}, "is not here"),
        ({"attributes": {"_modules": {"dict": []}}}, "no attribute"),
        ({"attributes": {"x": {"set": [1]}}}, "no plain value"),
        ({"tensors": {"weight": ["parameter", [1 << 40, 1 << 40], "float32"]}}, "of shape"),
        ({"tensors": {"weight": ["pickle", [1], "float32"]}}, "of kind"),
        ({"tensors": {"weight": ["buffer", [1], "load"]}}, "type load"),
        ({"children": [["a", True]]}, "says nothing of"),
        ({"children": 3}, "does not fit"),
    ],
)
def test_a_description_that_asks_for_more_than_a_network_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    note = json.loads((tmp_path / ARCHITECTURE).read_text())
    note["changes"]["head.linear"] = change
    (tmp_path / ARCHITECTURE).write_text(json.dumps(note))
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(ModelError, match="not the file"):
        load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="cannot read"):
        load(tmp_path)
    for text in ("", "[]", "{}", '{"changes": {}, "recipe": "", "format": 99}', '{"changes": {"a": 1}, "recipe": ""}'):
        (tmp_path / ARCHITECTURE).write_text(text)
        with pytest.raises(ModelError):
            load(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4) | st.sampled_from(["torch.nn.modules.linear.Identity", "float32"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tuple", "dict", "weight", "a.b", "0"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["class", "attributes", "deleted", "tensors", "without", "children"]), VALUES, min_size=1))
def test_any_description_is_a_network_or_an_error_of_ours(entry: dict[str, Any]) -> None:
    base = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    state = dict(copy.deepcopy(base).state_dict())
    with contextlib.suppress(EdgejouleError):
        restored(base, {"0": entry}, state)


def test_the_tensors_of_a_file_are_the_state_and_what_its_builder_does_not_make(tmp_path: Path) -> None:
    changed, _ = saved(tmp_path)
    assert set(read_tensors((tmp_path / WEIGHTS).read_bytes())) == set(changed.state_dict())
