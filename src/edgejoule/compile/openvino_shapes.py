"""Operators in the shapes that the runtime has kernels for: norms over the last of three axes, constants added without a detour.

OpenVINO's processor plugin has a kernel for (B, N, C) normalised over C and takes (B, H, W, C) apart into seven operators; it fuses
attention only where nothing is reshaped between its products, and windowed attention reshapes to add its mask. Runs nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgejoule.compile.openvino_import import import_openvino
from edgejoule.compile.openvino_weights import constant

Array = np.ndarray[Any, Any]
MOST_COPIED = 1 << 20  # values of a constant that is written out for a shape


def rewrite_norms(model: Any) -> int:
    """In place: norms over the last of more than three axes become norms of (1, N, C). Returns how many."""
    return sum(_rewrite_norm(node) for node in model.get_ordered_ops() if node.get_type_name() == "MVN" and len(node.shape) > 3)


def _rewrite_norm(node: Any) -> int:
    axes, shape = constant(node.input_value(1).get_node()), tuple(node.shape)
    if axes is None or axes.ravel().tolist() not in ([-1], [len(shape) - 1]):
        return 0
    op, told = import_openvino().opset13, node.get_attributes()
    flat = op.reshape(node.input_value(0), op.constant(np.array([1, math.prod(shape[:-1]), shape[-1]])), False)
    norm = op.mvn(flat, op.constant(np.array([-1])), told["normalize_variance"], told["eps"], told["eps_mode"])
    norm.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(op.reshape(norm, op.constant(np.array(shape)), False).output(0))
    return 1


def rewrite_masks(model: Any) -> int:
    """In place: a constant that is added between two reshapes, there and back, is added without them. Returns how many."""
    return sum(_rewrite_mask(node) for node in model.get_ordered_ops() if node.get_type_name() == "Add")


def _rewrite_mask(node: Any) -> int:
    before, values, targets = (
        node.input_value(0).get_node(),
        constant(node.input_value(1).get_node()),
        list(node.output(0).get_target_inputs()),
    )
    if values is None or before.get_type_name() != "Reshape" or len(targets) != 1 or targets[0].get_node().get_type_name() != "Reshape":
        return 0
    after, shape = targets[0].get_node(), tuple(before.input_value(0).shape)
    if tuple(after.shape) != shape or len(before.output(0).get_target_inputs()) != 1 or math.prod(shape) > 64 * MOST_COPIED:
        return 0
    written = _without_repeats(np.broadcast_to(values, tuple(node.shape)).reshape(shape))
    if written.size > max(MOST_COPIED, values.size):
        return 0
    op = import_openvino().opset13
    added = op.add(before.input_value(0), op.constant(written))
    added.set_friendly_name(node.get_friendly_name())
    after.output(0).replace(added.output(0))
    return 1


def keep_axes(model: Any) -> int:
    """In place: means that drop their axes keep them, and a Squeeze drops them. Returns how many.

    The plugin fuses what follows a mean into it, and of (B, N, C) -> (B, C) it takes a wrong axis for the channels of a Multiply before a
    quantiser: answers are wrong. It does so wherever pooled tokens are smoothed for an int8 classifier.
    """
    op, found = import_openvino().opset13, 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReduceMean" and not node.get_attributes()["keep_dims"]:
            mean = op.reduce_mean(node.input_value(0), node.input_value(1), keep_dims=True)
            mean.set_friendly_name(f"{node.get_friendly_name()}/kept")
            squeezed = op.squeeze(mean, node.input_value(1))
            squeezed.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(squeezed.output(0))
            found += 1
    return found


def _without_repeats(values: Array) -> Array:
    """Axes along which nothing changes are left out, of the same rank: (64, 3, 49, 49) of equal heads is (64, 1, 49, 49)."""
    for axis in range(values.ndim):
        first = np.take(values, [0], axis=axis)
        if np.array_equal(np.broadcast_to(first, values.shape), values):
            values = first
    return np.ascontiguousarray(values)
