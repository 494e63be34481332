"""Facts that compile writes beside files whose runtime may crash on damaged ones: every file's sha256, checked before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgejoule import manifest
from edgejoule.compile.reasons import reason
from edgejoule.errors import ArtifactError


def sha256_by_name(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """{name: sha256} of files in a folder. Raises ArtifactError where one is missing."""
    return {file.name: file.sha256 for file in manifest.hash_files(folder, names)}


def checked_facts(folder: Path, facts_file: str, names: Sequence[str], runtime: str) -> dict[str, Any]:
    """What compile wrote into ``facts_file`` (``sha256``, ``images``, ``logits``, …), after comparing the named files with it.

    Raises ArtifactError where it cannot be read, or where a file is not the one that was compiled.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / facts_file).read_text(encoding="utf-8"))
        whole = sha256_by_name(folder, names) == facts["sha256"]
        len(facts["images"]), len(facts["logits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder} holds no {runtime} artifact that can be read ({reason(error)}): compile again") from error
    if not whole:
        raise ArtifactError(f"{' or '.join(names)} in {folder} is not the file that was compiled: compile again")
    return facts
