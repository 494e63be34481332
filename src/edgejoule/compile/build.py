"""From a variant to an artifact: compile, run the file in a fresh process, pass it through the truth gate, write the manifest.

Knows no backend, no agent and no model builder: the backend comes by its spelling, the export, the images and ``outputs`` from the
caller. What was built once is found again by its key, and then neither network nor images are touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule import data, manifest, registry
from edgejoule.caveats import caveat
from edgejoule.compile import cpu
from edgejoule.compile.cache import find, settle, sole_builder, staging, writing
from edgejoule.compile.handover import write_readme
from edgejoule.compile.quantize.options import OVER_BUDGET
from edgejoule.compile.reasons import reason
from edgejoule.compile.truth import gate, of_weights, verify_parity
from edgejoule.errors import BackendError, DataError, EdgejouleError
from edgejoule.plain import digest
from edgejoule.records import Artifact, Outputs, SessionInfo, Variant
from edgejoule.seams import Backend, CompileContext, Export, Held

__all__ = ["BUILD_VERSION", "Material", "build", "build_key", "find"]

BUILD_VERSION = 5  # raise it when this package compiles the same inputs to another file, or judges it otherwise
PARITY_IMAGES = 32

RunOutputs = Callable[[Path, Path, int], Outputs]  # (artifact folder, images .npy, threads): in a fresh process
Crops = Callable[[], np.ndarray[Any, Any]]  # -> uint8 (N, C, H, W)


@dataclasses.dataclass(frozen=True, slots=True)
class Material:
    """What quantisation is calibrated on and its choices are judged by; made when a backend asks. ``identity`` goes into the key.

    ``compared``: whether a quantised file is compared on the held-out images, because others are unlike what it was calibrated on, or
    may be the very same.
    """

    identity: str
    calibration: Crops
    held: Callable[[], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]  # -> uint8 (M, C, H, W), labels (M,) int64 or None
    max_drop_pct: float = 1.0
    compared: bool = False


def build_key(variant: Variant, backend_text: str, batch: int, toolchain: Mapping[str, str], material: Material | None = None) -> str:
    """What determines the compiled file and what it is fed, as a sha256; names and published figures do not.

    ``material`` is given where the file depends on it: quantised ones.
    """
    spec = variant.spec
    calibrated = {} if material is None else {"calibration": [material.identity, material.max_drop_pct]}
    optimized = {"optimized": variant.optimized} if variant.optimized else {}
    return digest(
        calibrated
        | optimized
        | {
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
    variant: Variant,
    backend_text: str,
    export: Export,
    *,
    crops: Path,
    batch: int,
    cache: Path,
    threads: int,
    outputs: RunOutputs,
    material: Material | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Artifact:
    """The variant's artifact for a backend and a static batch, from the cache or compiled now.

    ``crops``: .npy, uint8 (N, C, H, W), of which the first 32 are compared, and calibrated on where there is no ``material``;
    ``cache``: artifacts lie in cache/artifacts/<key>.
    Raises BackendError, ModelError, ArtifactError, DataError, OutputError (the cache cannot be written), and what ``outputs`` raises.
    """
    backend: Backend = registry.create("backend", backend_text)
    material = material if backend.precision == "int8" else None
    tools = dict(backend.toolchain())
    if getattr(backend, "runs_here", lambda: None)() is not None:
        tools["judged"] = "no"  # so that it is judged, not found, once its runtime is here
    if backend.precision == "int8":
        tools["sums"] = str(cpu.sums_exactly())  # the same file answers otherwise on a processor that does not
    key = build_key(variant, backend_text, batch, tools, material)
    found = find(cache, key)
    if found is None:
        if (missing := backend.probe()) is not None:
            raise BackendError(f"{backend_text} cannot be used here: {missing}")
        with sole_builder(cache, key):
            found = find(cache, key, quietly=True) or _build(
                _Order(variant, backend_text, backend, export, crops, batch, threads, key, material, notify), cache, outputs
            )
    return dataclasses.replace(found, variant=variant)  # the same file may bear another name


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
    material: Material | None
    notify: Callable[[str], None]

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
        finished = _judged(order, draft, folder, sample, network_input, outputs)
        with writing(stage):
            write_readme(order.backend, dataclasses.replace(finished, folder=str(folder)))
        manifest.write(folder, finished)
        return settle(folder, cache, order.key)


def _judged(
    order: _Order, draft: Artifact, folder: Path, sample: Path, network_input: np.ndarray[Any, Any], outputs: RunOutputs
) -> Artifact:
    """The draft with what the truth gate found; a file that cannot be run here is said to be that."""
    runs_here = getattr(order.backend, "runs_here", None)
    if runs_here is not None and (why := runs_here()) is not None:
        return dataclasses.replace(draft, caveats=(*of_weights(order.variant), caveat("not_run", why)))
    answer = outputs(folder, sample, order.threads)
    logits = np.frombuffer(answer.logits, dtype=np.float64).reshape(answer.shape)  # (n, K)
    parity = verify_parity(_reference(order, network_input), logits)
    caveats = gate(order.variant, order.backend.precision, order.backend.device, answer.info, parity)
    if OVER_BUDGET in draft.notes:
        caveats = (*caveats, caveat("budget_missed", f"{draft.notes[OVER_BUDGET]}, the budget is {draft.notes.get('budget_pct', '1')}"))
    return dataclasses.replace(draft, info=answer.info, parity=parity, caveats=caveats)


def _images(order: _Order) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The first crops as they travel (n, C, H, W) uint8, and as the network wants them, float32.

    Of a network calibrated on images that the user named, those held out: on others its int8 ranges might clip, and prove nothing. So
    too where an image that was calibrated on is among the crops.
    """
    material = order.material
    crops = data.read_crops(order.crops)
    if material is not None and (material.compared or _share_one(crops, material.calibration())):
        crops = material.held()[0]
    if len(crops) == 0:
        raise DataError(f"{order.crops} holds no images to compare the compiled file on: name a source of at least one")
    images = np.ascontiguousarray(crops[:PARITY_IMAGES])
    return images, data.normalise(images, order.variant.spec.preprocessing)


