"""The leaf ``optimized(path="folder")``: a network that ``edgejoule optimize`` saved, built again without what made it.

The folder holds ``architecture.json`` (how the network differs from its builder's, see ``edgejoule/architecture.py``) and
``model.safetensors``.
Builds torch modules; runs no pass and trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgejoule import registry
from edgejoule.architecture import Description, described, restored, tensors_of
from edgejoule.catalog import ARCHITECTURE
from edgejoule.errors import ModelError
from edgejoule.plain import decode, encode
from edgejoule.records import ModelSpec

WEIGHTS = "model.safetensors"
OPTIMIZED_FILES = (ARCHITECTURE, WEIGHTS)
FORMAT = 1
IDENTITY = "optimized:"  # marks the identity of such a network's weights


@dataclass(frozen=True, slots=True)
class OptimizedModel:
    """A network by the folder that it was saved in."""

    path: str

    def build(self, num_classes: int | None = None, **options: Any) -> torch.nn.Module:
        """The module in eval mode, with its weights. Raises ModelError for a damaged folder, other classes or any option."""
        note = self._note()
        spec = _base_spec(note, self.path)
        if options or num_classes not in (None, spec.num_classes):
            raise ModelError(f"{self.path} is a finished network of {spec.num_classes} classes: it takes no options and no other number")
        return load(Path(self.path))

    def spec(self) -> ModelSpec:
        """Its row: named as the variant it is, its builder this leaf, nothing published of it."""
        note = self._note()
        spec = _base_spec(note, self.path)
        name = f"{spec.name} | {note['recipe']}"
        return replace(spec, name=name, builder=f"optimized(path={self.path!r})", published=None, plain="", pools=(), aliases=())

    def identity(self) -> str:
        """Equal exactly where architecture and weights are: of the description, which holds the weights' sha256."""
        return IDENTITY + hashlib.sha256(_bytes(Path(self.path) / ARCHITECTURE)).hexdigest()

    def _note(self) -> dict[str, Any]:
        return read_note(Path(self.path))


def is_optimized(folder: Path) -> bool:
    """Whether a folder holds a saved network."""
    return (folder / ARCHITECTURE).is_file() and (folder / WEIGHTS).is_file()


def base_of(spec: ModelSpec) -> torch.nn.Module:
    """What the spec's builder makes, float32 on the CPU, in eval mode: what descriptions are relative to."""
    module: torch.nn.Module = registry.create("model", spec.builder).build(num_classes=spec.num_classes).float().cpu()
    module.eval()  # its result is not used: some networks' own eval() returns nothing
    return module


def contents(module: torch.nn.Module, spec: ModelSpec, recipe: str, facts: dict[str, Any]) -> dict[str, bytes]:
    """The files of a network: {name: bytes}. ``spec`` is its row after the recipe. Raises ModelError for what cannot be written down.

    What was made of a saved network is described from the same builder as that, not from its folder, and bears both recipes.
    """
    from safetensors.torch import save

    call = registry.parse(spec.builder)
    if call.name == "optimized":
        before = read_note(Path(str(call.options["path"])))
        first = _base_spec(before, str(call.options["path"]))
        spec, recipe = replace(spec, name=first.name, builder=first.builder), f"{before['recipe']} | {recipe}"
    base = base_of(spec)
    weights = save(tensors_of(module, base))
    note = {
        "format": FORMAT,
        "spec": encode(spec),
        "recipe": recipe,
        "facts": facts,
        "changes": described(module, base),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {WEIGHTS: weights, ARCHITECTURE: (json.dumps(note, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()}


def load(folder: Path, allow_code: bool = False) -> torch.nn.Module:
    """The network of a folder; ``allow_code`` for one of a user's own builder, in the process that was given it.

    Raises ModelError where it is damaged or was made by what is not here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as read

    note = read_note(folder)
    spec = _base_spec(note, str(folder), allow_code)
    raw = _bytes(folder / WEIGHTS)
    if hashlib.sha256(raw).hexdigest() != note.get("weights_sha256"):
        raise ModelError(f"{folder / WEIGHTS} is not the file that {ARCHITECTURE} was written with: optimise again")
    try:
        tensors = read(raw)
    except SafetensorError as error:
        raise ModelError(f"cannot read {folder / WEIGHTS} ({error}): optimise again") from error
    changes: Description = note["changes"]
    return restored(base_of(spec), changes, tensors)


def read_note(folder: Path) -> dict[str, Any]:
    """What architecture.json says. Raises ModelError for what is no such file, or one of another version."""
    raw = _bytes(folder / ARCHITECTURE)
    try:
        note = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder / ARCHITECTURE} cannot be read ({error}): optimise again") from error
    sound = isinstance(note, dict) and isinstance(note.get("changes"), dict) and isinstance(note.get("recipe"), str)
    if not sound or not all(isinstance(entry, dict) for entry in note["changes"].values()):
        raise ModelError(f"{folder / ARCHITECTURE} is no description of an optimised network: optimise again")
    if note.get("format") != FORMAT:
        raise ModelError(f"{folder / ARCHITECTURE} has the format {note.get('format')!r}, and this version reads {FORMAT}: optimise again")
    found: dict[str, Any] = note
    return found


def spec_after(note: dict[str, Any], where: str) -> ModelSpec:
    """The network's row after its recipe, its builder the plain network's."""
    return _base_spec(note, where, allow_code=True)


def _base_spec(note: dict[str, Any], where: str, allow_code: bool = False) -> ModelSpec:
    try:
        spec = decode(ModelSpec, note["spec"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{where} does not say which network it is ({error}): optimise again") from error
    builder = registry.parse(spec.builder).name
    if builder == "optimized":
        raise ModelError(f"{where} is described by another folder: optimise again")
    if builder == "custom" and not allow_code:
        raise ModelError(f"{where} is of code of your own ({spec.builder}), which a saved network cannot bring: build it in Python")
    return spec


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {os.fspath(path)} ({error.strerror}): name a folder that edgejoule optimize made") from error
