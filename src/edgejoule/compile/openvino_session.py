"""A loaded OpenVINO file: one infer request a stream, so that as many threads may call at once; asynchronous calls; the audit.

OpenVINO's own AsyncInferQueue never calls back for an inference that failed, and whoever waits for it waits for ever: here each
asynchronous call has a thread that waits for its own. Imports openvino and numpy only. Knows no manifest and no quantiser.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edgejoule.compile.openvino_audit import placement, precision
from edgejoule.compile.openvino_import import core, import_openvino
from edgejoule.compile.openvino_restore import weighted_names
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.records import Placement, SessionInfo, TensorInfo

LOG = logging.getLogger("edgejoule.compile")


class OpenVinoSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}; safe to call from any thread.

    More callers than streams wait for a free one. Images must not change until their call has answered: they are not copied.
    """

    def __init__(self, path: Path, device: str, config: Mapping[str, Any], threads: int, streams: int = 1) -> None:
        openvino = import_openvino()

        self._path, self._device, self._config = path, device, dict(config)
        model = _read(path)
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self._waiting = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._streams, self._open = streams, True
        try:
            compiled = core().compile_model(model, device, self._config)
            for _ in range(streams):
                self._idle.put(compiled.create_infer_request())
            self._shape = tuple(compiled.input(0).shape)
            self._info = SessionInfo(
                precision=precision(compiled, frozenset(weighted_names(model))),
                providers=tuple(compiled.get_property("EXECUTION_DEVICES")),
                runtime=f"openvino {'-'.join(openvino.__version__.split('-')[:2])}",
                threads=int(compiled.get_property("INFERENCE_NUM_THREADS")) if device == "CPU" else threads,
                inputs=tuple(_tensor(port) for port in compiled.inputs),
                outputs=tuple(_tensor(port) for port in compiled.outputs),
            )
        except Exception as error:
            raise BackendError(f"openvino cannot load {path} on {device} ({reason(error)}): use another precision or device") from error

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where the runtime fails."""
        self._check(images)
        return self._run(self._idle.get(), images)

    def submit(self, images: Any, done: Callable[[Mapping[str, Any] | Exception], None]) -> None:
        """Begins an inference and returns, at once where a stream is free. ``done`` gets {"logits": ...} or the exception, later, from
        another thread, which may submit again. Raises BackendError at once for another shape or dtype, and after ``close``."""
        self._check(images)
        with self._waiting:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._streams, thread_name_prefix="openvino")
        request = self._idle.get()
        try:
            self._executor.submit(self._answer, request, images, done)
        except RuntimeError as error:  # closed meanwhile
            self._idle.put(request)
            raise BackendError("the session is closed: load the artifact again") from error

    def _answer(self, request: Any, images: Any, done: Callable[[Mapping[str, Any] | Exception], None]) -> None:
        try:
            result: Mapping[str, Any] | Exception = self._run(request, images)
        except Exception as error:
            result = error
        try:
            done(result)
        except Exception:  # nobody else would ever see the caller's own mistake
            LOG.exception("what was to be done with an answer failed")

    def _run(self, request: Any, images: Any) -> Mapping[str, Any]:
        """The request is free again afterwards, whatever happened."""
        try:
            logits = request.infer(images, share_inputs=True)[0]  # the result is a copy, the input is not
        except Exception as error:
            raise BackendError(
                f"openvino failed while running the model ({reason(error)}): free some memory or use another backend"
            ) from error
        finally:
            self._idle.put(request)
        return {"logits": logits}

    def _check(self, images: Any) -> None:
        if not self._open:
            raise BackendError("the session is closed: load the artifact again")
        check_images(images, self._shape)

    def audit(self, images: Any) -> Placement:
        """Which operators run where and in what precision: compiled once more with OpenVINO's own counters, and run. Raises as infer."""
        self._check(images)
        try:
            model = _read(self._path)
            compiled = core().compile_model(model, self._device, {**self._config, "PERF_COUNT": "YES"})
            compiled.create_infer_request().infer(images, share_inputs=True)
            return placement(compiled, self._device, frozenset(weighted_names(model)))
        except RuntimeError as error:
            raise BackendError(f"openvino cannot tell what it runs ({reason(error)}): measure without an audit") from error

    def info(self) -> SessionInfo:
        """``precision`` is the one most weighted products have in the compiled graph, ``providers`` the devices that execute it."""
        return self._info

    def close(self) -> None:
        """Waits for what was submitted. A second call does nothing."""
        self._open = False
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        while not self._idle.empty():
            self._idle.get()


def _read(path: Path) -> Any:
    """Raises ArtifactError. What is no XML is never handed over: OpenVINO would try every other format's parser on it, aloud."""
    try:
        with path.open("rb") as stream:
            is_xml = stream.read(5) == b"<?xml"
        if is_xml:
            return core().read_model(path)
    except Exception as error:
        raise ArtifactError(f"openvino cannot read {path} ({reason(error)}): compile again") from error
    raise ArtifactError(f"{path} is damaged: it is no XML; compile again")


def _tensor(port: Any) -> TensorInfo:
    return TensorInfo(port.any_name, tuple(port.shape), port.element_type.to_dtype().name)
