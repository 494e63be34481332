"""The truth gate: what is condemned, what is merely noted, and that few images never condemn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule.caveats import TABLE, UNRANKED, caveat
from edgejoule.compile import LEAVES
from edgejoule.compile.handover import readme
from edgejoule.compile.truth import gate, verify_parity
from edgejoule.records import Placement, SessionInfo
from edgejoule.seams import Handover
from tests.networks import variant
from tests.samples import artifact

RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.normal(size=(64, 10))


def info(precision: str = "int8", placement: Placement | None = None) -> SessionInfo:
    return SessionInfo(precision, ("CPUExecutionProvider",), "onnxruntime 1", 1, placement=placement)


def codes(
    compiled: Any = REFERENCE, asked: str = "int8", runs: SessionInfo | None = None, weights: str = "file", device: str = "cpu"
) -> set[str]:
    parity = verify_parity(REFERENCE[: len(compiled)], compiled)
    return {doubt.code for doubt in gate(variant(weights=weights), asked, device, runs or info(asked), parity)}


def flipped(share: float, n: int = 64) -> Any:
    """The reference with another first answer on a share of its n images, by a small step."""
    other = REFERENCE[:n].copy()
    for row in other[: round(share * n)]:
        first, second = np.argsort(row)[::-1][:2]
        row[first], row[second] = (row[first] + row[second]) / 2 - 1e-6, (row[first] + row[second]) / 2 + 1e-6
    return other


def test_what_keeps_its_word_has_no_doubt() -> None:
    sound = Placement(nodes=50, delegated=50, precisions={"int8": 48, "fp32": 2})
    assert codes(runs=info(placement=sound)) == set()
    assert codes(runs=info(placement=sound), weights="random") == {"weights_random"}
    assert codes(REFERENCE * 1.001, "fp32") == set()


def test_a_file_whose_runtime_corrupts_it_is_condemned() -> None:
    noise = RANDOM.normal(size=REFERENCE.shape)
    assert "parity_low" in codes(REFERENCE + 0.56 * noise)
    assert codes(REFERENCE + 0.02 * noise) == set()
    assert "parity_low" in codes(REFERENCE + 0.02 * noise, "fp32"), "rounding of int8 is no rounding of fp32"


def test_one_strange_image_does_not_condemn_bfloat16_and_many_do() -> None:
    noise = RANDOM.normal(size=REFERENCE.shape)
    one = REFERENCE + 0.01 * noise
    one[0] = REFERENCE[0] * 0.85
    assert "parity_low" not in codes(one, "bf16") and "parity_low" in codes(one, "fp16")
    assert "parity_low" in codes(REFERENCE * 0.9, "bf16"), "every image is off by a tenth"


def test_answers_that_differ_condemn_only_by_enough_images() -> None:
    assert "answers_differ" in codes(flipped(0.25))
    assert "answers_differ" not in codes(flipped(0.03))
    assert "answers_differ" not in codes(flipped(0.25, n=4)), "one of four images proves nothing"
    assert "answers_differ" not in codes(flipped(0.25), weights="random"), "random classes are near ties"
    assert "answers_differ" in codes(flipped(0.25), "fp32", weights="random")


def test_vanishing_outputs_prove_nothing() -> None:
    parity = verify_parity(REFERENCE * 1e-9, REFERENCE * 1e-9)
    assert {doubt.code for doubt in gate(variant(weights="file"), "fp32", "cpu", info("fp32"), parity)} == {"parity_blind"}


@pytest.mark.parametrize(
    ("placement", "device", "found"),
    [
        (Placement(50, 50, {}, {"int8": 2, "fp32": 48}), "cpu", {"precision_differs"}),
        (Placement(50, 50, {}, {"fp32": 50}), "cpu", {"precision_differs"}),
        (Placement(50, 40, {"LayerNorm": 10}, {"int8": 50}), "cpu", {"partly_delegated"}),
        (Placement(50, 40, {"LayerNorm": 10}, {"int8": 50}), "cuda", {"fell_back"}),
        (Placement(50, 49, {"Shape": 1}, {"int8": 50}), "cuda", {"partly_delegated"}),
    ],
)
def test_what_the_runtime_says_of_itself_counts(placement: Placement, device: str, found: set[str]) -> None:
    assert codes(runs=info(placement=placement), device=device) == found


def test_another_precision_than_asked_for_is_condemned() -> None:
    assert codes(runs=info("fp32")) == {"precision_differs"}


def test_placement_in_words() -> None:
    found = Placement(65, 62, {"Softmax": 1, "LayerNorm": 2}, {"int8": 48, "fp32": 2})
    assert found.words == "62 of 65 operators (the others: 2 LayerNorm, 1 Softmax); products with weights: 48 int8, 2 fp32"
    assert dataclasses.replace(found, fallbacks={}, precisions={}).words == "62 of 65 operators"


def test_whatever_is_not_ranked_is_a_rejection() -> None:
    assert all(TABLE[code][0] == "reject" for code in UNRANKED)


def test_the_readme_of_a_file_that_fails_says_so() -> None:
    sound, how = artifact("deit_tiny"), Handover("pip install it", "def run(images): ...")
    liar = dataclasses.replace(sound, caveats=(caveat("weights_random", "seed 0"), caveat("parity_low", "relative error 5.6e-01")))
    assert "Not to be ranked" not in readme(sound, how)
    said = readme(liar, how)
    assert "Not to be ranked" in said and "parity low: relative error 5.6e-01" in said and "seed 0" not in said


def test_a_budget_that_was_missed_is_said(tmp_path: Path) -> None:
    from edgejoule.compile.build import build
    from edgejoule.compile.export import TorchExport
    from edgejoule.compile.quantize.options import OVER_BUDGET
    from tests.networks import Matmul, linear, loaded_here

    crops = tmp_path / "crops.npy"
    np.save(crops, RANDOM.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    real = Matmul.compile

    def compile_(self: Any, export: Any, context: Any) -> Path:
        context.note(OVER_BUDGET, "2 points of top-1 are lost on 64 held-out images")
        return real(self, export, context)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(LEAVES, "matmul", "tests.networks:Matmul")
        patched.setattr(Matmul, "compile", compile_)
        export = TorchExport(linear(), (2, 3, 8, 8), tmp_path / "export")
        made = build(variant(weights="file"), "matmul", export, crops=crops, batch=2, cache=tmp_path, threads=1, outputs=loaded_here())
    (doubt,) = made.caveats
    assert doubt.code == "budget_missed" and "2 points" in doubt.seen and doubt.severity == "warn"
