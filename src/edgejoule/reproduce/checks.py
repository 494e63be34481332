"""What a comparison with a paper is made of: numbers known to an interval (``Span``), and checks with a verdict. Pure.

A number printed to n decimals stands for every value within half a unit of its last digit. Derived values carry the interval that
follows; a paper disagrees with itself only where no value of the inputs gives the printed output. Knows no paper and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["agrees", "agrees within rounding", "disagrees", "not recoverable"]
SLACK = 1e-9  # relative: binary fractions of decimal numbers


@dataclass(frozen=True, slots=True)
class Span:
    """A value and the interval that it is known to lie in; unit and meaning are the owner's. Arithmetic keeps the interval.

    Inputs are taken as independent, so a difference of equal spans is as wide as their sum. Raises ZeroDivisionError where the
    divisor's interval holds zero.
    """

    value: float
    low: float
    high: float
    decimals: int = 3

    def __add__(self, other: Span) -> Span:
        return Span(self.value + other.value, self.low + other.low, self.high + other.high, max(self.decimals, other.decimals))

    def __sub__(self, other: Span) -> Span:
        return Span(self.value - other.value, self.low - other.high, self.high - other.low, max(self.decimals, other.decimals))

    def __mul__(self, other: Span) -> Span:
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return Span(self.value * other.value, min(corners), max(corners))

    def __truediv__(self, other: Span) -> Span:
        if other.low <= 0.0 <= other.high:
            raise ZeroDivisionError("the divisor may be zero")
        return self * Span(1.0 / other.value, 1.0 / other.high, 1.0 / other.low)

    def times(self, factor: float) -> Span:
        """Scaled by an exact number."""
        return self * exact(factor)

    def widened(self, fraction: float) -> Span:
        """Both bounds moved outwards by a fraction of the value: a tolerance."""
        margin = abs(self.value) * fraction
        return Span(self.value, self.low - margin, self.high + margin, self.decimals)

    def meets(self, other: Span) -> bool:
        """The intervals share a point."""
        slack = SLACK * max(1.0, abs(self.value), abs(other.value))
        return self.low <= other.high + slack and other.low <= self.high + slack

    def holds(self, value: float) -> bool:
        """The value lies inside, bounds included."""
        return self.meets(exact(value))

    def text(self, digits: int = 4) -> str:
        """``0.1746 [0.1745, 0.1748]``, or the value alone where the interval is a point."""
        width = self.high - self.low
        show = significant(self.value, digits)
        if width <= SLACK * max(1.0, abs(self.value)):
            return show
        places = max(0, min(6, 1 - math.floor(math.log10(width / 2.0))))
        return f"{self.value:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def exact(value: float) -> Span:
    """A number without an interval: a count, or a factor."""
    return Span(value, value, value)


def as_printed(text: str, decimals: int | None = None) -> Span:
    """A printed number with the interval of its rounding. ``decimals`` where its column shows that zeros were cut off its end."""
    digits = len(text.partition(".")[2])
    places = max(digits, decimals or 0)
    half = 0.5 * 10.0**-places
    value = float(text)
    return Span(value, value - half, value + half, places)


def significant(value: float, digits: int = 4) -> str:
    """A plain number to so many significant digits, never in exponents below 1e7."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(9, max(0, places))}f}" if abs(value) < 1e7 else f"{value:.{digits - 1}e}"


@dataclass(frozen=True, slots=True)
class Check:
    """One printed number or sentence beside what its own sources give.

    ``name`` is stable, for scripts: ``table3.efficiency.LeViT-384``. ``low`` and ``high`` bound the recomputed value, where it is one.
    """

    name: str
    place: str
    claim: str
    printed: str
    recomputed: str
    tolerance: str
    verdict: Verdict
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """A table of recomputed figures that no printed number stands beside."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a paper: its checks, and listings of what was computed on the way."""

    title: str
    checks: tuple[Check, ...] = ()
    listings: tuple[Listing, ...] = ()
    about: str = ""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A paper's tables and claims, recomputed. ``disagreements`` repeats the checks that failed, so that none is hidden."""

    name: str
    title: str
    source: str
    sections: tuple[Section, ...]
    disagreements: tuple[Check, ...] = field(default=())
    counts: Mapping[str, int] = field(default_factory=dict)  # verdict -> how many checks


def reproduction(name: str, title: str, source: str, sections: Iterable[Section]) -> Reproduction:
    """The sections with their summary: how many checks of each verdict, and every disagreement. Raises ValueError for a name used twice."""
    kept = tuple(sections)
    checks = [check for section in kept for check in section.checks]
    twice = {check.name for check in checks if sum(other.name == check.name for other in checks) > 1}
    if twice:
        raise ValueError(f"checks share a name: {', '.join(sorted(twice))}")
    verdicts: tuple[Verdict, ...] = ("agrees", "agrees within rounding", "disagrees", "not recoverable")
    counts: dict[str, int] = {verdict: sum(check.verdict == verdict for check in checks) for verdict in verdicts}
    return Reproduction(name, title, source, kept, tuple(check for check in checks if check.verdict == "disagrees"), counts)


def compared(
    name: str, place: str, claim: str, printed: Span, found: Span, tolerance: str = "inputs as rounded", note: str = "", unit: str = ""
) -> Check:
    """A printed number against a recomputed one: agrees where the value rounds to it, within rounding where only the intervals meet."""
    verdict: Verdict = "agrees" if printed.holds(found.value) else "agrees within rounding" if printed.meets(found) else "disagrees"
    shown = f"{printed.value:.{printed.decimals}f}"
    suffix = f" {unit}" if unit else ""
    return Check(name, place, claim, shown + suffix, found.text() + suffix, tolerance, verdict, note, found.low, found.high)


def stated(name: str, place: str, claim: str, printed: str, recomputed: str, true: bool, tolerance: str = "exact", note: str = "") -> Check:
    """A sentence of the paper against what its table says."""
    return Check(name, place, claim, printed, recomputed, tolerance, "agrees" if true else "disagrees", note)


def lost(name: str, place: str, claim: str, printed: str, why: str) -> Check:
    """A number that cannot be computed from what is published; ``why`` says what is missing."""
    return Check(name, place, claim, printed, "–", "–", "not recoverable", why)
