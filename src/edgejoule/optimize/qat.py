"""Pass: quantisation-aware training. Linear layers and convolutions learn to live with int8, and come out as int8 layers.

Batch norms are folded first (the pass ``fuse``); then each layer of ``quantisable.py`` rounds its weights by row (symmetric) and its input
by tensor (with a zero point), a convolution its output as well, without which runtimes compute it in float; ranges begin where they lose
least on training images, and are trained with the weights (``fake_quantise.py``). What comes out holds whole weights and settled grids
(``quantised.py``), and runs in int8 on onnxruntime, openvino and executorch with ``precision="int8"``. Knows no backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgejoule import registry
from edgejoule.errors import ModelError, SpecError
from edgejoule.optimize.copies import copied
from edgejoule.optimize.fake_quantise import FakeQuantisedConv2d, FakeQuantisedLinear, LearnedGrid, least_range
from edgejoule.optimize.impossible import refuse
from edgejoule.optimize.pruning import names_of
from edgejoule.optimize.quantisable import Found, find_layers
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext

IMAGES = 64  # that ranges begin with
BATCH = 8
SAMPLE = 8192  # values of a tensor and batch that ranges are chosen on, beside its extremes
MOST_4_BIT = 7


@dataclass(frozen=True)
class Qat:
    """``qat(bits=8, epochs=2)``: trained for int8. ``epochs=0`` only chooses ranges, without training.

    ``weight_bits=7`` keeps weights in -63..63: x86 processors without VNNI add pairs of 8-bit products in 16 bits, which saturate with 8.
    ``bits=4`` puts weights on a grid of 15 values, kept two to a byte: that saves bytes of the file, not time, for runtimes unpack them
    to int8; inputs are of 8 bits all the same. ``bits=32`` leaves everything as it is. ``lr`` is a factor of the training recipe's rate;
    ``distill`` is the spelling of a distillation (``soft(alpha=0.5)``), by default from the network that the recipe began with. ``layers``
    names the layers, or the blocks of layers, that are quantised: none named, all that may be.
    """

    bits: Literal[4, 8, 32] = 8
    weight_bits: Literal[7, 8] = 7
    epochs: float = 2.0
    lr: float = 0.1
    distill: str = ""
    layers: list[str] | tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 32):
            raise SpecError(f"qat(bits={self.bits}): expected 8, 4 (weights of 4 bits) or 32 (nothing is rounded)")
        if self.weight_bits not in (7, 8):
            raise SpecError(f"qat(weight_bits={self.weight_bits}): expected 7 or 8; for weights of 4 bits there is bits=4")
        if self.weight_bits != 7 and self.bits != 8:
            raise SpecError(f"qat(weight_bits={self.weight_bits}) belongs to bits=8, not {self.bits}: leave one of them out")
        names_of("qat", self.layers)
        if self.epochs < 0 or self.lr <= 0:
            raise SpecError(f"qat(epochs={self.epochs:g}, lr={self.lr:g}): expected epochs of at least 0 and a positive lr")

    @property
    def needs(self) -> frozenset[Any]:
        if self.bits == 32:
            return frozenset()
        return frozenset({"calibration", "training"} if self.epochs > 0 else {"calibration"})

    @property
    def learns_from(self) -> str:
        """The distillation that its training asks for, "" for labels alone."""
        return self.distill if self.bits != 32 and self.epochs > 0 else ""

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """The network with int8 layers, in eval mode, and the spec as it is. Raises ModelError; of ``fit`` TrainingError and DataError."""
        if self.bits == 32:
            return copied(module), spec
        refuse("qat", module, spec.name)
        if context.data is None or (self.epochs > 0 and context.fit is None):
            raise SpecError("qat needs training images, and with epochs training: give the recipe a data set, or leave qat out of it")
        network = fused(module, spec, context)
        images = torch.as_tensor(context.data(spec, IMAGES).images)  # (N, C, H, W)
        found = find_layers(network, images[:1], spec.name).within(names_of("qat", self.layers))
        if not found.linears and not found.convolutions:
            where = f" below {', '.join(self.layers)}" if self.layers else ""
            raise ModelError(f"{spec.name} has no linear layer or convolution{where} that could run in int8: leave qat out of its recipe")
        context.notify(f"qat: {len(found.linears) + len(found.convolutions)} layers in int8, {len(found.left)} stay in float")
        prepare(network, found, images, MOST_4_BIT if self.bits == 4 else 2 ** (self.weight_bits - 1) - 1)
        if self.epochs > 0:
            assert context.fit is not None  # see above
            network = context.fit(network, spec, epochs=self.epochs, lr=self.lr, distill=self.learns_from)
        deploy(network, self.bits)
        network.eval()
        return network, spec


def fused(module: nn.Module, spec: ModelSpec, context: PassContext) -> nn.Module:
    """A copy without batch norms where they can be folded. Raises ModelError."""
    try:
        network: nn.Module = registry.create("pass", "fuse")(module, spec, context)[0]
    except ModelError as error:
        raise ModelError(f"qat begins by folding batch norms, as the pass fuse does, and that fails: {error}") from error
    network.eval()
    return network


def prepare(network: nn.Module, found: Found, images: Tensor, most: int) -> None:
    """Puts layers that round, and learn how, in the place of those that were found, in place. ``images`` (N, C, H, W) give first ranges."""
    seen = observe(network, found, images)
    for path in found.linears:
        _replace(network, path, FakeQuantisedLinear(network.get_submodule(path), most, seen[path, "in"].grid()))  # type: ignore[arg-type]
    for path, rectified in found.convolutions.items():
        layer: Any = network.get_submodule(path)
        _replace(network, path, FakeQuantisedConv2d(layer, most, seen[path, "in"].grid(), seen[path, "out"].grid(rectified)))


def deploy(network: nn.Module, bits: int) -> None:
    """Puts layers of whole numbers in the place of those that learned them, in place."""
    for path, part in list(network.named_modules()):
        if isinstance(part, (FakeQuantisedLinear, FakeQuantisedConv2d)):
            _replace(network, path, part.deployed(bits))


def _replace(network: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    new.train(network.training)
    network.get_submodule(parent)._modules[name] = new  # a container's children have numbers for names


class Seen:
    """The extremes of a tensor, and a sample of it."""

    def __init__(self) -> None:
        self._low, self._high = 0.0, 0.0
        self._parts: list[Tensor] = []

    def look(self, values: Tensor) -> None:
        flat = values.detach().float().flatten()
        self._low, self._high = min(self._low, float(flat.min())), max(self._high, float(flat.max()))
        self._parts.append(flat[:: max(len(flat) // SAMPLE, 1)].clone())

    def grid(self, rectified: bool = False) -> LearnedGrid:
        values = torch.cat([*self._parts, torch.tensor([self._low, self._high])])
        low, values = (0.0, values.relu()) if rectified else (self._low, values)
        return LearnedGrid(*least_range(values, low, self._high), rectified)


def observe(network: nn.Module, found: Found, images: Tensor) -> dict[tuple[str, str], Seen]:
    """(path, "in") and (path, "out") -> what went through there: of linear layers the input, of convolutions both."""
    seen: dict[tuple[str, str], Seen] = {(path, "in"): Seen() for path in (*found.linears, *found.convolutions)}
    seen |= {(path, "out"): Seen() for path in found.convolutions}
    hooks = []
    for path in (*found.linears, *found.convolutions):

        def look(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, path: str = path) -> None:
            seen[path, "in"].look(inputs[0])
            if (path, "out") in seen:
                seen[path, "out"].look(output)

        hooks.append(network.get_submodule(path).register_forward_hook(look))
    try:
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                network(images[start : start + BATCH])
    finally:
        for hook in hooks:
            hook.remove()
    return seen
