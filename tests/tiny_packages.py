"""Wheels of a few lines in a folder that pip reads instead of an index, and the environment that is made of them. Knows no test."""

from __future__ import annotations

import zipfile
from pathlib import Path

from edgejoule.environments import Environment

WORKER = """
import atexit, json, os, signal, sys, time
from edgejoule import environments
from edgejoule.errors import ModelError

def work(job):
    print("a library's chatter")
    os.system("echo more of it")
    atexit.register(os.system, "echo and a farewell")
    what = job["what"]
    if what == "where":
        import numpy, typing_extensions
        return {"numpy": numpy.__file__, "typing_extensions": typing_extensions.__file__, "prefix": sys.prefix, "path": sys.path}
    if what == "refuse":
        raise ModelError("it has no head: give it one")
    if what == "bug":
        raise ZeroDivisionError("a zero\\nsomewhere")
    if what == "full":
        raise OSError(28, "No space left on device")
    if what == "crash":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(0)
    if what == "hang":
        time.sleep(600)
    return {"echo": job}

if __name__ == "__main__":
    code = environments.answer(work)
    if "--fall" in os.environ.get("TINY", ""):
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(code)
"""
TINY = Environment("tiny", ("tinybackend==1.*",), ("tinybackend",), "is for tests")


def write(folder: Path) -> Path:
    """tinybackend 1.2, which asks for a typing_extensions older than any that is installed, and that one."""
    folder.mkdir()
    _wheel(folder, "tinybackend", "1.2", {"tinybackend/__init__.py": "", "tinybackend/worker.py": WORKER}, ["typing_extensions==0.0.1"])
    _wheel(folder, "typing_extensions", "0.0.1", {"typing_extensions.py": "OLD = True\n"})
    _wheel(folder, "greedybackend", "1.0", {"greedybackend.py": ""}, ["numpy==0.0.1"])
    _wheel(folder, "numpy", "0.0.1", {"numpy.py": ""})
    _wheel(folder, "brokenbackend", "1.0", {"brokenbackend.py": "import nothing_of_that_name\n"})
    return folder


def _wheel(folder: Path, name: str, version: str, files: dict[str, str], needs: list[str] = []) -> None:  # noqa: B006
    info = f"{name}-{version}.dist-info"
    told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {need}\n" for need in needs)
    content = {
        **files,
        f"{info}/METADATA": told,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**content, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)
