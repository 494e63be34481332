"""The sensors against fakes that behave like the real things, faults included; and how a meter is opened and chosen."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import registry
from edgejoule.errors import MeterError, SpecError, UnknownNameError
from edgejoule.measure import meters
from edgejoule.measure.energy import integrate, window_energy
from edgejoule.measure.meters import choose_meter, open_meter, survey
from edgejoule.measure.nvml import Nvml
from edgejoule.measure.rapl import Rapl
from edgejoule.measure.replay import Replay, read_power
from edgejoule.records import Phase
from edgejoule.seams import Sensor
from tests.fakes.measuring import set_energy, write_domain

# ---------------------------------------------------------------- rapl


def tree(root: Path) -> Path:
    """A laptop: package with core, uncore and dram below it, psys beside it, the mmio copy of the package, and the control folder."""
    write_domain(root / "intel-rapl:0", "package-0", 65_997_277_274)
    for n, name in enumerate(("core", "uncore", "dram")):
        write_domain(root / "intel-rapl:0" / f"intel-rapl:0:{n}", name, 1000 + n, 65_712_999_613)
        write_domain(root / f"intel-rapl:0:{n}", name, 1000 + n, 65_712_999_613)  # as the class folder lists it too
    write_domain(root / "intel-rapl:1", "psys", 117_870_082_040)
    write_domain(root / "intel-rapl-mmio:0", "package-0", 65_997_277_274)
    (root / "intel-rapl").mkdir()
    return root


def test_rapl_finds_domains_by_name_and_counts_nothing_twice(tmp_path: Path) -> None:
    sensor = Rapl(str(tree(tmp_path)))
    assert sensor.probe() is None
    rails = sensor.read()
    assert set(rails) == {"package-0", "package-0/core", "package-0/uncore", "package-0/dram", "psys"}
    assert [rail for rail in rails if sensor.total(rail)] == ["package-0"]
    assert set(rails.values()) == {0.0}


def test_rapl_counts_every_wrap(tmp_path: Path) -> None:
    top = 1_000_000
    write_domain(tmp_path / "intel-rapl:0", "package-0", 900_000, top)
    sensor, energy, joules = Rapl(str(tmp_path)), 900_000, [0.0]
    joules[0] = sensor.read()["package-0"]
    for _ in range(40):  # 28 J over a counter of one joule
        energy = (energy + 700_000) % top
        set_energy(tmp_path / "intel-rapl:0", energy)
        sensor._read_at["package-0"] = time.perf_counter()  # the guard would say, rightly, that a joule may wrap in a millisecond
        joules.append(sensor.read()["package-0"])
    assert joules[-1] == pytest.approx(28.0) and all(a < b for a, b in itertools.pairwise(joules))


def test_rapl_at_a_known_power_through_the_polling_thread(tmp_path: Path) -> None:
    folder, top, watts, halt = tmp_path / "intel-rapl:0", 300_000_000, 150.0, threading.Event()
    write_domain(folder, "package-0", top - 10_000_000, top)  # wraps after 67 ms
    begin = time.perf_counter()

    def work() -> None:
        while not halt.wait(0.001):
            set_energy(folder, (top - 10_000_000 + int(1e6 * watts * (time.perf_counter() - begin))) % top)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        meter = open_meter(f"rapl(root={str(tmp_path)!r}, period_s=0.01)")
        assert meter is not None
        meter.start()
        time.sleep(0.6)
        (trace,) = meter.stop()
    finally:
        halt.set()
        thread.join()
    start, stop = trace.times_s[0] + 0.02, trace.times_s[-1] - 0.02
    joules = integrate(trace, start, stop)
    assert joules is not None and joules / (stop - start) == pytest.approx(watts, rel=0.05)


def test_a_read_that_fails_is_an_error_and_never_a_wrap(tmp_path: Path) -> None:
    write_domain(tmp_path / "intel-rapl:0", "package-0", 5_000_000)
    sensor = Rapl(str(tmp_path))
    sensor.read()
    for text in ("", "-1", "none"):
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text(text)
        with pytest.raises(MeterError, match="expected microjoules"):
            sensor.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(MeterError, match="cannot read"):
        sensor.read()
    set_energy(tmp_path / "intel-rapl:0", 6_000_000)
    assert sensor.read() == {"package-0": 1.0}


def test_a_gap_in_which_a_counter_may_wrap_twice_is_an_error(tmp_path: Path) -> None:
    write_domain(tmp_path / "intel-rapl:0", "package-0", 1, 65_532_610_987)  # 65 s at 1 kW
    sensor = Rapl(str(tmp_path))
    sensor.read()
    sensor._read_at["package-0"] -= 70
    for _ in range(2):  # and stays one: joules may be missing from all that follows
        with pytest.raises(MeterError, match="wrapped twice"):
            sensor.read()
    for period in (0, -1, 11):
        with pytest.raises(SpecError, match="period_s"):
            registry.create("meter", f"rapl(period_s={period})")


def test_a_rail_beside_the_total_may_fail_and_the_total_goes_on(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "intel-rapl:0" / "intel-rapl:0:1" / "energy_uj").unlink()  # uncore was never readable
    sensor = Rapl(str(tmp_path))
    assert sensor.probe() is None and set(sensor.read()) == {"package-0", "package-0/core", "package-0/dram", "psys"}
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # psys goes in mid-run
    set_energy(tmp_path / "intel-rapl:0", 65_997_277_274 + 2_000_000)
    assert sensor.read() == {"package-0": 2.0, "package-0/core": 0.0, "package-0/dram": 0.0}
    set_energy(tmp_path / "intel-rapl:1", 117_870_082_040 + 5_000_000)
    assert sensor.read()["psys"] == 5.0


def test_mirrored_dies_are_one_and_two_sockets_are_two(tmp_path: Path) -> None:
    for n in range(2):
        write_domain(tmp_path / f"intel-rapl:{n}", f"package-{n}", 64_930_873_566, 65_532_610_987)
    assert set(Rapl(str(tmp_path)).read()) == {"package-0"}
    write_domain(tmp_path / "intel-rapl:1", "package-1", 31_041_919_121, 65_532_610_987)
    assert set(Rapl(str(tmp_path)).read()) == {"package-0", "package-1"}


def test_rapl_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not there" in str(Rapl(str(tmp_path / "no")).probe())
    assert "modprobe" in str(Rapl(str(tmp_path)).probe())
    tree(tmp_path)

    opened = Path.open

    def refuse(self: Path, *args: Any, **more: Any) -> Any:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom nothing is denied
    assert "sudo chmod" in str(Rapl(str(tmp_path)).probe())


# ---------------------------------------------------------------- nvml


SOURCES: tuple[Any, ...] = ("auto", "energy", "power")


class Value(ctypes.Union):
    """nvmlValue_t: which member holds the number is said beside it."""

    _fields_ = (
        ("dVal", ctypes.c_double),
        ("uiVal", ctypes.c_uint),
        ("ulVal", ctypes.c_ulong),
        ("ullVal", ctypes.c_ulonglong),
        ("sllVal", ctypes.c_longlong),
        ("siVal", ctypes.c_int),
        ("usVal", ctypes.c_ushort),
    )


class FieldValue(ctypes.Structure):
    """nvmlFieldValue_t as nvidia-ml-py 12.535 and 13 declare it."""

    _fields_ = (
        ("fieldId", ctypes.c_uint32),
        ("scopeId", ctypes.c_uint32),
        ("timestamp", ctypes.c_int64),
        ("latencyUsec", ctypes.c_int64),
        ("valueType", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_uint),
        ("value", Value),
    )


class FakeNvml(types.ModuleType):
    """nvidia-ml-py as it behaves: codes as exceptions, milliwatts and millijoules, field values with a type and a code of their own."""

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            self.value = value

        def __str__(self) -> str:
            return {3: "Not Supported", 9: "Driver Not Loaded", 13: "Function Not Found", 15: "GPU is lost"}.get(
                self.value, "Unknown Error"
            )

    def __init__(self, can: str = "energy instant average usage", arch: int = 8, start: int = 0, **numbers: int) -> None:
        super().__init__("pynvml")
        self.can = set(can.split())
        self.arch, self.begin, self.reasons, self.lost = arch, start, 0, False
        self.numbers = {"energy": 7_500, "usage": 42_000, "instant": 43_000, "average": 44_000, "type": 1} | numbers

    def nvmlInit(self) -> None:  # noqa: N802
        if self.begin:
            raise self.NVMLError(self.begin)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index > 0:
            raise self.NVMLError(6)
        return index

    def _answer(self, what: str) -> int:
        if self.lost or what not in self.can:
            raise self.NVMLError(15 if self.lost else 3)
        return self.numbers[what]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        return self._answer("energy")

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self._answer("usage")

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> Any:  # noqa: N802
        values = (FieldValue * len(fields))()
        for value, number in zip(values, fields, strict=True):
            what = {185: "average", 186: "instant"}[number]
            value.fieldId, value.value.ullVal = number, 0xDEADBEEF_DEADBEEF  # what the driver does not write is not zero
            value.nvmlReturn = 15 if self.lost else 0 if what in self.can else 3
            if value.nvmlReturn == 0:
                value.valueType = self.numbers["type"]
                setattr(
                    value.value,
                    ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")[self.numbers["type"] % 7],
                    self.numbers[what],
                )
        return values

    def nvmlDeviceGetArchitecture(self, handle: int) -> int:  # noqa: N802
        if self.arch < 0:
            raise self.NVMLError(13)
        return self.arch

    def nvmlDeviceIsMigDeviceHandle(self, handle: int) -> Any:  # noqa: N802
        return ctypes.c_uint("slice" in self.can)  # and not its value

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        if "events" in self.can:
            raise self.NVMLError(13)
        return self.reasons

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:  # noqa: N802
        if "events" not in self.can:
            raise self.NVMLError(13)
        return self.reasons


@pytest.mark.parametrize(
    ("fake", "source", "quantity", "averaging_s", "value"),
    [
        (FakeNvml(), "auto", "energy_j", 0.1, 7.5),
        (FakeNvml(), "energy", "energy_j", 0.1, 7.5),
        (FakeNvml(), "power", "power_w", 0.1, 43.0),
        (FakeNvml("instant average usage"), "auto", "power_w", 0.1, 43.0),
        (FakeNvml("average usage"), "auto", "power_w", 1.0, 44.0),
        (FakeNvml("usage"), "auto", "power_w", 1.0, 42.0),  # a mean over a second, from Ampere on
        (FakeNvml("usage", arch=6), "auto", "power_w", 0.1, 42.0),
        (FakeNvml("usage", arch=-1), "auto", "power_w", 1.0, 42.0),
        (FakeNvml("instant usage", instant=0), "auto", "power_w", 1.0, 42.0),  # 0 mW is no answer
        *((FakeNvml("instant", type=kind), "auto", "power_w", 0.1, 43.0) for kind in (0, 2, 3, 4, 5)),
        (FakeNvml("instant usage", type=7), "auto", "power_w", 1.0, 42.0),  # a type that nobody knows
    ],
)
def test_nvml_tells_its_figures_apart(
    fake: FakeNvml, source: Any, quantity: str, averaging_s: float, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    sensor = Nvml(source=source)
    assert sensor.probe() is None and sensor.systematic == 0.05
    assert (sensor.quantity, sensor.averaging_s, sensor.read()) == (quantity, averaging_s, {"gpu": value})


@pytest.mark.parametrize(
    ("can", "watts", "averaging_s"), [("energy instant average", 43.0, 0.1), ("energy average", 44.0, 1.0), ("energy", None, None)]
)
def test_nvml_records_power_beside_its_counter(
    can: str, watts: float | None, averaging_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(can))
    meter = open_meter("nvml(period_s=0.01)")
    assert meter is not None
    meter.start()
    time.sleep(0.05)
    counter, *beside = meter.stop()
    assert (counter.rail, counter.quantity, counter.total, counter.systematic) == ("gpu", "energy_j", True, 0.05)
    if watts is None:
        assert not beside
        return
    (power,) = beside
    assert (power.rail, power.quantity, power.total, power.averaging_s) == ("gpu/power", "power_w", False, averaging_s)
    assert set(power.values) == {watts} and (power.grade, power.scope, power.systematic, power.period_s) == ("C", "gpu", 0.05, 0.01)


def test_where_power_is_all_there_is_nothing_is_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert Nvml(source="power").beside() is None and isinstance(Nvml().beside(), Sensor)


@pytest.mark.parametrize(
    ("fake", "sensor", "sentence"),
    [
        (FakeNvml(start=9), Nvml(), "NVML does not start .Driver Not Loaded.*nvidia-smi"),
        # A Jetson, or a virtual GPU: NVML initialises, finds one GPU, and supports nothing.
        *((FakeNvml(""), Nvml(source=source), "neither power nor energy.*Not Supported.*Jetson.*virtual GPU") for source in SOURCES),
        (FakeNvml("instant usage", instant=0, usage=0), Nvml(), "neither power nor energy"),
        (FakeNvml("slice energy instant usage"), Nvml(), "MIG slice.*whole board"),  # some drivers answer with the whole board's figure
        (FakeNvml("usage"), Nvml(source="energy"), 'no energy counter.*source="power"'),
        (FakeNvml(), Nvml(index=1), "GPU 1 is not there"),
        (None, Nvml(), "pip install"),
    ],
)
def test_nvml_says_what_is_missing(fake: Any, sensor: Nvml, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert re.search(sentence, str(sensor.probe()))
    assert sensor.quantity in ("energy_j", "power_w") and sensor.averaging_s > 0  # its facts can be asked all the same


def test_a_gpu_that_is_lost_is_not_one_without_a_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    fake.lost = True
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert "could not be read (GPU is lost)" in str(Nvml().probe())


@pytest.mark.parametrize("can", ["energy instant", "energy instant events"])  # the old name of the question, and the new one
def test_nvml_lost_half_way_and_throttled(can: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(can)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    sensor = Nvml()
    sensor.read()
    for reasons, said in ((0x0, set()), (0x113, set()), (0x4, {"power_capped"}), (0x44, {"throttled", "power_capped"})):
        fake.reasons = reasons
        assert set(sensor.doubts()) == said
    for reasons in (0x8, 0x20, 0x40, 0x80):
        fake.reasons = reasons
        assert set(sensor.doubts()) == {"throttled"}
    beside = sensor.beside()
    assert beside is not None
    fake.lost = True
    for one in (sensor, beside):
        with pytest.raises(MeterError, match="GPU is lost"):
            one.read()


def test_a_package_that_knows_neither_name_of_the_clock_reasons_raises_no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(FakeNvml):
        nvmlDeviceGetCurrentClocksThrottleReasons = nvmlDeviceGetCurrentClocksEventReasons = property()  # type: ignore[assignment]  # noqa: N815
        nvmlDeviceIsMigDeviceHandle = nvmlDeviceGetFieldValues = property()  # type: ignore[assignment]  # noqa: N815

    monkeypatch.setitem(sys.modules, "pynvml", Bare())
    sensor = Nvml(source="power")
    assert sensor.doubts() == {} and sensor.read() == {"gpu": 42.0}


class FourGpus(FakeNvml):
    """A number of each: its milliwatts tell which one was read."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}7e7-aa"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        raise self.NVMLError(6)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        return 1000 * handle


