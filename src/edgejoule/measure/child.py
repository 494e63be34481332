"""A child program whose lines are handed over as they arrive, with what it cost and how it ended. Knows no sample and no meter.

The child gets a session of its own, no input and the C locale. Ending it is SIGTERM to its group (sudo hands that on), then
SIGKILL; one that this user may not signal dies of its next line, because nobody reads it any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edgejoule.errors import MeterError

GRACE_S, KILLED_S = 0.5, 2.0
LONGEST = 1_000_000  # bytes of a line
TAIL = 4096  # bytes of what the child said on stderr that are kept

Take = Callable[[list[str], float], None]


class Child:
    """Runs ``argv`` at once; ``take(lines, stamp)`` is called in a thread with the lines that arrived together, without their ends.

    Raises MeterError where the program cannot be run. ``take`` may raise MeterError, which ends the child.
    """

    def __init__(self, argv: Sequence[str], take: Take, clock: Callable[[], float], terminal: bool = False) -> None:
        self._name = Path(argv[0]).name
        self._take = take
        self._clock = clock
        self._news = threading.Condition()
        self._ended = False  # nothing more will come
        self._halt = False
        self._refused = ""
        self._bug: BaseException | None = None
        self._said = b""
        self._thread_s = 0.0
        self._base: tuple[float, float, float | None] | None = None  # clock, the thread's and the child's CPU seconds
        self._cores: float | None = None
        self.ended_early = False
        self._process, self._output = _launch(argv, terminal)
        self._threads = [
            threading.Thread(target=work, name=f"{self._name} {what}", daemon=True)
            for work, what in ((self._read_lines, "output"), (self._read_complaints, "errors"))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, come: Callable[[], bool], seconds: float) -> None:
        """Until ``come()`` holds after some lines, the child ends, or so many seconds have passed."""
        with self._news:
            self._news.wait_for(lambda: come() or self._ended, seconds)

    def raise_bug(self) -> None:
        """A fault of the parser's, carried from the thread: a thread's death must not look like a short trace."""
        if self._bug is not None:
            raise self._bug

    def fate(self, otherwise: str = "went on") -> str:
        """What became of the child, in words: why its lines were refused, how it ended, else ``otherwise``; and its last complaint."""
        if self._refused:
            return self._refused
        code = self._process.returncode
        how = f"ended with exit code {code}" if code is not None and code >= 0 else f"was ended by signal {-(code or 0)}"
        said = self._said.decode(errors="replace").strip().splitlines()
        return f"{self._name} {how if self.ended_early else otherwise}" + (f" and said: {said[-1].strip()[:300]}" if said else "")

    def begin_accounts(self) -> None:
        """From now on ``cores`` counts: what the child spends on starting is not what sampling costs."""
        self._base = (self._clock(), self._thread_s, _session_s(self._process.pid))

    @property
    def cores(self) -> float | None:
        """CPU seconds per second of the child's session and the reading thread; None where the system does not say."""
        return self._cores if self._base is None or self._process.returncode is not None else self._count()

    def _count(self) -> float | None:
        now, spent = self._clock(), _session_s(self._process.pid)
        if self._base is None or spent is None or self._base[2] is None or now <= self._base[0]:
            return None
        return (self._thread_s - self._base[1] + spent - self._base[2]) / (now - self._base[0])

    def close(self) -> None:
        """End the child and all that it started; again does nothing."""
        if self._process.returncode is not None:
            return
        self.ended_early = self._ended and not self._halt
        self._cores = self._count()
        self._halt = True
        if not self.ended_early or not self._gone(GRACE_S):
            self._signal(signal.SIGTERM)
        if not self._gone(GRACE_S):
            self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            self._gone(KILLED_S)
        self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))  # what it started may outlive it
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(KILLED_S)

    def _gone(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _read_lines(self) -> None:
        rest, skip = b"", False
        try:
            while not self._halt and (chunk := _some(self._output)):
                now = self._clock()
                *lines, rest = (rest + chunk).split(b"\n")
                if lines and skip:
                    skip, lines = False, lines[1:]
                if len(rest) > LONGEST:
                    rest, skip = b"", True
                if lines:
                    self._take([line.rstrip(b"\r").decode(errors="replace") for line in lines], now)
                self._thread_s = time.thread_time()
                with self._news:
                    self._news.notify_all()
        except MeterError as error:
            self._refused = str(error)
        except BaseException as error:
            self._bug = error
        finally:
            os.close(self._output)
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _read_complaints(self) -> None:
        errors = self._process.stderr
        assert errors is not None
        with contextlib.suppress(OSError, ValueError), errors:
            while not self._halt and (chunk := _some(errors.fileno())):
                self._said = (self._said + chunk)[-TAIL:]


def _launch(argv: Sequence[str], terminal: bool) -> tuple[subprocess.Popen[bytes], int]:
    """The running child and the descriptor on which its output arrives: a pipe, or a terminal of our own making."""
    here, there = os.openpty() if terminal else os.pipe()
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=there,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, ValueError) as error:
        os.close(here)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MeterError(f"{argv[0]} cannot be run ({why}): install it, or name where it is") from error
    finally:
        os.close(there)
    return process, here


def _some(descriptor: int) -> bytes:
    """What has arrived, waiting for something; nothing at the end (which a terminal calls an error)."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


def _session_s(leader: int) -> float | None:
    """CPU seconds of a session's processes, ended children included, from /proc (proc(5), stat fields 6 and 14-17)."""
    found: list[float] = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = file.read_text(errors="replace").rpartition(")")[2].split()  # from field 3 on
            if int(fields[3]) == leader:
                found.append(sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    return sum(found) if found else None
