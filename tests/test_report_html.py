"""The page: nothing from outside runs or loads, everything is there, and in a browser it sorts and draws."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgejoule.accuracies import spread
from edgejoule.caveats import caveat
from edgejoule.errors import OutputError
from edgejoule.rank.groups import entries_from_measurements
from edgejoule.rank.ranking import rank_groups
from edgejoule.records import Accuracy, Epoch, Training
from edgejoule.report import evidence
from edgejoule.report.html import render, write_html
from edgejoule.report.page import embed
from edgejoule.report.report import Report
from edgejoule.report.training import curve
from tests.report_sample import PLAIN, measurement, sample_environment, sample_failures, sample_measurements, sample_screened
from tests.samples import artifact

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</script><!--\u2028{{7*7}}<a href='javascript:alert(3)'>%{x}"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


def report(**changes: Any) -> Report:
    measurements = sample_measurements()
    rankings = rank_groups(entries_from_measurements(measurements, sample_screened(), PLAIN), title="sample")
    made = Report(
        title="sample",
        rankings=rankings,
        measurements=measurements,
        screened=sample_screened(),
        failures=sample_failures(),
        environments=(sample_environment(),),
        study_text='[study]\nname = "sample"\n',
        command="edgejoule run sample --out here",
        created_at=1.76e9,
        version="0.1.0",
    )
    return replace(made, **changes)


def hostile() -> Report:
    measurements = tuple(
        replace(m, variant=EVIL + m.variant, device=EVIL, meter=EVIL, caveats=(caveat("drift", EVIL),)) for m in sample_measurements()
    )
    rankings = rank_groups(entries_from_measurements(measurements))
    screened = tuple(replace(row, name=EVIL, reason=EVIL) for row in sample_screened())
    failures = tuple(replace(one, variant=EVIL, reason=EVIL) for one in sample_failures())
    return report(
        title=EVIL, rankings=rankings, measurements=measurements, screened=screened, failures=failures, study_text=EVIL, command=EVIL
    )


class Parsed(html.parser.HTMLParser):
    """What a browser would load or run: tags, attributes, and the text of scripts and of the rest apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside else data


def own_part(page: str) -> str:
    """The page without the plots' library, which names addresses that it never asks for."""
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("make", [report, hostile])
def test_nothing_is_loaded_from_anywhere(make: Any) -> None:
    page = render(make())
    tags = Parsed(page).tags
    assert not [tag for tag, attrs in tags if attrs.keys() & {"src", "srcset", "data", "action", "onerror", "onclick", "onload"}]
    assert {attrs["href"] for _, attrs in tags if "href" in attrs} == {"#words"}
    assert {tag for tag, _ in tags} & {"link", "iframe", "img", "object", "base", "form", "a"} == {"a"}
    assert [tag for tag, _ in tags].count("script") == 3
    assert not re.search(r"https?://|url\(|@import|//cdn", own_part(page).replace("&#x27;", ""))
    policy = next(attrs["content"] for tag, attrs in tags if tag == "meta" and "http-equiv" in attrs)
    assert (
        policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-") and "script-src 'unsafe-inline'" not in policy
    )


def test_hostile_names_stay_text() -> None:
    page = render(hostile())
    assert "<script>alert" not in page and "<img" not in own_part(page) and "\u2028" not in page
    assert "<script>alert(1)</script>" in Parsed(page).text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None and "<" not in data[1] and "alert(1)" in json.loads(data[1])["rankings"][0]["rows"][0]["name"]
    assert json.loads(embed({"x": EVIL})) == {"x": EVIL} and not set("<>&\u2028") & set(embed({"x": EVIL}))


def test_every_number_that_was_asked_for_is_there() -> None:
    shown = " ".join(Parsed(render(report())).text.split())
    for part in (
        "tiny_vit_11m_dist @ openvino is best by SAM",
        "33 % less energy than vit_small_patch16_224",
        "422 mJ",
        "[415, 429]",
        "grade C (on-board sensor",
        "scope package",
        "First inference",
        "Peak memory",
        "Images / Wh",
        "above idle",
        "rejected top-1 72.19 % is below 79 %",
        "StarReLU",
        "AMD Ryzen 7",
        "edgejoule run sample --out here",
        'name = "sample"',
        "31 of 5400 inferences",
        "Why it matters.",
        "What to do.",
        "Kendall's tau",
        "2025-10-09",
    ):
        assert part in shown, part


def test_an_estimate_is_never_shown_as_a_measurement() -> None:
    measurements = tuple(replace(m, grade="D", scope="process", meter="estimate") for m in sample_measurements())
    page = Parsed(render(report(measurements=measurements, rankings=rank_groups(entries_from_measurements(measurements))))).text
    assert "an estimate, not a measurement" in page and "≈422 mJ" in page and "off by 40 % or more" in page


