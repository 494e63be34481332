"""Fake adb, perf and powermetrics: small programs that answer with real text at a real pace, and fail as the real ones do.

Each function writes an executable into a folder and returns its path; a fake phone's files may be changed while it is being read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ADB = """#!/bin/sh
# adb [-s serial] shell command
here={here}
if [ "$1" = -s ]; then
    case "$2" in {serial}) shift 2 ;; *) echo "error: device '$2' not found" >&2; exit 1 ;; esac
fi
mode=$(cat "$here/mode")
case "$mode" in
    offline) echo 'error: device offline' >&2; exit 1 ;;
    unauthorized) echo 'error: device unauthorized.' >&2; exit 1 ;;
    two) echo 'error: more than one device/emulator' >&2; exit 1 ;;
    hung) sleep 60 ;;
    slow) sleep 1.2 ;;
esac
case "$2" in
    *energy_value*)
        case "$mode" in
            denied) echo 'cat: /sys/bus/iio/devices/iio:device0/energy_value: Permission denied' >&2; exit 1 ;;
            nuls) printf 't=1\\0\\0\\0\\n\\0CH0(T=1)[A], 5'; exit 0 ;;
            file) cat "$here/energy_value"; exit 0 ;;
        esac
        now=$(($(date +%s%3N) - {boot_ms}))
        at=$((now - now % 100))
        printf 't=%d\\r\\nCH0(T=%d)[S10M_VDD_TPU], %d\\r\\nCH3(T=%d)[S2M_VDD_CPUCL2], %d\\r\\n' $at $at $((at * 500)) $at $((at * 2000 + 7))
        printf 't=%d\\r\\nCH0(T=%d)[VSYS_PWR_DISPLAY], %d\\r\\n' $at $at $((at * 1000)) ;;
    *enabled_rails*) printf 'CH0[S10M_VDD_TPU]:TPU\\nCH3[S2M_VDD_CPUCL2]:CPU\\nCH0[VSYS_PWR_DISPLAY]:Display\\n' ;;
    'dumpsys battery') cat "$here/battery" ;;
    'dumpsys thermalservice') cat "$here/thermal" ;;
    *) echo "sh: $2: inaccessible or not found" >&2; exit 127 ;;
esac
"""

BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Max charging current: 0
  Max charging voltage: 0
  Charge counter: 3270000
  status: 3
  health: 2
  present: true
  level: 87
  scale: 100
  voltage: 4352
  temperature: 274
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=34.2, mType=0, mName=skin, mStatus=1}
HAL Ready: true
"""

PERF = """#!{python} -SEs
import sys, time
mode, watts, args = {mode!r}, {watts!r}, sys.argv[1:]
assert args[:5] == ["stat", "-a", "-x,", "--log-fd", "1"], args
period = int(args[args.index("-I") + 1]) / 1e3
events = args[args.index("-e") + 1].split(",")
if mode == "denied":
    print("Error:\\nAccess to performance monitoring and observability operations is limited.", file=sys.stderr)
    sys.exit(255)
if mode == "no event":
    print("event syntax error: 'power/energy-pkg/'", file=sys.stderr)
    sys.exit(129)
print("# started on Fri Jun 20 10:00:00 2025\\n", flush=True)
begun, last = time.monotonic(), 0.0
for n in range(100000):
    time.sleep(period)
    now = time.monotonic() - begun
    for event in events:
        value = "%.2f" % (watts * (now - last))
        if mode == "gaps" and n % 3 == 1 or mode == "not supported":
            value = "<not counted>" if mode == "gaps" else "<not supported>"
        line = "%16.9f,%s,Joules,%s,%d,100.00,," % (now, value, event, 1e9 * (now - last))
        if mode == "comma":
            line = line.replace(".", ",")
        print("\\0garbage " * (mode == "garbage" and n % 3 == 1) + line, flush=True)
    last = now
"""

POWERMETRICS = """#!{python} -SEs
import sys, time
mode, args = {mode!r}, sys.argv[1:]
period = int(args[args.index("-i") + 1]) / 1e3
if mode == "user":
    print("powermetrics must be invoked as the superuser", file=sys.stderr)
    sys.exit(1)
print("Machine model: Mac0,0\\nOS version: 23A000\\nBoot arguments:\\n\\n", flush=True)
last = time.monotonic()
while True:
    time.sleep(period)
    now = time.monotonic()
    date = time.strftime("%a %b %d %H:%M:%S %Y +0000", time.gmtime())
    print("*** Sampled system activity (%s) (%.2fms elapsed) ***" % (date, 1e3 * (now - last)))
    print("\\n**** Processor usage ****\\n\\nE-Cluster Power: 105 mW\\nCPU Power: 2000 mW\\nGPU Power: 900 mW\\nANE Power: 100 mW")
    print("Combined Power (CPU + GPU + ANE): 3000 mW\\n\\n**** GPU usage ****\\n\\nGPU Power: 900 mW\\n")
    print("**** Thermal pressure ****\\n\\nCurrent pressure level: %s\\n" % ("Heavy" if mode == "hot" else "Nominal"), flush=True)
    last = now
"""


def fake_adb(folder: Path, mode: str = "", serial: str = "PIXEL6") -> str:
    """A Pixel: 0.5, 2 and 1 W on three rails of two monitors, latched every 0.1 s. ``folder/mode`` says how it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("mode", mode), ("battery", BATTERY), ("thermal", THERMAL)):
        (folder / name).write_text(text)
    boot_ms = int(1000 * time.time()) - 473_848
    return _executable(folder / "adb", ADB.replace("{here}", str(folder)).replace("{serial}", serial).replace("{boot_ms}", str(boot_ms)))


def fake_perf(folder: Path, mode: str = "", watts: float = 20.0) -> str:
    """``perf stat -I`` of a package that draws ``watts``."""
    text = PERF.replace("{python}", sys.executable).replace("{mode!r}", repr(mode)).replace("{watts!r}", repr(watts))
    return _executable(folder / "perf", text)


def fake_powermetrics(folder: Path, mode: str = "") -> str:
    """A Mac that draws 3 W."""
    return _executable(folder / "powermetrics", POWERMETRICS.replace("{python}", sys.executable).replace("{mode!r}", repr(mode)))


def _executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)
