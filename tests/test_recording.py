"""Opening trace files: encodings, damage, recognition, stamps, and memory that stays bounded with energies unchanged."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import registry
from edgejoule.caveats import Doubts
from edgejoule.errors import EdgejouleError, MeterError
from edgejoule.measure import recording
from edgejoule.measure.energy import integrate
from edgejoule.measure.recording import _Kept, open_recording
from edgejoule.measure.traces.table import Csv
from edgejoule.seams import Block, TraceFormat, TraceHints

ROWS = [f"{n / 10},{2 + n % 3}" for n in range(21)]
TEXT = "\n".join(["time_s,power_w", *ROWS]) + "\n"
JOULES = 0.1 * (sum(2 + n % 3 for n in range(21)) - (2 + 2 + 20 % 3) / 2)


def written(folder: Path, content: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joules(found: recording.Recording) -> float | None:
    trace = found.traces[0]
    return integrate(trace, trace.times_s[0], trace.times_s[-1])


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.rstrip("\n").encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),  # as PowerShell's > writes it
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        ("\n\n" + TEXT + "\n\n").encode(),
        TEXT.replace(",", " , ").encode(),
        TEXT.replace(",", ";").replace(".", ",").encode(),
    ],
)
def test_one_trace_in_many_encodings(tmp_path: Path, content: bytes) -> None:
    found = open_recording(written(tmp_path, content))
    assert (found.format, found.samples, found.duration_s, found.caveats) == ("csv", 21, 2.0, ())
    assert joules(found) == pytest.approx(JOULES) and found.traces[0].total


@pytest.mark.parametrize("part", [1, 2, 7])
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(recording, "PART", part)
    assert joules(open_recording(written(tmp_path, TEXT.replace("\n", "\r\n")))) == pytest.approx(JOULES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty: expected a trace file"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe", "is empty"),
        (b"time_s,power_w\n", "holds 0 valid samples"),
        (b"time_s,power_w\n0,1\n", "holds 1 valid samples as csv: expected at least two"),
        (b"hello\n", "no format recognises .*'hello': name one with --format"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\xff" * 9, "is no text: export it from its own program"),
        (b"jlsfmt\r\n \n \x1a  \xb2\x1c\0\0" * 9, "pyjls"),
        (b"\x90\0\0\0Power Tool\0\0\xc3\xff" * 9, "binary: export it as CSV"),
        (b"time,power\n0,1\n1,2\n", "no format recognises .*; as csv, .*'time' does not say its unit.*--time-unit"),
        (b"time_s,power_w\n0,1\n0,1\n0,1\n0,1\n0,1\n", "too coarse, so give --interval"),
        (TEXT.encode() + TEXT.encode(), "21 of 43 samples do not come after the one before: split the file"),
    ],
)
def test_what_cannot_be_read_says_why_in_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(MeterError, match=says) as error:
        open_recording(written(tmp_path, content))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_a_missing_file_and_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeterError, match="is a folder: expected a trace file"):
        open_recording(tmp_path)
    with pytest.raises(MeterError, match="there is no file"):
        open_recording(tmp_path / "none.csv", "csv")
    with pytest.raises(MeterError, match="cannot read"):
        open_recording(Path("a\0b"))
    monkeypatch.setattr(recording, "LONGEST", 1000)
    monkeypatch.setattr(recording, "PART", 100)
    with pytest.raises(MeterError, match="a line of more than 1000 characters"):
        open_recording(written(tmp_path, "1," * 5000))


def test_nuls_within_a_text_cost_their_line_only(tmp_path: Path) -> None:
    rows = [f"{n},1" for n in range(100)]
    rows[50] = "\0" * 20
    found = open_recording(written(tmp_path, "\n".join(["time_s,power_w", *rows])))
    assert found.samples == 99 and [doubt.code for doubt in found.caveats] == ["bad_lines"]
    assert joules(found) == pytest.approx(99.0)


def test_progress_ends_at_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PROGRESS_S", 0.0)
    monkeypatch.setattr(recording, "PART", 64)
    shares: list[float] = []
    open_recording(written(tmp_path, TEXT), notify=shares.append)
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0


# ---------------------------------------------------------------- formats and hints


def test_named_columns_are_read_as_a_table(tmp_path: Path) -> None:
    path = written(tmp_path, "time,a,b\n0,1000,1\n1,1000,1\n2,1000,1\n")
    found = open_recording(path, hints=TraceHints(power_col="a,b", power_unit="mW", time_unit="s"))
    assert [(trace.rail, trace.values[0], trace.total) for trace in found.traces] == [("a", 1.0, False), ("b", 0.001, False)]
    with pytest.raises(MeterError, match="there are time, a, b"):
        open_recording(path, hints=TraceHints(power_col="c", time_unit="s"))


def test_what_a_header_lacks_can_be_said_without_naming_a_format(tmp_path: Path) -> None:
    path = written(tmp_path, "time,power\n0,1\n10,1\n20,1\n")
    found = open_recording(path, hints=TraceHints(time_unit="ms", power_unit="W"))
    assert found.duration_s == pytest.approx(0.02) and joules(found) == pytest.approx(0.02)
    assert open_recording(path, hints=TraceHints(interval_s=1.0, power_unit="W")).duration_s == 2.0


def test_the_instrument_is_recognised_and_named(tmp_path: Path) -> None:
    path = written(tmp_path, "#time (s),current (A),voltage (V)\n" + "".join(f"{n},0.1,5.0\n" for n in range(5)))
    found = open_recording(path)
    trace = found.traces[0]
    assert found.format == "joulescope" and joules(found) == pytest.approx(2.0)
    assert (trace.source, trace.grade, trace.scope, trace.clock_id) == ("joulescope", "B", "board-in", "file")


def test_grade_and_scope_of_a_table_are_the_users_to_say(tmp_path: Path) -> None:
    trace = open_recording(written(tmp_path, TEXT), 'csv(scope="wall", grade="A", averaging_s=1.0)').traces[0]
    assert (trace.grade, trace.scope, trace.averaging_s) == ("A", "wall", 1.0)
    assert trace.source == "csv(averaging_s=1.0, grade='A', scope='wall')"


def test_the_counter_stands_beside_the_power_and_only_power_adds_up(tmp_path: Path) -> None:
    lines = ["#time,current,voltage,power,charge,energy", *(f"{n},1,2,2,{n},{2 * n}" for n in range(9))]
    found = open_recording(written(tmp_path, "\n".join(lines)))
    assert [(trace.quantity, trace.total) for trace in found.traces] == [("power_w", True), ("energy_j", False)]
    assert [integrate(trace, 0, 8) for trace in found.traces] == pytest.approx([16.0, 16.0])


@pytest.mark.parametrize("hints", [TraceHints(interval_s=0.0), TraceHints(interval_s=float("nan")), TraceHints(voltage_v=-5.0)])
def test_impossible_hints_are_refused(tmp_path: Path, hints: TraceHints) -> None:
    with pytest.raises(MeterError, match="is not above 0"):
        open_recording(written(tmp_path, TEXT), hints=hints)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgejouleError, match="monsoon"):
        open_recording(written(tmp_path, TEXT), "monson")


# ---------------------------------------------------------------- stamps


def test_the_interval_wins_over_stamps_and_bad_rows_keep_their_place(tmp_path: Path) -> None:
    rows = [f"{n % 7},{n}" for n in range(100)]
    rows[40] = "x"
    found = open_recording(written(tmp_path, "\n".join(["time_s,power_w", *rows])), hints=TraceHints(interval_s=0.5))
    times, watts = found.traces[0].times_s, found.traces[0].values
    assert list(times[39:42]) == [19.5, 20.5, 21.0] and list(watts[39:42]) == [39.0, 41.0, 42.0] and found.duration_s == 49.5


def test_times_count_from_the_first_sample(tmp_path: Path) -> None:
    rows = ["x,1", *(f"{1.7e9 + n},1" for n in range(40))]
    assert list(open_recording(written(tmp_path, "\n".join(["time_s,power_w", *rows]))).traces[0].times_s[:2]) == [0.0, 1.0]


def test_a_few_stale_stamps_are_left_out_and_said(tmp_path: Path) -> None:
    rows = [f"{n},1" for n in range(100)]
    rows[10] = "3,9"
    found = open_recording(written(tmp_path, "\n".join(["time_s,power_w", *rows])))
    assert found.samples == 99 and joules(found) == pytest.approx(99.0)
    assert [(doubt.code, doubt.seen) for doubt in found.caveats] == [("clock_backwards", "sample 11 is stamped 3 s, after 9 s")]


def test_damaged_numbers_are_no_samples() -> None:
    kept, doubts = _Kept(None), Doubts()
    kept.add(Block(np.array([0.0, 1e300, 1.0, 2.0, np.inf, 3.0]), {"a": np.array([1.0, 1, 1, 1e300, 1, 1])}, {}), doubts)
    (trace,) = kept.traces("x", Csv(), ("a",))
    assert list(trace.times_s) == [0.0, 1.0, 3.0] and doubts.count("invalid_values") == 1


# ---------------------------------------------------------------- memory


def stream(blocks: int, rows: int = 1000, seed: int = 0) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    steps = rng.uniform(0.5, 1.5, blocks * rows) * 1e-3
    times, watts = np.cumsum(steps), rng.uniform(0, 10, blocks * rows)
    return [(times[n : n + rows], watts[n : n + rows]) for n in range(0, blocks * rows, rows)]


@pytest.mark.parametrize("most", [100, 999, 4096])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_thinning_changes_no_energy(monkeypatch: pytest.MonkeyPatch, most: int, rows: int) -> None:
    monkeypatch.setattr(recording, "MOST", most)
    pairs = stream(10_007 // rows, rows)
    kept, doubts = _Kept(None), Doubts()
    for times, watts in pairs:
        kept.add(Block(times, {"a": watts, "b": np.where(watts > 5, watts, np.nan)}, {"c": times * 3}), doubts)
    times, watts = np.concatenate([t for t, _ in pairs]), np.concatenate([w for _, w in pairs])
    times = times - times[0]
    a, b, c = kept.traces("x", Csv(), ("a",))
    assert all(2 <= len(trace.times_s) <= most + 1 for trace in (a, b, c)) and {trace.quantity for trace in (a, b, c)} == {"energy_j"}
    assert a.times_s[-1] == times[-1] and a.times_s[0] == 0.0 and np.all(np.diff(a.times_s) > 0)
    full = np.append(0.0, np.cumsum(np.diff(times) * (watts[1:] + watts[:-1]) / 2))
    np.testing.assert_allclose(a.values, full[np.searchsorted(times, a.times_s)], rtol=1e-9)
    high = watts > 5
    expected = float(np.sum(np.diff(times[high]) * (watts[high][1:] + watts[high][:-1]) / 2))
    assert b.values[-1] - b.values[0] == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(np.asarray(c.values), 3 * (np.asarray(c.times_s) + pairs[0][0][0]), rtol=1e-9)


def test_what_fits_is_kept_as_it_is() -> None:
    kept = _Kept(None)
    for times, watts in stream(5):
        kept.add(Block(times, {"a": watts}, {}), Doubts())
    (trace,) = kept.traces("x", Csv(), ())
    assert trace.quantity == "power_w" and list(trace.values) == [w for _, watts in stream(5) for w in watts]


def test_memory_does_not_grow_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST", 2**14)

    def peak(blocks: int) -> int:
        kept, watts = _Kept(1e-3), np.ones(4096)
        tracemalloc.start()
        for _ in range(blocks):
            kept.add(Block(np.full(4096, np.nan), {"a": watts}, {}), Doubts())
        (trace,) = kept.traces("x", Csv(), ("a",))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert trace.values[-1] == pytest.approx((blocks * 4096 - 1) * 1e-3, rel=1e-9)
        return found

    assert peak(600) < 1.5 * peak(30)


@pytest.mark.study
def test_hundreds_of_megabytes_stream(tmp_path: Path) -> None:
    path, rows = tmp_path / "long.csv", 8_000_000
    with path.open("w") as file:
        file.write("Time (s),Main Avg Current (mA),Main Avg Voltage (V)\n")
        for start in range(0, rows, 100_000):
            times = np.arange(start, start + 100_000) * 2e-4
            file.write("".join(f"{t:.4f},{800 + n % 2:.6f},4.000000\n" for n, t in enumerate(times.tolist())))
    assert path.stat().st_size >= 200e6
    program = (
        "import re, sys; from pathlib import Path; from edgejoule.measure.recording import open_recording\n"
        "found = open_recording(Path(sys.argv[1])); trace = found.traces[0]\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"  # ru_maxrss may be the parent's
        "print(found.format, found.samples, trace.values[-1], peak // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    name, samples, energy, peak_mb = done.stdout.split()
    assert (name, int(samples)) == ("monsoon", rows) and float(energy) == pytest.approx(3.202 * (rows - 1) * 2e-4, rel=1e-9)
    assert int(peak_mb) < 350


# ---------------------------------------------------------------- garbage


@settings(deadline=None, max_examples=60)
@given(
    content=st.one_of(
        st.binary(max_size=400),
        st.text(max_size=200).map(str.encode),
        st.lists(st.tuples(st.integers(0, len(TEXT)), st.binary(max_size=5)), max_size=4).map(lambda cuts: _damaged(TEXT.encode(), cuts)),
    ),
    name=st.sampled_from(["auto", *registry.names("trace")]),
)
def test_any_bytes_are_refused_or_read(content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "trace"
    path.write_bytes(content)
    try:
        found = open_recording(path, name)
    except MeterError as error:
        assert str(error)
        return
    for trace in found.traces:
        assert len(trace.times_s) == len(trace.values) >= 2
        assert np.all(np.isfinite(trace.values)) and np.all(np.diff(trace.times_s) > 0)


def _damaged(content: bytes, cuts: list[tuple[int, bytes]]) -> bytes:
    for at, new in cuts:
        content = content[:at] + new + content[at + len(new) :]
    return content


def test_a_third_partys_leaf_is_read_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create: Callable[[str, str], TraceFormat] = registry.create
    monkeypatch.setattr(registry, "create", lambda kind, text: Csv(scope="theirs") if text == "theirs" else create(kind, text))
    assert open_recording(written(tmp_path, TEXT), "theirs").traces[0].scope == "theirs"
