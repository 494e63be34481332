"""One grammar for everything that has a name and options: ``name(key=value, ...)``, and recipes ``a | b(c=1)``.

Parsed with ``ast``; values are literals, nothing is ever evaluated. ``create`` imports the one leaf that was named and
builds it. Each package lists its leaves in ``LEAVES``; third parties add theirs by entry points (``edgejoule.meter``,
``edgejoule.backend``, ``edgejoule.pass``, ``edgejoule.transport``, ``edgejoule.model``, ``edgejoule.trace``,
``edgejoule.data``). Knows no leaf itself.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any

from edgejoule.errors import EdgejouleError, SpecError, UnknownNameError

PACKAGES = {
    "meter": "edgejoule.measure",
    "backend": "edgejoule.compile",
    "transport": "edgejoule.fleet",
    "model": "edgejoule.zoo",
    "pass": "edgejoule.optimize",
    "trace": "edgejoule.measure.traces",
    "data": "edgejoule.datasets",
}
LONGEST = 4096  # characters of one spelling; ast recurses, and no honest spelling is longer


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed spelling. ``str()`` gives the canonical one: keys sorted, Python literals."""

    name: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        if not self.options:
            return self.name
        return f"{self.name}({', '.join(f'{key}={self.options[key]!r}' for key in sorted(self.options))})"


def parse(text: str) -> Call:
    """``'rapl(period_s=0.05)'`` -> Call. Raises SpecError saying what was expected."""
    node = _expression(text)
    return _call(node, text)


def parse_recipe(text: str) -> tuple[Call, ...]:
    """``'prune_heads(ratio=0.3) | qat(bits=8)'`` -> its calls in order; an empty recipe is no calls."""
    if not text.strip():
        return ()
    calls: list[Call] = []
    node = _expression(text)
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(_call(node.right, text))
        node = node.left
    calls.append(_call(node, text))
    return tuple(reversed(calls))


def canonical(text: str) -> str:
    """One spelling for all that mean the same."""
    return " | ".join(map(str, parse_recipe(text)))


def names(kind: str) -> tuple[str, ...]:
    """Every leaf of a kind, ours first, then the installed third parties'."""
    return tuple(_table(kind))


def create(kind: str, text: str) -> Any:
    """The object that a spelling names, importing only that one.

    Raises UnknownNameError (with the nearest names) for a name that is not there and SpecError for options it does not take.
    """
    call = parse(text)
    table = _table(kind)
    if call.name not in table:
        raise UnknownNameError(kind, call.name, table, f"known: {', '.join(table)}")
    return construct(kind, call, _load(kind, call.name, table[call.name]))


def construct(kind: str, call: Call, target: Any) -> Any:
    """What a call makes of a class that is already at hand. Raises SpecError for options that it does not take."""
    _check_options(kind, call, target)
    try:
        return target(**call.options)
    except EdgejouleError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{kind} {call}: {error}") from error


def _expression(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise SpecError(f"a spelling of {len(text)} characters is too long: expected at most {LONGEST}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise SpecError(f"cannot read {text!r}: expected name or name(key=value, ...)") from error


def _call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id, {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise SpecError(f"cannot read {text!r}: expected name or name(key=value, ...)")
    if node.args:
        raise SpecError(f"cannot read {text!r}: options need their names, as in {node.func.id}(key=value)")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise SpecError(f"cannot read {text!r}: ** is not part of the grammar")
        if keyword.arg in options:
            raise SpecError(f"cannot read {text!r}: {keyword.arg} is given twice")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise SpecError(
                f"cannot read {text!r}: the value of {keyword.arg} must be a literal (a number, text, True, None, a list)"
            ) from error
    return Call(node.func.id, options)


def _table(kind: str) -> dict[str, str]:
    try:
        package = importlib.import_module(PACKAGES[kind])
    except ImportError as error:
        raise SpecError(f"the {kind}s need {error.name}, which is not installed: pip install 'edgejoule[host]'") from error
    table: dict[str, str] = dict(package.LEAVES)
    for point in importlib.metadata.entry_points(group=f"edgejoule.{kind}"):
        table.setdefault(point.name, point.value)
    return table


def _load(kind: str, name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise SpecError(f"the {kind} {name} needs {error.name or error}, which is not installed: pip install 'edgejoule[host]'") from error
    except AttributeError as error:
        raise SpecError(f"the {kind} {name} names {target}, and there is no such thing: mend its entry point") from error


def _check_options(kind: str, call: Call, target: Any) -> None:
    if not dataclasses.is_dataclass(target):
        return
    known = {f.name: f for f in dataclasses.fields(target) if f.init}
    for key in call.options:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no options"
            raise SpecError(f"{kind} {call.name} has no option {key!r}: {takes}")
    missing = [name for name, f in known.items() if f.default is f.default_factory is dataclasses.MISSING and name not in call.options]
    if missing:
        raise SpecError(f"{kind} {call.name} needs {', '.join(missing)}, as in {call.name}({missing[0]}=...)")
    hints = typing.get_type_hints(target)
    for key, value in call.options.items():
        if not _fits(hints[key], value):
            raise SpecError(f"{kind} {call.name}: {key}={value!r} does not fit, expected {_spelled(hints[key])}")


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))
