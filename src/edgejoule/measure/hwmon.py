"""One power or energy input of any Linux hwmon chip: an INA219, INA226 or INA238 at a board's input, amd_energy, a GPU, a power meter.

``power*_input`` and ``power*_average`` are microwatts, ``energy*_input`` microjoules (Linux, hwmon sysfs interface). A chip is found by
its name and its input by a label, the chip's own label or its address on the bus, never by the number of its folder, which changes
with every boot. What the input measures is not written there: the user says it (``scope``). Where several fit, none is taken.

Grade B where an INA2xx is said to be at a board's input or beyond (external, uncalibrated: 1-3 %, mostly its shunt), else C. A counter
that falls was reset or wrapped at a place that nobody knows, and is refused from then on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.records import Grade

SCOPES = ("rail", "package", "gpu", "SoC", "module-in", "board-in", "wall")
EXTERNAL = ("board-in", "wall")
INA = re.compile(r"(ina2\d\d|ina2xx|ina7\d\d|sy24655|sq52206)")
UPDATE_S = 0.1  # of a chip that does not say
SYSTEMATIC_INA, SYSTEMATIC = 0.02, 0.05
FIGURE = re.compile(r"(-?[0-9]{1,20})(?:\s*m[WVA])?", re.ASCII | re.IGNORECASE)


def number(file: Path) -> int:
    """The whole number that a sysfs file holds, in the file's own unit. Raises MeterError."""
    text = words(file)
    found = FIGURE.fullmatch(text)
    if found is None:
        raise MeterError(f"{file} holds {text[:40]!r}: expected a whole number")
    return int(found[1])


def words(file: Path) -> str:
    """What a sysfs file says, in one line. Raises MeterError."""
    try:
        return " ".join(file.read_text(encoding="utf-8", errors="replace").split())
    except PermissionError as error:
        raise MeterError(f"{file} may not be read by this user: run as root, or allow it (sudo chmod a+r {file})") from error
    except OSError as error:
        raise MeterError(f"cannot read {file} ({error.strerror or error}): check it with cat") from error


def chips(root: str, name: str = "") -> tuple[tuple[str, Path], ...]:
    """(name, folder) of every hwmon chip below ``root``, or of those with a name; folders in the order of their numbers."""
    found: list[tuple[str, Path]] = []
    for folder in sorted(Path(root).glob("class/hwmon/hwmon*"), key=lambda path: (len(path.name), path.name)):
        try:
            found.append((words(folder / "name"), folder))
        except MeterError:  # a chip that went away meanwhile
            continue
    return tuple(chip for chip in found if name in ("", chip[0]))


def update_s(folder: Path) -> float | None:
    """A chip's ``update_interval`` in seconds; None where it does not say, or says 0."""
    try:
        milliseconds = number(folder / "update_interval")
    except MeterError:
        return None
    return milliseconds / 1e3 if milliseconds > 0 else None


@dataclass(frozen=True, slots=True)
class Input:
    """One figure of a chip. ``labels`` are all names it goes by; the first is the rail's."""

    chip: str
    labels: tuple[str, ...]
    file: Path
    quantity: Literal["energy_j", "power_w"]
    averaging_s: float
    volts: Path | None  # its bus voltage: 0 where the channel is off

    def __str__(self) -> str:
        return f'name="{self.chip}", label="{self.labels[0]}"'


