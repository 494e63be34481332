"""EdgeViT (Pan et al., ECCV 2022, arXiv 2205.03436): its eight tables and its sentences, recomputed. Knows the order of the parts."""

from __future__ import annotations

from collections.abc import Callable

from edgejoule.bench import Event
from edgejoule.reproduce import energy, fronts, heads, prose, sizes, text_and_code
from edgejoule.reproduce.built import BuiltCounts, Counts
from edgejoule.reproduce.checks import Reproduction, reproduction
from edgejoule.reproduce.published import Tables, edgevit_tables

TITLE = "EdgeViTs: Competing Light-weight CNNs on Mobile Devices with Vision Transformers"
SOURCE = "arXiv 2205.03436, Tables 1 to 8 as printed"
NETWORKS = 44  # 18 classifiers, 2 at printed depths, 3 without classifier, 7 backbones under 3 heads


def reproduce(notify: Callable[[Event], None]) -> Reproduction:
    """With the tables that come with the package, and networks built here."""
    return recomputed(edgevit_tables(), BuiltCounts(notify, NETWORKS))


def recomputed(tables: Tables, counts: Counts) -> Reproduction:
    """Every section in the order of the paper's tables; ``tables`` and ``counts`` may be another's, to see which verdicts turn."""
    sections = (
        sizes.classifiers(tables, counts),
        sizes.depths(tables, counts),
        sizes.misprint(tables, counts),
        text_and_code.descriptions(counts),
        text_and_code.complexity(counts),
        heads.dense_sizes(tables, counts),
        prose.speed(tables),
        fronts.fronts(tables),
        energy.efficiency(tables),
        energy.closure(tables),
        prose.ablation(tables),
        energy.dense_efficiency(tables),
        energy.dense_power(tables),
        fronts.dense_fronts(tables),
        prose.repeated(tables),
        prose.sentences(tables),
        prose.uncertainties(tables),
    )
    return reproduction("edgevit", TITLE, SOURCE, sections)
