"""Writes docs/commands.md from the command line's own help: python docs/commands_page.py. A test checks that it is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERBS = (
    *("run", "screen", "train", "optimize", "compile", "measure", "evaluate", "trace", "rank", "compare", "report", "reproduce"),
    *("doctor", "zoo list", "zoo show", "store info"),
)


def page() -> str:
    """The whole page: one section a verb."""
    parts = [
        "# Commands\n",
        "Every verb has `--json`: one JSON value on stdout, everything else on stderr.",
        "Exit codes: 0 success, 2 an error that you can mend (one sentence), 1 a bug (its traceback).\n",
    ]
    for verb in VERBS:
        env = {**os.environ, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "edgejoule", *verb.split(), "--help"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
        lines = "\n".join(line.rstrip() for line in said.replace("python -m edgejoule", "edgejoule").strip().splitlines())
        parts.append(f"## edgejoule {verb}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
