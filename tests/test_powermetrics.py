"""Live powermetrics against a fake that prints real samples at a real pace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgejoule import contracts
from edgejoule.errors import MeterError
from edgejoule.measure.meters import open_meter
from edgejoule.measure.powermetrics import Powermetrics
from edgejoule.measure.streamed import StreamedMeter
from edgejoule.seams import Streamer
from tests.fakes.desktops import fake_powermetrics


def test_powermetrics_streams_the_combined_energy_and_never_its_parts_with_it(tmp_path: Path) -> None:
    leaf = Powermetrics(command=fake_powermetrics(tmp_path), period_s=0.05)
    assert isinstance(leaf, Streamer) and leaf.probe() is None
    meter = StreamedMeter(leaf, "powermetrics")
    meter.start()
    time.sleep(0.6)
    traces = {trace.rail: trace for trace in meter.stop()}
    combined = traces["combined"]
    assert {"cpu", "gpu", "ane", "e-cluster", "combined"} == set(traces) and [r for r, t in traces.items() if t.total] == ["combined"]
    assert (combined.quantity, combined.grade, combined.scope, combined.averaging_s) == ("energy_j", "D", "SoC", 0.05)
    power = (combined.values[-1] - combined.values[0]) / (combined.times_s[-1] - combined.times_s[0])
    assert power == pytest.approx(3, rel=0.6) and len(combined.values) >= 4 and not leaf.doubts()


def test_powermetrics_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"powermetrics": "edgejoule.measure.powermetrics:Powermetrics"})
    contracts.check_meter(f"powermetrics(command={fake_powermetrics(tmp_path)!r}, period_s=0.05)", open_meter, seconds=0.6)


def test_powermetrics_reports_thermal_pressure(tmp_path: Path) -> None:
    leaf = Powermetrics(command=fake_powermetrics(tmp_path, "hot"), period_s=0.05)
    meter = StreamedMeter(leaf, "powermetrics")
    meter.start()
    meter.stop()
    assert meter.doubts() == {"throttled": "thermal pressure Heavy"}


def test_powermetrics_says_what_is_missing(tmp_path: Path) -> None:
    leaf = Powermetrics(command=fake_powermetrics(tmp_path, "user"))
    missing = leaf.probe()
    assert missing is not None and "superuser" in missing and "sudo=True" in missing
    with pytest.raises(MeterError, match="superuser"):
        StreamedMeter(leaf, "powermetrics").start()
    assert "macOS" in str(Powermetrics(command=str(tmp_path / "none")).probe())
    assert list(Powermetrics(sudo=True).argv()[:3]) == ["sudo", "-n", "powermetrics"]
    with pytest.raises(ValueError, match="period_s"):
        Powermetrics(period_s=0.001)


def test_powermetrics_gives_a_sample_once_and_sums_exactly() -> None:
    parse = Powermetrics().parser()
    head = "*** Sampled system activity (Fri Nov 10 12:37:08 2023 +0100) (500.00ms elapsed) ***"
    combined = "Combined Power (CPU + GPU + ANE): 1000 mW"
    body = ["CPU Power: 947 mW", "GPU Power: 53 mW", combined, "GPU Power: 53 mW", "Current pressure level: Nominal"]
    found = [parse(line) for line in [head, *body] * 2 + ["", "\0", "Combined Power (CPU + GPU + ANE): 9 mW"]]
    assert [sample["combined"] for sample in found if sample] == [0.5, 1.0]
    broken = ("*** Sampled system activity () (x)", "CPU Power: lots mW", "*** Sampled system activity (a) (0.00ms elapsed)", *body)
    cut = [parse(line) for line in broken]
    assert cut == [None] * len(cut)
