"""One command on an Android phone through ``adb``, and what the phone says of its heat and its charger. Knows no sensor.

``adb`` reports its own troubles on stderr with an exit code, older ones print the phone's on stdout: both are read.
"""

from __future__ import annotations

import re
import subprocess

from edgejoule.errors import MeterError

TIMEOUT_S = 10.0
HOT = 2  # moderate: from here on Android asks programs to do less
REMEDIES = (
    ("unauthorized", "allow USB debugging on the phone's screen"),
    ("offline", "reconnect the phone (adb reconnect)"),
    ("more than one", 'name one with serial="…" (adb devices lists them)'),
    ("no devices", "connect a phone and switch on its USB debugging"),
    ("not found", "adb devices lists those there are"),
    ("Permission denied", "this build of Android shows it to root only (adb root)"),
    ("No such file", "this phone does not have it"),
)


def ask(adb: str, serial: str, command: str, timeout_s: float = TIMEOUT_S) -> str:
    """What ``adb shell command`` prints. Raises MeterError with a remedy where adb or the phone refuses, or does not answer in time."""
    argv = [adb, *(["-s", serial] if serial else []), "shell", command]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise MeterError(f"adb did not answer within {timeout_s:g} s: reconnect the phone (adb reconnect)") from error
    except (OSError, ValueError) as error:
        raise MeterError(f"{adb} cannot be run ({error}): install Android's platform tools, or name it with adb=") from error
    text = done.stdout.decode(errors="replace").replace("\r\n", "\n")
    complaint = (done.stderr.decode(errors="replace").strip() or ("" if done.returncode == 0 else text.strip())).replace("\0", "")
    if done.returncode != 0 or (complaint and not text.strip()):
        last = complaint.splitlines()[-1].strip()[:200] if complaint else f"exit code {done.returncode}"
        remedy = next((advice for mark, advice in REMEDIES if mark in last), "run it in a terminal to see why")
        raise MeterError(f"adb shell {command.split()[0]} failed ({last}): {remedy}")
    return text


def charger(text: str) -> str:
    """What powers the phone besides its battery, by ``dumpsys battery``; empty where nothing does, or it does not say."""
    return ", ".join(re.findall(r"^\s*(\w+) powered: true\s*$", text, re.MULTILINE))


def heat(text: str) -> int:
    """The thermal status by ``dumpsys thermalservice``, 0 (none) to 6 (shutdown); 0 where it does not say."""
    found = re.search(r"^Thermal Status: (\d)\s*$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def doubts(adb: str, serial: str) -> dict[str, str]:
    """{caveat code: what was seen} of a phone now; empty where it does not answer."""
    found = {}
    try:
        status = heat(ask(adb, serial, "dumpsys thermalservice"))
        found = {"throttled": f"Android's thermal status is {status}"} if status >= HOT else {}
    except MeterError:  # before Android 10 there is no such service: absence raises no doubt
        pass
    try:
        power = charger(ask(adb, serial, "dumpsys battery"))
    except MeterError:
        power = ""
    return found | ({"charger": f"powered by {power}"} if power else {})
