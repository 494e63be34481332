"""Jetson's INA3221 power monitors (and Thor's INA238) read from sysfs: finer in time than tegrastats, and without its own cost.

Two drivers: NVIDIA's (JetPack 4 and before; iio devices with ``rail_name_N`` and ``in_powerN_input`` in mW, channels from 0 or from
1, and ``power1_input_N`` on TX1's old kernel), and mainline's hwmon (JetPack 5 on; ``inN_label``, ``inN_input`` mV times
``currN_input`` mA, no power file; channels 4 and up are shunts and sums). Which rails make the total is in ``boards.py``. A channel
without a bus voltage is off: a hole, never 0 W. Mainline says how long it averages (``update_interval``), NVIDIA's default is 0.42 s
(``window_s`` where you know better).

13 bits: 8 mV and 40 uV over the shunt, so that power comes in steps (some 40 mW at 5 V over 5 mOhm) and saturates at 163.8 mV.
Grade C. Does not know the over-current events, which are read elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.measure import boards
from edgejoule.measure.hwmon import chips, number, update_s, words
from edgejoule.records import Grade

INA3221_S = 0.422  # 64 samples of 1.1 + 1.1 ms on 3 channels
SYSTEMATIC = 0.05
TOP_V = 0.1638  # over the shunt: 4095 steps of 40 uV
AT_TOP = 0.999
THOR = "VDD_CPU_SOC_MSS"  # the rail by which a Thor is known: its INA238, without a label, is VIN


@dataclass(frozen=True, slots=True)
class Channel:
    """One rail: a power file and its unit in watts, or bus voltage (mV) and current (mA). ``top_ma`` is where the current saturates."""

    rail: str
    folder: Path
    power: Path | None = None
    unit_w: float = 1e-3
    volts: Path | None = None
    current: Path | None = None
    top_ma: float | None = None


@dataclass(frozen=True, slots=True)
class Ina3221:
    """The monitors below ``root``, read every ``period_s``; ``whole`` names an unknown board's rails that add up to the total."""

    root: str = "/sys"
    period_s: float = 0.1
    whole: str = ""
    window_s: float | None = None
    _channels: list[Channel] = field(default_factory=list, init=False, repr=False, compare=False)
    _totals: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _saturated: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.period_s <= 60 or not (self.window_s is None or 0 < self.window_s <= 60):
            raise ValueError("period_s and window_s must be above 0 and at most 60")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "power_w"

    @property
    def averaging_s(self) -> float:
        if self.window_s is not None:
            return self.window_s
        try:
            folders = {channel.folder for channel in self._open()}
        except MeterError:
            return INA3221_S
        return max(update_s(folder) or INA3221_S for folder in folders)

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        try:
            self._open()
        except MeterError:
            return boards.MODULE
        return boards.scope(self._totals)

    @property
    def systematic(self) -> float:
        return SYSTEMATIC

    def total(self, rail: str) -> bool:
        return rail in self._totals

    def probe(self) -> str | None:
        try:
            self.read()
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{rail: watts}; a rail beside the total that is off or fails is left out. Raises MeterError where one of the total fails."""
        watts: dict[str, float] = {}
        for channel in self._open():
            try:
                watts[channel.rail] = self._watts(channel)
            except MeterError:
                if self.total(channel.rail):
                    self._channels.clear()  # the driver may have been bound anew, below another number
                    raise
        return watts

    def doubts(self) -> dict[str, str]:
        """Rails whose current has stood at the top of the converter since the first read."""
        return {"saturated": "; ".join(self._saturated.values())} if self._saturated else {}

    def _watts(self, channel: Channel) -> float:
        if channel.power is not None:
            watts = number(channel.power) * channel.unit_w
            if watts == 0 and (channel.volts is None or number(channel.volts) <= 0) and self._suspect(channel):
                raise MeterError(f"the rail {channel.rail} reads 0 W without a voltage: its channel is off")
        else:
            assert channel.volts is not None and channel.current is not None
            millivolts, milliamperes = number(channel.volts), number(channel.current)
            if millivolts <= 0:
                raise MeterError(f"the rail {channel.rail} has {millivolts} mV: its channel is off")
            if channel.top_ma is not None and abs(milliamperes) >= AT_TOP * channel.top_ma:
                self._saturated.setdefault(channel.rail, f"{channel.rail} stood at {milliamperes} mA, the most its sensor can tell")
            watts = millivolts * milliamperes / 1e6
        if watts < 0:
            raise MeterError(f"the rail {channel.rail} reads {watts:g} W: expected none below 0")
        return watts

    def _suspect(self, channel: Channel) -> bool:
        """Whether 0 W cannot be true: the voltage says so, or the whole cannot draw nothing."""
        return channel.volts is not None or self._totals == [channel.rail]

    def _open(self) -> list[Channel]:
        if not self._channels:
            found = [*_iio(Path(self.root)), *_hwmon(self.root)]
            if not found:
                raise MeterError(
                    f"no INA3221 below {self.root}: Jetson boards with JetPack have one (not Jetson Nano 2GB); use another meter"
                )
            rails = [channel.rail for channel in found]
            twice = sorted({rail for rail in rails if rails.count(rail) > 1})
            if twice:
                raise MeterError(
                    f"several channels are called {', '.join(twice)}: nobody can tell them apart, use tegrastats or another meter"
                )
            totals = boards.chosen(rails, self.whole)
            if isinstance(totals, str):
                raise MeterError(totals)
            self._totals[:] = totals
            self._channels.extend(found)
        return self._channels


def _iio(root: Path) -> Iterator[Channel]:
    """Channels of NVIDIA's driver: below the device, or below its iio device."""
    driver = root / "bus/i2c/drivers/ina3221x"
    folders = {file.parent.resolve() for pattern in ("*/rail_name_*", "*/*/rail_name_*") for file in driver.glob(pattern)}
    for folder in sorted(folders):
        for file in sorted(folder.glob("rail_name_[0-9]")):
            n, rail = file.name[-1], words(file)
            power = next((f for f in (folder / f"in_power{n}_input", folder / f"power1_input_{n}") if f.exists()), None)
            volts = next((f for f in (folder / f"in_voltage{n}_input", folder / f"in1_input_{n}") if f.exists()), None)
            if power is not None and rail not in ("", boards.UNCONNECTED):
                yield Channel(rail, folder, power=power, volts=volts)


def _hwmon(root: str) -> Iterator[Channel]:
    """Channels 1 to 3 of mainline's driver that are connected; and on a Thor the one INA238, which is its input."""
    rails = []
    for _, folder in chips(root, "ina3221"):
        for label in sorted(folder.glob("in[123]_label")):
            n, rail = re.findall(r"\d", label.name)[0], words(label)
            if rail in ("", boards.UNCONNECTED):
                continue
            rails.append(rail)
            yield Channel(rail, folder, volts=folder / f"in{n}_input", current=folder / f"curr{n}_input", top_ma=_top_ma(folder, n))
    inputs = [folder for _, folder in chips(root, "ina238")]
    if THOR in rails and len(inputs) == 1:
        yield Channel("VIN", inputs[0], power=inputs[0] / "power1_input", unit_w=1e-6, volts=inputs[0] / "in1_input")


def _top_ma(folder: Path, n: str) -> float | None:
    """The current at which the converter is full, from the shunt's micro-ohms; None where the driver does not say."""
    try:
        microohms = number(folder / f"shunt{n}_resistor")
    except MeterError:
        return None
    return TOP_V / microohms * 1e9 if microohms > 0 else None
