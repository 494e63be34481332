"""WebDataset shards as data: written by webdataset's own writer or by tarfile, read by position; patterns; damaged shards."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule import registry
from edgejoule.datasets.webdataset import expand
from edgejoule.errors import BadImageError, DataError, EdgejouleError, SpecError
from tests.labelled_samples import encoded, pixels, write_webdataset

fuzz = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = "validation=0.0"


def shards(path: object, options: str = WHOLE) -> Any:
    return registry.create("data", f"webdataset(path={str(path)!r}, {options})")


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_samples_are_read_by_position_as_webdataset_reads_them_in_turn(tmp_path: Path) -> None:
    import webdataset

    pattern = write_webdataset(tmp_path, each=7, shards=3)
    images = shards(pattern).split("train")
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False).decode("pil"))
    assert len(images) == len(theirs) == 21
    for index in reversed(range(21)):
        image, label = images[index]
        assert label == theirs[index]["cls"] and image.tobytes() == theirs[index]["png"].tobytes()
        assert images.key(index) == f"train-{index // 7:03d}.tar/{theirs[index]['__key__']}"
        assert np.array_equal(np.asarray(image), pixels(label, index))


def test_a_share_validates_and_shards_of_their_own_test(tmp_path: Path) -> None:
    pattern = write_webdataset(tmp_path, each=30)
    held = write_webdataset(tmp_path, each=5, shards=1, classes=5, name="test")
    data = shards(pattern, f"test_path={held!r}")
    parts = {part: data.split(part) for part in ("train", "validation", "test")}
    assert len(parts["train"]) + len(parts["validation"]) == 60 and len(parts["validation"]) > 0 and len(parts["test"]) == 5
    assert data.classes == ("0", "1", "2", "3", "4") and [parts["test"][n][1] for n in range(5)] == [0, 1, 2, 3, 4]
    assert len({images.key(n) for images in parts.values() for n in range(len(images))}) == 65
    plain = shards(pattern, "test=0.2")
    assert len(plain.split("test")) > 0 and len(shards(pattern, "test=0.0").split("test")) == 0
    assert len({data.origin(), plain.origin(), shards(pattern, "test=0.3").origin()}) == 3


def test_the_origin_is_a_copys_too(tmp_path: Path) -> None:
    one, two = (shards(write_webdataset(tmp_path / name)) for name in "ab")
    assert one.origin() == two.origin() and one.dataset == "a"
    assert shards(write_webdataset(tmp_path / "b", each=15)).origin() != one.origin()


def test_class_names_come_from_the_option_or_from_beside_the_shards(tmp_path: Path) -> None:
    pattern = write_webdataset(tmp_path)
    assert shards(pattern).classes == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("ant\nbee\n\ncat\n")
    assert shards(pattern).classes == ("ant", "bee", "cat")
    assert shards(pattern, "names=('x', 'y', 'z')").classes == ("x", "y", "z")
    (tmp_path / "classes.txt").write_text("ant\nbee\nant\n")
    with pytest.raises(DataError, match=r"classes.txt names 'ant' twice"):
        assert shards(pattern).classes
    (tmp_path / "classes.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"classes\.txt"):
        assert shards(pattern).classes


def test_labels_may_be_names_and_suffixes_others(tmp_path: Path) -> None:
    content = [(f"{n}.{suffix}", part) for n, name in enumerate(["bee", "ant"]) for suffix, part in
               (("seg.png", b"no image"), ("bild.PNG", encoded(n, 0)), ("klasse", name.encode() + b"\n"))]  # fmt: skip
    data = shards(write_tar(tmp_path / "x.tar", content), "image='bild.png', label='klasse', names=['ant', 'bee'], validation=0.0")
    images = data.split("train")
    assert [images[n][1] for n in range(2)] == [1, 0] and images[1][0].size == (32, 32)


def test_of_several_images_the_first_listed_suffix_counts(tmp_path: Path) -> None:
    parts = {"webp": b"no", "cls": b"0", "png": encoded(0, 0), "txt": b""}
    members = [(f"{n}.{suffix}", parts[suffix]) for n, order in enumerate((parts, reversed(parts))) for suffix in order]
    images = shards(write_tar(tmp_path / "x.tar", members), "image='jpg; .PNG;webp', validation=0.0").split("train")
    assert images[0][0].tobytes() == images[1][0].tobytes() and len(images) == 2


def test_test_shards_called_as_training_shards_are_have_keys_of_their_own(tmp_path: Path) -> None:
    data = shards(write_webdataset(tmp_path / "a"), f"validation=0.0, test_path={write_webdataset(tmp_path / 'b')!r}")
    train, test = data.split("train"), data.split("test")
    assert len({images.key(n) for images in (train, test) for n in range(32)}) == 64


def test_a_sample_without_image_or_label_is_a_bad_one_and_the_others_are_not_lost(tmp_path: Path) -> None:
    members = [
        ("a/1.png", encoded(0, 1)),
        ("a/1.cls", b"0"),
        ("a/2.png", encoded(1, 2)),
        ("a/3.cls", b"1"),
        ("a/4.png", b""),
        ("a/4.cls", b"1"),
    ]
    members += [(f"a/{n}.{suffix}", part) for n, label in ((5, b"-1"), (6, b"dog"), (7, b"7" * 30), (8, b"\xff")) for suffix, part in
                (("png", encoded(0, n)), ("cls", label))]  # fmt: skip
    data = shards(write_tar(tmp_path / "x.tar", members))
    images = data.split("train")
    assert len(images) == 8 and images[0][1] == 0 and data.classes == ("0", "1")
    for index, said in ((1, "label"), (2, "no image"), (3, "cannot read the image"), *((n, "label") for n in (4, 5, 6, 7))):
        with pytest.raises(BadImageError, match=said) as caught:
            images[index]
        assert f"a/{index + 1}" in str(caught.value) and "x.tar" in str(caught.value)


def test_members_of_all_kinds_and_long_names_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(path, "w", format=format_) as tar:
            folder = tarfile.TarInfo("d.png")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            for name in ("d" * 90 + "/" + "é" * 40, "README", "d/.hidden", "d/plain"):
                for suffix, content in (("png", encoded(0, 0)), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{name}.{suffix}" if name != "README" else name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        images = shards(path).split("train")
        assert [images.key(n)[-7:] for n in range(len(images))] == ["é" * 7, "d/plain"]
        assert images[0][0].tobytes() == images[1][0].tobytes()


def test_a_pickled_split_is_small_and_reads_the_same(tmp_path: Path) -> None:
    images = shards(write_webdataset(tmp_path, each=60)).split("train")
    content = pickle.dumps(images)
    assert len(content) < 120 * 100 and pickle.loads(content)[119][0].tobytes() == images[119][0].tobytes()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..010}.tar", ["a-008.tar", "a-009.tar", "a-010.tar"]),
        ("a-{9..11}", ["a-9", "a-10", "a-11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{x}{}{1..}", ["{x}{}{1..}"]),
    ],
)
def test_brace_patterns_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..999999}{0..999999}", "{0..9}" * 40, "{1..2}" * 1000])
def test_a_pattern_of_too_many_shards_is_refused_before_they_are_listed(pattern: str) -> None:
    with pytest.raises(DataError, match="more than"):
        expand(pattern)


def test_globs_and_names_with_brackets_find_shards_in_order(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "a[1]", each=4, shards=3)
    assert len(shards(tmp_path / "a[1]" / "train-001.tar").split("train")) == 4
    images = shards(tmp_path / "a*" / "*.tar").split("train")
    assert [images.key(n)[:13] for n in (0, 4, 11)] == ["train-000.tar", "train-001.tar", "train-002.tar"]


@pytest.mark.parametrize(
    "path", ["https://host/x-{0..9}.tar", "s3://bucket/x.tar", "pipe:cat x.tar", "hf://datasets/x/y.tar", "GS://b/x.tar"]
)
def test_remote_shards_are_refused_with_what_to_do(path: str) -> None:
    data = shards(path)
    assert "copy them to a local folder" in data.probe()
    with pytest.raises(DataError, match="copy them to a local folder"):
        data.split("train")


def gzipped(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes()))


TWO = [("1.png", encoded(0, 0)), ("1.cls", b"0")]
SECOND = 512 + (len(TWO[0][1]) + 511) // 512 * 512  # where the second header begins


def flipped(path: Path) -> None:
    content = bytearray(write_tar(path, TWO).read_bytes())
    content[SECOND + 3] ^= 0xFF
    path.write_bytes(content)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_at_a_header(path: Path) -> None:
    path.write_bytes(write_tar(path, TWO).read_bytes()[:SECOND])


def without_an_end(path: Path) -> None:
    path.write_bytes(write_tar(path, TWO).read_bytes()[: SECOND + 1024])


def doubled(path: Path) -> None:
    write_tar(path, [("1.png", encoded(0, 0)), ("2.png", encoded(0, 0)), ("1.cls", b"0"), ("2.cls", b"0")])


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (gzipped, "is compressed"),
    (flipped, f"damaged or cut short at byte {SECOND}"),
    (without_an_end, f"damaged or cut short at byte {SECOND + 1024}"),
    (halved, "train-001.tar"),
    (cut_at_a_header, f"damaged or cut short at byte {SECOND}:"),
    (doubled, "has the sample 1 twice"),
    (lambda path: path.write_bytes(b""), "train-001.tar"),
    (lambda path: path.write_bytes(b"not a tar file" * 100), "train-001.tar"),
    (lambda path: path.unlink(), "no shard .*train-001.tar"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[said for _, said in SPOILED])
def test_a_damaged_shard_is_one_error_that_names_it(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    pattern = write_webdataset(tmp_path)
    spoil(tmp_path / "train-001.tar")
    with pytest.raises(DataError, match=said):
        shards(pattern).split("train")


def test_options_that_fit_no_sample_are_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    pattern = write_webdataset(tmp_path)
    with pytest.raises(DataError, match="cls, png"):
        shards(pattern, "image='tiff'").split("train")
    with pytest.raises(DataError, match="cls, png"):
        shards(pattern, "label='json'").split("train")
    with pytest.raises(DataError, match="in both path and test_path"):
        shards(pattern, f"test_path={str(tmp_path / '*-001.tar')!r}").split("train")
    with pytest.raises(SpecError, match="not both"):
        shards(pattern, "test=0.1, test_path='x.tar'")


def test_a_shard_that_shrinks_while_it_is_used_makes_bad_images(tmp_path: Path) -> None:
    images = shards(write_webdataset(tmp_path)).split("train")
    halved(tmp_path / "train-001.tar")
    assert images[0][1] == 0
    with pytest.raises(BadImageError, match=r"train-001\.tar ends before"):
        images[31]


@fuzz
@given(data=st.data())
def test_any_spoiled_tar_file_is_samples_or_one_error(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    if not (tmp_path / "sound.tar").exists():
        write_tar(
            tmp_path / "sound.tar",
            [("é" * 60 + ".png", encoded(0, 0, (2, 2))), ("é" * 60 + ".cls", b"0"), ("2.png", b"x"), ("2.cls", b"1")],
        )
    content = bytearray((tmp_path / "sound.tar").read_bytes())[:6144]
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, 4200))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        images = shards(path).split("train")
        for index in range(len(images)):
            images.key(index).encode("utf-8")
            images[index]
    except EdgejouleError as error:
        assert str(error)
