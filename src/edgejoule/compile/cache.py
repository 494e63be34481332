"""The folder of compiled artifacts: one folder a build key, put in place whole or not at all, built by one process at a time.

A kill at any moment leaves a hidden staging folder, which the next build of that key clears. Knows no backend and no torch.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgejoule import manifest
from edgejoule.errors import ArtifactError, OutputError
from edgejoule.records import Artifact

try:
    import fcntl
except ImportError:  # Windows: two processes may then compile the same thing, and the first to finish wins
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger("edgejoule.compile")
FULL_BYTES = 1 << 20  # with less free space than this, a library's failure to write is a full disk


def find(cache: Path, key: str, quietly: bool = False) -> Artifact | None:
    """The artifact that was built under ``key``, all hashes checked; None if there is none, or (with a logged line) a damaged one."""
    folder = place(cache, key)
    if not folder.exists():
        return None
    try:
        artifact = manifest.read(folder)
        if artifact.build_key != key:
            raise ArtifactError(f"{folder} holds the artifact of another build")
    except ArtifactError as error:
        if not quietly:
            LOG.warning("a cached artifact is not used and will be built again: %s", error)
        return None
    return artifact


def place(cache: Path, key: str) -> Path:
    """Where the artifact of a build key lies."""
    return cache / "artifacts" / key


@contextlib.contextmanager
def sole_builder(cache: Path, key: str) -> Iterator[None]:
    """Waits until no other process builds this key, and lets none begin. Raises OutputError where the cache cannot be written."""
    path = cache / "artifacts" / f".{key}.lock"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    with stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOG.warning("waiting for another process that compiles the same artifact")
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError:
                LOG.warning("%s cannot be locked: do not compile the same artifact from two machines at once", path)
        yield


@contextlib.contextmanager
def staging(cache: Path, key: str) -> Iterator[Path]:
    """An empty folder beside the artifact's place, gone afterwards. Clears what killed builds of this key left behind."""
    home = cache / "artifacts"
    with writing(home):
        for left in home.glob(f".{key}.staging-*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{key}.staging-", dir=home))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(staged: Path, cache: Path, key: str) -> Artifact:
    """Renames a finished folder to its place and reads it there; if another process was first, that one's artifact stands."""
    target = place(cache, key)
    with writing(target):
        if target.exists() and (found := find(cache, key, quietly=True)) is not None:
            return found
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
    return manifest.read(target)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the system says against writing into OutputError; so too any failure while the disk is full."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {folder} ({error.strerror or error}): free some space, or name another cache folder in EDGEJOULE_CACHE"
        ) from error
    except Exception as error:
        if not isinstance(error, OutputError) and _is_full(folder):
            raise OutputError(f"the disk of {folder} is full: free some space, or name another cache folder in EDGEJOULE_CACHE") from error
        raise


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False
