"""How often our 95 % intervals hold the truth, by simulation, beside the naive ones that they replace.

    python benchmarks/coverage.py [--runs 400] [--seed 0] [--json coverage.json]

Goal: at least 92 % in every case in which an interval is usually given. Where the data are worth too few independent samples, the interval
must be refused (``given``), not be too narrow. Repeats: Student's t, sequential stopping by the rule of ``measure/plan.py`` (checked
against it on real records in the same run), ratios. Within a run: percentiles of series that are independent, skewed,
autocorrelated, of two speeds, drifting, or wander slowly under noise; each from its known distribution. Knows no machine: the same
seed gives the same table. Needs scipy; takes two to four minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.signal import lfilter
from scipy.stats import binom, norm

from edgejoule.measure.plan import needs_repeat
from edgejoule.measure.protocols import profile
from edgejoule.measure.stats import block_bootstrap, ratio_interval, sequential_interval, t_interval, unpaired_ratio_interval
from edgejoule.records import Device, Environment, Interval, Phase, Trace, Trial, Workload, floats

GOAL, Z = 0.92, 1.959964
RULE = 0.5  # a case counts towards the goal where at least half of its series are given an interval
OVER_REPEATS = 5  # so many times more runs where one is cheap
CHECKED = 40  # sequential runs that the real plan must stop at the same repeat
STANDARD = profile("standard")
ENERGY_STOP = 1.5 * STANDARD.energy_half_width  # of an on-board sensor

Array = npt.NDArray[np.float64]
Bounds = tuple[float, float] | None
Trying = Callable[[np.random.Generator], tuple[Bounds, Bounds, float, float]]  # ours, naive, the truth, a figure worth its mean


@dataclass(frozen=True)
class Case:
    kind: str
    name: str
    naive: str
    figure: str  # what the last of a try's values is
    trying: Trying
    effort: int = 1


@dataclass(frozen=True)
class Row:
    kind: str
    name: str
    runs: int
    given: float
    coverage: float | None
    naive: str
    naive_coverage: float | None
    figure: str
    mean: float


# ---------------------------------------------------------------- over repeats


def of(interval: Interval) -> Bounds:
    return None if interval.low is None or interval.high is None else (interval.low, interval.high)


def z_bounds(values: Array) -> Bounds:
    half = Z * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def bootstrap_bounds(values: Array, rng: np.random.Generator) -> Bounds:
    means = np.mean(values[rng.integers(0, len(values), (1000, len(values)))], axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def repeats(n: int, skewed: bool, bootstrap: bool, rng: np.random.Generator) -> tuple[Bounds, Bounds, float, float]:
    values = rng.lognormal(0, 0.1, n) if skewed else rng.normal(1, 0.02, n)
    naive = bootstrap_bounds(values, rng) if bootstrap else z_bounds(values)
    return of(t_interval(values.tolist())), naive, math.exp(0.005) if skewed else 1.0, n


def ratio(n: int, other: int, rng: np.random.Generator) -> tuple[Bounds, Bounds, float, float]:
    """``other`` 0: pairs that share a drift of 10 %; else unpaired, the second scattering three times as much."""
    if not other:
        drift = np.linspace(1, 1.1, n)
        ours, theirs = 1.05 * drift * rng.normal(1, 0.02, n), drift * rng.normal(1, 0.02, n)
        found = ratio_interval(ours.tolist(), theirs.tolist())
    else:
        ours, theirs = 1.05 * rng.normal(1, 0.01, n), rng.normal(1, 0.03, other)
        found = unpaired_ratio_interval(ours.tolist(), theirs.tolist())
    logs = [np.log(side) for side in (ours, theirs)]
    if other:
        error = sum(float(np.var(side, ddof=1)) / len(side) for side in logs) ** 0.5
    else:
        error = float(np.std(logs[0] - logs[1], ddof=1)) / n**0.5
    centre = float(np.mean(logs[0]) - np.mean(logs[1]))
    return of(found), (math.exp(centre - Z * error), math.exp(centre + Z * error)), 1.05, min(n, other or n)


@functools.cache
def quantile(n: int) -> float:
    """The factor of a half-width of n repeats, as the plan has it: from its interval of (0, 1, 0, 1, …), whose scatter is known."""
    values = [float(i % 2) for i in range(n)]
    high = sequential_interval(values).high
    assert high is not None
    return float((high - np.mean(values)) * n**0.5 / np.std(values, ddof=1))


def stopped(latencies: Array, energies: Array | None) -> int:
    """After how many repeats the sequential rule stops."""
    sides = [(latencies, STANDARD.latency_half_width)] + ([(energies, ENERGY_STOP)] if energies is not None else [])
    for n in range(STANDARD.repeats_min, STANDARD.repeats_max):
        widths = [quantile(n) * float(np.std(v[:n], ddof=1)) / n**0.5 / float(np.mean(v[:n])) / most for v, most in sides]
        if max(widths) <= 1:
            return n
    return STANDARD.repeats_max


def sequential(cov: float, energy_cov: float, look: str, rng: np.random.Generator) -> tuple[Bounds, Bounds, float, float]:
    """The interval at the stop, beside the plain t. Energy is power times latency, so that the two are not independent."""
    latencies = rng.normal(1, cov, STANDARD.repeats_max)
    energies = latencies * rng.normal(1, energy_cov, STANDARD.repeats_max) if energy_cov else None
    n = stopped(latencies, energies)
    values = (latencies if look == "latency" or energies is None else energies)[:n].tolist()
    return of(sequential_interval(values)), of(t_interval(values)), 1.0, n


def check_rule(rng: np.random.Generator) -> None:
    """Raises AssertionError where the real plan would stop at another repeat than ``stopped``."""
    for _ in range(CHECKED):
        latencies = 0.01 * rng.normal(1, rng.choice([0.005, 0.01, 0.02]), STANDARD.repeats_max)
        watts = 10 * rng.normal(1, rng.choice([0.01, 0.03]), STANDARD.repeats_max)
        trials = [record(n, latency, power) for n, (latency, power) in enumerate(zip(latencies, watts, strict=True))]
        stop = next(n for n in range(1, len(trials) + 1) if not needs_repeat(trials[:n], STANDARD))
        assert stop == stopped(latencies, latencies * watts), "the plan stops elsewhere: mend the simulated rule"


def record(n: int, latency_s: float, watts: float) -> Trial:
    """A whole trial of a board's energy counter, as the plan reads it: 100 inferences at a steady power, and no idle beside them."""
    window = 100 * latency_s
    times = np.linspace(0, window, 101)
    trace = Trace("gpu", "energy_j", floats(times), floats(watts * times), "nvml", "C", "gpu", window / 100)
    environment = Environment(Device("board", "cpu", "arm", 4, 2**30, "Linux"), 1, "runtime", {}, "fingerprint")
    return Trial(
        key=str(n),
        artifact_sha256="",
        workload=Workload(),
        protocol=STANDARD,
        meter="nvml",
        repeat=n,
        environment=environment,
        started_at=0.0,
        phases=(Phase("window", 0.0, window),),
        latencies_s=floats([latency_s] * 100),
        load_s=0.0,
        first_inference_s=0.0,
        peak_memory_bytes=0,
        traces=(trace,),
    )


