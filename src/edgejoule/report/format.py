"""How numbers and names look, in one place: digits by the width of the interval, units scaled for reading, hostile text made harmless.

SI comes in, text goes out. Knows no table and no page.
"""

from __future__ import annotations

import math
import unicodedata

from edgejoule.records import Interval

NONE = "–"
GRADES = {
    "A": "calibrated analyser, within about 1 %",
    "B": "external uncalibrated meter, within 1–3 %",
    "C": "on-board sensor, absolute error 5–10 %, repeatable to 1–3 %",
    "D": "an estimate from a model, off by 40 % or more",
}
TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
ENERGIES = ((1e3, "kJ"), (1.0, "J"), (1e-3, "mJ"), (1e-6, "µJ"))
POWERS = ((1.0, "W"), (1e-3, "mW"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def clean(text: str) -> str:
    """The text without what steers a terminal or reverses its direction: such characters become U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def decimals(value: float, low: float | None = None, high: float | None = None, significant: int = 3) -> int:
    """Digits after the point: down to the first digit of the interval's half-width, else ``significant`` digits in all."""
    if low is not None and high is not None and (high - low) / 2.0 > 0.0:  # half of the least number is zero
        return min(9, max(0, -math.floor(math.log10((high - low) / 2.0))))
    if value == 0.0 or not math.isfinite(value):
        return 0
    return min(9, max(0, significant - 1 - math.floor(math.log10(abs(value)))))


def number(value: float, significant: int = 3) -> str:
    """A bare number to ``significant`` digits."""
    return f"{value:.{decimals(value, significant=significant)}f}"


def measure(interval: Interval | None, unit: str = "", factor: float = 1.0, grade: str = "") -> str:
    """``48.2 ms [47.9, 48.6]``: value, unit, 95 % bounds. ``factor`` turns SI into the unit. A grade D value is marked with ≈."""
    if interval is None:
        return NONE
    value, low, high = interval.value * factor, _times(interval.low, factor), _times(interval.high, factor)
    digits = decimals(value, low, high)
    text = f"{value:.{digits}f}{' ' + unit if unit else ''}"
    if grade == "D":
        text = f"≈{text}"
    if low is None and high is None:
        return text
    return f"{text} [{_bound(low, digits)}, {_bound(high, digits)}]"


def scaled(value: float | None, steps: tuple[tuple[float, str], ...]) -> str:
    """A value in the largest unit of ``steps`` that it fills: ``scaled(0.0482, TIMES)`` -> ``48.2 ms``."""
    if value is None:
        return NONE
    size, unit = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{number(value / size)} {unit}"


def top1(top1_pct: float | None, kind: str = "", interval: Interval | None = None, seeds: int | None = None) -> str:
    """``79.86 % published``, ``97.8 % [97.1, 98.3] measured, 5 seeds``: never without where it comes from, if that is known.

    ``interval`` is in percent.
    """
    if top1_pct is None:
        return NONE
    bounds = interval if interval is not None and interval.low is not None and interval.high is not None else None
    figure = f"{top1_pct:.2f} %" if bounds is None else percent(bounds, 1.0)
    return f"{figure} {where}" if (where := accuracy_origin(kind, seeds)) else figure


def accuracy_origin(kind: str, seeds: int | None = None) -> str:
    """``published``, ``measured`` or ``measured, 5 seeds``; nothing for a figure of unknown origin."""
    if kind not in ("published", "measured"):
        return ""
    return f"{kind}, {seeds} seeds" if seeds else kind


def percent(interval: Interval | None, factor: float = 100.0, unit: str = "%") -> str:
    """A fraction with its bounds: ``97.8 % [97.1, 98.3]``, never without a digit after the point."""
    if interval is None:
        return NONE
    value, low, high = interval.value * factor, _times(interval.low, factor), _times(interval.high, factor)
    digits = max(1, min(2, decimals(value, low, high)))
    text = f"{value:.{digits}f} {unit}"
    return text if low is None and high is None else f"{text} [{_bound(low, digits)}, {_bound(high, digits)}]"


def points(interval: Interval | None) -> str:
    """A difference of two fractions in percentage points, with its bounds and always a sign: ``+0.3 points [-0.5, 1.1]``."""
    text = percent(interval, unit="points")
    return text if interval is None or text.startswith("-") else f"+{text}"


def duration(seconds: float) -> str:
    """``48 s``, ``12.5 min``, ``3.2 h``: for what people wait for."""
    size, unit = next((step for step in ((3600.0, "h"), (60.0, "min")) if seconds >= 2 * step[0]), (1.0, "s"))
    return f"{number(seconds / size)} {unit}"


def accuracy_name(dataset: str) -> str:
    """What an accuracy on a data set is called: ``AP``, ``mIoU``, else ``top-1``. The catalog's data sets of dense tasks say which."""
    return next((name for name in ("mIoU", "AP") if name in dataset.split()), "top-1")


def saved(saved_pct: float | None) -> str:
    """Energy against the baseline: ``62 % less``, ``8 % more``, ``same``."""
    if saved_pct is None:
        return NONE
    if abs(saved_pct) < 0.5:
        return "same"
    return f"{abs(saved_pct):.0f} % {'less' if saved_pct > 0 else 'more'}"


def saving(saved_pct: float | None) -> str:
    """The same as a signed figure for a column: ``62 %``, ``-8 %``."""
    return NONE if saved_pct is None else f"{saved_pct:.0f} %".replace("-0 %", "0 %")


def plain_number(value: float | None, significant: int = 3) -> str:
    """A bare number, or a dash where there is none."""
    return NONE if value is None else number(value, significant)


def metric_name(metric: str, a: float, b: float) -> str:
    """The metric in words: ``SAM (a = 5, b = 5)``."""
    words = {"sam": f"SAM (a = {a:g}, b = {b:g})", "efficiency": "top-1 per millijoule", "netscore": "NetScore"}
    return words.get(metric, metric)


def grade_words(grade: str) -> str:
    """``C (on-board sensor, …)``, or that nobody stated it."""
    return f"{grade} ({GRADES[grade]})" if grade in GRADES else "not stated"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _bound(value: float | None, digits: int) -> str:
    return "…" if value is None else f"{value:z.{digits}f}"  # z: what rounds to zero has no sign
