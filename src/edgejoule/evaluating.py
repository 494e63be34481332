"""The joint of evaluation: labelled images through an artifact's own runtime, in fresh workers, beside the float32 network in torch.

The images are cropped by the artifact's own preprocessing and travel in chunks, so that memory does not grow with the split; of the
logits only a few numbers an image are kept. Labels are positions in the data's ``classes``: that the network's outputs stand in the same
order is taken as given. It is for whatever ``edgejoule train`` made, and for networks of ImageNet-1k on a folder named by WordNet ids,
because their order is that of the sorted ids. Ranks nothing and stores nothing.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt

from edgejoule import compiling, data, registry, stages
from edgejoule.bench import Bench, Event, cores, writable
from edgejoule.catalog import find_model, saved_network
from edgejoule.caveats import caveat
from edgejoule.datasets.classification import BROKEN, Judged, joined, judge, paired_difference, scores_of, wilson
from edgejoule.errors import AgentError, BackendError, BadImageError, DataError, ModelError, SpecError
from edgejoule.optimizing import network
from edgejoule.records import Artifact, Caveat, Evaluation, Interval, Job, ModelSpec, Outputs, Preprocessing, Variant, Workload
from edgejoule.study_file import CompilePlan, MeasurePlan
from edgejoule.teaching import open_data
from edgejoule.trained import noted_spec

if TYPE_CHECKING:
    from edgejoule.seams import LabelledData, LabelledImages

SPLITS = ("train", "validation", "test")
CHUNK_IMAGES, CHUNK_BYTES = 512, 1 << 26
FLOAT_BATCH = 32
UNKNOWN = "unknown"  # the data set of a timm name that the catalog does not have
NOT_FILES = ("auto", "pretrained", "random")
Answers = npt.NDArray[np.int64]
Reference = Callable[[data.Crops], Answers]  # uint8 (n, C, H, W) -> (n,) first answers, BROKEN where a logit is not finite


def evaluate_artifact(
    artifact: Artifact,
    data_spelling: str,
    split: str = "test",
    bench: Bench | None = None,
    reference: Reference | None = None,
    limit: int | None = None,
    max_bad_images: int = 0,
    threads: int = 0,
) -> Evaluation:
    """The scores of an artifact on its own backend; with ``reference`` also its agreement with that network.

    ``limit`` takes so many images, drawn without replacement, the same ones for every artifact. Raises DataError for data that does not
    fit the artifact, BadImageError after more than ``max_bad_images`` images that cannot be read, and what the worker raises.
    """
    bench = bench or Bench()
    labelled, spec = opened(data_spelling), artifact.variant.spec
    check_classes(spec, labelled)
    images = labelled.split(_split(split))
    places = _places(len(images), limit)
    reader = _Reader(images, spec.preprocessing, max_bad_images)
    parts: list[Judged] = []
    expected: list[Answers] = []
    size = _chunk(spec.preprocessing, artifact.batch)
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=writable(bench.cache)) as scratch:
        for start in range(0, len(places), size):
            bench.notify(Event("evaluate", f"{artifact.label} on {labelled.dataset}, {split}", start, len(places)))
            crops, labels = reader.read(places[start : start + size])
            if len(crops):
                parts.append(judge(_logits(artifact, crops, Path(scratch), threads, bench), labels))
                expected += [reference(crops)] if reference is not None else []
    bench.notify(Event("evaluate", f"{artifact.label} on {labelled.dataset}, {split}", len(places), len(places)))
    judged = joined(parts)
    agreement, top1, drop = _beside(judged, expected)
    return Evaluation(
        artifact_sha256=artifact.sha256,
        dataset=labelled.dataset,
        split=split,
        data=registry.canonical(data_spelling),
        origin=labelled.origin(),
        scores=scores_of(judged, labelled.classes),
        agreement=agreement,
        reference_top1=top1,
        bad_images=reader.bad,
        evaluated_at=time.time(),
        drop=drop,
        caveats=tuple(_doubts(artifact, labelled, judged, reader.bad, len(images), limit)),
    )


def float_network(variant: Variant, bench: Bench | None = None, weights: str = "") -> Reference:
    """The variant's float32 network in torch, as a ``Reference``; what it answered to a chunk of crops is not computed again.

    ``weights`` is the file that the variant was made of, which another process does not know. Raises ModelError where the weights are gone,
    or where the file is another one.
    """
    from edgejoule.zoo.weights import remember

    if weights and (found := remember(weights)) != variant.weights_id:
        raise ModelError(f"{weights} is not what {variant.label} was compiled from (sha256 {found[:12]}…, not {variant.weights_id[:12]}…)")
    module = network(variant, bench or Bench())
    known: dict[bytes, Answers] = {}

    def answers(crops: data.Crops) -> Answers:
        key = hashlib.sha256(crops.tobytes()).digest()
        if key not in known:
            known[key] = np.concatenate([_float_answers(module, part, variant.spec.preprocessing) for part in _cut(crops, FLOAT_BATCH)])
        return known[key]

    return answers


def reference_of(artifact: Artifact, weights: str, bench: Bench) -> tuple[Reference | None, str]:
    """The float32 network of an artifact; or None and why there is none. ``weights`` names the file that the artifact was made of.

    Raises ModelError where a file is named that is another one: what the user says must not be passed over.
    """
    named = "" if weights in NOT_FILES else weights
    try:
        return float_network(artifact.variant, bench, named), ""
    except (ModelError, SpecError) as error:
        if named:
            raise
        return None, str(error)


def opened(data_spelling: str) -> LabelledData:
    """The labelled set of a spelling. Raises DataError where it cannot be read here or holds no classes, SpecError for the spelling."""
    labelled = open_data(data_spelling)
    if labelled.kind != "classification":
        raise DataError(f"{data_spelling} is a {labelled.kind} set, and classifiers are evaluated: name labelled images, such as digits")
    return labelled


def check_classes(spec: ModelSpec, labelled: LabelledData) -> None:
    """Raises DataError where the network has another number of classes than the data."""
    if spec.num_classes != (there := len(labelled.classes)):
        raise DataError(
            f"{spec.name} tells {spec.num_classes} classes of {spec.dataset} apart and {labelled.dataset} has {there}: name the data that "
            "it was trained on with --data, or a network trained on this one with --weights"
        )


def artifact_of(
    target: str,
    labelled: LabelledData,
    backend: str | None,
    weights: str,
    threads: int,
    bench: Bench,
    quantising: CompilePlan | None = None,
) -> Artifact:
    """The artifact of a folder, or of a model compiled now. Raises what keeps it from being one."""
    from edgejoule import manifest

    folder = Path(target)
    if folder.is_dir() and saved_network(target) is None:
        artifact = manifest.read(folder.absolute())
        plan = MeasurePlan(batch=artifact.batch, scenario="offline" if artifact.batch > 1 else "single_stream")
        return stages.open_artifact(folder, plan, backend)
    spec = spec_for(target, weights, labelled)
    check_classes(spec, labelled)
    bench.notify(Event("compile", f"{spec.name} for {backend or 'onnxruntime'}"))
    plan, quantising = MeasurePlan(threads=threads), quantising or CompilePlan()
    (made,) = compiling.compile_model(spec, (backend or "onnxruntime",), plan, weights, bench, compiling=quantising)
    if not isinstance(made, Artifact):
        raise BackendError(f"{made.variant} @ {made.backend}: {made.reason}")
    return made


def spec_of_weights(model: str, weights: str) -> ModelSpec:
    """The row of a model with these weights: as ``edgejoule train`` wrote it into the file, else the catalog's."""
    spec = find_model(model, allow_code=True)
    noted = None if weights in NOT_FILES else noted_spec(Path(weights).expanduser())
    return noted if noted is not None and noted.builder == spec.builder else spec


