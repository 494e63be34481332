"""Parameters, multiply-adds, depths and heads of EdgeViT's Tables 1 and 2 against networks built here.

Knows no network: counts are asked for, and a test may give its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgejoule.errors import EdgejouleError
from edgejoule.reproduce.built import Counts
from edgejoule.reproduce.checks import Check, Listing, Section, Span, compared, exact, lost, stated
from edgejoule.reproduce.published import Row, Tables, cell, keyed

M, G = 1e6, 1e9
NORMS = 0.025  # a counter that adds norms and activations finds up to this much more: FLOPs counters differ
UNUSED = 0.025  # rows that the authors shrank themselves: their code builds parts that it never uses
COUNTED = "counted exactly"
MORE = "counted, up to 2.5 % more where norms count"
LIGHT = ("EdgeViT-XXS", "EdgeViT-XS", "EdgeViT-S")
WHY = {
    "EdgeViT-S": "a misprint of 13.1: three columns of Tables 5 and 6 say so",
    "Twins-SVT-Tiny": "the authors' code also carries a reduction and its norm that it never uses; built here without them",
}
HEADS = (  # table, column, head of ours
    ("table5", "retinanet_params_M", "retinanet"),
    ("table5", "maskrcnn_params_M", "mask_rcnn"),
    ("table6", "semfpn_params_M", "semantic_fpn"),
)
AS_PRINTED = {"EdgeViT-XS": "edgevit_xs_paper", "EdgeViT-S": "edgevit_s_paper"}  # networks with Table 1's depths


def macs_span(macs: int) -> Span:
    """Counted multiply-adds in G, and what a counter that adds norms may find."""
    return Span(macs / G, macs / G, macs / G * (1.0 + NORMS))


def or_lost(name: str, place: str, claim: str, printed: str, make: Callable[[], Check]) -> Check:
    """The check, or, where a network cannot be built or counted here, the reason."""
    try:
        return make()
    except EdgejouleError as error:
        return lost(name, place, claim, printed, str(error))


def classifiers(tables: Tables, counts: Counts) -> Section:
    """Params and MACs of every row of Table 2, and of Table 1."""
    checks = []
    for table in ("table1", "table2"):
        for row in tables[table]:
            checks += [_params(table, row, counts), _macs(table, row, counts)]
    about = "one FLOP of the paper is one multiply-add; networks are built here from their published configurations"
    return Section("Tables 1 and 2: params and FLOPs against built networks", tuple(checks), about=about)


def _params(table: str, row: Row, counts: Counts) -> Check:
    model, place, printed = row["model"], f"Table {table[-1]}", cell(row, "params_M")
    name, claim = f"{table}.params.{model}", f"params of {model}, M"

    def make() -> Check:
        found, tolerance = exact(counts.cost(model).params / M), COUNTED
        if row.get("paper_mark") == "downscaled":
            found, tolerance = replace(found, high=found.value * (1.0 + UNUSED)), "counted, up to 2.5 % more in unused parts"
        return compared(name, place, claim, printed, found, tolerance, _params_note(model, printed, found, counts))

    return or_lost(name, place, claim, row["params_M"], make)


def _params_note(model: str, printed: Span, found: Span, counts: Counts) -> str:
    """Why a printed count is another: known reasons, digits cut off, or a classifier left out, which is tried here."""
    if printed.holds(found.value):
        return ""
    if model in WHY:
        return WHY[model]
    if int(found.value * 10**printed.decimals) / 10**printed.decimals == printed.value:
        return "cut off, not rounded"
    headless = counts.headless_params(model) / M
    if printed.holds(headless):
        return f"fits without the classifier ({headless:.3f} M), which the other rows count"
    return _off(printed, found)


def _off(printed: Span, found: Span) -> str:
    return f"off by {(printed.value / found.value - 1.0) * 100.0:+.1f} %"


def _macs(table: str, row: Row, counts: Counts) -> Check:
    model, place, printed = row["model"], f"Table {table[-1]}", cell(row, "flops_G")
    name, claim = f"{table}.flops.{model}", f"FLOPs of {model}, G"

    def make() -> Check:
        found = macs_span(counts.cost(model).macs)
        return compared(name, place, claim, printed, found, MORE, "" if printed.meets(found) else _off(printed, found))

    return or_lost(name, place, claim, row["flops_G"], make)


def depths(tables: Tables, counts: Counts) -> Section:
    """Table 1's blocks and heads against the released networks, and what networks of the printed depths would count."""
    checks = []
    for row in tables["table1"]:
        model = row["model"]
        checks += [_stages(row, counts, i, what) for i, what in enumerate(("blocks", "heads"))] + [_head_dim(row)]
        if model in AS_PRINTED:
            checks += _at_printed_depths(row, counts)
    return Section("Table 1: depths and heads", tuple(checks), about="released: the depths and heads of the authors' code, as built here")


