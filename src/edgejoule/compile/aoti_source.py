"""What a package of AOTInductor holds besides machine code: its metadata, and the C++ that was compiled, which says what is called.

The calls to torch's kernels and to generated ones are read from that source, which lies in the package beside the library made of it.
What happens inside a generated kernel is one operator here. Standard library only; runs nothing.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule.compile.reasons import reason
from edgejoule.errors import ArtifactError
from edgejoule.records import Placement

FACTS = "EDGEJOULE"  # our entry in the package's metadata
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8", "uint8": "int8"}
_KERNEL = re.compile(r"\baoti_torch_(cpu|cuda)_(\w+)\(")
_GENERATED = re.compile(r"^\s+(?:kernels\.)?(cpp|call|triton)_(\w+)\(")
_PROXY = "aoti_torch_proxy_executor_call_function("
_NAME = re.compile(r'constants_info_\[(\d+)\]\.name = "(\w+)"')
_TYPE = re.compile(r"constants_info_\[(\d+)\]\.dtype = .*?dtype_(\w+?)\b")
_SHAPE = re.compile(r"constants_info_\[(\d+)\]\.shape = \{([^}]*)\}")
_PRODUCT = re.compile(r"(?:^|_)(?:q?linear|addmm|mm|bmm|q?conv|convolution)(?:_|$)")
_WORD = re.compile(r"\w+")


def metadata(path: Path) -> Mapping[str, Any]:
    """What torch and we wrote of the package: {"AOTI_MACHINE": "x86_64", …}, and ``FACTS`` parsed. Raises ArtifactError."""
    try:
        found: dict[str, Any] = {}
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("_metadata.json"):
                    found.update(json.loads(archive.read(name)))
        found[FACTS] = json.loads(found[FACTS])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} is damaged, or edgejoule did not write it ({reason(error)}): compile again") from error
    return found


def placement(path: Path, device: str, products: Mapping[str, str]) -> Placement:
    """The calls of the package's own source. ``products``: how float32 is multiplied on a GPU, {"matmul" | "conv": "fp32" | "tf32"}.

    Raises ArtifactError where the package holds no source.
    """
    source = _source(path)
    types = _weights(source)
    nodes, elsewhere, precisions = 0, Counter[str](), Counter[str]()
    for line in source.splitlines():
        for where, name in _calls(line, device):
            nodes += 1
            if where != device:
                elsewhere[name] += 1
            kind = _product(name, line, types)
            if kind:
                switch = "conv" if "conv" in name else "matmul"
                precisions[products[switch] if kind == "fp32" and where == "cuda" else kind] += 1
    return Placement(nodes, nodes - sum(elsewhere.values()), dict(elsewhere), dict(precisions))


def _source(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".wrapper.cpp"))
            return archive.read(name).decode()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{path} does not hold the source of its program ({reason(error)}): compile again") from error


def _weights(source: str) -> dict[str, str]:
    """{name: type} of the constants of two axes or more."""
    types: dict[str, str] = dict(_TYPE.findall(source))
    shapes: dict[str, str] = dict(_SHAPE.findall(source))
    named: list[tuple[str, str]] = [(n, name) for n, name in _NAME.findall(source) if n in types and "," in shapes.get(n, ",")]
    return {name: SHORT.get(types[n], types[n]) for n, name in named}


def _calls(line: str, device: str) -> list[tuple[str, str]]:
    """(device, name) of what a line of the source executes: a call of torch's kernels, or of one that was generated."""
    if (generated := _GENERATED.match(line)) is not None:
        return [("cpu" if generated[1] == "cpp" else "cuda", generated[2])]
    if _PROXY in line:  # an operator without a C interface, on whichever device its tensors are
        return [(device, "proxy")]
    return _KERNEL.findall(line)


def _product(name: str, line: str, types: Mapping[str, str]) -> str:
    """The type of the weights that a call multiplies by, "" where it is no product with weights."""
    if _PRODUCT.search(name) is None:
        return ""
    if "qlinear" in name or "qconv" in name:
        return "int8"
    return next((types[word] for word in _WORD.findall(line) if word in types), "")
