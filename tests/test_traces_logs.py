"""Logs of nvidia-smi, powermetrics, perf, PTDaemon and smart plugs: real lines, their pitfalls, and garbage."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import contracts, registry
from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.energy import integrate
from edgejoule.measure.recording import Recording, open_recording
from edgejoule.measure.traces.rows import Row, RunningJoules, blocks
from edgejoule.records import Trace
from edgejoule.seams import TraceFormat, TraceHints

FORMATS = ("nvidia_smi", "powermetrics", "perf", "ptdaemon", "tasmota", "shelly")


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def opened(name: str, text: str, **hints: Any) -> Recording:
        path = tmp_path / "trace.txt"
        path.write_bytes(text.encode())
        return open_recording(path, name, TraceHints(**hints))

    return opened


def rail(recording: Recording, name: str, quantity: str = "power_w") -> Trace:
    return next(trace for trace in recording.traces if trace.rail == name and trace.quantity == quantity)


def codes(recording: Recording) -> set[str]:
    return {doubt.code for doubt in recording.caveats}


def counted(recording: Recording, name: str) -> float:
    """Joules of a counter from its first to its last sample."""
    values = rail(recording, name, "energy_j").values
    return float(values[-1] - values[0])


# ---------------------------------------------------------------- what they share


def test_intervals_add_up_and_an_unknown_one_is_bridged_by_the_power_around_it() -> None:
    sums = RunningJoules()
    assert sums.add(2.0, {"pkg": 20.0}) == {"pkg": 20.0}  # 10 W
    assert sums.add(1.0, {"pkg": math.nan}) == {}
    sums.skip(1.0)
    assert sums.add(1.0, {"pkg": 20.0, "ram": 3.0}) == {"pkg": 20.0 + 2 * 15.0 + 20.0, "ram": 3.0}
    assert sums.add(1.0, {"ram": 1.0}) == {"ram": 4.0}
    assert sums.add(1.0, {"pkg": 20.0}) == {"pkg": 110.0}


def test_a_row_that_lacks_a_rail_is_nan_there_and_a_flood_of_rails_is_refused() -> None:
    (block,) = blocks([Row(0.0, {"a": 1.0}), Row(1.0, {"b": 2.0}, {"a": 5.0})])
    assert np.isnan(block.power_w["a"][1]) and np.isnan(block.power_w["b"][0]) and list(block.energy_j["a"][1:]) == [5.0]
    with pytest.raises(MeterError, match="more than 256 rails"):
        list(blocks(Row(float(n), {f"rail{n}": 1.0}) for n in range(300)))


# ---------------------------------------------------------------- nvidia-smi

SMI_HEADER = "timestamp, utilization.gpu [%], pstate, temperature.gpu, clocks.current.sm [MHz], power.draw [W], power.draw.instant [W]"


def smi(*rows: str, header: str = SMI_HEADER) -> str:
    return "\n".join((header, *rows)) + "\n"


def test_nvidia_smi_prefers_instant_power_and_says_what_it_averages_over(opened: Any) -> None:
    both = smi(
        "2023/07/14 10:12:46.483, 0, P0, 37, 1410, 56.12, 60.00",
        "2023/07/14 10:12:46.583, 0, P0, 37, 1410, 56.12, 60.00",  # a held value is a sample too
        "2023/07/14 10:12:47.483, 0, P0, 37, 1410, 57.00, 80.00",
    )
    found = opened("nvidia_smi", both)
    assert list(rail(found, "gpu").values) == [60.0, 60.0, 80.0] and rail(found, "gpu").averaging_s == 0.1
    assert list(rail(found, "gpu").times_s) == pytest.approx([0, 0.1, 1.0]) and not found.caveats
    assert (rail(found, "gpu").grade, rail(found, "gpu").scope, rail(found, "gpu").total) == ("C", "gpu", True)
    averaged = opened("nvidia_smi", both.replace("power.draw.instant [W]", "fan.speed [%]"))
    assert list(rail(averaged, "gpu").values) == [56.12, 56.12, 57.0] and rail(averaged, "gpu").averaging_s == 1.0
    unsupported = opened("nvidia_smi", both.replace(", 60.00", ", [N/A]").replace(", 80.00", ", [Not Supported]"))
    assert list(rail(unsupported, "gpu").values) == [56.12, 56.12, 57.0] and rail(unsupported, "gpu").averaging_s == 1.0


def test_nvidia_smi_units_in_cells_and_figures_that_are_not_available(opened: Any) -> None:
    rows = [f"2023/07/14 10:12:{46 + n}.000, {cell}" for n, cell in enumerate(("56.12 W", "[N/A]", "900 mW", "-1.00 W", "1e30 W", "2 W"))]
    found = opened("nvidia_smi", smi(*rows, header="timestamp, power.draw [W]"))
    assert list(rail(found, "gpu").values) == [56.12, 0.9, 2.0] and codes(found) == {"invalid_values"}
    cut = opened("nvidia_smi", smi(*rows[:1], *rows[5:], "2023/07/14 10:13:00.000, 5", header="timestamp, power.draw [W]"))
    assert list(rail(cut, "gpu").values) == [56.12, 2.0] and codes(cut) == {"invalid_values"}
    bare = smi(*(row.replace(" W", "").replace(" mW", "") for row in rows), header="timestamp, power.draw")
    with pytest.raises(MeterError, match="--power-unit"):
        opened("nvidia_smi", bare)
    assert rail(opened("nvidia_smi", bare, power_unit="mW"), "gpu").values[0] == pytest.approx(0.05612)


def test_nvidia_smi_several_gpus_share_a_sample_and_are_told_apart(opened: Any) -> None:
    rows = [f"2023/07/14 10:12:{46 + n}.000, {gpu}, {10 * (gpu + 1)}.0 W" for n in range(3) for gpu in (0, 1)]
    found = opened("nvidia_smi", smi(*rows, header="timestamp, index, power.draw [W]"))
    assert {trace.rail: set(trace.values) for trace in found.traces} == {"gpu0": {10.0}, "gpu1": {20.0}}
    assert all(trace.total for trace in found.traces) and found.samples == 3 and not found.caveats
    nameless = [row.replace(", 0,", ",").replace(", 1,", ",") for row in rows]
    with pytest.raises(MeterError, match="add index"):
        opened("nvidia_smi", smi(*nameless, header="timestamp, power.draw [W]"))
    unstamped = smi(*(row.partition(", ")[2] for row in rows), header="index, power.draw [W]")
    assert opened("nvidia_smi", unstamped, interval_s=0.5).duration_s == 1.0


def test_nvidia_smi_without_its_header_says_the_remedy(opened: Any) -> None:
    row = "2023/07/14 10:12:46.483, 0, P0, 37, 1410, 56.12, 56.12"
    assert registry.create("trace", "nvidia_smi").recognises([row, row])
    with pytest.raises(MeterError, match="without noheader"):
        opened("nvidia_smi", f"{row}\n{row}\n")


def test_nvidia_smi_leaves_cut_rows_out(opened: Any) -> None:
    text = smi(
        "2023/07/14 10:12:46.000, 5 W",
        "2023/07/14 10:12:47.000",
        "2023/07/99 10:12:48.000, 5 W",
        "2023/07/14 10:12:49.000, 5 W",
        "2023/0",
        header="timestamp, power.draw [W]",
    )
    found = opened("nvidia_smi", text)
    assert found.samples == 2 and codes(found) == {"bad_lines"} and found.duration_s == 3.0


# ---------------------------------------------------------------- powermetrics


def apple(
    ms: str, cpu: int, gpu: int, ane: int, date: str = "Fri Nov 10 12:37:08 2023 +0100", pressure: str = "Nominal", more: str = ""
) -> str:
    return (
        f"*** Sampled system activity ({date}) ({ms}ms elapsed) ***\n\n**** Processor usage ****\n\nE-Cluster Power: 105 mW\n{more}"
        f"CPU 0 frequency: 1017 MHz\nCPU Power: {cpu} mW\nGPU Power: {gpu} mW\nANE Power: {ane} mW\n"
        f"Combined Power (CPU + GPU + ANE): {cpu + gpu + ane} mW\n\n"
        f"**** GPU usage ****\n\nGPU idle residency:  98.79%\nGPU Power: {gpu} mW\n\n"
        f"**** Thermal pressure ****\n\nCurrent pressure level: {pressure}\n\n"
    )


def test_powermetrics_sums_power_times_its_own_time_and_counts_nothing_twice(opened: Any) -> None:
    text = (
        apple("1000.00", 1000, 300, 20)
        + apple("500.00", 3000, 700, 0, "Fri Nov 10 12:37:09 2023 +0100")
        + apple("104.51", 900, 0, 0, "Fri Nov 10 12:37:09 2023 +0100")
    )
    found = opened("powermetrics", "Machine model: Mac0,0\n\n" + text)
    combined = rail(found, "combined", "energy_j")
    assert list(combined.values) == pytest.approx([0, 1.32, 1.32 + 1.85, 1.32 + 1.85 + 0.104510 * 0.9]) and combined.total
    assert list(combined.times_s) == pytest.approx([0, 1.0, 1.5, 1.60451])
    assert counted(found, "gpu") == pytest.approx(0.3 + 0.35) and counted(found, "e-cluster") == pytest.approx(0.105 * 1.60451)
    assert [trace.rail for trace in found.traces if trace.total] == ["combined"] and not found.caveats
    assert (combined.grade, combined.scope) == ("D", "SoC")


def test_powermetrics_locales_time_lost_heat_and_figures_that_contradict(opened: Any) -> None:
    comma = opened("powermetrics", apple("104,51", 1000, 0, 0, "ven. 10 nov. 12:37:08 2023 +0100") * 2)
    assert counted(comma, "combined") == pytest.approx(0.20902)
    slept = opened("powermetrics", apple("1000.00", 1000, 0, 0) + apple("1000.00", 3000, 0, 0, "Fri Nov 10 12:37:19 2023 +0100"))
    assert codes(slept) == {"trace_gap"} and slept.duration_s == pytest.approx(12.0)
    assert counted(slept, "cpu") == pytest.approx(1 + 10 * 2 + 3)  # bridged by the mean of both sides
    hot = opened("powermetrics", apple("1000.00", 1000, 0, 0) + apple("1000.00", 1000, 0, 0, "Fri Nov 10 12:37:09 2023 +0100", "Heavy"))
    assert codes(hot) == {"throttled"}
    zones = opened(
        "powermetrics",
        apple("1000.00", 1000, 0, 0, "Sun Oct 29 02:59:59 2023 +0200") + apple("1000.00", 1000, 0, 0, "Sun Oct 29 02:00:00 2023 +0100"),
    )
    assert not zones.caveats and zones.duration_s == 2.0
    odd = opened(
        "powermetrics", apple("1000.00", 1000, 5, 0) + apple("1000.00", 1000, 5, 0, more="GPU Power: 9 mW\n") + apple("1000.00", -1, 5, 0)
    )
    assert {"duplicate_rail", "invalid_values"} <= codes(odd)


def test_powermetrics_without_a_combined_power(opened: Any) -> None:
    text = "".join(line + "\n" for line in (apple("1000.00", 1000, 300, 20) * 2).splitlines() if not line.startswith("Combined"))
    found = opened("powermetrics", text)
    assert {trace.rail for trace in found.traces if trace.total} == {"cpu", "gpu", "ane"}
    cut = opened("powermetrics", text.replace("ANE Power: 20 mW\n", ""))
    assert not any(trace.total for trace in cut.traces)
    header = "*** Sampled system activity (Thu Mar  3 13:41:31 2022 +0800) (1000.00ms elapsed) ***"
    intel = f"{header}\nIntel energy model derived package power (CPUs+GT+SA): 4.53W\n"
    assert counted(opened("powermetrics", intel * 2), "package") == pytest.approx(9.06)


PLIST = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
<key>is_delta</key><true/>
<key>elapsed_ns</key><integer>1000000000</integer>
<key>timestamp</key><date>2023-11-10T11:37:0{n}Z</date>
<key>thermal_pressure</key><string>Nominal</string>
<key>processor</key>
<dict><key>cpu_power</key><real>993.156</real><key>gpu_power</key><real>476.674</real><key>ane_energy</key><integer>7</integer>
<key>combined_power</key><real>1469.83</real></dict>
<key>gpu</key><dict><key>gpu_energy</key><integer>284</integer></dict>
</dict>
</plist>
"""


