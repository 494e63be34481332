"""Scores against other people's code, and artifacts evaluated by real workers in a real runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgejoule import evaluating, manifest
from edgejoule.bench import Bench, Event
from edgejoule.data import crop
from edgejoule.datasets import classification
from edgejoule.datasets.classification import BROKEN, calibration_error, joined, judge, paired_difference, scores, scores_of, wilson
from edgejoule.errors import BackendError, BadImageError, DataError, EdgejouleError, ModelError, SpecError
from edgejoule.evaluating import evaluate_artifact, float_network, reference_of, spec_for
from edgejoule.plain import decode
from edgejoule.records import Artifact, Evaluation, ModelSpec, Preprocessing, Published, Variant
from edgejoule.report.evaluation import evaluation, evaluation_section
from edgejoule.store import NAME, Store
from edgejoule.verbs.evaluating import evaluate
from tests import networks
from tests.fakes.artifacts import PREPROCESSING, onnx_artifact

RANDOM = np.random.default_rng(3)
NAMES = tuple("abcdefgh")


# ---------------------------------------------------------------- scores


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(hits_of: tuple[int, int]) -> None:
    from scipy.stats import binomtest

    hits, n = hits_of
    found, expected = wilson(hits, n), binomtest(hits, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12) and found.value == hits / n
    assert found.low is not None and found.high is not None and 0.0 <= found.low <= found.value <= found.high <= 1.0


def test_wilsons_interval_of_a_printed_example_and_outside_its_domain() -> None:
    found = wilson(81, 263)  # Newcombe 1998, Statistics in Medicine 17:857, table I: 0.2553, 0.3662
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    for hits, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(DataError):
            wilson(hits, n)


def test_scores_are_scikit_learns() -> None:
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score

    labels = RANDOM.integers(0, 8, 200)
    logits = RANDOM.normal(size=(200, 8)) + 2.0 * np.eye(8)[labels]
    found, p = scores(logits, labels, NAMES), softmax(logits, axis=1)
    assert found.n == 200 and found.top1.value == accuracy_score(labels, logits.argmax(axis=1))
    assert found.top5 and found.top5.value == top_k_accuracy_score(labels, logits, k=5)
    assert found.loss == pytest.approx(log_loss(labels, p, labels=range(8)))
    recalls = recall_score(labels, logits.argmax(axis=1), average=None)
    assert [found.per_class[name].value for name in NAMES] == pytest.approx(list(recalls))
    assert sum(one.n for one in found.per_class.values()) == 200


def test_the_calibration_error_is_guos() -> None:
    confidence = np.concatenate([RANDOM.uniform(0.1, 1.0, 500), np.arange(16) / 15])
    right = RANDOM.random(516) < confidence**2
    error = 0.0
    for m in range(1, 16):  # equation 3, one bin after the other; 0 goes into the first
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15) | ((m == 1) & (confidence == 0))
        error += inside.sum() / 516 * abs(right[inside].mean() - confidence[inside].mean()) if inside.any() else 0.0
    assert calibration_error(confidence, right) == pytest.approx(error)
    sure = np.ones(4)
    assert calibration_error(sure, np.array([True] * 4)) == 0.0 and calibration_error(sure, np.array([False] * 4)) == 1.0


def test_huge_logits_overflow_nothing() -> None:
    found = scores([[1e300, -1e300], [3e4, 1e4]], [0, 0], ("x", "y"))
    assert found.loss == 0.0 and found.top1.value == 1.0 and found.top5 is None and found.calibration_error == 0.0


def test_of_equal_logits_the_lower_class_comes_first_whatever_the_label() -> None:
    found = scores(np.zeros((8, 8)), np.arange(8), NAMES)
    assert found.top1.value == 1 / 8 and found.top5 and found.top5.value == 5 / 8
    assert found.per_class["a"].value == 1.0 and found.per_class["b"].value == 0.0
    among = judge(np.zeros((8, 8)), np.arange(8)).among
    assert list(among) == [True] * 5 + [False] * 3


def test_rows_that_are_no_numbers_are_wrong_and_nothing_else() -> None:
    logits = np.eye(6)[[0, 1, 2, 3]] * 4.0
    logits[0, 5], logits[1, 0] = np.nan, np.inf
    judged = judge(logits, [0, 1, 2, 3])
    found = scores_of(judged, NAMES[:6])
    assert judged.broken == 2 and list(judged.answers) == [BROKEN, BROKEN, 2, 3]
    assert found.top1.value == 0.5 and found.top5 and found.top5.value == 0.5 and found.n == 4
    clean = scores(logits[2:], [2, 3], NAMES[:6])
    assert found.loss == clean.loss and found.calibration_error == clean.calibration_error
    with pytest.raises(DataError, match="none of the 2 rows"):
        scores(np.full((2, 3), np.nan), [0, 1], NAMES[:3])


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(np.zeros((2, 3)), [0]), (np.zeros(3), [0]), (np.zeros((0, 3)), []), (np.zeros((1, 3)), [3]), (np.zeros((1, 3)), [-1])],
)
def test_what_does_not_fit_is_a_data_error(logits: Any, labels: Any) -> None:
    with pytest.raises(DataError):
        scores(logits, np.asarray(labels, dtype=np.int64), NAMES[:3])


def test_classes_of_one_name_are_told_apart() -> None:
    assert set(scores(np.eye(3), [0, 1, 2], ("crane", "heron", "crane")).per_class) == {"crane (0)", "heron", "crane (2)"}
    with pytest.raises(DataError, match="2 classes and 3 logits"):
        scores(np.eye(3), [0, 1, 2], ("crane", "heron"))


def test_parts_scored_together_are_the_whole() -> None:
    logits, labels = RANDOM.normal(size=(30, 7)), RANDOM.integers(0, 7, 30)
    parts = joined([judge(logits[:11], labels[:11]), judge(logits[11:], labels[11:])])
    assert scores_of(parts, NAMES[:7]) == scores(logits, labels, NAMES[:7])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_paired_difference_turns_round_and_holds_its_value(pairs: list[tuple[bool, bool]]) -> None:
    first, second = np.array(pairs).T
    found, turned = paired_difference(first, second), paired_difference(second, first)
    assert found.value == pytest.approx(first.mean() - second.mean()) == pytest.approx(-turned.value)
    assert found.low is not None and found.high is not None and -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert (found.low, found.high) == pytest.approx((-(turned.high or 0), -(turned.low or 0)))


def test_a_paired_difference_covers_the_true_one() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        cells = random.choice(4, size=150, p=[0.85, 0.06, 0.02, 0.07])  # both, only first, only second, neither: 0.04 apart
        found = paired_difference(cells < 2, (cells == 0) | (cells == 2))
        held += (found.low or 0) <= 0.04 <= (found.high or 0)
    assert 0.93 < held / 2000 < 0.98


# ---------------------------------------------------------------- artifacts


@dataclass(frozen=True)
class Shades:
    """Noise of one tint an image, 3 classes; ``bad`` places cannot be read."""

    n: int = 23
    bad: tuple[int, ...] = ()
    classes: tuple[str, ...] = ("red", "green", "blue")
    kind: str = "classification"
    dataset: str = "shades"
    missing: str = ""

    def probe(self) -> str | None:
        return self.missing or None

    def origin(self) -> str:
        return f"shades {self.n}"

    def split(self, name: str) -> Shades:
        return self

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if index in self.bad:
            raise BadImageError(f"cannot read the image shade{index}.png: mend or remove it")
        random = np.random.default_rng(index)
        pixels = random.integers(0, 64, (16, 16, 3)) + random.integers(0, 192, 3)
        return Image.fromarray(pixels.astype(np.uint8)), index % 3

    def key(self, index: int) -> str:
        return f"shade{index}.png"


@pytest.fixture(autouse=True)
def leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.datasets.LEAVES", {"shades": "tests.test_evaluate:Shades"})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    folder = tmp_path / "artifact"
    onnx_artifact(folder, batch=4)
    made = manifest.read(folder)
    made = replace(made, variant=replace(made.variant, spec=replace(made.variant.spec, dataset="shades")))
    manifest.write(folder, made)
    return made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(cache=tmp_path / "cache")


def network(artifact: Artifact) -> Callable[[Any], Any]:
    """The same file in this process, image by image: uint8 (n, C, H, W) -> logits (n, K)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(Path(artifact.folder) / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(crops: Any) -> Any:
        images = ((crops / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]).astype(np.float32)
        return np.concatenate([session.run(None, {"images": np.stack([one] * artifact.batch)})[0][:1] for one in images])

    return logits


def pictures(data: Shades, places: Any) -> tuple[Any, Any]:
    images = [data[int(place)] for place in places]
    crops = [np.asarray(crop(image, PREPROCESSING)) for image, _ in images]
    return np.stack(crops).transpose(0, 3, 1, 2), [label for _, label in images]


def test_an_artifact_is_scored_in_chunks_as_a_whole(artifact: Artifact, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "CHUNK_IMAGES", 10)  # two batches of four: 8, 8 and 7 images
    events: list[Event] = []
    logits = network(artifact)
    told: list[int] = []

    def reference(crops: Any) -> Any:
        told.append(len(crops))
        answers = logits(crops).argmax(axis=1)
        return np.where(np.arange(len(crops)) == 0, (answers + 1) % 3, answers)  # one image of each chunk otherwise

    found = evaluate_artifact(artifact, "shades(n=23)", "test", replace(bench, notify=events.append), reference, threads=1)
    crops, labels = pictures(Shades(), range(23))
    expected = scores(logits(crops), labels, Shades().classes)
    assert found.scores.top1 == expected.top1 and found.scores.per_class == expected.per_class
    assert found.scores.loss == pytest.approx(expected.loss, abs=1e-6) and told == [8, 8, 7]
    assert found.agreement and found.agreement.value == pytest.approx(20 / 23) and found.agreement.n == 23
    assert found.drop and found.reference_top1 is not None
    assert found.drop.value == pytest.approx(found.reference_top1 - found.scores.top1.value)
    assert (found.artifact_sha256, found.dataset, found.data, found.origin) == (artifact.sha256, "shades", "shades(n=23)", "shades 23")
    assert [(event.done, event.total) for event in events] == [(0, 23), (8, 23), (16, 23), (23, 23)]
    assert not found.caveats and not list(bench.cache.glob("evaluate-*")) and found.evaluated_at > 1.7e9


def test_bad_images_are_counted_up_to_a_number_and_then_named(artifact: Artifact, bench: Bench) -> None:
    with pytest.raises(BadImageError, match=r"shade3\.png.*--max-bad-images 2"):
        evaluate_artifact(artifact, "shades(n=9, bad=(1, 3))", bench=bench, max_bad_images=1)
    found = evaluate_artifact(artifact, "shades(n=9, bad=(1, 3))", bench=bench, max_bad_images=2)
    assert found.bad_images == 2 and found.scores.n == 7 and [one.code for one in found.caveats] == ["images_skipped"]
    crops, labels = pictures(Shades(), [0, 2, 4, 5, 6, 7, 8])
    assert found.scores.top1 == scores(network(artifact)(crops), labels, Shades().classes).top1


def test_a_limit_draws_the_same_images_for_everybody(artifact: Artifact, bench: Bench) -> None:
    seen: list[Any] = []

    def reference(crops: Any) -> Any:
        seen.append(crops)
        return np.zeros(len(crops), dtype=np.int64)

    for _ in range(2):
        found = evaluate_artifact(artifact, "shades", bench=bench, reference=reference, limit=6)
        assert found.scores.n == 6 and [one.code for one in found.caveats] == ["part_of_split"]
    assert np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[0], pictures(Shades(), range(6))[0])