def spec_for(model: str, weights: str, labelled: LabelledData) -> ModelSpec:
    """The row of a model with these weights: as ``edgejoule train`` wrote it into the file, else the catalog's.

    A file that says nothing is taken to be a network of these classes, with the catalog's preprocessing: its data set is unknown then,
    which the evaluation's caveat says.
    """
    spec = spec_of_weights(model, weights)
    if weights in NOT_FILES or noted_spec(Path(weights).expanduser()) is not None:
        return spec
    if spec.num_classes == len(labelled.classes) and spec.dataset != UNKNOWN:
        return spec
    return replace(spec, num_classes=len(labelled.classes), dataset=UNKNOWN, published=None, plain="")


def is_whole(evaluation: Evaluation) -> bool:
    """Whether the whole split was judged, and not a part of it."""
    return all(doubt.code != "part_of_split" for doubt in evaluation.caveats)


# ---------------------------------------------------------------- images in chunks


@dataclass(slots=True)
class _Reader:
    """Crops of labelled images by place; those that cannot be read are counted and left out."""

    images: LabelledImages
    preprocessing: Preprocessing
    most_bad: int
    bad: int = 0

    def read(self, places: Sequence[int]) -> tuple[data.Crops, Answers]:
        """uint8 (n, C, H, W) and labels (n,), n <= len(places). Raises BadImageError for the first image too many."""
        crops, labels = [], []
        for place in places:
            try:
                image, label = self.images[place]
            except BadImageError as error:
                self.bad += 1
                if self.bad > self.most_bad:
                    raise BadImageError(f"{error} ({self.bad} so far; --max-bad-images {self.bad} would leave it out)") from error
                continue
            crops.append(np.asarray(data.crop(image, self.preprocessing), dtype=np.uint8))
            labels.append(label)
        stacked = np.stack(crops).transpose(0, 3, 1, 2) if crops else np.empty((0, *self.preprocessing.input_size), np.uint8)
        return np.ascontiguousarray(stacked), np.asarray(labels, dtype=np.int64)


