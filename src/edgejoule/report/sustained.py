"""One long run over time: as text, and as a self-contained page of stacked panels with the steady state shaded.

Knows the record by its shape; computes nothing. The page loads nothing from anywhere, as the report's does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from edgejoule.records import Caveat, Interval
from edgejoule.report import evidence
from edgejoule.report import format as f
from edgejoule.report.cells import esc, section
from edgejoule.report.page import page
from edgejoule.report.table import Column, Table, terminal
from edgejoule.report.text import caveat_lines

ENERGY = (1e3, "mJ")
PANELS = (  # attribute, title, unit, SI value in that unit, whether the axis begins at zero
    ("throughput_ips", "Throughput", "images/s", 1.0, True),
    ("power_w", "Power", "W", 1.0, True),
    ("clock_hz", "Clock of the fastest core", "GHz", 1e-9, True),
    ("temperature_c", "Hottest sensor", "°C", 1.0, False),
)


class Run(Protocol):
    """One window over time. A series that nobody recorded is empty, a bin without a sample is NaN; steady_* are None without one."""

    @property
    def duration_s(self) -> float: ...
    @property
    def bin_s(self) -> float: ...
    @property
    def times_s(self) -> Sequence[float]: ...
    @property
    def throughput_ips(self) -> Sequence[float]: ...
    @property
    def power_w(self) -> Sequence[float]: ...
    @property
    def clock_hz(self) -> Sequence[float]: ...
    @property
    def temperature_c(self) -> Sequence[float]: ...
    @property
    def first_s(self) -> float: ...
    @property
    def first_ips(self) -> float: ...
    @property
    def first_power_w(self) -> float | None: ...
    @property
    def first_energy_j(self) -> float | None: ...
    @property
    def last_ips(self) -> float: ...
    @property
    def steady_from_s(self) -> float | None: ...
    @property
    def steady_ips(self) -> Interval | None: ...
    @property
    def steady_power_w(self) -> Interval | None: ...
    @property
    def steady_energy_j(self) -> Interval | None: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def reason(self) -> str: ...
    @property
    def grade(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def caveats(self) -> Sequence[Caveat]: ...


def text(run: Run, title: str) -> str:
    """The first minute beside the steady state, the verdict in words, and every doubt."""
    columns = (Column(""), Column(f"first {_opening(run)}", right=True), Column("steady state", right=True))
    rows = tuple((name, first, steady) for name, first, steady in _figures(run) if (first, steady) != (f.NONE, f.NONE))
    table = Table(f"{title}: {span(run.duration_s)} without a pause", columns, rows, verdict(run), _notes(run))
    return terminal(table) + caveat_lines(run.caveats)


def verdict(run: Run) -> str:
    """One sentence: where the steady state begins and how it compares with the start, or why there is none."""
    if run.steady_from_s is None or run.steady_ips is None:
        change = "" if run.first_ips <= 0 else f"; the last {_opening(run)} ran at {100 * run.last_ips / run.first_ips:.0f} % of the first"
        return f"No steady state was reached: {run.reason}{change}."
    since = "From the start" if run.steady_from_s == 0 else f"After {span(run.steady_from_s)}"
    share = "" if run.ratio is None else f", {100 * run.ratio:.0f} % of what it did in the first {_opening(run)}"
    return f"{since}, the device holds {f.measure(run.steady_ips)} images/s{share}."


def span(seconds: float) -> str:
    """``45 s``, ``2 min``, ``1 h 5 min``: rounded for reading, to seconds below ten minutes."""
    whole = round(seconds)
    if whole >= 600:
        whole = 60 * round(whole / 60)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if n) or "0 s"


def _opening(run: Run) -> str:
    return "minute" if run.first_s == 60 else span(run.first_s)


def render(run: Run, title: str, facts: Sequence[str] = ()) -> str:
    """The whole page as text. ``facts`` (device, backend, meter, date) stand below the title."""
    return page(title, " · ".join(facts), _body(run), _data(run), "sustained.js")


def _body(run: Run) -> str:
    kicker = f"{span(run.duration_s)} without a pause"
    tiles = "".join(_tile(name, first, steady, run) for name, first, steady in _figures(run) if (first, steady) != (f.NONE, f.NONE))
    grade = f'<ul class="chips"><li class="grade grade-{esc(run.grade)}">grade {esc(f.grade_words(run.grade))}</li>'
    chips = f"{grade}<li>scope <b>{esc(run.scope)}</b></li></ul>" if run.grade else ""
    hero = f'<div class="hero"><p class="kicker">{esc(kicker)}</p><p>{esc(verdict(run))}</p><dl class="tiles">{tiles}</dl>{chips}</div>'
    panels = len(_panels(run))
    shaded = "The steady state is shaded." if run.steady_from_s is not None else "No steady state was reached."
    caption = f"Means over {span(run.bin_s)} <small>{esc(shaded)} {esc(' '.join(_notes(run)))}</small>"
    figure = f'<figure><figcaption>{caption}</figcaption><div class="plot" style="height:{13 * panels + 3}rem"></div></figure>'
    cards = evidence.caveat_cards(("", doubt) for doubt in run.caveats)
    return hero + figure + section("Caveats", cards, "What could make these figures wrong, and what to do about it.", "caveats")


def _tile(name: str, first: str, steady: str, run: Run) -> str:
    """The steady figure large, its bounds and the first minute's small; where there is no steady state, the first minute's only."""
    value, _, bounds = (first if steady == f.NONE else steady).partition(" [")
    below = [f"[{bounds}"] if bounds else []
    below.append(f"first {_opening(run)}" + ("" if steady == f.NONE else f": {first}"))
    small = "".join(f"<small>{esc(line)}</small>" for line in below)
    return f"<div><dt>{esc(name.capitalize())}</dt><dd>{esc(value)}{small}</dd></div>"


def _figures(run: Run) -> list[tuple[str, str, str]]:
    """(name, in the first minute, in the steady state) as finished text."""
    factor, unit = ENERGY
    rows = (
        ("throughput", run.first_ips, run.steady_ips, 1.0, "images/s", ""),
        ("power", run.first_power_w, run.steady_power_w, 1.0, "W", run.grade),
        ("energy per image", run.first_energy_j, run.steady_energy_j, factor, unit, run.grade),
    )
    return [
        (
            name,
            f.measure(None if first is None else Interval(first, None, None, 1), unit, factor, grade),
            f.measure(steady, unit, factor, grade),
        )
        for name, first, steady, factor, unit, grade in rows
    ]


def _notes(run: Run) -> tuple[str, ...]:
    known = run.steady_ips is not None and run.steady_ips.low is not None and run.steady_ips.n > 1
    words = (
        f"Brackets are 95 % intervals over {run.steady_ips.n} consecutive parts of the steady state." if known and run.steady_ips else ""
    )
    return (words,) if words else ()


def _panels(run: Run) -> list[dict[str, Any]]:
    found = []
    for place, (attribute, title, unit, factor, zero) in enumerate(PANELS):
        values = [value * factor if math.isfinite(value) else None for value in getattr(run, attribute)]
        if any(value is not None for value in values):
            found.append({"title": title, "unit": unit, "values": values, "zero": zero, "steady": None, "color": place})
    means = {"images/s": run.steady_ips, "W": run.steady_power_w}
    for panel in found:
        mean = means.get(str(panel["unit"]))
        panel["steady"] = None if mean is None else mean.value
    return found


def _data(run: Run) -> dict[str, Any]:
    minutes = run.duration_s >= 180
    unit_s = 60.0 if minutes else 1.0
    return {
        "times": [time / unit_s for time in run.times_s],
        "unit": "min" if minutes else "s",
        "end": run.duration_s / unit_s,
        "steady": None if run.steady_from_s is None else run.steady_from_s / unit_s,
        "panels": _panels(run),
    }