def test_logits_that_are_no_numbers_are_told(artifact: Artifact, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluating._logits

    def broken(*args: Any) -> Any:
        found = np.array(real(*args))
        found[4] = np.nan
        return found

    monkeypatch.setattr(evaluating, "_logits", broken)
    found = evaluate_artifact(artifact, "shades", bench=bench, reference=lambda crops: np.full(len(crops), BROKEN))
    (doubt,) = found.caveats
    assert doubt.code == "logits_not_finite" and "1 of 23" in doubt.seen and "image 5" in doubt.seen
    assert found.agreement and found.agreement.value == 0.0 and found.reference_top1 == 0.0


@pytest.mark.parametrize(
    ("spelling", "options", "kind", "said"),
    [
        ("shades(classes=('a', 'b'))", {}, DataError, "3 classes.*has 2"),
        ("shades(kind='detection')", {}, DataError, "detection set"),
        ("shades(missing='no shades here')", {}, DataError, "no shades here"),
        ("shades(n=0)", {}, DataError, "no images"),
        ("shades", {"split": "tset"}, SpecError, "test"),
        ("shades", {"limit": 0}, SpecError, "at least 1"),
        ("shdes", {}, SpecError, "shades"),
        ("shades(n=2, bad=(0, 1))", {"max_bad_images": 5}, DataError, "no images"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    artifact: Artifact, bench: Bench, spelling: str, options: Any, kind: type[EdgejouleError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        evaluate_artifact(artifact, spelling, bench=bench, **options)


def test_an_artifact_of_other_classes_than_it_says_is_refused(artifact: Artifact, bench: Bench) -> None:
    lying = replace(artifact, variant=replace(artifact.variant, spec=replace(artifact.variant.spec, num_classes=2)))
    with pytest.raises(BackendError, match="2 classes"):
        evaluate_artifact(lying, "shades(classes=('a', 'b'))", bench=bench)


def test_data_of_another_name_is_said_to_be_assumed_alike(artifact: Artifact, bench: Bench) -> None:
    found = evaluate_artifact(artifact, "shades(dataset='other')", bench=bench)
    assert [one.code for one in found.caveats] == ["classes_assumed"] and found.dataset == "other"


# ---------------------------------------------------------------- the float32 network


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Variant, Path]:
    """A linear network's weights in a file, and the variant that they make."""
    from edgejoule.training import write_weights

    path = tmp_path / "linear.safetensors"
    sha256 = write_weights(networks.linear(), path)
    size = Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    spec = ModelSpec("linear", "test", "custom(target='tests.networks:linear')", size, num_classes=5, dataset="shades")
    return Variant(spec, "file", sha256), path


def test_the_float_network_answers_from_the_file_that_it_was_compiled_from(trained: tuple[Variant, Path], tmp_path: Path) -> None:
    import torch

    variant, path = trained
    crops = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    answers = float_network(variant, weights=str(path))(crops)
    with torch.no_grad():
        expected = networks.linear()(torch.from_numpy(((crops / 255 - 0.5) / 0.25).astype(np.float32))).argmax(dim=1).numpy()
    assert np.array_equal(answers, expected) and len(set(answers)) > 1
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ModelError, match="is not what linear was compiled from"):
        float_network(variant, weights=str(tmp_path / "other.safetensors"))


def test_weights_that_are_gone_are_a_reason_and_a_wrong_file_an_error(
    trained: tuple[Variant, Path], artifact: Artifact, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgejoule.zoo.weights._files", {})  # as in another process
    variant, path = trained
    made = replace(artifact, variant=variant)
    reference, why = reference_of(made, "auto", bench)
    assert reference is None and "weights file of linear is not known" in why
    assert reference_of(made, str(path), bench)[0] is not None
    with pytest.raises(ModelError):
        reference_of(made, str(path.with_name("none.safetensors")), bench)


def test_a_weights_file_says_itself_what_it_is(tmp_path: Path, trained: tuple[Variant, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edgejoule.trained import noted_spec, write_weights

    variant, path = trained
    wide = replace(variant.spec, num_classes=1000, dataset="imagenet-1k", published=Published(80.0, 1.0, 1.0, "a table"))
    monkeypatch.setattr("edgejoule.evaluating.find_model", lambda name, allow_code: wide)
    data: Any = Shades(classes=tuple("abcde"))
    assert spec_for("linear", "auto", data) == wide
    guessed = spec_for("linear", str(path), data)  # the file says nothing: the data's classes, the catalog's preprocessing
    assert (guessed.num_classes, guessed.dataset, guessed.published) == (5, "unknown", None)
    noted = replace(variant.spec, preprocessing=replace(variant.spec.preprocessing, crop_pct=1.0))
    write_weights(torch.nn.Linear(2, 2), tmp_path / "moved" / "w.safetensors", noted)
    assert spec_for("linear", str(tmp_path / "moved" / "w.safetensors"), data) == noted
    (tmp_path / "bad.safetensors").write_bytes(b"no such thing")
    assert noted_spec(tmp_path / "bad.safetensors") is None and noted_spec(tmp_path / "none.safetensors") is None


# ---------------------------------------------------------------- the verb


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(evaluate)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_verb_prints_and_keeps_what_it_found(artifact: Artifact, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", artifact.folder
    done = run(folder, "--data", "shades", "--no-reference", "--out", str(out), "--cache", str(tmp_path / "c"), "--json")
    value = json.loads(done.stdout)
    assert value.pop("label") == artifact.label
    found = decode(Evaluation, value)
    with Store.open(out / NAME, create=False) as store:
        assert store.evaluations() == (found,) and list(store.artifacts()) == [artifact.sha256]
    text = run(folder, "--data", "shades", "--no-reference", "--cache", str(tmp_path / "c")).stdout
    for part in ("top-1", "calibration error", "worst classes", "of 8", "not asked for", "shades, test split, 23 images"):
        assert part in text
    assert "results" not in text
    with pytest.raises(SpecError, match="compiled already"):
        run(folder, "--data", "shades", "--calibration", "photos(n=12)")
    with pytest.raises(SpecError, match="the budget that its manifest says"):
        run(folder, "--data", "shades", "--max-drop-pct", "5")


def test_the_verb_compiles_a_model_with_the_weights_of_a_training(
    trained: tuple[Variant, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgejoule.evaluating.find_model", lambda name, allow_code: replace(trained[0].spec, num_classes=1000))
    data = "shades(classes=('a', 'b', 'c', 'd', 'e'))"
    with pytest.raises(DataError, match="1000 classes"):
        run("linear", "--data", data)
    done = run("linear", "--data", data, "--weights", str(trained[1]), "--cache", str(tmp_path / "c"), "--json")
    found = json.loads(done.stdout)
    assert found["agreement"]["value"] == 1.0 and found["drop"]["value"] == 0.0 and found["scores"]["n"] == 23
    assert [doubt["code"] for doubt in found["caveats"]] == ["classes_assumed"]  # the file says nothing of itself
    int8 = ("--backend", "onnxruntime(precision='int8')", "--calibration", "photos(n=12)", "--max-drop-pct", "7")
    run("linear", "--data", data, "--weights", str(trained[1]), *int8, "--cache", str(tmp_path / "q"))
    (made,) = [json.loads(file.read_text()) for file in (tmp_path / "q").rglob("manifest.json")]
    assert made["notes"]["budget_pct"] == "7" and made["precision"] == "int8"
    with pytest.raises(SpecError):
        run("linear", "--data", data, "--calibration", "photos(n=0)")


# ---------------------------------------------------------------- as text and on the page


def test_an_evaluation_reads_well_and_names_escape() -> None:
    judged = judge(np.eye(6)[[0, 1, 2, 3, 4, 5, 0, 1]] * 3.0, [0, 1, 2, 3, 4, 0, 1, 1])
    evil = "<script>alert(1)</script>"
    made = Evaluation("sha", evil, "test", "d", "o", scores_of(judged, (*NAMES[:5], evil)), wilson(7, 8), 0.875, 2)
    made = replace(made, drop=paired_difference(np.ones(8, dtype=bool), judged.right))
    text = evaluation(made, "model @ backend")
    for part in ("75.0 % [", "lost by compiling", "+25.0 points [", "same first answer", "87.5 %", "images left out", "of 2"):
        assert part in text, part
    page = evaluation_section([("model @ backend", made)])
    assert evil not in page and "&lt;script&gt;" in page and "25.0 points" in page
    assert evaluation_section([]) == "" and "gone" in evaluation(replace(made, agreement=None), "x", "weights are gone")


def test_a_large_split_is_not_held_as_logits(artifact: Artifact, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(evaluating, "CHUNK_IMAGES", 4)
    monkeypatch.setattr(
        evaluating, "_logits", lambda artifact, crops, *rest: np.zeros((len(crops), 3)) if not kept.append(len(crops)) else 0
    )
    assert evaluate_artifact(artifact, "shades(n=400)", bench=bench).scores.n == 400 and max(kept) == 4
    assert {field for field in classification.Judged.__slots__ if field != "classes"} == {
        "labels",
        "answers",
        "among",
        "confidence",
        "loss",
    }
