"""COCO's format: what a sample is, what damaged files say, and a mAP that perfect predictions bring to exactly 1."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from edgejoule.datasets import average_precision, coco
from edgejoule.datasets.average_precision import evaluate_detections
from edgejoule.datasets.coco import CocoDetection, collate, draw_mask, flip
from edgejoule.datasets.coco_json import CocoAnnotations, fills, read_annotations
from edgejoule.errors import DataError
from tests import coco_sample

Output = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return coco_sample.write(tmp_path_factory.mktemp("coco"))


def perfect(dataset: CocoDetection) -> dict[int, Output]:
    """The targets in the form of torchvision's predictions."""
    return {
        int(target["image_id"]): {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.linspace(0.9, 0.8, len(target["labels"])),
            "masks": target["masks"][:, None].float(),
        }
        for _, target in (dataset[index] for index in range(len(dataset)))
    }


def changed(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = copy.deepcopy(coco_sample.content())
    change(content)
    file = root / "instances_changed.json"
    file.write_text(json.dumps(content))
    return file


# ---------------------------------------------------------------- COCO: samples


def test_importing_the_package_is_light() -> None:
    script = "import edgejoule.datasets, sys; print([m for m in ('torch', 'pycocotools', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_labels_are_contiguous_and_lead_back_to_the_categories(sample: tuple[Path, Path]) -> None:
    truth = read_annotations(sample[1])
    assert truth.category_ids == (3, 17, 44, 90)
    assert truth.category_names == ("car", "cat", "bottle", "toothbrush")
    assert truth.labels == {3: 1, 17: 2, 44: 3, 90: 4}
    labels = {int(target["image_id"]): target["labels"].tolist() for _, target in (CocoDetection(*sample)[i] for i in range(5))}
    assert labels == {139: [1, 2, 2], 285: [4], 632: [1], 724: [2, 4], 9999: []}


def test_a_sample_is_what_torchvisions_detectors_take(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample)
    assert len(dataset) == 5
    for index, image_id in enumerate(coco_sample.SIZES):
        image, target = dataset[index]
        width, height = coco_sample.SIZES[image_id]
        n = len(target["labels"])
        assert image.dtype == torch.float32 and image.shape == (3, height, width)
        assert float(image.min()) >= 0 and 0.5 < float(image.max()) <= 1
        assert target["boxes"].dtype == torch.float32 and target["boxes"].shape == (n, 4)
        assert target["labels"].dtype == torch.int64 and target["labels"].shape == (n,)
        assert target["masks"].dtype == torch.uint8 and target["masks"].shape == (n, height, width)
    assert dataset[0][1]["boxes"][0].tolist() == [10.25, 20.5, 30.25, 42.5]
    with pytest.raises(IndexError):
        dataset[5]


def test_grey_cmyk_and_turned_files_are_upright_rgb(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample)
    grey, cmyk, turned = (dataset[index][0] for index in (1, 2, 3))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    for image in (cmyk, turned):  # red grows to the right, and is the strongest channel there
        assert image[0, :, -5:].mean() > image[0, :, :5].mean() + 0.5
        assert image[0, :, -5:].mean() > image[2, :, -5:].mean() + 0.3


def test_an_exif_orientation_that_the_annotations_ignored_is_ignored(sample: tuple[Path, Path], tmp_path: Path) -> None:
    images, _ = coco_sample.write(tmp_path / "again")
    file = changed(tmp_path, lambda c: (c["images"][3].update(width=200, height=120), c["annotations"].clear()))
    assert CocoDetection(images, file)[3][0].shape == (3, 120, 200)


def test_masks_are_drawn_from_all_three_spellings(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample)
    two_parts = dataset[0][1]["masks"][2]
    assert two_parts[120, [10, 30, 45]].tolist() == [1, 0, 1] and abs(int(two_parts.sum()) - 1600) <= 90
    rows, columns = torch.arange(120)[:, None], torch.arange(160)[None]
    assert torch.equal(dataset[2][1]["masks"][0].bool(), (rows - 60) ** 2 + (columns - 80) ** 2 <= 900)
    crowd = next(a for a in dataset.truth.by_image[285] if a.crowd)
    assert draw_mask(crowd.segmentation, dataset.truth.images[285]).sum() == 50 * 140


def test_crowds_slivers_and_what_lies_outside_are_no_targets(sample: tuple[Path, Path], tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        boxes = ([190, 10, 0.9, 60], [10, 10, 60, 0], [199.5, 0, 40, 40], [-30, 20, 40, 300], [300, 300, 20, 20])
        content["annotations"] = [
            {**coco_sample.annotations()[0], "id": number, "bbox": box, "segmentation": [coco_sample.rectangle(*box)]}
            for number, box in enumerate(boxes)
        ]

    target = CocoDetection(sample[0], changed(tmp_path, change))[0][1]
    assert target["boxes"].tolist() == [[0, 20, 10, 160]] and len(target["masks"]) == 1


def test_flips_are_seeded_and_move_picture_boxes_and_masks_together(sample: tuple[Path, Path]) -> None:
    plain, always = CocoDetection(*sample), CocoDetection(*sample, flip_probability=1)
    image, target = always[0]
    assert torch.equal(image, plain[0][0].flip(-1)) and torch.equal(target["masks"], plain[0][1]["masks"].flip(-1))
    assert target["boxes"][0].tolist() == [200 - 30.25, 20.5, 200 - 10.25, 42.5]
    back, again = flip(image, target)
    assert torch.equal(back, plain[0][0]) and all(torch.equal(again[key], value) for key, value in plain[0][1].items())

    def flipped(seed: int, epoch: int) -> list[bool]:
        dataset = CocoDetection(*sample, flip_probability=0.5, seed=seed)
        dataset.set_epoch(epoch)
        return [not torch.equal(dataset[index][0], plain[index][0]) for index in range(5)]

    assert flipped(0, 0) == flipped(0, 0)
    assert len({tuple(flipped(seed, epoch)) for seed in range(2) for epoch in range(3)}) > 2


def test_a_transform_comes_last_and_masks_may_be_left_out(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample, masks=False, transform=lambda image, target: (image * 0, target))
    image, target = dataset[0]
    assert float(image.max()) == 0 and set(target) == {"boxes", "labels", "image_id"}


def test_a_loader_with_workers_collates_lists(sample: tuple[Path, Path]) -> None:
    loader = DataLoader(CocoDetection(*sample), batch_size=3, collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [3, 2]
    assert [int(t["image_id"]) for _, targets in batches for t in targets] == list(coco_sample.SIZES)


# ---------------------------------------------------------------- COCO: scores


def test_perfect_predictions_score_exactly_one(sample: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    dataset = CocoDetection(*sample)
    scores = evaluate_detections(dataset, perfect(dataset))
    assert scores == {kind: dict.fromkeys(average_precision.NAMES, 1.0) for kind in ("bbox", "segm")}
    assert capfd.readouterr().out == ""


def test_a_file_and_a_stream_of_pairs_give_the_same(sample: tuple[Path, Path]) -> None:
    outputs = perfect(CocoDetection(*sample))
    worse = {key: {**value, "boxes": value["boxes"] + 4} for key, value in outputs.items()}
    assert evaluate_detections(sample[1], iter(worse.items()), ["bbox"]) == evaluate_detections(
        read_annotations(sample[1]), worse, ["bbox"]
    )


def test_shuffled_labels_and_shifted_boxes_score_less(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample)
    outputs = perfect(dataset)
    shifted = {key: {**value, "boxes": value["boxes"] + torch.tensor([8.0, 0, 8, 0])} for key, value in outputs.items()}
    moved = {key: {**value, "masks": value["masks"].roll(8, -1)} for key, value in outputs.items()}
    other = {key: {**value, "labels": value["labels"] % 4 + 1} for key, value in outputs.items()}
    boxes = evaluate_detections(dataset, shifted)
    assert 0.2 < boxes["bbox"]["AP"] < 0.9 and boxes["segm"]["AP"] == 1  # type: ignore[operator]
    masks = evaluate_detections(dataset, moved)
    assert masks["bbox"]["AP"] == 1 and 0.2 < masks["segm"]["AP"] < 0.9  # type: ignore[operator]
    assert evaluate_detections(dataset, other)["bbox"]["AP"] == 0
    # A half-missed shift is worse for small objects than for large ones, and AP75 is stricter than AP50.
    assert boxes["bbox"]["APs"] < boxes["bbox"]["APl"] and boxes["bbox"]["AP75"] <= boxes["bbox"]["AP50"]  # type: ignore[operator]


def test_a_known_case_by_hand(sample: tuple[Path, Path], tmp_path: Path) -> None:
    """One category, two objects, one hit at IoU 0.8 and one false alarm scored below: precision 1 up to recall 0.5, then nothing."""

    def change(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 5, "name": "box"}]
        content["annotations"] = [
            {"id": n, "image_id": 139, "category_id": 5, "bbox": [x, 10, 50, 100], "area": 5000, "iscrowd": 0}
            for n, x in enumerate((10, 120))
        ]

    boxes = torch.tensor([[10.0, 10, 60, 90], [60.0, 100, 100, 150]])
    output = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.3])}
    scores = evaluate_detections(changed(tmp_path, change), {139: output}, ["bbox"])["bbox"]
    recall_half = 51 / 101  # the recalls 0, 0.01, ... 0.50
    assert scores["AP50"] == pytest.approx(recall_half) and scores["AP75"] == pytest.approx(recall_half)
    assert scores["AP"] == pytest.approx(recall_half * 7 / 10)  # thresholds 0.50 to 0.80 of 0.50 to 0.95
    assert scores["APs"] is None and scores["APl"] is None


