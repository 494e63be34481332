"""The streaming meter with shell scripts for children: those that print, die, babble, and leave others behind."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgejoule import contracts
from edgejoule.errors import MeterError
from edgejoule.measure.streamed import StreamedMeter


@dataclasses.dataclass(frozen=True)
class Shell:
    """A shell script whose whole numbers are watts."""

    script: str
    terminal: bool = False
    fails: bool = False
    period_s: float = 0.02
    averaging_s: float = 0.1
    quantity: Any = "power_w"
    grade: Any = "C"
    scope: str = "rail"

    def probe(self) -> str | None:
        return None

    def argv(self) -> Sequence[str]:
        return ("sh", "-c", self.script)

    def parser(self) -> Callable[[str], Mapping[str, float] | None]:
        if self.fails:
            return lambda line: {"a": 1 / (int(line) - 5)}
        return lambda line: {"a": float(line)} if line.strip().isdigit() or line == "nan" else None


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pipe_and_a_terminal(terminal: bool) -> None:
    live = StreamedMeter(Shell("while :; do echo 7; sleep 0.02; done", terminal), "shell")
    live.start()
    time.sleep(0.3)
    (trace,) = live.stop()
    contracts._check_trace(trace)
    assert set(trace.values) == {7.0} and live.doubts() == {} and live.probe() is None


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo no sensor >&2; exit 4", "ended with exit code 4 and said: no sensor"),
        ("kill -9 $$", "was ended by signal 9"),
        ("echo nan; exit 0", "ended with exit code 0"),
    ],
)
def test_a_child_that_says_nothing_useful(script: str, sentence: str) -> None:
    with pytest.raises(MeterError, match=sentence):
        live = StreamedMeter(Shell(script), "shell")
        live.start()
        time.sleep(0.2)
        live.stop()


def test_garbage_for_ever_and_programs_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.streamed.FIRST_S", 0.5)
    with pytest.raises(MeterError, match=r"no sample in 0\.5 s, its last line was 'garbage'"):
        StreamedMeter(Shell("while :; do echo garbage; sleep 0.02; done"), "shell").start()
    absent = dataclasses.replace(Shell(""), script="x")
    object.__setattr__(absent, "argv", lambda: ("/no/such/program",))
    with pytest.raises(MeterError, match="cannot be run"):
        StreamedMeter(absent, "shell").start()
    with pytest.raises(MeterError, match="before it was started"):
        StreamedMeter(Shell("true"), "shell").stop()
    with pytest.raises(MeterError, match="recorded nothing yet"):
        StreamedMeter(Shell("true"), "shell").snapshot()


def test_samples_that_arrive_together_are_spread_and_doubted() -> None:
    live = StreamedMeter(Shell("while :; do printf '1\\n2\\n3\\n4\\n'; sleep 0.1; done"), "shell")
    live.start()
    time.sleep(0.5)
    (trace,) = live.stop()
    contracts._check_trace(trace)
    assert "stamps_coarse" in [doubt.code for doubt in live.caveats] and list(trace.values[:5]) == [4, 1, 2, 3, 4]
    steps = [b - a for a, b in itertools.pairwise(trace.times_s)]
    assert steps[0] == pytest.approx(steps[1]) == pytest.approx(steps[2])


def alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead and waits for its parent (there may be none here) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_the_child_started_ends_with_it_and_an_endless_line_is_no_sample() -> None:
    live = StreamedMeter(Shell("(trap '' TERM; exec sleep 1234) & echo $!; sleep 0.1; while :; do echo 5; sleep 0.02; done"), "shell")
    live.start()
    pid = int(live.snapshot()[0].values[0])
    assert alive(pid)
    live.stop()
    for _ in range(250):
        if not alive(pid):
            break
        time.sleep(0.02)
    assert not alive(pid)
    script = "echo 1; head -c 2500000 /dev/zero | tr '\\0' '0'; echo; while :; do echo 2; sleep 0.02; done"
    live = StreamedMeter(Shell(script), "shell")
    live.start()
    time.sleep(0.3)
    assert set(live.stop()[0].values) == {1.0, 2.0}


def test_a_value_that_is_no_number_is_a_hole() -> None:
    live = StreamedMeter(Shell("while :; do echo 3; sleep 0.03; echo nan; sleep 0.03; done"), "shell")
    live.start()
    time.sleep(0.3)
    (trace,) = live.stop()
    contracts._check_trace(trace)
    assert set(trace.values) == {3.0}


def test_a_bug_of_the_parser_is_not_a_short_trace() -> None:
    live = StreamedMeter(Shell("echo 9; sleep 0.1; echo 5; sleep 5", fails=True), "shell")
    live.start()
    time.sleep(0.3)
    with pytest.raises(ZeroDivisionError):
        live.stop()
