"""A Jetson without the hardware: lines that real boards printed, a tegrastats that prints them at its pace and goes wrong on demand,
and the sysfs trees of its sensors. The lines are from public logs and from jetson_stats' tests, cut where they say nothing new."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CPUS = "CPU [44%@1421,off,off,36%@1420,31%@1421,39%@1420]"
TX1 = (
    "RAM 1179/3983MB (lfb 120x4MB) IRAM 0/252kB(lfb 252kB) CPU [1%@102,1%@102,0%@102,0%@102] EMC_FREQ 7%@408 GR3D_FREQ 0%@76 APE 25 "
    "AO@42.5C CPU@37.5C GPU@35C PLL@37C Tdiode@40.5C PMIC@100C thermal@36.5C VDD_IN 2532/2698 VDD_CPU 76/178 VDD_GPU 19/19"
)
TX2 = (
    f"RAM 3072/7850MB (lfb 4x1MB) SWAP 1626/12122MB (cached 181MB) {CPUS} EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% "
    "PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C GPU@40C BCPU@42.5C thermal@41.5C Tdiode@40.25C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 "
    "VDD_4V0_WIFI 0/0 VDD_IN 5297/5297 VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241"
)
TX2_OLD = (
    "RAM 2179/7851MB (lfb 1x2MB) CPU [2%@345,off,off,off,off,off] EMC_FREQ 13%@40 GR3D_FREQ 0%@114 APE 150 BCPU@-45C MCPU@41C "
    "VDD_IN 2003/2658 VDD_CPU 320/518 NVENC 716 NVDEC 716 VDD_GPU 400/735 VDD_SOC 400/415 VDD_WIFI 0/0 VDD_DDR 240/348"
)
NANO = (
    "RAM 613/3964MB (lfb 634x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102,0%@102,0%@102,0%@102] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@24.5C CPU@26.5C PMIC@100C GPU@25C AO@33.5C thermal@25.75C POM_5V_IN 900/943 POM_5V_GPU 0/0 POM_5V_CPU 123/123"
)
XAVIER = (
    "RAM 1409/15692MB (lfb 3346x4MB) SWAP 0/7846MB (cached 0MB) CPU [2%@1190,1%@1190,off,off] EMC_FREQ 0% GR3D_FREQ 0% AO@32C GPU@32C "
    "Tdiode@34.75C PMIC@50C AUX@32C CPU@33.5C thermal@32.7C Tboard@32C GPU 0/0 CPU 216/216 SOC 864/864 CV 0/0 VDDRQ 144/144 SYS5V 1889/1889"
)
XAVIER_NX = (
    "RAM 1000/7772MB (lfb 2x4MB) SWAP 0/3886MB (cached 0MB) CPU [1%@1190,off] EMC_FREQ 0% GR3D_FREQ 0% PMIC@50C "
    "VDD_IN 3875/3875 VDD_CPU_GPU_CV 874/874 VDD_SOC 1037/1037"
)
AGX_ORIN = (
    "01-03-2023 16:07:54 RAM 3500/30536MB (lfb 6017x4MB) SWAP 0/15268MB (cached 0MB) CPU [0%@729,0%@729,off,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@0 GR3D2_FREQ 0%@0 NVJPG1 729 VIC_FREQ 115 APE 233 CV0@-256C CPU@48.5C Tboard@38C SOC2@44.4C GPU@-256C tj@48.5C "
    "VDD_GPU_SOC 2390mW/2390mW VDD_CPU_CV 796mW/796mW VIN_SYS_5V0 3522mW/3522mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW"
)
ORIN_NANO = (
    "07-14-2025 10:29:36 RAM 2147/7620MB (lfb 2x4MB) SWAP 1476/3810MB (cached 1MB) CPU [0%@729,1%@729,0%@729,off] GR3D_FREQ 62%@612 "
    "cpu@47.687C soc2@46.562C tj@48.625C gpu@50C VDD_IN 4556mW/4556mW VDD_CPU_GPU_CV 483mW/483mW VDD_SOC 1451mW/1451mW"
)
AGX_ORIN_JP7 = (
    "05-14-2026 21:36:35 RAM 26063/62800MB (lfb 35x4MB) CPU [2%@972,off] GR3D_FREQ 12%@[1300,1300] NVENC0 off PVA0_FREQ off APE 174 "
    "cpu@52.968C/52.968C tj@53C/54.5C VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3034mW/3049mW/3412mW VIN_SYS_5V0 5064mW/5055mW/5100mW"
)
THOR_IDLE = (
    "05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972,3%@972] VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3835mW "
    "VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW"
)
THOR = (
    "05-14-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off,7%@2601] EMC_FREQ 34%@4266 "
    "GR3D_FREQ 87%@[1574,1574,1574] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C gpu@56.937C/66.625C "
    "VDD_GPU 37939mW/8660mW/37939mW VDD_CPU_SOC_MSS 30059mW/12281mW/30059mW VIN_SYS_5V0 15486mW/7424mW/15486mW "
    "VIN 124486mW/36487mW/124486mW"
)
THOR_BARE = (
    "05-14-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ 2%@1866 GR3D_FREQ @[1000,1000,1000] APE 150 "
    "VDD_GPU 6330mW/6330mW/6330mW VIN 28906mW/14453mW/28906mW"
)
NO_RAILS = "RAM 613/1971MB (lfb 100x4MB) CPU [2%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 0% PLL@24.5C"
# {name: (line, {rail: watts}, the rails that make the total)}
LINES: dict[str, tuple[str, dict[str, float], tuple[str, ...]]] = {
    "TX1": (TX1, {"VDD_IN": 2.532, "VDD_CPU": 0.076, "VDD_GPU": 0.019}, ("VDD_IN",)),
    "TX2": (
        TX2,
        {
            "VDD_SYS_GPU": 0.182,
            "VDD_SYS_SOC": 0.73,
            "VDD_4V0_WIFI": 0.0,
            "VDD_IN": 5.297,
            "VDD_SYS_CPU": 1.917,
            "VDD_SYS_DDR": 1.241,
        },
        ("VDD_IN",),
    ),
    "TX2 old": (
        TX2_OLD,
        {"VDD_IN": 2.003, "VDD_CPU": 0.32, "VDD_GPU": 0.4, "VDD_SOC": 0.4, "VDD_WIFI": 0.0, "VDD_DDR": 0.24},
        ("VDD_IN",),
    ),
    "Nano": (NANO, {"POM_5V_IN": 0.9, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.123}, ("POM_5V_IN",)),
    "AGX Xavier": (
        XAVIER,
        {"GPU": 0.0, "CPU": 0.216, "SOC": 0.864, "CV": 0.0, "VDDRQ": 0.144, "SYS5V": 1.889},
        ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
    ),
    "Xavier NX": (XAVIER_NX, {"VDD_IN": 3.875, "VDD_CPU_GPU_CV": 0.874, "VDD_SOC": 1.037}, ("VDD_IN",)),
    "AGX Orin": (
        AGX_ORIN,
        {"VDD_GPU_SOC": 2.39, "VDD_CPU_CV": 0.796, "VIN_SYS_5V0": 3.522, "VDDQ_VDD2_1V8AO": 0.301},
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ),
    "Orin Nano": (ORIN_NANO, {"VDD_IN": 4.556, "VDD_CPU_GPU_CV": 0.483, "VDD_SOC": 1.451}, ("VDD_IN",)),
    "AGX Orin JP7": (
        AGX_ORIN_JP7,
        {"VDD_GPU_SOC": 5.139, "VDD_CPU_CV": 3.034, "VIN_SYS_5V0": 5.064},
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ),
    "Thor": (THOR, {"VDD_GPU": 37.939, "VDD_CPU_SOC_MSS": 30.059, "VIN_SYS_5V0": 15.486, "VIN": 124.486}, ("VIN",)),
    "Thor bare": (THOR_BARE, {"VDD_GPU": 6.33, "VIN": 28.906}, ("VIN",)),
    "Thor idle": (THOR_IDLE, {"VDD_CPU_SOC_MSS": 3.924, "VIN_SYS_5V0": 5.064, "VIN": 15.004}, ("VIN",)),
}

SCRIPT = """#!{python}
import os, sys, time
interval = 1.0
for flag, value in zip(sys.argv[1:], sys.argv[2:]):
    if flag == "--interval":
        interval = int(value) / 1000
