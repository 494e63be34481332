"""Peaks of this very process, and the formats of /proc and NVML from fakes: what the system does not say is None, never 0."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule.measure import memory
from tests.fakes.machine import nvml

ROLLUP = (
    "5594efc8e000-7ffc84f6c000 ---p 00000000 00:00 0                          [rollup]\nRss:  1776 kB\nPss:     292 kB\nPss_Anon: 9 kB\n"
)


def test_peak_memory_sees_what_was_used_and_forgets_what_was_before() -> None:
    block = np.ones(100_000_000 // 8)  # of less than 32 MB the allocator may keep what was freed
    assert memory.peak_bytes() > 100_000_000
    before = memory.peak_bytes()
    del block
    if memory.reset_peak():
        assert memory.peak_bytes() < before
        again = np.ones(200_000_000 // 8)
        assert memory.peak_bytes() > again.nbytes


def test_formats(tmp_path: Path) -> None:
    assert memory.pss_bytes(tmp_path) is None and memory.swapped_bytes(tmp_path) is None
    (tmp_path / "smaps_rollup").write_text(ROLLUP)
    (tmp_path / "status").write_text("Name:\tVmSwap: 9 kB\nVmHWM:\t    1776 kB\nVmSwap:\t       0 kB\n")
    assert memory.pss_bytes(tmp_path) == 292 * 1024 and memory.swapped_bytes(tmp_path) == 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=st.one_of(st.text(max_size=20), st.sampled_from(["-1 kB", "1,5 kB", "9" * 5000 + " kB", "7 MB", "7", "0 kB", "²  kB"])))
def test_garbage_is_an_absence(tmp_path: Path, word: str) -> None:
    (tmp_path / "status").write_text(f"VmSwap: {word}\n", encoding="utf-8", errors="replace")
    found = memory.swapped_bytes(tmp_path)
    assert found is None or found >= 0
    if word in ("-1 kB", "1,5 kB", "9" * 5000 + " kB", "7 MB", "7", "²  kB"):
        assert found is None


def test_the_largest_sample_is_the_peak(tmp_path: Path) -> None:
    file = tmp_path / "smaps_rollup"

    def show(kilobytes: int) -> None:
        (tmp_path / "new").write_text(f"Pss: {kilobytes} kB\n")
        (tmp_path / "new").replace(file)

    show(100)
    watch = memory.PssWatch(tmp_path, period_s=0.001)
    watch.start()
    for kilobytes in (900, 200):
        show(kilobytes)
        reads, deadline = watch.reads, time.monotonic() + 60
        while watch.reads < reads + 2 and time.monotonic() < deadline:
            time.sleep(0.002)
    assert watch.stop() == watch.stop() == 900 * 1024
    late = memory.PssWatch(tmp_path, period_s=60)
    late.start()
    while not late.reads and time.monotonic() < deadline:
        time.sleep(0.002)
    show(5000)
    assert late.stop() == 5000 * 1024  # the last reading counts
    file.unlink()
    assert memory.PssWatch(tmp_path).stop() is None


def test_the_proportional_set_of_this_process_grows_with_it() -> None:
    if memory.pss_bytes() is None:
        pytest.skip("this kernel has no smaps_rollup")
    watch = memory.PssWatch()
    watch.start()
    block = np.ones(50_000_000 // 8)
    peak = watch.stop()
    assert peak is not None and peak > block.nbytes


def test_the_sampler_rests_longer_where_a_reading_is_dear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smaps_rollup").write_text(ROLLUP)
    spent = iter(np.arange(0.0, 1e6, 0.1))  # every reading takes 0.1 s of CPU time, so it says
    monkeypatch.setattr(memory.time, "thread_time", lambda: float(next(spent)))
    watch, rests = memory.PssWatch(tmp_path, period_s=0.001), list[float]()
    monkeypatch.setattr(watch, "_halt", types.SimpleNamespace(wait=lambda rest_s: rests.append(rest_s) or len(rests) > 3))
    watch._run()
    assert rests[0] == 0.0 and rests[1:] == pytest.approx([2.0] * 3)


def process(pid: int, used: object) -> types.SimpleNamespace:
    return types.SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_gpu_memory_is_this_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own = os.getpid()
    lists: list[tuple[dict[str, object], int | None]] = [
        ({"ComputeRunningProcesses": [process(1, 9), process(own, 500)], "GraphicsRunningProcesses": [process(own, 500)]}, 500),
        ({"ComputeRunningProcesses": [process(own, 500)]}, 500),
        ({"ComputeRunningProcesses": [process(1, 9)], "GraphicsRunningProcesses": []}, None),  # a container's other numbers
        ({"ComputeRunningProcesses": [process(own, None)], "GraphicsRunningProcesses": []}, None),
        ({"ComputeRunningProcesses": [process(own, 2**64 - 1)], "GraphicsRunningProcesses": []}, None),
        ({}, None),  # not supported
        ({"broken": True}, None),
    ]
    for answers, expected in lists:
        monkeypatch.setitem(sys.modules, "pynvml", nvml(**answers))
        assert memory.gpu_bytes() == expected, answers
        assert memory.measured(7, cuda=False).gpu_bytes is None
        found = memory.measured(7, cuda=True)
        assert (found.gpu_bytes, found.pss_bytes) == (expected, 7) and found.rss_bytes
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert memory.gpu_bytes() is None
