"""How far a window's net energy is from the truth, read off simulated sensors whose true power is known exactly, beside other ways to read.

    python benchmarks/meter_accuracy.py [--seeds 40] [--full] [--json meter_accuracy.json]

Goal: at most 1 % wherever physics allows. Each case is one kind of sensor; a run is 10 s of idle at 5 W, a load, and 10 s of idle, with
the sensor's and the poller's phase drawn by seed. Every reader sees the same sensor and takes its own idle off, measured by its own
rule before the window. The rules of other programs are written down here from descriptions of them, not run: zeus (a counter's
difference, or power polled at half its update period, at least every 0.1 s, rectangle rule), CodeCarbon (power times the time since the
last tick, every 15 s or 1 s and at the end; a counter that decreases is taken to have wrapped, and a read that fails is 0), jtop
(every 0.5 s avg = (mW + old avg) // 2; the mean of those times the time; the sum of all rails where none is the input's). They read
nothing but the sensor: what those programs guess where there is none is left out. Deterministic by seed; no clock and no load is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))  # the simulated sensors are the tests'

from edgejoule.errors import MeterError
from edgejoule.measure.energy import Energy, window_energy
from edgejoule.measure.rapl import Rapl
from edgejoule.records import Phase, Trace, floats
from tests.fakes.measuring import set_energy, write_domain
from tests.fakes.simulated import Power, boxcar, exponential, polls, quantised

Array = npt.NDArray[np.float64]
Rng = np.random.Generator

IDLE_W, IDLE_S, GOAL = 5.0, 10.0, 0.01
WINDOWS_S = (0.5, 1.0, 5.0, 10.0, 30.0)
START_S = 100.0
RANGE_J = 65_532.610987  # where an AMD package counter wraps; every run crosses that somewhere
JTOP_S = 0.5
OURS = "edgejoule"


@dataclass(frozen=True)
class Case:
    """One kind of sensor, and how the tool polls it."""

    name: str
    seen: str = "instant"  # instant, boxcar, exponential, counter
    width_s: float = 0.0
    update_s: float = 0.0  # 0: whenever it is read
    poll_s: float = 0.05
    late_s: float = 0.002  # how late a poll may be
    stamp_s: float = 0.0  # how wrong a stamp may be
    step: float = 0.0  # watts or joules
    missing: float = 0.0  # share of the reads that fail
    hole_s: float = 0.0  # no reads for so long, somewhere in the window
    offset_s: float = 0.0  # of the meter's clock, known only to be no more than this
    rails: tuple[tuple[float, bool], ...] = ((1.0, True),)  # share of the power, and whether it makes the total
    leaf: bool = False  # through the real RAPL leaf on a powercap tree
    input_rail: bool = True  # the board has one rail that feeds the rest

    @property
    def averaging_s(self) -> float:
        return max(self.width_s, self.update_s)


ORIN = ((0.45, True), (0.2, True), (0.35, True), (0.15, False))  # the last is fed by the third
CASES = (
    Case("boxcar 0.42 s", "boxcar", 0.42),
    Case("exponential 0.42 s", "exponential", 0.42),
    Case("NVML power.draw, mean of 1 s", "boxcar", 1.0, 0.1),
    Case("NVML energy counter, every 0.1 s", "counter", 0.0, 0.1, step=1e-3),
    Case("25 of every 100 ms", "boxcar", 0.025, 0.1),
    Case("a snapshot every 0.1 s, polled every 20 ms", "instant", 0.0, 0.1, poll_s=0.02),
    Case("means of 0.1 s held for 0.1 s, polled every 20 ms", "boxcar", 0.1, 0.1, poll_s=0.02),
    Case("stamps off by up to 5 ms, polls late by up to 30 ms", "boxcar", 0.1, poll_s=0.02, late_s=0.03, stamp_s=0.005),
    Case("quantised to 0.25 W", "boxcar", 0.1, 0.02, poll_s=0.02, step=0.25),
    Case("RAPL leaf, wraps once a run", "counter", 0.0, 0.001, step=61e-6, leaf=True),
    Case("RAPL leaf, wraps, 5 % of reads fail", "counter", 0.0, 0.001, step=61e-6, leaf=True, missing=0.05),
    Case("5 % of reads fail", "boxcar", 0.1, poll_s=0.02, missing=0.05),
    Case("no reads for 0.4 s of the window", "boxcar", 0.1, poll_s=0.02, hole_s=0.4),
    Case("meter's clock 50 ms off, not aligned", "boxcar", 0.1, poll_s=0.02, offset_s=0.05),
    Case("four rails, one fed by another", "boxcar", 0.1, poll_s=0.02, rails=ORIN, input_rail=False),
)


# ---------------------------------------------------------------- the truth


def constant(rng: Rng, seconds: float) -> Power:
    return Power(np.array([START_S, START_S + seconds]), np.array([15.0, IDLE_W]), IDLE_W)


def bursty(rng: Rng, seconds: float) -> Power:
    """Bursts of 20 to 80 ms at 15 to 25 W with 10 to 60 ms between them, in no step with anything."""
    lengths = rng.uniform((0.02, 0.01), (0.08, 0.06), (int(seconds / 0.03) + 2, 2)).ravel()
    knots = START_S + np.concatenate(([0.0], np.cumsum(lengths)))
    watts = np.where(np.arange(len(knots)) % 2 == 0, rng.uniform(15, 25, len(knots)), IDLE_W)
    inside = knots < START_S + seconds
    return Power(np.append(knots[inside], START_S + seconds), np.append(watts[inside], IDLE_W), IDLE_W)


def in_step(rng: Rng, seconds: float) -> Power:
    """25 W for 50 ms of every 100 ms: as often as many sensors update."""
    knots = START_S + 0.05 * np.arange(max(2, round(seconds / 0.05)) + 1, dtype=np.float64)
    watts = np.full(len(knots), IDLE_W)
    watts[:-1:2] = 25.0
    return Power(knots, watts, IDLE_W)


SHAPES: dict[str, Callable[[Rng, float], Power]] = {"constant": constant, "bursty": bursty, "in step": in_step}


@dataclass(frozen=True)
class Run:
    """One sensor over one load, with its phase fixed."""

    case: Case
    power: Power
    seconds: float
    phase_s: float
    hole: tuple[float, float]
    since_j: float  # what a counter showed when the run began
    seed: int

    def values(self, at: Any) -> Array:
        """What a read at each instant gives: watts, or a counter's joules since long ago."""
        case, t = self.case, np.asarray(at, dtype=np.float64) - self.case.offset_s
        if case.update_s:
            t = self.phase_s + np.floor((t - self.phase_s) / case.update_s) * case.update_s
        if case.seen == "counter":
            found = self.since_j + self.power.joules(t) - self.power.joules(START_S - 2 * IDLE_S)
        elif case.seen == "boxcar":
            found = boxcar(self.power, t, case.width_s)
        else:
            found = exponential(self.power, t, case.width_s) if case.seen == "exponential" else self.power.at(t)
        return quantised(found, case.step) if case.step else found

    def fails(self, at: Array, who: str) -> npt.NDArray[np.bool_]:
        """Which reads fail: some at random, all in the hole."""
        rng = np.random.default_rng((self.seed, len(who), len(at)))
        return np.asarray((rng.random(len(at)) < self.case.missing) | ((at > self.hole[0]) & (at < self.hole[1])))


