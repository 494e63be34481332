"""A manifest survives its own reading, and nothing that was changed passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejoule import manifest
from edgejoule.errors import ArtifactError, OutputError
from edgejoule.records import Artifact
from tests.samples import artifact

SAME_FOLDER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.xml").write_bytes(b"<?xml")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.bin").write_bytes(bytes(range(256)) * 9000)
    manifest.write(tmp_path, of(tmp_path, ["model.xml", "weights/model.bin"]))
    return tmp_path


def of(folder: Path, names: list[str]) -> Artifact:
    files = manifest.hash_files(folder, names)
    return dataclasses.replace(artifact(), files=files, sha256=manifest.artifact_sha256(files), folder="elsewhere")


def edit(folder: Path, change: Any) -> None:
    fields = json.loads((folder / manifest.NAME).read_text())
    change(fields)
    (folder / manifest.NAME).write_text(json.dumps(fields))


def test_round_trip(folder: Path) -> None:
    found = manifest.read(folder)
    assert found == dataclasses.replace(of(folder, ["weights/model.bin", "model.xml"]), folder=str(folder))
    assert json.loads((folder / manifest.NAME).read_text())["folder"] == ""
    assert not list(folder.glob("*.partial"))


def test_identity_is_of_names_and_contents_not_of_the_place(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("other") / "moved"
    folder.rename(moved)
    found = manifest.read(moved)
    assert found.sha256 == manifest.artifact_sha256(reversed(found.files))
    renamed = [dataclasses.replace(found.files[0], name="other.xml"), found.files[1]]
    assert manifest.artifact_sha256(renamed) != found.sha256


def test_a_changed_file_of_the_same_size_is_named(folder: Path) -> None:
    (folder / "model.xml").write_bytes(b"<!xml")
    with pytest.raises(ArtifactError, match=r"model\.xml is not the file that was compiled.*compile again"):
        manifest.read(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "weights" / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is missing: compile again"):
        manifest.read(folder)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        manifest.read(tmp_path)
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        manifest.read(tmp_path / "absent")


def test_hashes_that_do_not_add_up(folder: Path) -> None:
    edit(folder, lambda fields: fields.update(sha256="0" * 64))
    with pytest.raises(ArtifactError, match="its sha256 is not that of the files"):
        manifest.read(folder)


@pytest.mark.parametrize("change", [lambda f: f.update(files=[]), lambda f: f.update(files=f["files"] * 2)])
def test_no_files_or_one_twice(change: Any, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match="lists"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "a/../../secret",
        "..",
        ".",
        "",
        "./model.xml",
        "a//b",
        "a\\b",
        "C:x",
        "a\x00b",
        "a\nb",
        "\ud800",
        "manifest.json",
    ],
)
def test_names_that_are_not_plain(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"s")
    edit(folder, lambda fields: fields["files"][0].update(name=name))
    with pytest.raises(ArtifactError, match="no plain name inside the folder"):
        manifest.read(folder)


def test_another_version_is_refused_with_its_field(folder: Path) -> None:
    edit(folder, lambda fields: fields.update(colour="red"))
    with pytest.raises(ArtifactError, match=r"another version of edgejoule \(Artifact: unknown field colour\): compile again"):
        manifest.read(folder)


def test_files_outside_are_not_hashed(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="lies outside"):
        manifest.hash_files(folder / "weights", [folder / "model.xml"])
    with pytest.raises(ArtifactError, match="no plain name"):
        manifest.hash_files(folder / "weights", ["../model.xml"])
    with pytest.raises(ArtifactError, match="cannot read"):
        manifest.hash_files(folder, ["absent"])


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*manifest\.json"):
        manifest.write(folder / "model.xml", artifact())


@SAME_FOLDER
@given(
    noise=st.one_of(
        st.binary(max_size=300), st.recursive(st.none() | st.floats() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
    )
)
def test_any_bytes_are_read_or_refused(noise: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(noise)
    with pytest.raises(ArtifactError):
        manifest.read(folder)


@SAME_FOLDER
@given(data=st.data())
def test_any_mutation_is_read_or_refused(data: st.DataObject, folder: Path) -> None:
    manifest.write(folder, of(folder, ["model.xml", "weights/model.bin"]))
    fields = json.loads((folder / manifest.NAME).read_text())
    node: Any = fields
    while True:
        key = data.draw(st.sampled_from(list(node)) if isinstance(node, dict) else st.integers(0, len(node) - 1))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), st.text(), st.lists(st.text()), st.just({"a": 1})
    )
    node[key] = data.draw(values)
    (folder / manifest.NAME).write_text(json.dumps(fields))
    try:
        found = manifest.read(folder)
    except ArtifactError:
        return
    assert found.sha256 == manifest.artifact_sha256(found.files)


def test_deep_json_is_refused(folder: Path) -> None:
    (folder / manifest.NAME).write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="damaged"):
        manifest.read(folder)