# ---------------------------------------------------------------- within a run


def autoregressive(n: int, rho: float, rng: np.random.Generator) -> Array:
    """A stationary AR(1) series of variance 1."""
    noise = rng.normal(size=n) * (1 - rho**2) ** 0.5
    noise[0] = rng.normal()
    return np.asarray(lfilter([1], [1, -rho], noise))


def normal(n: int, rho: float, rng: np.random.Generator) -> Array:
    return autoregressive(n, rho, rng)


def skewed(n: int, rng: np.random.Generator) -> Array:
    return rng.lognormal(0, 0.5, n)


def two_speed(n: int, rng: np.random.Generator) -> Array:
    """A fifth of the time 20 % slower, in spells of 25 inferences on average, with 1 % of noise."""
    lengths = np.empty(2 * n // 25 + 50, dtype=np.int64)
    lengths[0::2], lengths[1::2] = rng.geometric(1 / 100, len(lengths[0::2])), rng.geometric(1 / 25, len(lengths[1::2]))
    slow = np.repeat(np.arange(len(lengths)) % 2, lengths)
    begin = rng.integers(0, max(1, len(slow) - n + 1))
    return np.where(slow[begin : begin + n] == 1, 1.2, 1.0) * rng.lognormal(0, 0.01, n)


def drifting(n: int, rng: np.random.Generator) -> Array:
    """Noise that rises by half its standard deviation over the window."""
    return np.linspace(0, 0.5, n) + rng.normal(size=n)


def wandering(n: int, rng: np.random.Generator) -> Array:
    """A quarter of the variance wanders slowly (rho 0.98) under noise that hides it."""
    return np.asarray(0.5 * autoregressive(n, 0.98, rng) + 0.75**0.5 * rng.normal(size=n), dtype=np.float64)


def solved(cumulative: Callable[[float], float], share: float) -> float:
    return float(brentq(lambda x: cumulative(x) - share, -10, 10))


def drifted(share: float) -> float:
    return solved(lambda x: float(np.mean(norm.cdf(x - np.linspace(0, 0.5, 2001)))), share)


def mixed(share: float) -> float:
    return math.exp(solved(lambda x: 0.8 * norm.cdf(x / 0.01) + 0.2 * norm.cdf((x - math.log(1.2)) / 0.01), share))


def iid_bootstrap(values: Array, share: float) -> Bounds:
    """What resampling single samples tends to: the resamples' percentile is an order statistic of binomial rank (Efron 1979)."""
    ranks = binom.ppf([0.025, 0.975], len(values), share).astype(int)
    low, high = np.sort(values)[np.clip(ranks, 0, len(values) - 1)]
    return float(low), float(high)


def within(series: Callable[[np.random.Generator], Array], percent: float, truth: float, rng: np.random.Generator) -> Any:
    values = series(rng)
    found = block_bootstrap(values, percent, seed=int(rng.integers(2**31)), resamples=600)  # type: ignore[arg-type]
    return of(found), iid_bootstrap(values, percent / 100), truth, found.n


# ---------------------------------------------------------------- the table


def cases() -> list[Case]:
    t = partial(Case, "repeats", figure="repeats", effort=OVER_REPEATS)
    found = []
    for n in (5, 10, 20):
        found.append(t(f"t, {n} repeats", "z", trying=partial(repeats, n, False, False)))
        found.append(t(f"t, {n} repeats", "percentile bootstrap", trying=partial(repeats, n, False, True)))
        found.append(t(f"t, {n} skewed repeats (lognormal, 10 %)", "z", trying=partial(repeats, n, True, False)))
        found.append(t(f"ratio, {n} pairs that share a drift", "z", trying=partial(ratio, n, 0)))
    stop = partial(Case, "repeats", naive="plain t", figure="repeats", effort=2 * OVER_REPEATS)
    found += [t(f"ratio, unpaired {n} and {m}", "z", trying=partial(ratio, n, m)) for n, m in ((5, 5), (5, 12))]
    for cov in (0.005, 0.01, 0.015, 0.02, 0.03):
        found.append(stop(f"sequential, latency scatters {100 * cov:g} %", trying=partial(sequential, cov, 0.0, "latency")))
    for cov in (0.03, 0.05, 0.06):
        found.append(stop(f"sequential, power scatters {100 * cov:g} %: energy", trying=partial(sequential, 0.005, cov, "energy")))
    return found + in_runs()


def in_runs() -> list[Case]:
    gauss, skew = (lambda share: float(norm.ppf(share))), (lambda share: math.exp(0.5 * float(norm.ppf(share))))
    kinds: list[tuple[str, Callable[..., Array], Callable[[float], float], dict[int, tuple[int, ...]]]] = [
        ("independent", partial(normal, rho=0.0), gauss, {300: (50, 90, 99), 1000: (50, 90, 99)}),
        ("lognormal", skewed, skew, {1000: (50, 90, 99)}),
        ("AR(1), rho 0.9", partial(normal, rho=0.9), gauss, {300: (50,), 1000: (50, 90, 99), 3000: (50, 90), 10_000: (99,)}),
        ("AR(1), rho 0.98", partial(normal, rho=0.98), gauss, {1000: (50,), 5000: (50, 90, 99)}),
        ("two speeds", two_speed, mixed, {1000: (50, 90), 4000: (50, 90, 99)}),
        ("drift", drifting, drifted, {1000: (50, 90, 99), 3000: (50, 90, 99)}),
        ("slow wander under noise", wandering, gauss, {1000: (50, 90), 4000: (50, 90)}),
    ]
    found = []
    for name, make, truth, sizes in kinds:
        for n, percents in sizes.items():
            for percent in percents:
                trying = partial(within, partial(sized, make, n), percent, truth(percent / 100))
                found.append(Case("run", f"p{percent} of {n}, {name}", "iid bootstrap", "worth", trying))
    return found


def sized(make: Callable[..., Array], n: int, rng: np.random.Generator) -> Array:
    return make(n, rng=rng)


def simulate(work: tuple[int, int, int]) -> Row:
    """One case, by its number: cases hold functions, which do not travel between processes."""
    number, runs, seed = work
    case, rng = cases()[number], np.random.default_rng([seed, number])
    tries = [case.trying(rng) for _ in range(runs * case.effort)]
    return Row(
        case.kind,
        case.name,
        len(tries),
        sum(ours is not None for ours, *_ in tries) / len(tries),
        share([(ours, truth) for ours, _, truth, _ in tries]),
        case.naive,
        share([(naive, truth) for _, naive, truth, _ in tries]),
        case.figure,
        float(np.mean([figure for *_, figure in tries])),
    )


def share(tries: Sequence[tuple[Bounds, float]]) -> float | None:
    """How many of the intervals that were given hold the truth; None where fewer than 20 were."""
    hits = [bounds[0] <= truth <= bounds[1] for bounds, truth in tries if bounds is not None]
    return float(np.mean(hits)) if len(hits) >= 20 else None


def shown(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="How often our 95 % intervals hold the truth.")
    parser.add_argument("--runs", type=int, default=400, help="simulations of a case; five times as many where one is cheap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    check_rule(np.random.default_rng(options.seed))
    with Pool(options.jobs) as pool:
        rows = pool.map(simulate, [(number, options.runs, options.seed) for number in range(len(cases()))], chunksize=1)
    print("| case | ours, where given | given | mean repeats or effective samples | naive | naive covers |\n|---|---|---|---|---|---|")
    for row in rows:
        mark = " **below**" if row.coverage is not None and row.coverage < GOAL and row.given >= RULE else ""
        cells = [row.name, shown(row.coverage) + mark, f"{100 * row.given:.0f} %", f"{row.mean:.4g}", row.naive, shown(row.naive_coverage)]
        print("| " + " | ".join(cells) + " |")
    given = [row.coverage for row in rows if row.coverage is not None and row.given >= RULE]
    print(
        f"\nsmallest coverage {100 * min(given):.1f} % (goal: at least {100 * GOAL:.0f} % where an interval is the rule, not the exception)"
    )
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "goal": GOAL, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
