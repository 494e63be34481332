"""Which artifacts still need a repeat, in what order, and the key that a trial is stored under. Pure: no clock, no store.

Repeats interleave at random (a drift of the machine then meets all models alike), and stop by the sequential rule: at least
``repeats_min``, then until the intervals of latency and energy are narrow enough, at most ``repeats_max``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from edgejoule.measure.energy import window_energy
from edgejoule.measure.protocols import base_name
from edgejoule.measure.stats import half_width, sequential_interval
from edgejoule.plain import digest
from edgejoule.records import Protocol, Trial, Workload

SUSTAINED = "sustained"
REPLACEMENTS = 2  # of rejected repeats
ON_BOARD = 1.5  # a sensor on the board (grade C) scatters more: 3 % where the protocol asks 2 %


def next_round(trials: Mapping[str, Sequence[Trial]], labels: Sequence[str], protocol: Protocol, seed: int) -> tuple[str, ...]:
    """The labels that need one more repeat, in this round's random order; empty when all are done.

    A rejected repeat is replaced, twice at most: a machine that spoils every repeat must not be measured for ever.
    The same trials, labels and seed give the same order.
    """
    needy = sorted(label for label in set(labels) if needs_repeat(trials.get(label, ()), protocol))
    turn = max((len(trials.get(label, ())) for label in labels), default=0)
    random.Random(f"{seed}:{turn}").shuffle(needy)
    return tuple(needy)


def needs_repeat(trials: Sequence[Trial], protocol: Protocol) -> bool:
    """Whether one artifact's good repeats are too few, or its intervals still too wide and the cap not reached."""
    kept = [trial for trial in trials if not is_rejected(trial)]
    if len(kept) >= protocol.repeats_max or len(trials) >= most_trials(protocol):
        return False
    return len(kept) < protocol.repeats_min or not narrow_enough(kept, protocol)


def most_trials(protocol: Protocol) -> int:
    """The cap on repeats, and a few more in place of rejected ones; a sustained run is there to see the device slow down."""
    return protocol.repeats_max + (0 if base_name(protocol) == SUSTAINED else REPLACEMENTS)


def narrow_enough(kept: Sequence[Trial], protocol: Protocol) -> bool:
    """Whether the intervals of the latency's median and of energy (where a sensor measured it, not a model) meet the protocol."""
    latency = half_width(sequential_interval([median_latency_s(trial) for trial in kept]))
    if latency is None or latency > protocol.latency_half_width:
        return False
    energies = [gross_j_per_image(trial) for trial in kept]
    known = [joules for joules in energies if joules is not None]
    grade = max((trace.grade for trace in kept[0].traces if trace.total), default="D")
    if len(known) < 2 or grade == "D":
        return True  # an estimate claims no interval, and absent energy has none
    width = half_width(sequential_interval(known))
    return width is not None and width <= protocol.energy_half_width * (ON_BOARD if grade == "C" else 1.0)


def is_rejected(trial: Trial) -> bool:
    return any(doubt.severity == "reject" for doubt in trial.caveats)


def median_latency_s(trial: Trial) -> float:
    """Median seconds per inference (a batch is one inference)."""
    return float(np.median(np.frombuffer(trial.latencies_s, dtype=np.float64)))


def gross_j_per_image(trial: Trial) -> float | None:
    """Gross joules per image of the window; None where it was not measured."""
    window = trial.phase("window")
    if window is None or not trial.traces:
        return None
    energy = window_energy(trial.traces, window, trial.phase("idle_before"), trial.phase("idle_after"))
    return None if energy.energy_j is None else energy.energy_j / (len(trial.latencies_s) * trial.workload.batch)


def trial_key(artifact_sha256: str, workload: Workload, protocol: Protocol, environment_fingerprint: str, meter: str, repeat: int) -> str:
    """A trial's identity, from hashes and not from spellings: equal keys mean the same work on the same machine."""
    return digest(
        {
            "artifact": artifact_sha256,
            "workload": workload,
            "protocol": protocol,
            "environment": environment_fingerprint,
            "meter": meter,
            "repeat": repeat,
        }
    )