def test_powermetrics_plists_separated_by_nuls(opened: Any) -> None:
    text = "\0".join(PLIST.replace("{n}", str(n)) for n in range(3))
    assert registry.create("trace", "powermetrics").recognises(text.split("\n")[:50])
    found = opened("powermetrics", text)
    assert counted(found, "combined") == pytest.approx(3 * 1.46983) and counted(found, "ane") == pytest.approx(0.021)
    assert found.duration_s == pytest.approx(3.0) and not found.caveats
    cut = opened("powermetrics", text + "\0" + PLIST[:300])
    assert codes(cut) == {"bad_lines"} and cut.duration_s == pytest.approx(3.0)
    bad = opened("powermetrics", text + PLIST.replace("<real>993.156</real>", "<real>lots</real>"))
    assert codes(bad) == {"bad_lines"}
    hot = opened("powermetrics", text.replace("Nominal", "Heavy"))
    assert codes(hot) == {"throttled"}


# ---------------------------------------------------------------- perf

TOTAL = """
 Performance counter stats for 'system wide':

              3.59 Joules power/energy-cores/
              8.18 Joules power/energy-ram/
             12.74 Joules power/energy-pkg/
             51.10 Joules power/energy-psys/

       5.001965465 seconds time elapsed

"""


def test_perf_totals_count_packages_only(opened: Any) -> None:
    found = opened("perf", TOTAL)
    assert [trace.rail for trace in found.traces if trace.total] == ["pkg"] and found.duration_s == pytest.approx(5.001965465)
    assert integrate(rail(found, "pkg", "energy_j"), 0.0, found.duration_s) == pytest.approx(12.74)
    assert counted(found, "psys") == pytest.approx(51.10) and not found.caveats
    assert (found.traces[0].grade, found.traces[0].scope) == ("C", "package")