def a_run(case: Case, shape: str, seconds: float, seed: int) -> Run:
    rng = np.random.default_rng((seed, CASES.index(case), list(SHAPES).index(shape), round(10 * seconds)))
    begin = START_S + rng.uniform(0, max(seconds - case.hole_s, 0.0))
    hole = (begin, begin + min(case.hole_s, seconds))
    power = SHAPES[shape](rng, seconds)
    within = power.joules([START_S, START_S + seconds])
    since = RANGE_J - 2 * IDLE_S * IDLE_W - rng.uniform(0.1, 0.9) * float(within[1] - within[0])
    return Run(case, power, seconds, float(rng.uniform(0, 1)), hole, since, seed)


# ---------------------------------------------------------------- the readers: joules above idle, or None


def measured(run: Run) -> Energy:
    """The tool: polls, and window_energy with idle on both sides."""
    case, rng = run.case, np.random.default_rng((run.seed, 1))
    begin, end = START_S - IDLE_S, START_S + run.seconds + IDLE_S
    at = polls(begin + rng.uniform(-case.poll_s, 0), end + 2 * case.poll_s, case.poll_s, rng, case.late_s)
    at = at[~run.fails(at, "ours")]
    stamps = at + rng.uniform(-case.stamp_s, case.stamp_s, len(at)) if case.stamp_s else at
    at, stamps = at[np.argsort(stamps)], np.sort(stamps)
    values = through_the_leaf(run, at) if case.leaf else run.values(at)
    quantity: Any = "energy_j" if case.seen == "counter" else "power_w"
    averaging = 0.001 if case.leaf else case.averaging_s
    traces = [
        Trace(f"r{n}", quantity, floats(stamps), floats(values * share), "sim", "C", "board-in", case.poll_s, averaging,
              offset_uncertainty_s=case.offset_s, total=total)
        for n, (share, total) in enumerate(case.rails)
    ]  # fmt: skip
    window = Phase("window", START_S, START_S + run.seconds)
    return window_energy(traces, window, Phase("idle_before", begin, window.start_s), Phase("idle_after", window.stop_s, end))


