"""E3P-ViT (Amanzhol & Park, arXiv 2511.23166): what its few public numbers imply, and whether they fit together. Knows the order.

The paper's tables are not public to this project. Its abstract's SAM5 values are, and with a published accuracy each gives an energy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgejoule.bench import Event
from edgejoule.catalog import find_model
from edgejoule.errors import ModelError
from edgejoule.rank.metrics import sam
from edgejoule.reproduce import e3p_order
from edgejoule.reproduce.built import BuiltCounts, Counts
from edgejoule.reproduce.checks import Check, Listing, Reproduction, Section, Span, as_printed, compared, exact, lost, reproduction, stated
from edgejoule.reproduce.sizes import or_lost

TITLE = "Energy-Efficient Vision Transformer Inference for Edge-AI Deployment"
SOURCE = "arXiv 2511.23166: abstract, and sentences that others quote; its per-model tables are not public to us"
A = B = 5.0  # SAM5
TINY, LEVIT, EFFICIENT, BASELINE = "TinyViT-11M_Distilled", "LeViT_Conv_192", "EfficientViT-B1", "ViT_S"
RTX_IMAGENET, RTX_CIFAR, TX2_CIFAR = "0.76", "1.72", "1.44"  # SAM5, abstract
BASELINE_WH = ("0.000187", "0.000680")  # ViT_S, Wh per image, least and most over the paper's settings
MJ_PER_WH = 3.6e6
CIFAR_ACCURACIES = (0.97, 0.975, 0.98, 0.985, 0.99)  # where such networks end up when tuned on CIFAR-10 at 224 px
PAGE_FIGURES = {"params, M": ("10.9", "9.1"), "MACs, G": ("0.70", "0.52")}  # LeViT_Conv_192, EfficientViT-B1, as their pages round them


def reproduce(notify: Callable[[Event], None]) -> Reproduction:
    """With two networks built here for the 26 % example."""
    return recomputed(BuiltCounts(notify, 2))


def recomputed(counts: Counts) -> Reproduction:
    orders = e3p_order.sensitivities(anchors())
    sections = (energies(), conventions(), example(counts), e3p_order.screening(), e3p_order.netscores(), *orders)
    return reproduction("e3p", TITLE, SOURCE, sections)


def energy_of(score: Span, accuracy: float, a: float = A, b: float = B) -> Span:
    """J per 1000 images (mJ per image) with which SAM gives ``score`` at an accuracy in (0, 1]: 10^(b accuracy^a / score)."""
    gain = b * accuracy**a
    return Span(10 ** (gain / score.value), 10 ** (gain / score.high), 10 ** (gain / score.low))


def accuracy_of(score: Span, energy: Span, a: float = A, b: float = B) -> Span:
    """The accuracy with which SAM gives ``score`` at an energy in mJ per image: (score log10(energy) / b)^(1/a)."""
    ends = [(s * math.log10(e) / b) ** (1.0 / a) for s, e in ((score.low, energy.low), (score.high, energy.high))]
    return Span((score.value * math.log10(energy.value) / b) ** (1.0 / a), *ends)


def top1_of(name: str) -> float:
    """Published top-1 of a catalog model as a fraction. Raises ModelError where none is published."""
    published = find_model(name).published
    if published is None or published.top1_pct is None:
        raise ModelError(f"the catalog publishes no top-1 for {name}: give its row one")
    return published.top1_pct / 100.0


def baseline_energies() -> tuple[Span, Span]:
    """ViT_S, least and most, in J per 1000 images, from the printed Wh per image."""
    least, most = (as_printed(text).times(MJ_PER_WH) for text in BASELINE_WH)
    return least, most


def anchors() -> tuple[e3p_order.Anchor, ...]:
    """What is known of RTX 3050 and ImageNet-1K: the energy that a SAM5 implies, and ViT_S's least, taken to be that board's."""
    implied = energy_of(as_printed(RTX_IMAGENET), top1_of(TINY)).value
    return (TINY, 100.0 * top1_of(TINY), implied), (BASELINE, 100.0 * top1_of(BASELINE), baseline_energies()[0].value)


def energies() -> Section:
    """Energies behind the abstract's SAM5 values, and the 53 % of the abstract."""
    imagenet, cifar, tx2 = (as_printed(text) for text in (RTX_IMAGENET, RTX_CIFAR, TX2_CIFAR))
    least, most = baseline_energies()
    rtx = energy_of(imagenet, top1_of(TINY))
    shared = accuracy_of(cifar, rtx)
    saved = most * (exact(1.0) - Span(0.53, 0.525, 0.535))
    levit = accuracy_of(tx2, saved)
    tolerance, guess = "SAM as rounded", f"if the abstract's baseline is {BASELINE} at its most: no public sentence says so"
    checks = (
        Check(
            "e3p.energy.rtx_imagenet",
            "abstract",
            f"{TINY} on RTX 3050, ImageNet-1K: energy below the least of {BASELINE}, J per 1000 images",
            f"SAM5 {RTX_IMAGENET}; {BASELINE} {BASELINE_WH[0]} Wh = {least.value:.0f}",
            f"{rtx.value:.0f} [{rtx.low:.0f}, {rtx.high:.0f}]",
            tolerance,
            "agrees" if rtx.high < least.low else "disagrees",
            f"with its published top-1, {top1_of(TINY):.2%}; whether {BASELINE}'s least is of this board is not said",
            rtx.low,
            rtx.high,
        ),
        _accuracy("e3p.energy.rtx_cifar", f"one energy explains both SAM5 of {TINY} on RTX 3050", f"SAM5 {RTX_CIFAR}", shared),
        _accuracy(
            "e3p.energy.tx2_cifar", f"{LEVIT} on TX2: 53 % less than {BASELINE}'s most, and SAM5", f"SAM5 {TX2_CIFAR}, 53 %", levit, guess
        ),
        lost(
            "e3p.tables", "Tables", "time, power, energy and SAM of each model", "13 models x 2 devices x 2 data sets", "not public to us"
        ),
    )
    return Section("Energies that the abstract's SAM5 values imply", checks, (_by_accuracy(cifar, tx2), _baseline(least, most, saved)))


