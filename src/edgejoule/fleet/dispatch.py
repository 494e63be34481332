"""Sending a job to a worker and getting its answer: the agent's protocol, seen from the host.

A worker that dies, hangs or answers nonsense is an AgentError that says which; an error that the worker reports comes back as
the class it was there. Knows transports by name only.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments, manifest, registry
from edgejoule.errors import AgentError, EdgejouleError, TransportError, rebuild
from edgejoule.plain import decode, encode
from edgejoule.records import Job, Outputs, Trial
from edgejoule.seams import Transport

AGENT = "edgejoule.fleet.agent"
TIMEOUT_S = 3600.0
SHOWN = 200  # characters of a line that is not of the protocol


def run_job(
    job: Job, transport: str = "local", timeout_s: float = TIMEOUT_S, on_event: Callable[[Mapping[str, Any]], None] | None = None
) -> Trial | Outputs:
    """Run a job in a fresh worker process. ``on_event`` gets each progress line, ``{"event": name, ...}``.

    Raises AgentError where the worker died (naming the signal), hung or answered nonsense; SpecError for a transport that is
    not there; and whatever EdgejouleError the worker reports.
    """
    way: Transport = registry.create("transport", transport)
    argv = worker_argv(job.artifact, transport)
    found: Trial | Outputs | None = None
    lines = way.run(argv, json.dumps(encode(job)), timeout_s)
    try:
        for line in lines:
            said = _parse(line)
            if "event" in said:
                if on_event is not None:
                    on_event(said)
            elif "error" in said:
                raise rebuild(said["error"])
            else:
                found = _answer(said)
    except AgentError:
        raise
    except TransportError as error:
        # A runtime that crashes while it is torn down has measured all the same: raw first.
        if found is None:
            raise AgentError(f"the worker for {job.artifact} gave no answer: {error}") from error
    finally:
        close = getattr(lines, "close", None)  # ends the worker at once, not whenever the generator is collected
        if callable(close):
            close()
    if found is None:
        raise AgentError(f"the worker for {job.artifact} ended without an answer: expected a trial or outputs, run it again")
    return found


def worker_argv(artifact: str, transport: str = "local") -> list[str]:
    """The command that runs a worker for an artifact's folder: on this machine by the interpreter of its backend's environment.

    This interpreter where the backend has none, where its environment is not installed, and where the manifest cannot be read: then the
    worker says why.
    """
    here = [sys.executable, "-m", AGENT]
    if registry.parse(transport).name != "local":
        return here
    with contextlib.suppress(EdgejouleError, OSError, ValueError, LookupError, TypeError):
        # only its backend: the worker reads the manifest in earnest, and checks the files
        said = json.loads((Path(artifact) / manifest.NAME).read_text(encoding="utf-8"))["backend"]
        environment = getattr(registry.create("backend", said), "environment", None)
        return (environment and environments.argv_of(environment, AGENT)) or here
    return here


def _parse(line: str) -> Mapping[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AgentError(f"the worker wrote {line[:SHOWN]!r}, which is not JSON: is another program writing to its output?") from error
    if not isinstance(said, dict):
        raise AgentError(f"the worker wrote {line[:SHOWN]!r}: expected an event, a trial, outputs or an error")
    return said


def _answer(said: Mapping[str, Any]) -> Trial | Outputs:
    try:
        if "trial" in said:
            return decode(Trial, said["trial"])
        if "outputs" in said:
            return decode(Outputs, said["outputs"])
    except (ValueError, TypeError) as error:
        raise AgentError(f"the worker's answer cannot be read ({error}): are both sides of the same version of edgejoule?") from error
    raise AgentError(f"the worker answered with {', '.join(map(str, said)) or 'nothing'}: expected a trial, outputs or an error")
