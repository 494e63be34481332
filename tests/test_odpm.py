"""Pixel rails over a fake adb: the phone's own clock, two monitors, and all the ways in which adb fails."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import contracts
from edgejoule.errors import MeterError
from edgejoule.measure import odpm
from edgejoule.measure.meters import open_meter
from edgejoule.measure.odpm import Odpm, parse
from edgejoule.measure.polled import PolledMeter
from tests.fakes.desktops import BATTERY, THERMAL, fake_adb

WHOLE = "S10M_VDD_TPU, S2M_VDD_CPUCL2"


def test_odpm_reads_two_monitors_and_counts_the_named_rails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adb = fake_adb(tmp_path)
    leaf = Odpm("PIXEL6", WHOLE, adb, 0.1)
    assert leaf.probe() is None and leaf.doubts() == {}
    assert set(leaf.read()) == {"S10M_VDD_TPU", "S2M_VDD_CPUCL2", "VSYS_PWR_DISPLAY"}
    assert leaf.total("S10M_VDD_TPU") and leaf.total("S2M_VDD_CPUCL2") and not leaf.total("VSYS_PWR_DISPLAY")
    assert (leaf.grade, leaf.scope, leaf.quantity) == ("C", "rail", "energy_j") and 0 < leaf.stamp_uncertainty_s < 1
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"odpm": "edgejoule.measure.odpm:Odpm"})
    contracts.check_meter(f"odpm(whole={WHOLE!r}, adb={adb!r}, period_s=0.05)", open_meter, seconds=1.0)


def test_odpm_energy_is_the_phones_own(tmp_path: Path) -> None:
    meter = PolledMeter(Odpm(whole=WHOLE, adb=fake_adb(tmp_path), period_s=0.05), "odpm")
    meter.start()
    time.sleep(1.5)
    rail = next(trace for trace in meter.stop() if trace.rail == "S2M_VDD_CPUCL2")
    power = (rail.values[-1] - rail.values[0]) / (rail.times_s[-1] - rail.times_s[0])
    assert power == pytest.approx(2.0, rel=0.5) and rail.total and rail.offset_uncertainty_s > 0


def lines(*rails: tuple[str, int, int]) -> str:
    """energy_value with (rail, ms, uWs)."""
    return f"t={rails[0][1]}\n" + "".join(f"CH{n}(T={at})[{rail}], {joules}\n" for n, (rail, at, joules) in enumerate(rails))


class Phone:
    """Answers of adb at instants of a clock that only they move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.answers: list[tuple[float, str]] = []
        monkeypatch.setattr(odpm.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(odpm.phone, "ask", self.ask)

    def ask(self, adb: str, serial: str, command: str) -> str:
        way_s, text = self.answers.pop(0)
        self.now += way_s
        return text


def test_odpm_a_long_way_through_adb_is_made_good_by_the_phones_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    phone, leaf = Phone(monkeypatch), Odpm(whole="A")
    read: list[tuple[float, float]] = []
    for boot_ms, way_s in ((10_000, 0.04), (10_200, 0.04), (10_400, 0.44), (11_000, 0.04)):
        begun = phone.now = 1000.0 + (boot_ms - 10_000) / 1e3 - 0.02
        phone.answers = [(way_s, lines(("A", boot_ms, 5000 * boot_ms)))]  # 5 W, latched 20 ms after it was asked
        joules = leaf.read()["A"]
        read.append(((begun + phone.now) / 2, joules))
    power = [(b - a) / (u - t) for (t, a), (u, b) in itertools.pairwise(read)]
    assert power == pytest.approx([5.0] * 3)  # by the stamps alone 5, 2.5 and 7.5 W
    assert leaf.stamp_uncertainty_s == pytest.approx(0.02)


def test_odpm_old_kernels_have_one_time_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("t=473848\nCH0[A], 12345\n")[0]["A"] == odpm.Latch(473.848, 0.012345)
    phone, leaf = Phone(monkeypatch), Odpm(whole="A")
    for n in range(3):
        phone.answers = [(0.02, f"CH0[A], {1_000_000 * n}\n")]
        assert leaf.read() == {"A": float(n)}
        phone.now += 1


def test_odpm_counters_that_go_back_stand_still_or_come_late_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    phone, leaf = Phone(monkeypatch), Odpm(whole="A")
    for way_s, boot_ms, joules, said in (
        (0.02, 5000, 50, ""),
        (0.02, 5000, 50, ""),
        (0.02, 4000, 60, "went back"),
        (0.02, 5200, 40, "went back"),
        (1.5, 5400, 60, "adb took"),
        (0.02, 5400, 60, "not latched"),
    ):
        phone.answers = [(way_s, lines(("A", boot_ms, joules)))]
        phone.now += 4.0 if said == "not latched" else 0.1
        if said:
            with pytest.raises(MeterError, match=said):
                leaf.read()
        else:
            assert leaf.read() == {"A": pytest.approx(50e-6)}


def test_odpm_guesses_no_whole_and_uses_no_rail_that_comes_twice(tmp_path: Path) -> None:
    adb = fake_adb(tmp_path)
    assert "S2M_VDD_CPUCL2 (CPU)" in str(Odpm(adb=adb).probe()) and "whole=" in str(Odpm(adb=adb).probe())
    assert "no rail VDD" in str(Odpm(adb=adb, whole="VDD").probe())
    (tmp_path / "mode").write_text("file")
    (tmp_path / "energy_value").write_text(lines(("A", 1, 1), ("B", 1, 1)) + lines(("B", 1, 2)) + "CH9(T=1)[C], 2590")
    leaf = Odpm(adb=adb, whole="A")
    assert set(leaf.read()) == {"A"} and "B" in leaf.doubts()["duplicate_rail"]  # and C's last line is cut
    with pytest.raises(MeterError, match="no rail B"):
        Odpm(adb=adb, whole="A,B").read()


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("offline", "reconnect"),
        ("unauthorized", "debugging"),
        ("two", "serial="),
        ("denied", "root"),
        ("nuls", "no counters"),
        ("file", "failed"),
    ],
)
def test_odpm_says_what_adb_lacks(tmp_path: Path, mode: str, said: str) -> None:
    missing = Odpm(whole="A", adb=fake_adb(tmp_path, mode)).probe()
    assert missing is not None and said in missing and "\n" not in missing and "\0" not in missing


