"""An evaluation as text and as a part of the page: what an artifact gets right, and what it lost beside its float32 network.

Records in, text or escaped HTML out. Runs nothing, reads no file.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgejoule.records import Evaluation, Interval
from edgejoule.report import format as f
from edgejoule.report.cells import Cell, Head, label_cell, number_cell, percent_cell, section, table, text_cell
from edgejoule.report.table import Column, Table, terminal
from edgejoule.report.text import caveat_lines

WORST = 5


def evaluation(found: Evaluation, label: str, no_reference: str = "") -> str:
    """One evaluation, a figure a line, then its caveats. ``no_reference`` says why there is no agreement with the float32 network."""
    scores = found.scores
    rows = [("top-1", f.percent(scores.top1))]
    rows += [("top-5", f.percent(scores.top5))] if scores.top5 is not None else []
    rows += [("calibration error", f"{100 * scores.calibration_error:.2f} %"), ("loss", f"{f.number(scores.loss)} nats")]
    rows += [
        ("worst classes" if i == 0 else "", f"{name}: {f.percent(share)} of {share.n}")
        for i, (name, share) in enumerate(worst_classes(found))
    ]
    if found.agreement is None or found.reference_top1 is None:
        rows.append(("beside float32", no_reference or "not asked for"))
    else:
        rows.append(("float32 top-1", f"{100 * found.reference_top1:.2f} %"))
        rows.append(("  same first answer", f.percent(found.agreement)))
        rows.append(("  lost by compiling", f"{f.points(found.drop)}, paired"))
    rows += [("images left out", str(found.bad_images))] if found.bad_images else []
    subtitle = f"{found.data}, {found.split} split, {scores.n} images"
    notes = ("in brackets the 95 % interval over images",)
    shown = Table(label, (Column("figure"), Column("value", wrap=True)), tuple(rows), subtitle, notes)
    return terminal(shown) + caveat_lines(found.caveats)


def worst_classes(found: Evaluation) -> list[tuple[str, Interval]]:
    """The classes whose images were recognised least often, at most five, those that were always recognised left out."""
    missed = [(name, share) for name, share in found.scores.per_class.items() if share.value < 1.0]
    return sorted(missed, key=lambda one: one[1].value)[:WORST]


def evaluation_section(found: Sequence[tuple[str, Evaluation]]) -> str:
    """Every evaluation of an artifact; nothing where there is none."""
    heads = [Head("Model", pin=True), Head("Images", "", True), Head("Top-1", "", True), Head("Top-5", "", True)]
    heads += [Head("Calibration error", "over 15 bins of confidence", True), Head("Loss", "mean, nats", True)]
    heads += [Head("Same as float32", "the first answer is the float32 network's", True), Head("Lost", "against float32, paired", True)]
    rows = [_row(label, one) for label, one in found]
    about = "Each file in its own runtime on labelled images. Small figures in brackets are 95 % intervals over images."
    return section("What each file gets right", table((*heads, Head("Worst class")), rows, "Evaluations") if rows else "", about)


def _row(label: str, one: Evaluation) -> tuple[Cell, ...]:
    scores, worst = one.scores, worst_classes(one)
    lost = Cell(f.NONE) if one.drop is None else _lost(one.drop)
    return (
        label_cell(label),
        number_cell(str(scores.n), float(scores.n), f"{one.dataset}, {one.split}"),
        percent_cell(scores.top1),
        percent_cell(scores.top5),
        number_cell(f"{100 * scores.calibration_error:.2f} %", scores.calibration_error),
        number_cell(f.number(scores.loss), scores.loss),
        percent_cell(one.agreement),
        lost,
        text_cell(f"{worst[0][0]}, {100 * worst[0][1].value:.1f} % of {worst[0][1].n}") if worst else Cell(f.NONE),
    )


def _lost(drop: Interval) -> Cell:
    value, _, bounds = f.points(drop).partition(" [")
    return number_cell(value, drop.value, f"[{bounds}" if bounds else "")