def test_perf_notes_repeats_sockets_and_what_was_not_counted(opened: Any) -> None:
    runs = "        52.67 Joules power/energy-cores/       ( +-  1.24% )\n        85.09 Joules power/energy-pkg/         ( +-  0.83% )\n\n"
    found = opened("perf", runs + "    34.922801 +- 0.000736 seconds time elapsed ( +-  0.00% )\n")
    assert counted(found, "pkg") == 85.09 and found.duration_s == 34.922801
    sockets = (
        "  S0-D0-C0              1               3.73 Joules power/energy-pkg/\n"
        "  S0-D0-C1              0      <not counted> Joules power/energy-pkg/\n"
        "  S1-D0-C0              1               4.00 Joules power/energy-pkg/\n"
        "  S1-D0-C0              1    <not supported> Joules power/energy-psys/\n\n         1.001404046 seconds time elapsed\n"
    )
    found = opened("perf", sockets)
    assert {trace.rail for trace in found.traces} == {"S0-D0-C0/pkg", "S1-D0-C0/pkg"} and all(trace.total for trace in found.traces)
    assert codes(found) == {"invalid_values"}
    with pytest.raises(MeterError, match="0 valid samples"):
        opened("perf", " <not supported> Joules power/energy-pkg/\n\n 1.001404046 seconds time elapsed\n")


