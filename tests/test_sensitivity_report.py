"""What each layer costs, rendered: order, units, widths, and a page that loads nothing and draws every layer."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from edgejoule.errors import OutputError
from edgejoule.records import Interval
from edgejoule.report.sensitivity import in_order, render, sensitivity_table, write_plot
from edgejoule.shrunk import LayerCost

HEADS, FFN = "prune_heads(ratio=0.25)", "prune_ffn(ratio=0.5)"
EVIL = "<script>alert(1)</script>\x1b[31m</pre>"


def cost(layer: str, what: str = HEADS, drop: Interval | float = 0.5, **more: Any) -> LayerCost:
    drop = drop if isinstance(drop, Interval) else Interval(drop, None, None, 1)
    made = LayerCost(layer, what, drop, saved_macs=0.006, saved_bytes=0.125, saved_time=None, n_images=360)
    return replace(made, **more)


def sample() -> list[LayerCost]:
    rows = [cost("stem.conv", "qat(bits=8)", 0.25)]
    for i in range(12):
        rows.append(cost(f"blocks.{i}.attn", HEADS, Interval(4.0 / (i + 1), 4.0 / (i + 1) - 1.0, 4.0 / (i + 1) + 1.0, 360)))
        rows.append(cost(f"blocks.{i}.mlp", FFN, Interval(0.8, 0.1, 1.5, 360), saved_time=Interval(0.081, 0.07, 0.092, 5)))
    return [*rows, cost("head", FFN, -0.0001)]


def test_layers_stand_in_the_networks_order_then_passes() -> None:
    rows = sample()
    random.Random(0).shuffle(rows)
    shuffled = in_order([cost("stem.conv"), *rows])  # the part that is named first is the first
    names = [row.layer for row in shuffled]
    assert names[0] == "stem.conv" and [name for name in names if "blocks" in name] == [
        f"blocks.{i}.{part}" for i in range(12) for part in ("attn", "mlp")
    ]
    one = [cost("a", "merge_tokens(r=10)"), cost("a", "merge_tokens(r=8)"), cost("a", HEADS)]
    assert [row.what for row in in_order(one)] == ["merge_tokens(r=8)", "merge_tokens(r=10)", HEADS]


@given(st.lists(st.text("ab.01_", max_size=6), max_size=8))
def test_any_names_have_an_order_that_loses_none(names: list[str]) -> None:
    ordered = in_order([cost(name) for name in names])
    assert sorted(row.layer for row in ordered) == sorted(names) and in_order(ordered) == ordered


def test_the_table_gives_points_shares_and_intervals() -> None:
    shown = sensitivity_table(sample(), 200, False)
    rows = {line.split()[0]: line for line in shown.splitlines() if line and line[0] in "sbh"}
    figures = f"blocks.3.mlp {FFN} +0.8 [0.1, 1.5] 0.60 % 12.5 % 8.1 % [7.0, 9.2]"
    assert " ".join(rows["blocks.3.mlp"].split()) == figures
    assert rows["stem.conv"].split()[:3] == ["stem.conv", "qat(bits=8)", "+0.25"] and "+0.0" in rows["head"]
    assert "25 layers" not in shown and "26 layers, 3 passes, 360 images" in shown and "Each line changes one layer alone" in shown
    assert "note" not in shown and "images  " not in shown
    starts = {line.index(FFN) for line in shown.splitlines() if FFN in line}
    assert len(starts) == 1  # aligned


def test_columns_come_with_what_they_show() -> None:
    plain = sensitivity_table([cost("a"), cost("b")], 200, False)
    assert "time saved" not in plain and "note" not in plain
    other = sensitivity_table([cost("a", n_images=100, note="lost its last head"), cost("b")], 200, False)
    assert "lost its last head" in other and "images" in other.splitlines()[1] and "100 to 360 images" in other
    assert "(none)" in sensitivity_table([], 80, False)


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    shown = sensitivity_table([*sample(), cost("c", note="a long word " * 9)], width, False)
    assert max(map(cell_len, shown.splitlines())) <= width and "blocks.11.mlp" in shown


def test_the_page_holds_every_figure_and_loads_nothing() -> None:
    page = render(sample(), "Sensitivity of deit")
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert own.count('class="plot"') == 3 and "http" not in own.replace("http-equiv", "") and " src=" not in own
    assert "default-src 'none'; script-src 'sha256-" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [len(bars) for bars in data["passes"]] == [13, 12, 1]
    assert data["passes"][1][3] == {
        "layer": "blocks.3.attn",
        "drop": [1.0, 0.0, 2.0],
        "macs": pytest.approx(0.6),
        "hover": ["blocks.3.attn", "lost +1.0 [0.0, 2.0] points, 360 images", "MACs saved 0.60 %", "bytes saved 12.5 %"],
    }
    assert "least lost by head (+0.00 points), most by blocks.0.mlp" in page and "No layer was tried" in render([], "none")


def test_names_from_outside_stay_text() -> None:
    page = render([cost(EVIL, EVIL, note=EVIL)], EVIL)
    assert "<script>alert" not in page and "\x1b" not in page and page.count("</pre>") == 1
    assert "\x1b" not in sensitivity_table([cost(EVIL, EVIL, note=EVIL)])


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_plot(tmp_path / "folder.html", sample(), "x")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "deep"), [(1200, False), (1200, True), (360, False)])
def test_every_layer_is_drawn_and_its_name_readable(tmp_path: Path, width: int, deep: bool) -> None:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("the page was not opened in a browser: Chromium is missing, install the package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page was not opened in a browser: pip install playwright")
    rows = [cost(f"stages.{i // 12}.blocks.{i % 12}.attn") for i in range(48)] if deep else sample()
    layers = 48 if deep else 13 if width < 1200 else 12
    rows = [row for row in rows if row.what == HEADS] if width == 1200 else rows
    path = write_plot(tmp_path / "page.html", rows, "Sensitivity")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector(".plot .main-svg")
        first = page.locator(".plot").first
        assert complaints == [] and first.locator(".scatterlayer .points path").count() == layers
        assert first.locator(".barlayer .point").count() == layers
        names = first.locator(".xtick text").evaluate_all("all => all.map((one) => one.getBoundingClientRect().toJSON())")
        assert len(names) == layers if width == 1200 else 5 < len(names) <= layers
        boxes = sorted(names, key=lambda box: box["left"])
        gap = -1.0 if boxes[0]["height"] > boxes[0]["width"] else 6.0  # upright names are rows of letters: a line's height is room enough
        assert all(one["right"] + gap <= other["left"] for one, other in itertools.pairwise(boxes))
        bottom = first.bounding_box()
        assert bottom and all(box["bottom"] <= bottom["y"] + bottom["height"] for box in boxes)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
