"""The battery's gauge: units and signs that vendors disagree on, chargers, frozen figures, and Android's model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import contracts
from edgejoule.errors import MeterError
from edgejoule.measure.battery import Battery, android_charge, batterystats, current_unit, volts
from edgejoule.measure.meters import open_meter
from tests.fakes.desktops import BATTERY, fake_adb


def supply(root: Path, name: str, **files: object) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")
    return folder


def laptop(root: Path, **more: object) -> Path:
    supply(root, "AC", type="Mains", online=0)
    mouse = supply(root, "hidpp_battery_0", type="Battery", scope="Device", status="Discharging", voltage_now=4000000, current_now=9000000)
    assert mouse.is_dir()
    return supply(root, "BAT0", **({"type": "Battery", "status": "Discharging", "voltage_now": 12000000, "current_now": 1500000} | more))


def test_the_battery_of_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = laptop(tmp_path)
    leaf = Battery(root=str(tmp_path))
    assert leaf.probe() is None and leaf.read() == {"BAT0": pytest.approx(18.0)} and leaf.doubts() == {}
    assert (leaf.quantity, leaf.grade, leaf.scope, leaf.averaging_s) == ("power_w", "C", "battery", 10.0)
    (folder / "current_now").write_text("-1500000\n")  # the sign is the vendor's choice
    assert leaf.read() == {"BAT0": pytest.approx(18.0)}
    (folder / "power_now").write_text("17500000\n")
    assert leaf.read() == {"BAT0": pytest.approx(17.5)}
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"battery": "edgejoule.measure.battery:Battery"})
    contracts.check_meter(f"battery(root={str(tmp_path)!r}, period_s=0.05)", open_meter)


@pytest.mark.parametrize(("raw", "unit"), [(1469687, "uA"), (-986000, "uA"), (350, "mA"), (-421, "mA"), (4999, "mA")])
def test_a_unit_that_only_one_reading_allows(raw: int, unit: str) -> None:
    assert current_unit(raw) == unit


@pytest.mark.parametrize("raw", [0, 1, 5000, 20000, 30000, 10**9])
def test_a_current_of_two_units_or_none_is_refused(raw: int) -> None:
    with pytest.raises(MeterError, match="unit="):
        current_unit(raw)


def test_the_unit_may_be_said_and_is_kept_once_it_is_known(tmp_path: Path) -> None:
    folder = laptop(tmp_path, current_now=20000)
    assert "unit=" in str(Battery(root=str(tmp_path)).probe())
    assert Battery(root=str(tmp_path), unit="uA").read() == {"BAT0": pytest.approx(0.24)}
    assert Battery(root=str(tmp_path), unit="mA").read() == {"BAT0": pytest.approx(240)}
    leaf = Battery(root=str(tmp_path))
    (folder / "current_now").write_text("1500000\n")
    leaf.read()
    (folder / "current_now").write_text("20000\n")
    assert leaf.read() == {"BAT0": pytest.approx(0.24)}
    with pytest.raises(ValueError, match="unit"):
        Battery(unit="A")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["Charging", "Full", "Not charging", "Unknown"])
def test_a_battery_that_feeds_nothing_is_no_meter(tmp_path: Path, state: str) -> None:
    laptop(tmp_path, status=state)
    supply(tmp_path, "AC", online=1)
    leaf = Battery(root=str(tmp_path))
    assert "unplug" in str(leaf.probe()) and leaf.doubts() == {"charger": "AC online"}
    with pytest.raises(MeterError, match=state):
        leaf.read()


def test_one_of_two_batteries_that_charges_spoils_the_sum(tmp_path: Path) -> None:
    laptop(tmp_path)
    second = supply(tmp_path, "BAT1", type="Battery", status="Charging", voltage_now=12000000, current_now=500000)
    with pytest.raises(MeterError, match="BAT1 is Charging"):
        Battery(root=str(tmp_path)).read()
    (second / "status").write_text("Discharging\n")
    assert Battery(root=str(tmp_path)).read() == {"BAT0": pytest.approx(18.0), "BAT1": pytest.approx(6.0)}


def test_a_battery_that_lacks_something_says_so(tmp_path: Path) -> None:
    assert "no battery" in str(Battery(root=str(tmp_path / "none")).probe())
    folder = laptop(tmp_path)
    assert "no battery BAT7" in str(Battery(root=str(tmp_path), name="BAT7").probe())
    for text in ("", "abc", "1.5", "\0\0", "0", "9" * 30):
        (folder / "current_now").write_text(text)
        assert Battery(root=str(tmp_path)).probe() is not None
    (folder / "current_now").unlink()
    assert "neither power_now nor" in str(Battery(root=str(tmp_path)).probe())
    (folder / "power_now").write_text("0\n")
    assert "no plausible figure" in str(Battery(root=str(tmp_path)).probe())  # absence is never zero


def test_volts_of_either_unit() -> None:
    for raw, wanted in ((4352, 4.352), (4352000, 4.352), (17074000, 17.074)):
        assert volts(raw, "v") == pytest.approx(wanted)
    for raw in (0, 4.3, 435, 10**10):
        with pytest.raises(MeterError, match="expected microvolts"):
            volts(raw, "v")


def test_a_phone_is_measured_by_its_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adb = fake_adb(tmp_path)
    leaf = Battery(android=True, serial="PIXEL6", adb=adb)
    assert leaf.probe() is None and leaf.read() == {"battery": 0.0} and (leaf.quantity, leaf.grade) == ("energy_j", "D")
    (tmp_path / "battery").write_text(BATTERY.replace("3270000", "3269000").replace("4352", "4350"))
    assert leaf.read() == {"battery": pytest.approx(3.6 * 4.351)}  # 1 mAh
    (tmp_path / "battery").write_text(BATTERY.replace("3270000", "3269500"))  # the gauge wavers
    assert leaf.read() == {"battery": pytest.approx(3.6 * 4.351)}
    (tmp_path / "battery").write_text(BATTERY.replace("USB powered: false", "USB powered: true"))
    assert leaf.doubts() == {"charger": "powered by USB"}
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"battery": "edgejoule.measure.battery:Battery"})
    contracts.check_meter(f"battery(android=True, adb={adb!r}, period_s=0.05)", open_meter)


STOPPED = "state:\n  (UPDATES STOPPED -- use 'reset' to restart)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("status: 3", "status: 2"), "Charging"),
        (("status: 3", "status: 5"), "Full"),
        (("status: 3", ""), "Unknown"),
        (("3270000", "44000"), "not plainly"),
        (("3270000", "-564"), "whole numbers"),
        (("4352", "4"), "microvolts"),
        (("state:", STOPPED), "reset"),
        (("Charge counter", "Nothing"), "whole numbers"),
    ],
)
def test_a_phone_that_charges_or_shows_nonsense_is_refused(change: tuple[str, str], said: str) -> None:
    assert android_charge(BATTERY)[0] == pytest.approx(3.27 * 3600)
    with pytest.raises(MeterError, match=said):
        android_charge(BATTERY.replace(*change))


def test_a_charge_in_milliampere_hours() -> None:
    assert android_charge(BATTERY.replace("3270000", "3270")) == (pytest.approx(3.27 * 3600), pytest.approx(4.352))
    with pytest.raises(MeterError, match="not plainly"):
        android_charge(BATTERY, "mA")


def test_batterystats_is_an_estimate() -> None:
    old = (
        "  Capacity: 3500, Computed drain: 1987, actual drain: 3150-3185\n"
        "  Uid u0a192: 53.8 ( cpu=53.7 wifi=0.0960 )\n  UID u0a123: 1575.0\n  Uid 0: 1\n  Uid 0: 2\n"
    )
    drain = batterystats(old)
    assert (drain.capacity_mah, drain.computed_mah, drain.actual_mah, drain.grade) == (3500, 1987, (3150, 3185), "D")
    assert drain.users_mah == {"u0a192": 53.8, "u0a123": 1575.0} and drain.energy_j(1000, 3.85) == pytest.approx(13860)
    checkin = batterystats("9,0,l,pws,1000,3.65,160,170\n9,1001,l,pwi,uid,1.21,1,0,0\n9,1001,l,pwi,scrn,5,1,0,0\n")
    assert (checkin.computed_mah, checkin.users_mah) == (3.65, {"1001": 1.21})
    for text in ("", "nonsense", "  Capacity: 3500, Computed drain: 1.2.3, actual drain: 3150\n"):
        with pytest.raises(MeterError):
            batterystats(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(0, 300), st.booleans())
def test_any_text_is_survived(junk: str, at: int, checkin: bool) -> None:
    text = "9,0,l,pws,1000,3.65,160,170\n9,1001,l,pwi,uid,1.21,1\n" if checkin else BATTERY
    for parse in (android_charge, batterystats):
        try:
            parse(text[:at] + junk + text[at:])
        except MeterError as error:
            assert "\n" not in str(error)