def test_detections_on_a_crowd_cost_nothing_but_elsewhere_they_do(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample, masks=False)

    def with_one_more(box: list[float]) -> float | None:
        outputs = {key: {k: v for k, v in value.items() if k != "masks"} for key, value in perfect(CocoDetection(*sample)).items()}
        more = {"boxes": torch.tensor([box]), "labels": torch.tensor([4]), "scores": torch.tensor([0.99])}
        outputs[285] = {key: torch.cat((value, more[key])) for key, value in outputs[285].items()}
        return evaluate_detections(dataset, outputs, ["bbox"])["bbox"]["AP"]

    assert with_one_more([30, 85, 60, 120]) == 1
    assert with_one_more([100, 5, 150, 60]) < 1  # type: ignore[operator]


def test_nothing_found_is_zero_and_an_absent_size_is_none(sample: tuple[Path, Path], tmp_path: Path) -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    zero = dict.fromkeys(average_precision.NAMES, 0.0)
    assert evaluate_detections(sample[1], {}) == {"bbox": zero, "segm": zero}
    assert evaluate_detections(sample[1], {139: {**nothing, "masks": torch.zeros(0, 1, 160, 200)}}) == {"bbox": zero, "segm": zero}
    small = changed(tmp_path, lambda c: c.update(annotations=[a for a in c["annotations"] if a["area"] < 1024]))
    assert evaluate_detections(small, {}, ["bbox"])["bbox"] == {**zero, "APm": None, "APl": None}
    empty = changed(tmp_path, lambda c: c.update(annotations=[]))
    assert evaluate_detections(empty, {139: nothing}, ["bbox"])["bbox"] == dict.fromkeys(average_precision.NAMES)