def through_the_leaf(run: Run, at: Array) -> Array:
    """The counter as the RAPL leaf reads it off a powercap tree whose number wraps."""
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:
        folder, top = Path(root) / "intel-rapl:0", round(RANGE_J * 1e6)
        write_domain(folder, "package-0", 0, top)
        leaf, found = Rapl(root), list[float]()
        for joules in run.values(at):
            set_energy(folder, int(joules * 1e6) % top)
            try:
                found.append(leaf.read()["package-0"])
            except MeterError:
                found.append(math.nan)  # cannot happen here: a read that fails was left out before
        return np.array(found)


def net(rule: Callable[[Run, float, float], float | None], run: Run) -> float | None:
    """A rule's gross energy of the window, less its own idle power, from the 10 s before, times the time."""
    gross, idle = rule(run, START_S, START_S + run.seconds), rule(run, START_S - IDLE_S, START_S)
    return None if gross is None or idle is None else gross - idle / IDLE_S * run.seconds


def reads(run: Run, at: Array, who: str) -> tuple[Array, Array]:
    good = ~run.fails(at, who)
    return at[good], run.values(at[good]) * all_rails(run.case, summed=False)


def all_rails(case: Case, summed: bool) -> float:
    return sum(share for share, total in case.rails if total or summed)


def mean_times_time(run: Run, start: float, stop: float) -> float | None:
    rng = np.random.default_rng((run.seed, 2))
    at, values = reads(run, polls(start + rng.uniform(0, run.case.poll_s), stop, run.case.poll_s), "mean")
    if len(at) < 2:
        return None
    watts = (values[-1] - values[0]) / (at[-1] - at[0]) if run.case.seen == "counter" else np.mean(values)
    return float(watts * (stop - start))


def zeus(run: Run, start: float, stop: float) -> float | None:
    if run.case.seen == "counter":
        first, last = run.values([start, stop])
        return float(last - first)
    period = min(0.1, run.case.update_s / 2 if run.case.update_s else 0.1)
    at, watts = reads(run, np.append(np.arange(start, stop, period), stop), "zeus")
    return float(np.sum(watts[:-1] * np.diff(at))) if len(at) > 1 else None


def codecarbon(run: Run, start: float, stop: float, every_s: float) -> float | None:
    ticks = np.append(np.arange(start + every_s, stop, every_s), stop)
    if run.case.seen != "counter":
        at, watts = reads(run, ticks - 1e-3, "carbon")  # the last read falls just inside; a tick that fails is left to the next one
        return float(np.sum(watts * np.diff(np.append(start, at)))) if len(at) else None
    at = np.append(start, ticks)
    raw = np.mod(run.values(at), RANGE_J) if run.case.leaf else run.values(at)
    raw = np.where(run.fails(at, "carbon"), 0.0, raw)  # a read that fails is 0
    steps = np.diff(raw)
    return float(np.sum(np.where(steps < 0, steps + RANGE_J, steps)))


def jtop(run: Run, start: float, stop: float) -> float | None:
    if run.case.seen == "counter":
        return None
    rng = np.random.default_rng((run.seed, 3))
    at, watts = reads(run, np.arange(START_S - IDLE_S - 5 + rng.uniform(0, JTOP_S), stop, JTOP_S), "jtop")
    milliwatts = watts * 1e3 * all_rails(run.case, summed=not run.case.input_rail) / all_rails(run.case, summed=False)
    average, averages = int(milliwatts[0]), list[int]()
    for power in milliwatts:
        average = (int(power) + average) // 2
        averages.append(average)
    inside = [value for t, value in zip(at, averages, strict=True) if start <= t < stop]
    return float(np.mean(inside)) / 1e3 * (stop - start) if inside else None