@pytest.mark.parametrize(
    ("value", "elapsed", "joules"),
    [
        ("2,306.32", "277.955355190", 2306.32),
        ("0,05", "0,000869161", 0.05),
        ("2.306,32", "277,955355190", 2306.32),
        ("2,306", "277.955355190", 2306.0),
        ("2,306", "277,955355190", 2.306),
        ("1,002,306", "277.955355190", 1002306.0),
    ],
)
def test_perf_reads_the_locale_from_the_digits(opened: Any, value: str, elapsed: str, joules: float) -> None:
    found = opened("perf", f"   {value} Joules power/energy-pkg/\n\n   {elapsed} seconds time elapsed\n")
    assert counted(found, "pkg") == pytest.approx(joules)


def test_perf_refuses_what_has_two_readings(opened: Any) -> None:
    with pytest.raises(MeterError, match="--decimal"):
        opened("perf", "   2,306 Joules power/energy-pkg/\n", interval_s=10.0)
    assert counted(opened("perf", "   2,306 Joules power/energy-pkg/\n", interval_s=10.0, decimal=","), "pkg") == pytest.approx(2.306)
    with pytest.raises(MeterError, match="LC_ALL=C"):
        opened("perf", "     1,001048308,19,63,Joules,power/energy-pkg/,2002406532,100,00,,\n")
    with pytest.raises(MeterError, match="no elapsed time"):
        opened("perf", "475.42,Joules,power/energy-pkg/,20005659301,100.00,,\n")
    assert opened("perf", "475.42,Joules,power/energy-pkg/,20005659301,100.00,,\n", interval_s=10.0).duration_s == 10.0
    with pytest.raises(MeterError, match="second report"):
        opened("perf", TOTAL * 2)


