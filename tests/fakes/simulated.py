"""Simulated sensors: a true power known exactly, seen through what real sensors do to it. No real time, deterministic by its rng.

The truth is piecewise constant, so that its energy is exact at every instant, and a boxcar mean and an exponential filter of it have
closed forms. What a reader gets is composed: when it polls (``polls``), which update it sees (``last_update``), what the filter shows
there (``boxcar``, ``exponential``), how the number is cut (``quantised``, ``wrapped``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rng = np.random.Generator


@dataclass(frozen=True)
class Power:
    """``watts[i]`` from ``knots_s[i]`` to ``knots_s[i + 1]``; ``before_w`` for ever before the first knot, the last for ever after."""

    knots_s: Array  # (K,) seconds, ascending
    watts: Array  # (K,)
    before_w: float

    def joules(self, at: Any) -> Array:
        """Exact energy since the first knot (negative before it)."""
        sums = np.concatenate(([0.0], np.cumsum(np.diff(self.knots_s) * self.watts[:-1])))
        t = np.asarray(at, dtype=np.float64)
        piece = np.searchsorted(self.knots_s, t, side="right") - 1
        since = t - self.knots_s[np.maximum(piece, 0)]
        return np.asarray(np.where(piece < 0, self.before_w * since, sums[piece] + self.watts[piece] * since))

    def at(self, at: Any) -> Array:
        piece = np.searchsorted(self.knots_s, at, side="right") - 1
        return np.asarray(np.where(piece < 0, self.before_w, self.watts[piece]))


def toggled(edges: Any, idle_w: float, load_w: float) -> Power:
    """Idle, and ``load_w`` from every even edge to the odd one after it."""
    knots = np.asarray(edges, dtype=np.float64)
    return Power(knots, np.where(np.arange(len(knots)) % 2 == 0, load_w, idle_w).astype(np.float64), idle_w)


def edges(rng: Rng, cycles: int = 6, first: float = 2.0, shortest: float = 1.5, longest: float = 3.5) -> Array:
    """The instants at which a load goes on, off, on, …: every phase of random length."""
    return np.asarray(first + np.concatenate(([0.0], np.cumsum(rng.uniform(shortest, longest, 2 * cycles - 1)))))


def boxcar(power: Power, at: Any, width_s: float) -> Array:
    """The mean over the last ``width_s`` seconds."""
    t = np.asarray(at, dtype=np.float64)
    return (power.joules(t) - power.joules(t - width_s)) / width_s


def exponential(power: Power, at: Any, tau_s: float) -> Array:
    """A first-order low pass of time constant ``tau_s``, settled before the first knot."""
    levels = np.empty(len(power.knots_s))
    level, last = power.before_w, power.before_w
    for i, knot in enumerate(power.knots_s):
        if i:
            level = last + (level - last) * np.exp(-(knot - power.knots_s[i - 1]) / tau_s)
        levels[i], last = level, power.watts[i]
    t = np.asarray(at, dtype=np.float64)
    piece = np.searchsorted(power.knots_s, t, side="right") - 1
    k = np.maximum(piece, 0)
    fading = np.exp(-np.maximum(t - power.knots_s[k], 0.0) / tau_s)
    return np.asarray(np.where(piece < 0, power.before_w, power.watts[k] + (levels[k] - power.watts[k]) * fading))


def polls(start: float, stop: float, period_s: float, rng: Rng | None = None, jitter_s: float = 0.0) -> Array:
    """A poller's instants, each late by up to ``jitter_s`` (a thread is never early)."""
    times = np.arange(start, stop, period_s)
    return times if rng is None else np.sort(times + rng.uniform(0.0, jitter_s, len(times)))


def last_update(at: Any, update_s: float, phase_s: float = 0.0, rng: Rng | None = None, jitter_s: float = 0.0) -> Array:
    """The instant of the sensor's newest update at each read; updates come every ``update_s``, early or late by up to ``jitter_s``."""
    t = np.asarray(at, dtype=np.float64)
    count = int((t[-1] - t[0]) / update_s) + 4
    ticks = phase_s + (np.floor((t[0] - phase_s) / update_s) - 2 + np.arange(count + 2)) * update_s
    if rng is not None:
        ticks = np.sort(ticks + rng.uniform(-jitter_s, jitter_s, len(ticks)))
    return np.asarray(ticks[np.searchsorted(ticks, t, side="right") - 1])


def quantised(values: Array, step: float) -> Array:
    return np.asarray(np.floor(values / step + 0.5) * step)


def wrapped(joules: Array, range_j: float) -> Array:
    return np.asarray(np.mod(joules, range_j))
