"""Sentences and repeated numbers of the EdgeViT paper against its own tables. Pure.

The numbers that the sentences state stand here; everything beside them is computed from the tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgejoule.reproduce.checks import Check, Listing, Section, as_printed, compared, lost, stated
from edgejoule.reproduce.published import Row, Tables, cell, column, keyed

SPEED_CLAIMS = (("EdgeViT-XXS", "MobileViT-XXS", "2"), ("EdgeViT-XS", "MobileViT-XS", "2.7"), ("EdgeViT-S", "MobileViT-S", "2.6"))
CLOSE_PAIRS = (
    ("table2", "cpu_latency_mean_ms", "EdgeViT-XXS", "MobileNet-v2"),
    ("table2", "cpu_latency_mean_ms", "EdgeViT-XS", "EfficientNet-B0"),
    ("table3", "energy_mean_mJ", "EdgeViT-XXS", "EfficientNet-B0"),
    ("table3", "energy_mean_mJ", "EdgeViT-S", "LeViT-384"),
)
SAME = (  # two tables that print one quantity: (name, table, column, key, table, column, key)
    ("top1", "table2", "top1_percent", "model", "table3", "top1_percent", "model"),
    ("latency", "table2", "cpu_latency_mean_ms", "model", "table3", "cpu_latency_mean_ms", "model"),
    ("latency_pm", "table2", "cpu_latency_pm_ms", "model", "table3", "cpu_latency_pm_ms", "model"),
    ("AP", "table5", "retinanet_AP_percent", "backbone", "table7", "AP_percent", "model"),
    ("mIoU", "table6", "mIoU_percent", "backbone", "table8", "mIoU_percent", "model"),
)


def speed(tables: Tables) -> Section:
    """How many times faster than MobileViT: ratios of Table 2's means."""
    latency, spread = column(tables["table2"], "cpu_latency_mean_ms"), column(tables["table2"], "cpu_latency_pm_ms")
    checks = []
    for ours, other, factor in SPEED_CLAIMS:
        found, printed = latency[other] / latency[ours], as_printed(factor)
        low = (latency[other].value - spread[other].value) / (latency[ours].value + spread[ours].value)
        high = (latency[other].value + spread[other].value) / (latency[ours].value - spread[ours].value)
        cut = "" if printed.meets(found) else "cut off, not rounded: " if int(found.value * 10) / 10 == printed.value else ""
        note = f"{cut}{latency[other].value:g} / {latency[ours].value:g} ms; with the printed +-: {low:.2f} to {high:.2f}"
        claim = f"{ours} is x{factor} faster than {other}"
        checks.append(compared(f"prose.speed.{ours}", "text, latency", claim, printed, found, note=note))
    return Section("Speed against MobileViT", tuple(checks))


def sentences(tables: Tables) -> Section:
    """Numbers of the running text and of Figure 1's caption."""
    top1, latency = column(tables["table2"], "top1_percent"), column(tables["table2"], "cpu_latency_mean_ms")
    mask = column(tables["table5"], "maskrcnn_APm_percent", "backbone")
    printed = as_printed("33.3")
    owners = [model for model, span in latency.items() if span.value == printed.value]
    checks = [
        compared(
            "prose.mobilenet_gain",
            "Introduction",
            "EdgeViT-XXS over MobileNet-v2, top-1 points",
            as_printed("2.2"),
            top1["EdgeViT-XXS"] - top1["MobileNet-v2"],
        ),
        compared(
            "prose.figure1.xxs",
            "Figure 1",
            "latency of EdgeViT-XXS, ms",
            printed,
            latency["EdgeViT-XXS"],
            note=f"{printed.value:g} ms is the latency of {', '.join(owners) or 'no row'}",
        ),
        compared(
            "prose.figure1.efficientnet", "Figure 1", "latency of EfficientNet-B0, ms", as_printed("52.1"), latency["EfficientNet-B0"]
        ),
        compared(
            "prose.mask_ap",
            "text, detection",
            "EdgeViT-S over PVTv2-B1, mask AP points",
            as_printed("1.2"),
            mask["EdgeViT-S"] - mask["PVTv2-B1"],
        ),
    ]
    return Section("The running text against the tables", tuple(checks), about="differences of printed means")


def uncertainties(tables: Tables) -> Section:
    """Orders that the means suggest and the printed +- do not resolve."""
    checks = [_close(tables, *pair) for pair in CLOSE_PAIRS]
    rows = []
    for table, name, what in (("table2", "cpu_latency_mean_ms", "latency, ms"), ("table3", "energy_mean_mJ", "energy, mJ")):
        mean, spread = column(tables[table], name), column(tables[table], name.replace("_mean_", "_pm_"))
        models = [model for model in mean if model in spread]
        pairs = [(a, b) for i, a in enumerate(models) for b in models[i + 1 :]]
        open_pairs = [(a, b) for a, b in pairs if abs(mean[a].value - mean[b].value) <= spread[a].value + spread[b].value]
        rows.append((f"Table {table[-1]}", what, str(len(pairs)), str(len(open_pairs))))
    listing = Listing("Pairs of models whose printed intervals overlap", ("table", "quantity", "pairs", "overlapping"), tuple(rows))
    return Section(
        "What the printed uncertainties leave open", tuple(checks), (listing,), "what +- means (deviation or interval) is not said"
    )


