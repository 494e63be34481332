"""E3P-ViT's two stages: which candidates its thresholds keep, their NetScores, and how much SAM's order owes to its choices. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgejoule.catalog import find_model, pool
from edgejoule.rank.agreement import Sensitivity, kendall_tau_b, sensitivity
from edgejoule.rank.metrics import sam
from edgejoule.rank.table import Entry
from edgejoule.records import Interval, Screened
from edgejoule.reproduce.checks import Check, Listing, Section, lost, stated
from edgejoule.reproduce.published import published_table
from edgejoule.screen.netscore import netscore
from edgejoule.screen.select import E3P, screen

CANDIDATES, SURVIVORS = 25, 13
EXPONENTS = (1.0, 3.0, 5.0, 7.0)
Anchor = tuple[str, float, float]  # model, top-1 in %, energy in mJ per image
UNITS_MJ = {"mJ per image": 1.0, "J per image": 1e3, "Wh per image": 3.6e6, "kWh per image": 3.6e9}  # one unit in mJ
ONE_DECIMAL = {"EfficientViT-B1": (79.25, 9.1, 0.52), "LeViT_Conv_192": (79.86, 10.9, 0.70)}  # top-1 %, params M, MACs G, as on their pages


def screened() -> tuple[Screened, ...]:
    return screen(pool("e3p"), E3P)


def screening() -> Section:
    """25 candidates through top-1 >= 79 %, params < 23 M, MACs < 5 G."""
    rows = screened()
    kept, rejected = [row.name for row in rows if row.kept], [row for row in rows if not row.kept]
    note = (
        "the 13 are a list in public code that fits all that is known of the paper's, though whose it is is not proven; "
        "the 12 rejected are a reconstruction"
    )
    checks = (
        stated("e3p.candidates", "Method", "candidates in stage 1", str(CANDIDATES), str(len(rows)), len(rows) == CANDIDATES, note=note),
        stated("e3p.survivors", "Method", "candidates that pass the thresholds", str(SURVIVORS), str(len(kept)), len(kept) == SURVIVORS),
        Check("e3p.names", "Method", "the survivors by name", "not listed in public", ", ".join(kept), "–", "not recoverable", note),
    )
    listing = Listing("Rejected by the thresholds", ("model", "reason"), tuple((row.name, row.reason) for row in rejected))
    return Section("Stage 1: 25 candidates, 13 survivors", checks, (listing,))


def netscores() -> Section:
    """NetScore of the survivors from the catalog's figures, and of two from the rounded figures that the paper must have used."""
    rows = []
    for row in screened():
        if row.kept and row.netscore is not None:
            rounded = ONE_DECIMAL.get(_paper_name(row.name))
            own = f"{netscore(*rounded):.1f}" if rounded else "–"
            rows.append((row.name, f"{row.top1_pct:.2f}", f"{row.params_m:.2f}", f"{row.macs_g:.2f}", f"{row.netscore:.2f}", own))
    columns = ("model", "top-1, %", "params, M", "MACs, G", "NetScore", "from rounded figures")
    why = "the paper's NetScore column and exponents are not public; these are alpha 2, beta and gamma 0.5"
    check = lost("e3p.netscore", "Tables", "NetScore of the survivors", "a column", why)
    return Section("Stage 1: NetScore", (check,), (Listing("NetScore of the survivors, best first", columns, tuple(rows)),))


def _paper_name(name: str) -> str:
    return next((paper for paper in ONE_DECIMAL if find_model(paper).name == name), "")


def sensitivities(anchors: Sequence[Anchor]) -> tuple[Section, ...]:
    """SAM's order under other exponents and units: on EdgeViT's Table 3, the one full table in print, and on E3P-ViT's ``anchors``.

    The first anchor is the paper's best model, near which SAM's reaction to its inputs is shown.
    """
    table3 = published_table("edgevit_table3")
    entries = [_entry(row["model"], float(row["top1_percent"]), float(row["energy_mean_mJ"])) for row in table3]
    about = "Kendall's tau-b against the order of a = 5 and mJ per image; b only scales and is left out"
    return (
        Section("SAM's order on EdgeViT's Table 3 (17 models)", (), (*_tables(entries), _reactions(anchors[0])), about),
        Section("SAM's order on E3P-ViT's anchors (RTX 3050, ImageNet-1K)", (), _tables([_entry(*anchor) for anchor in anchors]), about),
    )


def _entry(model: str, top1_pct: float, energy_mj: float) -> Entry:
    return Entry(model, top1_pct, Interval(energy_mj, None, None, 1))


def _tables(entries: Sequence[Entry]) -> tuple[Listing, Listing]:
    """One listing where SAM has a meaning, and one of its formula taken literally in units where it has none."""
    found = sensitivity(entries, exponents=EXPONENTS, factors=())
    rows = [
        (f"{s.a:g}", s.unit, _tau(s.tau), str(moved(found, s.order)) if s.order else "–", _change(found, s.order, s.reason))
        for s in found.settings
    ]
    columns = ("a", "unit of energy", "tau", "models moved", "order")
    meant = Listing("Where SAM has a meaning", columns, tuple(rows), (f"order at a = 5, mJ: {' > '.join(found.default.order)}",))
    note = "below 1 unit the logarithm is negative: SAM turns negative, and more accuracy makes it worse"
    literal = [_literal(entries, unit, size) for unit, size in UNITS_MJ.items()]
    return meant, Listing("The formula taken literally", ("unit of energy", "SAM from", "to", "tau", "best"), tuple(literal), (note,))


def moved(found: Sensitivity, order: Sequence[str]) -> int:
    """How many models stand in another place than in the default order."""
    return sum(here != there for here, there in zip(order, found.default.order, strict=True))


def _literal(entries: Sequence[Entry], unit: str, size_mj: float) -> tuple[str, ...]:
    default = [sam((entry.top1_pct or 0.0) / 100.0, entry.energy_mj.value) for entry in entries]
    scores = [5.0 * ((entry.top1_pct or 0.0) / 100.0) ** 5 / math.log10(entry.energy_mj.value / size_mj) for entry in entries]
    best = max(range(len(entries)), key=lambda i: scores[i])
    return unit, f"{min(scores):.3f}", f"{max(scores):.3f}", _tau(kendall_tau_b(default, scores)), entries[best].model


def _reactions(anchor: Anchor) -> Listing:
    """How SAM5 moves with its inputs near the energy that the paper's best model implies."""
    name, top1_pct, energy_mj = anchor
    accuracy = top1_pct / 100.0
    score = sam(accuracy, energy_mj)
    cases = (("accuracy up by 1 % of itself", sam(accuracy * 1.01, energy_mj)), ("energy doubled", sam(accuracy, 2.0 * energy_mj)))
    rows = tuple((what, f"{(value / score - 1.0) * 100.0:+.1f} %") for what, value in cases)
    return Listing(f"What moves SAM5 ({name}: {top1_pct:g} %, {energy_mj:.0f} mJ)", ("change", "SAM5"), rows)


def _change(found: Sensitivity, order: Sequence[str], reason: str) -> str:
    if not order:
        return reason
    return "the same" if tuple(order) == found.default.order else "first: " + " > ".join(order[:3])


def _tau(tau: float | None) -> str:
    return "–" if tau is None else f"{tau:.3f}"
