"""The transport that needs no network: a subprocess on this machine, in a process group of its own.

Lines come as they are written. The whole group is killed when time is up, when the caller stops listening, or on Ctrl-C, so
that no worker outlives its trial. Knows nothing of jobs and trials.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgejoule.errors import TransportError
from edgejoule.processes import end_group, signal_name

TAIL = 20  # lines of the standard error that an error message carries
GRACE_S = 5.0  # between the end of the output and the end of the process


@dataclass(frozen=True, slots=True)
class Local:
    """This machine."""

    def probe(self) -> str | None:
        return None

    def push(self, local: Path, remote: str) -> None:
        """Copy a file or a folder. Raises TransportError."""
        _copy(Path(local), Path(remote))

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file or a folder back. Raises TransportError."""
        _copy(Path(remote), Path(local))

    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Iterator[str]:
        """Run ``argv`` with ``stdin`` and yield the lines of its standard output as they come.

        Raises TransportError where it cannot be started, takes longer than ``timeout_s``, dies by a signal (named) or
        exits with another code than 0; the message ends with the last lines of its standard error.
        """
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise TransportError(f"cannot start {argv[0]} ({error.strerror or error}): expected a program that runs here") from error
        tail: deque[str] = deque(maxlen=TAIL)
        try:
            yield from _lines(process, stdin, time.monotonic() + timeout_s, timeout_s, tail)
        finally:
            end_group(process)


def _lines(process: subprocess.Popen[str], stdin: str, deadline: float, timeout_s: float, tail: deque[str]) -> Iterator[str]:
    assert process.stdin and process.stdout and process.stderr  # all three are pipes
    lines: queue.Queue[str | None] = queue.Queue()
    threads = [
        threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True),
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=_keep, args=(process.stderr, tail), daemon=True),
    ]
    for thread in threads:
        thread.start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TransportError(f"no end after {timeout_s:g} s: killed, allow more time or give it less to do{_last(tail)}") from None
        if line is None:
            break
        yield line
    try:
        code = process.wait(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        raise TransportError(f"closed its output but did not end within {GRACE_S:g} s: killed{_last(tail)}") from None
    threads[2].join(timeout=1.0)
    if code < 0:
        raise TransportError(f"killed by {signal_name(-code)}{_last(tail)}")
    if code > 0:
        raise TransportError(f"ended with exit code {code}, expected 0{_last(tail)}")


def _feed(pipe: IO[str], text: str) -> None:
    # A process that dies without reading closes the pipe: its exit code says more than the pipe's error.
    with contextlib.suppress(BrokenPipeError, ValueError), pipe:
        pipe.write(text)


def _pump(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError), pipe:  # ValueError: closed under our hands when the caller stopped listening
        for line in pipe:
            lines.put(line.rstrip("\n"))
    lines.put(None)


def _keep(pipe: IO[str], tail: deque[str]) -> None:
    with contextlib.suppress(ValueError), pipe:
        for line in pipe:
            tail.append(line.rstrip("\n"))


def _last(tail: deque[str]) -> str:
    said = "\n".join(line for line in tail if line.strip())
    return f"; its last words:\n{said}" if said else ""


def _copy(source: Path, target: Path) -> None:
    try:
        if source.resolve() == target.resolve():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    except (OSError, shutil.Error) as error:
        raise TransportError(f"cannot copy {source} to {target} ({error}): expected a readable source and a writable target") from error
