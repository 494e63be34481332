"""Training runs as text and as parts of the page: what came out, how it went epoch by epoch, how much seeds and recipes matter.

Records in, text or escaped HTML out. Trains nothing, reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgejoule.records import Accuracy, Epoch, Interval, Training
from edgejoule.report import format as f
from edgejoule.report.cells import Cell, Head, accuracy_cell, esc, number_cell, percent_cell, section, table, text_cell
from edgejoule.report.report import Spread
from edgejoule.report.table import Column, Table, terminal

WIDTH, HEIGHT, EDGE = 168, 52, 3  # of a curve, pixels
MOST_POINTS = 120
HEADLINES = ("top1", "map", "miou")


# ---------------------------------------------------------------- text


def trainings(found: Sequence[Training], epochs: Mapping[str, Sequence[Epoch]] | None = None) -> str:
    """Every training for the terminal: model, recipe, seed, accuracies, length. Nothing where nothing was trained."""
    if not found:
        return ""
    columns = (Column("model"), Column("recipe", 2), Column("seed", 0, True), Column("validation", 3, True), Column("test", 0, True))
    rows = tuple(
        (
            one.spec.name,
            _recipe(one),
            str(one.seed),
            _figure(one.validation),
            _figure(one.accuracy),
            _count((epochs or {}).get(one.key, ())),
            f.duration(one.seconds),
            one.initial,
        )
        for one in found
    )
    more = (Column("epochs", 4, True), Column("time", 1, True), Column("begun with", 5))
    notes = ("test: Wilson's 95 % interval over the test images, which nothing was chosen by",)
    return terminal(Table(f"{len(found)} trained", (*columns, *more), rows, notes=notes))


def spreads(found: Sequence[Spread]) -> str:
    """For the terminal: each model's recipes by seeds, and the standard deviation that seed and recipe bring."""
    parts = []
    for one in found:
        columns = (Column("recipe"), Column("seeds", 1, True), Column("mean top-1", 0, True), Column("deviation", 0, True))
        rows = tuple(
            (row.recipe, str(len(row.values)), f.percent(row.mean), _points(row.std), " ".join(f"{100 * v:.2f}" for v in row.values))
            for row in one.recipes
        )
        title = f"{one.model} on {one.dataset}: how much seeds and recipes matter"
        notes = (f"standard deviation between seeds {_points(one.seed_std)}, between recipes {_points(one.recipe_std)}", SPREAD)
        parts.append(terminal(Table(title, (*columns, Column("each seed, %", 2)), rows, one.how, notes)))
    return "\n".join(parts)


SPREAD = (
    "Deviations are in percentage points: between seeds pooled over the recipes, between recipes with the chance of the seed taken off "
    "(one-way random effects; a negative estimate is 0)."
)


# ---------------------------------------------------------------- the page


def training_section(found: Sequence[Training], epochs: Mapping[str, Sequence[Epoch]]) -> str:
    """A table of all runs, each with its curve; nothing where nothing was trained."""
    heads = [Head("Model", "network, and below it the recipe", pin=True), Head("Seed", "", True), Head("Validation", "last epoch", True)]
    heads += [Head("Test", "which nothing was chosen by", True), Head("Course", "the solid line: validation score; the dotted one: loss")]
    heads += [Head("Epochs", "", True), Head("Time", "", True), Head("Begun with")]
    rows = [_row(one, epochs) for one in found]
    about = (
        "Each run as it ended. In the course, the solid line is the validation score from 0 to 100 %, the dotted one the loss of training "
        "from 0 to its highest, epoch by epoch."
    )
    return section("Training", table(heads, rows, "Training runs") if rows else "", about, "training")


def spread_section(found: Sequence[Spread]) -> str:
    """Recipes by seeds, and the standard deviation that each brings."""
    heads = [Head("Model", "network, and below it the data", pin=True), Head("Recipe"), Head("Seeds", "", True)]
    heads += [Head("Mean top-1", "with the t-interval over the seeds", True), Head("Deviation", "over this recipe's seeds, points", True)]
    heads += [
        Head("Between seeds", "pooled over the recipes, points", True),
        Head("Between recipes", "chance of the seed off, points", True),
    ]
    rows = [
        (
            Cell(f'<span class="model">{esc(one.model)}</span><small>{esc(one.dataset)} · {esc(one.how)}</small>', one.model),
            text_cell(row.recipe),
            number_cell(str(len(row.values)), len(row.values)),
            percent_cell(row.mean),
            number_cell(_points(row.std), row.std),
            number_cell(_points(one.seed_std), one.seed_std),
            number_cell(_points(one.recipe_std), one.recipe_std),
        )
        for one in found
        for row in one.recipes
    ]
    return section("How much seeds and recipes matter", table(heads, rows, "Spread of test top-1") if rows else "", SPREAD)


