"""The frame of every page that edgejoule writes: self-contained, opened from disk, everything from outside escaped.

The plots' library travels inside the page. A content policy in the page forbids every load and every script but the page's own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.resources
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from edgejoule.errors import OutputError
from edgejoule.report.cells import esc

FOOT = "Made by edgejoule. This page loads nothing from anywhere."


def page(title: str, meta: str, main: str, data: Any, script: str, heading: str = "", foot: str = "") -> str:
    """The whole page as text: ``main`` and ``foot`` are HTML, ``data`` is for the script, a file of this folder beside ``page.js``."""
    library, code, style = _plotly(), own_file("page.js") + own_file(script), own_file("report.css")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(code)}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header><p class="brand">edge<b>joule</b></p><h1>{esc(heading or title)}</h1><p class="meta">{esc(meta)}</p></header>\n'
        f"<main>\n{main}\n</main>\n<footer><p>{FOOT}{foot}</p></footer>\n"
        f'<script type="application/json" id="data">{embed(data)}</script>\n'
        f"<script>{library}</script>\n<script>{code}</script>\n</body>\n</html>\n"
    )


def write_page(path: Path | str, text: str) -> Path:
    """Writes a page, whole or not at all. Raises OutputError where it cannot be written."""
    path = Path(path)
    page = text.encode("utf-8", "replace")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(page)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        raise OutputError(
            f"cannot write the report to {path} ({error.strerror or error}): free some space or choose another folder"
        ) from error
    return path


def embed(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)  # ASCII: U+2028 and its like are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _script(str(get_plotlyjs()))


def own_file(name: str) -> str:
    return _script((importlib.resources.files("edgejoule.report") / name).read_text(encoding="utf-8"))


def _script(text: str) -> str:
    """As a browser will see it between its tags, so that the hash of the content policy fits: LF line ends, no closing tag inside."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
