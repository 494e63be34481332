"""Writes the table of what cannot work into docs/shrinking.md: python docs/impossible_page.py. A test checks that it is up to date."""

from __future__ import annotations

from pathlib import Path

from edgejoule.optimize.impossible import IMPOSSIBLE, REST

PAGE = Path(__file__).with_name("shrinking.md")
BEGIN, END = "<!-- impossible: written by docs/impossible_page.py -->\n", "<!-- /impossible -->"


def table() -> str:
    """A row for each family and reason, with the passes that it holds for."""
    passes: dict[tuple[str, str], list[str]] = {}
    for name, reasons in IMPOSSIBLE.items():
        for family, why in reasons.items():
            passes.setdefault((family, why), []).append(f"`{name}`")
    rows = [
        f"| {'every other' if family == REST else f'`{family}`'} | {', '.join(names)} | {why} |"
        for (family, why), names in sorted(passes.items())
    ]
    return "\n".join(("| family | pass | why |", "|---|---|---|", *rows))


def page(text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
