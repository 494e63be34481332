"""What every session refuses in the same words: images that do not fit, and streams that its runtime has not. Boards import this."""

from __future__ import annotations

from typing import Any

from edgejoule.errors import BackendError


def check_images(images: Any, shape: tuple[int, ...]) -> None:
    """Raises BackendError unless ``images`` are float32 of the static shape (B, C, H, W) that was compiled for."""
    if images.shape != shape or images.dtype != "float32":
        raise BackendError(f"images are {images.dtype} {images.shape}, expected float32 {shape}: compile for that batch and size")


def check_one_stream(backend: str, streams: int) -> None:
    """Raises BackendError for more streams than the one that a backend runs."""
    if streams != 1:
        raise BackendError(f"{backend} runs one stream, {streams} were asked for: use openvino or onnxruntime, or one process a stream")
