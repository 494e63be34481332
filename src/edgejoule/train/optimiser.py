"""timm's optimisers and schedules as a recipe asks for them, and the average of the weights. Knows no data and no loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgejoule import torchvision
from edgejoule.train.recipe import Recipe

torchvision.ensure()
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay  # noqa: E402
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler  # noqa: E402
from timm.scheduler.scheduler import Scheduler  # noqa: E402


def peak_lr(recipe: Recipe, batch: int) -> float:
    """The learning rate after warm-up: ``lr * batch / lr_batch`` (linear rule, Goyal et al. 2017, arXiv 1706.02677), or ``lr``."""
    return recipe.lr * batch / recipe.lr_batch if recipe.lr_batch else recipe.lr


def create_optimizer(network: nn.Module, recipe: Recipe, batch: int) -> torch.optim.Optimizer:
    """AdamW, or SGD with classical momentum (timm's own "sgd" is Nesterov's; the sources' is not).

    Weights decay but for biases, norms and what any part of the network names in ``no_weight_decay()``, unless ``decay_all``.
    """
    return create_optimizer_v2(  # type: ignore[no-any-return]
        network,
        opt={"adamw": "adamw", "sgd": "momentum"}[recipe.optimizer],
        lr=peak_lr(recipe, batch),
        momentum=recipe.momentum,
        param_group_fn=lambda module: parameter_groups(module, recipe),
    )


def parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The optimiser's groups. With layer decay, what lies outside the part that knows its own layers learns at the full rate."""
    options = {"weight_decay": recipe.weight_decay, "weight_decay_exclude_1d": not recipe.decay_all}
    if recipe.layer_decay == 1.0:
        kept = () if recipe.decay_all else undecayed(network)
        return list(param_groups_weight_decay(network, no_weight_decay_list=kept, **options))
    layered = next((part for part in network.modules() if hasattr(part, "group_matcher")), network)
    kept = () if recipe.decay_all else undecayed(layered)
    groups = list(param_groups_layer_decay(layered, no_weight_decay_list=kept, layer_decay=recipe.layer_decay, **options))
    inside = {id(parameter) for parameter in layered.parameters()}
    rest = nn.ParameterDict()
    spared = undecayed(network)
    for name, parameter in network.named_parameters():
        if id(parameter) not in inside and parameter.requires_grad:
            rest[name.replace(".", "/")] = parameter
    plain = () if recipe.decay_all else tuple(name.replace(".", "/") for name in spared)
    return groups + [{**group, "lr_scale": 1.0} for group in param_groups_weight_decay(rest, no_weight_decay_list=plain, **options)]


def undecayed(network: nn.Module) -> tuple[str, ...]:
    """Parameters that the network or one of its parts names in ``no_weight_decay()``, by their full names."""
    names: set[str] = set()
    for prefix, part in network.named_modules():
        named = getattr(part, "no_weight_decay", None)
        if callable(named):
            names |= {f"{prefix}.{name}" if prefix else str(name) for name in named()}
    return tuple(sorted(names))


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    return recipe.warmup_steps or round(recipe.warmup_epochs * steps_per_epoch)


def create_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, steps_per_epoch: int) -> Scheduler:
    """The learning rate of each step t in [0, steps), by ``step_update(t)``: a function of t alone.

    Warm-up is linear from ``warmup_lr`` at t = 0 to the peak, and runs *within* the schedule (timm's and MMEngine's way): what follows
    is the schedule's value at t, not the peak. cosine reaches ``min_lr`` at the last step; poly is ``(1 - t / steps) ** power``
    between peak and ``min_lr`` (MMEngine's PolyLR); steps falls to a tenth with the first step after each milestone.
    """
    warm: dict[str, Any] = {
        "warmup_t": warmup_steps(recipe, steps_per_epoch),
        "warmup_lr_init": recipe.warmup_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if recipe.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=max(steps - 1, 1), lr_min=recipe.min_lr, **warm)
    if recipe.schedule == "poly":
        return PolyLRScheduler(optimizer, t_initial=steps, power=recipe.power, lr_min=recipe.min_lr, **warm)
    milestones = recipe.milestones if recipe.schedule == "steps" else ()
    # timm compares milestones with t + 1 and says that it always will.
    falls = sorted(round(epochs * steps_per_epoch) + 1 for epochs in milestones)
    return MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=0.1, **warm)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate before any layer's own factor."""
    group = max(optimizer.param_groups, key=lambda group: group.get("lr_scale", 1.0))
    return float(group["lr"] / group.get("lr_scale", 1.0))
