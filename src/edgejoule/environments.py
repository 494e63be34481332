"""Worker environments: for backends whose packages do not go together with this installation's, or are too large for everyone.

An environment is an overlay: a virtual environment with packages of its own, in front of this installation's, so that torch, numpy and
edgejoule itself come along. It lies in ``$EDGEJOULE_ENVIRONMENTS/<name>``, else in ``~/.local/share/edgejoule/environments/<name>``;
``installing.py`` makes it. A job goes there as JSON, and large things as files. Standard library only; knows no backend and no network.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import edgejoule
from edgejoule.errors import BackendError, EdgejouleError, UnknownNameError, rebuild
from edgejoule.processes import die_with_parent, end_group, signal_name, take_stdout

MARKER = "ready.json"  # written last: what lies in a folder without it was never finished
SHOWN = 300  # characters of a worker's last words


@dataclass(frozen=True, slots=True)
class Environment:
    """What an environment holds: pip's requirements, the top-level modules that must be there, and what it is for."""

    name: str
    requirements: tuple[str, ...]
    imports: tuple[str, ...]
    why: str


_TRIED = (  # versions that work together with torch 2.13: executorch 1.5 needs torch 2.14
    Environment("coreml", ("coremltools==9.*", "cattrs<26"), ("coremltools",), "writes Core ML programs; they run on a Mac"),
    Environment(
        "executorch",
        ("executorch==1.4.*", "torchao==0.18.*", "cattrs<26"),
        ("executorch", "torchao"),
        "writes and runs ExecuTorch programs",
    ),
    Environment(
        "litert",
        ("litert-torch==0.10.*", "ai-edge-litert==2.3.*", "ai-edge-quantizer==0.10.*"),
        ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        "writes and runs LiteRT files; its converter asks for older packages than this installation has",
    ),
    Environment("mnn", ("MNN==3.6.*",), ("MNN",), "writes and runs MNN files"),
    Environment("ncnn", ("ncnn==1.0.20261020", "pnnx==20261020"), ("ncnn", "pnnx"), "writes and runs ncnn files"),
)
TABLE: Mapping[str, Environment] = MappingProxyType({one.name: one for one in _TRIED})


def environment_of(name: str) -> Environment:
    """Raises UnknownNameError for a name that is not in the table."""
    if name not in TABLE:
        raise UnknownNameError("environment", name, TABLE, f"known: {', '.join(TABLE)}")
    return TABLE[name]


def python_of(name: str) -> str | None:
    """The interpreter that has the environment's modules: this one where it has them all, else the environment's; None if neither.

    Raises UnknownNameError.
    """
    environment = environment_of(name)
    if all(_is_here(module) for module in environment.imports):
        return sys.executable
    return str(interpreter(folder_of(name))) if fault(environment) is None else None


def missing(name: str) -> str | None:
    """One sentence with the remedy where the environment cannot be used, None where it can. Raises UnknownNameError."""
    return None if python_of(name) is not None else fault(environment_of(name))


