"""What finished training runs leave: weights on disk and their record in the store; and which of several runs is compiled.

Knows no loop, no data and no backend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejoule.errors import TrainingError
from edgejoule.records import ModelSpec, Published, Training

if TYPE_CHECKING:
    from edgejoule.store import Store


def write_weights(module: Any, path: Path) -> str:
    """A network's parameters and buffers as safetensors, whole or not at all; the file's sha256. Raises OutputError."""
    import torch
    from safetensors.torch import save

    from edgejoule.data import write_whole

    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    content = save({name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}, metadata={"format": "pt"})
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def is_there(store: Store, key: str, file: Path) -> bool:
    """Whether a run is in the store and its weights are on disk, whole. Raises TrainingError where the file is another one."""
    training = store.trainings().get(key)
    if training is None or not file.is_file():
        return False
    if hashlib.sha256(file.read_bytes()).hexdigest() != training.weights_id:
        raise TrainingError(f"{file} is not what training wrote: restore it, or delete it to train again")
    return True


def keep_training(training: Training, store: Store, number: int) -> None:
    """Into the store; a run made again, because its weights were deleted, must have given the same ones."""
    before = store.trainings().get(training.key)
    if before is None:
        store.add_training(number, training)
    elif before.weights_id != training.weights_id:
        raise TrainingError(
            f"{training.spec.name} was trained again, because its weights were gone, and came out another network "
            "(other hardware or versions): train it into a new folder with --out"
        )


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