def _accuracy(name: str, claim: str, printed: str, found: Span, note: str = "") -> Check:
    """The accuracy that would explain what is printed, which agrees where such networks end up."""
    text = f"accuracy {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
    fits = found.meets(Span(0.98, CIFAR_ACCURACIES[0], CIFAR_ACCURACIES[-1]))
    return Check(
        name, "abstract", claim, printed, text, "97 to 99 % on CIFAR-10", "agrees" if fits else "disagrees", note, found.low, found.high
    )


def _by_accuracy(cifar: Span, tx2: Span) -> Listing:
    rows = tuple((f"{acc:.1%}", *(_joules(energy_of(score, acc)) for score in (cifar, tx2))) for acc in CIFAR_ACCURACIES)
    columns = ("CIFAR-10 accuracy", f"{TINY}, RTX 3050, SAM5 {RTX_CIFAR}", f"{LEVIT}, TX2, SAM5 {TX2_CIFAR}")
    return Listing("Energy by the accuracy that is assumed, J per 1000 images", columns, rows)


def _joules(span: Span) -> str:
    return f"{span.value:.0f} [{span.low:.0f}, {span.high:.0f}]"


def _baseline(least: Span, most: Span, saved: Span) -> Listing:
    cases = (("ImageNet-1K", top1_of(BASELINE)), ("CIFAR-10, if 98 %", 0.98))
    scores = [(what, f"{acc:.3f}", *(f"{sam(acc, energy.value):.2f}" for energy in (least, most))) for what, acc in cases]
    columns = (f"{BASELINE} on", "accuracy", f"SAM5 at {least.value:.0f} J", f"SAM5 at {most.value:.0f} J")
    note = f"{BASELINE_WH[0]} to {BASELINE_WH[1]} Wh per image; 53 % less than the most is {_joules(saved)} J per 1000 images"
    return Listing(f"What {BASELINE}'s printed energies imply", columns, tuple(scores), (note,))


