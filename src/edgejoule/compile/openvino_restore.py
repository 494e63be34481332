"""Where an OpenVINO graph quantises, and the graph without one of its quantisers. Knows no NNCF, runs nothing."""

from __future__ import annotations

from typing import Any

PRODUCTS = frozenset({"MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData"})
CONSTANT = frozenset({"Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})  # are constants where what they take is one
DEQUANTISED = CONSTANT | {"Multiply", "Subtract", "FakeQuantize"}
# What a quantised tensor goes through unchanged in value on its way to a product.
WAY = CONSTANT | {"Slice", "StridedSlice", "Split", "VariadicSplit", "Gather", "Concat", "MaxPool", "ReduceMax", "Pad", "Tile", "Broadcast"}
INT8 = ("i8", "u8")


def is_weighted(node: Any) -> bool:
    """A linear layer or convolution: a product with a constant."""
    return node.get_type_name() in PRODUCTS and any(is_constant(node.input_value(place).get_node()) for place in (0, 1))


def weighted_names(model: Any) -> tuple[str, ...]:
    return tuple(node.get_friendly_name() for node in model.get_ops() if is_weighted(node))


def int8_names(model: Any) -> frozenset[str]:
    """The products whose weights are kept in int8."""
    return frozenset(node.get_friendly_name() for node in model.get_ops() if is_weighted(node) and set(_weight_types(node)) & set(INT8))


def activation_quantizers(model: Any) -> dict[str, tuple[str, ...]]:
    """FakeQuantize of an activation -> the products that take it, directly or through operators that only move values."""
    return {
        node.get_friendly_name(): tuple(dict.fromkeys(_products_after(node)))
        for node in model.get_ops()
        if node.get_type_name() == "FakeQuantize" and not is_constant(node.input_value(0).get_node())
    }


def bypass(model: Any, quantizer: str) -> Any:
    """A copy in which what the quantiser took goes on as it is."""
    copy = model.clone()
    node = next(node for node in copy.get_ops() if node.get_friendly_name() == quantizer)
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(node.input_value(0))
    return copy


def _products_after(node: Any) -> list[str]:
    found: list[str] = []
    for output in node.outputs():
        for target in output.get_target_inputs():
            reader = target.get_node()
            if reader.get_type_name() in PRODUCTS:
                found.append(reader.get_friendly_name())
            elif reader.get_type_name() in WAY:
                found += _products_after(reader)
    return found


def _weight_types(node: Any) -> list[str]:
    """The element types of the constants that a product, or what dequantises its weights, takes."""
    found: list[str] = []
    for place in range(node.get_input_size()):
        source = node.input_value(place).get_node()
        if source.get_type_name() == "Constant":
            found.append(source.get_element_type().to_string())
        elif is_constant(source):
            found += _weight_types(source)
    return found


def is_constant(node: Any) -> bool:
    """Weights, as they are or dequantised from int8."""
    kind = node.get_type_name()
    if kind not in DEQUANTISED:
        return bool(kind == "Constant")
    return all(is_constant(node.input_value(place).get_node()) for place in range(node.get_input_size()))
