"""Images in: the two sources, a model's own preprocessing against timm's, crops on disk and what a device reads back."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgejoule import data
from edgejoule.errors import DataError, EdgejouleError, OutputError, SpecError, UnknownNameError
from edgejoule.records import Preprocessing

IMAGENET = Preprocessing((3, 64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def picture(path: Path, size: tuple[int, int] = (90, 70), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_photos_are_seeded_varied_and_real() -> None:
    first = [np.asarray(image) for image in data.source("photos(n=6, seed=1)").images()]
    again = [np.asarray(image) for image in data.source("photos(n=6, seed=1)").images()]
    other = [np.asarray(image) for image in data.source("photos(n=6, seed=2)").images()]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape for a, b in zip(first, other, strict=True))
    assert len({image.shape for image in first}) == 6
    assert all(image.std() > 10 for image in first)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_pct": 0.9, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "interpolation": "bicubic"},
        {"crop_pct": 0.95, "crop_mode": "squash", "interpolation": "lanczos"},
        {"input_size": (3, 61, 61), "crop_pct": 0.9},
        {"input_size": (3, 48, 80), "crop_mode": "squash"},
    ],
    ids=str,
)
def test_crops_equal_timms_own_transform(tmp_path: Path, change: dict[str, object]) -> None:
    from timm.data import create_transform

    from edgejoule import zoo  # noqa: F401  makes torchvision importable

    preprocessing = replace(IMAGENET, **change)  # type: ignore[arg-type]
    shapes = [(90, 70), (70, 90), (64, 64), (301, 127), (33, 40)]
    for index, size in enumerate(shapes):
        picture(tmp_path / f"{index}.png", size, seed=index)
    transform = create_transform(
        input_size=preprocessing.input_size,
        interpolation=preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        normalize=False,
    )
    expected = np.stack([transform(Image.open(tmp_path / f"{index}.png")).numpy() for index in range(len(shapes))])
    assert np.array_equal(data.crops(f"folder(path={str(tmp_path)!r})", preprocessing), expected)


def test_normalise_equals_timms_own_transform() -> None:
    from timm.data import create_transform

    from edgejoule import zoo  # noqa: F401

    transform = create_transform(input_size=(3, 64, 64), interpolation="bicubic", mean=IMAGENET.mean, std=IMAGENET.std, crop_pct=0.875)
    images = list(data.source("photos(n=3)").images())
    expected = np.stack([transform(image).numpy() for image in images])
    found = data.normalise(data.crops("photos(n=3)", IMAGENET), IMAGENET)
    assert found.dtype == np.float32 and found.shape == (3, 3, 64, 64) and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_normalise_refuses_what_is_not_crops() -> None:
    with pytest.raises(DataError, match="expected uint8"):
        data.normalise(np.zeros((1, 3, 32, 32), np.uint8), IMAGENET)
    with pytest.raises(DataError, match="float32"):
        data.normalise(np.zeros((1, 3, 64, 64), np.float32), IMAGENET)  # type: ignore[arg-type]


def test_a_folder_is_sorted_recursive_and_seeded(tmp_path: Path) -> None:
    for index, name in enumerate(["b.png", "a.jpg", "deep/c.png", "d.PNG"]):
        picture(tmp_path / name, seed=index)
    (tmp_path / "labels.txt").write_text("not an image")
    (tmp_path / "._a.jpg").write_bytes(b"a Mac's droppings")
    everything = data.crops(f"folder(path={str(tmp_path)!r})", IMAGENET)
    assert everything.shape == (4, 3, 64, 64)
    two = data.crops(f"folder(path={str(tmp_path)!r}, n=2, seed=3)", IMAGENET)
    assert all(any(np.array_equal(image, other) for other in everything) for image in two)
    assert np.array_equal(two, data.crops(f"folder(path={str(tmp_path)!r}, seed=3, n=2)", IMAGENET))


def test_a_folder_that_cannot_serve_says_why(tmp_path: Path) -> None:
    spelling = f"folder(path={str(tmp_path)!r})"
    with pytest.raises(DataError, match="no images below"):
        data.crops(spelling, IMAGENET)
    picture(tmp_path / "fine.png")
    with pytest.raises(DataError, match="holds 1 images"):
        data.crops(f"folder(path={str(tmp_path)!r}, n=2)", IMAGENET)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "fine.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"broken\.jpg"):
        data.crops(spelling, IMAGENET)
    with pytest.raises(DataError, match="expected a folder"):
        data.crops('folder(path="/does/not/exist")', IMAGENET)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("photo(n=3)", UnknownNameError),
        ("photos(n=0)", SpecError),
        ("photos(n=True)", SpecError),
        ("photos(n=None)", SpecError),
        ("photos(n='3')", SpecError),
        ("photos(m=3)", SpecError),
        ("photos(seed=-1)", SpecError),
        ("folder", SpecError),
        ("folder(path=3)", SpecError),
        ("photos(", SpecError),
    ],
)
def test_a_bad_spelling_is_refused(text: str, error: type[EdgejouleError]) -> None:
    with pytest.raises(error):
        data.source(text)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_source_or_a_clear_error(text: str) -> None:
    try:
        data.source(text)
    except SpecError as error:
        assert str(error)


def test_crops_are_written_once_and_named_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sha256 = data.write_crops("photos(n=3)", IMAGENET, tmp_path / "new")
    assert path.name == f"{sha256}.npy"
    assert np.array_equal(data.read_crops(path), data.crops("photos(n=3)", IMAGENET))
    monkeypatch.setattr(data, "crops", lambda *_: pytest.fail("decoded again"))
    assert data.write_crops("photos( n = 3 )", IMAGENET, tmp_path / "new") == (path, sha256)
    with pytest.raises(pytest.fail.Exception):
        data.write_crops("photos(n=3)", replace(IMAGENET, crop_pct=0.5), tmp_path / "new")


def test_a_second_process_does_not_decode_again(tmp_path: Path) -> None:
    path, sha256 = data.write_crops("photos(n=2)", IMAGENET, tmp_path)
    script = (
        "import sys; from pathlib import Path; from edgejoule import data; from edgejoule.records import Preprocessing;"
        "data.crops = None;"
        "p = Preprocessing((3, 64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225));"
        "print(data.write_crops('photos(n=2)', p, Path(sys.argv[1]))[1]); assert 'sklearn' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == sha256 and path.exists()


def test_a_changed_folder_and_a_damaged_file_are_noticed(tmp_path: Path) -> None:
    images, cache = tmp_path / "images", tmp_path / "cache"
    picture(images / "a.png", seed=1)
    spelling = f"folder(path={str(images)!r})"
    path, sha256 = data.write_crops(spelling, IMAGENET, cache)
    picture(images / "a.png", seed=2)
    os.utime(images / "a.png", ns=(1, 1))
    assert data.write_crops(spelling, IMAGENET, cache)[1] != sha256
    picture(images / "a.png", seed=1)
    path.write_bytes(b"damaged")
    again, same = data.write_crops(spelling, IMAGENET, cache)
    assert same == sha256 and data.read_crops(again).shape == (1, 3, 64, 64)


def test_read_crops_refuses_what_it_did_not_write(tmp_path: Path) -> None:
    for name, content in {"objects": np.array([{}], dtype=object), "floats": np.zeros((1, 3, 4, 4)), "flat": np.zeros(3, np.uint8)}.items():
        np.save(tmp_path / f"{name}.npy", content, allow_pickle=True)
        with pytest.raises(DataError):
            data.read_crops(tmp_path / f"{name}.npy")
    (tmp_path / "text.npy").write_text("hello")
    for name in ("text.npy", "absent.npy"):
        with pytest.raises(DataError):
            data.read_crops(tmp_path / name)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        data.write_crops("photos(n=1)", IMAGENET, tmp_path / "file")


def test_importing_data_needs_numpy_alone() -> None:
    script = "import edgejoule.data, sys; assert not {'PIL', 'torch', 'sklearn', 'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