def test_predictions_of_other_number_types_count_alike(sample: tuple[Path, Path]) -> None:
    dataset = CocoDetection(*sample)
    outputs = {
        key: {"boxes": v["boxes"].numpy(), "labels": v["labels"].int(), "scores": v["scores"].bfloat16(), "masks": v["masks"][:, 0].half()}
        for key, v in perfect(dataset).items()
    }
    assert evaluate_detections(dataset, outputs)["segm"]["AP"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: {5: o[139]}, "image 5"),
        (lambda o: [(139, o[139]), (139, o[139])], "twice"),
        (lambda o: {139: {**o[139], "labels": o[139]["labels"] - 1}}, "outside 1..4"),
        (lambda o: {139: {**o[139], "labels": o[139]["labels"] + 3}}, "outside 1..4"),
        (lambda o: {139: {**o[139], "boxes": o[139]["boxes"] * float("nan")}}, "finite"),
        (lambda o: {139: {**o[139], "scores": o[139]["scores"][:1]}}, "scores"),
        (lambda o: {139: {**o[139], "masks": o[139]["masks"][..., :9]}}, "masks"),
        (lambda o: {139: {k: v for k, v in o[139].items() if k != "masks"}}, "masks"),
        (lambda o: {139: {**o[139], "labels": ["a", "b", "c"]}}, "numbers"),
    ],
)
def test_predictions_that_make_no_sense_are_refused(sample: tuple[Path, Path], change: Callable[[Any], Any], says: str) -> None:
    dataset = CocoDetection(*sample)
    with pytest.raises(DataError, match=says):
        evaluate_detections(dataset, change(perfect(dataset)))


