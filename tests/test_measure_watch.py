"""Clocks and temperatures from a fake /sys and a fake NVML: what vanishes is absent, and the cost is known."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from edgejoule.measure.watch import SLOW, Watch, gpu_doubts, open_gpu
from edgejoule.records import Series
from tests.fakes.machine import CPU, cpufreq, nvml, put, zone


def watched(watch: Watch, looks: int = SLOW + 1) -> dict[str, Series]:
    """Let the thread look as often as that (a minute at most), then stop."""
    watch.start()
    deadline = time.monotonic() + 60
    while watch._looks < looks and watch._thread is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    return {series.name: series for series in watch.stop()}


def test_a_machine_that_shows_nothing_has_no_thread_and_no_series(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.start()
    assert watch._thread is None and watch.stop() == () and watch.cores == 0.0


def test_the_fastest_clock_and_the_hottest_zone(tmp_path: Path) -> None:
    for cpu, khz in ((0, 600000), (1, 1800000), (2, 0)):
        cpufreq(tmp_path, cpu, scaling_cur_freq=khz)
    zone(tmp_path, 0, 41.5)
    zone(tmp_path, 1, 100.0, "PMIC-Die")
    found = watched(Watch(tmp_path, period_s=0.01))
    assert list(found) == ["clock", "temperature"]
    assert (found["clock"].unit, set(found["clock"].values)) == ("Hz", {1.8e9})
    assert (found["temperature"].unit, set(found["temperature"].values)) == ("C", {41.5})
    clock, temperature = len(found["clock"].times_s), len(found["temperature"].times_s)
    assert clock >= SLOW + 1 and temperature == -(-clock // SLOW)
    assert list(found["clock"].times_s) == sorted(found["clock"].times_s)


def test_stamps_are_on_the_trial_s_clock_and_the_cost_is_known(tmp_path: Path) -> None:
    cpufreq(tmp_path, 0, scaling_cur_freq=1000000)
    ticks = iter(range(10**6))
    watch = Watch(tmp_path, clock=lambda: float(next(ticks)), period_s=0.01)
    found = watched(watch)
    assert list(found["clock"].times_s)[:3] == [0.5, 2.5, 4.5]  # halfway between before and after the reading
    assert 0 < watch.cores < 1


def test_cores_that_share_a_clock_are_read_once(tmp_path: Path) -> None:
    put(tmp_path, {f"{CPU}/cpufreq/policy0/scaling_cur_freq": "1000000\n"})
    for cpu in range(4):
        (tmp_path / f"{CPU}/cpu{cpu}").mkdir()
        (tmp_path / f"{CPU}/cpu{cpu}/cpufreq").symlink_to(tmp_path / f"{CPU}/cpufreq/policy0")
    reads: list[Path] = []
    original = Path.read_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: (reads.append(self), original(self))[1])
        found = watched(Watch(tmp_path, period_s=0.01), 1)
    assert len(reads) == len(found["clock"].values)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "\x00", "1e9", "9" * 30, "1,5", "<unknown>"])
def test_garbage_is_an_absence(tmp_path: Path, text: str) -> None:
    put(tmp_path, {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": text, "sys/class/thermal/thermal_zone0/temp": text})
    assert watched(Watch(tmp_path, period_s=0.001)) == {}


def test_files_that_vanish_end_the_series_and_nothing_else(tmp_path: Path) -> None:
    cpufreq(tmp_path, 0, scaling_cur_freq=1000000)
    zone(tmp_path, 0, 50.0)
    watch = Watch(tmp_path, period_s=0.01)
    watch._look()
    shutil.rmtree(tmp_path / "sys")
    found = watched(watch, 2 * SLOW)
    assert {name: len(series.values) for name, series in found.items()} == {"clock": 1, "temperature": 1}


def test_a_gpu_is_asked_only_if_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(ClockInfo=1410, Temperature=63))
    assert watched(Watch(tmp_path, period_s=0.001)) == {}
    found = watched(Watch(tmp_path, gpu=True, period_s=0.001))
    assert {name: (s.unit, s.values[0]) for name, s in found.items()} == {"gpu_clock": ("Hz", 1.41e9), "gpu_temperature": ("C", 63.0)}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(Temperature=63))
    assert list(watched(Watch(tmp_path, gpu=True, period_s=0.001))) == ["gpu_temperature"]
    for absent in (nvml(broken=True), None):
        monkeypatch.setitem(sys.modules, "pynvml", absent)
        assert open_gpu() is None and watched(Watch(tmp_path, gpu=True, period_s=0.001)) == {}


def test_a_gpu_throttled_at_any_look_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0x0, 0x4, 0x48, 0x0])

    class Hot:
        NVMLError = RuntimeError

        def nvmlInit(self) -> None:  # noqa: N802
            pass

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
            return index

        def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:  # noqa: N802
            return next(looks, 0)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", Hot())
    watch = Watch(tmp_path, gpu=True, period_s=0.001)
    watch.start()
    time.sleep(0.05)
    assert gpu_doubts(watch.stop()) == {"throttled": "GPU clock reasons 0x48", "power_capped": "GPU software power cap"}
    assert gpu_doubts(()) == {}