def _split(name: str) -> Literal["train", "validation", "test"]:
    if name not in SPLITS:
        raise SpecError(f"no split is called {name!r}: expected {', '.join(SPLITS)}")
    return cast('Literal["train", "validation", "test"]', name)


def _places(n: int, limit: int | None) -> list[int]:
    """All places, or ``limit`` of them drawn at random: the first ones of a folder would be of one class, evenly spaced ones might be."""
    if limit is not None and limit < 1:
        raise SpecError(f"a limit of {limit} images leaves nothing to evaluate: expected at least 1")
    if n == 0:
        raise DataError("the split holds no images: name another with --split")
    if limit is None or limit >= n:
        return list(range(n))
    chosen = np.random.default_rng(0).choice(n, size=limit, replace=False)
    return [int(place) for place in np.sort(chosen)]


def _chunk(preprocessing: Preprocessing, batch: int) -> int:
    """Images that travel at once: whole batches, and no more bytes than a board can hold beside the network."""
    channels = preprocessing.input_size[0]
    if channels != 3:
        raise DataError(f"cannot make images of {channels} channels: expected a network that takes RGB")
    fit = min(CHUNK_IMAGES, CHUNK_BYTES // int(np.prod(preprocessing.input_size)))
    return max(1, fit // batch) * batch


def _cut(crops: data.Crops, size: int) -> Iterator[data.Crops]:
    for start in range(0, len(crops), size):
        yield crops[start : start + size]


# ---------------------------------------------------------------- both networks' answers


def _logits(artifact: Artifact, crops: data.Crops, folder: Path, threads: int, bench: Bench) -> npt.NDArray[np.float64]:
    """(n, K) from a fresh worker. Raises what it raises, AgentError or BackendError where the answer is of another shape."""
    from edgejoule.fleet.dispatch import run_job

    buffer = io.BytesIO()
    np.save(buffer, crops, allow_pickle=False)
    path = folder / "crops.npy"
    data.write_whole(path, buffer.getvalue())
    workload = Workload("offline" if artifact.batch > 1 else "single_stream", artifact.batch)
    answer = run_job(Job("outputs", artifact.folder, str(path), workload, cores(threads), most=len(crops)), bench.transport)
    if not isinstance(answer, Outputs):
        raise AgentError("the worker answered with a trial where outputs were asked for: is it another version of edgejoule?")
    if answer.shape != (len(crops), artifact.variant.spec.num_classes):
        raise BackendError(
            f"{artifact.label} gives logits of shape {answer.shape} for {len(crops)} images: expected one for each of "
            f"{artifact.variant.spec.num_classes} classes"
        )
    return np.frombuffer(answer.logits, dtype=np.float64).reshape(answer.shape)


def _float_answers(module: object, crops: data.Crops, preprocessing: Preprocessing) -> Answers:
    import torch

    assert isinstance(module, torch.nn.Module)
    with torch.inference_mode():
        logits = module(torch.from_numpy(data.normalise(crops, preprocessing))).double().numpy()  # (n, K)
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), BROKEN).astype(np.int64)


def _beside(judged: Judged, expected: Sequence[Answers]) -> tuple[Interval | None, float | None, Interval | None]:
    """Agreement with the reference, the reference's own top-1, and how much of it was lost; None without a reference."""
    if not expected:
        return None, None, None
    answers = np.concatenate(expected)  # (N,)
    alike = int(np.count_nonzero((answers == judged.answers) & (answers != BROKEN)))
    right = answers == judged.labels
    return wilson(alike, len(judged)), float(right.mean()), paired_difference(right, judged.right)


def _doubts(artifact: Artifact, labelled: LabelledData, judged: Judged, bad: int, n: int, limit: int | None) -> Iterator[Caveat]:
    spec = artifact.variant.spec
    if judged.broken:
        first = int(np.flatnonzero(judged.answers == BROKEN)[0])
        yield caveat("logits_not_finite", f"{judged.broken} of {len(judged)} images, the first of them image {first + 1} of those read")
    if bad:
        yield caveat("images_skipped", f"{bad} of {len(judged) + bad} images")
    if limit is not None and limit < n:
        yield caveat("part_of_split", f"{len(judged) + bad} of {n} images")
    if spec.dataset != labelled.dataset:
        yield caveat("classes_assumed", f"{spec.name} is of {spec.dataset}, the images are of {labelled.dataset}")