def test_odpm_without_adb_a_phone_or_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "platform tools" in str(Odpm(adb=str(tmp_path / "adb"), whole="A").probe())
    adb = fake_adb(tmp_path)
    assert "adb devices" in str(Odpm(serial="OTHER", adb=adb, whole="A").probe())
    (tmp_path / "mode").write_text("hung")
    monkeypatch.setattr(odpm.phone.ask, "__defaults__", (0.3,))
    assert "did not answer" in str(Odpm(adb=adb, whole="A").probe())
    assert Odpm(adb=adb).doubts() == {}
    with pytest.raises(ValueError, match="period_s"):
        Odpm(period_s=0)


def test_odpm_heat_and_charger_are_doubts(tmp_path: Path) -> None:
    leaf = Odpm(whole=WHOLE, adb=fake_adb(tmp_path))
    (tmp_path / "battery").write_text(BATTERY.replace("USB powered: false", "USB powered: true"))
    (tmp_path / "thermal").write_text(THERMAL.replace("Status: 0", "Status: 2"))
    assert leaf.doubts() == {"throttled": "Android's thermal status is 2", "charger": "powered by USB"}


PIECES = ["t=1", "CH0(T=5)[A], 3", "CH0[A], 9", "CH1(T=", "\0", "[", "-1", "\n", "\r\n"]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_odpm_any_text_is_survived(text: str) -> None:
    latches, twice = parse(text)
    assert not set(latches) & twice and all(latch.joules >= 0 for latch in latches.values())


def test_adb_failures_of_dumpsys_raise_no_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf: Any = Odpm(whole=WHOLE, adb=fake_adb(tmp_path, "offline"))
    assert leaf.doubts() == {}
