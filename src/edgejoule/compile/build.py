"""From a variant to an artifact: compile, run the file in a fresh process, compare it with the network, write the manifest.

Knows no backend, no agent and no model builder: the backend comes by its spelling, the export and ``outputs`` from the
caller. What was built once is found again by its key, and then the network is never touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule import data, manifest, registry
from edgejoule.caveats import caveat
from edgejoule.compile.cache import find, settle, sole_builder, staging, writing
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError, DataError, EdgejouleError, ModelError
from edgejoule.plain import digest
from edgejoule.records import Artifact, Caveat, Outputs, Parity, SessionInfo, Variant
from edgejoule.seams import Backend, CompileContext, Export

__all__ = ["BUILD_VERSION", "build", "build_key", "find", "verify_parity"]

BUILD_VERSION = 1  # raise it when this package compiles the same inputs to another file
PARITY_IMAGES = 8
TINY = 1e-12  # stands in for the norm of a vanishing reference, so that its relative error stays a number
BLIND_RMS = 1e-3
# Largest relative error and least top-1 agreement that rounding explains; any other precision: gross errors only. Over 20 catalog
# networks with random weights, fp32 stayed below 1.2e-3 (levit_128s, which amplifies noise) and bfloat16 above 7e-3.
EXPLAINED = {"fp32": (3e-3, 1.0), "bf16": (5e-2, 0.75), "fp16": (5e-2, 0.75)}
GROSS = (0.5, 0.5)

RunOutputs = Callable[[Path, Path, int], Outputs]  # (artifact folder, images .npy, threads): in a fresh process


def build_key(variant: Variant, backend_text: str, batch: int, toolchain: Mapping[str, str]) -> str:
    """What determines the compiled file and what it is fed, as a sha256; names and published figures do not."""
    spec = variant.spec
    return digest(
        {
            "version": BUILD_VERSION,
            "builder": registry.canonical(spec.builder),
            "num_classes": spec.num_classes,
            "input": [spec.preprocessing.input_size, spec.preprocessing.mean, spec.preprocessing.std],
            "recipe": registry.canonical(variant.recipe),
            "weights": [variant.weights, variant.weights_id, variant.seed],
            "backend": registry.canonical(backend_text),
            "batch": batch,
            "toolchain": dict(toolchain),
        }
    )


def build(
    variant: Variant, backend_text: str, export: Export, *, crops: Path, batch: int, cache: Path, threads: int, outputs: RunOutputs
) -> Artifact:
    """The variant's artifact for a backend and a static batch, from the cache or compiled now.

    ``crops``: .npy, uint8 (N, C, H, W), of which the first 8 are compared; ``cache``: artifacts lie in cache/artifacts/<key>.
    Raises BackendError, ModelError, ArtifactError, DataError, OutputError (the cache cannot be written), and what ``outputs`` raises.
    """
    backend: Backend = registry.create("backend", backend_text)
    key = build_key(variant, backend_text, batch, backend.toolchain())
    found = find(cache, key)
    if found is None:
        if (missing := backend.probe()) is not None:
            raise BackendError(f"{backend_text} cannot be used here: {missing}")
        with sole_builder(cache, key):
            found = find(cache, key, quietly=True) or _build(
                _Order(variant, backend_text, backend, export, crops, batch, threads, key), cache, outputs
            )
    return dataclasses.replace(found, variant=variant)  # the same file may bear another name


def verify_parity(reference: np.ndarray[Any, Any], compiled: np.ndarray[Any, Any]) -> Parity:
    """The compiled file's logits (n, K) against the float32 network's (n, K); the relative error is of Euclidean norms, image by image.

    Raises ModelError or BackendError where the respective logits are not finite, BackendError for another shape.
    """
    if reference.shape != compiled.shape:
        raise BackendError(f"the compiled file gives logits of shape {compiled.shape}, the network {reference.shape}: use another backend")
    if not np.isfinite(reference).all():
        raise ModelError("the network's own logits are not finite on real images: check its weights")
    if not np.isfinite(compiled).all():
        raise BackendError("the compiled file's logits are not finite on real images: use precision='fp32'")
    wide = reference.astype(np.float64)  # (n, K)
    error = compiled.astype(np.float64) - wide
    relative = np.linalg.norm(error, axis=1) / np.maximum(np.linalg.norm(wide, axis=1), TINY)  # (n,)
    return Parity(
        n=len(wide),
        max_abs=float(np.abs(error).max()),
        max_rel=float(relative.max()),
        top1_agreement=float((wide.argmax(axis=1) == compiled.argmax(axis=1)).mean()),
        reference_rms=float(np.sqrt(np.square(wide).mean())),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Order:
    """What is to be built, checked and complete."""

    variant: Variant
    backend_text: str
    backend: Backend
    export: Export
    crops: Path
    batch: int
    threads: int
    key: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, *self.variant.spec.preprocessing.input_size)


def _build(order: _Order, cache: Path, outputs: RunOutputs) -> Artifact:
    images, network_input = _images(order)
    with staging(cache, order.key) as stage:
        folder, sample = stage / "artifact", stage / "images.npy"
        with writing(stage):
            folder.mkdir()
            np.save(sample, images)
            draft = _compile(order, folder, network_input)
            manifest.write(folder, draft)
        answer = outputs(folder, sample, order.threads)
        logits = np.frombuffer(answer.logits, dtype=np.float64).reshape(answer.shape)  # (n, K)
        parity = verify_parity(_reference(order, network_input), logits)
        caveats = _caveats(order.variant, order.backend.precision, answer.info, parity)
        manifest.write(folder, dataclasses.replace(draft, info=answer.info, parity=parity, caveats=caveats))
        return settle(folder, cache, order.key)


def _images(order: _Order) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The first crops as they travel (n, C, H, W) uint8, and as the network wants them, float32."""
    crops = data.read_crops(order.crops)
    if len(crops) == 0:
        raise DataError(f"{order.crops} holds no images to compare the compiled file on: name a source of at least one")
    images = np.ascontiguousarray(crops[:PARITY_IMAGES])
    return images, data.normalise(images, order.variant.spec.preprocessing)