@dataclass(frozen=True, slots=True)
class Convention:
    """How SAM's symbols may be read: what one unit of energy is in mJ per image, the logarithm's base, and what 100 % accuracy is."""

    name: str
    unit_mj: float
    base: float = 10.0
    whole: float = 1.0


CONVENTIONS = (
    Convention("J per 1000 images = mJ per image", 1.0),
    Convention("J per image", 1e3),
    Convention("Wh per 1000 images", MJ_PER_WH / 1e3),
    Convention("Wh per image = kWh per 1000 images", MJ_PER_WH),
    Convention("kWh per image", MJ_PER_WH * 1e3),
    Convention("mJ per image, natural logarithm", 1.0, math.e),
    Convention("mJ per image, accuracy in percent", 1.0, 10.0, 100.0),
)


def conventions() -> Section:
    """Which reading of "accuracy" and "energy" gives a positive SAM for ViT_S and an energy that such a board can use."""
    least, most = baseline_energies()
    rows, kept = [], []
    for one in CONVENTIONS:
        exponent = B * (top1_of(TINY) * one.whole) ** A / float(RTX_IMAGENET)
        signs = [math.log(energy.value / one.unit_mj) > 0.0 for energy in (least, most)]
        power = exponent * math.log10(one.base) + math.log10(one.unit_mj)  # log10 of the implied mJ per image
        near = math.log10(least.value / 10.0) <= power <= math.log10(most.value * 10.0)
        implied = f"{10**power:.4g}" if power < 12 else f"10^{power:.3g}"
        reason = "fits" if all(signs) and near else "SAM is negative there" if not all(signs) else "no such board uses that"
        kept += [one.name] if reason == "fits" else []
        rows.append((one.name, "positive" if all(signs) else "negative", implied, reason))
    columns = ("reading", f"SAM of {BASELINE}", f"energy that {RTX_IMAGENET} implies, mJ per image", "verdict")
    note = f"fits: SAM of {BASELINE} is positive, and the implied energy is within a factor of ten of {BASELINE}'s printed range"
    listing = Listing("Readings of SAM", columns, tuple(rows), (note,))
    claim, first = "one reading of SAM fits the printed values: log10, accuracy as a fraction", CONVENTIONS[0].name
    return Section("Units and conventions", (stated("e3p.convention", "SAM", claim, first, "; ".join(kept), kept == [first]),), (listing,))


def example(counts: Counts) -> Section:
    """EfficientViT-B1 against LeViT_Conv_192: 26 % fewer MACs and 16.5 % fewer params, yet 9.8 % slower on TX2."""
    checks = []
    for (what, (many, few)), printed in zip(PAGE_FIGURES.items(), ("16.5", "26"), strict=True):
        word = what.partition(",")[0]
        claim = f"{EFFICIENT} has fewer {word} than {LEVIT}, %"
        found = (exact(1.0) - exact(float(few)) / exact(float(many))).times(100.0)
        checks.append(
            compared(f"e3p.example.{word}.published", "Figure 1", claim, as_printed(printed), found, "published figures", f"{few} / {many}")
        )

        def make(word: str = word, claim: str = claim, printed: str = printed) -> Check:
            ours, theirs = counts.cost(EFFICIENT), counts.cost(LEVIT)
            share = ours.params / theirs.params if word == "params" else ours.macs / theirs.macs
            note = "so the paper uses published figures, not profiled ones"
            found = exact((1.0 - share) * 100.0)
            return compared(
                f"e3p.example.{word}.counted", "Figure 1", f"{claim}, counted", as_printed(printed), found, "counted exactly", note
            )

        checks.append(or_lost(f"e3p.example.{word}.counted", "Figure 1", claim, printed, make))
    checks.append(lost("e3p.example.slower", "Figure 1", f"{EFFICIENT} is slower on TX2, %", "9.8", "needs both latencies on a Jetson TX2"))
    checks.append(
        lost("e3p.example.energy", "Figure 1", f"{EFFICIENT} uses more energy on TX2", "more", "needs both energies on a Jetson TX2")
    )
    return Section(f"{EFFICIENT} against {LEVIT}", tuple(checks))
