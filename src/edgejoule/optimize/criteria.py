"""How much a network needs a unit or a weight: four criteria, apart from the surgery. Knows no architecture and takes nothing out.

Two look at the weights alone, two at the slope of the loss on images as well. The scores of one criterion may be compared within a group;
between groups only after each was scaled (``allocation.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from edgejoule.errors import ModelError
from edgejoule.optimize.copies import copied, forget_caches
from edgejoule.optimize.groups import Group, sums
from edgejoule.seams import Held

Criterion = Literal["magnitude", "taylor", "hessian", "random"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
ON_IMAGES = frozenset({"taylor", "hessian"})  # these need images
IMAGES, BATCH = 64, 8  # of the training data; Taylor's batch


def importance(criterion: str, root: nn.Module, groups: Sequence[Group], held: Held | None = None, seed: int = 0) -> dict[str, Tensor]:
    """{group name: (U,) float64}, at least 0: the higher, the more the network needs the unit. ``root`` is not changed.

    With w a unit's parameters (biases and norms among them) and g the gradient of the cross-entropy on them:

    - ``magnitude``: |w|, the Euclidean norm.
    - ``taylor``: the mean over batches of |sum of g w|, the change of the loss without the unit as its first-order expansion has it
      (Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771), all parameters of the unit at once.
    - ``hessian``: the sum of h w² / 2, h the mean over images of g²: the saliency of LeCun, Denker and Solla, Optimal Brain Damage (1990),
      with the diagonal of the empirical Fisher matrix in the place of the Hessian's.
    - ``random``: uniform in [0, 1), by ``seed``: what the others must beat.

    ``held`` holds images (M, C, H, W) and labels (M,), or None for labels: then the network's own answers are the truth. Raises ModelError
    for a network without logits (N, K), without gradients, and for scores that are not finite.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups}
    owned = {group.name: _parameters(root, group) for group in groups}
    if criterion == "magnitude":
        squares = ({name: root.get_parameter(name).detach().double().square() for name in owned[group.name]} for group in groups)
        return _finite({group.name: sums(root, group, square).sqrt() for group, square in zip(groups, squares, strict=True)})
    assert criterion in ON_IMAGES and held is not None, criterion
    totals = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    names = sorted({name for names in owned.values() for name in names})
    count = 0
    for slopes in gradients(root, held, names, BATCH if criterion == "taylor" else 1):
        for group in groups:
            totals[group.name] += _score(criterion, root, group, {name: slopes[name] for name in owned[group.name] if name in slopes})
        count += 1
    return _finite({name: total / count for name, total in totals.items()})


def weight_importance(criterion: str, root: nn.Module, names: Sequence[str], held: Held | None = None, seed: int = 0) -> dict[str, Tensor]:
    """{parameter name: float64 of its shape}: the criteria of ``importance``, where every single weight is a unit of its own."""
    weights = {name: root.get_parameter(name).detach() for name in names}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(value.shape, generator=generator, dtype=torch.float64) for name, value in weights.items()}
    if criterion == "magnitude":
        return _finite({name: value.double().abs() for name, value in weights.items()})
    assert criterion in ON_IMAGES and held is not None, criterion
    totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights.items()}
    count = 0
    for slopes in gradients(root, held, names, BATCH if criterion == "taylor" else 1):
        for name, slope in slopes.items():
            product = slope.double() * weights[name].double()
            totals[name] += product.abs() if criterion == "taylor" else product.square() / 2
        count += 1
    return _finite({name: total / count for name, total in totals.items()})


def _parameters(root: nn.Module, group: Group) -> tuple[str, ...]:
    """The names in the network of the parameters that a group's units own parts of, each once."""
    block = root.get_submodule(group.name)
    known = {name for name, _ in block.named_parameters(remove_duplicate=False)}
    names = dict.fromkeys(f"{cut.layer}.{cut.tensor}".lstrip(".") for cut in group.cuts)
    return tuple(f"{group.name}.{name}".lstrip(".") for name in names if name in known)


def _score(criterion: str, root: nn.Module, group: Group, slopes: Mapping[str, Tensor]) -> Tensor:
    """(U,) of one batch, from the gradients of the group's parameters."""
    products = {name: slope.double() * root.get_parameter(name).detach().double() for name, slope in slopes.items()}
    if criterion == "taylor":
        return sums(root, group, products).abs()
    return sums(root, group, {name: product.square() for name, product in products.items()}) / 2


def gradients(root: nn.Module, held: Held, names: Sequence[str], size: int) -> Iterator[dict[str, Tensor]]:
    """For each batch of ``size`` images, the gradients of its mean cross-entropy on the named parameters (those that it depends on).

    Of a copy in eval mode: batch norms and dropout stand still. Raises ModelError, see ``importance``.
    """
    twin = copied(root).requires_grad_(False)
    wanted = [twin.get_parameter(name).requires_grad_(True) for name in names]
    images = torch.as_tensor(held.images).to(wanted[0])  # (M, C, H, W), of the network's type and device
    labels = None if held.labels is None else torch.as_tensor(held.labels).to(images.device)  # (M,)
    if len(images) == 0:
        raise ModelError("there are no images to weigh its units by: give the recipe training data")
    for start in range(0, len(images), size):
        forget_caches(twin)  # biases that were computed with the last batch's graph
        with torch.inference_mode(False), torch.enable_grad():
            logits = twin(images[start : start + size].clone())  # (B, K)
            truth = _truth(logits, None if labels is None else labels[start : start + size].clone())
            loss = nn.functional.cross_entropy(logits, truth)
            if not loss.requires_grad:
                raise ModelError("no gradient reaches its weights: use criterion='magnitude'")
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        yield {name: slope for name, slope in zip(names, found, strict=True) if slope is not None}


def _truth(logits: Any, labels: Tensor | None) -> Tensor:
    """(B,) int64."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError("it gives no logits of shape (N, K), and this criterion is made for image classifiers: use criterion='magnitude'")
    if labels is None:
        return logits.detach().argmax(dim=1)
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise ModelError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, and it has {logits.shape[1]} classes: use its own data"
        )
    return labels.long()


def _finite(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ModelError(f"the importance of {name} is not finite: its weights or its loss overflow")
    return scores
