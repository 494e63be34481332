"""Quantisation-aware training: LSQ's gradients, what is settled, and int8 products on the runtimes' own lists of what they executed."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgejoule import environments, registry
from edgejoule.compile.export import TorchExport
from edgejoule.errors import BackendError, SpecError
from edgejoule.optimize.fake_quantise import (
    FakeQuantisedConv2d,
    FakeQuantisedLinear,
    LearnedGrid,
    LearnedRows,
    fake_quantise,
)
from edgejoule.optimize.packing import pack, unpack
from edgejoule.optimize.qat import Qat, deploy, fused, prepare
from edgejoule.optimize.quantisable import DELICATE, HEAD, STEM, find_layers
from edgejoule.optimize.quantised import QuantisedConv2d, QuantisedLinear
from edgejoule.seams import CompileContext, Held, PassContext
from tests import families
from tests.networks import in_folder

ROOT = Path(__file__).parents[1]
# Of the logits' norm: sums are rounded otherwise. Images nudged by 1e-6 alone move the deployed mobilevit's by 0.02 to 0.09.
ROUNDING = {"vit": 0.02, "levit_conv": 0.02, "mobilevit": 0.15}
SMALL = tuple(ROUNDING)
FAKE, DEPLOYED = (FakeQuantisedLinear, FakeQuantisedConv2d), (QuantisedLinear, QuantisedConv2d)
STEPS = 5


def distance(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def trained(module: nn.Module, spec: Any, *, epochs: float, lr: float = 1.0, distill: str = "", teacher: Any = None) -> nn.Module:
    """Five steps of Adam on photographs towards their own first answers, as the loop asks submodules."""
    twin = copy.deepcopy(module).train()
    images = families.images(spec, 4)
    with torch.no_grad():
        labels = module(images).argmax(1)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=1e-3)
    for step in range(STEPS):
        for begin in [getattr(part, "begin_step", None) for part in twin.modules()]:
            if begin is not None:
                begin(step, STEPS)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(twin(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        twin.journal = [*getattr(twin, "journal", []), {n: p.detach().clone() for n, p in twin.named_parameters()}]  # type: ignore[assignment]
    twin.eval()
    return twin


def context(fit: Any = None, n: int = 16) -> PassContext:
    return PassContext(fit, None, lambda spec, most: Held(families.images(spec, min(n, most)).numpy()), 0, Path())


def layers_of(module: nn.Module) -> int:
    return sum(isinstance(part, DEPLOYED) for part in module.modules())


Made = Callable[[str], tuple[nn.Module, Any]]


@pytest.fixture(scope="module")
def made() -> Made:
    """A family's deployed network and its spec, trained for five steps; made once."""
    kept: dict[str, tuple[nn.Module, Any]] = {}

    def network(name: str) -> tuple[nn.Module, Any]:
        if name not in kept:
            torch.manual_seed(0)
            module, spec = families.network(name)
            kept[name] = Qat(epochs=1)(module, spec, context(trained))
        return kept[name]

    return network


# ---------------------------------------------------------------- the formulas


def test_the_gradients_are_the_papers() -> None:
    """LSQ equation 3 and LSQ+ equation 4, value by value: within the grid, and clipped at either end."""
    step, zero = torch.tensor(0.1, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([0.234, -50.0, 50.0], requires_grad=True)
    for place, (of_step, of_zero, of_x) in enumerate(((2 - 2.34, 0.0, 1.0), (-128 - 3, -0.1, 0.0), (127 - 3, -0.1, 0.0))):
        found = torch.autograd.grad(fake_quantise(x, step, zero, -128, 127)[place], (step, zero, x))
        assert float(found[0]) == pytest.approx(of_step, abs=1e-4)
        assert float(found[1]) == pytest.approx(of_zero)
        assert float(found[2][place]) == of_x


def test_where_everything_is_clipped_the_gradient_of_the_step_is_the_derivative() -> None:
    x, h = torch.tensor([90.0, -70.0, 40.0]), 1e-4
    step = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quantise(x.double(), step, 0.0, -128, 127).sum(), step)
    with torch.no_grad():
        difference = fake_quantise(x.double(), step + h, 0.0, -128, 127).sum() - fake_quantise(x.double(), step - h, 0.0, -128, 127).sum()
    assert float(gradient) == pytest.approx(float(difference) / (2 * h), rel=1e-6)