INTERVALS = """# started on Fri Jun 20 10:00:00 2025

     1.001048308,19.63,Joules,power/energy-pkg/,2002406532,100.00,,
     2.002369058,19.41,Joules,power/energy-pkg/,2002617705,100.00,,
     3.003657679,19.70,Joules,power/energy-pkg/,2002496823,100.00,,
     4.004397295,20.51,Joules,power/energy-pkg/,2001466651,100.00,,
"""


def test_perf_intervals_are_an_exact_counter(opened: Any) -> None:
    found = opened("perf", INTERVALS)
    pkg = rail(found, "pkg", "energy_j")
    assert list(pkg.times_s) == pytest.approx([0.0, 1.001048308, 2.002369058, 3.003657679, 4.004397295])
    assert list(pkg.values) == pytest.approx([0.0, 19.63, 39.04, 58.74, 79.25]) and not found.caveats
    beheaded = opened("perf", "\n".join(f"     {n}.000000000,10.00,Joules,power/energy-pkg/,1,100.00,," for n in range(61, 70)))
    assert counted(beheaded, "pkg") == pytest.approx(80.0), "an interval of 61 s began before the file did"
    text = "#           time             counts unit events\n" + "".join(
        f"     {line.split(',')[0].strip()}              {line.split(',')[1]} Joules power/energy-pkg/\n"
        for line in INTERVALS.splitlines()[2:]
    )
    assert list(rail(opened("perf", text), "pkg", "energy_j").values) == pytest.approx(list(pkg.values))
    semicolons = INTERVALS.replace(",", ";").replace(".", ",")
    assert list(rail(opened("perf", semicolons), "pkg", "energy_j").values) == pytest.approx(list(pkg.values))
    comma = text.replace(".", ",")
    assert list(rail(opened("perf", comma), "pkg", "energy_j").values) == pytest.approx(list(pkg.values))


def test_perf_intervals_that_are_missing_doubled_or_start_over(opened: Any) -> None:
    missing = opened("perf", INTERVALS.replace("19.41,Joules", "<not counted>,Joules"))
    assert counted(missing, "pkg") == pytest.approx(19.63 + 19.665 + 19.70 + 20.51, rel=1e-3) and codes(missing) == {"invalid_values"}
    lines = INTERVALS.splitlines(keepends=True)
    twice = opened("perf", "".join([*lines[:4], lines[3].replace("19.41", "1.00"), *lines[4:]]))
    assert codes(twice) == {"duplicate_rail"} and counted(twice, "pkg") == pytest.approx(79.25, rel=0.01)
    grown = "".join(f"     {n}.000000000,10.00,Joules,power/energy-pkg/,1,100.00,,\n" for n in range(1, 400))
    over = opened("perf", grown + "".join(f"     {398 + n}.500000000,10.00,Joules,power/energy-pkg/,1,100.00,,\n" for n in range(10)))
    assert codes(over) == {"clock_backwards"} and counted(over, "pkg") == pytest.approx(10 * over.duration_s, rel=0.001)
    with pytest.raises(MeterError, match="restarted"):
        opened("perf", INTERVALS * 4)


def test_perf_several_events_of_one_interval_are_one_sample(opened: Any) -> None:
    lines = [
        f"     {n}.000000000,S{s},1,{j}.00,Joules,power/energy-{e}/,1,100.00,,"
        for n in (1, 2)
        for s in (0, 1)
        for e, j in (("pkg", 9), ("ram", 2))
    ]
    found = opened("perf", "\n".join(lines))
    assert found.samples == 3 and counted(found, "S1/pkg") == 18.0 and {t.rail for t in found.traces if t.total} == {"S0/pkg", "S1/pkg"}


