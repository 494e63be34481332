"""Does stage 1 foretell stage 2, and does the order survive another choice of exponents or units? Kendall's tau-b. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgejoule.errors import RankError
from edgejoule.rank.metrics import sam
from edgejoule.rank.table import Entry
from edgejoule.records import Agreement, RankRow

EXPONENTS = (1.0, 3.0, 5.0, 7.0)
FACTORS = (1.0, 5.0, 10.0)
UNITS: dict[str, float] = {  # what one mJ per image is in that unit
    "mJ per image": 1.0,
    "J per image": 1e-3,
    "J per 1000 images": 1.0,
    "J per 50000 images": 50.0,
    "Wh per 1000 images": 1.0 / 3600.0,
    "Wh per 50000 images": 50.0 / 3600.0,
}
Figure = Callable[[RankRow], float | None]
STAGE1: dict[str, Figure] = {  # every figure is turned so that higher means better
    "NetScore": lambda row: row.netscore,
    "params (fewer first)": lambda row: None if row.params_m is None else -row.params_m,
    "MACs (fewer first)": lambda row: None if row.macs_g is None else -row.macs_g,
}
STAGE2: dict[str, Figure] = {
    "SAM": lambda row: None if row.sam is None else row.sam.value,
    "energy (less first)": lambda row: -row.energy_mj.value,
}


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b of two equally long lists: 1 same order, 0 unrelated, -1 opposite; ties are discounted.

    (C - D) / sqrt((C + D + Tx)(C + D + Ty)) over pairs, Kendall 1945. None for fewer than two pairs of values, or where one list
    is all one value: there is no order to agree with. Raises RankError for lists of different length.
    """
    if len(x) != len(y):
        raise RankError(f"cannot compare an order of {len(x)} with one of {len(y)}")
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)  # (n,)
    agree = untied_x = untied_y = 0
    for i in range(len(left) - 1):
        dx, dy = np.sign(left[i + 1 :] - left[i]), np.sign(right[i + 1 :] - right[i])  # (n - i - 1,)
        agree += int((dx * dy).sum())
        untied_x += int(np.count_nonzero(dx))
        untied_y += int(np.count_nonzero(dy))
    return agree / math.sqrt(untied_x * untied_y) if untied_x and untied_y else None


def agreements(rows: Sequence[RankRow], names: Sequence[str]) -> tuple[Agreement, ...]:
    """Tau-b of every stage-1 figure against every stage-2 figure; ``names[i]`` is the model that ``rows[i]`` is a variant of.

    A model counts once, by its best figure over backends and recipes: stage 1 chooses models, and rows of one model are no
    independent evidence. Only models that have both figures count.
    """
    found = []
    for stage1, foretold in STAGE1.items():
        best1 = _best(rows, names, foretold)
        for stage2, measured in STAGE2.items():
            best2 = _best(rows, names, measured)
            shared = [name for name in best1 if name in best2]
            if len(shared) >= 2:
                tau = kendall_tau_b([best1[name] for name in shared], [best2[name] for name in shared])
                found.append(Agreement(stage1, stage2, tau, len(shared)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Setting:
    """The order under one choice. ``order`` is empty and ``reason`` says why where SAM has no meaning there."""

    a: float
    b: float
    unit: str
    order: tuple[str, ...]
    tau: float | None  # against the default order
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How the order by SAM depends on choices that nature does not make. ``default`` is a = b = 5, mJ per image, unless asked."""

    default: Setting
    settings: tuple[Setting, ...]

    @property
    def ambiguous(self) -> bool:
        """Some meaningful choice gives another order."""
        return any(setting.order and setting.order != self.default.order for setting in self.settings)


def sensitivity(
    entries: Sequence[Entry],
    *,
    a: float = 5.0,
    b: float = 5.0,
    exponents: Sequence[float] = EXPONENTS,
    factors: Sequence[float] = FACTORS,
) -> Sensitivity:
    """The order by SAM under other exponents ``a``, factors ``b`` and units of energy, one choice changed at a time.

    ``b`` only scales SAM, so it never changes the order: it is listed to show that. The unit matters because the logarithm of an
    energy shifts with it; where one energy is 1 unit or less, SAM changes sign and the setting is undefined. Entries without
    an accuracy above zero do not count. Raises RankError where the default itself has no meaning.
    """
    kept = [entry for entry in entries if entry.top1_pct is not None and entry.top1_pct > 0.0]
    if not kept:
        raise RankError("no model has an accuracy above zero, so there is no order by SAM to test")
    for entry in kept:
        if entry.energy_mj.value <= 1.0:
            raise RankError(
                f"{entry.model} uses {entry.energy_mj.value:g} mJ per image, and SAM changes sign at 1 mJ: rank by efficiency or energy"
            )
    scores = _scores(kept, a, b, 1.0)
    default = Setting(a, b, "mJ per image", _order(kept, scores), 1.0)
    choices = [(other, b, "mJ per image") for other in exponents]
    choices += [(a, other, "mJ per image") for other in factors]
    choices += [(a, b, unit) for unit in UNITS if unit != "mJ per image"]
    return Sensitivity(default, tuple(_setting(kept, scores, *choice) for choice in choices))


def _setting(entries: Sequence[Entry], default: Sequence[float], a: float, b: float, unit: str) -> Setting:
    scale = UNITS[unit]
    below = sum(entry.energy_mj.value * scale <= 1.0 for entry in entries)
    if below:
        return Setting(a, b, unit, (), None, f"undefined: {below} of {len(entries)} models use 1 unit or less, where SAM changes sign")
    scores = _scores(entries, a, b, scale)
    return Setting(a, b, unit, _order(entries, scores), kendall_tau_b(default, scores))


def _scores(entries: Sequence[Entry], a: float, b: float, scale: float) -> list[float]:
    return [sam(entry.top1_pct / 100.0, entry.energy_mj.value * scale, a, b) for entry in entries if entry.top1_pct is not None]


def _order(entries: Sequence[Entry], scores: Sequence[float]) -> tuple[str, ...]:
    ranked = sorted(zip(entries, scores, strict=True), key=lambda pair: (-pair[1], pair[0].model))
    return tuple(entry.model for entry, _ in ranked)


def _best(rows: Sequence[RankRow], names: Sequence[str], figure: Figure) -> dict[str, float]:
    best: dict[str, float] = {}
    for row, name in zip(rows, names, strict=True):
        value = figure(row)
        if value is not None:
            best[name] = max(value, best.get(name, -math.inf))
    return best
