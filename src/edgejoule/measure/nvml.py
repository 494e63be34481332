"""NVIDIA GPUs through NVML (package nvidia-ml-py). Grade C, scope: the GPU's board, which NVML says to about +-5 %.

Three figures must be told apart. The energy counter (millijoules since the driver was loaded, updates every 20-100 ms) is the best.
Instantaneous power updates every 0.1 s (A100 and H100 observe 25 of every 100 ms: long windows only). Averaged power, and
``power.draw`` from Ampere on, is a mean over the last second (arXiv 2312.02741; the one Ampere chip whose power.draw is instantaneous,
GA100, is taken for averaged too: a window that suits the slower figure suits the faster). ``source="auto"`` takes the counter where
there is one, with power beside it to be compared, else power, instant before averaged. ``index`` is NVML's own; without one it is the
first GPU of CUDA_VISIBLE_DEVICES, where CUDA programs run. A board that is cut into MIG slices is measured as a whole, with what
others do on it; a slice has no sensor of its own and is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from edgejoule.errors import MeterError
from edgejoule.measure.gpu import clock_doubts, clock_reasons, first_visible
from edgejoule.records import Grade

UPDATE_S, MEAN_OVER_S = 0.1, 1.0
POWER_AVERAGE, POWER_INSTANT = 185, 186  # NVML_FI_DEV_POWER_*, milliwatts
AMPERE = 7  # NVML_DEVICE_ARCH_AMPERE
NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED
PART_TIME = ((8, 0), (9, 0))
SYSTEMATIC = 0.05  # NVML's own word for fully supported boards
MOST_MW = 1e8  # 100 kW: what lies above is a mark for "not available"
# The members of the union nvmlValue_t, by nvmlValueType_t.
MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

Way = Literal["energy", "instant", "average", "usage"]  # usage: nvmlDeviceGetPowerUsage, which is power.draw


@dataclass(frozen=True, slots=True)
class _Open:
    """A GPU's handle, the figure that is read from it, and the time over which that is averaged or updated."""

    library: Any
    handle: Any
    way: Way
    averaging_s: float

    def read(self) -> float:
        """Joules or watts. Raises NVMLError, or ValueError for a number that is none."""
        nvml, handle = self.library, self.handle
        if self.way == "energy":
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        if self.way == "usage":
            milliwatts = float(nvml.nvmlDeviceGetPowerUsage(handle))
        else:
            milliwatts = _field_value(nvml, handle, POWER_INSTANT if self.way == "instant" else POWER_AVERAGE)
        if not 0 < milliwatts < MOST_MW:
            raise ValueError(f"it says {milliwatts:g} mW")  # a GPU that answers draws something: 0 means that nobody measured
        return milliwatts / 1e3


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
        return "energy_j" if self._figure()[0] == "energy" else "power_w"

    @property
    def averaging_s(self) -> float:
        return self._figure()[1]

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "gpu"

    @property
    def systematic(self) -> float:
        return SYSTEMATIC

    def probe(self) -> str | None:
        try:
            self.read()
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{"gpu": joules since the driver was loaded | watts}. Raises MeterError."""
        return {"gpu": self.ask(self._open())}

    def beside(self) -> Beside | None:
        """The power of the same GPU, where its counter is what ``read`` gives: two figures of one thing that should agree."""
        opened = self._open()
        if opened.way != "energy":
            return None
        power = _power(opened.library, opened.handle)
        return Beside(self, power) if isinstance(power, _Open) else None

    def ask(self, opened: _Open) -> float:
        """One figure of this GPU. Raises MeterError."""
        try:
            return opened.read()
        except (opened.library.NVMLError, AttributeError, ValueError) as error:
            raise MeterError(f"{self._gpu} could not be read ({error}): check it with nvidia-smi") from error

    def doubts(self) -> dict[str, str]:
        """What the GPU says of its clocks (throttled, power-capped), and whether power is seen part-time; empty where it does not say."""
        opened = self._open()
        nvml = opened.library
        found = clock_doubts(clock_reasons(nvml, opened.handle) or 0)
        return found | ({"part_time": "A100 or H100"} if opened.way != "energy" and _part_time(nvml, opened.handle) else {})

    @property
    def _gpu(self) -> str:
        return "the first GPU that CUDA sees" if self.index is None else f"GPU {self.index}"

    def _figure(self) -> tuple[Way, float]:
        """What is read and over how many seconds it is averaged; before NVML can be asked, what the source promises."""
        try:
            opened = self._open()
        except MeterError:
            return ("average", MEAN_OVER_S) if self.source == "power" else ("energy", UPDATE_S)
        return opened.way, opened.averaging_s

    def _open(self) -> _Open:
        if not self._opened:
            nvml = _library()
            try:
                handle = first_visible(nvml) if self.index is None else nvml.nvmlDeviceGetHandleByIndex(self.index)
            except nvml.NVMLError as error:
                raise MeterError(f"{self._gpu} is not there ({error}): nvidia-smi -L lists those there are") from error
            self._opened.append(self._choose(nvml, handle))
        return self._opened[0]

    def _choose(self, nvml: Any, handle: Any) -> _Open:
        if _is_slice(nvml, handle):
            raise MeterError(
                f"{self._gpu} is a MIG slice, which has no sensor of its own: measure its whole board, by number, as nvml(index=0)"
            )
        counter = _Open(nvml, handle, "energy", UPDATE_S)
        if self.source != "power" and _refusal(nvml, counter.read) is None:
            return counter
        power = _power(nvml, handle)
        if not isinstance(power, _Open):
            raise MeterError(self._blind(power))
        if self.source == "energy":
            raise MeterError(f'{self._gpu} has no energy counter (before Volta, or a virtual GPU): use nvml(source="power")')
        return power

    def _blind(self, error: Exception) -> str:
        if getattr(error, "value", NOT_SUPPORTED) != NOT_SUPPORTED:
            return f"{self._gpu} could not be read ({error}): check it with nvidia-smi"
        # Seen on Jetsons (NVML starts and then supports nothing), in virtual machines with a vGPU, and on cards without a sensor.
        return (
            f"{self._gpu} reports neither power nor energy to NVML ({error}): on a Jetson use the meter tegrastats or ina3221, "
            "measure a virtual GPU on its host, and a card without a sensor at the wall"
        )


@dataclass(frozen=True, slots=True)
class Beside:
    """The power of a board whose counter is the total: rail ``gpu/power``, read at the counter's beat."""

    board: Nvml
    opened: _Open

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "power_w"

    @property
    def period_s(self) -> float:
        return self.board.period_s

    @property
    def averaging_s(self) -> float:
        return self.opened.averaging_s

    @property
    def grade(self) -> Grade:
        return self.board.grade

    @property
    def scope(self) -> str:
        return self.board.scope

    @property
    def systematic(self) -> float:
        return SYSTEMATIC

    def probe(self) -> str | None:
        return self.board.probe()

    def read(self) -> dict[str, float]:
        """{"gpu/power": watts}. Raises MeterError."""
        return {"gpu/power": self.board.ask(self.opened)}


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


