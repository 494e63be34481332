"""Runs a torch callable on an NVIDIA GPU as it would be deployed: fixed buffers, pinned host memory, one CUDA graph, CUDA events.

An inference copies the images to the GPU, replays the graph and copies the logits back; the host waits for the last copy. Copies stay
outside the graph. What cannot be captured is an error that says so: nothing falls back to launching kernels one by one unless
``graphs`` is False. Knows no file and no precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError

WARMUPS = 3  # before a capture: libraries choose their algorithms and reserve memory, which a graph may not


class GpuRun:
    """``call`` maps a float32 tensor (B, C, H, W) on the GPU to logits (B, K) there. Not for several threads at once.

    Raises BackendError, where the GPU has too little memory or the callable cannot be captured.
    """

    def __init__(self, call: Callable[[Any], Any], shape: tuple[int, ...], graphs: bool) -> None:
        import torch

        self._torch = torch
        self._call = call
        self._graph: Any = None
        try:
            with torch.inference_mode():
                self._host_images = torch.empty(shape, dtype=torch.float32, pin_memory=True)  # (B, C, H, W)
                self._images = torch.zeros(shape, dtype=torch.float32, device="cuda")  # (B, C, H, W)
                self._logits = self._warmed_up()  # (B, K)
                self._host_logits = torch.empty(self._logits.shape, dtype=torch.float32, pin_memory=True)  # (B, K)
            cuda: Any = torch.cuda
            self._began, self._ended, self._copied = (cuda.Event(enable_timing=True) for _ in range(3))
        except Exception as error:
            raise BackendError(f"the GPU cannot run the program ({reason(error)}): free some memory or use another backend") from error
        if graphs:
            self._capture()

    def _warmed_up(self) -> Any:
        """On a side stream, as CUDA's graphs want it; the last logits (B, K)."""
        cuda = self._torch.cuda
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(WARMUPS):
                logits = self._call(self._images)
        cuda.current_stream().wait_stream(stream)
        cuda.synchronize()
        return logits

    def _capture(self) -> None:
        """Raises BackendError."""
        graph = self._torch.cuda.CUDAGraph()
        try:
            with self._torch.inference_mode():
                with self._torch.cuda.graph(graph):
                    self._logits = self._call(self._images)
                graph.replay()
                self._torch.cuda.synchronize()
        except Exception as error:
            raise BackendError(
                f"the network cannot be captured in a CUDA graph ({reason(error)}): use graphs=False, which launches its kernels one by one"
            ) from error
        self._graph = graph

    def __call__(self, images: Any) -> Any:
        """numpy float32 (B, C, H, W) -> numpy float32 (B, K), an array of its own, after the GPU has finished."""
        return self.run(self._torch.from_numpy(images)).numpy().copy()

    def run(self, images: Any) -> Any:
        """The same of tensors on the host; the result is overwritten by the next."""
        with self._torch.inference_mode():
            self._host_images.copy_(images)
            self._images.copy_(self._host_images, non_blocking=True)
            self._began.record()
            if self._graph is None:
                self._logits = self._call(self._images)
            else:
                self._graph.replay()
            self._ended.record()
            self._host_logits.copy_(self._logits, non_blocking=True)
            self._copied.record()
            self._copied.synchronize()
            return self._host_logits

    @property
    def device_time_s(self) -> float:
        """Seconds that the GPU computed in the last inference, by CUDA events, without the copies. Raises BackendError before the first."""
        try:
            return float(self._began.elapsed_time(self._ended)) / 1e3  # milliseconds
        except Exception as error:
            raise BackendError(f"no inference was timed on the GPU ({reason(error)}): call infer first") from error

    def close(self) -> None:
        """Gives the memory back."""
        self._graph = self._logits = self._images = self._call = None  # type: ignore[assignment]
        self._torch.cuda.empty_cache()
