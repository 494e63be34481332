"""Random weights that are alive: every branch of the network computes, activations are of order one, outputs depend on the image.

Networks fresh from their constructor are often dead: zero-initialised gammas and heads, layer scales of 1e-5, running
statistics that fit no image. Compilers fold the dead branches away, and such files are smaller and faster than real ones.
Here constants get ordinary values, batch statistics come from real images, and the head is scaled to logits of about one.
Time and energy then stand; accuracy means nothing. Knows no file and no model by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from edgejoule.errors import ModelError

VERSION = 3  # raise it with any change below: it is part of the identity of the weights
PHOTOS = "photos(n=16)"
_LAYER_SCALE = re.compile(r"^(gamma|layer_?scale|ls|lambda|alpha|res_?scale|skip_?scale|gain)(_?\w*)?$", re.IGNORECASE)


def identity(seed: int) -> str:
    """What determines live random weights, besides the network and torch's version."""
    return f"live{VERSION}(seed={seed})"


def enliven(module: torch.nn.Module, images: torch.Tensor, seed: int) -> None:
    """Change a module in place, which is left in eval mode; ``images`` (N, C, H, W) are normalised real ones, N >= 8.

    Raises ModelError where the outputs vanish or overflow all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), _one_thread():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                _enliven_parameter(owner, name, parameter, generator)
        _settle_batch_norms(module, images)
        _scale_head(module, images[:8])
    module.train()  # attention blocks that keep biases between evaluations let go of them in training mode only
    module.eval()


def _enliven_parameter(owner: torch.nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Batch norms get ordinary gains and shifts; elsewhere only constants change: what an initialisation drew at random stays."""
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return
    if isinstance(owner, _BatchNorm):
        # The gain that closes a residual branch starts at zero and trained networks keep it small; at one, dozens of normalised
        # branches would make the network chaotic: rounding alone would change its logits by percents, and parity prove nothing.
        closes_branch = name == "weight" and float(parameter.abs().max()) == 0.0
        if closes_branch:
            parameter.uniform_(0.2, 0.4, generator=generator)
        else:
            _fill_norm(name, parameter, generator)
        return
    value = float(parameter.flatten()[0])
    constant = bool((parameter == value).all())
    dead = float(parameter.abs().max()) < 1e-4
    is_scale = "scale" in type(owner).__name__.lower() or bool(_LAYER_SCALE.match(name))
    if is_scale and constant and abs(value) < 0.5:
        parameter.uniform_(0.4, 0.6, generator=generator)
    elif dead and name == "weight" and parameter.ndim > 1:
        fan_in = parameter[0].numel()
        parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    elif "norm" in type(owner).__name__.lower() and constant and (dead or value == 1.0):
        _fill_norm(name, parameter, generator)
    elif dead:  # biases, tokens, tables of positions
        parameter.normal_(0.0, 0.02, generator=generator)
    elif constant and value == 1.0 and parameter.numel() > 1:  # gains outside norms: multiplying by one would be folded away
        parameter.uniform_(0.8, 1.2, generator=generator)


def _fill_norm(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if name == "weight":
        parameter.uniform_(0.8, 1.2, generator=generator)
    else:
        parameter.normal_(0.0, 0.05, generator=generator)


def _settle_batch_norms(module: torch.nn.Module, images: torch.Tensor) -> None:
    """Running statistics of the images, layer by layer in one pass: in training mode each norm already feeds the next normalised maps."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_var is not None]
    module.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over the pass, not a moving one
        norm.train()
    if norms:
        module(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        if norm.running_var is not None:  # a channel that hardly varies would blow up rounding errors, or the first image on which it does
            norm.running_var.clamp_(min=max(1e-4, 1e-1 * float(norm.running_var.mean())))


def _scale_head(module: torch.nn.Module, images: torch.Tensor) -> None:
    logits = module(images)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ModelError(f"{type(module).__name__} gives no logits of shape (N, K): expected an image classifier")
    spread = float(logits.std())
    if not 1e-30 < spread < 1e30:
        raise ModelError(f"{type(module).__name__} with random weights gives logits of spread {spread:.3g}: use pretrained ones")
    for layer in _heads(module, logits.shape[1]):
        for parameter in layer.parameters(recurse=False):
            parameter.div_(spread)


def _heads(module: torch.nn.Module, classes: int) -> tuple[torch.nn.Module, ...]:
    """The last layers, one for each head: those of timm's ``get_classifier``, else the last linear layer that is as wide as the logits."""
    get_classifier = getattr(module, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else module
    roots = found if isinstance(found, (tuple, list)) else (found,)
    heads = []
    for root in roots:
        layers = [
            layer for layer in root.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and layer.weight.shape[0] == classes
        ]
        heads += layers[-1:]
    return tuple(heads)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in the same order whatever the machine's number of cores, so that a seed gives the same weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
