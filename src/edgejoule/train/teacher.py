"""A trained network of any family that answers for a student's images: other size, other mean, the same classes. Knows no student.

It stands outside every module tree: it is in no state dict, no checkpoint, no optimiser, and no DDP, and it has no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from edgejoule.errors import TrainingError
from edgejoule.records import Preprocessing
from edgejoule.train import transfer


class Teacher:
    """In eval mode for good. ``calls`` counts the batches that it has seen."""

    def __init__(self, module: torch.nn.Module, name: str, own: Preprocessing, student: Preprocessing, num_classes: int | None) -> None:
        """``num_classes`` None: only its maps are asked for, and its classes may be any.

        Raises TrainingError for other classes than ``num_classes``, where the network says how many it has, or other channels.
        """
        if own.input_size[0] != student.input_size[0]:
            raise TrainingError(
                f"the teacher {name} takes images of {own.input_size[0]} channels and the student of {student.input_size[0]}: "
                "choose a teacher that takes as many"
            )
        self._module = module.eval().requires_grad_(False)
        self._name, self._own, self._student, self.num_classes = name, own, student, num_classes
        self.calls = 0
        self._check_classes(getattr(module, "num_classes", self.num_classes))

    @property
    def student_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it is shown."""
        return self._student.input_size

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) as the student sees them -> (B, K) float32. Raises TrainingError where the teacher's answer is not that."""
        with torch.no_grad():
            return self._checked(self._on(images.device)(self.view(images)))

    def logits_and_maps(self, images: torch.Tensor, indices: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, 3, H, W) as the student sees them -> (B, K) float32 and the intermediate maps (B, C, H', W') at ``indices``."""
        with torch.no_grad():
            logits, maps = transfer.answer_with_maps(self._on(images.device), self.view(images), indices)
        return self._checked(logits), maps

    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of every intermediate map. Raises TrainingError for a network that does not give them."""
        return transfer.shapes_of(self._module, self._own.input_size, f"the teacher {self._name}")

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """The student's normalised images (B, 3, H, W) -> the teacher's (B, 3, H', W').

        Pixels are restored, resized as a whole where sizes differ (bilinear where that is the teacher's own, else bicubic, with
        antialiasing) and normalised anew. Nothing is clipped: where sizes are equal it is exact but for rounding.
        """
        mean, std = (_per_channel(v, images) for v in (self._student.mean, self._student.std))
        pixels = images.float() * std + mean  # 0 to 1, but for noise that the augmentation put in
        size = self._own.input_size[1:]
        if tuple(pixels.shape[2:]) != size:
            mode = "bilinear" if self._own.interpolation in ("bilinear", "box", "hamming") else "bicubic"
            pixels = functional.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)
        mean, std = (_per_channel(v, images) for v in (self._own.mean, self._own.std))
        return (pixels - mean) / std

    def _on(self, device: torch.device) -> torch.nn.Module:
        self.calls += 1
        return self._module.to(device)

    def _checked(self, logits: object) -> torch.Tensor:
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
            raise TrainingError(f"the teacher {self._name} gives no logits (B, K): choose a classifier")
        self._check_classes(logits.shape[1])
        logits = logits.float()
        if not torch.isfinite(logits).all():
            raise TrainingError(f"the teacher {self._name} answers with numbers that are none (NaN or infinite): its weights are damaged")
        return logits

    def _check_classes(self, found: int | None) -> None:
        if self.num_classes is not None and found != self.num_classes:
            raise TrainingError(
                f"the teacher {self._name} knows {found} classes and the student learns {self.num_classes}: "
                "fine-tune the teacher on this data first, and give its weights file"
            )


def _per_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(C,) numbers -> (1, C, 1, 1) float32 on the images' device."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)
