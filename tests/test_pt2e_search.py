"""PT2E's held-out search: a layer that int8 breaks goes back to float where the budget is missed, and only it; by the real runtimes."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgejoule import environments, registry
from edgejoule.compile import pt2e_search
from edgejoule.compile.export import TorchExport
from edgejoule.compile.quantize.options import OVER_BUDGET
from edgejoule.seams import CompileContext, Held
from tests.test_backend_inductor import listed

SHAPE = (2, 3, 16, 16)
ROOT = Path(__file__).parents[1]
HELD = 40


class Hurt(nn.Module):
    """The last layer's input has one feature of 2000 that its weights ignore: eight bits of it leave nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(128, 16), nn.Linear(16, 5, bias=False)
        with torch.no_grad():
            self.middle.bias[3] = 2000.0
            self.last.weight[:, 3] = 0.0

    def forward(self, x: Any) -> Any:  # (B, 3, 16, 16)
        return self.last(self.middle(self.stem(x).flatten(1)))


class Table(Hurt):
    """With a linear layer over a table of its own, as in SwinV2's position biases: its 8-bit values are constants of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(4, 1)
        self.register_buffer("table", torch.linspace(-1, 1, 20).reshape(5, 4))

    def forward(self, x: Any) -> Any:  # (B, 3, 16, 16)
        return super().forward(x) + self.bias(self.table).flatten()


class Branches(Hurt):
    """Begins to add up its branches with nothing, as FastViT does."""

    def forward(self, x: Any) -> Any:  # (B, 3, 16, 16)
        return self.last(self.middle((0 + self.stem(x)).flatten(1)))


def images_of(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE[1:])).astype(np.float32)


def compile_to(spelling: str, folder: Path, max_drop_pct: float, network: type[Hurt] = Hurt) -> dict[str, str]:
    """The notes of compiling ``network`` into ``folder``, judged by agreement on 40 images."""
    notes: dict[str, str] = {}
    folder.mkdir()
    (folder.parent / f"{folder.name}-export").mkdir()
    export = TorchExport(network().eval(), SHAPE, folder.parent / f"{folder.name}-export")
    held = Held(images_of(HELD, 2))
    context = CompileContext(SHAPE, folder, lambda: images_of(6, 1), lambda: held, max_drop_pct, notes.__setitem__)
    registry.create("backend", spelling).compile(export, context)
    return notes


RUN = """
import json, sys
from pathlib import Path
import numpy as np
from edgejoule.compile.executorch import ExecuTorch
from tests.networks import in_folder
folder = Path(sys.argv[1])
session = ExecuTorch(precision="int8").load(in_folder(folder), 1)
images = np.load(folder.parent / "images.npy")
logits = [session.infer(images[i:i + 2])["logits"].tolist() for i in range(0, len(images), 2)]
print(json.dumps({"logits": sum(logits, []), "precisions": session.audit(images[:2]).precisions}))
"""


def run_executorch(folder: Path) -> tuple[Any, Any]:
    np.save(folder.parent / "images.npy", images_of(HELD, 2))
    python = environments.python_of("executorch")
    assert python is not None
    done = subprocess.run([python, "-c", RUN, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    return np.float32(told["logits"]), told["precisions"]


def run_inductor(folder: Path) -> tuple[Any, Any]:
    session = registry.create("backend", "inductor(precision='int8')").load(listed(folder), threads=1)
    images = images_of(HELD, 2)
    logits = [session.infer(images[i : i + 2])["logits"] for i in range(0, HELD, 2)]
    return np.concatenate(logits), session.audit(images[:2]).precisions


@pytest.mark.parametrize("backend", ["executorch", "inductor"])
def test_the_layer_that_hurts_goes_back_to_float_and_the_budget_is_met(backend: str, tmp_path: Path) -> None:
    spelling = f"{backend}(precision='int8')"
    if (missing := registry.create("backend", spelling).probe()) is not None:
        pytest.skip(missing)
    run = run_executorch if backend == "executorch" else run_inductor
    with torch.no_grad():
        wanted = Hurt().eval()(torch.from_numpy(images_of(HELD, 2))).numpy().argmax(axis=1)
    free, bound = compile_to(spelling, tmp_path / "free", 100.0), compile_to(spelling, tmp_path / "bound", 5.0)
    logits, precisions = run(tmp_path / "free")
    assert (logits.argmax(axis=1) == wanted).mean() < 0.9 and precisions == {"int8": 3}
    assert free["held-out search"] == f"graphs run: 1, on {HELD} images" and "kept in float" not in free
    logits, precisions = run(tmp_path / "bound")
    assert (logits.argmax(axis=1) == wanted).mean() >= 0.95 and precisions == {"int8": 2, "fp32": 1}
    assert bound["quantized"] == "2 of 3 products with weights" and bound["kept in float"] == "linear_1"
    assert OVER_BUDGET not in bound and "of agreement" in bound["held-out drop"]


@pytest.mark.parametrize("network", [Table, Branches])
@pytest.mark.parametrize("backend", ["executorch", "inductor"])
def test_a_linear_layer_over_a_constant_and_a_sum_with_a_number_are_in_nobody_s_way(backend: str, network: Any, tmp_path: Path) -> None:
    spelling = f"{backend}(precision='int8')"
    if (missing := registry.create("backend", spelling).probe()) is not None:
        pytest.skip(missing)
    notes = compile_to(spelling, tmp_path / "made", 5.0, network)
    logits, _ = (run_executorch if backend == "executorch" else run_inductor)(tmp_path / "made")
    with torch.no_grad():
        wanted = network().eval()(torch.from_numpy(images_of(HELD, 2))).numpy().argmax(axis=1)
    assert (logits.argmax(axis=1) == wanted).mean() >= 0.95 and OVER_BUDGET not in notes


class Residual(nn.Module):
    """A residual sum and a gate, with one channel thirty times the others: eight bits of the sum would leave nothing of those."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.gains = nn.Parameter(torch.tensor([1.0, 1, 1, 300, 1, 1, 1, 1])[:, None, None])

    def forward(self, x: Any) -> Any:  # (B, 3, 16, 16)
        x = self.stem(x) * self.gains
        return self.head(((x + self.branch(x.tanh())) / self.gains).mean((2, 3)))