def test_plain_sgd_moves_a_step_as_lsq_does() -> None:
    """A step of weights by lr * g * dL/ds, g = 1 / sqrt(N Qp), though its bound is what is learned."""
    torch.manual_seed(0)
    weight, most, rate = torch.randn(3, 40), 63, 1e-3
    rows = LearnedRows(weight, most)
    before = rows.step().detach()
    step = before.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(fake_quantise(weight, step.reshape(-1, 1), 0.0, -most, most).square().sum(), step)
    rows(weight).square().sum().backward()
    torch.optim.SGD(rows.parameters(), lr=rate).step()
    assert torch.allclose(rows.step().detach() - before, -rate * wanted / math.sqrt(40 * most), rtol=1e-2)


def test_zero_is_on_every_grid_and_a_rectified_one_is_a_relu() -> None:
    x = torch.linspace(-3, 5, 101)
    for low, high in ((-3.0, 5.0), (1.0, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        grid = LearnedGrid(low, high)
        assert float(grid(torch.zeros(1, 1)).detach()) == 0.0
        assert -128 <= grid.settled().zero <= 127
    assert torch.equal(LearnedGrid(-3.0, 5.0, rectified=True)(x.reshape(1, -1)).relu(), LearnedGrid(0.0, 5.0)(x.relu().reshape(1, -1)))


# ---------------------------------------------------------------- layers


def test_which_layers_stay_in_float() -> None:
    module, spec = families.network("efficientvit_mit")
    found = find_layers(module, families.images(spec, 1), spec.name)
    why = {reason: [path for path, told in found.left.items() if told == reason] for reason in (STEM, HEAD, DELICATE)}
    assert why[STEM] == ["stem.in_conv.conv"]
    assert why[HEAD] == ["head.classifier.4"]
    assert why[DELICATE] and all("context_module.main" in path for path in why[DELICATE])  # linear attention divides by a sum
    assert set(found.left.values()) == {STEM, HEAD, DELICATE}


@pytest.mark.parametrize("name", families.NETWORKS)
def test_every_family_is_deployed_as_it_was_trained_and_exports(name: str) -> None:
    module, spec = families.network(name)
    images = families.images(spec, 2)
    network = fused(module, spec, context())
    prepare(network, find_layers(network, images[:1], name), images, 63)
    with torch.no_grad():
        fake = network(images)
        deploy(network, 8)
        assert distance(network(images), fake) < 1e-4
    assert not any(isinstance(part, FAKE) for part in network.modules())
    torch.export.export(network, (images,), strict=False)


def test_the_pass_leaves_its_input_alone_and_repeats_itself() -> None:
    module, spec = families.network("vit")
    images = families.images(spec, 4)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, changed = Qat(epochs=0)(module, spec, context())
    again, _ = Qat(epochs=0)(module, spec, context())
    assert changed == spec and not first.training and layers_of(module) == 0
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(first(images), again(images))
        assert 1e-4 < distance(first(images), module(images)) < 0.05  # it does round, and little


def test_32_bits_are_the_identity() -> None:
    module, spec = families.network("vit")
    images = families.images(spec, 2)
    twin, same = Qat(bits=32)(module, spec, PassContext(None, None, None, 0, Path()))
    assert twin is not module and same is spec and Qat(bits=32).needs == frozenset()
    with torch.no_grad():
        assert torch.equal(twin(images), module(images))


def test_training_moves_steps_but_not_in_its_last_fifth() -> None:
    module, spec = families.network("vit")
    seen: list[nn.Module] = []

    def fit(network: nn.Module, *args: Any, **options: Any) -> nn.Module:
        seen.append(trained(network, *args, **options))
        return seen[-1]

    Qat(epochs=1)(module, spec, context(fit))
    journal: Any = seen[0].journal
    learned = [name for name in journal[0] if name.endswith((".bound", ".width", ".low"))]
    assert len(learned) == 12 * 3
    assert all(torch.equal(journal[-2][name], journal[-1][name]) for name in learned)
    assert sum(not torch.equal(journal[0][name], journal[-2][name]) for name in learned) > 30
    assert not torch.equal(journal[-2]["blocks.0.attn.qkv.weight"], journal[-1]["blocks.0.attn.qkv.weight"])  # weights still learn


def test_weights_keep_within_seven_bits_unless_eight_are_asked_for() -> None:
    module, spec = families.network("vit")
    for options, most in (({}, 63), ({"weight_bits": 8}, 127)):
        network, _ = Qat(epochs=0, **options)(module, spec, context())  # type: ignore[arg-type]
        assert max(int(part.whole.abs().max()) for part in network.modules() if isinstance(part, DEPLOYED)) == most


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (2, 1), (4, 3, 3, 3)])
def test_four_bits_come_out_of_their_bytes_as_they_went_in(shape: tuple[int, ...]) -> None:
    values = torch.randint(-8, 8, shape).to(torch.int8)
    packed = pack(values.flatten(1))
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], -(-math.prod(shape[1:]) // 2))
    assert torch.equal(unpack(packed, math.prod(shape[1:])).reshape(shape), values)
    with pytest.raises(ValueError, match="4 bits hold"):
        pack(values + 16)


def test_four_bits_halve_the_bytes_of_int8_weights() -> None:
    module, spec = families.network("vit")
    of_bits = {}
    for bits in (4, 8):
        network, _ = Qat(bits=bits, epochs=0)(module, spec, context())
        of_bits[bits] = sum(part.whole.numel() * part.whole.element_size() for part in network.modules() if isinstance(part, DEPLOYED))
        rebuilt = copy.deepcopy(network)
        rebuilt.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt(families.images(spec, 2)), network(families.images(spec, 2)))
    assert of_bits[4] * 2 == of_bits[8] == sum(part.weight.numel() for part in module.blocks.modules() if isinstance(part, nn.Linear))


