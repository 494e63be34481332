"""What a power trace holds, as text for the terminal and as a page with a plot. Reads no file and integrates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from edgejoule.records import TraceEnergy
from edgejoule.report import evidence
from edgejoule.report import format as f
from edgejoule.report.cells import esc, section
from edgejoule.report.page import page
from edgejoule.report.table import Column, Table, terminal
from edgejoule.report.text import caveat_lines

LISTED = 60  # inferences in the text; --json has all
MOST = 20_000  # points of the plot

Samples = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


def trace_text(found: TraceEnergy, name: str) -> str:
    """Rails, totals, inferences and doubts."""
    rows = [
        (rail, f.scaled(joules, f.ENERGIES), f.scaled(found.power_w[rail], f.POWERS), "yes" if rail in found.total_rails else "")
        for rail, joules in found.energy_j.items()
    ]
    columns = (Column("rail"), Column("energy", right=True), Column("mean power", right=True), Column("in total", 1))
    table = terminal(Table(f"Energy in {name}", columns, tuple(rows), _subtitle(found), tuple(_notes(found))))
    return table + (_segments(found) if found.segments else "") + caveat_lines(found.caveats)


def _subtitle(found: TraceEnergy) -> str:
    window = f"{found.start_s:.9g} to {found.stop_s:.9g} s of {found.duration_s:.9g} s"
    window += f", {found.samples} samples, {1 / found.period_s:.4g} a second"
    return f"{found.format} · {window} · grade {f.grade_words(found.grade)}, scope {found.scope}"


def _notes(found: TraceEnergy) -> Sequence[str]:
    idle = f", idle {f.scaled(found.idle_w, f.POWERS)}" if found.idle_w is not None else ""
    above = f.scaled(found.net_energy_j, f.ENERGIES) if found.net_energy_j is not None else "not known (no idle outside the window)"
    return (f"total {f.scaled(found.total_energy_j, f.ENERGIES)}", f"above idle {above}{idle}")


def _segments(found: TraceEnergy) -> str:
    rows = [
        (
            str(number),
            f"{one.start_s:.6f}",
            f.scaled(one.stop_s - one.start_s, f.TIMES),
            f.scaled(one.energy_j, f.ENERGIES),
            f.scaled(one.net_energy_j, f.ENERGIES),
        )
        for number, one in enumerate(found.segments[:LISTED], 1)
    ]
    columns = (
        Column("inference"),
        Column("from (s)", 2, True),
        Column("length", 1, True),
        Column("energy", right=True),
        Column("above background", right=True),
    )
    more = len(found.segments) - LISTED
    notes = [f"and {more} more (--json has them)"] if more > 0 else []
    notes.append(f"mean ± sd: {_spread(found.segment_energy_j)}, above the background {_spread(found.segment_net_energy_j)}")
    told = ", ".join(f"{f.scaled(joules, f.ENERGIES)} at k = {key}" for key, joules in found.sensitivity.items())
    notes.append(f"all of them above the background, by threshold: {told}")
    return "\n" + terminal(Table(f"{len(found.segments)} inferences", columns, tuple(rows), notes=tuple(notes)))


def _spread(found: tuple[float, float] | None) -> str:
    """Mean and deviation in one unit; a deviation that is rounding is 0."""
    if found is None:
        return f.NONE
    size, unit = next((step for step in f.ENERGIES if abs(found[0]) >= step[0]), f.ENERGIES[-1])
    mean, spread = found[0] / size, found[1] / size
    digits = f.decimals(mean) + (1 if spread else 0)
    return f"{mean:.{digits}f} ± {spread:.{digits}f} {unit}"


# ---------------------------------------------------------------- the page


def plot_page(
    found: TraceEnergy,
    name: str,
    curve: tuple[Samples, Samples] | None,
    background_w: Samples | None = None,
    threshold_w: float | None = None,
) -> str:
    """The page as text: power over time (seconds and watts, both (N,)), the background (N,), the threshold above it, the inferences.

    It opens from disk and loads nothing, as the report does.
    """
    facts = (f"total {f.scaled(found.total_energy_j, f.ENERGIES)}", *_notes(found)[1:], _subtitle(found))
    body = (
        f"<figure><figcaption>Power <small>{esc(', '.join(found.total_rails) or 'no rails are known to add up to the whole')}</small>"
        '</figcaption><div class="plot" style="height:34rem"></div></figure>'
        + (f'<pre class="command">{esc_lines(_segments(found))}</pre>' if found.segments else "")
        + section("Caveats", evidence.caveat_cards(("", doubt) for doubt in found.caveats), anchor="caveats")
    )
    return page(name, " · ".join(facts), body, plot_data(found, curve, background_w, threshold_w), "traces.js")


def esc_lines(text: str) -> str:
    """Text of several lines, harmless in HTML."""
    return "\n".join(esc(line) for line in text.strip("\n").splitlines())


def plot_data(
    found: TraceEnergy, curve: tuple[Samples, Samples] | None, background_w: Samples | None = None, threshold_w: float | None = None
) -> dict[str, Any]:
    """Lines and inferences for the plot: at most ``MOST`` points of power, no peak lost; every hundredth of those of the background."""
    lines: list[dict[str, Any]] = []
    if curve is not None:
        times, power = curve
        kept = thinned(power)
        lines.append(_line("power", times[kept], power[kept]))
        if background_w is not None:
            few = np.unique(np.append(kept[::100], kept[-1]))
            lines.append(_line("background", times[few], background_w[few]))
            if threshold_w is not None:
                lines.append(_line("threshold", times[few], background_w[few] + threshold_w))
    return {"lines": lines, "segments": [[one.start_s, one.stop_s] for one in found.segments]}


def thinned(values: Samples, most: int = MOST) -> Index:
    """Indices, in order, of the least and the greatest value of each of ``most / 2`` stretches; all of them where they are few."""
    if len(values) <= most:
        return np.arange(len(values))
    starts = np.linspace(0, len(values), most // 2 + 1).astype(np.intp)
    picked = [(a + values[a:b].argmin(), a + values[a:b].argmax()) for a, b in pairwise(starts)]
    return np.unique(np.array(picked, dtype=np.intp))


def _line(name: str, x: Samples, y: Samples) -> dict[str, Any]:
    return {"name": name, "x": [round(float(v), 7) for v in x], "y": [float(f"{v:.6g}") for v in y]}