def _power(nvml: Any, handle: Any) -> _Open | Exception:
    """The best figure of power that the board answers with, or why it refuses the last of them."""
    error: Exception | None = None
    for way in (_Open(nvml, handle, "instant", UPDATE_S), _Open(nvml, handle, "average", MEAN_OVER_S), _usage(nvml, handle)):
        if (error := _refusal(nvml, way.read)) is None:
            return way
    assert error is not None
    return error


def _usage(nvml: Any, handle: Any) -> _Open:
    try:
        averaged = nvml.nvmlDeviceGetArchitecture(handle) >= AMPERE
    except (nvml.NVMLError, AttributeError):
        averaged = True  # the slower of the two
    return _Open(nvml, handle, "usage", MEAN_OVER_S if averaged else UPDATE_S)


def _part_time(nvml: Any, handle: Any) -> bool:
    """Whether the board's sensor looks at 25 of every 100 ms, as those of compute capability 8.0 and 9.0 do (arXiv 2312.02741)."""
    try:
        return tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) in PART_TIME
    except (nvml.NVMLError, AttributeError):
        return False


def _refusal(nvml: Any, ask: Callable[[], float]) -> Exception | None:
    """Why a question has no answer: not supported by the board, not known to this driver or package, or no number."""
    try:
        ask()
    except (nvml.NVMLError, AttributeError, ValueError) as error:
        return error
    return None


def _is_slice(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
    except (nvml.NVMLError, AttributeError):
        return False


def _field_value(nvml: Any, handle: Any, number: int) -> float:
    """One field of the GPU itself (scope 0, not of a module that holds a CPU too). Raises NVMLError, ValueError."""
    answer = nvml.nvmlDeviceGetFieldValues(handle, [number])[0]
    if answer.nvmlReturn != 0:
        raise nvml.NVMLError(answer.nvmlReturn)
    kind = int(answer.valueType)
    if not 0 <= kind < len(MEMBERS):
        raise ValueError(f"field {number} is of the unknown type {kind}")
    return float(getattr(answer.value, MEMBERS[kind]))