def test_missing_figures_are_dashes_and_an_empty_report_is_a_page() -> None:
    page = render(Report(title="", rankings=()))
    assert "Nothing was ranked" in page
    silent = replace(measurement(), energy_j=None, net_energy_j=None, power_w=None, p99_s=None, idle_w=None, accuracy=None)
    assert "needs 1000 inferences" in render(report(rankings=(), measurements=(silent,)))


def test_several_rankings_stand_apart() -> None:
    other = tuple(replace(m, device="pi") for m in sample_measurements())
    rankings = rank_groups(entries_from_measurements((*sample_measurements(), *other)))
    text = Parsed(render(report(rankings=rankings))).text
    assert "Ranking 1: imagenet-1k on thinkpad" in text and "Ranking 2: imagenet-1k on pi" in text


def trained(name: str = "tiny_vit_11m", seed: int = 0, recipe: str = "digits") -> Training:
    spec = replace(artifact().variant.spec, name=name)
    score = Accuracy("digits", "test", 0.9 + 0.01 * seed, "measured", "float32", 400, 0.88, 0.93)
    ids = (f"fresh(seed={seed})", "digits", "o", recipe, "", seed, "w", "w.safetensors", 10, 5.0, 1, "no", {})
    return Training(f"{name} {recipe} {seed}", spec, "random", *ids, score, score)


def test_training_runs_show_their_course_and_their_spread() -> None:
    runs = [trained(seed=0), trained(seed=1), trained(EVIL, 0, EVIL)]
    first, last = (Epoch(n, 10 * n, loss, 1e-3, 1.0, 9, {"top1": top1}) for n, loss, top1 in ((1, 2.0, 0.1), (3, 1.0, 0.5)))
    lesson = (first, Epoch(2, 20, float("nan"), 1e-3, 1.0, 9), last)
    epochs = {runs[0].key: lesson, runs[1].key: lesson[:1]}
    made = report(trainings=tuple(runs), epochs=epochs, spreads=spread(runs))
    page = own_part(render(made))
    assert "<script>alert" not in page and page.count("<svg") == 2 and "http" not in page.replace("http-equiv", "")
    assert 'aria-label="3 epochs, validation from 10.0 to 50.0 %, loss from 2.00 to 1.00"' in page
    score = re.search(r'<polyline class="score" points="([^"]*)"', page)
    assert score is not None and score[1] == "3.0,44.4 165.0,26.0"  # from a tenth to half of the height, edge to edge
    assert '<circle class="score"' in page and curve(()) == "" and "nan," not in page and ",nan" not in page
    assert "How much seeds and recipes matter" in page and "0.71" in page  # 0.01 / sqrt 2, in points
    long = curve([replace(first, number=n) for n in range(1, 1001)])
    assert 100 <= long.count(",") / 2 <= 130


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_html(tmp_path / "deep" / "report.html", report())
    before = path.read_bytes()
    assert before.startswith(b"<!doctype html>") and [file.name for file in path.parent.iterdir()] == ["report.html"]
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OutputError, match=r"cannot write the report to .*: free some space or choose another folder"):
        write_html(blocked / "report.html", report())
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError):
        write_html(tmp_path / "folder.html", report())
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("the page was not opened in a browser: Chromium is missing, install the package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the page was not opened in a browser: pip install playwright")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


def opened(chromium: Any, path: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    page = chromium.new_page(**options)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#plot-0-energy .main-svg")
    return page, complaints, requests


def hovered(page: Any) -> str:
    """What the plot says when the pointer rests on its first dot."""
    dot = page.locator("#plot-0-energy .points path").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#plot-0-energy .hoverlayer .hovertext", timeout=10_000)
    return str(page.locator("#plot-0-energy .hoverlayer").text_content())


@pytest.mark.browser
def test_the_page_sorts_draws_and_asks_nothing_of_a_network(chromium: Any, tmp_path: Path) -> None:
    path = write_html(tmp_path / "report.html", report())
    page, complaints, requests = opened(chromium, path, viewport={"width": 1280, "height": 900})
    assert requests == [path.as_uri()] and complaints == []
    for cost in ("energy", "latency"):
        assert page.locator(f"#plot-0-{cost} .points path").count() == 10
        assert page.locator(f"#plot-0-{cost} .scatterlayer .js-line").count() == 1
        assert page.locator(f"#plot-0-{cost} .xerror").count() == 10
        assert page.locator(f"#plot-0-{cost} .annotation").count() >= 4
    buttons = page.locator("#plot-0-energy .modebar-btn").evaluate_all("found => found.map((one) => one.dataset.title || one.dataset.attr)")
    assert len(buttons) == 4 and not [title for title in buttons if re.search("share|cloud|studio|edit|link", title, re.IGNORECASE)]
    table = page.locator("table.sortable").first
    header = table.locator("th", has_text="Energy / image")
    names = table.locator("tbody tr td:nth-child(2)")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending" and names.first.inner_text().split() == ["levit_conv_192", "openvino"]
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending" and names.first.inner_text().split() == [
        "vit_small_patch16_224",
        "onnxruntime",
    ]
    assert table.locator("th[aria-sort=none]").count() == table.locator("th").count() - 1
    assert "grade C, scope package" in hovered(page)
    page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000
    page.close()


