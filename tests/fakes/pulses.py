"""Synthetic power traces with known energy: pulses of several shapes on an idle that may drift, as a sampling meter would see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgejoule.records import Trace, floats

Samples = npt.NDArray[np.float64]
WITHIN = (np.arange(20) - 9.5) / 20  # of a period around the stamp: a meter shows the mean over its period, not an instant
Shape = Callable[[Samples, float], Samples]  # seconds since the pulse began (may be negative), its length -> 0 … 1


def square(since_s: Samples, length_s: float) -> Samples:
    return ((since_s >= 0) & (since_s < length_s)).astype(np.float64)


def two_level(since_s: Samples, length_s: float) -> Samples:
    """The second half at 35 %."""
    return square(since_s, length_s) * np.where(since_s < length_s / 2, 1.0, 0.35)


def ramped(since_s: Samples, length_s: float) -> Samples:
    """Up in a quarter of the length, down in another."""
    return np.clip(np.minimum(since_s, length_s - since_s) / (length_s / 4), 0.0, 1.0)


def tailed(tail: float) -> Shape:
    """Square with an exponential tail of ``tail`` lengths."""

    def shape(since_s: Samples, length_s: float) -> Samples:
        after = np.exp(-np.clip(since_s - length_s, 0.0, None) / (tail * length_s))
        return np.where(since_s < 0, 0.0, np.where(since_s < length_s, 1.0, after))

    return shape


@dataclass(frozen=True)
class Pulses:
    """``count`` pulses of ``length_s``, ``gap_s`` apart, with ``before_s`` and ``after_s`` of idle around them. Watts and seconds."""

    count: int = 5
    length_s: float = 0.02
    gap_s: float = 0.03
    before_s: float = 0.4
    after_s: float = 0.4
    rate_hz: float = 5000.0
    idle_w: float = 1.0
    step_w: float = 2.0
    shape: Shape = square
    noise_w: float = 0.0
    linear_w: float = 0.0  # drift of the idle from first to last sample
    sine_w: float = 0.0  # amplitude of a slow drift
    sine_s: float = 1.5
    jitter: float = 0.0  # of the stamps, as a share of the period
    quantum_w: float = 0.0
    missing: float = 0.0  # share of samples that are left out
    spikes: int = 0  # in the idle before, 15 samples each, five times the step
    seed: int = 0
    starts_s: Samples = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts_s", self.before_s + np.arange(self.count) * (self.length_s + self.gap_s))

    @property
    def duration_s(self) -> float:
        return self.before_s + self.count * self.length_s + (self.count - 1) * self.gap_s + self.after_s

    def truth(self) -> Samples:
        """(count,) joules of each pulse above the idle, its whole tail included: integrated on a grid a hundred times finer."""
        fine = np.arange(0.0, self.duration_s, 1 / self.rate_hz / 20)
        each = [np.sum(self.shape(fine - start, self.length_s)) / self.rate_hz / 20 for start in self.starts_s]
        return self.step_w * np.array(each)

    def samples(self) -> tuple[Samples, Samples]:
        """Stamps in seconds and watts, both (N,)."""
        rng = np.random.default_rng(self.seed)
        n = round(self.duration_s * self.rate_hz) + 1
        times = (np.arange(n) + self.jitter * rng.uniform(-0.5, 0.5, n)) / self.rate_hz
        times -= times[0]
        watts = self.idle_w + self.linear_w * times / times[-1] + self.sine_w * np.sin(2 * np.pi * times / self.sine_s)
        for start in self.starts_s:
            near = (times > start - 0.01) & (times < start + 40 * self.length_s)
            within = [self.shape(times[near] + offset / self.rate_hz - start, self.length_s) for offset in WITHIN]
            watts[near] += self.step_w * np.mean(within, axis=0)
        for at in np.linspace(0.1, 0.9, self.spikes) * self.before_s * self.rate_hz:
            watts[int(at) : int(at) + 15] += 5 * self.step_w
        watts = watts + self.noise_w * rng.standard_normal(n)
        if self.quantum_w:
            watts = np.round(watts / self.quantum_w) * self.quantum_w
        kept = rng.uniform(size=n) >= self.missing
        kept[[0, -1]] = True
        return times[kept], watts[kept]


def power_trace(times: Samples, watts: Samples, rail: str = "all", **changes: Any) -> Trace:
    """A rail of power as a trace file would give it."""
    fields: dict[str, Any] = {"total": True, "averaging_s": 0.0, "grade": "B", "scope": "board-in", "clock_id": "file"} | changes
    return Trace(
        rail=rail,
        quantity="power_w",
        times_s=floats(times),
        values=floats(watts),
        source="csv",
        period_s=float(np.median(np.diff(times))),
        **fields,
    )


def counter_trace(times: Samples, watts: Samples, rail: str = "all", **changes: Any) -> Trace:
    """The same rail as the counter of its joules, which a very long recording becomes."""
    joules = np.concatenate(([0.0], np.cumsum(np.diff(times) * (watts[1:] + watts[:-1]) / 2)))
    fields: dict[str, Any] = {"total": True, "averaging_s": 0.0, "grade": "B", "scope": "board-in", "clock_id": "file"} | changes
    return Trace(
        rail=rail,
        quantity="energy_j",
        times_s=floats(times),
        values=floats(joules),
        source="csv",
        period_s=float(np.median(np.diff(times))),
        **fields,
    )
