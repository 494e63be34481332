"""The worker: one Job as JSON on stdin, JSON lines on stdout, one fresh process per job. What runs on a board.

    {"event": "window", ...}          progress, as it happens; never inside the window
    {"trial": {...}} | {"outputs": {...}} | {"error": {"kind": "BackendError", "message": "..."}}

Whatever a runtime prints to file descriptor 1 goes to standard error, so that it cannot corrupt the protocol. Thread limits are set
before numpy or a runtime is imported, because they read them once. Imports no torch, scipy or SQLAlchemy of its own: only a
torch backend does. Exits 0 with an answer, 2 on an error that a user can mend, 1 on a bug.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from edgejoule.errors import AgentError, DataError, EdgejouleError, MeterError
from edgejoule.plain import decode, encode
from edgejoule.processes import die_with_parent, take_stdout
from edgejoule.records import Artifact, Job, Outputs, Trial, floats

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgejoule.seams import Session

COUNTED = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS")


class Answers:
    """The protocol's own copy of the standard output: one JSON value a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def event(self, name: str, **details: Any) -> None:
        self.send({"event": name, **details})

    def send(self, value: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()


def main() -> int:
    """Answer the job on stdin; the process's exit code."""
    answers = Answers(take_stdout())
    try:
        die_with_parent()
        job = read_job(sys.stdin.read())
        os.environ.update(thread_limits(job.threads))
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's own order: the meter must watch the GPU that computes
        with ExitStack() as opened:  # sessions are closed after the answer: a runtime that crashes while closing loses nothing
            answers.send(answer(job, answers, opened))
    except EdgejouleError as error:
        answers.send({"error": {"kind": type(error).__name__, "message": str(error)}})
        return 2
    except Exception as error:  # a bug, or a runtime's own exception: told to the caller, and its traceback shown
        traceback.print_exc()
        answers.send({"error": {"kind": "AgentError", "message": f"{type(error).__name__}: {error}"}})
        return 1
    return 0


def read_job(text: str) -> Job:
    """Raises AgentError where the text is not a job of this version."""
    try:
        return decode(Job, json.loads(text))
    except (ValueError, RecursionError) as error:  # json's own error is a ValueError
        raise AgentError(f"the worker was not given a job ({error}): are both sides of the same version of edgejoule?") from error


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables for a number of threads; waiting threads sleep, because spinning ones burn the energy being measured."""
    limits = dict.fromkeys(COUNTED, str(threads)) if threads > 0 else {}
    return {**limits, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def answer(job: Job, answers: Answers, opened: ExitStack) -> dict[str, Any]:
    """``{"trial": ...}`` or ``{"outputs": ...}``. Raises the EdgejouleError of whatever failed."""
    from edgejoule import manifest

    artifact = manifest.read(Path(job.artifact))
    crops = _crops(job)
    if job.action == "outputs":
        done: dict[str, Any] = {"outputs": encode(outputs(job, artifact, crops, opened))}
    else:
        done = {"trial": encode(measure(job, artifact, crops, answers, opened))}
    top_level = {name.partition(".")[0] for name in sys.modules}
    answers.event("done", packages=sorted(top_level - set(sys.stdlib_module_names)))
    return done


def measure(job: Job, artifact: Artifact, crops: npt.NDArray[np.uint8], answers: Answers, opened: ExitStack) -> Trial:
    """One trial. Raises MeterError before anything is loaded where the meter cannot be used."""
    from edgejoule.measure.meters import open_meter
    from edgejoule.measure.trial import Bench, run_trial
    from edgejoule.scenarios import scenario

    meter = open_meter(job.meter)
    if meter is not None and (missing := meter.probe()) is not None:
        raise MeterError(f"the meter {job.meter} cannot be used: {missing}")
    backend = _backend(artifact)

    def load() -> Session:
        session: Session = backend.load(artifact, job.threads, scenario(job.workload.scenario).n)
        opened.callback(session.close)
        return session

    return run_trial(load, artifact, crops, job, meter, bench=Bench(notify=answers.event, cuda=backend.device == "cuda"))


def outputs(job: Job, artifact: Artifact, crops: npt.NDArray[np.uint8], opened: ExitStack) -> Outputs:
    """Logits (n, K) of the first n = min(job.most, N) images, in batches of the artifact's size, the last one filled by repeating.

    Images are normalised batch by batch: a board need not hold them all as float32. Where the job asks for an audit, the info says which
    operators run where. Raises AgentError where no images are asked for.
    """
    import numpy as np

    from edgejoule.data import normalise

    if job.most < 1:
        raise AgentError(f"the outputs of {job.most} images were asked for: expected at least one")
    n, batch = min(job.most, len(crops)), artifact.batch
    session: Session = _backend(artifact).load(artifact, job.threads)
    opened.callback(session.close)
    rows = []
    for start in range(0, n, batch):
        part = normalise(crops[np.arange(start, start + batch) % n], artifact.variant.spec.preprocessing)  # (B, C, H, W)
        rows.append(np.asarray(session.infer(np.ascontiguousarray(part))["logits"], dtype=np.float64))
    logits = np.concatenate(rows)[:n]
    info, audit = session.info(), getattr(session, "audit", None)
    if job.audit and audit is not None:
        info = replace(info, placement=audit(np.ascontiguousarray(part)))
    return Outputs(floats(logits.ravel().tolist()), (n, logits.shape[1]), info)


def _backend(artifact: Artifact) -> Any:
    from edgejoule import registry

    return registry.create("backend", artifact.backend)


def _crops(job: Job) -> npt.NDArray[np.uint8]:
    from edgejoule.data import read_crops

    crops: npt.NDArray[np.uint8] = read_crops(Path(job.images))
    if not len(crops):
        raise DataError(f"{job.images} holds no image: expected at least one, prepare the images again")
    return crops


if __name__ == "__main__":
    sys.exit(main())
