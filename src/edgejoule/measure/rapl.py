"""RAPL energy counters of Intel and AMD processors, through Linux's powercap files. Grade C, scope: the processor package.

Only package domains make the total. ``core`` and ``uncore`` are parts of the package, ``psys`` contains it, the mmio tree shows the
same package twice: adding any of them counts twice. ``dram`` lies outside the package, but exists on some machines only: it is
recorded as a rail of its own and left out of the total, so that the scope means the same everywhere. Some AMD processors show one
counter once per die: mirrors are dropped. Counters wrap at ``max_energy_range_uj`` and are unwrapped here; two wraps between
two reads cannot be seen: after a gap that would allow them every read is an error. A failed read is an error, never a fake wrap; one of
a rail beside the total leaves a hole in that rail only.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgejoule.errors import MeterError
from edgejoule.records import Grade

UPDATE_S = 0.001
SHORT = 256  # bytes: a name or a number
LONGEST_PERIOD_S = 10.0
MOST_W = 1000.0  # no package draws more: how long a counter takes to wrap at least


@dataclass(frozen=True, slots=True)
class Domain:
    """One counter: a rail ``package-0`` or ``package-0/core``, its folder, and where it wraps, in microjoules."""

    rail: str
    folder: Path
    range_uj: int


@dataclass(frozen=True, slots=True)
class Rapl:
    """Counters below ``root``, read every ``period_s`` seconds."""

    root: str = "/sys/class/powercap"
    period_s: float = 0.05
    _domains: list[Domain] = field(default_factory=list, init=False, repr=False, compare=False)
    _last: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)  # microjoules
    _sum: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _read_at: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.period_s <= LONGEST_PERIOD_S:
            raise ValueError(f"period_s={self.period_s:g} is outside (0, {LONGEST_PERIOD_S:g}] s: a counter may wrap twice in a longer one")

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]:
        return "energy_j"

    @property
    def averaging_s(self) -> float:
        return UPDATE_S

    @property
    def grade(self) -> Grade:
        return "C"

    @property
    def scope(self) -> str:
        return "package"

    def total(self, rail: str) -> bool:
        """Package domains make the whole; their parts, psys and dram do not."""
        return rail.startswith("package") and "/" not in rail

    def probe(self) -> str | None:
        try:
            domains = _discover(Path(self.root))
            for domain in domains:
                _microjoules(domain)
        except MeterError as error:
            return str(error)
        return None

    def read(self) -> dict[str, float]:
        """{rail: joules since the first read}. Raises MeterError where a counter cannot be read or was left too long."""
        if not self._domains:
            self._domains.extend(_discover(Path(self.root)))
        # All are read before any is kept: a failure half-way must not leave some counters ahead of the others.
        now, raw = time.perf_counter(), dict[Domain, int]()
        for domain in self._domains:
            try:
                raw[domain] = self._checked(domain, now)
            except MeterError:
                if self.total(domain.rail):
                    raise
        for domain, microjoules in raw.items():
            step = microjoules - self._last.get(domain.rail, microjoules)
            self._last[domain.rail], self._read_at[domain.rail] = microjoules, now
            self._sum[domain.rail] = self._sum.get(domain.rail, 0) + (step if step >= 0 else step + domain.range_uj)
        return {domain.rail: self._sum[domain.rail] / 1e6 for domain in raw}

    def _checked(self, domain: Domain, now: float) -> int:
        gap = now - self._read_at.get(domain.rail, now)
        if gap > domain.range_uj / 1e6 / MOST_W:
            raise MeterError(f"RAPL was not read for {gap:.0f} s, in which a counter may have wrapped twice: read it more often")
        return _microjoules(domain)


def _discover(root: Path) -> list[Domain]:
    """The packages (mirrors and the mmio tree dropped); psys and what lies below the packages, where they can be read."""
    if not root.is_dir():
        raise MeterError(f"no RAPL counters: {root} is not there (Linux on an Intel or AMD processor is needed, and not a virtual machine)")
    packages: dict[str, Path] = {}
    others: dict[str, Path] = {}
    for folder in sorted(root.glob("intel-rapl:*")):
        if folder.name.count(":") != 1:
            continue
        name = _name(folder)
        (packages if name.startswith("package") else others).setdefault(name, folder)
    if not packages:
        raise MeterError(
            f"no RAPL package counter below {root}: load the driver (sudo modprobe intel_rapl_msr), virtual machines have none"
        )
    kept: list[Domain] = []
    for domain in (_domain(name, folder) for name, folder in packages.items()):
        if not any(_mirrors(first, domain) for first in kept):
            kept.append(domain)
    beside = [(f"{d.rail}/{_name(part)}", part) for d in kept for part in sorted(d.folder.glob("intel-rapl:*:*"))]
    found = [_readable(rail, folder) for rail, folder in (*beside, *others.items())]
    return kept + [domain for domain in found if domain is not None]


def _readable(rail: str, folder: Path) -> Domain | None:
    """A domain beside the total, which the total does not wait for; None where it cannot be read."""
    try:
        domain = _domain(rail, folder)
        _microjoules(domain)
    except MeterError:
        return None
    return domain


def _mirrors(first: Domain, second: Domain) -> bool:
    """One counter shown twice: the second's reading lies between two readings of the first, microjoule by microjoule, twice over."""
    for _ in itertools.repeat(None, 2):
        low, middle, high = _microjoules(first), _microjoules(second), _microjoules(first)
        if not (low <= middle <= high):
            return False
        time.sleep(0.002)
    return True


def _domain(rail: str, folder: Path) -> Domain:
    text = _text(folder / "max_energy_range_uj").strip()
    if not text.isdigit() or int(text) == 0:
        raise MeterError(f"{folder}/max_energy_range_uj holds {text!r}: expected where the counter wraps, in microjoules")
    return Domain(rail, folder, int(text))


def _name(folder: Path) -> str:
    return _text(folder / "name").strip()


def _microjoules(domain: Domain) -> int:
    text = _text(f"{domain.folder}/energy_uj").strip()
    if not text.isdigit():
        raise MeterError(f"{domain.folder}/energy_uj holds {text!r}: expected microjoules")
    return int(text)


def _text(file: Path | str) -> str:
    try:
        with Path(file).open("rb", buffering=0) as opened:  # read twenty times a second: what sampling costs is in the figure
            return opened.read(SHORT).decode("ascii", "replace")
    except PermissionError as error:
        root = Path(file).parent.parent
        raise MeterError(
            f"the RAPL counters may be read by root only: run sudo chmod a+r {root}/intel-rapl*/energy_uj, or run as root"
        ) from error
    except OSError as error:
        raise MeterError(f"cannot read {file} ({error.strerror or error}): check it with cat") from error