lines, dies, stalls, says, cut = {lines!r}, {dies!r}, {stalls!r}, {says!r}, {cut!r}
if says:
    sys.stderr.write(says + "\\n")
begin, n = time.monotonic(), 0
while True:
    if n == dies:
        if cut:
            sys.stdout.write(lines[n % len(lines)][:cut])
            sys.stdout.flush()
        os._exit(3)
    if n == stalls:
        time.sleep(1000)
    sys.stdout.write(lines[n % len(lines)] + "\\n")
    sys.stdout.flush()
    n += 1
    time.sleep(max(0.0, begin + n * interval - time.monotonic()))
"""


def write_tegrastats(
    path: Path, lines: Sequence[str], dies: int | None = None, stalls: int | None = None, says: str = "", cut: int = 0
) -> Path:
    """An executable that prints ``lines`` over and over, one every ``--interval`` milliseconds.

    It ends with exit code 3 after ``dies`` lines (having printed the first ``cut`` characters of another), or falls silent after
    ``stalls``; ``says`` is what it says on stderr.
    """
    path.write_text(SCRIPT.format(python=sys.executable, lines=list(lines), dies=dies, stalls=stalls, says=says, cut=cut))
    path.chmod(0o755)
    return path


_serial = itertools.count()


def put(file: Path, text: object) -> None:
    """As the kernel does: a reader sees the old text or the new one, never half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.parent / f".{next(_serial)}"
    partial.write_text(f"{text}\n")
    partial.replace(file)


