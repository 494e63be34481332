"""The files that pnnx writes for ncnn: their layers, and loading them. Shared by the backend and its worker. Knows no artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgejoule.errors import ArtifactError

PARAM, BIN = "model.param", "model.bin"
ENTRY, LEAVE = "in0", "out0"  # pnnx's names of the first input and output
HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic")  # ncnn's own default is to use all three
MAGIC = "7767517"
WEIGHTED = frozenset(
    {"Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "InnerProduct", "MultiHeadAttention"}
)
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Layer:
    """A line of the .param file."""

    kind: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def has_weights(self) -> bool:
        """A Gemm's fourth and fifth option say that one of its operands is constant."""
        return self.kind in WEIGHTED or (self.kind == "Gemm" and bool({"4=1", "5=1"} & set(self.options)))


def load(ncnn: Any, folder: Path, half: bool, threads: int) -> Any:
    """Raises ArtifactError."""
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.openmp_blocktime = 0  # threads that spin between layers burn energy that is not the network's
    for name in HALF:
        setattr(net.opt, name, half)
    if net.load_param(str(folder / PARAM)) or net.load_model(str(folder / BIN)):
        raise ArtifactError(f"ncnn {ncnn.__version__} cannot load {folder / PARAM}: compile again")
    if list(net.input_names()) != [ENTRY] or list(net.output_names()) != [LEAVE]:
        raise ArtifactError(f"{folder / PARAM} has other inputs or outputs than {ENTRY} and {LEAVE}: compile again")
    return net


def read_layers(path: Path) -> list[Layer]:
    """The layers of a .param file: kind, name, number of inputs and outputs, their names, options. Raises ArtifactError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].strip() != MAGIC:
        raise ArtifactError(f"{path} does not begin with ncnn's {MAGIC}: compile again")
    found = []
    for line in lines[2:]:
        kind, _, bottoms, tops, *rest = line.split()
        entries, leaves = int(bottoms), int(tops)
        found.append(Layer(kind, tuple(rest[:entries]), tuple(rest[entries : entries + leaves]), tuple(rest[entries + leaves :])))
    return found