@pytest.mark.parametrize(
    ("visible", "index", "gpu"),
    [(None, None, 0), ("2", None, 2), ("3,1", None, 3), ("GPU-17e7", None, 1), ("2", 1, 1), ("", None, 0), ("GPU-9", None, None)],
)
def test_nvml_watches_the_gpu_that_computes(
    visible: str | None, index: int | None, gpu: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FourGpus())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if gpu is None:
        assert "the first GPU that CUDA sees is not there" in str(Nvml(index=index).probe())
    else:
        assert Nvml(index=index).read() == {"gpu": float(gpu)}


# ---------------------------------------------------------------- estimate and replay


def test_the_estimate_follows_cpu_time_and_is_grade_d() -> None:
    meter = open_meter("estimate(core_w=10.0, idle_w=3.0, period_s=0.01)")
    assert meter is not None and meter.probe() is None
    meter.start()
    time.sleep(0.3)
    cpu, wall = time.process_time(), time.perf_counter()
    while time.process_time() - cpu < 0.3:
        sum(range(1000))
    spent = time.perf_counter() - wall
    time.sleep(0.3)
    (trace,) = meter.stop()
    window = Phase("window", wall, wall + spent)
    idle = Phase("idle_before", wall - 0.25, wall), Phase("idle_after", wall + spent, wall + spent + 0.25)
    energy = window_energy([trace], window, *idle)
    assert trace.grade == "D" and trace.scope == "process" and trace.source == "estimate(core_w=10.0, idle_w=3.0, period_s=0.01)"
    assert energy.net_energy_j == pytest.approx(3.0, rel=0.15) and energy.idle_w == pytest.approx(3.0, abs=0.5)