# ---------------------------------------------------------------- PTDaemon


def ptd(stamp: str, watts: str = "23.850000", more: str = "") -> str:
    return f"Time,{stamp},Watts,{watts},Volts,247.920000,Amps,0.198110,PF,0.485500,Mark,notset{more}\n"


def test_ptdaemon_within_a_day_the_order_of_day_and_month_is_of_no_matter(opened: Any) -> None:
    found = opened(
        "ptdaemon",
        ptd("01-10-2023 20:46:01.787")
        + ptd("01-10-2023 20:46:02.787", "-1.000000")
        + "Uncertainty,0.006264,x\n"
        + ptd("01-10-2023 20:46:03.787", "25.0"),
    )
    wall = rail(found, "wall")
    assert list(wall.values) == [23.85, 25.0] and list(wall.times_s) == pytest.approx([0, 2.0]) and codes(found) == {"invalid_values"}
    assert (wall.grade, wall.scope, wall.averaging_s, wall.total) == ("A", "wall", 1.0, True)


@pytest.mark.parametrize(
    "days",
    [
        ("01-10-2023", "02-10-2023"),
        ("01-31-2023", "02-01-2023"),
        ("31-12-2023", "01-01-2024"),
        ("12-31-2023", "01-01-2024"),
        ("28-02-2024", "29-02-2024"),
    ],
)
def test_ptdaemon_midnight_is_a_second_and_not_a_month(opened: Any, days: tuple[str, str]) -> None:
    found = opened("ptdaemon", ptd(f"{days[0]} 23:59:59.500") + ptd(f"{days[1]} 00:00:00.500"))
    assert found.duration_s == pytest.approx(1.0) and not found.caveats


@pytest.mark.parametrize("days", [("01-10-2023", "05-10-2023"), ("02-10-2023", "01-10-2023"), ("12-12-2023", "25-12-2023")])
def test_ptdaemon_refuses_dates_that_are_no_neighbours(opened: Any, days: tuple[str, str]) -> None:
    with pytest.raises(MeterError, match="not the next day"):
        opened("ptdaemon", ptd(f"{days[0]} 10:00:00.000") + ptd(f"{days[1]} 10:00:01.000"))


def test_ptdaemon_a_line_that_is_cut_within_its_watts_is_no_sample(opened: Any) -> None:
    found = opened("ptdaemon", ptd("01-10-2023 20:46:01.787") + ptd("01-10-2023 20:46:02.787") + "Time,01-10-2023 20:46:03.787,Watts,2")
    assert list(rail(found, "wall").values) == [23.85, 23.85] and codes(found) == {"bad_lines"}


def test_ptdaemon_channels_are_beside_the_whole(opened: Any) -> None:
    line = ptd("01-10-2023 20:46:01.787", more=",Ch1,Watts,20.0,Volts,1,Ch2,Watts,3.0,PF,1.0") + ptd(
        "01-10-2023 20:46:02.787", more=",Ch1,Watts,20.0,Watts,21.0,Ch2,Watts,3.0,PF,1.0"
    )
    found = opened(
        "ptdaemon",
        line
        + ptd("01-10-2023 20:46:03.787", more=",Ch1,Watts,22.0,Ch2,Watts,3.0,PF,1.0")
        + "Time,99-99-2023 20:46:04.787,Watts,1\nnoise\n",
    )
    assert {trace.rail: trace.total for trace in found.traces} == {"wall": True, "ch1": False, "ch2": False}
    assert list(rail(found, "ch1").values) == [20.0, 22.0] and codes(found) == {"duplicate_rail", "bad_lines"}


# ---------------------------------------------------------------- plugs


def tasmota(second: int, power: str = "56", total: str = "514.153") -> str:
    energy = f'{{"TotalStartTime":"2022-03-20T15:20:48","Total":{total},"Power":{power},"Voltage":234}}'
    return f'{{"Time":"2023-05-19T20:52:{second:02d}","ENERGY":{energy}}}'


