"""int8 within a budget: the layer that hurts goes back to float in LiteRT's file, and only that one. Run in LiteRT's own environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile import litert
from edgejoule.compile.export import TorchExport
from edgejoule.seams import CompileContext, Held
from tests.elsewhere import run_file_there
from tests.networks import in_folder

SHAPE = (2, 3, 16, 16)
INT8 = 'litert(precision="int8")'
there = pytest.mark.skipif(not litert._runtime_is_here(), reason="run in its own environment by test_the_rest_there")
here = pytest.mark.skipif(litert._runtime_is_here(), reason="about an interpreter without LiteRT")


@here
def test_the_rest_there() -> None:
    run_file_there("litert", __file__)


def network(outlier: float = 4000.0) -> Any:
    """(B, 3, 16, 16) -> (B, 7). ``narrow`` is given one channel that dwarfs the others, and has no use for it."""
    import torch
    from torch import nn

    class Hurt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.wide, self.narrow, self.more, self.head = (nn.Linear(16, size) for size in (16, 16, 16, 7))
            with torch.no_grad():
                self.wide.bias[0] = outlier
                self.narrow.weight[:, 0] = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.narrow(self.wide(self.patches(x).flatten(2).transpose(1, 2)))  # (B, 16, 16)
            return self.head((x + nn.functional.gelu(self.more(x))).mean(1))

    torch.manual_seed(0)
    made = Hurt().eval()
    with torch.no_grad():
        made.head.bias -= made(torch.randn(256, *SHAPE[1:])).mean(0)  # so that answers differ
    return made


def one_row() -> Any:
    """(B, 3, 16, 16) -> (B, 7), one linear layer whose rows each hold one weight that dwarfs the others; its pixel is always black."""
    import torch
    from torch import nn

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(768, 7, bias=False)
            with torch.no_grad():
                self.head.weight[:, 0] = 1e4
            self.register_buffer("black", torch.ones(768).index_fill(0, torch.tensor([0]), 0.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.flatten(1) * self.black)

    torch.manual_seed(0)
    return Row().eval()


def images(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE[1:])).astype(np.float32)


def logits_of(module: Any, pixels: Any) -> Any:
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(pixels)).numpy()


def compiled(module: Any, folder: Path, spelling: str = INT8, labels: Any = None, budget: float = 2.0) -> tuple[dict[str, str], Any]:
    """(notes, session)."""
    folder.mkdir()
    notes: dict[str, str] = {}
    context = CompileContext(
        SHAPE, folder, lambda: images(6, 2), lambda: Held(images(40, 3), labels), budget, lambda what, chosen: notes.update({what: chosen})
    )
    backend = registry.create("backend", spelling)
    backend.compile(TorchExport(module, SHAPE, folder.parent / "export", "hurt"), context)
    return notes, backend.load(in_folder(folder), threads=1)


def kept(module: Any, session: Any) -> float:
    """The share of other images that keep the float network's answer."""
    pixels = images(80, 4)
    found = np.concatenate([session.infer(pixels[i : i + 2])["logits"] for i in range(0, 80, 2)])
    return float((found.argmax(1) == logits_of(module, pixels).argmax(1)).mean())


@there
def test_the_layer_that_hurts_goes_back_to_float_and_no_other(tmp_path: Path) -> None:
    module = network()
    notes, session = compiled(module, tmp_path / "any", budget=100.0)
    assert session.audit(images(2, 5)).precisions == {"int8": 5} and kept(module, session) < 0.6
    assert notes["held-out search"] == "files run: 1, on 40 images" and "kept in float" not in notes
    notes, session = compiled(module, tmp_path / "within")
    assert notes["kept in float"] == "2 narrow" and notes["quantized"] == "4 of 5 products with weights"
    assert "over budget" not in notes and "points of agreement" in notes["held-out drop"]
    placement = session.audit(images(2, 5))
    assert placement.precisions == {"int8": 4, "fp32": 1} and placement.fallbacks == {}
    assert kept(module, session) > 0.9


@there
def test_where_nothing_hurts_the_file_is_what_it_was(tmp_path: Path) -> None:
    from edgejoule.compile import litert_worker

    module = network(outlier=0.0)
    labels = logits_of(module, images(40, 3)).argmax(1)
    notes, session = compiled(module, tmp_path / "fine", labels=labels, budget=10.0)
    assert session.audit(images(2, 5)).precisions == {"int8": 5} and kept(module, session) > 0.9
    assert notes["held-out search"].startswith("files run: 1,") and "points of top-1" in notes["held-out drop"]
    compiled(module, tmp_path / "float", "litert")
    content = (tmp_path / "float" / "model.tflite").read_bytes()
    plain = litert_worker._writer(content, "dynamic", None, SHAPE[0], {})(frozenset())
    assert (tmp_path / "fine" / "model.tflite").read_bytes() == plain


@there
def test_a_budget_that_no_int8_file_meets_is_told(tmp_path: Path) -> None:
    notes, session = compiled(one_row(), tmp_path / "row")
    assert notes["over budget"].endswith("points of agreement are lost on 40 held-out images")
    assert session.audit(images(2, 5)).precisions == {"int8": 1}, "half of one product is none"


@there
def test_static_ranges_are_searched_too_and_calibrated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = network(outlier=300.0)
    notes, session = compiled(module, tmp_path / "static", 'litert(precision="int8", mode="static")')
    back = notes["kept in float"].split(", ")
    assert "2 narrow" in back and session.audit(images(2, 5)).precisions == {"int8": 5 - len(back), "fp32": len(back)}


@there
def test_a_rule_means_one_operator() -> None:
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    from edgejoule.compile.litert_worker import _recipe

    rules = RecipeManager()
    rules.load_quantization_recipe(_recipe("dynamic", [("FULLY_CONNECTED", "a.B_c/fc(1);")]))

    def quantised(kind: str, scope: str) -> bool:
        algorithm, _ = rules.get_quantization_configs(TFLOperationName(kind), scope)
        return str(getattr(algorithm, "value", algorithm)) != "no_quantize"

    assert not quantised("FULLY_CONNECTED", "a.B_c/fc(1);")
    others = ("a.B_c/fc(1);2;", "x/a.B_c/fc(1);", "axB_c/fc(1);", "a.B_c/fc(11);", "a.B_c/fc1;", "a.B_c/fc(1);\n")
    assert all(quantised("FULLY_CONNECTED", scope) for scope in others)
    assert quantised("CONV_2D", "a.B_c/fc(1);") and not quantised("SOFTMAX", "a")


@there
def test_products_are_those_with_weights_and_ones_of_the_same_weights_are_one(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from edgejoule.compile.litert_search import find_products

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.around = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.twice, self.head = nn.Linear(16, 16), nn.Linear(16, 7)
            self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(self.around(self.patches(x))).flatten(2).transpose(1, 2)  # (B, 64, 16)
            x = nn.functional.gelu(self.twice(x))
            x = self.twice(x @ (x.transpose(1, 2) @ x))
            return self.head(x.mean(1))

    compiled(Tied().eval(), tmp_path / "tied", "litert")
    content = (tmp_path / "tied" / "model.tflite").read_bytes()
    found = find_products(content, ("FULLY_CONNECTED", "CONV_2D"))
    assert [len(uses) for uses in found.candidates.values()] == [1, 2, 1]
    assert found.others == {"DEPTHWISE_CONV_2D": 1, "TRANSPOSE_CONV": 1}
    assert [name.split(" ")[1] for name in found.candidates][:2] == ["patches", "twice"]
