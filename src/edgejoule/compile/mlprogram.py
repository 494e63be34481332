"""What stands in an mlprogram: its ports, its operators, and the precision of each product with weights. Reads the protobuf only.

The specification's message comes from coremltools (``MLModel.get_spec()``); nothing is imported here, nothing is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

SHORT = {"FLOAT32": "fp32", "FLOAT16": "fp16", "INT8": "int8", "UINT8": "int8"}
PRODUCTS = {"linear": "weight", "conv": "weight", "conv_transpose": "weight", "matmul": "y"}
STORED = ("const", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_cast")


def facts_of(spec: Any) -> dict[str, Any]:
    """JSON values: opset, inputs and outputs [[name, shape, dtype]], operators {type: count}, products {name: precision}.

    A product is int8 where its weight is stored in int8 and its input comes quantised, else what it computes in. Raises ValueError
    for a specification that is no mlprogram of one function.
    """
    functions = list(spec.mlProgram.functions.values())
    if spec.WhichOneof("Type") != "mlProgram" or len(functions) != 1:
        raise ValueError("expected an mlprogram of one function")
    ((opset, block),) = functions[0].block_specializations.items()
    operators = list(block.operations)
    return {
        "opset": opset,
        "inputs": [_port(port) for port in spec.description.input],
        "outputs": [_port(port) for port in spec.description.output],
        "operators": dict(Counter(op.type for op in operators if op.type not in STORED).most_common()),
        "products": products_of(operators),
    }


def products_of(operators: Iterable[Any]) -> dict[str, str]:
    """{output of the product: precision}, in the order of execution."""
    operators = list(operators)
    made = {port.name: op for op in operators for port in op.outputs}
    found = {}
    for op in operators:
        weight = _origin(op, PRODUCTS.get(op.type, ""), made)
        if weight is None or weight.type not in STORED:
            continue
        quantised = weight.type != "const" and _type(weight, "quantized_data", made) == "int8"
        entry = _origin(op, "x", made)
        whole = quantised and entry is not None and entry.type == "dequantize"
        found[op.outputs[0].name] = "int8" if whole else _precision(op.outputs[0])
    return found


def _port(port: Any) -> list[Any]:
    array = port.type.multiArrayType
    kinds = array.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    return [port.name, list(array.shape), kinds[array.dataType].name.lower()]


def _origin(op: Any, operand: str, made: Mapping[str, Any]) -> Any:
    """The operator that gives an operand; None for the program's own inputs and for operands that are not there."""
    arguments = op.inputs[operand].arguments if operand in op.inputs else ()
    return made.get(arguments[0].name) if arguments else None


def _type(op: Any, stored: str, made: Mapping[str, Any]) -> str:
    """The type of what a constexpr operator expands."""
    for name in (stored, "data"):
        if name in op.attributes:
            return _kind(op.attributes[name].type.tensorType)
        if (origin := _origin(op, name, made)) is not None:
            return _precision(origin.outputs[0])
    return ""


def _precision(port: Any) -> str:
    return _kind(port.type.tensorType)


def _kind(tensor: Any) -> str:
    name: str = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name
    return SHORT.get(name, name.lower())
