"""NVIDIA GPUs through NVML (package nvidia-ml-py). Grade C, scope: the GPU's board, which NVML says to about +-5 %.

Three figures must be told apart. The energy counter (millijoules since the driver was loaded, updates every 20-100 ms) is the best.
Instantaneous power updates every 0.1 s (A100 and H100 observe 25 of every 100 ms: long windows only). ``power.draw`` is a mean
over the last second from Ampere on (arXiv 2312.02741). ``source="auto"`` takes the counter where there is one, else power, instant
before averaged. ``index`` is NVML's own; without one it is the first GPU of CUDA_VISIBLE_DEVICES, where CUDA programs run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

from edgejoule.errors import MeterError
from edgejoule.measure.gpu import first_visible
from edgejoule.records import Grade

UPDATE_S, MEAN_OVER_S = 0.1, 1.0
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, milliwatts
AMPERE = 7  # NVML_DEVICE_ARCH_AMPERE
HOT = 0x08 | 0x20 | 0x40 | 0x80  # hardware slowdown, software and hardware thermal, power brake
CAPPED = 0x04  # software power cap

Way = Literal["energy", "instant", "averaged", "usage"]  # usage: power.draw before Ampere, not averaged


@dataclass(frozen=True, slots=True)
class _Open:
    """A GPU's handle and the figure that is read from it."""

    library: Any
    handle: Any
    way: Way


@dataclass(frozen=True, slots=True)
class Nvml:
    """One GPU by NVML's ``index``, or the first that CUDA sees; ``source``: auto, the energy counter, or power.

    Read every ``period_s`` seconds.
    """

    index: int | None = None
    source: Literal["auto", "energy", "power"] = "auto"
    period_s: float = 0.05
    _opened: list[_Open] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.index or 0) < 0 or not self.period_s > 0:
            raise ValueError("index must be at least 0 and period_s above 0")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j" if self._way() == "energy" else "power_w"

    @property
    def averaging_s(self) -> float:
        return MEAN_OVER_S if self._way() == "averaged" else UPDATE_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "gpu"

    def probe(self) -> str | None:
        try:
            self.read()
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{"gpu": joules since the driver was loaded | watts}. Raises MeterError."""
        opened = self._open()
        nvml, handle = opened.library, opened.handle
        try:
            if opened.way == "energy":
                return {"gpu": nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}
            if opened.way == "instant":
                return {"gpu": _instant_mw(nvml, handle) / 1e3}
            return {"gpu": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3}
        except nvml.NVMLError as error:
            raise MeterError(f"{self._gpu} could not be read ({error}): check it with nvidia-smi") from error

    def doubts(self) -> dict[str, str]:
        """What the GPU says of its clocks now: throttled, or held by a power cap; empty where it does not say."""
        opened = self._open()
        nvml = opened.library
        try:
            reasons = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(opened.handle))
        except (nvml.NVMLError, AttributeError):  # not all boards say, and the function was renamed: absence raises no doubt
            return {}
        found = {"throttled": f"GPU clock reasons {reasons & HOT:#x}"} if reasons & HOT else {}
        return found | ({"power_capped": "GPU software power cap"} if reasons & CAPPED else {})

    @property
    def _gpu(self) -> str:
        return "the first GPU that CUDA sees" if self.index is None else f"GPU {self.index}"

    def _way(self) -> Way:
        """What is read; before NVML can be asked, what the source promises."""
        try:
            return self._open().way
        except MeterError:
            return "averaged" if self.source == "power" else "energy"

    def _open(self) -> _Open:
        if not self._opened:
            nvml = _library()
            try:
                handle = first_visible(nvml) if self.index is None else nvml.nvmlDeviceGetHandleByIndex(self.index)
            except nvml.NVMLError as error:
                raise MeterError(f"{self._gpu} is not there ({error}): nvidia-smi -L lists those there are") from error
            self._opened.append(_Open(nvml, handle, self._choose(nvml, handle)))
        return self._opened[0]

    def _choose(self, nvml: Any, handle: Any) -> Way:
        if self.source != "power" and _answers(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle):
            return "energy"
        if self.source == "energy":
            raise MeterError(f'{self._gpu} has no energy counter (before Volta, or a virtual GPU): use nvml(source="power")')
        if _answers(nvml, _instant_mw, nvml, handle):
            return "instant"
        if not _answers(nvml, nvml.nvmlDeviceGetPowerUsage, handle):
            raise MeterError(f"{self._gpu} does not report power or energy (a virtual GPU or a Jetson): use a whole GPU or another meter")
        try:
            return "averaged" if nvml.nvmlDeviceGetArchitecture(handle) >= AMPERE else "usage"
        except (nvml.NVMLError, AttributeError):
            return "averaged"  # the slower of the two: a window that suits it suits the other


def _library() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise MeterError("the package nvidia-ml-py is not installed: pip install 'edgejoule[nvml]'") from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise MeterError(f"NVML does not start ({error}): an NVIDIA GPU and its driver are needed, nvidia-smi must work") from error
    return nvml


def _answers(nvml: Any, ask: Any, *arguments: Any) -> bool:
    try:
        ask(*arguments)
    except (nvml.NVMLError, AttributeError):  # not supported by the board, or not known to this driver or package
        return False
    return True


def _instant_mw(nvml: Any, handle: Any) -> float:
    value = nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT])[0]
    if value.nvmlReturn != 0:
        raise nvml.NVMLError(value.nvmlReturn)
    return float(value.value.uiVal)