def recording(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_replay_plays_from_start_and_starts_over(tmp_path: Path) -> None:
    path = recording(tmp_path / "a.csv", "time_s,power_w,note\n5.0,1,x\n5.1,2,y\n\n5.2,3,z\n")
    trace = Replay(path).played([5.0, 5.1, 5.2], [1.0, 2.0, 3.0], 100.0, 100.65)
    assert list(trace.values) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert list(trace.times_s) == pytest.approx([100 + 0.1 * i for i in range(8)])
    once = Replay(path, loop=False).played([5.0, 5.1, 5.2], [1.0, 2.0, 3.0], 100.0, 100.65)
    assert list(once.values) == [1, 2, 3]
    meter = open_meter(f"replay(path={path!r})")
    assert meter is not None and meter.probe() is None
    before = time.perf_counter()
    meter.start()
    time.sleep(0.25)
    (live,) = meter.stop()
    assert before <= live.times_s[0] and live.times_s[-1] >= before + 0.25 and list(live.values[:3]) == [1, 2, 3]
    assert registry.create("meter", live.source) == Replay(path)
    with pytest.raises(MeterError, match="already started"):
        meter.start()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: expected one column 'time_s', found nothing"),
        ("time,power_w\n0,1\n", "line 1: expected one column 'time_s', found time, power_w"),
        ("time_s,power_w,power_w\n0,1,2\n", "line 1: expected one column 'power_w'"),
        ("time_s,power_w\n0,1\n1,x\n", "line 3: 'x' is not a finite number"),
        ("time_s,power_w\n0,1\n1,nan\n", "line 3: 'nan' is not a finite number"),
        ("time_s,power_w\n0,1\n1\n", "line 3: '' is not a finite number"),
        ("time_s,power_w\n0,1\n\n0,2\n", "line 4: time 0 s does not come after 0 s"),
        ("time_s,power_w\n0,1\n", "holds 1 samples"),
    ],
)
def test_a_recording_that_cannot_be_played_names_the_line(text: str, sentence: str, tmp_path: Path) -> None:
    meter = Replay(recording(tmp_path / "a.csv", text))
    assert sentence in str(meter.probe())


