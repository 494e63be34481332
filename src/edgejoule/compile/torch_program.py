"""What torch's own backends share: a network in another type or memory layout, what a precision needs of a device, how products round.

Whatever the file holds, it takes float32 images (B, C, H, W) in rows and gives float32 logits (B, K): the casts and the change of layout
are part of it. Knows no runtime, file or cache. torch is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from edgejoule.compile.cpu import has_bf16, has_fp16
from edgejoule.compile.reasons import reason
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.seams import Export

Layout = Literal["contiguous", "channels_last"]
STORED = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64", "int8": "int8", "uint8": "int8"}


def lacking(precision: str, device: str) -> str | None:
    """One sentence where torch is not installed, the device not there, or the precision not among its instructions; else None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'edgejoule[host]'"
    if device == "cuda":
        return _lacking_on_cuda(precision)
    if precision == "tf32":
        return "TF32 products are the tensor cores' of NVIDIA GPUs: use device='cuda', or precision='bf16' on a processor"
    if precision == "bf16" and has_bf16() is False:
        return "this processor has no bfloat16 instructions (avx512_bf16, amx_bf16 or arm bf16): use precision='fp32'"
    if precision == "fp16" and not has_fp16():  # torch would emulate them, hundreds of times slower than float32
        return "this processor has no float16 instructions that are known of (avx512_fp16 or arm asimdhp): use precision='bf16' or 'fp32'"
    return None


def _lacking_on_cuda(precision: str) -> str | None:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({reason(error)}): install it again"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU: install a CUDA build of torch and NVIDIA's driver, or use device='cpu'"
    name = torch.cuda.get_device_name()
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{name} has no bfloat16 instructions (Ampere and newer have): use precision='fp32'"
    if precision == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        return f"{name} has no TF32 products (Ampere and newer have): use precision='fp32' or 'fp16'"
    return None


def set_products(tf32: bool) -> None:
    """How this process multiplies float32: exactly, or on tensor cores with 10 bits of mantissa (TF32). By torch's old switches and its
    new ones, because torch refuses to tell what it does where they differ."""
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")  # the latter for oneDNN too, which may multiply in bfloat16
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    _set_convolutions(tf32)


def _set_convolutions(tf32: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = tf32
    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"


@contextlib.contextmanager
def products_set(tf32: bool) -> Iterator[None]:
    """``set_products`` for a while: what is compiled then multiplies so, and the process goes on as before."""
    import torch

    exact, conv = torch.get_float32_matmul_precision() == "highest", torch.backends.cudnn.allow_tf32
    set_products(tf32)
    try:
        yield
    finally:
        set_products(not exact)
        _set_convolutions(bool(conv))


def float32_products() -> dict[str, str]:
    """What torch says now of float32 products on a GPU: {"matmul" | "conv": "fp32" | "tf32"}."""
    import torch

    cudnn: Any = torch.backends.cudnn
    said = {"matmul": torch.backends.cuda.matmul.fp32_precision, "conv": cudnn.conv.fp32_precision}
    return {kind: "tf32" if word == "tf32" else "fp32" for kind, word in said.items()}


def program_of(export: Export, precision: str, layout: Layout, shape: tuple[int, int, int, int]) -> Any:
    """The ExportedProgram of (B, C, H, W) float32 -> (B, K) float32 that computes in ``precision``. Raises ModelError and BackendError."""
    if STORED[precision] == "float32" and layout == "contiguous":
        return export.program
    from edgejoule.compile.export import export_program

    name = f"the network in {STORED[precision]}, {layout}"
    return export_program(prepared(export.module, precision, layout, shape), shape, name)


def load_program(path: Path, device: str) -> Any:
    """The saved ExportedProgram, on the device. Raises ArtifactError for a file that is none, BackendError where it does not fit there."""
    import torch
    from torch.export.passes import move_to_device_pass

    from edgejoule.compile.export import quiet

    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise ArtifactError(f"{path} is not a program that torch {torch.__version__} can load ({reason(error)}): compile again") from error
    try:
        return move_to_device_pass(program, device) if device != "cpu" else program
    except Exception as error:
        raise BackendError(f"torch cannot put {path} on {device} ({reason(error)}): free some memory or use another device") from error


def shapes_of(program: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the images (B, C, H, W) and the logits (B, K), from the program's fake tensors."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ends = program.graph_signature
    return tuple(values[ends.user_inputs[0]].shape), tuple(values[ends.user_outputs[0]].shape)


def precision_of(program: Any, device: str) -> str:
    """Of a program's floating weights, and of what its linear layers and convolutions give; float32 on a GPU by torch's TF32 switches."""
    kinds = {value.dtype for value in program.state_dict.values() if value.is_floating_point()}
    switches = set()
    for node in program.graph.nodes:
        name = str(getattr(node.target, "_opname", ""))
        if node.op == "call_function" and name in ("linear", "addmm", "conv1d", "conv2d", "convolution"):
            kinds.add(node.meta["val"].dtype)
            switches.add("conv" if "conv" in name else "matmul")
    found = {SHORT.get(word, word) for word in (str(kind).removeprefix("torch.") for kind in kinds)}
    if device == "cuda" and "fp32" in found:
        said = float32_products()
        found = found - {"fp32"} | {said[switch] for switch in switches or {"matmul"}}
    return "+".join(sorted(found))


def prepared(module: Any, precision: str, layout: Layout, shape: tuple[int, int, int, int]) -> Any:
    """A module that casts and lays out its images, runs a copy of ``module`` and casts its logits; ``module`` where nothing changes.

    Raises BackendError where the network does not run in that type; float16 is not tried, which processors take minutes for.
    """
    import torch

    if STORED[precision] == "float32" and layout == "contiguous":
        return module
    dtype = getattr(torch, STORED[precision])
    twin = _cast(copy.deepcopy(module), dtype)
    if layout == "channels_last":
        twin = twin.to(memory_format=torch.channels_last)
    made = _cased(twin, dtype, torch.channels_last if layout == "channels_last" else torch.contiguous_format).eval()
    if precision == "bf16":
        with torch.no_grad():
            try:
                made(torch.zeros(shape))
            except Exception as error:
                raise BackendError(f"the network does not run in bfloat16 ({reason(error)}): use precision='fp32'") from error
    return made


def _cast(twin: Any, dtype: Any) -> Any:
    """All of a module, the float32 tensors included that some networks (LeViT) cache outside their buffers, where .to() does not reach."""
    import torch

    def is_plain(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.dtype == torch.float32

    twin = twin.to(dtype)
    for part in twin.modules():
        for name, value in list(vars(part).items()):
            if is_plain(value):
                setattr(part, name, value.to(dtype))
            elif isinstance(value, dict):
                value.update({key: held.to(dtype) for key, held in value.items() if is_plain(held)})
    return twin


def _cased(inner: Any, dtype: Any, memory_format: Any) -> Any:
    import torch

    class Cased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) float32 -> (B, K) float32
            logits: torch.Tensor = self.inner(images.to(dtype).contiguous(memory_format=memory_format))
            return logits.float()

    return Cased()