def test_bad_options_and_missing_images_are_refused() -> None:
    for options in ({"bits": 2}, {"weight_bits": 6}, {"bits": 4, "weight_bits": 8}, {"epochs": -1}, {"lr": 0}):
        with pytest.raises(SpecError):
            Qat(**options)  # type: ignore[arg-type]
    assert Qat().needs == {"calibration", "training"} and Qat(epochs=0).needs == {"calibration"}
    module, spec = families.network("vit")
    with pytest.raises(SpecError, match="training images"):
        Qat()(module, spec, PassContext(None, None, None, 0, Path()))


# ---------------------------------------------------------------- runtimes


def compiled(spelling: str, network: nn.Module, spec: Any, images: Tensor, folder: Path) -> dict[str, str]:
    shape, notes = (1, *spec.preprocessing.input_size), dict[str, str]()
    (folder / "artifact").mkdir(parents=True)
    export = TorchExport(network, shape, folder, spec.name)
    told = CompileContext(
        shape=shape,
        workdir=folder / "artifact",
        calibration=lambda: images.numpy(),
        held=lambda: Held(images.numpy()),
        note=notes.__setitem__,
    )
    registry.create("backend", spelling).compile(export, told)
    return notes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_execute_every_learned_layer_in_int8(runtime: str, name: str, made: Made, tmp_path: Path) -> None:
    """Beside them two products in float: the stem and the head. Logits move where a runtime's sums round otherwise than torch's do."""
    pytest.importorskip(runtime)
    network, spec = made(name)
    images = families.images(spec, 8)
    spelling = f'{runtime}(precision="int8")'
    notes = compiled(spelling, network, spec, images, tmp_path)
    assert notes["quantisation"] == f"learned (qat): {layers_of(network)} layers"
    session = registry.create("backend", spelling).load(in_folder(tmp_path / "artifact"), threads=1)
    placed = session.audit(images[:1].numpy())
    assert placed is not None and placed.precisions == {"fp32": 2, "int8": layers_of(network)}
    assert session.info().precision == "int8"
    found = np.concatenate([session.infer(image.numpy())["logits"] for image in images.split(1)])
    with torch.no_grad():
        wanted, floats = network(images).numpy(), families.network(name)[0](images).numpy()
    assert distance(found, wanted) < ROUNDING[name]
    assert distance(found, floats) < max(0.02, 1.25 * distance(wanted, floats))
    if name == "vit":  # the others have near ties
        assert np.array_equal(found.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_four_bits_reach_the_runtimes_as_int8(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    module, spec = families.network("vit")
    images = families.images(spec, 4)
    network, _ = Qat(bits=4, epochs=0)(module, spec, context())
    spelling = f'{runtime}(precision="int8")'
    compiled(spelling, network, spec, images, tmp_path)
    session = registry.create("backend", spelling).load(in_folder(tmp_path / "artifact"), threads=1)
    placed = session.audit(images[:1].numpy())
    assert placed is not None and placed.precisions == {"fp32": 2, "int8": 12}
    with torch.no_grad():
        assert distance(session.infer(images[:1].numpy())["logits"], network(images[:1])) < 0.02


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_what_was_trained_for_int8_is_not_compiled_in_float(runtime: str, made: Made, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    network, spec = made("vit")
    with pytest.raises(BackendError, match="trained for int8"):
        compiled(runtime, network, spec, families.images(spec, 2), tmp_path)


RUN = """
import sys
from pathlib import Path
import numpy as np
from edgejoule.compile.executorch import ExecuTorch
from tests.networks import in_folder
folder = Path(sys.argv[1])
session = ExecuTorch(precision="int8").load(in_folder(folder / "artifact"), 1)
images = np.load(folder / "images.npy")
np.save(folder / "logits.npy", np.concatenate([session.infer(images[i : i + 1])["logits"] for i in range(len(images))]))
"""


@pytest.mark.parametrize("name", SMALL)
def test_executorch_lowers_every_learned_layer_in_int8(name: str, made: Made, tmp_path: Path) -> None:
    """Its linear layers scale their inputs anew by row, within the learned ends: close to what was trained, not equal."""
    if (missing := environments.missing("executorch")) is not None:
        pytest.skip(missing)
    network, spec = made(name)
    images = families.images(spec, 8)
    notes = compiled('executorch(precision="int8")', network, spec, images, tmp_path)
    assert notes["quantisation"] == f"learned (qat): {layers_of(network)} layers"
    plan = json.loads((tmp_path / "artifact" / "plan.json").read_text(encoding="utf-8"))
    assert plan["precisions"] == {"fp32": 2, "int8": layers_of(network)}
    np.save(tmp_path / "images.npy", images.numpy())
    python = environments.python_of("executorch")
    assert python is not None
    done = subprocess.run([python, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        wanted = network(images)
        floats = families.network(name)[0](images)
    apart = distance(np.load(tmp_path / "logits.npy"), wanted)
    assert apart < max(0.03, distance(wanted, floats))  # no more than rounding itself costs


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_executorch_refuses_learned_layers_in_float(precision: str, made: Made) -> None:
    from edgejoule.compile import executorch_learned

    network, spec = made("vit")
    program = torch.export.export(network, (families.images(spec, 1),), strict=False)
    assert executorch_learned.is_learned(program)
    if precision == "int8":
        assert executorch_learned.for_kernels(program, precision)[1] == {"quantisation": "learned (qat): 12 layers"}
        return
    with pytest.raises(BackendError, match="trained for int8"):
        executorch_learned.for_kernels(program, precision)