def _close(tables: Tables, table: str, name: str, first: str, second: str) -> Check:
    mean, spread = column(tables[table], name), column(tables[table], name.replace("_mean_", "_pm_"))
    low, high = sorted((first, second), key=lambda model: mean[model].value)
    apart = mean[low].value + spread[low].value < mean[high].value - spread[high].value
    texts = [f"{model} {mean[model].value:g} +- {spread[model].value:g}" for model in (low, high)]
    what, unit = ("energy", "mJ") if "energy" in name else ("latency", "ms")
    check, claim = f"{table}.order.{first}.{second}", f"{low} has less {what} than {high}"
    if apart:
        return stated(check, f"Table {table[-1]}", claim, texts[0], texts[1], True, "printed +-")
    found = "; ".join(texts) + f" {unit}"
    return Check(
        check, f"Table {table[-1]}", claim, "by the means", found, "printed +-", "not recoverable", "the printed intervals overlap"
    )


def repeated(tables: Tables) -> Section:
    """Numbers printed in two tables: they must be the same digits, or round to one another."""
    checks = [check for same in SAME for check in _same_column(tables, *same)]
    one, two = keyed(tables["table1"]), keyed(tables["table2"])
    for model in one:
        for name, what in (("params_M", "params, M"), ("flops_G", "FLOPs, G")):
            coarse, fine = sorted((cell(one[model], name), cell(two[model], name)), key=lambda span: span.decimals)
            checks.append(compared(f"table1.table2.{name}.{model}", "Tables 1, 2", f"{model}: {what}", coarse, fine, "rounding"))
    checks += _defaults(tables["table4"], two["EdgeViT-XXS"])
    return Section("Numbers printed twice", tuple(checks))


def _same_column(tables: Tables, what: str, table: str, name: str, key: str, other: str, name2: str, key2: str) -> list[Check]:
    left, right = ({row[k]: row[n] for row in tables[t] if row[n]} for t, n, k in ((table, name, key), (other, name2, key2)))
    shared = [model for model in left if model in right]
    unequal = [model for model in shared if float(left[model]) != float(right[model])]
    place, slot = f"Tables {table[-1]}, {other[-1]}", f"{table}.{other}.{what}"
    claim = f"{what}: the same in both tables"
    if len(unequal) < len(shared):
        found = f"{len(shared) - len(unequal)} of {len(shared)} rows equal"
        checks = [stated(slot, place, claim, f"{len(shared)} rows", found, not unequal)] if not unequal else []
    else:
        checks = []
    return checks + [stated(f"{slot}.{m}", place, f"{m}: {what}", left[m], right[m], False, note="printed twice, unequal") for m in unequal]


def _defaults(rows: Sequence[Row], xxs: Row) -> list[Check]:
    checks = []
    for row in rows:
        if row["is_paper_default"] == "1":
            same = (row["cpu_latency_ms"], row["top1_percent"]) == (xxs["cpu_latency_mean_ms"], xxs["top1_percent"])
            here, there = (
                f"{row['cpu_latency_ms']} ms, {row['top1_percent']} %",
                f"{xxs['cpu_latency_mean_ms']} ms, {xxs['top1_percent']} %",
            )
            claim = f"{row['variant']} is EdgeViT-XXS"
            checks.append(stated(f"table4.default.{row['subtable']}", f"Tables 4{row['subtable']}, 2", claim, here, there, same))
    return checks


def ablation(tables: Tables) -> Section:
    """What Table 4 shows of its defaults against each alternative, and whether its latencies tell them apart."""
    noise = column(tables["table2"], "cpu_latency_pm_ms")["EdgeViT-XXS"].value
    rows = tables["table4"]
    default = {row["subtable"]: row for row in rows if row["is_paper_default"] == "1"}
    checks = []
    for row in (row for row in rows if row["is_paper_default"] != "1"):
        ours, place, name = default[row["subtable"]], f"Table 4{row['subtable']}", f"table4.{row['variant']}"
        gain = cell(ours, "top1_percent").value - cell(row, "top1_percent").value
        faster = cell(row, "cpu_latency_ms").value - cell(ours, "cpu_latency_ms").value
        pair = f"{ours['variant']} against {row['variant']}"
        found, true = f"{gain:+.1f} points, {abs(faster):.1f} ms {'faster' if faster > 0.0 else 'slower'}", gain > 0.0 or faster > 0.0
        checks.append(stated(f"{name}.tradeoff", place, f"{pair}: better in one", "better", found, true, "as printed", _one_run(gain)))
        claim = f"{pair}: faster"
        if abs(faster) <= 2.0 * noise:
            why = f"{faster:+.1f} ms is within twice the +-{noise:g} ms of EdgeViT-XXS (Table 2); Table 4 prints no +-"
            checks.append(lost(f"{name}.latency", place, claim, f"{faster:+.1f} ms", why))
        else:
            checks.append(stated(f"{name}.latency", place, claim, "faster", f"{faster:+.1f} ms", faster > 0.0, "printed +-"))
    return Section("Table 4: what the ablations show", tuple(checks), about="default minus alternative; one training run of each")


def _one_run(gain: float) -> str:
    return f"{abs(gain):.1f} points of one run each: no spread over seeds is published" if abs(gain) < 0.5 else ""
