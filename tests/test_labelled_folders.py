"""Class folders as data: the author's splits and those by hash, odd names, and what is wrong with a folder."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule import registry
from edgejoule.errors import BadImageError, DataError
from tests.labelled_samples import encoded, pixels, write_imagefolder

PARTS = ("train", "validation", "test")


def folder(path: object, **options: object) -> Any:
    said = "".join(f", {key}={value!r}" for key, value in options.items())
    return registry.create("data", f"imagefolder(path={str(path)!r}{said})")


def keys(data: Any, part: str) -> set[str]:
    images = data.split(part)
    return {images.key(index) for index in range(len(images))}


def test_class_folders_are_cut_into_three_by_hash(tmp_path: Path) -> None:
    data = folder(write_imagefolder(tmp_path / "insects", each=30))
    parts = [keys(data, part) for part in PARTS]
    assert set.union(*parts) == {f"{name}/{name}_{n:04d}.png" for name in ("ant", "bee", "cat") for n in range(30)}
    assert sum(map(len, parts)) == 90 and data.dataset == "insects" and data.classes == ("ant", "bee", "cat")
    images = data.split("validation")
    for index in range(len(images)):
        image, label = images[index]
        number = int(images.key(index)[-8:-4])
        assert np.array_equal(np.asarray(image), pixels(label, number, (24, 20))), images.key(index)
        assert images.key(index).startswith(data.classes[label])


@pytest.mark.parametrize(
    ("there", "homes"),
    [
        (("train", "val"), {"train": "train", "validation": "train", "test": "val"}),
        (("train", "val", "test"), {"train": "train", "validation": "val", "test": "test"}),
        (("train", "validation"), {"train": "train", "validation": "train", "test": "validation"}),
        (("train", "valid", "test"), {"train": "train", "validation": "valid", "test": "test"}),
        (("train", "test"), {"train": "train", "validation": "train", "test": "test"}),
        (("train",), {"train": "train", "validation": "train", "test": "train"}),
    ],
)
def test_the_authors_splits_are_used_and_val_is_held_out_as_imagenets_is(
    there: tuple[str, ...], homes: dict[str, str], tmp_path: Path
) -> None:
    data = folder(write_imagefolder(tmp_path, each=16, splits=there))
    seen = {part: keys(data, part) for part in PARTS}
    assert {part: {key.split("/")[0] for key in found} for part, found in seen.items()} == {part: {home} for part, home in homes.items()}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 48 * len(there)
    for part in PARTS:
        images = data.split(part)
        assert all(f"/{data.classes[images[n][1]]}/" in images.key(n) for n in range(len(images)))


def test_classes_that_are_called_as_a_split_is_are_classes(tmp_path: Path) -> None:
    data = folder(write_imagefolder(tmp_path, classes=("car", "plane", "train"), each=20))
    assert data.classes == ("car", "plane", "train") and len(keys(data, "test")) > 0
    write_imagefolder(tmp_path / "train", classes=("steam",), each=1)
    assert folder(tmp_path).classes == ("car", "plane", "train")


def test_a_share_of_nothing_is_an_empty_split_and_one_that_came_out_empty_an_error(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, each=1)
    data = folder(tmp_path, validation=0.0, test=0.0)
    assert [len(data.split(part)) for part in PARTS] == [3, 0, 0]
    with pytest.raises(DataError, match="too small to be cut by hash"):
        folder(tmp_path, validation=0.0001).split("validation")


def test_adding_images_moves_none_of_the_others(tmp_path: Path) -> None:
    before = {part: keys(folder(write_imagefolder(tmp_path, each=20)), part) for part in PARTS}
    write_imagefolder(tmp_path, classes=("aphid", "ant", "bee", "cat"), each=33)
    after = {part: keys(folder(tmp_path), part) for part in PARTS}
    assert all(before[part] <= after[part] for part in PARTS)


def test_the_origin_is_a_copys_too_and_changes_with_names_sizes_and_shares(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "a", each=12)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    original = folder(tmp_path / "a").origin()
    assert folder(tmp_path / "b").origin() == original
    assert folder(tmp_path / "b", test=0.2).origin() != original
    (tmp_path / "b" / "bee" / "notes.txt").write_text("no image")
    assert folder(tmp_path / "b").origin() == original
    file = tmp_path / "b" / "ant" / "ant_0003.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert folder(tmp_path / "b").origin() != original
    file.unlink()
    other = folder(tmp_path / "b").origin()
    file.with_name("ant_0003a.png").write_bytes((tmp_path / "a" / "ant" / "ant_0003.png").read_bytes())
    assert len({original, other, folder(tmp_path / "b").origin()}) == 3


def test_hidden_and_foreign_files_are_passed_over_and_deep_ones_found(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, each=9)
    for name in (".DS_Store", "ant/.hidden.png", "ant/Thumbs.db", "ant/._ant_0001.png", ".cache/x/1.png", "README.png.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"rubbish")
    (tmp_path / "bee" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "bee" / "deep" / "er" / "x.JPEG").write_bytes(encoded(1, 1, kind="JPEG"))
    (tmp_path / "bee" / "deep" / "loop").symlink_to(tmp_path / "bee", target_is_directory=True)
    data = folder(tmp_path)
    assert data.classes == ("ant", "bee", "cat")
    found = set.union(*(keys(data, part) for part in PARTS))
    assert len(found) == 28 and "bee/deep/er/x.JPEG" in found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_of_any_bytes_are_read_and_shown(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, each=1)
    for name in (b"\xff\xfe.png", "ünï çødé 图.png".encode(), b"new\nline.png", b"quo'te\".PNG", b"-rf.png", b"a" * 200 + b".webp"):
        with open(os.fsencode(tmp_path / "ant") + b"/" + name, "wb") as stream:  # noqa: PTH123
            stream.write(encoded(0, 5))
    data = folder(tmp_path, validation=0.0, test=0.0)
    images = pickle.loads(pickle.dumps(data.split("train")))
    shown = [images.key(index) for index in range(len(images))]
    assert len(set(shown)) == 9 and "ant/ünï çødé 图.png" in shown and "ant/\\xff\\xfe.png" in shown
    for index in range(9):
        images[index]
        shown[index].encode("utf-8")
    assert len(data.origin()) == 64


@pytest.mark.parametrize("content", [b"", b"\0" * 500, encoded(0, 0)[:300]], ids=["empty", "NULs", "cut short"])
def test_a_bad_image_is_named_and_the_others_are_not_lost(content: bytes, tmp_path: Path) -> None:
    write_imagefolder(tmp_path, each=4)
    (tmp_path / "bee" / "bee_0002.png").write_bytes(content)
    images = folder(tmp_path, validation=0.0, test=0.0).split("train")
    with pytest.raises(BadImageError, match=r"bee_0002\.png"):
        images[6]
    assert images[5][1] == images[7][1] == 1
    (tmp_path / "bee" / "bee_0003.png").unlink()
    with pytest.raises(BadImageError, match=r"bee_0003\.png"):
        images[7]


def empty_class(root: Path) -> None:
    (root / "dragonfly").mkdir()


def class_of_texts(root: Path) -> None:
    (root / "eel").mkdir()
    (root / "eel" / "1.txt").write_text("eel")


def remove_classes(root: Path) -> None:
    for name in ("ant", "bee", "cat"):
        shutil.rmtree(root / name)


def unlike_splits(root: Path) -> None:
    remove_classes(root)
    write_imagefolder(root, splits=("train",))
    write_imagefolder(root, splits=("val",), classes=("ant", "bee", "fly"))


def flat_test(root: Path) -> None:
    remove_classes(root)
    write_imagefolder(root, splits=("train", "val"))
    (root / "test").mkdir()
    (root / "test" / "1.png").write_bytes(encoded(0, 0))


def two_validations(root: Path) -> None:
    remove_classes(root)
    write_imagefolder(root, splits=("train", "val", "valid"))


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (empty_class, "dragonfly holds no images"),
    (class_of_texts, "eel holds no images"),
    (remove_classes, "holds nothing"),
    (unlike_splits, r"train/ and val/ do not have the same class folders \(cat, fly\)"),
    (flat_test, "test holds no class folders"),
    (two_validations, "has both val/ and valid/"),
    (lambda root: shutil.rmtree(root), "no folder"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[said for _, said in SPOILED])
def test_what_is_wrong_with_a_folder_is_said(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_imagefolder(root)
    spoil(root)
    for ask in (lambda data: data.classes, lambda data: data.origin(), lambda data: data.split("train")):
        with pytest.raises(DataError, match=said):
            ask(folder(root))


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=8).filter(
    lambda name: name.strip(". ") and not name.startswith(".")
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=st.sets(names, min_size=1, max_size=4))
def test_classes_of_any_name_are_the_folders_sorted(classes: set[str], tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.rmtree(root, ignore_errors=True)
    content = encoded(0, 0, (2, 2))
    for name in classes:
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.png").write_bytes(content)
    data = folder(root, validation=0.0, test=0.0)
    images = data.split("train")
    assert data.classes == tuple(sorted(classes))
    assert [images.key(n) for n in range(len(images))] == [f"{name}/{name}.png" for name in sorted(classes)]
    assert [images[n][1] for n in range(len(images))] == list(range(len(classes)))
