"""An artifact on disk: a folder with ``manifest.json`` and the files that it lists, each with its size and sha256.

Read and written on hosts and boards alike: standard library and records only. Knows nothing of runtimes: a file that
passes here is the file that was compiled, not necessarily one that this machine can run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from edgejoule.errors import ArtifactError, OutputError
from edgejoule.plain import decode, encode
from edgejoule.records import Artifact, ArtifactFile

NAME = "manifest.json"
BLOCK_BYTES = 1 << 20


def write(folder: Path, artifact: Artifact) -> None:
    """Writes ``folder/manifest.json`` in one step, so that a reader sees the old one or the new one. Raises OutputError."""
    target = folder / NAME
    partial = folder / f"{NAME}.partial"
    try:
        partial.write_text(json.dumps(encode(dataclasses.replace(artifact, folder="")), indent=1), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise OutputError(
            f"cannot write {target} ({error.strerror or error}): free some space or choose a folder that can be written"
        ) from error


def read(folder: Path) -> Artifact:
    """The artifact in a folder, after comparing every listed file's size and sha256.

    Raises ArtifactError for a manifest that is missing or malformed, and for a file that is missing, changed or outside the folder.
    """
    artifact = _parse(folder)
    names = [file.name for file in artifact.files]
    if not names or len(set(names)) != len(names):
        raise ArtifactError(f"{folder / NAME} lists {'a file twice' if names else 'no files'}, which no compilation does: compile again")
    for file in artifact.files:
        _check_name(folder, file.name)
        _check_file(folder, file)
    if artifact_sha256(artifact.files) != artifact.sha256:
        raise ArtifactError(f"{folder / NAME} was changed: its sha256 is not that of the files it lists; compile again")
    return dataclasses.replace(artifact, folder=str(folder))


def hash_files(folder: Path, paths: Iterable[Path | str]) -> tuple[ArtifactFile, ...]:
    """Names (relative to ``folder``, with '/'), sizes in bytes and sha256 of files in a folder, sorted by name.

    Raises ArtifactError for a path that is missing, unreadable or outside the folder.
    """
    files = []
    for path in paths:
        try:
            name = (folder / path).relative_to(folder).as_posix()
            _check_name(folder, name)
            files.append(ArtifactFile(name, _sha256(folder / name), (folder / name).stat().st_size))
        except ValueError as error:
            raise ArtifactError(f"{path} lies outside {folder}: an artifact's files must all be in its own folder") from error
        except OSError as error:
            raise ArtifactError(f"cannot read {path} ({error.strerror or error}): compile again") from error
    return tuple(sorted(files, key=lambda file: file.name))


def artifact_sha256(files: Iterable[ArtifactFile]) -> str:
    """Sha256 over one line ``name<TAB>sha256`` a file, sorted: the artifact's identity, wherever the folder lies."""
    lines = sorted(f"{file.name}\t{file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _parse(folder: Path) -> Artifact:
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} holds no {NAME}: name a folder that edgejoule compile has written") from error
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or a path with a null
        raise ArtifactError(f"cannot read {path} ({_first_line(error)}): compile again") from error
    try:
        return decode(Artifact, json.loads(text))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or from another version of edgejoule ({_first_line(error)}): compile again") from error


def _check_name(folder: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    plain = name == "/".join(parts) and not name.startswith("/") and name.isprintable() and not set(name) & set('\\:"')
    if not plain or not parts or ".." in parts or name == NAME:
        raise ArtifactError(f"{folder / NAME} lists {name[:80]!r}, which is no plain name inside the folder: do not use it, compile again")


def _check_file(folder: Path, file: ArtifactFile) -> None:
    path = folder / file.name
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: compile again, or copy the whole folder")
        if path.stat().st_size != file.bytes or _sha256(path) != file.sha256:
            raise ArtifactError(f"{path} is not the file that was compiled (its size or sha256 differs): compile again")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path} ({_first_line(error)}): compile again") from error


def _sha256(path: Path) -> str:
    seen = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            seen.update(block)
    return seen.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
