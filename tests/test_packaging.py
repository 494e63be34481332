"""What pip installs: everything the package reads is in the wheel, every version is pinned, and without the extras nothing crashes."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edgejoule.cli import HOST, MEASURE
from edgejoule.plain import encode
from edgejoule.records import Job, Protocol, Workload
from tests.fakes.artifacts import onnx_artifact, write_images

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["edgejoule"]
RUNTIMES = ("onnxruntime", "openvino", "pynvml", "psutil")
CSV = "model,top1_pct,energy_mj\nvit_small,81.4,2448\nlevit_conv_192,79.86,1150\n"
PROTOCOL = Protocol("brief", 0.05, 2, 0.2, 0.05, 0.2, 5, 3, 3, 0.01, 0.02)
# Runs a module as if some packages were not installed: all finders look away from them.
WITHOUT = """
import runpy, sys
absent = set(sys.argv[1].split(","))
class Blind:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest): return None if name.partition(".")[0] in absent else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
sys.argv[:] = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def without(absent: tuple[str, ...], *argv: str, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, ",".join(absent), *argv]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, (done.stdout, done.stderr)
    return done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- metadata


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    package = ROOT / "src" / "edgejoule"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert not [name for name in files if not name.endswith(".py") and not any(fnmatch.fnmatch(name, pattern) for pattern in DATA)]
    assert not [folder for folder in package.rglob("*") if any(folder.glob("*.py")) and not (folder / "__init__.py").exists()]


def test_constraints_pin_all_that_the_extras_name_and_nothing_of_this_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    pinned = {name_of(line): line.partition("==")[2] for line in lines}
    wanted = [*PROJECT["dependencies"], *(r for extra in ("host", "test", "dev") for r in EXTRAS[extra])]
    assert not [requirement for requirement in wanted if "python_version" not in requirement and name_of(requirement) not in pinned]
    assert pinned["torch"] == "2.13.0"  # without a local part: a CPU build and a CUDA build both satisfy it


def test_the_host_has_all_that_a_board_has() -> None:
    for extra in ("measure", "onnxruntime", "openvino", "nvml"):
        assert set(EXTRAS[extra]) <= set(EXTRAS["host"]), extra


# ---------------------------------------------------------------- without the extras


def test_a_board_screens_ranks_and_says_what_it_lacks(tmp_path: Path) -> None:
    absent = (*HOST, *RUNTIMES)
    done = without(absent, "edgejoule", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for rows in json.loads(done.stdout).values() for row in rows}
    for name in ("eager", "onnxruntime", "openvino", "nvml"):
        assert not rows[name]["ok"] and "pip install 'edgejoule[" in rows[name]["remedy"]
    (tmp_path / "table.csv").write_text(CSV)
    for argv in (["screen", "--pool", "e3p"], ["zoo", "list"], ["rank", "table.csv", "--sensitivity"], ["doctor"]):
        done = without(absent, "edgejoule", *argv, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(
    "argv",
    ["run", "compile vit_small", "measure vit_small", "zoo show vit_small", "screen vit_small --recount", "report x", "store info x"],
)
def test_what_needs_the_host_says_so(argv: str, tmp_path: Path) -> None:
    said = sentence(without((*HOST, *RUNTIMES), "edgejoule", *argv.split(), cwd=tmp_path))
    assert said.startswith("error: this needs ") and "pip install 'edgejoule[host]'" in said


def test_a_board_measures_artifacts_without_torch(tmp_path: Path) -> None:
    onnx_artifact(tmp_path / "artifact")
    argv = ["edgejoule", "measure", "artifact", "--meter", "none", "--profile", "quick(window_s=0.1, idle_s=0.05, warmup_cap_s=0.2)"]
    argv += ["--cache", "cache", "--images", "photos(n=2)", "--json"]
    done = without(tuple(set(HOST) - set(MEASURE)), *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latency_s"]["value"] > 0
    assert "'edgejoule[measure]', no torch" in sentence(without(HOST, *argv, cwd=tmp_path))


def test_the_worker_needs_numpy_and_one_runtime(tmp_path: Path) -> None:
    onnx_artifact(tmp_path / "artifact")
    write_images(tmp_path / "images.npy")
    job = Job("measure", str(tmp_path / "artifact"), str(tmp_path / "images.npy"), Workload(), 1, key="k", protocol=PROTOCOL, meter="none")
    absent = (*HOST, "openvino", "pynvml", "psutil", "typer", "rich")
    done = without(absent, "edgejoule.fleet.agent", stdin=json.dumps(encode(job)))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["trial"]["key"] == "k"


@pytest.mark.study
def test_the_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    """Needs a package index."""
    project = tmp_path / "project"  # a copy, because setuptools builds in place and would pack what it once built
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, project)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(project)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("edgejoule-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[onnxruntime]"], check=True)
    for argv in (["--version"], ["--help"], ["doctor", "--json"], ["screen", "--pool", "e3p"], ["zoo", "list"]):
        subprocess.run([python, "-m", "edgejoule", *argv], cwd=tmp_path, check=True, capture_output=True)
    onnx_artifact(tmp_path / "artifact")
    write_images(tmp_path / "images.npy")
    job = Job("measure", "artifact", "images.npy", Workload(), 1, key="k", protocol=PROTOCOL, meter="none")
    worker = [python, "-m", "edgejoule.fleet.agent"]
    done = subprocess.run(worker, input=json.dumps(encode(job)), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["trial"]["artifact_sha256"]
