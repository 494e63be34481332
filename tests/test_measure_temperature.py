"""Waiting for heat: a fake tree of thermal zones and a clock that only sleeping moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgejoule.measure.temperature import COOL_CAP_S, Heat, cool_down, hottest_c


class Room:
    """Thermal zones whose temperature is a function of the time slept."""

    def __init__(self, root: Path, curve: object) -> None:
        self.root, self.curve, self.now = root, curve, 0.0
        self.sleep(0.0)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        zone(self.root, 0, "cpu-thermal", self.curve(self.now))  # type: ignore[operator]


def zone(root: Path, number: int, kind: str, celsius: float) -> None:
    folder = root / f"sys/class/thermal/thermal_zone{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "type").write_text(kind + "\n")
    (folder / "temp").write_text(f"{round(celsius * 1000)}\n")


def test_dummy_zones_are_not_believed(tmp_path: Path) -> None:
    assert hottest_c(tmp_path) is None
    zone(tmp_path, 0, "CPU-therm", 42.5)
    zone(tmp_path, 1, "PMIC-Die", 100)
    zone(tmp_path, 2, "CV0-therm", -256)
    (tmp_path / "sys/class/thermal/thermal_zone3").mkdir()
    assert hottest_c(tmp_path) == 42.5


def test_heating_is_not_steady_until_it_ends(tmp_path: Path) -> None:
    room = Room(tmp_path, lambda t: min(40 + t / 10, 52.0))  # 6 °C/min for two minutes
    heat = Heat(room.clock, tmp_path)
    steady_at = None
    while steady_at is None and room.now < 300:
        if heat.steady():
            steady_at = room.now
        room.sleep(0.5)
    assert steady_at is not None and 120 < steady_at < 160


def test_a_machine_without_sensors_is_not_waited_for(tmp_path: Path) -> None:
    assert Heat(lambda: 0.0, tmp_path).steady()


@pytest.mark.parametrize(("curve", "waited"), [(lambda t: 60 - t, 18.0), (lambda t: 41.0, 5.0), (lambda t: 60.0, COOL_CAP_S)])
def test_cooling_ends_near_the_start_or_at_the_cap(tmp_path: Path, curve: object, waited: float) -> None:
    room = Room(tmp_path, curve)
    assert cool_down(5.0, 40.0, tmp_path, room.clock, room.sleep) == pytest.approx(waited, abs=1.0)


def test_no_cooling_is_asked_for_by_the_quick_profile(tmp_path: Path) -> None:
    room = Room(tmp_path, lambda t: 90.0)
    assert cool_down(0.0, 40.0, tmp_path, room.clock, room.sleep) == 0.0
