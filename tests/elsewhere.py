"""Tests of a backend whose runtime is in a worker environment: run by that environment's interpreter, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgejoule import environments, registry

ROOT = Path(__file__).parents[1]


def interpreter_of(backend: str) -> str | None:
    """The interpreter that must load this backend's files, where it is another one than this."""
    environment = getattr(registry.create("backend", backend), "environment", None)
    python = environments.python_of(environment) if environment else None
    return None if python == sys.executable else python


def run_tests(python: str, *tests: str) -> None:
    """Node ids or files, relative to the project. Fails with what pytest printed there."""
    argv = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(argv)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}", pytrace=False)


def run_file_there(name: str, file: str) -> None:
    """A test file by the environment's interpreter; skips where the environment is not installed."""
    if (missing := environments.missing(name)) is not None:
        pytest.skip(missing)
    python = environments.python_of(name)
    assert python is not None and python != sys.executable
    run_tests(python, str(Path(file).relative_to(ROOT)))
