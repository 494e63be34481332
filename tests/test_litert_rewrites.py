"""Networks rewritten for LiteRT compute what they did, in operators that its delegate takes. The last test runs in LiteRT's environment."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgejoule import registry
from edgejoule.compile import litert
from edgejoule.compile.export import TorchExport
from edgejoule.compile.litert_rewrites import rewrite
from edgejoule.seams import CompileContext
from tests.elsewhere import run_file_there
from tests.networks import in_folder

SHAPE = (2, 6, 10, 12)
aten = torch.ops.aten
there = pytest.mark.skipif(not litert._runtime_is_here(), reason="run in its own environment by test_the_rest_there")
here = pytest.mark.skipif(litert._runtime_is_here(), reason="about an interpreter without LiteRT")


@here
def test_the_rest_there() -> None:
    run_file_there("litert", __file__)


class Calling(nn.Module):
    def __init__(self, function: Callable[[Any, Any], Any], part: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.part = function, part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.part)


def sines(x: torch.Tensor, part: Any) -> torch.Tensor:
    steps = torch.arange(x.shape[-1]) // 2 / 7.0
    return x + torch.stack((steps.sin(), steps.cos()), 0).sum(0)


def filled(x: torch.Tensor, part: Any) -> torch.Tensor:
    rows = torch.zeros(x.shape[-1])
    rows.add_(torch.arange(x.shape[-1]))
    return x * rows + rows


def program(function: Callable[[Any, Any], Any], part: nn.Module | None = None, shape: tuple[int, ...] = SHAPE) -> Any:
    torch.manual_seed(0)
    return torch.export.export(Calling(function, part).eval(), (torch.zeros(shape),), strict=False).module(check_guards=False)


def rewritten(module: Any, shape: tuple[int, ...] = SHAPE) -> Counter[Any]:
    """How often each operator is called afterwards, once it is seen to compute what it did."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = module(x)
        found = rewrite(module)(x)
    assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(("size", "bias"), [((2, 2), True), ((2, 3), False), ((1, 1), True)])
def test_windows_that_do_not_overlap_are_spread_by_multiplying(size: tuple[int, int], bias: bool) -> None:
    module = program(lambda x, conv: conv(x), nn.ConvTranspose2d(6, 6, size, stride=size, groups=6, bias=bias))
    assert any(node.target == aten.conv_transpose2d.input for node in module.graph.nodes)
    calls = rewritten(module)
    assert aten.conv_transpose2d.input not in calls and calls[aten.mul.Tensor] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "output_padding": 1},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 2, "stride": 2, "groups": 2},
        {"kernel_size": 2, "stride": 2, "groups": 1},
    ],
)
def test_other_transposed_convolutions_stay(options: dict[str, int]) -> None:
    module = program(lambda x, conv: conv(x), nn.ConvTranspose2d(6, 6, **{"groups": 6, **options}))  # type: ignore[arg-type]
    assert rewritten(module)[aten.conv_transpose2d.input] == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, _: x[..., ::2, ::3],
        lambda x, _: x[:, :, 1::2, 2::5],
        lambda x, _: x[:, ::4, 3:9:2],
        lambda x, _: x[:, :, -7::3, -4:-1:2],
        lambda x, _: x[..., ::100],
    ],
)
def test_slices_with_a_step_are_groups(function: Callable[[Any, Any], Any]) -> None:
    module = program(function)
    rewritten(module)
    steps = [node.args[4] for node in module.graph.nodes if node.target == aten.slice.Tensor and len(node.args) > 4]
    assert set(steps) <= {1}


