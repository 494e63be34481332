"""The battery's own gauge. On Linux its power, grade C; on an Android phone (over adb) its charge counter times its voltage, grade D.

Scope: battery, all that it feeds, display included. A gauge answers slowly (seconds), and how slowly nobody says: ``update_s`` is an
assumption. The kernel's files are in micro-units by its rules, but vendors write milliampere too, and signs differ: the unit is taken
where only one gives a current that a battery can deliver, else refused (``unit`` says it); the sign is never used, the status is. A battery
that charges, or rests because the mains feed the machine, measures nothing: that is refused. ``batterystats`` is a model of Android's own
(milliampere-hours by a table of the maker's): ``batterystats()`` reads it, as an estimate, never as a meter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.measure import adb as phone
from edgejoule.records import Grade

UNITS = {"uA": 1e-6, "mA": 1e-3}
CURRENT_A, POWER_W, VOLTAGE_V = (0.005, 30.0), (0.01, 1000.0), (2.0, 100.0)  # of a battery that keeps a device awake
CHARGE_AH = (0.1, 30.0)
COULOMBS_PER_MAH = 3.6
STATUS = {"1": "Unknown", "2": "Charging", "3": "Discharging", "4": "Not charging", "5": "Full"}
STOPPED = "UPDATES STOPPED"
CAPACITY = re.compile(r"^\s*Capacity: ([\d.]+), Computed drain: ([\d.]+), actual drain: ([\d.]+)(?:-([\d.]+))?", re.MULTILINE)
USER = re.compile(r"^\s*U(?:id|ID) (\w+): ([\d.]+)(?=\s|$)", re.MULTILINE)
CHECKIN = re.compile(r"^9,0,l,pws,([\d.]+),([\d.]+),([\d.]+),([\d.]+)\s*$", re.MULTILINE)
CHECKIN_USER = re.compile(r"^9,(\d+),l,pwi,uid,([\d.]+)(?=,|\s|$)", re.MULTILINE)


@dataclass(slots=True)
class _Drained:
    """A phone's charge: the lowest seen, the voltage then, and the joules since the first reading."""

    coulombs: float | None = None
    volts: float = 0.0
    joules: float = 0.0


@dataclass(frozen=True, slots=True)
class Battery:
    """This machine's batteries (below ``root``, or the one called ``name``), or with ``android=True`` the phone ``serial``'s."""

    name: str = ""
    unit: Literal["", "uA", "mA"] = ""
    android: bool = False
    serial: str = ""
    adb: str = "adb"
    root: str = "/sys/class/power_supply"
    period_s: float = 1.0
    update_s: float = 10.0
    _drained: _Drained = field(default_factory=_Drained, init=False, repr=False, compare=False)
    _decided: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)  # {battery: unit}

    def __post_init__(self) -> None:
        if self.unit not in ("", *UNITS) or not self.period_s > 0 or not self.update_s > 0:
            raise ValueError("unit must be uA or mA, period_s and update_s above 0")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j" if self.android else "power_w"

    @property
    def averaging_s(self) -> float:
        return self.update_s

    @property
    def grade(self) -> Grade:
        return "D" if self.android else "C"

    @property
    def scope(self) -> str:
        return "battery"

    def probe(self) -> str | None:
        try:
            if self.android:
                android_charge(self._dumped(), self.unit)
            else:
                self._powers()
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{"battery": joules since the first read} of a phone, {battery: watts} here. Raises MeterError."""
        return {"battery": self._joules()} if self.android else self._powers()

    def doubts(self) -> dict[str, str]:
        """Whether a charger is connected (and a phone's heat)."""
        if self.android:
            return phone.doubts(self.adb, self.serial)
        online = [
            folder.name for folder in _supplies(Path(self.root)) if _text(folder, "type") != "Battery" and _text(folder, "online") == "1"
        ]
        return {"charger": f"{', '.join(online)} online"} if online else {}

    def _powers(self) -> dict[str, float]:
        batteries = [
            folder
            for folder in _supplies(Path(self.root))
            if _text(folder, "type") == "Battery" and _text(folder, "scope") != "Device" and self.name in ("", folder.name)
        ]
        if not batteries:
            raise MeterError(f"there is no battery{f' {self.name}' * bool(self.name)} in {self.root}: attach a meter")
        states = {folder.name: _text(folder, "status") or "Unknown" for folder in batteries}
        if "Discharging" not in states.values() or "Charging" in states.values():
            seen = ", ".join(f"{name} is {state}" for name, state in states.items())
            raise MeterError(f"no battery feeds the machine ({seen}): unplug the charger")
        return {folder.name: self._watts(folder) for folder in batteries if states[folder.name] == "Discharging"}

    def _watts(self, folder: Path) -> float:
        """Raises MeterError where neither power nor current and voltage are there, or the unit of the current may be two."""
        power = _text(folder, "power_now")
        if power is not None:
            return _plausible(_whole(power, folder / "power_now") * 1e-6, POWER_W, f"{folder}/power_now holds {power!r}", "microwatts")
        current, voltage = _text(folder, "current_now"), _text(folder, "voltage_now")
        if current is None or voltage is None:
            raise MeterError(f"{folder} has neither power_now nor current_now and voltage_now: this battery's gauge tells no power")
        raw = _whole(current, folder / "current_now")
        unit = self.unit or self._decided.get(folder.name) or current_unit(raw)
        self._decided[folder.name] = unit
        amps = _plausible(raw * UNITS[unit], CURRENT_A, f"{folder}/current_now holds {current!r}", unit)
        return amps * volts(_whole(voltage, folder / "voltage_now"), f"{folder}/voltage_now")

    def _dumped(self) -> str:
        return phone.ask(self.adb, self.serial, "dumpsys battery")

    def _joules(self) -> float:
        coulombs, at_v = android_charge(self._dumped(), self.unit)
        seen = self._drained
        if seen.coulombs is None or coulombs < seen.coulombs:
            seen.joules += 0.0 if seen.coulombs is None else (seen.coulombs - coulombs) * (seen.volts + at_v) / 2
            seen.coulombs, seen.volts = coulombs, at_v
        return seen.joules


def current_unit(raw: float) -> str:
    """The unit in which ``raw`` is a current that a battery can deliver. Raises MeterError where both are, or neither."""
    fit = [unit for unit, scale in UNITS.items() if CURRENT_A[0] <= abs(raw) * scale <= CURRENT_A[1]]
    if len(fit) != 1:
        why = "may be uA or mA" if fit else "is no plausible current in uA or mA"
        raise MeterError(f'the battery\'s current {raw:g} {why}: say unit="uA" or unit="mA", or use another meter')
    return fit[0]


def volts(raw: float, where: str) -> float:
    """From microvolts or millivolts, whichever a battery can have. Raises MeterError for neither."""
    fit = [raw * scale for scale in (1e-6, 1e-3) if VOLTAGE_V[0] <= raw * scale <= VOLTAGE_V[1]]
    if not fit:
        raise MeterError(f"{where} holds {raw:g}: expected microvolts or millivolts of a battery")
    return fit[0]


def android_charge(text: str, unit: str = "") -> tuple[float, float]:
    """``dumpsys battery`` -> (coulombs left, volts). Raises MeterError where the phone charges or does not say them."""
    found = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in text.replace("\0", "").splitlines())}
    if STOPPED in text:
        raise MeterError("the phone's battery service shows frozen figures: run adb shell dumpsys battery reset")
    state = STATUS.get(found.get("status", ""), "Unknown")
    if state != "Discharging":
        raise MeterError(f"the phone's battery is {state}: unplug its charger, and use adb over the network")
    raw, voltage = found.get("charge counter", ""), found.get("voltage", "")
    if not raw.isdecimal() or not voltage.isdecimal() or len(raw + voltage) > 30:
        raise MeterError(f"dumpsys battery says charge counter {raw[:20]!r} and voltage {voltage[:20]!r}: expected two whole numbers")
    fit = [scale for name, scale in UNITS.items() if unit in ("", name) and CHARGE_AH[0] <= int(raw) * scale <= CHARGE_AH[1]]
    if len(fit) != 1:
        raise MeterError(f'the charge counter {raw} is not plainly uAh or mAh: say unit="uA" or unit="mA", or use another meter')
    return int(raw) * fit[0] * 3600, volts(int(voltage), "the phone's voltage")


