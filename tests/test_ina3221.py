"""The INA3221 of every generation against trees on disk, faults included."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule import contracts, registry
from edgejoule.errors import MeterError, SpecError
from edgejoule.measure.energy import integrate
from edgejoule.measure.ina3221 import Ina3221
from edgejoule.measure.meters import open_meter
from edgejoule.measure.polled import PolledMeter
from tests.fakes import jetson
from tests.fakes.jetson import break_file, put, renumber, write_chip, write_iio, write_ina3221, write_tx1

TX2 = {"VDD_SYS_GPU": 182, "VDD_SYS_SOC": 730, "VDD_4V0_WIFI": 0}, {"VDD_IN": 5297, "VDD_SYS_CPU": 1917, "VDD_SYS_DDR": 1241}
ORIN_NX = [("VDD_IN", 4984, 1856), ("VDD_CPU_GPU_CV", 4984, 96), ("VDD_SOC", 4984, 288)]


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"ina3221": "edgejoule.measure.ina3221:Ina3221"})


def tx2(root: Path, first: int = 0) -> Path:
    folders = [write_iio(root, f"0-004{n}", f"iio:device{n}", rails, first) for n, rails in enumerate(TX2)]
    put(folders[0] / "in_voltage2_input", 4776)
    put(folders[0] / "in_voltage3_input", 4776)
    return folders[1]


@pytest.mark.parametrize("first", [0, 1])
def test_l4t_s_driver_with_channels_from_0_or_1(first: int, tmp_path: Path) -> None:
    tx2(tmp_path, first)
    sensor = Ina3221(str(tmp_path))
    assert sensor.probe() is None
    watts = sensor.read()
    assert watts == pytest.approx({rail: mw / 1e3 for rails in TX2 for rail, mw in rails.items()})
    assert [rail for rail in watts if sensor.total(rail)] == ["VDD_IN"]
    assert (sensor.averaging_s, sensor.scope, sensor.grade, sensor.quantity, sensor.systematic) == (
        0.422,
        "module-in",
        "C",
        "power_w",
        0.05,
    )


def test_tx1_s_old_driver_and_its_units(tmp_path: Path) -> None:
    write_tx1(tmp_path, "1-0040", {"VDD_IN": 2532, "VDD_CPU": 76, "VDD_GPU": 19})
    write_tx1(tmp_path, "1-0042", {"VDD_MUX": 3100, "VDD_5V_IO_SYS": 900, "VDD_3V3_SYS": 400})
    sensor = Ina3221(str(tmp_path))
    assert sensor.read()["VDD_IN"] == 2.532 and [rail for rail in sensor.read() if sensor.total(rail)] == ["VDD_IN"]


def test_mainline_s_driver_multiplies_and_ignores_shunts_and_sums(tmp_path: Path) -> None:
    folder = write_ina3221(tmp_path, 3, ORIN_NX, update_ms=35)
    write_chip(tmp_path, 1, "pwmfan", pwm1=58)
    sensor = Ina3221(str(tmp_path))
    assert sensor.read() == pytest.approx({"VDD_IN": 9.250304, "VDD_CPU_GPU_CV": 0.478464, "VDD_SOC": 1.435392})
    assert sensor.averaging_s == 0.035 and Ina3221(str(tmp_path), window_s=0.3).averaging_s == 0.3
    (folder / "update_interval").unlink()
    assert Ina3221(str(tmp_path)).averaging_s == 0.422


def test_an_agx_orin_has_two_chips_and_channels_that_are_not_connected(tmp_path: Path) -> None:
    write_ina3221(tmp_path, 4, [("VDD_GPU_SOC", 20000, 120), ("VDD_CPU_CV", 20000, 40), ("VIN_SYS_5V0", 5000, 704)])
    write_ina3221(tmp_path, 5, [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 60), ("NC", 0, 0)])
    sensor = Ina3221(str(tmp_path))
    watts = sensor.read()
    assert set(watts) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert sum(w for rail, w in watts.items() if sensor.total(rail)) == pytest.approx(2.4 + 0.8 + 3.52)
    renumber(tmp_path, {4: 11, 5: 4})
    assert Ina3221(str(tmp_path)).read() == watts


def test_a_thor_s_input_is_its_ina238(tmp_path: Path) -> None:
    write_ina3221(tmp_path, 2, [("VDD_GPU", 20000, -19), ("VDD_CPU_SOC_MSS", 20000, 196), ("VIN_SYS_5V0", 5000, 1012)])
    refusal = str(Ina3221(str(tmp_path)).probe())
    assert "nobody knows which of the rails VDD_CPU_SOC_MSS, VDD_GPU, VIN_SYS_5V0" in refusal
    write_chip(tmp_path, 7, "ina238", power1_input=15_004_000, in1_input=19980, curr1_input=751)
    sensor = Ina3221(str(tmp_path))
    watts = sensor.read()
    assert watts["VIN"] == 15.004 and "VDD_GPU" not in watts, "below zero is an offset of the sensor, not a power"
    assert [rail for rail in watts if sensor.total(rail)] == ["VIN"] and sensor.scope == "board-in"


def test_an_ina238_elsewhere_is_not_ours(tmp_path: Path) -> None:
    write_ina3221(tmp_path, 2, ORIN_NX)
    write_chip(tmp_path, 7, "ina238", power1_input=15_004_000, in1_input=19980)
    assert set(Ina3221(str(tmp_path)).read()) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}


def test_a_channel_that_is_off_or_fails_is_a_hole_and_of_the_total_an_error(tmp_path: Path) -> None:
    second = tx2(tmp_path)
    sensor = Ina3221(str(tmp_path))
    put(second / "in_power1_input", 0)
    put(second / "in_voltage1_input", 0)
    break_file(second / "in_power2_input")
    assert set(sensor.read()) == {"VDD_IN", "VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI"}
    put(second / "in_power0_input", 0)
    put(second / "in_voltage0_input", 0)
    with pytest.raises(MeterError, match="VDD_IN reads 0 W without a voltage"):
        sensor.read()
    for text in ("", "-5", "none", "1,5", "1e3", "\0", "9" * 40):
        put(second / "in_power0_input", text)
        with pytest.raises(MeterError):
            sensor.read()
    break_file(second / "in_power0_input")
    with pytest.raises(MeterError, match="cannot read"):
        sensor.read()
    (second / "in_power0_input").rmdir()
    put(second / "in_power0_input", 5297)
    put(second / "in_voltage0_input", 19000)
    assert sensor.read()["VDD_IN"] == 5.297


def test_a_mainline_channel_without_voltage_is_off(tmp_path: Path) -> None:
    folder = write_ina3221(tmp_path, 3, ORIN_NX)
    sensor = Ina3221(str(tmp_path))
    put(folder / "in2_input", 0)
    assert set(sensor.read()) == {"VDD_IN", "VDD_SOC"}
    put(folder / "in1_input", 0)
    with pytest.raises(MeterError, match="VDD_IN has 0 mV: its channel is off"):
        sensor.read()


def test_a_driver_that_is_bound_anew_is_found_again(tmp_path: Path) -> None:
    write_ina3221(tmp_path, 3, ORIN_NX)
    sensor = Ina3221(str(tmp_path))
    watts = sensor.read()
    renumber(tmp_path, {3: 9})
    with pytest.raises(MeterError, match="cannot read"):
        sensor.read()
    assert sensor.read() == watts


def test_a_current_at_the_top_of_the_converter_is_a_doubt(tmp_path: Path) -> None:
    folder = write_ina3221(tmp_path, 3, ORIN_NX)
    sensor = Ina3221(str(tmp_path))
    sensor.read()
    assert sensor.doubts() == {}
    put(folder / "curr1_input", 32760)  # 163.8 mV over 5 mOhm
    sensor.read()
    put(folder / "curr1_input", 1856)
    sensor.read()
    assert "VDD_IN stood at 32760 mA" in sensor.doubts()["saturated"]


def test_what_is_refused(tmp_path: Path) -> None:
    assert "no INA3221 below" in str(Ina3221(str(tmp_path)).probe())
    write_ina3221(tmp_path, 3, [*ORIN_NX[:2], ("VDD_FOO", 5000, 10)])
    assert "VDD_CPU_GPU_CV, VDD_FOO, VDD_IN add up" in str(Ina3221(str(tmp_path)).probe())
    named = Ina3221(str(tmp_path), whole="VDD_IN")
    assert named.probe() is None and named.total("VDD_IN") and not named.total("VDD_FOO")
    write_ina3221(tmp_path, 4, ORIN_NX)
    assert "several channels are called VDD_CPU_GPU_CV, VDD_IN" in str(Ina3221(str(tmp_path)).probe())
    for wrong in ("period_s=0", "window_s=-1.0", "period_s=100"):
        with pytest.raises(SpecError, match="period_s"):
            registry.create("meter", f"ina3221({wrong})")


def test_it_keeps_the_contract_and_a_known_power(tmp_path: Path) -> None:
    write_ina3221(tmp_path, 3, ORIN_NX)
    spelling = f"ina3221(root={str(tmp_path)!r}, period_s=0.02)"
    contracts.check_meter(spelling, open_meter)
    meter: Any = open_meter(spelling)
    assert isinstance(meter, PolledMeter)
    meter.start()
    time.sleep(0.2)
    (total,) = (trace for trace in meter.stop() if trace.total)
    assert integrate(total, total.times_s[0], total.times_s[0] + 0.1) == pytest.approx(0.1 * 9.250304) and total.systematic == 0.05


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["in1_input", "curr1_input", "in2_input", "curr2_input", "update_interval", "shunt1_resistor", "in3_label"]),
        st.one_of(st.binary(max_size=20), st.integers(-(10**12), 10**12).map(lambda n: str(n).encode())),
    )
)
def test_any_content_is_watts_or_a_meter_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = write_ina3221(tmp_path, 3, ORIN_NX, update_ms=35)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sensor = Ina3221(str(tmp_path))
    assert sensor.averaging_s > 0 and sensor.scope
    try:
        watts = sensor.read()
    except MeterError:
        return
    assert all(w >= 0 for w in watts.values()) and sensor.total("VDD_IN") and "VDD_IN" in watts


def test_the_fake_breaks_files_for_root_too(tmp_path: Path) -> None:
    jetson.break_file(tmp_path / "x")
    with pytest.raises(OSError, match="directory"):
        (tmp_path / "x").read_text()