def test_tasmota_keeps_power_and_counter_of_one_rail(opened: Any) -> None:
    text = "\n".join(
        (
            "",
            tasmota(0),
            '{"Time":"2023-05-19T20:52:01","POWER":"ON"}',
            tasmota(10, "60", "514.154"),
            f'{{"StatusSNS":{tasmota(20, "64", "514.154")}}}',
        )
    )
    found = opened("tasmota", text)
    assert list(rail(found, "plug").values) == [56, 60, 64] and list(rail(found, "plug").times_s) == [0, 10, 20]
    counter = rail(found, "plug", "energy_j")
    assert (
        counter.values[1] - counter.values[0] == pytest.approx(3600)
        and not counter.total
        and rail(found, "plug").total
        and not found.caveats
    )
    assert (counter.grade, counter.scope) == ("C", "wall")


def test_tasmota_phases_add_up(opened: Any) -> None:
    found = opened("tasmota", "\n".join(tasmota(n, "[52,5]", "[2.813,0.254]") for n in range(3)))
    assert {trace.rail for trace in found.traces if trace.total} == {"plug0", "plug1"}
    assert list(rail(found, "plug1").values) == [5, 5, 5] and rail(found, "plug0", "energy_j").values[0] == pytest.approx(2.813 * 3.6e6)
    mixed = opened("tasmota", "\n".join(tasmota(n, "[52,5]", "9.5") for n in range(3)))
    assert {trace.rail for trace in mixed.traces if trace.total} == {"plug0", "plug1"} and not rail(mixed, "all", "energy_j").total


def test_plugs_prefer_the_recorders_own_stamp(opened: Any) -> None:
    stamped = "\n".join(f"{1684529576.25 + 0.5 * n} tele/tasmota_4711000000/SENSOR {tasmota(0)}" for n in range(4))
    assert opened("tasmota", stamped).duration_s == pytest.approx(1.5)
    dated = "\n".join(f"2023-05-19 20:52:56.{n}00 tele/plug/SENSOR = {tasmota(0)}" for n in range(4))
    assert opened("tasmota", dated).duration_s == pytest.approx(0.3)
    with pytest.raises(MeterError, match="valid samples"):  # four samples in one second, and no finer stamp
        opened("tasmota", "\n".join(f"tele/tasmota_4711000000/SENSOR {tasmota(0)}" for n in range(4)))


def test_plugs_duplicate_keys_resets_and_figures_that_are_none(opened: Any) -> None:
    text = "\n".join(
        (
            tasmota(0),
            tasmota(1, '57,"Power":58'),
            tasmota(2, '"high"'),
            tasmota(3, "-4", "0.0"),
            tasmota(4, "NaN"),
            tasmota(5),
            tasmota(6)[:40],
            tasmota(7),
        )
    )
    found = opened("tasmota", text)
    assert list(rail(found, "plug").values) == [56, 56, 56] and codes(found) == {"duplicate_rail", "invalid_values", "bad_lines"}
    assert len(rail(found, "plug", "energy_j").values) == 6  # all but the reset


SHELLY = '{"output":true,"apower":%s,"voltage":230.3,"freq":50.0,"current":0.667,"aenergy":{"total":%s},"temperature":{"tC":43.3}}'


def test_shelly_has_no_stamps_of_its_own(opened: Any) -> None:
    text = "\n".join(SHELLY % (106.3 + n, 267.813 + n) for n in range(3))
    with pytest.raises(MeterError, match=r"none of the 3 samples in .* has a stamp: add --interval"):
        opened("shelly", text)
    found = opened("shelly", text, interval_s=1.0)
    assert list(rail(found, "plug").values) == [106.3, 107.3, 108.3] and found.duration_s == 2.0 and not found.caveats
    assert counted(found, "plug") == pytest.approx(2 * 3600)
    assert opened("shelly", "\n".join(f"{1700000000 + 2 * n}: {line}" for n, line in enumerate(text.split("\n")))).duration_s == 4.0