def test_what_is_judged_against_is_the_float_network_where_the_quantiser_took_sums_and_factors() -> None:
    plain, converted, weights = quantised(Residual().eval())
    images = images_of(4, 2)
    with torch.no_grad():
        wanted = plain(torch.from_numpy(images[:2])).numpy()

    def error(module: Any, kept: frozenset[str]) -> float:
        return float(np.linalg.norm(pt2e_search.Switched(module, weights).logits_of(kept, images, 2)[:2] - wanted) / np.linalg.norm(wanted))

    assert error(copy.deepcopy(converted), frozenset(weights)) > 0.05, "sums in eight bits stay where products are switched only"
    whole = error(copy.deepcopy(converted), frozenset())
    only = pt2e_search.unquantize_others(converted)
    assert error(copy.deepcopy(only), frozenset(weights)) < 1e-5 < error(only, frozenset()) < whole


def quantised(module: Any) -> tuple[Any, Any, Any]:
    """The float program's module, the converted one and its float weights, by torchao's quantiser for x86."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    images = torch.from_numpy(images_of(2, 1))
    program: Any = torch.export.export(module, (images,), strict=False)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(check_guards=False), quantizer)
    prepared(images)
    weights = pt2e_search.float_weights(prepared)
    return program.module(check_guards=False), convert_pt2e(prepared), weights


def test_all_products_switched_to_float_are_the_float_network_and_nothing_else_is_left() -> None:
    plain, converted, weights = quantised(Hurt().eval())
    images = images_of(3, 2)
    switched = pt2e_search.Switched(pt2e_search.unquantize_others(converted), weights)
    assert list(switched.products) == ["conv2d", "linear", "linear_1"] and switched.others == 0
    with torch.no_grad():
        wanted = plain(torch.from_numpy(images[:2])).numpy()
    assert not np.allclose(switched.logits_of(frozenset(), images, 2)[:2], wanted, atol=1e-2)
    assert np.allclose(switched.logits_of(frozenset(weights), images, 2)[:2], wanted, atol=1e-4)
    assert switched.logits_of(frozenset(), images, 2).shape == (3, 5)
    switched.settle(frozenset({"linear_1"}))
    targets = [str(node.target) for node in converted.graph.nodes]
    assert sum("dequantize_per_channel" in target for target in targets) == 2
    assert [name for name, _ in converted.named_buffers() if name.startswith(pt2e_search.FLOAT)] == [f"{pt2e_search.FLOAT}2"]


def test_labels_are_what_the_budget_is_about_where_there_are_some() -> None:
    _, converted, weights = quantised(Hurt().eval())
    images = images_of(HELD, 2)
    wrong = np.full(HELD, 7)  # no class of the network's: nothing is right, so nothing can be lost
    _, chosen = pt2e_search.choose(converted, weights, Held(images, wrong), 2, 1.0, "x86 inductor")
    assert chosen.drop_kind == "top-1" and chosen.drop_pct == 0.0 and chosen.kept_float == () and chosen.sessions == 1