def break_file(file: Path) -> None:
    """Reading it fails with an OSError, as an attribute of a channel that is off does; root is not spared either."""
    file.unlink(missing_ok=True)
    file.mkdir(parents=True)


def write_iio(root: Path, address: str, device: str, rails: Mapping[str, int], first: int = 0) -> Path:
    """L4T up to 32 (channels from 0) and 34 (from 1): one INA3221 with {rail: mW} as an iio device."""
    folder = root / "bus/i2c/drivers/ina3221x" / address / device
    for n, (rail, milliwatts) in enumerate(rails.items(), first):
        put(folder / f"rail_name_{n}", rail)
        put(folder / f"in_power{n}_input", milliwatts)
        put(folder / f"in_current{n}_input", milliwatts // 5)
        put(folder / f"in_voltage{n}_input", 5000)
        put(folder / f"polling_delay_{n}", "0 ms")
        put(folder / f"warn_current_limit_{n}", "32760 ma")
    return folder


def write_tx1(root: Path, address: str, rails: Mapping[str, int]) -> Path:
    """The driver before iio (kernel 3.10): its attributes lie beside the device."""
    folder = root / "bus/i2c/drivers/ina3221x" / address
    for n, (rail, milliwatts) in enumerate(rails.items()):
        put(folder / f"rail_name_{n}", rail)
        put(folder / f"power1_input_{n}", f"{milliwatts} mW")
        put(folder / f"in1_input_{n}", "5000 mV")
        put(folder / f"curr1_input_{n}", f"{milliwatts // 5} mA")
    return folder


def write_ina3221(
    root: Path, number: int, channels: Sequence[tuple[str, int, int]], update_ms: int | None = None, shunt_uohm: int = 5000
) -> Path:
    """Mainline's driver: three channels (label, mV, mA), shunt voltages and sums beside them, and no power file."""
    folder = root / "class/hwmon" / f"hwmon{number}"
    put(folder / "name", "ina3221")
    for n, (label, millivolts, milliamperes) in enumerate(channels, 1):
        put(folder / f"in{n}_label", label)
        put(folder / f"in{n}_enable", 1)
        put(folder / f"in{n}_input", millivolts)
        put(folder / f"curr{n}_input", milliamperes)
        put(folder / f"curr{n}_crit_alarm", 0)
        put(folder / f"in{n + 3}_input", milliamperes * shunt_uohm // 1000)
        put(folder / f"shunt{n}_resistor", shunt_uohm)
    put(folder / "in7_label", "sum of shunt voltages")
    put(folder / "in7_input", 9280)
    put(folder / "curr4_input", sum(channel[2] for channel in channels))
    if update_ms is not None:
        put(folder / "update_interval", update_ms)
    return folder


def write_chip(root: Path, number: int, name: str, **files: object) -> Path:
    """Any hwmon chip: ``write_chip(root, 3, "ina226", power1_input=2_500_000)``."""
    folder = root / "class/hwmon" / f"hwmon{number}"
    put(folder / "name", name)
    for file, text in files.items():
        put(folder / file, text)
    return folder


def renumber(root: Path, order: Mapping[int, int]) -> None:
    """What a reboot does: hwmon{old} -> hwmon{new}."""
    folder = root / "class/hwmon"
    for old in order:
        (folder / f"hwmon{old}").rename(folder / f"moved{old}")
    for old, new in order.items():
        (folder / f"moved{old}").rename(folder / f"hwmon{new}")