@dataclass(frozen=True, slots=True)
class Hwmon:
    """The input of the chip ``name`` that goes by ``label``, read every ``period_s`` seconds; ``scope`` says what it measures."""

    name: str = ""
    label: str = ""
    scope: str = "rail"
    root: str = "/sys"
    period_s: float = 0.05
    _opened: list[Input] = field(default_factory=list, init=False, repr=False, compare=False)
    _last: list[float] = field(default_factory=list, init=False, repr=False, compare=False)  # joules; infinite for a broken counter

    def __post_init__(self) -> None:
        if self.scope not in SCOPES or not 0 < self.period_s <= 60:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, and period_s above 0 and at most 60")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        found = self._peek()
        return found.quantity if found else "power_w"

    @property
    def averaging_s(self) -> float:
        found = self._peek()
        return found.averaging_s if found else UPDATE_S

    @property
    def grade(self) -> Grade:
        return "B" if self.scope in EXTERNAL and self._is_ina() else "C"

    @property
    def systematic(self) -> float:
        return SYSTEMATIC_INA if self._is_ina() else SYSTEMATIC

    def probe(self) -> str | None:
        try:
            self.read()
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{rail: joules since whenever | watts}. Raises MeterError."""
        found = self._open()
        try:
            value = number(found.file) / 1e6
            if value < 0:
                raise MeterError(f"{found.file} holds {value:g} {'J' if found.quantity == 'energy_j' else 'W'}: expected none below 0")
            if value == 0 and found.volts is not None and number(found.volts) == 0:
                raise MeterError(f"the channel {found} is off: {found.volts} holds 0 mV")
        except MeterError:
            if not self._last:
                self._opened.clear()  # its folder may have another number now
            raise
        if found.quantity == "energy_j":
            self._climb(found, value)
        return {found.labels[0]: value}

    def _climb(self, found: Input, joules: float) -> None:
        last = self._last[0] if self._last else joules
        self._last[:] = [joules if joules >= last else math.inf]
        if joules < last:
            raise MeterError(f"the counter {found} fell: it was reset or wrapped, and energy is lost; open the meter again")

    def _is_ina(self) -> bool:
        found = self._peek()
        return INA.fullmatch(found.chip if found else self.name) is not None

    def _peek(self) -> Input | None:
        try:
            return self._open()
        except MeterError:
            return None

    def _open(self) -> Input:
        if not self._opened:
            every = [found for chip, folder in chips(self.root) for found in _inputs(chip, folder)]
            fitting = [found for found in every if self.name in ("", found.chip) and (not self.label or self.label in found.labels)]
            if len(fitting) != 1:
                raise MeterError(self._unclear(every, fitting))
            self._opened.append(fitting[0])
        return self._opened[0]

    def _unclear(self, every: list[Input], fitting: list[Input]) -> str:
        if not every:
            return f"no chip below {self.root}/class/hwmon measures power or energy: attach one and load its driver, or use another meter"
        if fitting:
            return f"several inputs fit: choose one of hwmon({'), hwmon('.join(map(str, fitting))})"
        return f"no input fits hwmon(name={self.name!r}, label={self.label!r}): there are hwmon({'), hwmon('.join(map(str, every))})"


def _inputs(chip: str, folder: Path) -> Iterator[Input]:
    """The figures of a chip; a counter stands for the power of the same number, an instantaneous power for its average."""
    taken: set[str] = set()
    for pattern, quantity in (("energy*_input", "energy_j"), ("power*_input", "power_w"), ("power*_average", "power_w")):
        for file in sorted(folder.glob(pattern)):
            kind, index = re.sub(r"\d+.*", "", file.name), "".join(re.findall(r"^[a-z]+(\d+)_", file.name))
            if not index or index in taken:
                continue
            taken.add(index)
            interval = update_s(folder) if pattern != "power*_average" else _average_s(folder, index)
            volts = folder / "in1_input"
            yield Input(
                chip,
                _labels(folder, kind, index),
                file,
                "energy_j" if quantity == "energy_j" else "power_w",
                interval or UPDATE_S,
                volts if INA.fullmatch(chip) and volts.exists() else None,
            )


def _labels(folder: Path, kind: str, index: str) -> tuple[str, ...]:
    """The input's label, the chip's own, its address on the bus (1-0040), and what the input is called: those there are."""
    found = []
    for file in (folder / f"{kind}{index}_label", folder / "label"):
        try:
            found.append(words(file))
        except MeterError:
            continue
    device = folder / "device"
    address = [device.resolve().name] if device.exists() else []
    return tuple(dict.fromkeys(label for label in (*found, *address, f"{kind}{index}") if label))


def _average_s(folder: Path, index: str) -> float | None:
    try:
        return number(folder / f"power{index}_average_interval") / 1e3
    except MeterError:
        return None
