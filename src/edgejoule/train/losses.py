"""What a student is told by its teacher, as pure functions of tensors: two of answers, two of maps. No networks.

Every one is a mean over images, and is computed in float32 whatever the tensors' precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from edgejoule.errors import TrainingError


def hard_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, K) with the teacher's first answers (B,), int64 -> (). DeiT, eq. 3; no smoothing, as in its code."""
    return functional.cross_entropy(logits.float(), answers)


def soft_loss(
    logits: torch.Tensor, probabilities: torch.Tensor, temperature: float = 1.0, average: Literal["images", "elements"] = "images"
) -> torch.Tensor:
    """t^2 KL(p || softmax(z / t)) of logits z (B, K) and the teacher's probabilities p (B, K), at the same temperature t > 0 -> ().

    Summed over classes and averaged over images: Hinton et al. 2015 (arXiv 1503.02531) and DeiT's eq. 2 (arXiv 2012.12877), as
    timm computes it. DeiT's released code divides by B K instead of B ("the legacy PyTorch behavior"); ``average="elements"`` is that.
    Against soft cross-entropy, TinyViT's, it differs by the teacher's entropy, which has no gradient.
    """
    student = functional.log_softmax(logits.float() / temperature, dim=1)  # (B, K)
    divergence = functional.kl_div(student, probabilities.float(), reduction="sum") * temperature**2
    return divergence / (logits.shape[0] if average == "images" else logits.numel())


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of maps (B, C, H, W) and (B, C, H', W'), each normalised over channels at every place -> ().

    FitNets' hint loss (arXiv 1412.6550, eq. 3) on whitened features: a LayerNorm without parameters on the target is from Wei et al.
    (arXiv 2205.14141, 3.2); here the student's side has it too, so that networks of any scale compare: the loss is twice one minus
    the correlation over channels, 0 to 4. Maps of different sizes meet at the smaller one, by averaging areas.
    """
    ours, theirs = at_one_size(student.float(), teacher.float())
    return functional.mse_loss(_whitened(ours), _whitened(theirs))


def attention_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of spatial attention maps of (B, C, H, W) and (B, C', H', W') -> ().

    Zagoruyko and Komodakis (arXiv 1612.03928): attention is the mean over channels of squared activations, flattened and divided by
    its L2 norm (3.1). Eq. 2 takes the norm of the difference; their released code the mean of its square over images and places,
    which is this, and whose weight there is 1000. Widths may differ; sizes meet at the smaller one, by averaging areas.
    """
    ours, theirs = at_one_size(_energy(student), _energy(teacher))
    return functional.mse_loss(functional.normalize(ours.flatten(1), eps=1e-30), functional.normalize(theirs.flatten(1), eps=1e-30))


def at_one_size(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, H, W) and (B, C', H', W') -> both with min(H, H') rows and min(W, W') columns."""
    if a.dim() != 4 or b.dim() != 4:
        raise TrainingError(f"maps have four axes (B, C, H, W), not shapes {tuple(a.shape)} and {tuple(b.shape)}")
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    first, second = (x if x.shape[2:] == size else functional.adaptive_avg_pool2d(x, size) for x in (a, b))
    return first, second


def _whitened(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H, W, C), mean 0 and variance 1 at each place."""
    x = x.permute(0, 2, 3, 1)
    return functional.layer_norm(x, x.shape[-1:])


def _energy(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, 1, H, W), scaled to 1 at most: squares of vanishing or huge activations would leave float32."""
    x = x.float()
    return (x / x.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30).detach()).square().mean(1, keepdim=True)