def test_a_kind_that_is_not_there_is_refused(sample: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="keypoints"):
        evaluate_detections(sample[1], {}, ["keypoints"])


# ---------------------------------------------------------------- COCO: damaged files


def _set(section: str, position: int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content[section][position].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("annotations", 0, image_id=4), "image 4"),
        (_set("annotations", 0, category_id=5), "category 5"),
        (_set("annotations", 0, id=7), "twice"),
        (_set("images", 0, id=285), "twice"),
        (_set("categories", 0, id=3), "twice"),
        (_set("annotations", 0, bbox=[1, 2, 3]), "bbox"),
        (_set("annotations", 0, bbox=[1, 2, -3, 4]), "bbox"),
        (_set("annotations", 0, bbox=[1, 2, float("nan"), 4]), "bbox"),
        (_set("annotations", 0, bbox=[1, 2, 10**400, 4]), "bbox"),
        (_set("annotations", 0, area="big"), "area"),
        (_set("annotations", 0, area=None), "area"),
        (_set("annotations", 0, iscrowd=2), "iscrowd"),
        (_set("annotations", 0, segmentation=[[1, 2, 3]]), "polygons"),
        (_set("annotations", 0, segmentation=[[1, 2, 3, 4]]), "three corners"),
        (_set("annotations", 0, segmentation=[[1, 2, float("nan"), 4, 5, 6]]), "polygons"),  # ends the process if pycocotools gets it
        (_set("annotations", 0, segmentation=[[1, 2, 1e9, 4, 5, 6]]), "polygons"),  # and so does this
        (_set("annotations", 0, segmentation={"size": [160, 200], "counts": [5]}), "add up"),  # read from memory that is not its own
        (_set("annotations", 0, segmentation={"size": [160, 200], "counts": "zz"}), "add up"),
        (_set("annotations", 0, segmentation={"size": [200, 160], "counts": [32000]}), "size"),
        (_set("images", 0, file_name=""), "file_name"),
        (_set("images", 0, width=0), "width"),
        (_set("images", 0, height=2**27), "width"),
        (_set("categories", 0, name=None), "name"),
        (lambda c: c.pop("categories"), "categories"),
        (lambda c: c.update(images={}), "images"),
        (lambda c: c["annotations"].append("x"), "annotations"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    file = changed(tmp_path, change)
    with pytest.raises(DataError, match=says) as caught:
        read_annotations(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"images": ' + b"9" * 5000 + b"}", b"null"])
def test_what_is_no_annotation_file_is_refused(tmp_path: Path, text: bytes) -> None:
    (file := tmp_path / "instances.json").write_bytes(text)
    with pytest.raises(DataError, match=r"instances\.json"):
        read_annotations(file)


def test_missing_files_are_named(sample: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json"):
        read_annotations(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=str(tmp_path)):
        read_annotations(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        CocoDetection(tmp_path / "none", sample[1])
    for name in ("lost.jpg", "a\0b.jpg", "\ud800.jpg", "x" * 5000, "."):
        with pytest.raises(DataError, match="image 139"):
            CocoDetection(sample[0], changed(tmp_path, _set("images", 0, file_name=name)))


def test_damaged_and_mismatched_images_are_named(tmp_path: Path) -> None:
    images, file = coco_sample.write(tmp_path / "coco")
    (images / "000000000139.jpg").write_bytes((images / "000000000139.jpg").read_bytes()[:900])
    Image.new("RGB", (9, 9)).save(images / "000000000285.jpg")
    dataset = CocoDetection(images, file)
    with pytest.raises(DataError, match=r"139\.jpg"):
        dataset[0]
    with pytest.raises(DataError, match=r"285\.jpg is 9 x 9 .* 180 x 140"):
        dataset[1]


def test_masks_need_segmentations(sample: tuple[Path, Path], tmp_path: Path) -> None:
    file = changed(tmp_path, _set("annotations", 0, segmentation=[]))
    with pytest.raises(DataError, match="annotation 0 has no segmentation"):
        CocoDetection(sample[0], file)
    assert len(CocoDetection(sample[0], file, masks=False)) == 5
    assert set(evaluate_detections(file, {}, ["bbox"])) == {"bbox"}
    with pytest.raises(DataError, match="no segmentation"):
        evaluate_detections(file, {}, ["segm"])


def test_without_pycocotools_the_remedy_is_told(sample: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match=r"pip install 'edgejoule\[dense\]'"):
        CocoDetection(*sample)
    assert len(CocoDetection(*sample, masks=False)) == 5
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(DataError, match="pip install"):
        evaluate_detections(sample[1], {}, ["bbox"])


def test_bad_options_are_refused(sample: tuple[Path, Path]) -> None:
    for options in ({"flip_probability": 1.5}, {"flip_probability": float("nan")}, {"seed": -1}):
        with pytest.raises(DataError, match="expected"):
            CocoDetection(*sample, **options)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_read_as_pycocotools_writes_them(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    text, pixels = coco_sample.compressed(mask), height * width
    assert fills(text, pixels) and not fills(text, pixels + 1)
    assert fills(coco_sample.counts_of(mask), pixels)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.floats(-1e12, 1e12), min_size=4, max_size=8),
    st.builds(lambda c: {"size": [160, 200], "counts": c}, st.one_of(st.text(max_size=8), st.lists(st.integers(-9, 40000), max_size=4))),
)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_values_anywhere_give_a_data_error_or_a_data_set_that_works(sample: tuple[Path, Path], tmp_path: Path, data: Any) -> None:
    content: Any = coco_sample.content()
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = content
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.integers(0, 3)) == 0:
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(LEAVES)
        else:
            del place[key]
        if not content:
            break
    (file := tmp_path / "odd.json").write_text(json.dumps(content))
    try:
        dataset = CocoDetection(sample[0], file)
        for index in range(len(dataset)):
            dataset[index]
        evaluate_detections(dataset, {})
    except DataError as error:
        assert str(file) in str(error) or str(sample[0]) in str(error)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_give_a_data_error_or_annotations(tmp_path: Path, data: Any) -> None:
    text = bytearray(json.dumps(coco_sample.content()).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (file := tmp_path / "damaged.json").write_bytes(bytes(text[: data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))]))
    try:
        assert isinstance(read_annotations(file), CocoAnnotations)
    except DataError as error:
        assert str(file) in str(error)


def test_the_modules_name_what_they_need() -> None:
    assert coco.pycocotools("mask").__name__ == "pycocotools.mask"