def test_a_recording_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "no recording at" in str(Replay(str(tmp_path / "no.csv")).probe())
    assert "cannot read" in str(Replay(str(tmp_path)).probe())
    (tmp_path / "b.csv").write_bytes(b"time_s,power_w\n\xff\xfe,1\n")
    assert "UTF-8" in str(Replay(str(tmp_path / "b.csv")).probe())


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200), st.text(alphabet='0123456789.,-e\n\r" x', max_size=200).map(lambda t: b"time_s,power_w\n" + t.encode())
    )
)
def test_any_file_is_samples_or_a_meter_error(content: bytes) -> None:
    path = Path(FUZZ.name) / "fuzz.csv"
    path.write_bytes(content)
    try:
        times, powers = read_power(path, "time_s", "power_w")
    except MeterError:
        return
    assert len(times) == len(powers) >= 2 and all(a < b for a, b in itertools.pairwise(times))


@pytest.fixture(scope="module", autouse=True)
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FUZZ.name = str(tmp_path_factory.mktemp("fuzz"))


FUZZ = types.SimpleNamespace(name="")

# ---------------------------------------------------------------- opening and choosing


def test_opening() -> None:
    assert open_meter("none") is None and open_meter("") is None
    with pytest.raises(UnknownNameError, match="estimate"):
        open_meter("estimat")
    with pytest.raises(SpecError, match="needs path"):
        open_meter("replay")