def curve(epochs: Sequence[Epoch]) -> str:
    """Validation score (solid, 0 to 1) and loss (dotted, 0 to its highest) over the epochs, as an inline picture; '' without epochs."""
    if not epochs:
        return ""
    name = next((name for name in HEADLINES if name in epochs[-1].scores), "")
    scores = _thinned([(one.number, one.scores[name]) for one in epochs if name in one.scores])
    losses = _thinned([(one.number, one.loss) for one in epochs])
    span = (epochs[0].number, epochs[-1].number)
    lines = _line(losses, span, max((value for _, value in losses), default=1.0), "loss") + _line(scores, span, 1.0, "score")
    said = [f"{len(epochs)} epochs"]
    said += [f"validation from {100 * scores[0][1]:.1f} to {100 * scores[-1][1]:.1f} %"] if scores else []
    said += [f"loss from {f.number(losses[0][1])} to {f.number(losses[-1][1])}"] if losses else []
    label = ", ".join(said)
    return (
        f'<svg class="course" role="img" aria-label="{esc(label)}" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{esc(label)}</title>{lines}</svg>"
    )


def _row(one: Training, epochs: Mapping[str, Sequence[Epoch]]) -> tuple[Cell, ...]:
    lesson = epochs.get(one.key, ())
    return (
        Cell(f'<span class="model">{esc(one.spec.name)}</span><small>{esc(_recipe(one))}</small>', one.spec.name),
        number_cell(str(one.seed), one.seed),
        _accuracy(one.validation),
        _accuracy(one.accuracy),
        Cell(curve(lesson) or f.NONE),
        number_cell(_count(lesson), len(lesson) or None),
        number_cell(f.duration(one.seconds), one.seconds),
        text_cell(one.initial),
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Few enough points for a small picture, the last among them; what is no number is left out."""
    known = [(number, value) for number, value in points if math.isfinite(value)]
    stride = -(-len(known) // MOST_POINTS) or 1
    return known[::-1][::stride][::-1]


def _line(points: Sequence[tuple[int, float]], span: tuple[int, int], most: float, css: str) -> str:
    """One line from the left edge (the first epoch) to the right (the last); a single point is a dot."""
    if not points or most <= 0.0:
        return ""
    width, height = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE
    places = [
        (EDGE + width * (number - span[0]) / max(1, span[1] - span[0]), EDGE + height * (1.0 - min(1.0, max(0.0, value / most))))
        for number, value in points
    ]
    if len(places) == 1:
        return f'<circle class="{css}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2"></circle>'
    return f'<polyline class="{css}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"></polyline>'


def _accuracy(found: Accuracy | None) -> Cell:
    if found is None:
        return Cell(f.NONE)
    return accuracy_cell(100 * found.value, "", _bounds(found, 100.0), below=_score(found))


def _figure(found: Accuracy | None) -> str:
    return f.NONE if found is None else f"{f.top1(100 * found.value, '', _bounds(found, 100.0))} {_score(found)}".rstrip()


def _score(found: Accuracy) -> str:
    """What the figure is where it is no top-1: the training of a dense task names its score behind the data set."""
    return next((name for name in ("miou", "map") if name == found.dataset.rpartition(" ")[2]), "")


def _bounds(found: Accuracy, factor: float) -> Interval | None:
    if found.low is None or found.high is None:
        return None
    return Interval(factor * found.value, factor * found.low, factor * found.high, found.n or 1)


def _recipe(one: Training) -> str:
    return f"{one.recipe}, {one.distill}" if one.distill else one.recipe


def _count(epochs: Sequence[Epoch]) -> str:
    return str(len(epochs)) if epochs else f.NONE


def _points(value: float | None) -> str:
    return f.NONE if value is None else f"{100 * value:.2f}"
