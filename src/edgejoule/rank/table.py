"""One model with its figures, ready to be ranked (``Entry``), and how entries are read from any CSV table.

Knows no metric and no device: only which numbers a ranking needs, and how to say which cell of a file is wrong.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgejoule.errors import RankError
from edgejoule.records import Interval

REQUIRED = ("model", "top1_pct", "energy_mj")
MEASURES = ("energy_mj", "latency_ms", "power_w")  # each may bring <name>_low and <name>_high
BOUNDED = tuple(f"{name}_{end}" for name in ("top1_pct", *MEASURES) for end in ("low", "high"))
FIGURES = ("netscore", "params_m", "macs_g")
LARGEST_BYTES = 64 * 2**20
NetScore = Callable[[float, float, float], float]  # (top1_pct, params_m, macs_g)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a ranking knows of one model. ``model`` is the label shown; ``name``, ``recipe`` and ``backend`` are its parts.

    Energy is per image, latency per inference. ``top1`` is the interval of the accuracy in percent, where there is one.
    """

    model: str
    top1_pct: float | None
    energy_mj: Interval
    latency_ms: Interval | None = None
    power_w: Interval | None = None
    accuracy: str = "published"
    top1: Interval | None = None
    name: str = ""
    recipe: str = ""
    backend: str = ""
    weights: str = ""
    netscore: float | None = None
    params_m: float | None = None
    macs_g: float | None = None
    plain: str = ""  # for a distilled model: the name of its plain twin
    artifact_sha256: str = ""
    note: str = ""
    seeds: int | None = None  # trainings that top1_pct is the mean of


