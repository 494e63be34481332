"""README and guide run: every sh and python block, in order, in a fresh folder; links exist; help pages are current."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgejoule.study_file import parse_study

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("guide", "metering", "training", "compiling", "shrinking"))]


def script(name: str) -> Any:
    """A script of docs/ that writes a page, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shell_blocks_run(page: Path, cache: Path, tmp_path: Path) -> None:
    found = [block for block in blocks(page, "sh") if not block.startswith("make ")]
    assert found
    script = "set -euo pipefail\nedgejoule() { " + f'"{sys.executable}" -m edgejoule "$@"; ' + "}\n" + "\n".join(found)
    env = os.environ | {"EDGEJOULE_CACHE": str(cache)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "sh")[0]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", first, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert first.startswith("make run") and "make test" in first


def test_python_blocks_run(tmp_path: Path) -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)


def test_the_studies_on_the_pages_parse() -> None:
    for page in PAGES:
        for block in blocks(page, "toml"):
            parse_study(block, page.name)


def test_links_and_pictures_exist() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_help_pages_are_current() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == script("commands_page").page(), "run: python docs/commands_page.py"


def test_the_table_of_what_cannot_work_is_current() -> None:
    from edgejoule.optimize.impossible import IMPOSSIBLE

    text = (ROOT / "docs" / "shrinking.md").read_text()
    assert text == script("impossible_page").page(text), "run: python docs/impossible_page.py"
    assert all(f"| {why} |" in text for reasons in IMPOSSIBLE.values() for why in reasons.values())


def test_the_page_on_shrinking_names_every_pass_and_option() -> None:
    from dataclasses import fields

    from edgejoule import registry
    from edgejoule.optimize import LEAVES

    text = (ROOT / "docs" / "shrinking.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", text.partition("## Recovery")[0], re.MULTILINE))
    assert set(rows) == set(LEAVES)
    for name in set(LEAVES) - {"prune_ffn"}:  # whose options are "the same" as those of the row above
        assert not [option.name for option in fields(registry.create("pass", name)) if f"`{option.name}`" not in rows[name]], name


def test_every_verb_is_documented() -> None:
    from edgejoule.cli import app, store_app, zoo_app

    verbs = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback and not c.hidden}
    verbs |= {f"{group} {c.name}" for group, sub in (("zoo", zoo_app), ("store", store_app)) for c in sub.registered_commands}
    page = (ROOT / "docs" / "commands.md").read_text()
    assert not [verb for verb in verbs if f"## edgejoule {verb}\n" not in page]


def test_the_architecture_names_every_file_and_stays_short() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(text.splitlines()) <= 150
    for path in (ROOT / "src" / "edgejoule").glob("*.py"):
        if not path.name.startswith("__"):
            assert f"`{path.name}`" in text, path.name
    for folder in (path for path in (ROOT / "src" / "edgejoule").iterdir() if path.is_dir() and not path.name.startswith("_")):
        assert f"`{folder.name}/`" in text, folder.name
