"""A foreign library's exception as one short line that fits into our own sentence. Standard library only: boards import this."""

from __future__ import annotations

import re

LONGEST = 200  # characters; a library's own report can run to pages
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ADDRESS = re.compile(r"^(Exception from \S+:|\[ONNXRuntimeError\] : \d+ : \w+ :)\s*")


def reason(error: BaseException) -> str:
    """The first line that says something of the exception that began it all, without colours and source addresses."""
    while error.__cause__ is not None:
        error = error.__cause__
    for line in _COLOURS.sub("", str(error)).splitlines():
        told = _ADDRESS.sub("", line.strip()).rstrip(".: ")
        if told:
            return told if len(told) <= LONGEST else told[: LONGEST - 1] + "…"
    return type(error).__name__