def patch(monkeypatch: pytest.MonkeyPatch, root: Path, fake: Any) -> None:
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (str(root), 0.05))
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def test_the_best_meter_that_covers_the_device_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, tree(tmp_path), FakeNvml())
    assert choose_meter("cpu")[0] == "rapl" and choose_meter("cuda")[0] == "nvml"
    assert "grade C" in choose_meter("cpu")[1] and "gpu" in choose_meter("cuda")[1]


def test_where_nothing_covers_the_device_it_is_an_estimate_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch, tmp_path / "no", FakeNvml())
    chosen, why = choose_meter("cpu")
    assert chosen == "estimate" and "no sensor here covers the cpu (edgejoule doctor says why)" in why and "grade D" in why
    patch(monkeypatch, tree(tmp_path), FakeNvml(start=9))
    chosen, why = choose_meter("cuda")
    assert chosen == "estimate" and "does not see the cuda device" in why


def test_the_survey_has_a_row_for_every_meter() -> None:
    rows = {row["name"]: row for row in survey()}
    assert set(rows) == set(registry.names("meter"))
    assert rows["estimate"] == {"name": "estimate", "ok": True, "remedy": ""}
    assert all(row["ok"] or row["remedy"] for row in rows.values()) and "path" in rows["replay"]["remedy"]


def test_a_leaf_that_is_no_meter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"odd": "types:SimpleNamespace"})
    with pytest.raises(MeterError, match="neither"):
        meters.open_meter("odd")


@pytest.mark.parametrize(
    ("capability", "source", "said"), [((8, 0), "power", True), ((9, 0), "power", True), ((8, 6), "power", False), ((8, 0), "auto", False)]
)
def test_a_gpu_whose_power_is_seen_part_time_says_so(
    capability: tuple[int, int], source: Any, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNvml()
    fake.nvmlDeviceGetCudaComputeCapability = lambda handle: list(capability)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert ("part_time" in Nvml(source=source).doubts()) is said


def test_the_gpu_that_torch_computes_on_is_the_one_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule.measure import gpu

    class Cuda:
        uuid = "1b2c"

        def current_device(self) -> int:
            return 1

        def get_device_properties(self, index: int) -> Any:
            return self if index == 1 else None

    class Library:
        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
            return uuid

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
            return index

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu.first_visible(Library()) == 0
    monkeypatch.setattr(gpu, "torch_cuda", Cuda)
    assert gpu.first_visible(Library()) == "GPU-1b2c"
