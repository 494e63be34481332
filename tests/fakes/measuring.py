"""A bench with no real time: a clock that only moves when somebody works or sleeps, a session, a meter and a powercap tree."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule.measure.trial import Bench
from edgejoule.records import (
    Artifact,
    ArtifactFile,
    Device,
    Environment,
    Job,
    ModelSpec,
    Preprocessing,
    Protocol,
    SessionInfo,
    Trace,
    Variant,
    Workload,
    floats,
)

PREPROCESSING = Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PLAIN = Protocol("plain", 0.5, 5, 3.0, 1.0, 2.0, 5, 3, 3, 0.01, 0.02)


class FakeClock:
    """Seconds that pass only when told; ``log`` holds every instant at which somebody slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


@dataclasses.dataclass
class FakeSession:
    """Takes ``cost(n)`` seconds for its n-th inference and keeps the shapes and dtypes that it was given."""

    clock: FakeClock
    cost: Callable[[int], float] = lambda n: 0.01
    seen: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    spans: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    closed: bool = False

    def infer(self, images: Any) -> Mapping[str, Any]:
        start = self.clock.now
        self.clock.now += self.cost(len(self.seen))
        self.spans.append((start, self.clock.now))
        self.seen.append((images.shape, str(images.dtype), float(images.mean())))
        return {"logits": np.zeros((len(images), 4), dtype=np.float32)}

    def info(self) -> SessionInfo:
        return SessionInfo("fp32", ("CPU",), "fake 1", 1)

    def close(self) -> None:
        self.closed = True


@dataclasses.dataclass
class FakeMeter:
    """Idle watts always, ``load_w`` more while the session works, seen through a counter that is polled every ``period_s``."""

    clock: FakeClock
    session: FakeSession
    idle_w: float = 5.0
    load_w: float = 10.0
    period_s: float = 0.05
    averaging_s: float = 0.0
    events: list[tuple[str, float]] = dataclasses.field(default_factory=list)

    def probe(self) -> str | None:
        return None

    def start(self) -> None:
        self.events.append(("start", self.clock.now))

    def stop(self) -> tuple[Trace, ...]:
        self.events.append(("stop", self.clock.now))
        times = np.append(np.arange(self.events[0][1], self.clock.now, self.period_s), self.clock.now)
        busy = np.zeros_like(times)
        for start, stop in self.session.spans:
            busy += np.clip(times - start, 0, stop - start)
        joules = self.idle_w * times + self.load_w * busy
        return (Trace("fake", "energy_j", floats(times), floats(joules), "fake", "C", "package", self.period_s, self.averaging_s),)


def fake_environment(threads: int, runtime: str) -> Environment:
    return Environment(Device("board", "cpu", "arm", 4, 2**30, "Linux"), threads, runtime, {}, "fingerprint")


def bench(clock: FakeClock, root: Path, phases: list[str] | None = None) -> Bench:
    """A bench on which nothing takes real time: the canary too is as fast after as before, however busy this machine is."""
    return Bench(
        clock=clock,
        sleep=clock.sleep,
        now=lambda: 1.7e9,
        describe=fake_environment,
        notify=phases.append if phases is not None else lambda phase: None,
        root=root,
        canary=lambda cold_s: 50e-6,
    )


def artifact(batch: int = 1) -> Artifact:
    variant = Variant(ModelSpec("tiny", "fake", 'timm(name="tiny")', PREPROCESSING), "random", "seed0")
    return Artifact(
        "a" * 64, variant, "fake", "fp32", batch, (ArtifactFile("m", "0" * 64, 10),), {}, SessionInfo("fp32", (), "fake 1", 1), None
    )


def job(protocol: Protocol | None = PLAIN, batch: int = 1, end_to_end: bool = False) -> Job:
    workload = Workload("single_stream" if batch == 1 else "offline", batch, end_to_end)
    return Job("measure", "folder", "images.npy", workload, 1, key="k", protocol=protocol, meter="fake")


def crops(n: int = 4) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def write_domain(folder: Path, name: str, energy_uj: int, range_uj: int = 262143328850) -> None:
    """One powercap domain on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    set_energy(folder, energy_uj)


_serial = itertools.count()


def set_energy(folder: Path, energy_uj: int) -> None:
    """As the kernel does: a reader sees the old number or the new one, never half a file."""
    partial = folder / f".{next(_serial)}"
    partial.write_text(f"{energy_uj}\n")
    partial.replace(folder / "energy_uj")