def _per_stage(row: Row, what: str) -> tuple[int, ...]:
    return tuple(int(row[f"{what}_stage{stage}"]) for stage in (1, 2, 3, 4))


def _stages(row: Row, counts: Counts, which: int, what: str) -> Check:
    printed = _per_stage(row, what)
    name, claim = f"table1.{what}.{row['model']}", f"{what} of {row['model']} in its four stages"
    text, note = ", ".join(map(str, printed)), "the released code has the latter"

    def make() -> Check:
        found = counts.stages(row["model"])[which]
        return stated(name, "Table 1", claim, text, ", ".join(map(str, found)), found == printed, note=note if found != printed else "")

    return or_lost(name, "Table 1", claim, text, make)


def _head_dim(row: Row) -> Check:
    """Channels over heads, from the printed columns alone: one number in all stages, or a head count is wrong."""
    dims = [channels / heads for channels, heads in zip(_per_stage(row, "channels"), _per_stage(row, "heads"), strict=True)]
    found = ", ".join(f"{dim:g}" for dim in dims)
    claim = f"channels of one head of {row['model']}: one number in all stages"
    return stated(f"table1.head_dim.{row['model']}", "Table 1", claim, "one number", found, len(set(dims)) == 1)


def _at_printed_depths(row: Row, counts: Counts) -> list[Check]:
    model, checks = row["model"], []
    built = AS_PRINTED[model]
    for key, what, unit in (("params_M", "params", "M"), ("flops_G", "FLOPs", "G")):
        name, claim = f"table1.printed_depths.{what}.{model}", f"{what} of {model} at the depths of its own row, {unit}"

        def make(name: str = name, claim: str = claim, key: str = key) -> Check:
            cost = counts.cost(built)
            found = exact(cost.params / M) if key == "params_M" else macs_span(cost.macs)
            note = "the row's depths and its counts are of two networks"
            check = compared(name, "Table 1", claim, cell(row, key), found, COUNTED if key == "params_M" else MORE)
            return check if check.verdict != "disagrees" else compared(name, "Table 1", claim, cell(row, key), found, check.tolerance, note)

        checks.append(or_lost(name, "Table 1", claim, row[key], make))
    return checks


def misprint(tables: Tables, counts: Counts) -> Section:
    """EdgeViT-S minus EdgeViT-XS under three heads, which cost both the same, against the difference that Table 1 prints."""
    one = keyed(tables["table1"])
    printed = cell(one["EdgeViT-S"], "params_M") - cell(one["EdgeViT-XS"], "params_M")
    checks = []
    for table, column, _ in HEADS:
        rows = keyed(tables[table], "backbone")
        found = cell(rows["EdgeViT-S"], column) - cell(rows["EdgeViT-XS"], column)
        head = column.partition("_")[0]
        claim = f"S minus XS, params, M: Table 1 against the {head} column"
        note = "both backbones have the same channels, so the heads cancel: Table 1's 11.1 M should be 13.1 M"
        checks.append(compared(f"table1.s_minus_xs.{head}", f"Tables 1, {table[-1]}", claim, printed, found, note=note))

        def make(table: str = table, column: str = column, head: str = head, found: Span = found) -> Check:
            ours = counts.cost("EdgeViT-S").params / M - counts.cost("EdgeViT-XS").params / M
            claim = f"S minus XS, params, M: the {head} column against built networks"
            return compared(f"{table}.s_minus_xs.{head}.built", f"Table {table[-1]}", claim, found, exact(ours), COUNTED)

        checks.append(or_lost(f"{table}.s_minus_xs.{head}.built", f"Table {table[-1]}", "S minus XS, built", found.text(), make))
    return Section("Table 1's 11.1 M for EdgeViT-S", tuple(checks), _if_as_printed(tables, counts))


def _if_as_printed(tables: Tables, counts: Counts) -> tuple[Listing, ...]:
    """What Tables 5 and 6 would print for S if it had Table 1's params; nothing where no head can be built here."""
    missing = cell(keyed(tables["table1"])["EdgeViT-S"], "params_M").value
    rows = []
    for table, column, head in HEADS:
        printed = keyed(tables[table], "backbone")["EdgeViT-S"][column]
        try:
            built, backbone = counts.dense_params(head, "EdgeViT-S") / M, counts.cost("EdgeViT-S").params / M
        except EdgejouleError:
            return ()
        rows.append((head, printed, f"{built:.2f}", f"{built - backbone + missing:.2f}"))
    columns = ("head", "printed, M", "built, M", f"if S had {missing:g} M")
    return (Listing("EdgeViT-S under three heads", columns, tuple(rows)),)
