"""Rewriting an exported program so that XNNPACK takes all of it: the same numbers, spelt in the operators that the delegate has.

A Vision Transformer as exported falls into dozens of delegated pieces: LayerNorm, scaled scores, indexing, splitting and expanding have
no XNNPACK operator, and every piece between two others is copied and runs on one thread. Each function here is the decomposition of one
ATen operator; ``constants`` computes what depends on weights alone. Exact but for rounding. Knows no file and no quantiser.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def rewrite(program: Any) -> Any:
    """The exported program with the table's operators decomposed and all constants computed."""
    return constants(program.run_decompositions(dict(table())))


def constants(program: Any) -> Any:
    """Computes what depends on weights alone, such as an interpolated position embedding; int8 weights stay int8. Changes ``program``."""
    from executorch.exir.operator.util import _QUANT_PRIMITIVES
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    return constant_prop_pass(program, custom_skip_targets=set(_QUANT_PRIMITIVES))


def table() -> Mapping[Any, Callable[..., Any]]:
    """ATen operator -> its spelling in operators that XNNPACK has. A spelling gives None where it does not know that case."""
    composite: dict[Any, Callable[..., Any]] = {
        aten.layer_norm.default: layer_norm,
        aten.matmul.default: matmul,
        aten.scaled_dot_product_attention.default: attention,
        aten.chunk.default: chunk,
    }
    explicit: dict[Any, Callable[..., Any]] = {
        aten.select.int: select,
        aten.unbind.int: unbind,
        aten.split.Tensor: split,
        aten.split_with_sizes.default: split_with_sizes,
        aten.squeeze.dim: squeeze,
        aten.unsqueeze.default: unsqueeze,
        aten.expand.default: expand,
        aten.mul.Scalar: multiply,
        aten.mean.dim: mean,
    }
    spelt: dict[Any, Callable[..., Any]] = {op: functools.partial(_or_composite, op, how) for op, how in composite.items()}
    return {**spelt, **{op: functools.partial(_or_kept, how) for op, how in explicit.items()}}


def _or_composite(op: Any, spelling: Callable[..., Any], *args: Any, **options: Any) -> Any:
    found = spelling(*args, **options)
    return op._op_dk(COMPOSITE, *args, **options) if found is None else found


def _or_kept(spelling: Callable[..., Any], *args: Any, **options: Any) -> Any:
    found = spelling(*args, **options)
    return NotImplemented if found is None else found


# ---------------------------------------------------------------- the spellings


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, cudnn: bool = True
) -> Tensor | None:
    """Over the last axis. XNNPACK averages images only, so the means are products with a row of 1/D."""
    if len(shape) != 1:
        return None
    mean = torch.full((1, shape[0]), 1.0 / shape[0])  # (1, D)
    centred = x - functional.linear(x, mean)  # (..., D)
    normal = centred * torch.rsqrt(functional.linear(centred * centred, mean) + _number(eps))
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """(..., N, D) x (..., D, M) of equal leading axes, at least one: as one batch, with nothing expanded."""
    if a.ndim < 3 or a.shape[:-2] != b.shape[:-2]:
        return None
    flat = math.prod(a.shape[:-2])
    product = torch.bmm(a.reshape(flat, *a.shape[-2:]), b.reshape(flat, *b.shape[-2:]))
    return product.reshape(*a.shape[:-1], b.shape[-1])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """softmax(q k^T * scale + mask) v. torch's own spelling guards rows whose mask is -inf throughout, with eight operators more."""
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    if dropout_p or is_causal or enable_gqa or boolean or q.ndim < 3 or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    scores = matmul(q * _number(q.shape[-1] ** -0.5 if scale is None else scale), k.transpose(-2, -1))  # (B, H, N, M)
    assert scores is not None  # the leading axes are equal
    return matmul((scores if attn_mask is None else scores + attn_mask).softmax(-1), v)


def select(x: Tensor, dim: int, index: int) -> Tensor:
    dim, shape = dim % x.ndim, list(x.shape)
    return x.narrow(dim, index % shape[dim], 1).reshape(shape[:dim] + shape[dim + 1 :])


def unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    return [select(x, dim, index) for index in range(x.shape[dim])]


def split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim]
    return split_with_sizes(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def chunk(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    return split(x, -(-x.shape[dim] // chunks), dim)


def squeeze(x: Tensor, dim: int) -> Tensor | None:
    dim, shape = dim % max(x.ndim, 1), list(x.shape)
    return x.reshape(shape[:dim] + shape[dim + 1 :]) if shape and shape[dim] == 1 else None


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    dim, shape = dim % (x.ndim + 1), list(x.shape)
    return x.reshape([*shape[:dim], 1, *shape[dim:]])


def expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Tensor | None:
    """Only what expands nothing."""
    wanted = [here if asked == -1 else asked for asked, here in zip(size, x.shape, strict=False)]
    return x.view(x.shape) if len(size) == x.ndim and wanted == list(x.shape) else None


def mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor | None:
    """A token mean (B, N, D) -> (B, D) as a product with a row of 1/N; the planes of images (B, C, H, W) as the delegate averages them."""
    reduced = sorted(dim % x.ndim for dim in dims or range(x.ndim))
    if dtype is not None or not x.is_floating_point() or len(reduced) == x.ndim or (x.ndim == 4 and reduced == [2, 3] and keepdim):
        return None
    left = [dim for dim in range(x.ndim) if dim not in reduced]
    shape = [1 if dim in reduced else x.shape[dim] for dim in range(x.ndim) if keepdim or dim in left]
    if x.ndim == 4 and reduced == [2, 3]:
        return x.mean((2, 3), keepdim=True).reshape(shape)
    count = math.prod(x.shape[dim] for dim in reduced)
    rows = x.permute(*left, *reduced).reshape(*(x.shape[dim] for dim in left), count)
    return functional.linear(rows, torch.full((1, count), 1.0 / count)).reshape(shape)


def multiply(x: Tensor, factor: float) -> Tensor | None:
    return x * _number(float(factor)) if x.is_floating_point() else None


def _number(value: float) -> Tensor:
    """A constant that the delegate takes: it has operators of two tensors only."""
    return torch.full((1,), value)