def _share_one(some: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> bool:
    return not {one.tobytes() for one in some}.isdisjoint(one.tobytes() for one in others)


def _compile(order: _Order, folder: Path, network_input: np.ndarray[Any, Any]) -> Artifact:
    """Runs the backend in the artifact's folder, all of whose files are then the artifact; the result has no parity yet."""
    _check_learned(order)
    notes: dict[str, str] = {}
    context = _context(order, folder, network_input, notes)
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
        notes=notes,
    )


def _check_learned(order: _Order) -> None:
    """Raises BackendError where a network that was trained for int8 meets a backend that does not know how to run it so."""
    if getattr(order.backend, "learned", False):  # those refuse another precision themselves
        return
    if any(hasattr(part, "weight_shape") for part in order.export.module.modules()):
        raise BackendError(
            f"{order.backend_text} cannot run {order.variant.label}, which was trained for int8 (qat): "
            "use onnxruntime, openvino or executorch with precision='int8'"
        )


def _context(order: _Order, folder: Path, network_input: np.ndarray[Any, Any], notes: dict[str, str]) -> CompileContext:
    material, preprocessing = order.material, order.variant.spec.preprocessing
    if material is None:
        return CompileContext(order.shape, folder, lambda: network_input, note=notes.__setitem__, notify=order.notify)

    def held() -> Held:
        crops, labels = material.held()
        return Held(data.normalise(crops, preprocessing), labels)

    notes["budget_pct"] = f"{material.max_drop_pct:g}"
    allowed = material.max_drop_pct
    if order.variant.weights == "random":
        notes["budget"] = "not held: classes of random weights are near ties, which any rounding flips"
        allowed = 100.0
    return CompileContext(
        shape=order.shape,
        workdir=folder,
        calibration=lambda: data.normalise(material.calibration(), preprocessing),
        held=held,
        max_drop_pct=allowed,
        note=notes.__setitem__,
        notify=order.notify,
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
