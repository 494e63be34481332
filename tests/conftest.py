"""Fixtures that several test files share: a real PostgreSQL server of the tests' own, where the program is installed; Ctrl-C."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# As the command line has it: threads that spin for long make torch many times slower where anything else runs on the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A fresh database cluster on a Unix socket, gone after the tests."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = str(programs[-1] / "pg_ctl") if programs else shutil.which("pg_ctl")
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    if user and "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("running as root, and there is no user 'postgres' to run the server as")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, user)
    control = Path(found)
    options = {"check": True, "capture_output": True, "user": user, "cwd": folder, "timeout": 60}
    try:
        subprocess.run([control.with_name("initdb"), "-D", folder / "data", "-A", "trust", "-U", "postgres"], **options)
        server = f"-k {folder} -c listen_addresses= -c fsync=off"
        subprocess.run([control, "-D", folder / "data", "-o", server, "-l", folder / "log", "-w", "start"], **options)
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        subprocess.run([control, "-D", folder / "data", "-m", "immediate", "stop"], **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: a shell that starts tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