def versions(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    """{package: version} of those that are installed, as the environment's interpreter would see them. Starts nothing."""
    python = python_of(name)
    if python is None or python == sys.executable:
        path = sys.path
    else:
        path = [str(packages_of(folder_of(name))), *_marked(folder_of(name)).get("sites", [])]
    found = {package: next(iter(importlib.metadata.distributions(name=package, path=path)), None) for package in packages}
    return {package: one.version for package, one in found.items() if one is not None}


def packages_named(name: str) -> tuple[str, ...]:
    """The packages that an environment's requirements name."""
    return tuple(re.split(r"[^\w.-]", requirement)[0] for requirement in environment_of(name).requirements)


def survey() -> list[dict[str, Any]]:
    """Every environment: name, ok, remedy (None where it can be used)."""
    return [{"name": name, "ok": (remedy := missing(name)) is None, "remedy": remedy} for name in TABLE]


# ---------------------------------------------------------------- where it lies, and whether it is whole


def root() -> Path:
    """The folder of all environments."""
    named = os.environ.get("EDGEJOULE_ENVIRONMENTS", "")
    return Path(named).absolute() if named else Path.home() / ".local" / "share" / "edgejoule" / "environments"


def folder_of(name: str) -> Path:
    return root() / name


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def packages_of(folder: Path) -> Path:
    """The environment's own site-packages."""
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / ("Lib/site-packages" if os.name == "nt" else f"lib/{minor}/site-packages")


def facts(environment: Environment) -> dict[str, Any]:
    """What must be as it was when the environment was made."""
    return {
        "requirements": list(environment.requirements),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": _torch(),
        "home": sys.prefix,
        "source": str(Path(edgejoule.__file__).parents[1]),
    }


def fault(environment: Environment) -> str | None:
    """Why the environment in its folder cannot be used, with the remedy; None where it can. Looks at no other place."""
    folder, name = folder_of(environment.name), environment.name
    remedy = f"edgejoule doctor --install {name}"
    if not folder.exists():
        return f"the environment {name} is not installed ({environment.why}): {remedy}"
    marked = _marked(folder)
    if not marked or not interpreter(folder).exists():
        return f"the environment in {folder} was not finished or is damaged: {remedy}"
    for fact, wanted in facts(environment).items():
        if marked.get(fact) != wanted:
            seen = f"{fact} was {_shown(marked.get(fact))} and is {_shown(wanted)} now"
            return f"the environment in {folder} was made for another installation ({seen}): {remedy}"
    places = [str(packages_of(folder)), *marked.get("sites", [])]
    absent = [module for module in environment.imports if PathFinder.find_spec(module, places) is None and not _is_here(module)]
    if absent:  # deleted by hand or by a half-finished clean-up: the marker alone would make it beyond repair
        return f"the environment in {folder} is damaged ({', '.join(absent)} cannot be found in it): {remedy}"
    return None


def _marked(folder: Path) -> dict[str, Any]:
    """What the marker says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(fact: Any) -> str:
    return ", ".join(map(str, fact)) if isinstance(fact, list) else str(fact or "not there")


@functools.lru_cache(maxsize=1)
def _torch() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_here(module: str) -> bool:
    """Whether this interpreter finds a top-level module. A mere folder of that name in the current directory is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is not None:
        return spec is not None
    return any(Path(place).parent.name in ("site-packages", "dist-packages") for place in spec.submodule_search_locations or ())


# ---------------------------------------------------------------- running something there


def argv_of(name: str, module: str) -> list[str] | None:
    """The command that runs a module there; None where the environment cannot be used.

    An environment's interpreter is told to ignore PYTHONPATH and the current directory, which might hide its packages behind others.
    """
    python = python_of(name)
    if python is None or python == sys.executable:
        return python and [python, "-m", module]  # type: ignore[return-value]
    return [python, "-E", *(["-P"] if sys.version_info >= (3, 11) else []), "-m", module]


def run(name: str, module: str, job: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any]:
    """Run ``python -m module`` there with a job (JSON values, absolute paths); what its ``answer`` returned.

    Raises what the worker raised, and BackendError where the environment cannot be used or the worker dies (naming the signal), hangs
    or answers nonsense.
    """
    argv = argv_of(name, module)
    if argv is None:
        raise BackendError(missing(name))
    with tempfile.TemporaryFile() as said:
        code, answered = _finish(argv, json.dumps(job), timeout_s, said)
        if answered is None:
            raise BackendError(f"{module} did not end within {timeout_s:g} s and was killed: use a smaller network or another backend")
        found = _last_answer(answered)
        if found is None:
            how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code} and no answer"
            raise BackendError(f"{module} {how}{_last_words(said)}: use another backend, or install again (doctor --install {name})")
    if "ok" in found:
        done: Mapping[str, Any] = found["ok"]
        return done
    raise rebuild(found["error"])


def answer(work: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> int:
    """What a worker module's ``main`` calls: read the job on stdin, call ``work``, print the answer; the process's exit code.

    Whatever libraries print goes to stderr. An error that is not ours becomes BackendError, or OutputError where a disk is full.
    """
    stream = take_stdout()
    try:
        die_with_parent()
        said: dict[str, Any] = {"ok": dict(work(json.loads(sys.stdin.read())))}
    except EdgejouleError as error:
        said = {"error": {"kind": type(error).__name__, "message": str(error)}}
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        advice = "free some space, or choose another folder" if full else "use another backend"
        kind, what = "OutputError" if full else "BackendError", " ".join(str(error).split())[:SHOWN]
        said = {"error": {"kind": kind, "message": f"the worker failed ({type(error).__name__}: {what}): {advice}"}}
    stream.write("\n" + json.dumps(said) + "\n")
    stream.flush()
    return 0 if "ok" in said else 2


def _finish(argv: list[str], stdin: str, timeout_s: float, said: IO[bytes]) -> tuple[int, str | None]:
    """Exit code and standard output; None for the output where time was up. The whole process group ends with the call."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=said, encoding="utf-8", errors="replace", start_new_session=True)
    try:
        written, _ = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return 0, None
    finally:
        end_group(process)
    return process.returncode, written


def _last_answer(written: str) -> dict[str, Any] | None:
    lines = [line for line in written.splitlines() if line.strip()]
    with contextlib.suppress(ValueError):
        found = json.loads(lines[-1] if lines else "")
        if isinstance(found, dict) and (isinstance(found.get("ok"), dict) or "error" in found):
            return found
    return None


def _last_words(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    return f" ({lines[-1][:SHOWN]})" if lines else ""
