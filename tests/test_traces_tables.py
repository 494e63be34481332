"""Tables of real instruments, as they export them, damaged as files get damaged: the right watts, one doubt, or one clear sentence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.caveats import Doubts
from edgejoule.errors import MeterError
from edgejoule.measure.traces import reading
from edgejoule.measure.traces.fnirsi import Fnirsi
from edgejoule.measure.traces.joulescope import Joulescope
from edgejoule.measure.traces.monsoon import Monsoon
from edgejoule.measure.traces.ppk2 import Ppk2
from edgejoule.measure.traces.reading import Layout, number, plausible, table, unit_in
from edgejoule.measure.traces.table import Csv
from edgejoule.seams import TraceFormat, TraceHints

PPK2 = ["Timestamp(ms),Current(uA),D0,D1,D2,D3,D4,D5,D6,D7", "0,50000,0,0,0,0,0,1,0,0", "0.01,60000,1,1,0,0,0,0,0,0"]
SCOPE = ["#time (s),current (A),voltage (V)", "0.0000000,1.0000e-01,5.0000", "0.0000005,2.0000e-01,5.0000"]
STATISTICS = [
    "#time,current,voltage,power,charge,energy",
    "0.0,0.399422,4.74572,1.89553,0,0",
    "0.5,0.400691,4.74479,1.90114,0.200345,0.950568",
]
POWERTOOL = [
    "Time (s),Main Avg Current (mA),Main Avg Power (mW),Main Avg Voltage (V),Main Max Current (mA)",
    "0,100,400,4,9999",
    "0.0002,200,800,4,9999",
]
FNIRSI = """
timestamp sample_in_packet voltage_V current_A dp_V dn_V temp_C_ema energy_Ws capacity_As
1657568326.775 0 5.00000 0.50000 1.184 1.031 30.500 0.025000 0.000001
1657568326.785 1 5.00000 0.50000 1.184 1.033 30.500 0.050000 0.000001
1657568326.795 2 5.00000 0.50000 1.184 1.030 30.500 0.075000 0.000002
1657568326.805 3 5.00000 0.50000 1.184 1.031 30.500 0.100000 0.000002
1657568326.784 0 5.00000 0.50000 1.185 1.032 30.500 0.125000 0.000003
1657568326.794 1 5.00000 0.50000 1.184 1.029 30.500 0.150000 0.000003
1657568326.804 2 5.00000 0.50000 1.184 1.029 30.500 0.175000 0.000003
1657568326.814 3 5.00000 0.50000 1.188 1.042 30.500 0.200000 0.000003
1657568326.824 0 5.00000 1.00000 1.197 1.060 30.500 0.250000 0.000003""".splitlines()
RD_USB = [
    "Time,Voltage (V),Current (A),Power (W),Temperature (°C),Data+ (V),Data- (V),Resistance (Ω),Accumulated current (mAh),"
    "Accumulated power (mWh),Accumulated time (seconds),Run time,Run time (seconds),Unix time",
    "2020-09-08 10:44:55,5.12,0.5,2.56,25,0.6,0.6,10.2,0,0,0,00:00:00,0,1599554695.2",
    "2020-09-08 10:44:56,5.12,0.5,2.56,25,0.6,0.6,10.2,0,1,1,00:00:01,1,1599554696.3",
]
AUTOMATIC = ["time_s,power_w", "0,1.5", "0.1,2.5"]
FORMATS: dict[str, tuple[TraceFormat, list[list[str]]]] = {
    "ppk2": (Ppk2(), [PPK2]),
    "joulescope": (Joulescope(), [SCOPE, STATISTICS]),
    "fnirsi": (Fnirsi(), [FNIRSI, RD_USB]),
    "csv": (Csv(), [AUTOMATIC, ["Time (ms);P[W]", "0;1,5", "100;2,5"], ["elapsed_ms\tbus_voltage_v\tcurrent_ma", "0\t5\t1", "1\t5\t1"]]),
    "monsoon": (Monsoon(), [POWERTOOL, ["Time(ms),Main(mA),Main Voltage(V),", "0.03,1,4", "0.03,1,4"]]),
}


def read(leaf: TraceFormat, lines: list[str], **hints: Any) -> tuple[list[float], dict[str, list[float]], dict[str, list[float]], Doubts]:
    """Times, power and counters of a whole file, and the doubts."""
    doubts, times = Doubts(), []
    power: dict[str, list[float]] = {}
    energy: dict[str, list[float]] = {}
    for block in leaf.read(iter(lines), TraceHints(**hints), doubts):
        times += block.times_s.tolist()
        for into, found in ((power, block.power_w), (energy, block.energy_j)):
            for rail, values in found.items():
                assert values.dtype == np.float64 and len(values) == len(block.times_s)
                into.setdefault(rail, []).extend(values.tolist())
    return times, power, energy, doubts


def codes(doubts: Doubts) -> set[str]:
    return {doubt.code for doubt in doubts.caveats()}


def test_every_format_knows_its_own_files_and_no_others() -> None:
    for name, (leaf, _) in FORMATS.items():
        assert isinstance(leaf, TraceFormat) and dataclasses.is_dataclass(leaf)
        for other, (_, files) in FORMATS.items():
            for lines in files:
                head = [line for line in lines if line.strip()]
                assert leaf.recognises(head) == (name == other), (name, head[0])


# ---------------------------------------------------------------- numbers, units, tables


@pytest.mark.parametrize(
    ("text", "decimal", "value"),
    [
        ("1.5", ".", 1.5),
        (" -2e3 ", ".", -2000.0),
        ("1,5", ",", 1.5),
        ("1.5", ",", None),
        ("1,5", ".", None),
        ("1_000", ".", None),
        ("inf", ".", None),
        ("nan", ".", None),
        ("", ".", None),
        ("1.000,5", ",", None),
        ("1e999", ".", None),
        ("0x10", ".", None),
    ],
)
def test_a_number_is_finite_or_absent(text: str, decimal: str, value: float | None) -> None:
    found = number(text, decimal)
    assert math.isnan(found) if value is None else found == value


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("power_w", "W"),
        ("Power (mW)", "mW"),
        ("P[W]", "W"),
        ("power (µW)", "uW"),
        ("power_mw", "mW"),
        ("P/W", "W"),
        ("Power, watts", "W"),
        ("power", ""),
        ("Power (MW)", ""),
        ("power_raw", ""),
        ("power (dBm)", ""),
        ("flow", ""),
    ],
)
def test_a_unit_stands_in_the_name_or_is_not_known(name: str, unit: str) -> None:
    assert unit_in(name, reading.POWER_UNITS) == unit


def test_a_bad_row_keeps_its_place_and_is_named() -> None:
    doubts = Doubts()
    rows = ["0,1", "1,x", "2", "3,4,5", "", "4,nan", "5,6", *(f"{n},6" for n in range(6, 80))]
    values = np.concatenate(list(table(rows, Layout(",", 2, (0, 1)), doubts, 11)))
    assert len(values) == len(rows) - 1  # the empty line is none
    np.testing.assert_equal(values[:6], [[0, 1], [math.nan] * 2, [math.nan] * 2, [math.nan] * 2, [4, math.nan], [5, 6]])
    assert [(doubt.code, doubt.seen) for doubt in doubts.caveats()] == [
        ("bad_lines", "line 12: '1,x' (and 2 more)"),
        ("invalid_values", "line 16: '4,nan'"),
    ]


def test_one_bad_line_among_many_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 64)
    rows = [f"{n},{n / 2}" for n in range(1000)]
    rows[500] = "\0\0"
    values = np.concatenate(list(table(rows, Layout(",", 2, (0, 1)), Doubts())))
    assert np.isnan(values[500]).all()
    np.testing.assert_array_equal(np.delete(values[:, 1], 500), np.delete(np.arange(1000) / 2, 500))


def test_too_many_bad_rows_are_refused() -> None:
    rows = [f"{n},1" if n % 10 else "# note" for n in range(100)]
    with pytest.raises(MeterError, match=r"10 of 100 rows cannot be read \(line 1: '# note'"):
        list(table(rows, Layout(",", 2, (0, 1)), Doubts()))


def test_a_decimal_comma_in_a_comma_table_is_never_half_a_number() -> None:
    with pytest.raises(MeterError, match="cannot be read"):
        read(Csv(), ["time_s,power_w", *(f"0,{n},2,5" for n in range(9))])
    with pytest.raises(MeterError, match="cannot be read"):  # one field more: no trailing delimiter, a number
        read(Csv(), ["time_s,power_w", *(f"{n},2,5" for n in range(9))])


def test_a_last_line_cut_within_its_last_number_is_left_out() -> None:
    whole = [f"{n / 1000:.3f},2.5000e-03" for n in range(200)]
    times, power, _, doubts = read(Csv(), ["time_s,power_w", *whole, "0.200,2.5"])
    assert len(times) == 201 and math.isnan(times[-1]) and math.isnan(power["power_w"][-1])
    assert doubts.caveats()[0].seen == "line 202, the last one, is cut off: '0.200,2.5'"
    assert not codes(read(Csv(), ["time_s,power_w", *whole, ""])[3])


def test_noise_about_zero_stays_and_a_sentinel_does_not() -> None:
    doubts = Doubts()
    watts = plausible(np.array([3.0, -0.01, -1.0, 2e6, math.nan, -0.0005]), doubts, 1, signed=False)
    np.testing.assert_equal(watts, [3.0, -0.01, math.nan, math.nan, math.nan, -0.0005])
    assert doubts.caveats()[0].seen == "sample 3 is -1 W (and 1 more)"
    assert plausible(np.array([3.0, -1.0]), Doubts(), 1)[1] == -1.0  # an instrument that meters both directions


# ---------------------------------------------------------------- ppk2


def test_ppk2_needs_the_voltage_and_says_so() -> None:
    with pytest.raises(MeterError, match="add --voltage"):
        read(Ppk2(), PPK2)
    times, power, _, doubts = read(Ppk2(), PPK2, voltage_v=3.3)
    assert times == pytest.approx([0, 1e-5]) and power["input"] == pytest.approx([0.165, 0.198]) and not codes(doubts)


@pytest.mark.parametrize("digital", ["", ",D0-D7", ",Bits"])
def test_ppk2_with_and_without_digital_columns(digital: str) -> None:
    row = "0.01,2000000" + (",00000000" if digital else "")
    assert read(Ppk2(), ["Timestamp(ms),Current(uA)" + digital, row], voltage_v=5.0)[1]["input"] == [10.0]


def test_ppk2_without_stamps_needs_an_interval() -> None:
    with pytest.raises(MeterError, match="add --interval"):
        read(Ppk2(), ["Current(uA)", "1", "2"], voltage_v=5.0)
    assert read(Ppk2(), ["Current(uA)", "1e6", "2e6"], voltage_v=5.0, interval_s=1e-5)[1]["input"] == [5.0, 10.0]


# ---------------------------------------------------------------- joulescope


def test_joulescope_samples_and_statistics() -> None:
    assert read(Joulescope(), SCOPE)[:2] == ([0.0, 5e-7], {"input": pytest.approx([0.5, 1.0])})
    times, power, energy, _ = read(Joulescope(), STATISTICS)
    assert times == [0.0, 0.5] and power == {"input": [1.89553, 1.90114]} and energy == {"input": [0.0, 0.950568]}


def test_joulescope_without_header_must_be_named_and_is_then_read() -> None:
    assert not Joulescope().recognises(SCOPE[1:])
    assert read(Joulescope(), SCOPE[1:])[:2] == read(Joulescope(), SCOPE)[:2]
    with pytest.raises(MeterError, match="expected '#time"):
        read(Joulescope(), ["a,b,c", "1,2,3"])


def test_joulescope_binary_names_pyjls() -> None:
    for start in ("jlsfmt", "\ufffdtagfmt "):
        assert Joulescope().recognises([start, " "])
        with pytest.raises(MeterError, match="pyjls"):
            read(Joulescope(), [start, " ", "\x1a \ufffd"])


# ---------------------------------------------------------------- fnirsi and rd-usb


def test_fnirsi_time_is_rebuilt_from_the_number_of_samples() -> None:
    times, power, energy, doubts = read(Fnirsi(), FNIRSI)
    assert np.diff(times) == pytest.approx([0.01] * 8) and power["input"] == pytest.approx([2.5] * 8 + [5.0])
    assert energy["input"][-1] == pytest.approx(0.25) and codes(doubts) == {"stamps_rebuilt"}


def test_fnirsi_lost_packets_take_time() -> None:
    def row(packet: int, n: int, lost_s: float) -> str:
        return f"{1e9 + packet * 0.04 + n * 0.01 + lost_s + 0.013 * (packet % 3):.3f} {n} 5.0 0.5 0 0 30 {packet} 0"

    rows = [row(packet, n, 7.0 if packet >= 100 else 0.0) for packet in range(300) for n in range(4)]
    times = read(Fnirsi(), [FNIRSI[1], *rows])[0]
    assert times[-1] - times[0] == pytest.approx(300 * 0.04 + 7.0, abs=0.15) and min(np.diff(times)) > 0


def test_fnirsi_rows_faster_than_said_follow_the_stamps() -> None:
    rows = [f"{1e9 + packet * 0.036 + n * 0.009:.3f} {n} 5.0 0.5 0 0 30 0 0" for packet in range(500) for n in range(4)]
    times = read(Fnirsi(), [FNIRSI[1], *rows])[0]
    assert times[-1] - times[0] == pytest.approx(500 * 0.036, rel=0.01)


def test_fnirsi_runs_are_never_added_up() -> None:
    with pytest.raises(MeterError, match="another run begins at line 13"):
        read(Fnirsi(), [*FNIRSI, "", *FNIRSI[1:]])
    with pytest.raises(MeterError, match="another run begins at line 12"):
        read(Fnirsi(), [*FNIRSI, *FNIRSI[1:]])


def test_fnirsi_watt_hours_that_are_watt_seconds_are_not_used() -> None:
    assert read(Fnirsi(), [FNIRSI[1].replace("energy_Ws", "energy_Wh"), *FNIRSI[2:]])[2] == {}


def test_rd_usb() -> None:
    times, power, energy, _ = read(Fnirsi(), RD_USB)
    assert times == [1599554695.2, 1599554696.3] and power == {"input": [2.56, 2.56]} and energy == {"input": [0.0, 3.6]}
    old = [line.rsplit(",", 1)[0] for line in RD_USB]
    with pytest.raises(MeterError, match="add --interval"):
        read(Fnirsi(), old)
    assert read(Fnirsi(), old, interval_s=1.0)[1] == power


# ---------------------------------------------------------------- monsoon


def test_powertool_prefers_power_and_never_the_maximum() -> None:
    for lines in (
        POWERTOOL,
        ['"' + POWERTOOL[0].replace(",", '","') + '"', *POWERTOOL[1:]],
        [line.replace(",", ";") for line in POWERTOOL],
    ):
        assert read(Monsoon(), lines)[:2] == ([0.0, 0.0002], {"main": pytest.approx([0.4, 0.8])})
    currents = ["Time (s),Main Avg Current (mA),Main Max Current (mA),Main Avg Voltage (V)", "0,100,9999,4", "0.0002,200,9999,4"]
    assert read(Monsoon(), currents)[1]["main"] == pytest.approx([0.4, 0.8])


def test_powertool_decimal_commas() -> None:
    lines = ["Time (s);Main Avg Current (mA);Main Avg Voltage (V)", "0;100,5;4", "0,0002;200;4,1"]
    assert read(Monsoon(), lines)[:2] == ([0.0, 0.0002], {"main": pytest.approx([0.402, 0.82])})


def test_powertool_without_what_is_needed() -> None:
    with pytest.raises(MeterError, match="add --voltage"):
        read(Monsoon(), ["Time (s),Main Avg Current (mA)", "0,100"])
    assert read(Monsoon(), ["Time (s),Main Avg Current (mA)", "0,100"], voltage_v=4.0)[1]["main"] == pytest.approx([0.4])
    with pytest.raises(MeterError, match="say the same"):
        read(Monsoon(), ["Time (s),Main Avg Power (mW),Main Avg Power (W)", "0,1,1"])


def pymonsoon(
    rows: int, hz: float = 5000.0, unit: float = 1.0, wrap: str = "{}", whole: bool = False, lost: dict[int, float] | None = None
) -> list[str]:
    """A file as PyMonsoon writes it: packets of 7 samples, stamped on arrival with some delay."""
    lines = ["Time(ms),Main(mA),Main Voltage(V),"]
    shift = 0.0
    for n in range(rows):
        shift += (lost or {}).get(n, 0.0)
        packet = n // 7
        stamp = (packet * 7 + 6) / hz + shift + 0.004 * (packet * 7919 % 5) / 5
        text = str(int(stamp + 1.6e9 + 0.37)) if whole else wrap.format(stamp * unit)
        lines.append(f"{text},{wrap.format(1000.0)},{wrap.format(4.0)},")
    return lines


@pytest.mark.parametrize("wrap", ["{}", "np.float64({})"])
def test_pymonsoon_calls_seconds_milliseconds(wrap: str) -> None:
    times, power, _, doubts = read(Monsoon(), pymonsoon(2000, wrap=wrap))
    assert np.diff(times) == pytest.approx(np.full(1999, 0.0002)) and set(power["main"]) == {4.0}
    assert codes(doubts) == {"unit_inferred", "stamps_rebuilt"}


def test_pymonsoon_that_tells_the_truth() -> None:
    times, _, _, doubts = read(Monsoon(), pymonsoon(2000, unit=1000.0))
    assert times[-1] - times[0] == pytest.approx(1999 * 0.0002) and codes(doubts) == {"stamps_rebuilt"}
    fork = ["Time(s),Main(mA),Main Voltage(V)", *(line.rstrip(",") for line in pymonsoon(2000)[1:])]
    assert read(Monsoon(), fork)[0] == pytest.approx(times)


def test_pymonsoon_whole_seconds_of_the_epoch() -> None:
    times = read(Monsoon(), pymonsoon(30_000, whole=True))[0]
    assert np.diff(times) == pytest.approx(np.full(29_999, 0.0002))


def test_pymonsoon_lost_samples_leave_a_gap() -> None:
    times = read(Monsoon(), pymonsoon(140_000, lost={70_000: 1.0}))[0]
    assert times[-1] - times[0] == pytest.approx(139_999 * 0.0002 + 1.0, abs=0.12)
    assert np.diff(times).argmax() in range(69_990, 70_010) and np.count_nonzero(np.diff(times) > 0.001) == 1


def test_pymonsoon_granularity_is_refused_unless_the_interval_is_known() -> None:
    with pytest.raises(MeterError, match="granularity"):
        read(Monsoon(), pymonsoon(2000, hz=500.0))
    assert len(read(Monsoon(), pymonsoon(2000, hz=500.0), interval_s=0.002)[0]) == 2000
    with pytest.raises(MeterError, match="do not show how fast"):
        read(Monsoon(), ["Time(ms),Main(mA),Main Voltage(V),", *["0.5,1,4,"] * 20])


def test_pymonsoon_restarted() -> None:
    with pytest.raises(MeterError, match="time goes back by"):
        read(Monsoon(), [*pymonsoon(20_000), *pymonsoon(20_000)[1:]])


def test_aosp_prints_amperes_and_must_be_named() -> None:
    lines = ["0.500000 0.100000", "0.250000 0.100000"]
    assert not Monsoon().recognises(lines)
    with pytest.raises(MeterError, match="prints amperes"):
        read(Monsoon(), lines)
    assert read(Monsoon(), lines, voltage_v=4.0, interval_s=0.002)[1]["main"] == [2.0, 1.0]
    assert read(Monsoon(), ["1600000000 0.5", "1600000000 0.25"], voltage_v=4.0, interval_s=0.002)[1]["main"] == [2.0, 1.0]


def test_powertool_binary_asks_for_csv() -> None:
    head = ["\0\0\0Power Tool\ufffd\0", "x"]
    assert Monsoon().recognises(head)
    with pytest.raises(MeterError, match="export it as CSV"):
        read(Monsoon(), head)


# ---------------------------------------------------------------- csv


@pytest.mark.parametrize(
    ("lines", "hints", "times", "power"),
    [
        (AUTOMATIC, {}, [0.0, 0.1], {"power_w": [1.5, 2.5]}),
        (["# time_ms, P[mW] ", "0, 1500", "100, 2500"], {}, [0.0, 0.1], {"P[mW]": [1.5, 2.5]}),
        (["Logger 1.2", "Serial 77", "time (s);power (W);note", "0,5;1,5;a", "1,5;2,5;b"], {}, [0.5, 1.5], {"power (W)": [1.5, 2.5]}),
        (['"time_s","power_w"', '"0,5","1,5"', '"1,5","2,5"'], {"decimal": ","}, [0.5, 1.5], {"power_w": [1.5, 2.5]}),
        (["t p", "1 1500", "2 2500"], {"time_unit": "ms", "power_unit": "mW"}, [0.001, 0.002], {"p": [1.5, 2.5]}),
        (["t_s,u_v,i_ma", "0,5,300", "1,5,500"], {}, [0.0, 1.0], {"power": [1.5, 2.5]}),
        (["t_s,amps", "0,.3", "1,.5"], {"current_col": "amps", "voltage_v": 5.0}, [0.0, 1.0], {"power": [1.5, 2.5]}),
        (["0 7 1.5", "1 7 2.5"], {"time_col": "1", "power_col": "3", "time_unit": "s", "power_unit": "W"}, [0.0, 1.0], {"3": [1.5, 2.5]}),
        (["time_s,power_w,power_limit_w", "0,1.5,9", "1,2.5,9"], {}, [0.0, 1.0], {"power_w": [1.5, 2.5]}),
        (["time_s,power_w", "0,1", "1,2"], {"power_unit": "mW"}, [0.0, 1.0], {"power_w": [0.001, 0.002]}),
        (["t_s,cpu_w,gpu_w", "0,1,3", "1,2,4"], {"power_col": "cpu_w,gpu_w"}, [0.0, 1.0], {"cpu_w": [1.0, 2.0], "gpu_w": [3.0, 4.0]}),
    ],
)
def test_csv_reads(lines: list[str], hints: dict[str, Any], times: list[float], power: dict[str, list[float]]) -> None:
    found = read(Csv(), lines, **hints)
    assert found[0] == pytest.approx(times) and found[1].keys() == power.keys() and not codes(found[3])
    for rail, watts in power.items():
        assert found[1][rail] == pytest.approx(watts)


@pytest.mark.parametrize(
    ("lines", "hints", "says"),
    [
        (["time,power", "0,4231", "1,4300"], {}, r"'time' does not say its unit.*begin 0, 1: add --time-unit"),
        (["time_s,power", "0,4231", "1,4300"], {}, r"'power' does not say its unit.*begin 4231, 4300: add --power-unit \(W, mW"),
        (["time_s,Power (MW)", "0,1", "1,2"], {}, "add --power-unit"),
        (["time_s,power_w", "0,1", "1,2"], {"power_col": "watt"}, "no column is called 'watt', there are time_s, power_w: .*--power-col"),
        (["time_s,power_w,power_w", "0,1,2", "1,2,3"], {"power_col": "power_w"}, "2 columns are called 'power_w'"),
        (["time_s,power_w,power_w", "0,1,2", "1,2,3"], {}, "power_w and power_w may both be the power"),
        (["cpu_power_w,time_s,gpu_power_w", "0,1,2", "1,2,3"], {}, "may both be the power.*--power-col"),
        (["power_w", "1", "2"], {}, "the time, there are power_w: name it with --time-col, or --interval"),
        (["time_s,current_a", "1,2", "2,3"], {}, "--voltage"),
        (["time_s,speed", "1,2", "2,3"], {}, "--power-col"),
        (["time_s,power_w", "0,1", "1,2"], {"power_unit": "hp"}, "no unit of power is called 'hp'"),
        (["time_s;power_w", "1,000;1,234", "2,000;1,234"], {}, "add --decimal"),
        (["time_s,power_w", "0,1"], {"decimal": "x"}, "--decimal"),
        (
            ["time,power_w", "2023-05-19 20:52:00,1", "2023-05-19 20:52:01,2"],
            {},
            "holds '2023-05-19 20:52:00', which is no number.*--interval",
        ),
        ([], {}, "holds no line"),
        (["hello", "world"], {}, "no header"),
    ],
)
def test_csv_asks_where_two_answers_are_plausible(lines: list[str], hints: dict[str, Any], says: str) -> None:
    with pytest.raises(MeterError, match=says):
        read(Csv(), lines, **hints)
    assert hints or not Csv().recognises(lines)


def test_csv_leaves_a_sentinel_out() -> None:
    _, power, _, doubts = read(Csv(), ["time_s,power_w", "0,3", "1,-1", "2,3"])
    np.testing.assert_equal(power["power_w"], [3.0, math.nan, 3.0])
    assert codes(doubts) == {"invalid_values"}


def test_csv_without_a_time_column_but_an_interval() -> None:
    times, power, _, _ = read(Csv(), ["power_w", "1.5", "2.5"], interval_s=0.1)
    assert np.isnan(times).all() and power == {"power_w": [1.5, 2.5]}


def test_csv_knows_a_total_only_where_there_is_one_rail() -> None:
    assert Csv().totals(("a",)) == ("a",) and Csv().totals(("a", "b")) == ()
    assert Csv(grade="A", scope="wall", averaging_s=1.0).grade == "A" and Csv().grade == "C"


# ---------------------------------------------------------------- garbage

CELLS = st.sampled_from(
    ["0", "-1", "1.5", "2,5", "1e308", "-1e308", "nan", "", "N/A", "np.float64(3.7)", "1_0", '"', "\0", "Time (s)", "٣", "9" * 400]
)
LINES = st.lists(
    st.one_of(st.text(max_size=30), st.lists(CELLS, max_size=6).map(",".join), st.lists(CELLS, max_size=6).map(" ".join)), max_size=12
)


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_garbage_is_refused_or_absent_but_never_a_wrong_number(name: str, data: st.DataObject) -> None:
    leaf, files = FORMATS[name]
    whole = list(data.draw(st.sampled_from([*files, []])))
    for line in data.draw(LINES):
        whole.insert(data.draw(st.integers(0, len(whole))), line)
    if whole and data.draw(st.booleans()):
        whole[-1] = whole[-1][: data.draw(st.integers(0, 20))]
    hints = data.draw(
        st.sampled_from([{}, {"voltage_v": 5.0}, {"voltage_v": 5.0, "interval_s": 0.1}, {"decimal": ","}, {"power_col": "a,1"}])
    )
    head = [line for line in whole if line.strip()]
    if head:
        leaf.recognises(head)
    try:
        _, power, _, _ = read(leaf, whole, **hints)
    except MeterError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        return
    for watts in power.values():
        assert not any(math.isinf(value) or abs(value) > 1e6 for value in watts)
