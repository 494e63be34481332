"""Live perf against a fake that prints real intervals at a real pace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgejoule import contracts, registry
from edgejoule.errors import MeterError, SpecError
from edgejoule.measure.meters import open_meter
from edgejoule.measure.perf import Perf
from edgejoule.measure.streamed import StreamedMeter
from edgejoule.seams import Streamer
from tests.fakes.desktops import fake_perf


def test_perf_streams_an_exact_counter_of_the_package(tmp_path: Path) -> None:
    leaf = Perf(events="pkg,ram", command=fake_perf(tmp_path), period_s=0.05)
    assert isinstance(leaf, Streamer) and leaf.probe() is None
    meter = StreamedMeter(leaf, "perf")
    meter.start()
    time.sleep(0.6)
    traces = {trace.rail: trace for trace in meter.stop()}
    pkg = traces["pkg"]
    assert set(traces) == {"pkg", "ram"} and pkg.total and not traces["ram"].total
    assert (pkg.quantity, pkg.grade, pkg.scope) == ("energy_j", "C", "package") and len(pkg.values) >= 4
    power = (pkg.values[-1] - pkg.values[0]) / (pkg.times_s[-1] - pkg.times_s[0])
    assert power == pytest.approx(20, rel=0.6) and not leaf.doubts()  # stamped on arrival, on a busy machine


def test_perf_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"perf": "edgejoule.measure.perf:Perf"})
    contracts.check_meter(f"perf(command={fake_perf(tmp_path)!r}, period_s=0.05)", open_meter, seconds=0.6)


@pytest.mark.parametrize(
    ("mode", "said"),
    [("denied", "perf_event_paranoid"), ("no event", "event syntax error"), ("not supported", "no sample"), ("comma", "LC_ALL=C")],
)
def test_perf_says_what_is_missing(tmp_path: Path, mode: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.streamed.FIRST_S", 1.5)
    leaf = Perf(command=fake_perf(tmp_path, mode), period_s=0.02)
    missing = leaf.probe()
    assert missing is not None and said in missing and "\n" not in missing
    with pytest.raises(MeterError):
        StreamedMeter(leaf, "perf").start()


def test_perf_is_not_installed(tmp_path: Path) -> None:
    assert "perf" in str(Perf(command=str(tmp_path / "perf")).probe())


def test_perf_bridges_intervals_that_were_not_counted_and_survives_garbage(tmp_path: Path) -> None:
    leaf = Perf(command=fake_perf(tmp_path, "gaps"), period_s=0.05)
    parse = leaf.parser()
    lines = [f"{n}.000000000,{'<not counted>' if n == 2 else '20.00'},Joules,power/energy-pkg/,1,100.00,," for n in range(1, 4)]
    assert [parse(line) for line in lines] == [{"pkg": 20.0}, None, {"pkg": 60.0}]
    assert set(leaf.doubts()) == {"invalid_values"}
    stale = "2.500000000,9.00,Joules,power/energy-pkg/,1,100.00,,"
    assert not any(parse(line) for line in ("", "\0\0", "# started", "power/energy-pkg/", "4.0,20", stale))
    assert parse("5.000000000,20.00,Joules,power/energy-pkg/,1,100.00,,") is not None
    assert leaf.parser()(lines[0]) == {"pkg": 20.0} and not leaf.doubts()  # a fresh one


def test_perf_refuses_options_that_mean_nothing() -> None:
    for options in ("period_s=0.001", "events=''", "events='pkg,pkg'", "events='pkg,dram'"):
        with pytest.raises((SpecError, ValueError)):
            Perf(**registry.parse(f"perf({options})").options)
