"""tegrastats: every board's lines, a log's stamps, and a program that dies and stalls (what streams it: test_streamed.py)."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import contracts
from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.energy import integrate
from edgejoule.measure.meters import open_meter
from edgejoule.measure.recording import open_recording
from edgejoule.measure.streamed import StreamedMeter
from edgejoule.measure.tegrastats import Tegrastats
from edgejoule.measure.traces import tegrastats as log
from edgejoule.seams import Streamer, TraceFormat, TraceHints
from tests.fakes import jetson

# ---------------------------------------------------------------- lines


@pytest.mark.parametrize("name", jetson.LINES)
def test_every_board_s_line(name: str) -> None:
    line, rails, _ = jetson.LINES[name]
    stats = log.parse(line)
    assert stats is not None and dict(stats.power_w) == pytest.approx(rails)
    assert all(celsius > -40 and (zone, celsius) != ("PMIC", 50.0) for zone, celsius in stats.temperature_c.items())


def test_what_else_a_line_says() -> None:
    tx2, orin, thor = log.parse(jetson.TX2), log.parse(jetson.ORIN_NANO), log.parse(jetson.THOR_BARE)
    assert tx2 and orin and thor
    assert tx2.ram_bytes == (3072 * 2**20, 7850 * 2**20) and tx2.swap_bytes == (1626 * 2**20, 12122 * 2**20) and tx2.date_s is None
    assert tx2.cores[:4] == ((0.44, 1421e6), None, None, (0.36, 1420e6)) and (tx2.gpu_load, tx2.gpu_hz) == (0.0, (114e6,))
    assert tx2.temperature_c["PLL"] == 42.5 and "PMIC" not in tx2.temperature_c
    assert (orin.gpu_load, orin.gpu_hz, orin.temperature_c["cpu"]) == (0.62, (612e6,), 47.687)
    assert orin.date_s is not None and orin.date_s % 86400 == 10 * 3600 + 29 * 60 + 36
    assert thor.gpu_load is None and thor.gpu_hz == (1000e6,) * 3 and thor.cores == ((0.0, 2601e6), (0.05, 2601e6), None)
    xavier, nano, agx = log.parse(jetson.XAVIER), log.parse(jetson.NANO), log.parse(jetson.AGX_ORIN)
    assert xavier and nano and agx
    assert xavier.temperature_c["GPU"] == 32 and xavier.power_w["GPU"] == 0, "a rail and a zone of one name"
    assert (nano.gpu_load, nano.gpu_hz) == (0.0, ()) and nano.cores[0] == (0.02, 102e6)
    assert set(agx.temperature_c) == {"CPU", "Tboard", "SOC2", "tj"}


@pytest.mark.parametrize(
    ("tokens", "rails"),
    [
        ("VDD_GPU_SOC 2171mW", {"VDD_GPU_SOC": 2.171}),
        ("VDD_IN 12345/13456mW", {"VDD_IN": 12.345}),
        ("VDD_IN 1/2/3 APE 150 NVENC 716 VIC_FREQ 115", {"VDD_IN": 0.001}),
        ("VDD_IN 10 VDD_SOC 1451", {}),  # cut, or no rails at all
        ("VDD_IN 4,556mW/4,556mW", {}),
        ("SWAP 0/1982", {}),  # MB was cut off
        ("VDD_IN 4.5W/4.5W VDD_SOC nanmW/1mW", {}),
        ("VDD_IN 99999999999999999999/1", {}),
        ("NC 5mW/5mW NC 0mW/0mW", {}),
        ("VDD_IN 1/1 VDD_IN 2/2 VDD_SOC 3/3", {"VDD_SOC": 0.003}),
        ("VDD_IN -1mW/0mW VDD_SOC 0mW/0mW", {"VDD_SOC": 0.0}),
        ("VDD_IN \u0663/\u0663", {}),
    ],
)
def test_tokens_that_are_and_are_not_rails(tokens: str, rails: dict[str, float]) -> None:
    stats = log.parse(f"RAM 1/2MB (lfb 1x4MB) CPU [1%@2] {tokens}")
    assert stats is not None and dict(stats.power_w) == pytest.approx(rails)


TOKENS = st.sampled_from([*itertools.chain(*(line.split(" ") for line, _, _ in jetson.LINES.values())), "\0", "VDD_IN", "-1/-1", "1,5/2"])


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(TOKENS, max_size=60).map(" ".join)))
def test_any_line_is_read_or_is_none(line: str) -> None:
    stats = log.parse(line)
    if stats is not None:
        assert all(0 <= watts < 1e5 for watts in stats.power_w.values()) and "NC" not in stats.rails


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*jetson.LINES]), st.integers(0, 600))
def test_a_cut_line_never_gives_a_wrong_figure(name: str, cut: int) -> None:
    line, rails, _ = jetson.LINES[name]
    stats = log.parse(line[:cut])
    for rail, watts in (stats.power_w if stats else {}).items():
        assert watts == pytest.approx(rails[rail])


# ---------------------------------------------------------------- logs


def dated(second: int, milliwatts: int) -> str:
    line = jetson.ORIN_NANO.replace("10:29:36", f"10:{second // 60:02d}:{second % 60:02d}")
    return line.replace("VDD_IN 4556mW/4556mW", f"VDD_IN {milliwatts}mW/1mW")


def rows(lines: Sequence[str], hints: TraceHints | None = None) -> tuple[list[tuple[float, dict[str, float]]], Doubts]:
    doubts, found = Doubts(), []
    for block in log.Tegrastats().read(lines, hints or TraceHints(), doubts):
        for n, at in enumerate(block.times_s):
            found.append((float(at), {rail: float(values[n]) for rail, values in block.power_w.items()}))
    return found, doubts


def test_samples_are_spread_evenly_within_their_seconds() -> None:
    lines = [dated(s, 1000) for s in (5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 9, 9, 9, 9, 10)]
    found, doubts = rows(lines)
    times = [at - found[0][0] + 0.625 for at, _ in found]
    assert times == pytest.approx([0.625, 0.875, 1.125, 1.375, 1.625, 1.875, 2.125, 2.375, 2.625, 2.875, 4.125, 4.375, 4.625, 4.875, 5.125])
    (doubt,) = doubts.caveats()
    assert doubt.code == "stamps_coarse" and "up to 4 samples" in doubt.seen


def test_a_given_interval_wins_over_dates_and_is_needed_without() -> None:
    found, doubts = rows([dated(5, 1000), dated(5, 2000), dated(99, 3000)], TraceHints(interval_s=0.1))
    assert [at for at, _ in found] == pytest.approx([0, 0.1, 0.2]) and [r["VDD_IN"] for _, r in found] == [1, 2, 3] and not doubts.caveats()
    with pytest.raises(MeterError, match="--interval"):
        rows([jetson.TX2] * 3)
    assert [at for at, _ in rows([jetson.TX2] * 3, TraceHints(interval_s=0.5))[0]] == [0, 0.5, 1.0]


def test_a_damaged_line_keeps_its_place_and_a_stranger_takes_none() -> None:
    piece = jetson.TX2[jetson.TX2.index("CPU [") :]
    found, doubts = rows(["sudo: password", jetson.TX2, piece, "", jetson.TX2, "^C"], TraceHints(interval_s=1))
    assert [at for at, _ in found] == [0, 1, 2] and math.isnan(found[1][1]["VDD_IN"]) and found[2][1]["VDD_IN"] == 5.297
    assert [doubt.code for doubt in doubts.caveats()] == ["bad_lines"] and doubts.count("bad_lines") == 3


@pytest.mark.parametrize("cut", [10, 120, 300, 5, 1])
def test_a_last_line_that_was_cut_is_left_out(cut: int) -> None:
    found, doubts = rows([jetson.TX2, jetson.TX2, jetson.TX2[:-cut]], TraceHints(interval_s=1))
    assert len(found) == 2 + (cut == 1), "a figure that lost its last digit is not the one that is used"
    assert doubts.count("bad_lines") == (0 if cut == 1 else 1)


def test_rails_that_cannot_be_used_are_holes_with_doubts() -> None:
    twice = jetson.TX2.replace("VDD_SYS_CPU", "VDD_IN")
    found, doubts = rows([jetson.TX2, twice, jetson.TX2], TraceHints(interval_s=1))
    assert math.isnan(found[1][1]["VDD_IN"]) and doubts.count("duplicate_rail") == 1
    found, doubts = rows([jetson.THOR_IDLE] * 3, TraceHints(interval_s=1))
    assert "VDD_GPU" not in found[0][1] and doubts.count("invalid_values") == 3 and found[0][1]["VIN"] == 15.004


def test_a_log_through_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("\n".join(dated(s, 4000 if s < 30 else 8000) for s in range(10, 60)))
    recording = open_recording(path, "tegrastats")
    total = [trace for trace in recording.traces if trace.total]
    assert [trace.rail for trace in total] == ["VDD_IN"] and (total[0].grade, total[0].scope) == ("C", "module-in")
    assert integrate(total[0], 0, 49) == pytest.approx(20 * 4 + 29 * 8, rel=0.01)
    path.write_text("\n".join([jetson.THOR] * 20))
    hints = TraceHints(interval_s=1.0)
    thor = {trace.rail: trace for trace in open_recording(path, "tegrastats", hints).traces}
    assert [rail for rail in thor if thor[rail].total] == ["VIN"] and thor["VIN"].scope == "board-in"
    path.write_text("\n".join([jetson.AGX_ORIN.replace("VIN_SYS_5V0 3522mW/3522mW ", "")] * 20))
    assert not [trace for trace in open_recording(path, "tegrastats", hints).traces if trace.total], "no total of an unknown board"
    named = open_recording(path, 'tegrastats(whole="VDD_CPU_CV")', hints).traces
    assert [trace.rail for trace in named if trace.total] == ["VDD_CPU_CV"] and named[0].scope == "rail"
    with pytest.raises(MeterError, match="does not fit"):
        open_recording(path, 'tegrastats(whole="VDD_IN")', hints)


def test_what_it_recognises() -> None:
    leaf = log.Tegrastats()
    assert isinstance(leaf, TraceFormat)
    assert all(leaf.recognises([line]) for line, _, _ in jetson.LINES.values()) and leaf.recognises(["sudo: x", jetson.NO_RAILS])
    assert not leaf.recognises(["Time (s),Main Avg Power (mW)", "0,1"]) and not leaf.recognises([])
    with pytest.raises(MeterError, match="more than 1000 lines share one date"):
        rows([jetson.ORIN_NANO] * 1200)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([line for line, _, _ in jetson.LINES.values()]),
            st.builds(lambda line, cut: line[:cut], st.sampled_from([line for line, _, _ in jetson.LINES.values()]), st.integers(0, 500)),
            st.builds(dated, st.integers(0, 3599), st.integers(0, 10**8)),
            st.text(max_size=80),
        ),
        max_size=20,
    ),
    st.sampled_from([None, 0.1]),
)
def test_any_log_is_rows_or_a_meter_error(lines: list[str], interval_s: float | None) -> None:
    try:
        found, _ = rows(lines, TraceHints(interval_s=interval_s))
    except MeterError:
        return
    assert all(0 <= watts < 1e5 for _, rails in found for watts in rails.values() if not math.isnan(watts))


# ---------------------------------------------------------------- live


def meter(path: Path, **options: Any) -> StreamedMeter:
    return StreamedMeter(Tegrastats(str(path), **options), "tegrastats")


def until(come: Callable[[], bool]) -> None:
    """Wait, at most 20 s, so that a busy machine does not fail the test."""
    for _ in range(1000):
        if come():
            return
        time.sleep(0.02)


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    path = jetson.write_tegrastats(tmp_path / "tegrastats", [jetson.THOR_IDLE, jetson.THOR])
    contracts.check_meter(f"tegrastats(path={str(path)!r})", open_meter)


def test_the_program_streams_at_the_pace_that_was_asked_for(tmp_path: Path) -> None:
    path = jetson.write_tegrastats(tmp_path / "tegrastats", [jetson.TX2])
    leaf = Tegrastats(str(path))
    assert isinstance(leaf, Streamer) and leaf.probe() is None
    live, before = meter(path), time.perf_counter()
    live.start()
    until(lambda: len(live.snapshot()[0].values) >= 4)
    assert live.snapshot()[0].rail == "VDD_SYS_GPU" and not live.caveats
    called = time.perf_counter()
    traces = live.stop()
    for trace in traces:
        contracts._check_trace(trace)
    (total,) = (trace for trace in traces if trace.total)
    assert (total.rail, total.source, total.grade, total.scope, total.systematic) == ("VDD_IN", "tegrastats", "C", "module-in", 0.05)
    assert set(total.values) == {5.297} and len(total.values) >= 4
    assert before <= total.times_s[0] and total.times_s[-1] >= called, "the trace covers the instant of stop()"
    assert not live.caveats and live.cores is not None and live.cores >= 0
    assert len(traces) == 6 and live.stop()[0].values == traces[0].values
    with pytest.raises(MeterError, match="already started"):
        live.start()


def test_a_child_is_gone_after_stop_and_after_being_forgotten(tmp_path: Path) -> None:
    path = jetson.write_tegrastats(tmp_path / "tegrastats", [jetson.NANO])
    for forget in (False, True):
        live = meter(path)
        live.start()
        assert live._child is not None
        pid = live._child._process.pid
        if not forget:
            time.sleep(0.15)
            live.stop()
        del live
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def ended(live: StreamedMeter) -> bool:
    return live._child is not None and live._child._ended


def test_a_child_that_dies_or_falls_silent_is_a_gap_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tegrastats"
    jetson.write_tegrastats(path, [jetson.NANO], dies=5, says="out of memory", cut=300)
    live = meter(path)
    live.start()
    until(lambda: ended(live))
    traces = live.stop()
    assert all(len(trace.values) == 5 for trace in traces), "the cut line is not read"
    (doubt,) = live.caveats
    assert doubt.code == "trace_gap" and "after 5 samples tegrastats ended with exit code 3 and said: out of memory" in doubt.seen
    jetson.write_tegrastats(path, [jetson.NANO], dies=1)
    live = meter(path)
    live.start()
    until(lambda: ended(live))
    with pytest.raises(MeterError, match="stopped answering: tegrastats ended with exit code 3"):
        live.stop()
    jetson.write_tegrastats(path, [jetson.NANO], stalls=4)
    live = meter(path)
    live.start()
    until(lambda: len(live.snapshot()[0].values) == 4)
    live.stop()
    assert [doubt.code for doubt in live.caveats] == ["trace_gap"] and "the last of 4 samples came" in live.caveats[0].seen


@pytest.mark.parametrize(
    ("lines", "options", "sentence"),
    [
        ([jetson.NO_RAILS], {}, "prints no power rails"),
        ([jetson.XAVIER_NX.replace("VDD_SOC", "VDD_FOO")], {}, 'VDD_CPU_GPU_CV, VDD_FOO, VDD_IN add up .* as in whole="'),
        ([jetson.AGX_ORIN.replace("VIN_SYS_5V0", "VIN_SYS_5V1")], {}, "nobody knows"),
        ([jetson.NANO], {"whole": "VDD_IN"}, "does not fit the rails POM_5V_CPU"),
    ],
)
def test_a_board_that_nobody_knows_is_refused(lines: list[str], options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = jetson.write_tegrastats(tmp_path / "tegrastats", lines)
    with pytest.raises(MeterError, match=sentence):
        meter(path, **options).start()
    answer = Tegrastats(str(path), **options).probe()
    assert answer is not None and "\n" not in answer


def test_an_unknown_board_whose_whole_is_named(tmp_path: Path) -> None:
    path = jetson.write_tegrastats(tmp_path / "tegrastats", [jetson.XAVIER_NX.replace("VDD_SOC", "VDD_FOO")])
    live = meter(path, whole="VDD_IN")
    live.start()
    time.sleep(0.25)
    assert [trace.rail for trace in live.stop() if trace.total] == ["VDD_IN"]
    assert "comes with JetPack" in str(Tegrastats(str(tmp_path / "no")).probe())
    for wrong in ({"period_s": 0.01}, {"averaging_s": -1.0}, {"period_s": math.nan}):
        with pytest.raises(ValueError, match="period_s"):
            Tegrastats(**wrong)
