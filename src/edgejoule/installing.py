"""Making a worker environment: an empty virtual environment, this installation behind it, and pip for what is missing or conflicts.

What this installation has is never replaced: torch, torchvision and numpy keep their versions, and where a requirement asks for another
version of something else, the environment gets its own copy. A marker is written last, so that a killed installation is never used.
Standard library and this installation's pip; starts no worker. ``environments.py`` is what may be installed and where it lies.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import edgejoule
from edgejoule import environments
from edgejoule.environments import Environment
from edgejoule.errors import BackendError, OutputError
from edgejoule.processes import end_group

try:
    import fcntl
except ImportError:  # Windows: two installers at once would then disturb each other
    fcntl = None  # type: ignore[assignment]

PARENT = "edgejoule_parent.pth"  # read by the environment's interpreter at its start, after its own packages
KEPT = ("torch", "torchvision", "numpy")  # what is compiled against them must never see another version
# Of the user's own pip settings, those that say where packages come from; a target, prefix or user site would lead them astray.
SOURCES = {"INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "TRUSTED_HOST", "CERT", "CLIENT_CERT", "PROXY", "CONFIG_FILE"}
SOURCES |= {"DEFAULT_TIMEOUT", "TIMEOUT", "RETRIES", "CACHE_DIR", "NO_CACHE_DIR", "KEYRING_PROVIDER"}
IMPORT_S = 600.0
TAIL = 30  # lines of pip's that are kept for the error

Notify = Callable[[str], None]


def install(name: str, notify: Notify) -> str:
    """Make the environment where it cannot be used yet; its interpreter. ``notify`` gets a line for each step.

    Raises UnknownNameError, BackendError (pip fails: offline, disk full, conflict; or what was installed cannot be imported) and
    OutputError (the folder cannot be written). Whatever happens, a folder without its marker is left unused.
    """
    environment = environments.environment_of(name)
    if (python := environments.python_of(name)) is not None:
        notify(f"{name} can be used already, with {python}")
        return python
    if importlib.util.find_spec("torch") is None:
        raise BackendError(f"the environment {name} needs torch beside it, which is not installed: pip install 'edgejoule[host]'")
    folder = environments.folder_of(name)
    with _writing(folder), _sole_installer(folder, notify) as lock:
        if (found := environments.python_of(name)) is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)  # half-made, damaged or another installation's
        try:
            _make(folder, notify)
            _fill(environment, folder, notify, lock)
            _try_imports(environment, folder, notify)
            _mark(environment, folder)
            importlib.invalidate_caches()  # this process may have looked at the folder before
        except BaseException:  # Ctrl-C too
            shutil.rmtree(folder, ignore_errors=True)
            raise
    python = str(environments.interpreter(folder))
    notify(f"{name} is ready: {python}")
    return python


# ---------------------------------------------------------------- the steps


def _make(folder: Path, notify: Notify) -> None:
    """An empty virtual environment that sees this installation's packages after its own."""
    notify(f"making {folder}")
    # Not importlib.util.find_spec: setuptools takes any look for pip for pip running, and cannot be imported itself from then on (3.11).
    has_pip = PathFinder.find_spec("pip") is not None
    argv = [sys.executable, "-I", "-m", "venv", *(["--without-pip"] if has_pip else []), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[: environments.SHOWN]
        raise BackendError(f"python -m venv failed ({said}): install pip into this installation, or your system's python3-venv package")
    # addsitedir reads the .pth files there, so that editable installations come along; a plain line would not
    lines = [f"import site; site.addsitedir({place!a})" for place in sites()]
    (environments.packages_of(folder) / PARENT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _fill(environment: Environment, folder: Path, notify: Notify, lock: int) -> None:
    """pip, run by the environment's interpreter: it sees this installation's packages as there, and may not remove them."""
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{package}=={version}\n" for package, version in _versions(KEPT).items()), encoding="utf-8")
    argv = [str(environments.interpreter(folder)), "-E", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    argv += ["--no-compile", "--no-warn-conflicts", "--progress-bar", "off", "--constraint", str(constraints), *environment.requirements]
    notify(f"installing {', '.join(environment.requirements)}: minutes, and up to 1 GB")
    # pip holds the lock too: where this process is killed, nobody begins anew before pip has ended
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=pip_variables(dict(os.environ)),
        start_new_session=True,
        pass_fds=(lock,) if fcntl is not None else (),
    )
    assert process.stdout is not None  # it is a pipe
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        for line in process.stdout:
            tail.append(line.strip())
            if told := condensed(line):
                notify(told)
        code = process.wait()
    finally:
        end_group(process)
    if code:
        raise BackendError(f"pip could not install the environment {environment.name} ({last_words(tail)}): {_advice(tail, folder)}")


def _try_imports(environment: Environment, folder: Path, notify: Notify) -> None:
    notify(f"trying whether {', '.join(environment.imports)} can be imported")
    script = "; ".join(f"import {module}" for module in environment.imports)
    argv = [str(environments.interpreter(folder)), "-E", "-c", script]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=IMPORT_S, cwd=folder)
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"the environment {environment.name} was installed, but its import hangs: try again on a quieter machine"
        ) from None
    if done.returncode:
        said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
        raise BackendError(
            f"the environment {environment.name} was installed, but cannot be imported ({said[: environments.SHOWN]}): "
            "see what its package needs of the system"
        )


