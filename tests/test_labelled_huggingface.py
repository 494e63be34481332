"""Sets of Hugging Face datasets as data: saved to disk, as Parquet, with the set's own splits or without, with odd columns. No network."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.errors import BadImageError, DataError
from tests.labelled_samples import encoded, pixels, write_huggingface

datasets = pytest.importorskip("datasets")
PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def opened(path: object, options: str = "") -> Any:
    return registry.create("data", f"huggingface(path={str(path)!r}{', ' if options else ''}{options})")


def keys(data: Any, part: str) -> list[str]:
    images = data.split(part)
    return [images.key(index) for index in range(len(images))]


def table(labels: list[Any], kind: Any, images: list[Any] | None = None, name: str = "image") -> Any:
    shown = images if images is not None else [{"bytes": encoded(0, n), "path": None} for n in range(len(labels))]
    return datasets.Dataset.from_dict({name: shown, "label": labels}, features=datasets.Features({name: datasets.Image(), "label": kind}))


def saved(path: Path, *arguments: Any, **options: Any) -> Path:
    table(*arguments, **options).save_to_disk(str(path))
    return path


WHOLE = "validation=0, test=0"
INT = datasets.Value("int64")


@pytest.mark.parametrize(
    ("there", "homes"),
    [
        ({"train": 40, "test": 9}, ("train", "train", "test")),
        ({"train": 40, "validation": 8, "test": 9}, ("train", "validation", "test")),
        ({"train": 40, "dev": 8, "test": 9}, ("train", "dev", "test")),
        ({"train": 40, "valid": 8}, ("train", "train", "valid")),
        ({"train": 60}, ("train", "train", "train")),
        ({"everything": 60}, ("everything",) * 3),
        ({"": 60}, ("train",) * 3),
    ],
)
def test_the_sets_own_splits_are_used_and_what_lacks_is_cut_from_train(
    there: dict[str, int], homes: tuple[str, ...], tmp_path: Path
) -> None:
    data = opened(write_huggingface(tmp_path / "insects", there))
    seen = {part: keys(data, part) for part in PARTS}
    assert [{key.split("/")[0] for key in found} for found in seen.values()] == [{home} for home in homes]
    assert sum(map(len, seen.values())) == len(set(sum(seen.values(), []))) == sum(there.values())  # noqa: RUF017
    assert data.classes == ("ant", "bee", "cat") and data.dataset == "insects"
    which = {name: n for n, name in enumerate(there)}
    for part in PARTS:
        images = data.split(part)
        for index in range(len(images)):
            image, label = images[index]
            split, row = images.key(index).split("/")
            assert label == int(row) % 3
            assert np.array_equal(np.asarray(image), pixels(label, which.get(split, 0) * 1000 + int(row)))


def test_a_folder_of_parquet_files_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    kind = datasets.ClassLabel(names=["x", "y"])
    table([n % 2 for n in range(30)], kind).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    table([1, 0, 1], kind).to_parquet(str(folder / "test-00000-of-00001.parquet"))
    data = opened(folder)
    images = data.split("test")
    assert data.classes == ("x", "y") and [images[n][1] for n in range(3)] == [1, 0, 1] and images[2][0].size == (32, 32)


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "expected"),
    [
        ([2, 0, 1, 0], INT, ("0", "1", "2"), [2, 0, 1, 0]),
        ([2, 0, 1, 0], datasets.Value("uint8"), ("0", "1", "2"), [2, 0, 1, 0]),
        (["dog", "ant", "dog", "cat"], datasets.Value("string"), ("ant", "cat", "dog"), [2, 0, 2, 1]),
        ([1, 1, 0, 0], datasets.ClassLabel(names=["b", "a"]), ("b", "a"), [1, 1, 0, 0]),
    ],
)
def test_labels_are_numbers_names_or_texts(
    labels: list[Any], kind: Any, classes: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    data = opened(saved(tmp_path / "set", labels, kind), WHOLE)
    images = data.split("train")
    assert data.classes == classes and [images[n][1] for n in range(4)] == expected


def test_columns_of_other_names_are_given(tmp_path: Path) -> None:
    path = write_huggingface(tmp_path / "set", image="img", label="fine_label")
    with pytest.raises(DataError, match=r"no column 'image': it has img, fine_label"):
        opened(path).split("train")
    with pytest.raises(DataError, match=r"holds .*, not images"):
        opened(path, "image='fine_label', label='fine_label'").split("train")
    assert len(opened(path, "image='img', label='fine_label'").split("test")) == 9


def test_the_origin_follows_content_and_not_place_or_fingerprint(tmp_path: Path) -> None:
    one, two = (opened(write_huggingface(tmp_path / name)) for name in "ab")
    assert one.origin() == two.origin()
    shuffled = datasets.load_from_disk(str(tmp_path / "a"))
    shuffled["train"] = shuffled["train"].shuffle(seed=0)
    shuffled.save_to_disk(str(tmp_path / "c"))
    assert opened(tmp_path / "c").origin() != one.origin()
    assert opened(tmp_path / "a", "validation=0.2").origin() != one.origin()


def test_test_rows_without_labels_are_a_challenges_and_no_test_split(tmp_path: Path) -> None:
    kind = datasets.ClassLabel(names=["a", "b"])
    made = datasets.DatasetDict(train=table([0, 1] * 20, kind), validation=table([1, 0, 1], kind), test=table([-1] * 5, kind))
    made.save_to_disk(str(tmp_path / "set"))
    assert {key.split("/")[0] for key in keys(opened(tmp_path / "set"), "test")} == {"validation"}


def test_a_row_without_image_or_label_is_a_bad_one_and_the_others_are_not_lost(tmp_path: Path) -> None:
    sound = {"bytes": encoded(0, 0), "path": None}
    images = [sound, None, {"bytes": b"", "path": None}, {"bytes": encoded(0, 0)[:99], "path": None}, sound, sound]
    data = opened(saved(tmp_path / "set", [0, 1, 2, 0, None, -1], INT, images), WHOLE)
    rows = data.split("train")
    assert rows[0][1] == 0 and data.classes == ("0", "1", "2") and len(data.origin()) == 64
    for index, said in ((1, "no image"), (2, "no image"), (3, "cannot read the image"), (4, "no label"), (5, "no label")):
        with pytest.raises(BadImageError, match=said) as caught:
            rows[index]
        assert f"train/{index}" in str(caught.value)


def test_images_that_are_paths_are_read_and_a_missing_file_is_named(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(encoded(0, n))
    made = table([0, 1, 1], INT, [str(tmp_path / f"{n}.png") for n in range(3)])
    made.save_to_disk(str(tmp_path / "set"))
    rows = opened(tmp_path / "set", WHOLE).split("train")
    assert np.array_equal(np.asarray(rows[2][0]), pixels(0, 2))
    import pyarrow.parquet

    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    gone = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": str(tmp_path / "gone.png")}], struct), "label": [0]})
    features = datasets.Features({"image": datasets.Image(), "label": INT})
    folder = tmp_path / "paths"
    folder.mkdir()
    pyarrow.parquet.write_table(gone.replace_schema_metadata(features.arrow_schema.metadata), folder / "train.parquet")
    data = opened(folder, WHOLE)
    with pytest.raises(BadImageError, match=r"gone\.png"):
        data.split("train")[0]
    assert len(data.origin()) == 64


@pytest.mark.parametrize("labels", [[0, 1, 3_000_000], [-1, -1, None]])
def test_numbers_that_are_no_classes_are_refused(labels: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the largest label in 'label' is"):
        opened(saved(tmp_path / "set", labels, INT), WHOLE).split("train")


def test_a_pickled_split_is_mapped_anew_and_small(tmp_path: Path) -> None:
    rows = opened(write_huggingface(tmp_path / "set", {"train": 300})).split("train")
    content = pickle.dumps(rows)
    assert len(content) < 60_000 and pickle.loads(content)[20][0].tobytes() == rows[20][0].tobytes()


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "nobody/such-a-set"])
def test_what_is_not_there_is_one_error(path: str) -> None:
    with pytest.raises(DataError, match="expected"):
        opened(path).split("train")


def test_a_damaged_folder_is_one_error(tmp_path: Path) -> None:
    path = Path(write_huggingface(tmp_path / "set", {"": 40}))
    for file in path.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="set"):
        opened(path).split("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot open"):
        opened(tmp_path / "empty").split("train")


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data = opened(tmp_path)
    assert data.probe().endswith("pip install 'edgejoule[data]'")
    with pytest.raises(DataError, match=r"edgejoule\[data\]"):
        data.origin()