@dataclass(frozen=True, slots=True)
class Drain:
    """What Android's model says was drawn since the last charge, in milliampere-hours: an estimate, grade D."""

    capacity_mah: float
    computed_mah: float
    actual_mah: tuple[float, float]  # by the gauge: least and most
    users_mah: Mapping[str, float]  # {uid: …}; one that comes twice is left out

    @property
    def grade(self) -> Grade:
        return "D"

    def energy_j(self, mah: float, at_v: float) -> float:
        """Joules of a charge at a mean voltage in volts."""
        return mah * COULOMBS_PER_MAH * at_v


def batterystats(text: str) -> Drain:
    """``dumpsys batterystats``, for people or ``--checkin``. Raises MeterError where it tells no drain, or another than a number."""
    whole, users = CAPACITY.search(text), USER.findall(text)
    if whole is None:
        whole, users = CHECKIN.search(text), CHECKIN_USER.findall(text)
    if whole is None:
        raise MeterError("the text tells no drain: expected dumpsys batterystats with its Estimated power use, or its --checkin")
    names = [name for name, _ in users]
    try:
        capacity, computed, least = (float(whole[n]) for n in (1, 2, 3))
        most = float(whole[4]) if whole[4] else least
        charges = {name: float(charge) for name, charge in users if names.count(name) == 1}
    except ValueError as error:
        raise MeterError(f"batterystats has a figure that is no number ({error}): dump it again") from error
    return Drain(capacity, computed, (least, most), charges)


def _supplies(root: Path) -> list[Path]:
    try:
        return sorted(folder for folder in root.iterdir() if folder.is_dir())
    except OSError:
        return []


def _text(folder: Path, file: str) -> str | None:
    """None where there is no such file, or its gauge does not answer."""
    try:
        return (folder / file).read_text(encoding="ascii", errors="replace").strip("\0 \n")
    except OSError:
        return None


def _whole(text: str, where: Path) -> float:
    """The size of a whole number; the sign is the vendor's choice."""
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise MeterError(f"{where} holds {text[:40]!r}: expected a whole number")
    return abs(float(text))


def _plausible(value: float, limits: tuple[float, float], what: str, unit: str) -> float:
    if not limits[0] <= value <= limits[1]:
        raise MeterError(f"{what}, no plausible figure in {unit}: the gauge does not work, use another meter")
    return value