def entries_from_csv(path: Path | str, *, netscore: NetScore | None = None) -> tuple[Entry, ...]:
    """Entries of a table with columns ``model, top1_pct, energy_mj`` and optionally ``latency_ms, power_w, params_m, macs_g,
    netscore, accuracy, seeds, weights, plain, recipe``, ``<measure>_low``/``_high`` and ``top1_pct_low``/``_high``; other columns are
    ignored. In a table with a column ``recipe``, a model ``name | recipe @ backend`` is a variant of ``name``.

    The delimiter is a comma, a semicolon or a tab; a byte-order mark is skipped. ``netscore`` computes the score where the table
    gives params and MACs but no score. Raises RankError naming file, line and column.
    """
    path = Path(path)
    lines = _read(path)
    header = _header(path, lines)
    entries: list[Entry] = []
    seen: dict[str, int] = {}
    for number, values in lines[1:]:
        if not any(value.strip() for value in values):
            continue
        if len(values) > len(header):
            raise RankError(f"{path}, line {number}: {len(values)} values where the header has {len(header)} columns")
        row = Row(path, number, dict(zip(header, values, strict=False)))
        entry = row.entry()
        if entry.model in seen:
            raise RankError(f"{path}, line {number}, column model: {entry.model!r} stands on line {seen[entry.model]} already")
        seen[entry.model] = number
        entries.append(_with_netscore(entry, netscore))
    if not entries:
        raise RankError(f"{path} has no rows: expected one line per model below the header")
    if all(entry.top1_pct is not None and entry.top1_pct <= 1.0 for entry in entries):
        raise RankError(f"{path}, column top1_pct: every value is 1 or less, which looks like fractions: expected percent, as in 81.4")
    return tuple(entries)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table, with what is needed to name a cell in an error."""

    path: Path
    line: int
    cells: Mapping[str, str]

    def entry(self) -> Entry:
        model = self.cells.get("model", "").strip()
        if not model:
            raise self.wrong("model", "is empty, expected a name")
        top1_pct = self.number("top1_pct")
        if not 0.0 < top1_pct <= 100.0:
            raise self.wrong("top1_pct", f"is {top1_pct:g}, expected percent in (0, 100]")
        accuracy = self.cells.get("accuracy", "").strip().lower()
        name, recipe, backend = self.parts(model)
        return Entry(
            model=model,
            top1_pct=top1_pct,
            energy_mj=self.measure("energy_mj"),
            latency_ms=self.measure("latency_ms") if self.has("latency_ms") else None,
            power_w=self.measure("power_w") if self.has("power_w") else None,
            accuracy=accuracy if accuracy in ("published", "measured") else "table",
            name=name,
            recipe=recipe,
            backend=backend,
            weights=self.cells.get("weights", "").strip(),
            plain=self.cells.get("plain", "").strip(),
            top1=self.top1(top1_pct),
            seeds=self.seeds(),
            netscore=self.optional("netscore"),
            params_m=self.positive("params_m"),
            macs_g=self.positive("macs_g"),
        )

    def parts(self, model: str) -> tuple[str, str, str]:
        """Name, recipe and backend of a label; the label is the name where the table does not speak of recipes."""
        if "recipe" not in self.cells:
            return model, "", ""
        recipe = self.cells["recipe"].strip()
        variant, _, backend = model.rpartition(" @ ") if " @ " in model else (model, "", "")
        return variant.removesuffix(f" | {recipe}") if recipe else variant, recipe, backend

    def top1(self, value: float) -> Interval | None:
        """The interval of the accuracy where the table gives both bounds; one alone bounds nothing that a metric can use."""
        low, high = self.optional("top1_pct_low"), self.optional("top1_pct_high")
        if low is not None and not 0.0 <= low <= value:
            raise self.wrong("top1_pct_low", f"is {low:g}, expected a number between 0 and top1_pct = {value:g}")
        if high is not None and not value <= high <= 100.0:
            raise self.wrong("top1_pct_high", f"is {high:g}, expected a number between top1_pct = {value:g} and 100")
        return None if low is None or high is None else Interval(value, low, high, self.seeds() or 1)

    def seeds(self) -> int | None:
        value = self.positive("seeds")
        if value is not None and not value.is_integer():
            raise self.wrong("seeds", f"is {value:g}, expected a whole number")
        return None if value is None else int(value)

    def has(self, column: str) -> bool:
        return bool(self.cells.get(column, "").strip())

    def optional(self, column: str) -> float | None:
        return self.number(column) if self.has(column) else None

    def positive(self, column: str) -> float | None:
        value = self.optional(column)
        if value is not None and value <= 0.0:
            raise self.wrong(column, f"is {value:g}, expected a number above 0")
        return value

    def number(self, column: str) -> float:
        text = self.cells.get(column, "").strip()
        if not text:
            raise self.wrong(column, "is empty, expected a number")
        try:
            value = float(text)
        except ValueError:
            hint = ": write a decimal point, not a comma" if "," in text else ""
            raise self.wrong(column, f"is {_short(text)}, expected a number{hint}") from None
        if not math.isfinite(value):
            raise self.wrong(column, f"is {_short(text)}, expected a finite number")
        return value

    def measure(self, column: str) -> Interval:
        value = self.number(column)
        low, high = self.optional(f"{column}_low"), self.optional(f"{column}_high")
        if value <= 0.0:
            raise self.wrong(column, f"is {value:g}, expected a number above 0: absence is an empty row, never zero")
        if low is not None and not 0.0 <= low <= value:
            raise self.wrong(f"{column}_low", f"is {low:g}, expected a number between 0 and {column} = {value:g}")
        if high is not None and high < value:
            raise self.wrong(f"{column}_high", f"is {high:g}, expected at least {column} = {value:g}")
        return Interval(value, low, high, 1)

    def wrong(self, column: str, what: str) -> RankError:
        return RankError(f"{self.path}, line {self.line}, column {column}: the value {what}")


def _read(path: Path) -> list[tuple[int, list[str]]]:
    """(line, values) of every record. A record may span lines where a quoted name holds a line break; the last is named."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise RankError(f"{path} is larger than {LARGEST_BYTES // 2**20} MiB: expected a table with one line per model")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RankError(f"cannot read {path}: {error.strerror or error}, expected a CSV table or a store") from error
    except ValueError as error:  # UnicodeDecodeError, or a NUL in the path
        raise RankError(f"{path} is not UTF-8 text: save the table as CSV (UTF-8)") from error
    if not text.strip():
        raise RankError(f"{path} is empty: expected a table with the columns {', '.join(REQUIRED)}")
    first = text.lstrip().splitlines()[0]
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        rows = [(reader.line_num, values) for values in reader]
    except csv.Error as error:
        raise RankError(f"{path}, line {reader.line_num}: {error}; expected a CSV table") from error
    while rows and not any(value.strip() for value in rows[0][1]):
        rows.pop(0)
    if not rows:
        raise RankError(f"{path} holds delimiters only: expected a table with the columns {', '.join(REQUIRED)}")
    return rows


def _header(path: Path, rows: list[tuple[int, list[str]]]) -> list[str]:
    line, values = rows[0]
    header = [value.strip().lower() for value in values]
    if missing := [name for name in REQUIRED if name not in header]:
        found = ", ".join(_short(name) for name in header[:20] if name) or "nothing"
        raise RankError(f"{path}, line {line}: the column {', '.join(missing)} is missing, found {found}")
    known = {*REQUIRED, *MEASURES, *FIGURES, *BOUNDED, "seeds", "recipe"}
    if twice := sorted({name for name in header if name in known and header.count(name) > 1}):
        raise RankError(f"{path}, line {line}: the column {', '.join(twice)} stands there twice: remove one")
    return header


def _with_netscore(entry: Entry, netscore: NetScore | None) -> Entry:
    if netscore is None or entry.netscore is not None or entry.top1_pct is None or entry.params_m is None or entry.macs_g is None:
        return entry
    return replace(entry, netscore=netscore(entry.top1_pct, entry.params_m, entry.macs_g))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