def test_shelly_wrapped_with_several_outlets(opened: Any) -> None:
    line = '{"id":1,"result":{"switch:0":%s,"switch:1":%s,"sys":{"unixtime":%d}}}'
    found = opened("shelly", "\n".join(line % (SHELLY % (10, 1), SHELLY % (5, 1), 1682952866 + n) for n in range(3)))
    assert {trace.rail for trace in found.traces if trace.total} == {"plug0", "plug1"} and found.duration_s == 2.0
    twice = opened(
        "shelly",
        "\n".join(f'{{"switch:0":{SHELLY % (10, 1)},"switch:0":{SHELLY % (10, 1)},"switch:1":{SHELLY % (5, 1)}}}' for n in range(3)),
        interval_s=1.0,
    )
    assert {trace.rail for trace in twice.traces if trace.quantity == "power_w"} == {"plug1"} and codes(twice) == {"duplicate_rail"}


# ---------------------------------------------------------------- all of them

SAMPLES = {
    "nvidia_smi": smi(*(f"2023/07/14 10:12:46.{n}83, 0, P0, 37, 1410, 56.12 W, 56.12 W" for n in range(9))),
    "powermetrics": "".join(apple("1000.00", 900, 300, 20, f"Fri Nov 10 12:37:0{n} 2023 +0100") for n in range(5))
    + PLIST.replace("{n}", "9"),
    "perf": TOTAL + INTERVALS,
    "ptdaemon": "".join(ptd(f"01-10-2023 23:59:5{n}.787") for n in range(9)),
    "tasmota": "\n".join(tasmota(n, "[52,5]", "[2.813,0.254]") for n in range(9)),
    "shelly": "\n".join(f"{1700000000 + n} {SHELLY % (n, n)}" for n in range(9)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_recognises_its_own_and_no_other(name: str) -> None:
    leaf = registry.create("trace", name)
    assert isinstance(leaf, TraceFormat)
    assert [other for other, text in SAMPLES.items() if leaf.recognises([line for line in text.splitlines() if line.strip()][:50])] == [
        name
    ]
    assert not leaf.recognises([]) and not leaf.recognises(["time,power", "0,1", "VDD_IN 4556mW/4556mW"])


@pytest.mark.parametrize("name", FORMATS)
def test_each_keeps_the_contract(name: str) -> None:
    contracts.check_trace_format(name, SAMPLES[name].splitlines(), TraceHints())


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_garbage_is_a_doubt_or_one_error_and_never_a_wrong_number(name: str, data: st.DataObject) -> None:
    lines = SAMPLES[name].split("\n")
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(lines) - 1))
        column = data.draw(st.integers(0, len(lines[at])))
        junk = data.draw(
            st.sampled_from(["", "\0", ",", "-1", "0", "NaN", "inf", "1e308", "9" * 400, "{", "}", '"', "é", "\ufffd", ".", " ", "]"])
            | st.text(max_size=4)
        )
        edit = data.draw(st.sampled_from(["cut", "insert", "double", "swap", "drop"]))
        if edit == "cut":
            lines[at] = lines[at][:column]
        elif edit == "insert":
            lines[at] = lines[at][:column] + junk + lines[at][column:]
        elif edit == "double":
            lines.insert(at, lines[at])
        elif edit == "swap":
            lines[at], lines[-1 - at] = lines[-1 - at], lines[at]
        else:
            lines[at] = junk
    leaf, doubts = registry.create("trace", name), Doubts()
    clean = "\n".join(lines).replace("\r", "").split("\n")
    hints = TraceHints(interval_s=data.draw(st.none() | st.just(0.5)), decimal=data.draw(st.sampled_from(["", ".", ","])))
    assert leaf.recognises(clean[:50]) in (True, False)
    try:
        found = list(leaf.read(clean, hints, doubts))
    except MeterError as error:
        assert str(error) and "\n" not in str(error)
        return
    for block in found:
        for values in (*block.power_w.values(), *block.energy_j.values()):
            assert (
                values.dtype == np.float64
                and values.shape == block.times_s.shape
                and not np.any(np.isinf(values))
                and not np.any(values < 0)
            )


@pytest.mark.parametrize("name", FORMATS)
@given(lines=st.lists(st.text(max_size=60), max_size=20))
@settings(max_examples=40, deadline=None)
def test_text_of_any_kind_is_survived(name: str, lines: list[str]) -> None:
    leaf = registry.create("trace", name)
    leaf.recognises(lines)
    with contextlib.suppress(MeterError):
        list(leaf.read(lines, TraceHints(), Doubts()))
