"""Swap, other programs, throttling, clocks and batteries from a fake /proc and /sys; the environment's fingerprint; steadiness."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule.measure import conditions
from edgejoule.measure.environment import environment
from edgejoule.measure.warmup import is_steady
from edgejoule.measure.window import image_pool, run_window, timing_doubts
from edgejoule.records import floats
from tests.fakes.machine import CPU, PI_FLAGS, Programs, cpufreq, process, supply


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def cpu(user: int, idle: int, steal: int = 0) -> str:
    return f"cpu  {user} 0 0 {idle} 7 0 0 {steal} 0 0\ncpu0 1 2 3 4\n"


def seen(root: Path, own_cpu_s: float = 0.0, at_s: float = 0.0) -> conditions.Conditions:
    return conditions.look(root, lambda: at_s, lambda: own_cpu_s)


def codes(before: conditions.Conditions, after: conditions.Conditions) -> set[str]:
    return {doubt.code for doubt in conditions.doubts(before, after)}


def test_a_system_that_shows_nothing_raises_no_doubt(tmp_path: Path) -> None:
    assert not codes(seen(tmp_path), seen(tmp_path, at_s=10))


def test_other_programs_are_told_from_our_own(tmp_path: Path) -> None:
    put(tmp_path, **{"proc/stat": cpu(1000, 5000)})
    before = seen(tmp_path, 1.0)
    put(tmp_path, **{"proc/stat": cpu(2000, 5500)})  # ten CPU seconds
    assert not codes(before, seen(tmp_path, 10.8, at_s=10))
    assert codes(before, seen(tmp_path, 9.0, at_s=10)) == {"busy_machine"}
    put(tmp_path, **{"proc/stat": cpu(1000, 5000, steal=200)})
    assert codes(before, seen(tmp_path, 1.0, at_s=10)) == {"busy_machine"}


def test_the_busiest_of_the_others_is_named(tmp_path: Path) -> None:
    put(tmp_path, **{"proc/stat": cpu(1000, 5000)})
    for number, name, ticks in ((7, "cron", 900), (8, "web (browser) 2", 100), (9, "old", 500)):
        process(tmp_path, number, name, ticks)
    before = seen(tmp_path)
    put(tmp_path, **{"proc/stat": cpu(1700, 5500)})
    process(tmp_path, 8, "web (browser) 2", 500)
    process(tmp_path, 9, "new", 200, began=99)  # the number was given to another process
    process(tmp_path, os.getpid(), "python", 100000)
    after = seen(tmp_path, at_s=10)
    assert [d.seen for d in conditions.doubts(before, after)] == [
        "70 % of one core during 10 s, most of it web (browser) 2 (process 8, 40 %)"
    ]
    put(tmp_path, **{"proc/stat": cpu(1030, 5500)})
    assert not codes(before, seen(tmp_path, at_s=10))  # below the limit nobody is named
    real = conditions.look()
    assert not real.processes or os.getpid() in {number for number, _ in real.processes}


def test_swap_and_counted_throttling(tmp_path: Path) -> None:
    hot, over = f"{CPU}/cpu0/thermal_throttle/core_throttle_count", "sys/class/hwmon/hwmon3/oc3_event_cnt"
    put(tmp_path, **{"proc/vmstat": "pgpgin 9\npswpin 5\npswpout 6\n", hot: "3", over: "0"})
    before = seen(tmp_path)
    assert not codes(before, seen(tmp_path, at_s=1))  # what happened before the window is past
    put(tmp_path, **{"proc/vmstat": "pswpin 5\npswpout 7\n"})
    assert codes(before, seen(tmp_path, at_s=1)) == {"swap"}
    put(tmp_path, **{"proc/vmstat": "pswpin 5\npswpout 6\n", hot: "4"})
    assert codes(before, seen(tmp_path, at_s=1)) == {"throttled"}
    put(tmp_path, **{hot: "3", over: "27"})
    assert codes(before, seen(tmp_path, at_s=1)) == {"throttled"}


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ("0", "0", None),
        ("50000", "50000", "past_throttling"),
        ("50000", "50005", "past_throttling"),  # now, after the window: flagged() asks in time
        ("0", "40000", "throttled"),  # set in between
        ("50000", "d0000", "throttled"),
        ("50005", "50005", "throttled"),  # all the time
        ("0", "", None),
        ("nonsense", "0xfffffffffff", None),
    ],
)
def test_a_raspberry_pi_s_flags(tmp_path: Path, before: str, after: str, code: str | None) -> None:
    put(tmp_path, **{PI_FLAGS: before})
    first = seen(tmp_path)
    put(tmp_path, **{PI_FLAGS: after})
    assert codes(first, seen(tmp_path, at_s=1)) == ({code} if code else set())


def test_throttled_now(tmp_path: Path) -> None:
    programs = Programs(vcgencmd="throttled=0x50005\n")
    assert conditions.flagged(tmp_path, programs) == {} and not programs.asked  # no program is run on other machines
    put(tmp_path, **{"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\x00"})
    assert conditions.flagged(tmp_path, programs) == {"throttled": "throttled=0x50005"}
    assert conditions.flagged(tmp_path, Programs(vcgencmd='error=1 error_msg="VCHI"')) == {}
    put(tmp_path, **{PI_FLAGS: "50000\n"})
    assert conditions.flagged(tmp_path, programs) == {} and len(programs.asked) == 1  # the high bits are the past, the file comes first


def test_throttled_macs() -> None:
    quiet = "Note: No thermal warning level has been recorded\nNote: No CPU power status has been recorded\n"
    hot = (
        "2020-06-26 12:30:37 +0200 CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 8\n\tCPU_Speed_Limit \t= 28\n"
    )
    name = "com.apple.system.thermalpressurelevel"
    answers = {
        ("", ""): {},
        (f"{name} 0\n", hot): {},  # pressure is the better word; pmset repeats what was last logged
        (f"{name} 2\n", quiet): {"throttled": "thermal pressure heavy"},
        ("no such key", quiet): {},
        ("no such key", hot): {"throttled": "CPU_Speed_Limit = 28"},
        (f"{name} -1\n", hot.replace("28", "0")): {},  # 0 is what chips without a limit show
    }
    for (notifyutil, pmset), expected in answers.items():
        assert conditions.flagged(ask=Programs(notifyutil=notifyutil, pmset=pmset), system="darwin") == expected


def test_programs_that_are_not_there_or_fail_say_nothing() -> None:
    assert conditions.ask_program(("no-such-program-here",)) == ""
    assert conditions.ask_program(("false",)) == "" and conditions.ask_program(("echo", "5")) == "5\n"


def test_batteries_and_chargers(tmp_path: Path) -> None:
    supply(tmp_path, "AC", type="Mains", online="1")
    assert conditions.charger(tmp_path) == ""  # a machine without a battery has nothing but its supply
    supply(tmp_path, "hid-mouse", type="Battery", scope="Device", status="Discharging")
    assert conditions.charger(tmp_path) == "" and not codes(seen(tmp_path), seen(tmp_path, at_s=1))
    supply(tmp_path, "BAT0", type="Battery", status="Full")
    supply(tmp_path, "usb", type="USB_PD", online="0")
    assert conditions.charger(tmp_path) == "AC online" and not codes(seen(tmp_path), seen(tmp_path, at_s=1))
    supply(tmp_path, "AC", type="Mains", online="0")
    supply(tmp_path, "BAT0", type="Battery", status="Discharging")
    assert conditions.charger(tmp_path) == "" and codes(seen(tmp_path), seen(tmp_path, at_s=1)) == {"on_battery"}
    supply(tmp_path, "usb", type="USB_PD", online="2")
    assert conditions.charger(tmp_path) == "usb online"


def test_the_clock_that_was_asked_for(tmp_path: Path) -> None:
    assert conditions.requested_hz(tmp_path) is None
    cpufreq(tmp_path, 0, scaling_governor="performance", scaling_max_freq=1500000)
    cpufreq(tmp_path, 4, scaling_governor="userspace", scaling_setspeed=2000000, scaling_max_freq=2400000)
    assert conditions.requested_hz(tmp_path) == 2e9
    cpufreq(tmp_path, 5, scaling_governor="schedutil", scaling_max_freq=2400000)
    assert conditions.requested_hz(tmp_path) is None  # somebody else decides
    cpufreq(tmp_path, 5, scaling_governor="userspace", scaling_setspeed="<unsupported>")
    assert conditions.requested_hz(tmp_path) is None


def test_turbo_is_a_clock_that_nobody_asked_to_hold(tmp_path: Path) -> None:
    cpufreq(tmp_path, 0, scaling_governor="performance", scaling_max_freq=4900000)
    put(tmp_path, **{f"{CPU}/intel_pstate/no_turbo": "0\n"})
    assert conditions.requested_hz(tmp_path) is None
    cpufreq(tmp_path, 0, base_frequency=2100000)
    assert conditions.requested_hz(tmp_path) == 2.1e9
    put(tmp_path, **{f"{CPU}/intel_pstate/no_turbo": "1\n"})
    assert conditions.requested_hz(tmp_path) == 4.9e9


def test_a_clock_below_the_one_that_was_asked_for() -> None:
    assert [d.code for d in conditions.clock_low_doubts([1.4e9, 1.4e9, 1.5e9], 1.5e9)] == ["clock_low"]
    assert not conditions.clock_low_doubts([1.45e9, 1.0e9, 1.5e9], 1.5e9)  # now and then is no state
    assert not conditions.clock_low_doubts([], 1.5e9) and not conditions.clock_low_doubts([1e9], None)


GARBAGE = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "\x00", "nan", "inf", "-1", "0", "1e999", "1,5", "9" * 400, "9" * 5000, "cpu  1 2", "1 (a", "throttled=0x"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(GARBAGE, min_size=12, max_size=12))
def test_garbage_never_raises_and_never_accuses(tmp_path: Path, texts: list[str]) -> None:
    names = [
        "proc/stat",
        "proc/vmstat",
        "proc/1/stat",
        f"{CPU}/cpu0/thermal_throttle/a_throttle_count",
        PI_FLAGS,
        "proc/device-tree/model",
        *(f"{CPU}/cpu0/cpufreq/{name}" for name in ("scaling_governor", "scaling_max_freq", "base_frequency")),
        *(f"sys/class/power_supply/BAT0/{name}" for name in ("type", "status", "online")),
    ]
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", errors="replace")
    before, after = seen(tmp_path), seen(tmp_path, at_s=1)
    assert codes(before, after) <= {"past_throttling", "throttled"}  # only flags are no differences
    conditions.flagged(tmp_path, Programs(vcgencmd=texts[0]))
    conditions.flagged(ask=Programs(notifyutil=texts[0], pmset=texts[1]), system="darwin")
    requested = conditions.requested_hz(tmp_path)
    assert requested is None or requested > 0
    assert conditions.charger(tmp_path) in ("", "BAT0 online")


def test_garbage_in_proc_raises_no_doubt(tmp_path: Path) -> None:
    put(
        tmp_path,
        **{
            "proc/stat": "cpu x y z a b",
            "proc/vmstat": "pswpin many\n",
            "sys/devices/system/cpu/cpu0/thermal_throttle/a_throttle_count": "?",
        },
    )
    assert not codes(seen(tmp_path), seen(tmp_path, at_s=1))


def test_a_clock_that_drops() -> None:
    assert {d.code for d in conditions.clock_doubts([2e9] * 6 + [1.8e9] * 3)} == {"clock_drop"}
    assert not conditions.clock_doubts([2e9] * 6 + [1.95e9] * 3) and not conditions.clock_doubts([2e9, 1e9])


def test_the_environment_is_quick_complete_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.perf_counter()
    found = environment(2, "onnxruntime 1")
    assert time.perf_counter() - begin < 0.5  # 0.1 s is the aim; a busy machine gets more
    assert found.device.cpu and found.device.arch and found.device.cores >= 1 and found.device.memory_bytes > 2**20
    assert {"python", "numpy", "onnxruntime"} <= set(found.versions) and found.runtime == "onnxruntime 1"
    assert found.fingerprint == environment(2, "openvino 2").fingerprint == environment(2).fingerprint  # backends can be compared
    assert found.fingerprint != environment(3, "onnxruntime 1").fingerprint
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    assert found.fingerprint != environment(2, "onnxruntime 1").fingerprint


def test_the_environment_of_a_board_and_of_a_system_without_proc(tmp_path: Path) -> None:
    bare = environment(1, root=tmp_path)
    assert bare.device.memory_bytes > 0 and bare.device.name  # from the interpreter and sysconf
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    zone = "sys/class/thermal/thermal_zone0"
    lowest, highest = governor.replace("governor", "min_freq"), governor.replace("governor", "max_freq")
    put(tmp_path, **{lowest: "600000\n", highest: "2400000\n", "proc/driver/nvidia/version": "NVRM 570.1\nGCC\n"})
    put(tmp_path, **{"proc/device-tree/model": "Raspberry Pi 5\x00", "proc/cpuinfo": "CPU part\t: 0xd0b\nCPU variant : 0x4\n",
                     governor: "ondemand\n", "proc/meminfo": "MemTotal:  8000000 kB\n", f"{zone}/temp": "48500",
                     f"{zone}/type": "cpu\n"})  # fmt: skip
    board = environment(1, root=tmp_path)
    assert board.observed["clock_limits_mhz"] == "600 to 2400" and board.observed["nvidia_driver"] == "NVRM 570.1"
    assert (board.device.name, board.device.cpu, board.device.governor) == ("Raspberry Pi 5", "ARM part 0xd0b variant 0x4", "ondemand")
    assert board.device.memory_bytes == 8_192_000_000 and board.observed["temperature_c.cpu"] == "48.5"
    put(tmp_path, **{f"{zone}/temp": "60000"})
    assert environment(1, root=tmp_path).fingerprint == board.fingerprint
    put(tmp_path, **{governor: "performance\n"})
    assert environment(1, root=tmp_path).fingerprint != board.fingerprint


def test_two_processors_of_one_name_are_two_devices(tmp_path: Path) -> None:
    """A virtual machine's says the maker's name and no more."""
    text = "processor : 0\nmodel name : AMD EPYC\ncpu family : 23\nmodel : 1\nflags : fpu sse2 avx2\n"
    put(tmp_path, **{"proc/cpuinfo": text})
    old = environment(1, root=tmp_path)
    put(tmp_path, **{"proc/cpuinfo": text.replace("fpu sse2 avx2", "avx2 fpu sse2") + "\nprocessor : 1\nmodel : 9\n"})
    assert environment(1, root=tmp_path).fingerprint == old.fingerprint
    for otherwise in (text.replace("avx2", "avx2 avx512_vnni"), text.replace("model : 1", "model : 17")):
        put(tmp_path, **{"proc/cpuinfo": otherwise})
        found = environment(1, root=tmp_path)
        assert found.device.cpu == old.device.cpu and found.fingerprint != old.fingerprint


# ---------------------------------------------------------------- timings


def test_steadiness() -> None:
    rng, at = np.random.default_rng(0), np.arange(20) * 0.15
    calm = 0.01 * (1 + rng.normal(0, 0.005, 20))
    assert is_steady(calm.tolist(), at.tolist())
    assert not is_steady((0.01 * np.linspace(1.2, 1.0, 20)).tolist(), at.tolist())
    assert not is_steady((0.01 * np.linspace(1.0, 1.002, 20)).tolist(), at.tolist())  # 4 %/min, and nothing to explain it
    assert not is_steady([0.01] * 5, at[:5].tolist()) and is_steady([0.01] * 6, at[:6].tolist())
    found = [is_steady((0.01 * (1 + rng.normal(0, 0.01, 20))).tolist(), at.tolist()) for _ in range(200)]
    assert np.mean(found) > 0.9  # chance alone must not keep a calm machine warming up


@pytest.mark.parametrize(("rise", "code"), [(0.0, None), (0.025, "drift_slight"), (0.05, "drift")])
def test_drift_of_the_window(rise: float, code: str | None) -> None:
    values = np.random.default_rng(0).normal(1, 0.002, 90) * np.repeat([1, 1 + rise / 2, 1 + rise], 30)
    assert [d.code for d in timing_doubts(floats(values))] == ([code] if code else [])


def test_a_few_noisy_inferences_are_no_drift() -> None:
    assert timing_doubts(floats([1.0, 1.1, 0.9, 1.0, 1.2])) == []
    assert timing_doubts(floats([1.0, 1.5] * 4 + [1.0, 1.6, 1.1, 1.5] * 2)) == []  # the spread explains it


def test_outliers_are_counted() -> None:
    values = np.random.default_rng(0).normal(1, 0.01, 60)
    values[30] = 3
    (doubt,) = timing_doubts(floats(values))
    assert doubt.code == "outliers" and doubt.seen.startswith("1 of 60")


def test_the_window_s_buffer_grows_and_its_pool_cycles() -> None:
    now, seen_images = [0.0], []

    def infer(images: object) -> None:
        now[0] += 0.5
        seen_images.append(images)

    stamps = run_window(infer, ["a", "b", "c"], 10.0, 1, 2, lambda: now[0])
    assert list(stamps) == [0.5 * i for i in range(21)] and seen_images[:5] == ["a", "b", "c", "a", "b"]
    assert len(run_window(infer, ["a"], 0.0, 7, 0, lambda: now[0])) == 8


def test_the_pool_is_at_most_64_images_and_fills_its_batches() -> None:
    crops = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    assert len(image_pool(crops, 1)) == 64
    assert [batch.ravel().tolist() for batch in image_pool(crops[:3], 5)] == [[0, 1, 2, 0, 1]]
    assert [len(batch) for batch in image_pool(crops[:7], 3)] == [3, 3]