READERS: dict[str, Callable[[Run], float | None]] = {
    "mean x time": lambda run: net(mean_times_time, run),
    "zeus' rule": lambda run: net(zeus, run),
    "CodeCarbon's, 15 s": lambda run: net(lambda run, start, stop: codecarbon(run, start, stop, 15.0), run),
    "CodeCarbon's, 1 s": lambda run: net(lambda run, start, stop: codecarbon(run, start, stop, 1.0), run),
    "jtop's": lambda run: net(jtop, run),
}


# ---------------------------------------------------------------- the tables


def figures(case: Case, shape: str, seconds: float, seeds: int) -> dict[str, Any]:
    """Bias, 95th percentile of the error's size and share of refusals of every reader, over the seeds."""
    runs = [a_run(case, shape, seconds, seed) for seed in range(seeds)]
    row: dict[str, Any] = {"case": case.name, "load": shape, "window_s": seconds}
    energies, true = [measured(run) for run in runs], [true_net_j(run) for run in runs]
    found = {OURS: [energy.net_energy_j for energy in energies]}
    found |= {name: [reader(run) for run in runs] for name, reader in READERS.items()}
    for name, joules in found.items():
        many = np.array([j / t - 1 for j, t in zip(joules, true, strict=True) if j is not None])
        row[name] = {
            "bias": float(np.mean(many)) if len(many) else None,
            "p95": float(np.quantile(np.abs(many), 0.95)) if len(many) else None,
            "refused": 1 - len(many) / seeds,
        }
    row["doubts"] = sorted({doubt.code for energy in energies for doubt in energy.caveats})
    return row


def true_net_j(run: Run) -> float:
    joules = run.power.joules([START_S, START_S + run.seconds])
    return float(joules[1] - joules[0] - IDLE_W * run.seconds)


def cell(row: dict[str, Any], reader: str) -> str:
    found = row[reader]
    doubted = "†" if reader == OURS and row["doubts"] else ""
    if found["p95"] is None:
        return "–" + doubted
    return f"{percent(found['bias'], '+')} ({percent(found['p95'])})" + ("*" if found["refused"] > 0 else "") + doubted


def percent(share: float, sign: str = "") -> str:
    value = 100 * share
    return f"{value:{sign}.2f}" if abs(value) < 9.995 else f"{value:{sign}.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def report(rows: Sequence[dict[str, Any]], full: bool) -> str:
    mine = table(
        ("sensor", "load", *(f"{w:g} s" for w in WINDOWS_S)),
        [
            (case.name, shape, *(cell(r, OURS) for r in rows if (r["case"], r["load"]) == (case.name, shape)))
            for case in CASES
            for shape in SHAPES
        ],
    )
    chosen = [r for r in rows if full or (r["window_s"] == 10 and r["load"] != "in step")]
    head = ("sensor", "load", *(("window",) if full else ()), OURS, *READERS)
    windows = [(f"{r['window_s']:g} s",) if full else () for r in chosen]
    others = table(
        head,
        [(r["case"], r["load"], *window, *(cell(r, name) for name in (OURS, *READERS))) for r, window in zip(chosen, windows, strict=True)],
    )
    over = [r for r in rows if (r[OURS]["p95"] or 0.0) > GOAL]
    worst = (
        "".join(
            f"- {r['case']}, {r['load']}, {r['window_s']:g} s: {cell(r, 'edgejoule')}; it says {', '.join(r['doubts']) or 'nothing'}\n"
            for r in over
        )
        or "- none\n"
    )
    note = (
        "Bias in % of the true net energy, in brackets the 95th percentile of the error's size. – refused (other readers: not applicable),"
        " * refused in some runs, † edgejoule itself doubts the figure (a caveat)."
    )
    where = "of every window" if full else "10 s windows"
    return f"{note}\n\nedgejoule, by window:\n\n{mine}\nAll readers, {where}:\n\n{others}\nedgejoule above 1 %:\n\n{worst}"


def main() -> None:
    parser = argparse.ArgumentParser(description="How far a window's net energy is from the truth, on simulated sensors.")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--full", action="store_true", help="every window and load in the table of all readers")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        print(case.name, file=sys.stderr, flush=True)
        rows += [figures(case, shape, seconds, options.seeds) for shape in SHAPES for seconds in WINDOWS_S]
    print(report(rows, options.full), end="")
    if options.json:
        options.json.write_text(json.dumps({"seeds": options.seeds, "goal": GOAL, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
