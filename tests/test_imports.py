"""Who may import whom, and what is light: the invariants of ARCHITECTURE.md, executable."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "edgejoule"
JOINTS = {"fleet/agent.py"}  # the worker's own joint: it loads, measures and answers
STAGES = ("zoo", "screen", "train", "optimize", "compile", "measure", "fleet", "rank", "report")
HEAVY = ("torch", "scipy", "sqlalchemy", "timm", "torchvision", "sklearn")
SPINE_OF_BOARDS = ("records", "plain", "seams", "registry", "errors", "caveats", "manifest", "data", "fleet/agent")
HOST_ONLY = {"measure/stats.py", "measure/summary.py", "measure/accuracy.py", "measure/compare.py", "measure/sustained.py"}


def imported(path: Path, top_level: bool = False) -> set[str]:
    """Modules that a file imports: all, or only those imported when it is imported."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f) if n is not f}
    typing = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test) for n in ast.walk(i)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if top_level and (id(node) in inside or id(node) in typing):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def leaves() -> set[str]:
    import importlib

    return {
        target.split(":")[0]
        for stage in ("measure", "measure.traces", "compile", "fleet", "zoo", "optimize", "datasets")
        for target in importlib.import_module(f"edgejoule.{stage}").LEAVES.values()
    }


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_stages_import_neither_leaves_nor_one_another(path: Path) -> None:
    stage = path.relative_to(SOURCE).parts[0]
    names = imported(path)
    if stage in STAGES and str(path.relative_to(SOURCE)) not in JOINTS:
        others = tuple(f"edgejoule.{other}" for other in STAGES if other != stage)
        assert not [name for name in names if name.startswith(others)]
        assert not {name for name in names if name.startswith(("edgejoule.study", "edgejoule.stages", "edgejoule.cli", "edgejoule.store"))}
    if ".".join(("edgejoule", *path.relative_to(SOURCE).with_suffix("").parts)) not in leaves() and stage != "zoo":
        assert not names & leaves()


def test_the_spine_imports_downwards_only() -> None:
    order = [
        "plain",
        "records",
        "errors",
        "caveats",
        "seams",
        "registry",
        "manifest",
        "data",
        "catalog",
        "store",
        "scenarios",
        "study_file",
        "bench",
        "stages",
        "study",
        "verbs/options",
        "verbs/looking",
        "verbs/results",
        "verbs/tracing",
        "verbs/pipeline",
        "cli",
    ]
    for position, name in enumerate(order):
        above = {f"edgejoule.{later.replace('/', '.')}" for later in order[position + 1 :]}
        assert not imported(SOURCE / f"{name}.py", top_level=True) & above, name


def test_records_import_only_the_standard_library() -> None:
    for name in ("records", "plain", "errors", "caveats", "seams", "registry"):
        foreign = {n.split(".")[0] for n in imported(SOURCE / f"{name}.py")} - sys.stdlib_module_names - {"edgejoule", "__future__"}
        assert not foreign, name


def _heavy_after(code: str) -> list[str]:
    script = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_edgejoule_and_its_command_line_is_light() -> None:
    assert _heavy_after("import edgejoule, edgejoule.cli") == []


def test_help_imports_no_torch_nor_numpy() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "edgejoule", "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    modules = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not modules & {*HEAVY, "numpy", "PIL", "onnxruntime", "openvino"}


def test_what_runs_on_a_board_imports_nothing_heavy() -> None:
    files = [SOURCE / f"{name}.py" for name in SPINE_OF_BOARDS]
    files += [path for path in (SOURCE / "measure").rglob("*.py") if str(path.relative_to(SOURCE)) not in HOST_ONLY]
    modules = [".".join(("edgejoule", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__") for path in files]
    assert _heavy_after("\n".join(f"import {module}" for module in modules)) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_backends_load_needs_no_torch(backend: str) -> None:
    import re

    path = SOURCE / "compile" / f"{backend}.py"
    assert not imported(path, top_level=True) & set(HEAVY)
    body = next(n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.name == "load")
    assert not re.search(r"import (torch|scipy)|from (torch|scipy)", ast.unparse(body))
