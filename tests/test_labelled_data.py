"""Splits by hash, decoding, scikit-learn's digits and CIFAR-10's binary files: real files, and files that are spoiled."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgejoule import registry
from edgejoule.datasets import LEAVES
from edgejoule.datasets.labelled import Names, decode
from edgejoule.datasets.split import cut, part_of
from edgejoule.errors import BadImageError, DataError, EdgejouleError, SpecError
from tests.labelled_samples import CIFAR10_CLASSES, CIFAR10_RECORD, cifar10_records, encoded, pixels, write_cifar10

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def cifar10(path: object) -> Any:
    return registry.create("data", f"cifar10(path={str(path)!r})")


# ---------------------------------------------------------------- splits


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.1))
def test_a_larger_validation_share_never_takes_from_the_test_split(key: str, validation: float, test: float, more: float) -> None:
    before, after = part_of(key, validation, test), part_of(key, validation + more, test)
    assert (before == "test") == (after == "test")
    assert after == "validation" or after == before


def test_a_split_does_not_depend_on_what_else_is_there() -> None:
    keys = [f"{n}.jpg" for n in range(2000)]
    parts = cut(keys, 0.1, 0.2)
    chosen = {part: {keys[n] for n in positions} for part, positions in parts.items()}
    fewer = [key for key in reversed(keys) if int(key[:-4]) % 3]
    for part, positions in cut(fewer, 0.1, 0.2).items():
        assert {fewer[n] for n in positions} == chosen[part] & set(fewer)
    assert 340 < len(chosen["test"]) < 460 and 150 < len(chosen["validation"]) < 250  # four standard deviations either way


def test_the_rule_of_the_split_is_this_one_for_good() -> None:
    # printf digits/32 | sha256sum gives 2154…, which is 0.130 of the range; 24: 0.231, 25: 0.287, 26: 0.670
    assert [part_of(f"digits/{n}", 0.1, 0.2) for n in (32, 24, 25, 26)] == ["test", "validation", "validation", "train"]


@pytest.mark.parametrize("options", ["validation=1.0", "test=-0.1", "validation=0.5, test=0.5", "validation=1e999", "test=1e999-1e999"])
def test_shares_that_leave_nothing_to_train_on_are_refused(options: str) -> None:
    with pytest.raises(SpecError):
        registry.create("data", f"imagefolder(path='x', {options})")


# ---------------------------------------------------------------- decoding


def bytes_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ramp(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(pixels(0, 0, (12, 8))).convert(mode)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes_of(ramp("L")), ramp("L").convert("RGB")),
        (bytes_of(ramp("P")), ramp("P").convert("RGB")),
        (bytes_of(ramp("1")), ramp("1").convert("RGB")),
        (bytes_of(ramp("RGBA")), ramp()),
        (bytes_of(ramp("CMYK"), "TIFF"), ramp("CMYK").convert("RGB")),
        (bytes_of(Image.fromarray(np.asarray(ramp("L")).astype(np.uint16) * 257)), ramp("L").convert("RGB")),
    ],
    ids=["grey", "palette", "bits", "transparent", "cmyk", "16 bits"],
)
def test_every_kind_of_pixel_becomes_rgb(content: bytes, expected: Image.Image) -> None:
    image = decode(content, "x")
    assert image.mode == "RGB" and image.tobytes() == expected.tobytes()


def test_a_photograph_taken_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = bytes_of(ramp().transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert decode(content, "x").tobytes() == ramp().tobytes()
    (tmp_path / "side.png").write_bytes(content)
    assert decode(tmp_path / "side.png", "x").size == (12, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_whose_exif_is_damaged_is_still_an_image() -> None:
    content = bytes_of(ramp(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff rubbish")
    assert decode(content, "x").size == (12, 8)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\0" * 4096, b"GIF89a", encoded(0, 0)[:200], encoded(0, 0, kind="JPEG")[:-200], b"<svg/>", bytes_of(ramp("F"), "TIFF")],
    ids=["empty", "NUL", "NULs", "header", "cut PNG", "cut JPEG", "vector", "floats"],
)
def test_what_is_no_image_is_a_bad_image_that_is_named(content: bytes) -> None:
    with pytest.raises(BadImageError, match=r"ant/7\.jpg"):
        decode(content, "ant/7.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@fuzz
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_a_spoiled_image_is_an_image_or_a_bad_one(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(1, 1, (9, 7), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(content[: data.draw(st.integers(0, len(content)))]), "x").mode == "RGB"
    except BadImageError as error:
        assert "\n" not in str(error)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_packed_names_are_the_names(texts: list[str]) -> None:
    packed = pickle.loads(pickle.dumps(Names.of(texts)))
    assert list(packed) == texts and len(packed) == len(texts)


# ---------------------------------------------------------------- digits


def test_the_digits_are_the_1797_scans_and_their_ink_is_kept_exactly() -> None:
    from sklearn.datasets import load_digits

    data, wanted = registry.create("data", "digits"), load_digits()
    seen = 0
    for part in ("train", "validation", "test"):
        images = data.split(part)
        for index in range(0, len(images), 7):
            image, label = images[index]
            position = int(images.key(index).split("/")[1])
            grey = np.asarray(image)[:, :, 0]
            assert np.array_equal(np.round(grey / 255 * 16), wanted.images[position]) and label == wanted.target[position]
            assert image.size == (8, 8)
        seen += len(images)
    assert seen == 1797 and data.classes == tuple("0123456789")
    test = data.split("test")
    assert max(np.asarray(test[index][0]).max() for index in range(20)) == 255  # 16 is full ink


def test_an_unknown_split_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="expected train, validation, test"):
        registry.create("data", "digits").split("val")


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10_gives_back_what_was_written(tmp_path: Path) -> None:
    data = cifar10(write_cifar10(tmp_path, train=53, test=12))
    found = {}
    for part in ("train", "validation"):
        images = data.split(part)
        for index in range(len(images)):
            file, record = images.key(index).split("/")
            start = [0, 10, 21, 31, 42][int(file[11]) - 1]
            found[start + int(record)] = images[index]
    assert sorted(found) == list(range(53)) and data.classes == CIFAR10_CLASSES and data.dataset == "cifar-10"
    for number, (image, label) in found.items():
        assert label == number % 10 and np.array_equal(np.asarray(image), pixels(label, number))
    test = data.split("test")
    assert [test[n][1] for n in range(12)] == [n % 10 for n in range(12)]
    assert np.array_equal(np.asarray(test[11][0]), pixels(1, 1_000_011))


def test_a_pickled_cifar10_split_holds_no_pixels(tmp_path: Path) -> None:
    images = cifar10(write_cifar10(tmp_path, train=500, test=12)).split("train")
    assert len(pickle.dumps(images)) < 20 * 500


def test_cifar10_is_found_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = registry.create("data", "cifar10")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEJOULE_DATA", raising=False)
    assert "cifar-10-binary.tar.gz" in data.probe() and "University of Toronto" in data.probe()
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz"):
        data.split("train")
    write_cifar10(tmp_path / "data" / "cifar-10-batches-bin")
    assert data.probe() is None and len(registry.create("data", "cifar10").split("test")) == 20
    write_cifar10(tmp_path / "elsewhere" / "cifar-10-batches-bin", test=7)
    monkeypatch.setenv("EDGEJOULE_DATA", str(tmp_path / "elsewhere"))
    assert len(registry.create("data", "cifar10").split("test")) == 7


def test_the_origin_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one, two = cifar10(write_cifar10(tmp_path / "a")), cifar10(write_cifar10(tmp_path / "b"))
    assert one.origin() == two.origin()
    file = tmp_path / "b" / "test_batch.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert cifar10(tmp_path / "b").origin() != one.origin()


def cut_short(folder: Path) -> None:
    file = folder / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])


def mislabel(folder: Path) -> None:
    (folder / "data_batch_3.bin").write_bytes(cifar10_records([1, 2]) + b"\x0a" + bytes(3072))


def full_but_one(folder: Path) -> None:
    (folder / "data_batch_1.bin").write_bytes(bytes(CIFAR10_RECORD * 10_000))
    (folder / "data_batch_5.bin").unlink()


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (cut_short, r"data_batch_2.bin has \d+ bytes"),
    (mislabel, "data_batch_3.bin has the label 10 at record 2"),
    (lambda folder: (folder / "data_batch_2.bin").unlink(), "data_batch_2.bin"),
    (lambda folder: (folder / "test_batch.bin").unlink(), "test_batch.bin"),
    (lambda folder: (folder / "test_batch.bin").write_bytes(b""), "test_batch.bin has 0 bytes"),
    (lambda folder: (folder / "batches.meta.txt").unlink(), "batches.meta.txt"),
    (lambda folder: (folder / "batches.meta.txt").write_text("cat\ndog\n"), "names 2 classes"),
    (lambda folder: (folder / "batches.meta.txt").write_bytes(b"\xff\xfe\n" * 10), "batches.meta.txt"),
    (full_but_one, "lacks data_batch_5.bin"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[said for _, said in SPOILED])
def test_a_spoiled_cifar10_is_one_error_that_names_the_file(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=said):
        cifar10(tmp_path).origin()


def test_a_file_that_shrinks_while_it_is_used_makes_bad_images(tmp_path: Path) -> None:
    images = cifar10(write_cifar10(tmp_path)).split("test")
    (tmp_path / "test_batch.bin").write_bytes((tmp_path / "test_batch.bin").read_bytes()[: 2 * CIFAR10_RECORD + 5])
    assert images[1][1] == 1
    with pytest.raises(BadImageError, match=r"test_batch.bin ends before image 2"):
        images[2]
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(BadImageError, match=r"test_batch\.bin"):
        images[0]


@fuzz
@given(content=st.binary(max_size=40), times=st.integers(0, 3), extra=st.integers(0, 3))
def test_any_bytes_as_a_batch_are_images_or_one_error(content: bytes, times: int, extra: int, tmp_path: Path) -> None:
    write_cifar10(tmp_path, train=5, test=2)
    (tmp_path / "test_batch.bin").write_bytes((content + bytes(CIFAR10_RECORD - len(content))) * times + content[:extra])
    try:
        data = cifar10(tmp_path)
        data.origin()
        images = data.split("test")
        assert len(images) == times and all(0 <= images[n][1] <= 9 for n in range(times))
    except EdgejouleError as error:
        assert "test_batch.bin" in str(error)


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "huggingface", "webdataset"])
@pytest.mark.parametrize("path", ["", "\0", "a\0/*.tar", "~nobody-at-all/x", "x" * 5000, "\ud800", "/dev/null", "[", "{a,b"])
def test_a_path_that_can_be_none_is_one_error(name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if name == "huggingface":
        pytest.importorskip("datasets")
    data = type(registry.create("data", f"{name}(path='x')"))(path=path)
    assert isinstance(data.dataset, str)
    data.probe()
    for ask in (lambda: data.classes, data.origin, lambda: data.split("train")):
        with pytest.raises(DataError):
            ask()


def test_importing_the_leaves_is_light() -> None:
    import subprocess
    import sys

    modules = ", ".join(sorted({target.split(":")[0] for target in LEAVES.values()}))
    script = (
        f"import {modules}, sys; print([m for m in ('torch', 'sklearn', 'datasets', 'webdataset', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
