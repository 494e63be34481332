"""The models that edgejoule knows by name: published numbers, preprocessing, licence and their sources, read from catalog.csv.

Standard library only. ``find_model`` turns what a user writes into a ``ModelSpec``; it asks timm only when the spelling
says ``timm(...)``, and runs a user's code only when it may. Counts nothing, builds nothing, loads no weights.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.metadata
import importlib.resources
import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule import registry
from edgejoule.errors import EdgejouleError, SpecError, UnknownNameError
from edgejoule.records import ModelSpec, Preprocessing, Published

ARCHITECTURE = "architecture.json"  # in the folder of a network that was saved
_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@functools.cache
def rows() -> tuple[ModelSpec, ...]:
    """Every row of the catalog, in the file's order."""
    table = importlib.resources.files("edgejoule").joinpath("catalog.csv")
    return tuple(_spec(row) for row in csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))


def pool(name: str) -> tuple[ModelSpec, ...]:
    """The rows of a pool: ``e3p`` (the 25 candidates of E3P-ViT), ``edgevit`` (EdgeViT and its baselines), ``edgevit_coco`` and
    ``edgevit_ade20k`` (its backbones for dense tasks), ``guide``. Raises UnknownNameError."""
    found = tuple(spec for spec in rows() if name in spec.pools)
    if not found:
        known = sorted({pool for spec in rows() for pool in spec.pools})
        raise UnknownNameError("pool", name, known, f"known: {', '.join(known)}")
    return found


def find_model(text: str, allow_code: bool = False) -> ModelSpec:
    """The model that a user means: a catalog name or alias, ``timm(name="...")``, the folder of a saved network, or with ``allow_code``
    their own ``module:function``.

    Names are looked up without regard to case, and ``-`` and spaces are ``_``. Raises UnknownNameError with the nearest names, and
    SpecError for code that may not run here or a spelling that cannot be read.
    """
    wanted = text.strip()
    if (spec := _index().get(_fold(wanted))) is not None:
        return spec
    if _CODE.fullmatch(wanted):
        return _custom(wanted, allow_code)
    if saved_network(wanted) is not None:
        return _spelled(str(registry.Call("optimized", {"path": str(Path(wanted).absolute())})), allow_code)
    if "(" in wanted or wanted in _third_parties():
        return _spelled(wanted, allow_code)
    raise UnknownNameError("model", wanted, _names(), _advice(wanted))


def saved_network(text: str) -> Path | None:
    """The folder that a text names, where ``edgejoule optimize`` saved a network there."""
    try:
        folder = Path(text)
        return folder if (folder / ARCHITECTURE).is_file() else None
    except (OSError, ValueError):
        return None


def _spelled(text: str, allow_code: bool) -> ModelSpec:
    call = registry.parse(text)
    if call.name == "custom":
        target = call.options.get("target")
        if set(call.options) != {"target"} or not isinstance(target, str):
            raise SpecError(f'cannot read {text!r}: expected custom(target="module:function")')
        return _custom(target, allow_code)
    if (in_catalog := _builders().get(str(call))) is not None:
        return in_catalog
    leaf = registry.create("model", text)
    try:
        spec: ModelSpec = leaf.spec()
    except EdgejouleError:
        raise
    except Exception as error:  # a third party's code may raise anything
        raise SpecError(f"the model {call} cannot describe itself ({error}): its leaf needs spec() -> ModelSpec") from error
    return _builders().get(registry.canonical(spec.builder), spec)  # timm completes a name without a tag


def _custom(target: str, allow_code: bool) -> ModelSpec:
    if not allow_code:
        raise SpecError(
            f"{target} is code, and code is taken only from the command line or from Python, never from a study file: "
            "name a model of the catalog here"
        )
    spec: ModelSpec = registry.create("model", str(registry.Call("custom", {"target": target}))).spec()
    return spec


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


@functools.cache
def _index() -> Mapping[str, ModelSpec]:
    return {_fold(name): spec for spec in rows() for name in (spec.name, *spec.aliases)}


@functools.cache
def _builders() -> Mapping[str, ModelSpec]:
    """The rows by the canonical spelling of their builder."""
    return {registry.canonical(spec.builder): spec for spec in rows()}


def _third_parties() -> frozenset[str]:
    return frozenset(point.name for point in importlib.metadata.entry_points(group="edgejoule.model"))


def _names() -> list[str]:
    return [name for spec in rows() for name in (spec.name, *spec.aliases)]


def _advice(wanted: str) -> str:
    """How to name a model outside the catalog; timm's own nearest name where timm is loaded anyway."""
    list_models: Any = getattr(sys.modules.get("timm"), "list_models", None)
    timms = difflib.get_close_matches(wanted.partition(".")[0], list_models(), n=1, cutoff=0.9) if callable(list_models) else []
    return f'edgejoule zoo list prints the catalog; any other model of timm: timm(name="{timms[0] if timms else "..."}")'


def _spec(row: Mapping[str, str]) -> ModelSpec:
    channels, height, width = (int(side) for side in row["input_size"].split())
    mean, std = ([float(value) for value in row[key].split()] for key in ("mean", "std"))
    return ModelSpec(
        name=row["name"],
        family=row["family"],
        builder=row["builder"],
        preprocessing=Preprocessing(
            input_size=(channels, height, width),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            interpolation=row["interpolation"],
            crop_pct=float(row["crop_pct"]),
            crop_mode=row["crop_mode"],
        ),
        num_classes=int(row["num_classes"]),
        dataset=row["dataset"],
        licence=row["licence"],
        published=Published(
            top1_pct=_number(row["top1_pct"]),
            params_m=_number(row["params_m"]),
            macs_g=_number(row["macs_g"]),
            source=row["source"],
            top5_pct=_number(row["top5_pct"]),
        ),
        pools=tuple(row["pools"].split()),
        aliases=tuple(row["aliases"].split()),
        plain=row["plain"],
    )


def _number(text: str) -> float | None:
    return float(text) if text else None
