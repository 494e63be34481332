"""Learned int8 rounding (the pass ``qat``) as XNNPACK computes it: linear layers whose inputs are scaled at every inference.

XNNPACK has int8 convolutions between fixed grids, which the program holds already, and linear layers of such grids only where their
results are rounded to int8 too, which these are not. So a linear layer's input is clipped to the ends of its learned grid and scaled
anew by row: the weights are the learned ones, and no input is rounded more coarsely than in training. Lowers nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators, which reading a program needs

from edgejoule.compile.learned import note_of
from edgejoule.errors import BackendError

aten, quantised = torch.ops.aten, torch.ops.quantized_decomposed
LINEAR, CONVOLUTION = aten.linear.default, aten.conv2d.default
QUANTIZE, DEQUANTIZE = quantised.quantize_per_tensor.default, quantised.dequantize_per_tensor.default
EPS = 2.0**-12  # of a scale: what PT2E's quantiser for XNNPACK writes


def is_learned(program: Any) -> bool:
    return any(node.target == QUANTIZE for node in program.graph.nodes)


def for_kernels(program: Any, precision: str) -> tuple[Any, Mapping[str, str]]:
    """The program to lower, and what to note. Raises BackendError for another precision than it was trained for."""
    if precision != "int8":
        raise BackendError(f"the network was trained for int8, not {precision}: ask for precision='int8'")
    program, layers = scaled_by_row(program)
    return program, {"quantisation": note_of(layers)}


def scaled_by_row(program: Any) -> tuple[Any, int]:
    """The exported program for XNNPACK, and how many layers have int8 weights. Convolutions keep their fixed grids."""
    module, images = program.module(check_guards=False), program.example_inputs[0]
    layers = 0
    for node in list(module.graph.nodes):
        learned = node.target in (LINEAR, CONVOLUTION) and getattr(node.args[0], "target", None) == DEQUANTIZE
        layers += learned
        if learned and node.target == LINEAR:
            _scale_by_row(module.graph, node)
    _read_apart(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, images, strict=False), layers


def _scale_by_row(graph: Any, linear: Any) -> None:
    rounded = linear.args[0].args[0]
    source, scale, zero, lowest, highest, kind = rounded.args
    with graph.inserting_before(linear):
        ends = (scale * (lowest - zero), scale * (highest - zero))
        clipped = graph.call_function(aten.clamp.default, (source, *ends))
        chosen = graph.call_function(quantised.choose_qparams.tensor, (clipped, lowest, highest, EPS, kind))
        grid = [graph.call_function(operator.getitem, (chosen, place)) for place in (0, 1)]
        told = (*grid, lowest, highest, kind)
        whole = graph.call_function(quantised.quantize_per_tensor.tensor, (clipped, *told))
        linear.replace_input_with(linear.args[0], graph.call_function(quantised.dequantize_per_tensor.tensor, (whole, *told)))


def _read_apart(graph: Any) -> None:
    """Every reader gets a dequantised value of its own: the partitioner takes the operator with each operand's, and finds a cycle where
    a residual sum and the layer beside it share one ("Invalid partition, found dependency cycles", ExecuTorch 1.4)."""
    for node in [node for node in graph.nodes if node.target == DEQUANTIZE]:
        for reader in list(node.users)[1:]:
            with graph.inserting_before(reader):
                reader.replace_input_with(node, graph.node_copy(node))
