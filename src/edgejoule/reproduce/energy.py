"""The energy columns of EdgeViT's Tables 3, 7 and 8: accuracy per millijoule again, and whether energy is power times time. Pure."""

from __future__ import annotations

from edgejoule.reproduce.checks import Check, Listing, Section, Span, compared, stated
from edgejoule.reproduce.published import Tables, column

MJ_PER_J = 1e3
PHONE_AND_BOARD = (
    "latency was timed on a Samsung Galaxy S21, energy and power on a Snapdragon 888 development kit: two devices of one chip, "
    "so the columns of one row are not of one run"
)


def efficiency(tables: Tables) -> Section:
    """Top-1 over energy for each row of Table 3; unit %/mJ."""
    rows = tables["table3"]
    accuracy, energy = column(rows, "top1_percent"), column(rows, "energy_mean_mJ")
    printed = column(rows, "efficiency_percent_per_mJ")
    checks = [_ratio("table3", "Table 3", model, printed[model], accuracy[model], energy[model]) for model in printed]
    return Section("Table 3: efficiency is top-1 over energy", tuple(checks))


def dense_efficiency(tables: Tables) -> Section:
    """AP (Table 7) and mIoU (Table 8) over energy; energies are printed in J, efficiencies in %/mJ."""
    checks = []
    for table, metric in (("table7", "AP_percent"), ("table8", "mIoU_percent")):
        rows = tables[table]
        accuracy, energy = column(rows, metric), column(rows, "energy_mean_J")
        printed = column(rows, "efficiency_percent_per_mJ")
        place = f"Table {table[-1]}"
        checks += [_ratio(table, place, m, printed[m], accuracy[m], energy[m].times(MJ_PER_J)) for m in printed]
    return Section("Tables 7 and 8: efficiency is AP or mIoU over energy", tuple(checks))


def _ratio(table: str, place: str, model: str, printed: Span, accuracy: Span, energy: Span) -> Check:
    """``accuracy`` in %, ``energy`` in mJ."""
    name, claim, found = f"{table}.efficiency.{model}", f"efficiency of {model}, %/mJ", accuracy / energy
    note = ""
    if not printed.meets(found):
        value, cost = (printed * energy).text(), (accuracy / printed).text()
        note = f"no inputs that round to the row's give this; it would need {value} % or {cost} mJ"
    elif not printed.holds(found.value):
        note = "only because the inputs are rounded: the printed inputs alone round to another last digit"
    return compared(name, place, claim, printed, found, note=note)


def closure(tables: Tables) -> Section:
    """E / (P t) of each row of Table 3, dimensionless: 1 if energy were the printed power times the printed latency."""
    rows = tables["table3"]
    energy, power = column(rows, "energy_mean_mJ"), column(rows, "power_mean_W")
    latency = column(rows, "cpu_latency_mean_ms")
    spans = {model: energy[model] / (power[model] * latency[model]) for model in energy}  # mJ / (W ms) = 1
    off = [model for model, span in spans.items() if not span.holds(1.0)]
    least, most = min(spans, key=lambda m: spans[m].value), max(spans, key=lambda m: spans[m].value)
    found = f"{spans[least].value:.2f} ({least}) to {spans[most].value:.2f} ({most}); {len(off)} of {len(spans)} rows are not 1"
    check = stated(
        "table3.closure",
        "Table 3",
        "energy = power x latency",
        "E = P t (not claimed)",
        found,
        not off,
        "inputs as rounded",
        PHONE_AND_BOARD,
    )
    implied = tuple((m, s.text(), f"{energy[m].value / power[m].value:.1f}", f"{latency[m].value:.1f}") for m, s in spans.items())
    columns = ("model", "E / (P t)", "E / P, ms: time on the kit", "latency, ms: the phone's")
    return Section("Table 3: energy against power times latency", (check,), (Listing("E / (P t), row by row", columns, implied),))


def dense_power(tables: Tables) -> Section:
    """Energy over latency of Tables 7 and 8, in watts, beside the power of the same backbone in Table 3."""
    power = column(tables["table3"], "power_mean_W")
    spread = column(tables["table3"], "power_pm_W")
    rows = []
    for table in ("table7", "table8"):
        energy, latency = column(tables[table], "energy_mean_J"), column(tables[table], "cpu_latency_mean_s")
        for model in energy:
            known = model.replace("PVTv2", "PVT-v2")
            beside = f"{power[known].value:.2f} +- {spread[known].value:.2f}" if known in power else "–"
            rows.append((f"Table {table[-1]}", model, (energy[model] / latency[model]).text(3), beside))
    listing = Listing(
        "Power that Tables 7 and 8 imply", ("table", "model", "E / t, W", "power in Table 3, W"), tuple(rows), (PHONE_AND_BOARD,)
    )
    return Section("Tables 7 and 8: energy over latency", (), (listing,))