def _compile(order: _Order, folder: Path, network_input: np.ndarray[Any, Any]) -> Artifact:
    """Runs the backend in the artifact's folder, all of whose files are then the artifact; the result has no parity yet."""
    context = CompileContext(shape=order.shape, workdir=folder, calibration=lambda: network_input)
    try:
        entry = order.backend.compile(order.export, context)
    except Exception as error:
        if isinstance(error, EdgejouleError) or getattr(error, "errno", None):  # an errno: the folder cannot be written
            raise
        raise BackendError(
            f"{order.backend_text} failed to compile {order.variant.label} ({reason(error)}): use another backend"
        ) from error
    if not entry.exists() or folder not in entry.parents:
        raise BackendError(f"{order.backend_text} says that it wrote {entry}, which is not there: report it to the backend's author")
    files = manifest.hash_files(folder, [path for path in sorted(folder.rglob("*")) if path.is_file()])
    return Artifact(
        sha256=manifest.artifact_sha256(files),
        variant=order.variant,
        backend=registry.canonical(order.backend_text),
        precision=order.backend.precision,
        batch=order.batch,
        files=files,
        toolchain=order.backend.toolchain(),
        info=SessionInfo(precision="unknown", providers=(), runtime="not yet loaded", threads=order.threads),
        parity=None,
        build_key=order.key,
    )


def _reference(order: _Order, network_input: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The network's own logits (n, K) in float32 eager, in batches as compiled for, the last one filled up by repeating."""
    import torch

    n, batch = len(network_input), order.batch
    padded = network_input[np.arange(-(-n // batch) * batch) % n]  # (ceil(n / B) * B, C, H, W)
    with torch.inference_mode():
        logits = [order.export.module(torch.from_numpy(padded[i : i + batch])) for i in range(0, len(padded), batch)]
    joined: np.ndarray[Any, Any] = torch.cat(logits)[:n].numpy()
    return joined


def _caveats(variant: Variant, asked: str, info: SessionInfo, parity: Parity) -> tuple[Caveat, ...]:
    found = []
    if variant.weights == "random":
        found.append(caveat("weights_random", f"{variant.spec.name} was built with random weights ({variant.weights_id})"))
    if info.precision != asked:
        found.append(caveat("precision_differs", f"{asked} was asked for, {info.runtime} runs {info.precision}"))
    if parity.reference_rms < BLIND_RMS:
        found.append(caveat("parity_blind", f"the logits' root mean square is {parity.reference_rms:.1e} over {parity.n} images"))
    most_rel, least_agreement = EXPLAINED.get(asked, GROSS)
    if parity.max_rel > most_rel or parity.top1_agreement < least_agreement:
        seen = f"relative error {parity.max_rel:.1e} (at most {most_rel:g}), same top-1 on {parity.top1_agreement:.0%} of {parity.n} images"
        found.append(caveat("parity_low", seen))
    return tuple(found)
