"""Records <-> plain JSON values, and samples <-> compressed bytes. Knows dataclasses and types, not what a record means.

Standard library only: boards speak this. What another version wrote, or what was damaged, is refused with ValueError.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import sys
import types
import typing
import zlib
from array import array
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

R = TypeVar("R")
if typing.TYPE_CHECKING:
    Floats = array[float]
else:
    Floats = array


def encode(value: Any) -> Any:
    """A record (or a tuple, mapping or scalar of records) as JSON values; float arrays as compressed base64."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, array):
        packed = base64.b64encode(pack_floats(value)).decode("ascii")
        return {"float64": packed, "n": len(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(cls: type[R], value: Any) -> R:
    """The record that ``encode`` made the JSON values of.

    Raises ValueError where a field is missing, unknown or of another type: a file from another version is refused, not guessed.
    """
    return typing.cast(R, _decode(cls, value, cls.__name__))


def pack_floats(values: Floats) -> bytes:
    """Float64 little-endian, zlib. Where a trace goes into a blob."""
    ordered = array("d", values)
    if sys.byteorder != "little":
        ordered.byteswap()
    return zlib.compress(ordered.tobytes(), 6)


def unpack_floats(packed: bytes) -> Floats:
    """The inverse of ``pack_floats``. Raises ValueError on damaged bytes."""
    values = array("d")
    try:
        values.frombytes(zlib.decompress(packed))
    except zlib.error as error:
        raise ValueError(f"damaged sample block: {error}") from error
    if sys.byteorder != "little":
        values.byteswap()
    return values


def digest(value: Any) -> str:
    """Sha256 of a record's canonical JSON: equal records, equal digest, whatever the order of the keys."""
    canonical = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _decode(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _decode(next(option for option in options if option is not type(None)), value, where)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
        items = typing.get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(_decode(items[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(items) != len(value):
            raise ValueError(f"{where}: expected {len(items)} values, found {len(value)}")
        return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(items, value, strict=True)))
    if hint is array:
        if not isinstance(value, Mapping) or "float64" not in value:
            raise ValueError(f"{where}: expected a block of samples")
        samples = unpack_floats(base64.b64decode(value["float64"]))
        if len(samples) != value.get("n", len(samples)):
            raise ValueError(f"{where}: {len(samples)} samples where {value['n']} were written")
        return samples
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a table, found {type(value).__name__}")
        kind = typing.get_args(hint)[1]
        return {str(key): _decode(kind, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _decode_record(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: expected {hint.__name__}, found {type(value).__name__} {value!r}")
    return value


def _decode_record(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a table, found {type(value).__name__}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - names):
        raise ValueError(f"{where}: unknown field {', '.join(unknown)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - set(value)):
        raise ValueError(f"{where}: missing field {', '.join(missing)}")
    return cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})
