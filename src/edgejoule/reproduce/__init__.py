"""Published tables and claims, recomputed from their own primary columns and from the built networks, every disagreement shown.

``reproduce("edgevit")`` and ``reproduce("e3p")``; ``published_table`` gives a printed table, ``beside`` sets latencies measured here
beside a printed column. Builds networks on the meta device only: no weights, no timing. Importing this imports no torch and no numpy.
"""

from __future__ import annotations

from collections.abc import Callable

from edgejoule.bench import Event
from edgejoule.errors import UnknownNameError
from edgejoule.reproduce.beside import Beside, BesideRow, beside
from edgejoule.reproduce.checks import Check, Listing, Reproduction, Section, Span, Verdict
from edgejoule.reproduce.published import published_table

NAMES = ("edgevit", "e3p")
__all__ = [
    "NAMES",
    "Beside",
    "BesideRow",
    "Check",
    "Listing",
    "Reproduction",
    "Section",
    "Span",
    "Verdict",
    "beside",
    "published_table",
    "reproduce",
]


def reproduce(name: str, progress: Callable[[Event], None] | None = None) -> Reproduction:
    """A paper's tables and claims beside what they should be: ``edgevit`` (arXiv 2205.03436) or ``e3p`` (arXiv 2511.23166).

    ``progress`` hears of each network as it is counted. Takes up to a minute: some forty networks are built without weights.
    A network that cannot be built here makes its checks "not recoverable"; nothing is dropped. Raises UnknownNameError.
    """
    notify = progress or (lambda event: None)
    if name == "edgevit":
        from edgejoule.reproduce import edgevit

        return edgevit.reproduce(notify)
    if name == "e3p":
        from edgejoule.reproduce import e3p

        return e3p.reproduce(notify)
    raise UnknownNameError("paper to reproduce", name, NAMES, f"known: {', '.join(NAMES)}")
