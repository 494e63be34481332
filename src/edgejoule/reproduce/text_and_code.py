"""What the EdgeViT paper says of its architecture and training against the released code, as it is built here, and its complexity formula.

The sentences' words stand here; what stands beside them is read off a built network. Knows no network.
"""

from __future__ import annotations

from edgejoule.errors import EdgejouleError
from edgejoule.reproduce.built import Counts, Spatial
from edgejoule.reproduce.checks import Check, Section, compared, exact, lost, stated
from edgejoule.reproduce.sizes import or_lost

MODEL = "EdgeViT-XXS"
KERNEL = "by the authors' counter 5 x 5 makes 0.557 G, which rounds to Table 1's 0.56, and an earlier file with 3 x 3 makes 0.553"
SAYINGS = (  # (name, place, claim, what the paper says, key of the anatomy, what that would be, note)
    ("norms", "Eq. 1", "Norm is LayerNorm everywhere", "LayerNorm", "norms", "LayerNorm", "BatchNorm in local aggregation and at the end"),
    ("kernel", "appendix", "side of local aggregation's kernel", "3", "kernel", "3", KERNEL),
    ("delegate", "text", "the delegate of a window", "center", "delegate", "center", "the first token of each window, by stride"),
    ("ffns", "Eq. 1", "FFNs of a block, stage by stage", "2, 2, 2, 2", "ffns", "2, 2, 2, 2", "stage 4 has no local aggregation"),
    (
        "propagation",
        "text",
        "norms inside local propagation",
        "not mentioned",
        "propagation_norms",
        "none",
        "and the projection comes after it",
    ),
)
DELETED = "in the repository's first commit, since deleted; that this file made Table 4's row is likely by name and size, and not stated"
ABLATIONS = (  # (name, place, claim, what the paper says, what the authors' file for it does)
    (
        "pooling",
        "Table 4b, appendix",
        "delegates by average or maximum",
        "plain pooling",
        "pooling to 7 x 7, 1 x 1 convolution, LayerNorm, GELU",
    ),
    ("upsampling", "Table 4c", "local propagation replaced by upsampling", "bilinear", "nearest"),
)
UNMENTIONED = "the code's defaults, unmentioned or only by reference to DeiT: what the published runs used cannot be told"
BATCH, RATE = 1024, 1e-3  # the text's; the README's command and its rule of scaling follow
README_BATCH, README_RATE = 8 * 256, 5e-4
SLUGS = ("local", "attention", "propagation", "positions", "total")  # the order of the formula's terms
TERM_TOLERANCE = "exact, in millions of MACs"


def descriptions(counts: Counts) -> Section:
    """Sentences on the architecture, and the training's batch and learning rate."""
    checks = [_saying(counts, *saying) for saying in SAYINGS]
    scaled = exact(README_RATE * BATCH / 512)
    rule = f"README: {README_RATE:g} x batch / 512"
    checks += [
        stated("text.batch", "text", "batch", str(BATCH), str(README_BATCH), BATCH == README_BATCH, note="the README's command: 8 x 256"),
        compared("text.learning_rate", "text", f"learning rate at batch {BATCH}", exact(RATE), scaled, "exact", rule),
        *(stated(f"text.{slug}", place, claim, said, found, False, note=DELETED) for slug, place, claim, said, found in ABLATIONS),
        lost("text.augmentation", "text", "CutMix, RandAugment, colour jitter, repeated augmentation, drop path, EMA", "–", UNMENTIONED),
        lost("text.torchscript", "text", "runs as TorchScript", "TorchScript", "the released module traces but does not script"),
    ]
    about = f"architecture: read off {MODEL} as it is built here from that code; the rest: what the repository's files say"
    return Section("The text against the released code", tuple(checks), about=about)


def _saying(counts: Counts, slug: str, place: str, claim: str, said: str, key: str, expected: str, note: str) -> Check:
    def make() -> Check:
        found = counts.anatomy(MODEL)[key]
        return stated(f"text.{slug}", place, claim, said, found, found == expected, note=note if found != expected else "")

    return or_lost(f"text.{slug}", place, claim, said, make)


def complexity(counts: Counts) -> Section:
    """The appendix's formula, term by term, beside the counted spatial operations of a whole network."""
    title = f"Appendix: the complexity formula beside counted spatial operations ({MODEL})"
    try:
        terms = counts.spatial(MODEL)
    except EdgejouleError as error:
        return Section(title, (lost("appendix.terms", "appendix", "complexity of spatial operations", "a formula", str(error)),))
    kept = [term for term in terms if term.counted is not None]
    checks = [_term(slug, term) for slug, term in zip(SLUGS, kept, strict=True)]
    checks += [_uncounted(term) for term in terms if term.counted is None]
    return Section(title, tuple(checks), about="summed over all blocks at 224 x 224, M multiply-adds")


def _term(slug: str, term: Spatial) -> Check:
    same = term.formula == term.counted
    formula = f"formula: {term.formula / 1e6:.3f} M" if term.formula else "not in the formula"
    counted = f"{(term.counted or 0) / 1e6:.3f} M"
    return stated(f"appendix.{slug}", "appendix", term.term, formula, counted, same, TERM_TOLERANCE, term.why)


def _uncounted(term: Spatial) -> Check:
    return Check("appendix.full", "appendix", term.term, f"formula: {term.formula / 1e6:.3f} M", "–", "–", "not recoverable", term.why)
