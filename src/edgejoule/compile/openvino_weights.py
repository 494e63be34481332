"""Weights of OpenVINO's products, plain or dequantised from int8, with their output channels permuted and scaled, exactly as they are kept.

An int8 weight's values stay what they are: its channels change places, and a factor goes into its scales. Runs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgejoule.compile.openvino_import import import_openvino

Array = np.ndarray[Any, Any]


def constant(node: Any) -> Any:
    """A Constant's values, a new array; None for any other node."""
    return np.array(node.data) if node.get_type_name() == "Constant" else None


def only_reader(node: Any) -> Any:
    """The one operator that reads what a node gives; None where several do, where nothing does, and of nodes with several outputs."""
    targets = list(node.output(0).get_target_inputs()) if node.get_output_size() == 1 else []
    return targets[0].get_node() if len(targets) == 1 else None


def permuted(node: Any, axis: int, order: Array, factor: Array | None) -> Any:
    """A new node: of ``node``'s values the channels along ``axis`` in ``order``, each times its ``factor`` (in the new order).

    None where ``node`` is neither a float constant nor int8 values, converted and multiplied by constant scales.
    """
    openvino = import_openvino()
    op, kind = openvino.opset13, node.get_type_name()
    if kind == "Constant":
        values = constant(node)
        if values is None or (factor is not None and values.dtype != np.float32):
            return None
        return op.constant(_scaled(_taken(values, axis, order), axis, factor))
    if kind == "Convert" and factor is None:
        inside = permuted(node.input_value(0).get_node(), axis, order, None)
        return None if inside is None else op.convert(inside, node.get_element_type().to_string())
    if kind in ("Multiply", "Subtract"):
        left, right = (node.input_value(place).get_node() for place in (0, 1))
        values = constant(right)
        if values is None or values.ndim != len(node.shape) or (kind == "Subtract" and factor is not None):
            return None
        inside = permuted(left, axis, order, None)
        scales = _taken(values, axis, order)
        if kind == "Multiply" and factor is not None:
            scales = _scaled(np.broadcast_to(scales, _widened(scales.shape, axis, len(order))), axis, factor)
        return None if inside is None else (op.multiply if kind == "Multiply" else op.subtract)(inside, op.constant(np.array(scales)))
    return None


def _taken(values: Array, axis: int, order: Array) -> Array:
    return values if values.shape[axis] == 1 else np.take(values, order, axis=axis)


def _widened(shape: tuple[int, ...], axis: int, width: int) -> tuple[int, ...]:
    return tuple(width if place == axis else size for place, size in enumerate(shape))


def _scaled(values: Array, axis: int, factor: Array | None) -> Array:
    if factor is None:
        return np.ascontiguousarray(values)
    shape = [1] * values.ndim
    shape[axis] = -1
    return (values * factor.reshape(shape)).astype(values.dtype)


def flattened(node: Any) -> Any:
    """A new node: (O, I, P, Q) as (O, I * P * Q). None as of ``permuted``, and where values are scaled by input channel."""
    op, kind = import_openvino().opset13, node.get_type_name()
    if kind == "Constant":
        values = constant(node)
        return None if values is None else op.constant(values.reshape(values.shape[0], -1))
    if kind == "Convert":
        inside = flattened(node.input_value(0).get_node())
        return None if inside is None else op.convert(inside, node.get_element_type().to_string())
    if kind in ("Multiply", "Subtract"):
        values, inside = constant(node.input_value(1).get_node()), flattened(node.input_value(0).get_node())
        if values is None or inside is None or values.size not in (1, len(values)):
            return None
        return (op.multiply if kind == "Multiply" else op.subtract)(inside, op.constant(values.reshape(-1, 1)))
    return None
