"""Params and FLOPs of EdgeViT's Tables 5 and 6 (detectors, segmenters) against networks built here. Pure but for the counts asked for."""

from __future__ import annotations

from edgejoule.reproduce.built import Counts
from edgejoule.reproduce.checks import Check, Section, Span, compared, exact
from edgejoule.reproduce.published import Tables, cell, keyed
from edgejoule.reproduce.sizes import COUNTED, HEADS, G, M, or_lost

TOOLBOX = 0.005  # heads of another toolbox: norms and background classes may differ by so much
TOOLBOX_MACS = 0.03
PYRAMID_CHANNELS = 256
# Channels of the first and the last map, all that RetinaNet's and Mask R-CNN's own parts see differently (Tables 1 and 5 of the papers).
CHANNELS = {
    "PVTv2-B0": (32, 256),
    "EdgeViT-XXS": (36, 288),
    "EdgeViT-XS": (48, 384),
    "ResNet18": (64, 512),
    "PVTv1-Tiny": (64, 512),
    "PVTv2-B1": (64, 512),
    "EdgeViT-S": (48, 384),
}


def dense_sizes(tables: Tables, counts: Counts) -> Section:
    """Every params cell of Tables 5 and 6, and Table 6's FLOPs at 512 x 512."""
    checks = [_params(table, column, head, label, tables, counts) for table, column, head in HEADS for label in _labels(tables, table)]
    checks += [_macs(label, tables, counts) for label in _labels(tables, "table6")]
    checks += [_two_heads(label, tables) for label in _labels(tables, "table5")]
    about = "backbone without classifier and final norm; torchvision's heads, 80 classes (150 in segmentation)"
    return Section("Tables 5 and 6: params and FLOPs against built networks", tuple(checks), about=about)


def _labels(tables: Tables, table: str) -> list[str]:
    return [row["backbone"] for row in tables[table]]


def _params(table: str, column: str, head: str, label: str, tables: Tables, counts: Counts) -> Check:
    row, place = keyed(tables[table], "backbone")[label], f"Table {table[-1]}"
    printed, name, claim = cell(row, column), f"{table}.{head}.params.{label}", f"params of {head} on {label}, M"

    def make() -> Check:
        found = exact(counts.dense_params(head, label) / M).widened(TOOLBOX)
        off = "" if printed.meets(found) else f"off by {(printed.value / found.value - 1.0) * 100.0:+.1f} %"
        return compared(name, place, claim, printed, found, f"{COUNTED}, {TOOLBOX:.1%} for another toolbox's heads", off)

    return or_lost(name, place, claim, row[column], make)


def _macs(label: str, tables: Tables, counts: Counts) -> Check:
    row = keyed(tables["table6"], "backbone")[label]
    printed, name, claim = cell(row, "flops_G_at_512"), f"table6.flops.{label}", f"FLOPs of Semantic FPN on {label} at 512 x 512, G"

    def make() -> Check:
        found = exact(counts.segmenter_macs(label) / G).widened(TOOLBOX_MACS)
        return compared(name, "Table 6", claim, printed, found, f"counted, {TOOLBOX_MACS:.0%} for another toolbox's heads and counter")

    return or_lost(name, "Table 6", claim, row["flops_G_at_512"], make)


def _two_heads(label: str, tables: Tables) -> Check:
    """RetinaNet from Mask R-CNN's params of the same row: what the two heads cost apart from the channels is one number for all rows.

    Mask R-CNN has one more lateral convolution (C_1 x 256), RetinaNet one more from the last map (3 x 3 x C_4 x 256); the rest does not
    depend on the backbone and is taken from the other rows, whose intervals must meet.
    """
    rows = keyed(tables["table5"], "backbone")

    def rest(other: str) -> Span:
        first, last = CHANNELS[other]
        own = exact((9 * last - first) * PYRAMID_CHANNELS / M)
        return cell(rows[other], "maskrcnn_params_M") - cell(rows[other], "retinanet_params_M") + own

    others = [rest(other) for other in rows if other != label]
    middle = sorted(span.value for span in others)[len(others) // 2]  # the median: one wrong row must not move it
    first, last = CHANNELS[label]
    known = Span(middle, middle - 0.1, middle + 0.1)  # two numbers rounded to 0.1 differ by up to 0.1 from their true difference
    found = cell(rows[label], "maskrcnn_params_M") - known + exact((9 * last - first) * PYRAMID_CHANNELS / M)
    claim = f"RetinaNet's params on {label} from Mask R-CNN's and the other rows, M"
    printed = cell(rows[label], "retinanet_params_M")
    return compared(
        f"table5.two_heads.{label}", "Table 5", claim, printed, found, note="printed columns only: no network is built for this"
    )
