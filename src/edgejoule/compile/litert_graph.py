"""What a LiteRT interpreter's list of operators says: which of them a delegate took, and in what precision products have their weights.

The interpreter lists a file's operators and, after them, one DELEGATE for each part that a delegate took, with the tensors that go in and
come out of it. Which operators those are follows from the graph. Knows no file and no runtime. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgejoule.records import Placement

DELEGATE, DEQUANTIZE = "DELEGATE", "DEQUANTIZE"
WEIGHTED = frozenset({"FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "CONV_3D", "BATCH_MATMUL"})
WEIGHTS = 1  # all of them take their weights as the second operand
SHORT = {"float32": "fp32", "float16": "fp16", "uint8": "int8", "float64": "fp64"}


@dataclass(frozen=True, slots=True)
class Operator:
    """``kinds``: the numpy types of the input tensors, by their number."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kinds: Mapping[int, str]


def placement(operators: Sequence[Operator], delegated: bool = True) -> Placement:
    """Of a file's own operators how many were delegated, which were not, and the precision of those with weights.

    Where no delegate was asked for (``delegated`` is false), LiteRT's own kernels are what was, and run everything.
    """
    own = [one for one in operators if one.name != DELEGATE]
    makers = {tensor: place for place, one in enumerate(own) for tensor in one.outputs}
    taken: set[int] = set() if delegated else set(range(len(own)))
    for part in operators:
        if part.name == DELEGATE:
            taken |= _inside(part, own, makers)
    return Placement(
        nodes=len(own),
        delegated=len(taken),
        fallbacks=dict(Counter(one.name for place, one in enumerate(own) if place not in taken)),
        precisions=dict(Counter(_kinds(own, makers))),
    )


def precision(found: Placement) -> str:
    """The precision of most products with weights; fp32 where there are none."""
    return max(found.precisions, key=lambda kind: found.precisions[kind], default="fp32")


def _inside(part: Operator, own: Sequence[Operator], makers: Mapping[int, int]) -> set[int]:
    """Walking back from what a part gives, as far as what it is given: every tensor from outside is one of its inputs."""
    found: set[int] = set()
    outside, pending = set(part.inputs), list(part.outputs)
    while pending:
        tensor = pending.pop()
        place = makers.get(tensor)
        if tensor not in outside and place is not None and place not in found:
            found.add(place)
            pending += own[place].inputs
    return found


def _kinds(own: Sequence[Operator], makers: Mapping[int, int]) -> Iterable[str]:
    given = {tensor for one in own for tensor in one.inputs} - set(makers)  # weights, constants and the images
    for one in own:
        if one.name not in WEIGHTED or len(one.inputs) <= WEIGHTS:
            continue
        tensor = one.inputs[WEIGHTS]
        maker = own[makers[tensor]] if tensor in makers else None
        stored = maker is not None and maker.name == DEQUANTIZE and set(maker.inputs) <= given  # integers in the file, floats multiplied
        if tensor in given or stored:
            kind = one.kinds.get(tensor, "unknown")
            yield SHORT.get(kind, kind)