def _mark(environment: Environment, folder: Path) -> None:
    marker = folder / environments.MARKER
    draft = marker.with_suffix(".draft")
    draft.write_text(json.dumps({**environments.facts(environment), "sites": sites()}, indent=1), encoding="utf-8")
    draft.replace(marker)


# ---------------------------------------------------------------- pip, this installation, and the folder


def sites() -> list[str]:
    """This installation's package folders; before them where this edgejoule comes from, if that is none of them."""
    packages = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    source = str(Path(edgejoule.__file__).parents[1])
    found = packages if source in packages else [source, *packages]
    return list(dict.fromkeys(place for place in found if Path(place).is_dir()))


def pip_variables(variables: dict[str, str]) -> dict[str, str]:
    """The environment variables for pip: without those that would make it install elsewhere."""
    kept = {name: value for name, value in variables.items() if not name.startswith("PIP_") or name.removeprefix("PIP_") in SOURCES}
    return {**kept, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}


def condensed(line: str) -> str:
    """A line of pip's for people; empty for most of them."""
    words = line.strip()
    if (found := re.match(r"Downloading (\S+?)-\d\S* \((.+)\)", words)) and re.search(r"\d{2,}(\.\d+)? MB|GB", found[2]):
        return f"downloading {found[1].rpartition('/')[2]} ({found[2]})"
    if words.startswith("Installing collected packages:"):
        return f"putting {words.count(',') + 1} packages in place"
    if words.startswith("WARNING: Retrying"):
        return "the package index does not answer, trying again"
    return ""


def last_words(tail: deque[str]) -> str:
    """What pip gives as its reason, on one line."""
    errors = [line.removeprefix("ERROR:").strip() for line in tail if line.startswith("ERROR:")]
    told = errors[-1] if errors else next((line for line in reversed(tail) if line), "it said nothing")
    return told[: environments.SHOWN].rstrip(". ")


def _advice(tail: deque[str], folder: Path) -> str:
    text = "\n".join(tail)
    if "Errno 28" in text or "No space left" in text:
        return f"free some space, or name another folder than {folder.parent} in EDGEJOULE_ENVIRONMENTS"
    if "conflict" in text.lower():
        return "make a new virtual environment with edgejoule alone and install there"
    return "check the network and pip's own settings (PIP_INDEX_URL), and run the same command again"


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@contextlib.contextmanager
def _sole_installer(folder: Path, notify: Notify) -> Iterator[int]:
    """Waits until no other process makes this environment, and lets none begin; gives the lock's descriptor."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("ab") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notify(f"waiting for another process that installs {folder.name}")
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError:
                notify(f"{folder.parent} cannot be locked: do not install {folder.name} twice at once")
        yield stream.fileno()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {folder} ({error.strerror or error}): free some space, or name another folder in EDGEJOULE_ENVIRONMENTS"
        ) from error
