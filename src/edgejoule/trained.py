"""What finished training runs leave: weights on disk and their record in the store; and which of several runs is compiled.

Knows no loop, no data and no backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgejoule.errors import TrainingError
from edgejoule.plain import decode, encode
from edgejoule.records import ModelSpec, Published, Training

NOTE = "edgejoule"  # the key of a weights file's metadata


def write_weights(module: Any, path: Path, spec: ModelSpec | None = None, expected: str = "") -> str:
    """A network's parameters and buffers as safetensors, whole or not at all, with its row for who finds the file; the file's sha256.

    Raises OutputError, and TrainingError before anything is written where ``expected`` is another sha256: of a run made again, because
    its weights were gone.
    """
    import torch
    from safetensors.torch import save

    from edgejoule.data import write_whole

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    metadata = {NOTE: json.dumps(encode(spec))} if spec is not None else {"format": "pt"}  # one key: the order of several is random
    content = save({name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}, metadata=metadata)
    sha256 = hashlib.sha256(content).hexdigest()
    if expected and sha256 != expected:
        raise TrainingError(
            f"{path.name} was trained again, because it was gone, and came out another one (other hardware, versions or micro-batches): "
            "restore it, or train into a new folder with --out"
        )
    write_whole(path, content)
    return sha256


def noted_spec(path: Path) -> ModelSpec | None:
    """The row that ``write_weights`` wrote into a file: preprocessing, classes, data set; None where there is none to read."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return decode(ModelSpec, json.loads((file.metadata() or {})[NOTE]))
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):  # whoever loads the weights says what is wrong with the file
        return None


def is_there(training: Training, file: Path) -> bool:
    """Whether the weights of a run that the store has are on disk, whole. Raises TrainingError where the file is another one."""
    if not file.is_file():
        return False
    if hashlib.sha256(file.read_bytes()).hexdigest() != training.weights_id:
        raise TrainingError(f"{file} is not what training wrote: restore it, or delete it to train again")
    return True


def chosen(trainings: Sequence[Training]) -> Mapping[str, Training]:
    """For each model the training that is compiled: of its recipes the best by mean validation accuracy, of its seeds the first."""
    models: dict[str, dict[str, list[Training]]] = {}
    for training in trainings:
        models.setdefault(training.spec.name, {}).setdefault(training.recipe, []).append(training)
    best = {name: max(recipes.values(), key=_mean_validation) for name, recipes in models.items()}
    return {name: min(seeds, key=lambda training: training.seed) for name, seeds in best.items()}


def measured_spec(training: Training, trainings: Sequence[Training]) -> ModelSpec:
    """The trained network's row with its own test accuracy, the mean over its seeds, in the place of a published one: for NetScore."""
    seeds = [t.accuracy.value for t in trainings if (t.spec, t.recipe) == (training.spec, training.recipe) and t.accuracy is not None]
    top1_pct = 100 * sum(seeds) / len(seeds) if seeds else None
    return replace(training.spec, published=Published(top1_pct, None, None, f"measured here, {len(seeds)} seeds"))


def _mean_validation(trainings: Sequence[Training]) -> float:
    values = [training.validation.value for training in trainings if training.validation is not None]
    return sum(values) / len(values) if values else -1.0
