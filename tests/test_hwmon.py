"""Any hwmon chip: found by name and label, one input or none, counters that must not fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule import contracts, registry
from edgejoule.errors import MeterError, SpecError
from edgejoule.measure.hwmon import Hwmon
from edgejoule.measure.meters import open_meter
from tests.fakes.jetson import break_file, put, renumber, write_chip


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"hwmon": "edgejoule.measure.hwmon:Hwmon"})


def ina226(root: Path, number: int = 4, address: str = "1-0040", microwatts: int = 5_290_000) -> Path:
    folder = write_chip(root, number, "ina226", in0_input=5, in1_input=5290, curr1_input=1000, power1_input=microwatts, update_interval=70)
    device = root / "devices" / address
    device.mkdir(parents=True, exist_ok=True)
    (folder / "device").symlink_to(device)
    return folder


def test_an_ina2xx_is_watts_from_microwatts_at_its_own_pace(tmp_path: Path) -> None:
    ina226(tmp_path)
    write_chip(tmp_path, 0, "coretemp", temp1_input=41000)
    sensor = Hwmon(root=str(tmp_path))
    assert sensor.probe() is None and sensor.read() == {"1-0040": 5.29}
    assert (sensor.quantity, sensor.averaging_s, sensor.grade, sensor.scope) == ("power_w", 0.07, "C", "rail")
    outside = Hwmon(name="ina226", scope="board-in", root=str(tmp_path))
    assert (outside.grade, outside.scope, outside.systematic) == ("B", "board-in", 0.02)
    write_chip(tmp_path / "other", 1, "acpi", power1_average=80_000_000, power1_average_interval=1000)
    meter = Hwmon(scope="wall", root=str(tmp_path / "other"))
    assert meter.read() == {"power1": 80.0} and (meter.averaging_s, meter.grade, meter.systematic) == (1.0, "C", 0.05)


def test_where_several_fit_none_is_taken_and_all_are_spelled(tmp_path: Path) -> None:
    ina226(tmp_path)
    ina226(tmp_path, 5, "1-0041", 1_000_000)
    write_chip(tmp_path, 6, "amd_energy", energy1_input=7, energy1_label="Ecore000", energy2_input=2_000_000, energy2_label="Esocket0")
    said = str(Hwmon(root=str(tmp_path)).probe())
    assert "several inputs fit" in said and 'hwmon(name="ina226", label="1-0041")' in said and 'label="Esocket0"' in said
    assert Hwmon(name="ina226", label="1-0041", root=str(tmp_path)).read() == {"1-0041": 1.0}
    socket = Hwmon(label="Esocket0", scope="package", root=str(tmp_path))
    assert socket.read() == {"Esocket0": 2.0} and (socket.quantity, socket.scope, socket.grade) == ("energy_j", "package", "C")
    renumber(tmp_path, {4: 5, 5: 4})
    assert Hwmon(name="ina226", label="1-0041", root=str(tmp_path)).read() == {"1-0041": 1.0}
    assert "no input fits hwmon(name='ina219'" in str(Hwmon(name="ina219", root=str(tmp_path)).probe())
    assert "no chip below" in str(Hwmon(root=str(tmp_path / "no")).probe())


def test_a_counter_stands_for_its_power_and_an_instant_for_an_average(tmp_path: Path) -> None:
    write_chip(tmp_path, 1, "ina228", energy1_input=3_000_000, power1_input=1_000_000, in1_input=5000)
    assert Hwmon(root=str(tmp_path)).read() == {"energy1": 3.0}
    write_chip(tmp_path / "b", 1, "amdgpu", power1_input=9_000_000, power1_average=8_000_000, power1_label="PPT")
    assert Hwmon(root=str(tmp_path / "b")).read() == {"PPT": 9.0}


def test_a_counter_that_falls_is_refused_from_then_on(tmp_path: Path) -> None:
    folder = write_chip(tmp_path, 1, "amd_energy", energy1_input=3_000_000, energy1_label="Esocket0")
    sensor = Hwmon(root=str(tmp_path))
    assert sensor.read() == {"Esocket0": 3.0}
    put(folder / "energy1_input", 2_000_000)
    for joules in (2_000_000, 2_500_000, 9_000_000):
        put(folder / "energy1_input", joules)
        with pytest.raises(MeterError, match="fell"):
            sensor.read()


def test_a_channel_that_is_off_is_an_error_and_a_true_zero_is_none(tmp_path: Path) -> None:
    folder = ina226(tmp_path, microwatts=0)
    sensor = Hwmon(root=str(tmp_path))
    assert sensor.read() == {"1-0040": 0.0}
    put(folder / "in1_input", 0)
    with pytest.raises(MeterError, match="is off"):
        sensor.read()
    for text in ("", "-1", "5.29", "nan", "9" * 30):
        put(folder / "power1_input", text)
        with pytest.raises(MeterError):
            sensor.read()
    break_file(folder / "power1_input")
    with pytest.raises(MeterError, match="cannot read"):
        sensor.read()
    (folder / "power1_input").rmdir()
    put(folder / "power1_input", 1_000_000)
    renumber(tmp_path, {4: 8})
    assert sensor.read() == {"1-0040": 1.0}, "found again below its new number"


def test_what_may_not_be_read_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ina226(tmp_path)
    read = Path.read_text

    def refuse(self: Path, *args: Any, **more: Any) -> str:
        if self.name == "power1_input":
            raise PermissionError(13, "Permission denied")
        return read(self, *args, **more)

    monkeypatch.setattr(Path, "read_text", refuse)  # the tests may run as root, whom nothing is denied
    assert "sudo chmod a+r" in str(Hwmon(root=str(tmp_path)).probe())


def test_it_keeps_the_contract_and_refuses_odd_options(tmp_path: Path) -> None:
    ina226(tmp_path)
    contracts.check_meter(f"hwmon(root={str(tmp_path)!r}, period_s=0.02)", open_meter)
    for wrong in ("scope='desk'", "period_s=0", "period_s=61.0"):
        with pytest.raises(SpecError, match="scope must be one of"):
            registry.create("meter", f"hwmon({wrong})")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["name", "power1_input", "power1_label", "label", "in1_input", "update_interval", "energy3_input", "power_input"]),
        st.one_of(st.binary(max_size=20), st.integers(-(10**12), 10**12).map(lambda n: str(n).encode())),
    )
)
def test_any_content_is_a_figure_or_a_meter_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = write_chip(tmp_path, 1, "ina226", power1_input=1, in1_input=5000)
    (folder / "energy3_input").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sensor = Hwmon(root=str(tmp_path))
    assert sensor.averaging_s > 0 and sensor.grade in ("B", "C") and "\n" not in (sensor.probe() or "")
    try:
        assert all(value >= 0 for value in sensor.read().values())
    except MeterError:
        return