def sines_in_place(x: torch.Tensor, part: Any) -> torch.Tensor:
    places = torch.zeros(x.shape[-1])
    places[0::2] = torch.arange(x.shape[-1] // 2).sin()
    places[1::2] = torch.arange(x.shape[-1] // 2).cos()
    return x + places


def changed_later(x: torch.Tensor, part: Any) -> torch.Tensor:
    y = x * 1
    every_second = y[:, 1::2]
    y.relu_()
    return every_second * 1


def counted(x: torch.Tensor, part: Any) -> torch.Tensor:
    places = part.weight.clone()
    before = x * places[0]
    places.add_(1)
    return before + x * places[0]


def added_to_zeros(x: torch.Tensor, _: Any) -> torch.Tensor:
    y = torch.zeros(12)
    y.add_(x.sum((0, 1, 2)))
    return x * y


def added_to_a_part(x: torch.Tensor, _: Any) -> torch.Tensor:
    y = torch.ones(12) * 2
    y[1:].add_(x[0, 0, 0, 1:])
    return x * y


def assigned(x: torch.Tensor, _: Any) -> torch.Tensor:
    y = torch.zeros(12)
    y[1:] = x[0, 0, 0, 1:]
    return x * y


@pytest.mark.parametrize("function", [sines_in_place, changed_later, counted, added_to_zeros, added_to_a_part, assigned])
def test_what_is_written_into_stays_what_is_read(function: Callable[[Any, Any], Any]) -> None:
    module, x = program(function, nn.Linear(12, 1, bias=False).requires_grad_(False)), torch.ones(SHAPE)
    fresh = copy.deepcopy(module)  # ``counted`` writes into its own clone only
    rewritten(module)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(x), fresh(x)), "a second image finds what the first did"


def test_what_is_drawn_at_random_is_no_constant() -> None:
    module = rewrite(program(lambda x, _: x + torch.rand(12)))
    assert not torch.equal(module(torch.zeros(SHAPE)), module(torch.zeros(SHAPE)))


@pytest.mark.parametrize("pad", [[0, 1], [2, 1], [1, 0, 0, 2], [0, 0, 3, 0]])
def test_padding_by_another_value_is_concatenated(pad: list[int]) -> None:
    calls = rewritten(program(lambda x, _: functional.pad(x, pad, value=1.5)))
    assert aten.pad.default not in calls and calls[aten.cat.default] == sum(map(any, (pad[:2], pad[2:])))
    assert not any("full" in str(target) for target in calls), "edges are constants"


@pytest.mark.parametrize("options", [{}, {"value": 0.0}, {"mode": "reflect"}])
def test_other_padding_stays(options: dict[str, Any]) -> None:
    assert rewritten(program(lambda x, _: functional.pad(x, [1, 1, 1, 1], **options)))[aten.pad.default] == 1
    assert rewritten(program(lambda x, _: functional.pad(x, [-1, 2], value=1.0)))[aten.pad.default] == 1


def test_what_follows_from_no_image_is_computed() -> None:
    assert set(rewritten(program(sines))) == {aten.add.Tensor}


def test_a_tensor_that_is_written_into_is_no_constant() -> None:
    module = program(filled)
    rewritten(module)
    with torch.no_grad():
        x = torch.ones(SHAPE)
        assert torch.equal(module(x), module(x)), "a second image finds what the first did"


@there
def test_the_delegate_takes_all_of_it(tmp_path: Path) -> None:
    def spread(x: torch.Tensor, parts: Any) -> torch.Tensor:
        x = parts[0](x)  # (B, 8, 10, 12)
        x = x + parts[1](x[:, :, ::2, ::2])
        x = functional.pad(x.flatten(2), [0, 1], value=1.0)  # (B, 8, 121)
        return parts[2](x.mean(2))

    parts = nn.ModuleList([nn.Conv2d(6, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.Linear(8, 5)])
    torch.manual_seed(0)
    network = Calling(spread, parts).eval()
    backend = registry.create("backend", "litert")
    backend.compile(TorchExport(network, SHAPE, tmp_path, "spread"), CompileContext(SHAPE, tmp_path, lambda: None))
    session = backend.load(in_folder(tmp_path), threads=1)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        wanted = network(x).numpy()
    placement = session.audit(x.numpy())
    assert abs(session.infer(x.numpy())["logits"] - wanted).max() < 1e-5
    assert placement.fallbacks == {} and placement.nodes < 30, "the converter alone writes a TRANSPOSE_CONV a channel"
    assert placement.precisions == {"fp32": 2}