@pytest.mark.browser
def test_the_intervals_of_accuracies_are_drawn_where_there_are_some(chromium: Any, tmp_path: Path) -> None:
    known = Accuracy("imagenet-1k", "test", 0.81, "measured", "here", 400, 0.78, 0.84, 5, 0.01)
    found = [replace(m, accuracy=known) if m.model == "tiny_vit_11m" and m.backend == "openvino" else m for m in sample_measurements()]
    made = report(rankings=rank_groups(entries_from_measurements(found)))
    page, complaints, _ = opened(chromium, write_html(tmp_path / "report.html", made), viewport={"width": 1280, "height": 900})
    bars = page.locator("#plot-0-energy .yerror").evaluate_all("all => all.map((one) => one.getBBox().height)")
    assert len([height for height in bars if height > 5]) == 1 and complaints == []
    cell = page.locator("table.sortable").first.locator("tr", has_text="measured, 5 seeds").locator("td").nth(2).inner_text()
    assert cell.split("\n") == ["81.0 %", "[78.0, 84.0]", "measured, 5 seeds"]
    page.close()
    page, _, _ = opened(chromium, write_html(tmp_path / "plain.html", report()))
    assert page.locator("#plot-0-energy .yerror").count() == 0
    page.close()


@pytest.mark.browser
def test_an_arrow_leads_to_what_a_recipe_made_of_a_network(chromium: Any, tmp_path: Path) -> None:
    measured = [replace(m, accuracy=Accuracy("digits", "test", 0.9, "measured", "us", 400, 0.88, 0.92)) for m in sample_measurements()]
    plain = next(m for m in measured if (m.model, m.backend) == ("tiny_vit_11m", "onnxruntime"))
    assert plain.energy_j is not None
    thrifty = replace(plain.energy_j, value=0.4, low=0.39, high=0.41)
    pruned = replace(plain, variant="tiny_vit_11m | prune_heads(ratio=0.5)", energy_j=thrifty)
    rankings = rank_groups(entries_from_measurements([*measured, pruned]))
    page, complaints, _ = opened(chromium, write_html(tmp_path / "report.html", report(rankings=rankings)))
    plot = page.locator("#plot-0-energy .scatterlayer")
    assert plot.locator(".js-line").count() == 2 and complaints == []  # the front and the arrow
    assert page.locator("#plot-0-latency .scatterlayer .js-line").count() == 1  # no room: as fast as before
    row = page.locator("table.sortable").first.locator("tr", has_text="prune_heads")
    assert row.locator("td .open").inner_text() == "not shown" and "more images would decide" in row.inner_text()
    page.close()


@pytest.mark.browser
def test_hostile_names_are_inert_in_a_browser(chromium: Any, tmp_path: Path) -> None:
    path = write_html(tmp_path / "report.html", hostile())
    page, complaints, requests = opened(chromium, path)
    assert "<script>alert(1)</script>" in hovered(page)
    assert complaints == [] and requests == [path.as_uri()]
    assert page.locator("a").count() == 1 and page.locator("img").count() == 0
    assert page.evaluate("document.querySelectorAll('.plot a').length") == 0
    page.close()


@pytest.mark.browser
def test_a_phone_scrolls_tables_not_the_page_and_dark_is_dark(chromium: Any, tmp_path: Path) -> None:
    path = write_html(tmp_path / "report.html", report())
    page, complaints, _ = opened(chromium, path, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert complaints == [] and page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    page.close()


def test_what_was_seen_alike_everywhere_is_one_line() -> None:
    found = [(f"model {n}", caveat("quick_profile", "3 repeats")) for n in range(5)] + [("model 9", caveat("quick_profile", "2 repeats"))]
    card = evidence.caveat_cards(found)
    assert "5 measurements: 3 repeats" in card and "model 9: 2 repeats" in card and "model 3" not in card


def test_what_was_compiled_is_shown_as_it_was_read_back() -> None:
    shown = evidence.artifacts_table([artifact()])
    assert "onnxruntime" in shown and "fp32" in shown and "100% of 8" in shown and "1.0e-06" in shown
