"""Float edits of norms and the products behind them that leave the network's output as it was and make it easier to quantise.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 4): s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); the norm's gain and shift are
divided by s, the weights' input channels multiplied. LayerNorm folding (RepQ-ViT, Li et al. 2023, arXiv 2212.08254, equations 8 to 12):
each channel is given one common scale and zero point, so that one quantiser for the tensor fits as one for each channel
would. Both hold for any norm whose output only products read (``norms``). Writes no Q/DQ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from edgejoule.compile.quantize.graph import Array, Graph, Product
from edgejoule.compile.quantize.norms import Norm
from edgejoule.compile.quantize.observe import Observed

FARTHEST = 1e4  # no channel is scaled by more than this or less than its inverse: float32 keeps 7 digits
DEAD = 1e-2  # a channel narrower than this fraction of the mean one is treated as so wide
TINY = 1e-8


def smooth(graph: Graph, norms: Iterable[Norm], seen: Mapping[str, Observed], how: float | str) -> tuple[Graph, dict[str, Observed]]:
    """A copy with every norm folded (``how``: alpha, or "fold"), and what will be observed in it. ``seen`` is channel-wise there."""
    edited, after = graph.copy(), dict(seen)
    for norm in norms:
        sources = {product.source for product in norm.products}
        low = np.minimum.reduce([seen[source].low for source in sources])
        high = np.maximum.reduce([seen[source].high for source in sources])
        if isinstance(how, str):
            divisor, offset = repq(low, high, norm.shiftable)
        else:
            divisor, offset = smoothquant(low, high, _weight_extremes(graph, norm), how), np.zeros_like(low)
        _fold(edited, norm, divisor, offset)
        for source in sources:
            before = seen[source]
            after[source] = Observed(before.axis, (before.low + offset) / divisor, (before.high + offset) / divisor, before.counts)
    return Graph(edited.model), after  # read again: a product may have got a bias


def smoothquant(low: Array, high: Array, weights: Array, alpha: float) -> Array:
    """(C,) divisors from the activations' extremes and the weights' largest magnitudes, per channel; of geometric mean 1."""
    activations = np.maximum(np.maximum(np.abs(low), np.abs(high)), TINY)
    found = np.power(activations, alpha) / np.power(np.maximum(weights, TINY), 1.0 - alpha)
    return _bounded(found / np.exp(np.log(found).mean()))  # one factor for all channels changes no quantiser: kept near 1 for rounding


def repq(low: Array, high: Array, shiftable: bool) -> tuple[Array, Array]:
    """(C,) divisors r1 and offsets: x' = (x + offset) / r1 has the mean channel's width and the median one's zero point in all."""
    width = high - low
    scale = np.maximum(width, max(DEAD * float(width.mean()), TINY))  # the quantiser's scale times 255: the factor cancels
    zero = -low / scale
    offset = scale * (zero - np.median(zero)) if shiftable else np.zeros_like(low)  # not the mean: dead channels lie anywhere
    return _bounded(scale / scale.mean()), offset


def _bounded(divisor: Array) -> Array:
    return np.clip(divisor, 1 / FARTHEST, FARTHEST)


def _weight_extremes(graph: Graph, norm: Norm) -> Array:
    """(C,) largest magnitude of each input channel over all products that the norm feeds."""
    largest: Array = np.maximum.reduce([np.abs(_by_input(graph.array(p.weight), p)).max(axis=1) for p in norm.products])
    return largest


def _by_input(weight: Array, product: Product) -> Array:
    return np.moveaxis(weight, product.in_axis, 0).reshape(weight.shape[product.in_axis], -1)


def _fold(graph: Graph, norm: Norm, divisor: Array, offset: Array) -> None:
    """In place: the norm gives (x + offset) / divisor, and its products take that back."""
    gain, shift = graph.array(norm.gain), graph.array(norm.shift)
    graph.set_array(norm.gain, (gain / divisor.reshape(gain.shape)).astype(np.float32))
    graph.set_array(norm.shift, ((shift + offset.reshape(shift.shape)) / divisor.reshape(shift.shape)).astype(np.float32))
    for product in norm.products:
        weight = graph.array(product.weight).astype(np.float64)
        shape = [1] * weight.ndim
        shape[product.in_axis] = -1
        graph.set_array(product.weight, (weight * divisor.reshape(shape)).astype(np.float32))
        if offset.any():
            summed = np.moveaxis(weight, product.in_axis, 0) * offset.reshape(-1, *[1] * (weight.ndim - 1))
            taken = np.moveaxis(summed.sum(axis=0)[None], 0, product.in_axis)  # one input channel is left
            _subtract_bias(graph, product, np.moveaxis(taken, product.out_axis, 0).reshape(weight.shape[product.out_axis], -1).sum(axis=1))


def _subtract_bias(graph: Graph, product: Product, taken: Array) -> None:
    if product.bias:
        bias = graph.array(product.bias).astype(np.float64)
        graph.set_array(product.bias, (bias - taken.reshape(bias.shape)).astype(np.float32))
        return
    name = f"{product.output}_bias"
    graph.set_array(name, (-taken).astype(np.float32))
    node = graph.node(product.name)
    if product.op != "MatMul":  # Conv and Gemm take one as their third input
        node.input.append(name)
        return
    import onnx

    node.output[0] = f"{product.output}_unshifted"
    added = onnx.helper.make_node("Add", [node.output[0], name], [product.output], name=f"{product.name}_bias")
    nodes = list(graph.model.graph.node)
    place = next(n for n, found in enumerate(nodes) if found.name == product.name)
    graph.model.graph.node.insert(place + 1, added)
