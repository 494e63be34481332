"""Pareto sets of EdgeViT's tables, recomputed, and what the prose says of them. Pure: numbers in, checks out."""

from __future__ import annotations

from collections.abc import Mapping

from edgejoule.rank.pareto import front
from edgejoule.reproduce.checks import Check, Listing, Section, Span, lost, stated
from edgejoule.reproduce.published import Tables, column

OURS = "EdgeViT"
CNNS = ("MobileNet-v2", "MobileNet-v3 0.75", "EfficientNet-B0", "ResNet18")


def on_front(costs: Mapping[str, Span], values: Mapping[str, Span]) -> list[str]:
    """Models that no other one beats at less cost and more value, cheapest first. Printed values, uncertainties aside."""
    points = [(costs[model].value, values[model].value) for model in values]
    kept = [model for model, stays in zip(values, front(points), strict=True) if stays]
    return sorted(kept, key=lambda model: costs[model].value)


def undominated(costs: Mapping[str, Span], values: Mapping[str, Span]) -> list[str]:
    """Transformers that no EdgeViT dominates, cheapest first."""
    others = [model for model in values if OURS not in model and model not in CNNS]
    ours = [model for model in values if OURS in model]
    free = [m for m in others if m in on_front({x: costs[x] for x in (*ours, m)}, {x: values[x] for x in (*ours, m)})]
    return sorted(free, key=lambda model: costs[model].value)


def fronts(tables: Tables) -> Section:
    """Accuracy against energy (Table 3) and latency (Table 2); against FLOPs and parameters for comparison."""
    two, three = tables["table2"], tables["table3"]
    top1, top1_energy = column(two, "top1_percent"), column(three, "top1_percent")
    latency, energy = column(two, "cpu_latency_mean_ms"), column(three, "energy_mean_mJ")
    checks = _ours("table2", "latency", latency, top1) + _ours("table3", "energy", energy, top1_energy)
    checks += [_energy_exception(energy, top1_energy), _energy_dominance(energy, top1_energy), _latency_exception(latency, top1)]
    checks.append(
        lost("table3.bold", "Table 3", "the rows in bold are the Pareto set", "bold rows", "bold marks are lost in the text we have")
    )
    listing = Listing(
        "Pareto sets by the printed means, cheapest first",
        ("value and cost", "on the front"),
        (
            _front_row("top-1 and energy, mJ (Table 3)", energy, top1_energy),
            _front_row("top-1 and latency, ms (Table 2)", latency, top1),
            _front_row("top-1 and FLOPs, G (Table 2)", column(two, "flops_G"), top1),
            _front_row("top-1 and params, M (Table 2)", column(two, "params_M"), top1),
        ),
    )
    return Section("Tables 2 and 3: Pareto sets", tuple(checks), (listing,))


def dense_fronts(tables: Tables) -> Section:
    """AP and mIoU against energy and latency: do the EdgeViTs alone make the front?"""
    checks, rows = [], []
    for table, metric in (("table7", "AP_percent"), ("table8", "mIoU_percent")):
        value, place = column(tables[table], metric), f"Table {table[-1]}"
        for what, name, unit in (("energy", "energy_mean_J", "J"), ("latency", "cpu_latency_mean_s", "s")):
            cost = column(tables[table], name)
            checks.append(_alone(table, place, what, cost, value, column(tables[table], name.replace("_mean_", "_pm_"))))
            rows.append(_front_row(f"{metric.partition('_')[0]} and {what}, {unit} ({place})", cost, value))
    listing = Listing("Pareto sets of the dense tasks, cheapest first", ("value and cost", "on the front"), tuple(rows))
    return Section("Tables 7 and 8: Pareto sets", tuple(checks), (listing,))


def _alone(table: str, place: str, what: str, cost: Mapping[str, Span], value: Mapping[str, Span], spread: Mapping[str, Span]) -> Check:
    """The EdgeViTs alone make the front; where another model stands on it by less than the printed +-, that cannot be told."""
    ours, found = [model for model in value if OURS in model], on_front(cost, value)
    name, claim, printed = f"{table}.front.{what}", f"by {what}, the front is the EdgeViTs alone (not claimed)", ", ".join(ours)
    others = [model for model in found if model not in ours]
    tied = [m for m in others if any(_overlap(cost, spread, m, our) and value[our].value > value[m].value for our in ours)]
    if others and tied == others:
        note = f"{', '.join(tied)} is ahead by less than the printed +- of both"
        return Check(name, place, claim, printed, ", ".join(found), "printed +-", "not recoverable", note)
    return stated(name, place, claim, printed, ", ".join(found), not others, "means as printed")


def _overlap(mean: Mapping[str, Span], spread: Mapping[str, Span], first: str, second: str) -> bool:
    return abs(mean[first].value - mean[second].value) <= spread[first].value + spread[second].value


def _ours(table: str, what: str, costs: Mapping[str, Span], values: Mapping[str, Span]) -> list[Check]:
    found = on_front(costs, values)
    ours = [model for model in values if OURS in model]
    place = f"Table {table[-1]}"
    claim = f"{{}} is Pareto-optimal in accuracy and {what}"
    return [
        stated(f"{table}.front.{m}", place, claim.format(m), "on the front", "on the front" if m in found else "dominated", m in found)
        for m in ours
    ]


def _energy_exception(energy: Mapping[str, Span], top1: Mapping[str, Span]) -> Check:
    found = [model for model in on_front(energy, top1) if OURS not in model and model not in CNNS]
    better = [m for m in top1 if energy[m].value < energy["LeViT-384"].value and top1[m].value > top1["LeViT-384"].value]
    note = (
        f"LeViT-384 ({energy['LeViT-384'].value:g} mJ, {top1['LeViT-384'].value:g} %) is dominated by {', '.join(better)}" if better else ""
    )
    claim = '"only exception being LeViT-384" on energy: other ViTs on the front'
    return stated(
        "prose.energy_exception", "text, energy", claim, "LeViT-384", ", ".join(found) or "none", found == ["LeViT-384"], note=note
    )


def _energy_dominance(energy: Mapping[str, Span], top1: Mapping[str, Span]) -> Check:
    found = undominated(energy, top1)
    note = "those cheaper than every EdgeViT are dominated by CNNs only"
    claim = '"only exception being LeViT-384" on energy: ViTs that no EdgeViT dominates'
    return stated("prose.energy_dominance", "text, energy", claim, "LeViT-384", ", ".join(found), found == ["LeViT-384"], note=note)


def _latency_exception(latency: Mapping[str, Span], top1: Mapping[str, Span]) -> Check:
    found = [model for model in on_front(latency, top1) if OURS not in model and model not in CNNS]
    note = "so the exception that the prose names on energy is one on latency"
    claim = "the same read for latency (not claimed): other ViTs on the front"
    return stated("prose.latency_exception", "Table 2", claim, "LeViT-384", ", ".join(found), found == ["LeViT-384"], note=note)


def _front_row(what: str, costs: Mapping[str, Span], values: Mapping[str, Span]) -> tuple[str, str]:
    return what, ", ".join(f"{m} ({costs[m].value:g}, {values[m].value:g})" for m in on_front(costs, values))
