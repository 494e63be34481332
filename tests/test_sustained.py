"""Long runs with a known truth: where they settle, what they hold, and the page that shows it."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import MeterError
from edgejoule.measure import sustained as module
from edgejoule.measure.sustained import Sustained, sustained
from edgejoule.records import Phase, Series, Trace, floats
from edgejoule.report import sustained as page
from tests.fakes.machine import Curve, long_run
from tests.test_report_html import EVIL, FLAGS, Parsed, own_part


def run(ips: Curve, batch: int = 1, **options: Any) -> Sustained:
    latencies, window, traces, watched = long_run(ips, **options)
    return sustained(latencies, batch, window, traces, watched)


def flat(level: float) -> Curve:
    return lambda t: np.full(len(t), level)


def step(t: Any) -> Any:
    return np.where(t < 120, 25.0, 18.0)


def throttled(**options: Any) -> Sustained:
    return run(step, watts=lambda t: np.where(t < 120, 9.0, 6.0), celsius=lambda t: 80 - 38 * np.exp(-t / 60), **options)


def codes(found: Sustained) -> list[str]:
    return [doubt.code for doubt in found.caveats]


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("counter", [False, True])
def test_a_run_that_throttles(counter: bool) -> None:
    found = throttled(counter=counter)
    assert found.steady_from_s == pytest.approx(120, abs=2 * found.bin_s) and found.steady_ips and found.steady_power_w
    assert found.steady_ips.low and found.steady_ips.high and found.steady_ips.low < 18.0 < found.steady_ips.high
    assert found.steady_ips.value == pytest.approx(18, rel=0.002) and found.steady_power_w.value == pytest.approx(6, rel=0.002)
    assert found.steady_energy_j and found.steady_energy_j.value == pytest.approx(6 / 18, rel=0.002) and found.steady_energy_j.n == 6
    assert found.first_s == 60 and found.first_ips == pytest.approx(25, rel=0.005) and found.last_ips == pytest.approx(18, rel=0.005)
    assert found.first_power_w == pytest.approx(9, rel=0.005) and found.first_energy_j == pytest.approx(9 / 25, rel=0.01)
    assert found.ratio == pytest.approx(18 / 25, rel=0.005) and codes(found) == ["steady_below_start"] and found.reason == ""
    assert (found.grade, found.scope) == ("C", "board-in")
    assert 60 <= len(found.times_s) <= 120 and len(found.times_s) == len(found.power_w) == len(found.clock_hz) == len(found.temperature_c)
    assert found.clock_hz[0] == 60e6 * 25 and found.clock_hz[-1] == 60e6 * 18
    assert found.temperature_c[-1] == pytest.approx(80, abs=1) and found.times_s[0] == pytest.approx(found.bin_s / 2)


def test_the_bins_hold_all_images_and_all_joules() -> None:
    latencies, window, traces, _ = long_run(step, watts=lambda t: 5 + t / 100, noise=0.0)
    found = sustained(latencies, 4, window, traces)
    assert sum(found.throughput_ips) * found.bin_s == pytest.approx(4 * len(latencies))
    assert sum(found.power_w) * found.bin_s == pytest.approx(5 * 600 + 600**2 / 200, rel=0.001)


def test_a_run_that_holds_what_it_promises() -> None:
    found = run(flat(20.0), watts=flat(7.0))
    assert found.steady_from_s == 0 and found.changes_s == () and codes(found) == [] and found.ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("ips", "options", "words"),
    [
        (lambda t: 25 - 7 * t / 600, {}, "drifted|changed"),
        (lambda t: np.where(t < 510, 25.0, 18.0), {}, "changed [89][0-9] s before the end"),
        (flat(20.0), {"celsius": lambda t: 40 + t / 20}, "heating up by 3.0 °C a minute"),
        (flat(20.0), {"watts": lambda t: 5 + t / 200}, "drifted|changed"),
    ],
)
def test_runs_that_do_not_settle(ips: Curve, options: dict[str, Any], words: str) -> None:
    found = run(ips, **options)
    assert found.steady_from_s is None and found.steady_ips is None and found.ratio is None
    assert re.search(words, found.reason) and codes(found) == ["no_steady_state"]


def test_a_governor_that_swings_for_good_is_steady() -> None:
    found = run(lambda t: np.where(t < 100, 25.0, 18 + 4 * ((t // 40) % 2)))
    assert found.steady_from_s == pytest.approx(100, abs=25) and found.steady_ips
    assert found.steady_ips.value == pytest.approx(20, rel=0.03)


def test_a_hiccup_is_no_change() -> None:
    found = run(lambda t: np.where((t > 560) & (t < 566), 8.0, 20.0))
    assert found.steady_from_s == 0 and found.changes_s == ()


def test_slow_settling_is_cut_where_it_has_settled() -> None:
    found = run(lambda t: 18 + 7 * np.exp(-t / 60))
    assert found.steady_from_s is not None and 100 < found.steady_from_s < 300
    assert found.steady_ips and found.steady_ips.value == pytest.approx(18.1, abs=0.2)


def correlated(rng: np.random.Generator, count: int, alike: float, spread: float) -> Any:
    values, kicks = np.empty(count), rng.normal(0, spread * math.sqrt(1 - alike**2), count)
    values[0] = rng.normal(0, spread)
    for i in range(1, count):
        values[i] = alike * values[i - 1] + kicks[i]
    return values


def binned(levels: Any) -> Any:
    return module._Bins(np.arange(len(levels) + 1.0), levels, np.empty(0))


def test_intervals_cover_the_truth_although_bins_are_correlated() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        interval = module._intervals(binned(20 * (1 + correlated(rng, 90, 0.7, 0.01))), 0).ips
        assert interval is not None and interval.low is not None and interval.high is not None
        inside += interval.low < 20 < interval.high
    assert 0.90 <= inside / 400 <= 0.98


def test_noise_alone_makes_no_change() -> None:
    rng = np.random.default_rng(2)
    for alike, most in ((0.0, 0.03), (0.5, 0.2)):
        found = [module._changes(module._levels(binned(20 * (1 + correlated(rng, 90, alike, 0.03))))) for _ in range(100)]
        assert np.mean([bool(one) for one in found]) <= most
    steps = [
        module._changes(module._levels(binned(np.where(np.arange(90) < 20, 25, 23) * (1 + rng.normal(0, 0.02, 90))))) for _ in range(50)
    ]
    assert np.mean([len(one) == 1 and abs(one[0] - 20) <= 2 for one in steps]) > 0.9


# ---------------------------------------------------------------- absence and garbage


def test_without_a_meter_there_is_throughput_only() -> None:
    latencies, window, _, _ = long_run(step)
    found = sustained(latencies, 1, window)
    assert len(found.power_w) == len(found.clock_hz) == len(found.temperature_c) == 0
    assert found.first_power_w is found.first_energy_j is found.steady_power_w is found.steady_energy_j is None
    assert found.steady_ips is not None and found.grade == ""


def test_a_hole_in_the_trace_is_no_power() -> None:
    latencies, window, (trace,), _ = long_run(flat(20.0), watts=flat(7.0))
    times, values = np.asarray(trace.times_s), np.asarray(trace.values)
    kept = (times < window.start_s + 200) | (times > window.start_s + 300)
    found = sustained(latencies, 1, window, (replace(trace, times_s=floats(times[kept]), values=floats(values[kept])),))
    holes = [time for time, watts in zip(found.times_s, found.power_w, strict=True) if math.isnan(watts)]
    assert holes and min(holes) > 200 and max(holes) < 300
    assert found.steady_power_w and found.steady_power_w.value == pytest.approx(7, rel=0.01)
    short = replace(trace, times_s=trace.times_s[:1000], values=trace.values[:1000])  # the meter ended early
    found = sustained(latencies, 1, window, (short,))
    assert math.isnan(found.power_w[-1]) and found.steady_power_w is None and found.first_power_w == pytest.approx(7, rel=0.01)


def test_only_rails_of_the_total_count_and_zero_is_no_power() -> None:
    latencies, window, (trace,), _ = long_run(flat(20.0), watts=flat(7.0))
    inner = replace(trace, rail="core", total=False)
    found = sustained(latencies, 1, window, (trace, inner))
    assert found.first_power_w == pytest.approx(7, rel=0.01)
    both = sustained(latencies, 1, window, (trace, replace(trace, rail="other", grade="D")))
    assert both.first_power_w == pytest.approx(14, rel=0.01) and both.grade == "D"
    nothing = replace(trace, values=floats([0.0] * len(trace.values)))
    assert sustained(latencies, 1, window, (nothing,)).steady_power_w is None


def test_what_cannot_be_a_sustained_run() -> None:
    for latencies, stop, words in (
        ([], 60.0, "at least one"),
        ([math.nan] * 10, 60.0, "finite"),
        ([-1.0, 61.0], 60.0, "finite"),
        ([0.0, 0.0], 60.0, "add up"),
        ([0.05] * 600, 60.0, "add up to 30 s"),  # a fixed rate: idle in between
        ([0.1] * 100, 10.0, "too short"),
        ([6.0] * 10, 60.0, "too short"),
        ([0.1] * 10, 0.0, "window"),
        ([1e308] * 3, 60.0, "add up"),
    ):
        with pytest.raises(MeterError, match=words):
            sustained(floats(latencies), 1, Phase("window", 0.0, stop))
    with pytest.raises(MeterError, match="at least 1200 s"):
        slow = Trace("plug", "power_w", floats([0.0]), floats([1.0]), "plug", "C", "wall", 1.0, 20.0)
        sustained(floats([0.1] * 6000), 1, Phase("window", 0.0, 600.0), (slow,))


NUMBERS = st.lists(st.one_of(st.floats(), st.floats(0, 200), st.sampled_from([0.0, -1.0, 1e308, -1e308])), max_size=80)


@settings(max_examples=150, deadline=None)
@given(spent=NUMBERS, times=NUMBERS, values=NUMBERS, counter=st.booleans(), fill=st.booleans())
def test_garbage_gives_figures_or_one_clear_error(spent: Any, times: Any, values: Any, counter: bool, fill: bool) -> None:
    latencies = floats([1.0] * 200 if fill else spent)
    with np.errstate(all="ignore"):
        window = Phase("window", 0.0, float(np.sum(latencies)))
        quantity: Any = "energy_j" if counter else "power_w"
        trace = Trace("x", quantity, floats(times), floats(values), "x", "C", "x", 0.1)
        watched = (Series("temperature", "C", floats(times), floats(values)), Series("clock", "Hz", floats(values), floats(times)))
        try:
            found = sustained(latencies, 1, window, (trace,), watched)
        except MeterError:
            return
    for interval in (found.steady_ips, found.steady_power_w, found.steady_energy_j):
        assert interval is None or (math.isfinite(interval.value) and interval.value > 0)
    assert "nan" not in page.text(found, "garbage") and page.render(found, "garbage")


# ---------------------------------------------------------------- the page


def test_the_text_says_it_in_words() -> None:
    text = page.text(throttled(), "tiny @ fake")
    assert "After 2 min, the device holds 18.0" in text or "After 2 min 7 s, the device holds" in text
    assert "72 % of what it did in the first minute" in text and "mJ" in text and "WARNING steady_below_start" in text
    assert "estimate" not in text and "≈" in page.text(replace(throttled(), grade="D"), "tiny")
    fell = page.text(run(lambda t: 25 - 7 * t / 600), "tiny")
    assert "No steady state was reached" in fell and "power" not in fell.partition("WARNING")[0].replace("or power", "")
    assert "From the start, the device holds 20.0" in page.text(run(flat(20.0)), "tiny")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min"), (125, "2 min 5 s"), (600, "10 min"), (3900, "1 h 5 min"), (3599, "1 h")]
)
def test_spans(seconds: float, text: str) -> None:
    assert page.span(seconds) == text


def test_the_page_loads_nothing_and_hostile_names_stay_text() -> None:
    made = page.render(replace(throttled(), scope=EVIL), EVIL, (EVIL,))
    tags = Parsed(made).tags
    assert not [tag for tag, attrs in tags if attrs.keys() & {"src", "srcset", "action", "onerror", "onclick", "onload", "href"}]
    assert "<script>alert" not in made and "<img" not in own_part(made) and not re.search(r"https?://|url\(|@import", own_part(made))
    assert "NaN" not in own_part(made)


@pytest.mark.browser
def test_in_a_browser_it_draws_a_panel_for_every_series(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    whole, bare = throttled(), run(lambda t: 25 - 7 * t / 600)
    (tmp_path / "whole.html").write_text(page.render(whole, "whole"), encoding="utf-8")
    (tmp_path / "bare.html").write_text(page.render(replace(bare, clock_hz=floats()), "bare"), encoding="utf-8")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, panels, shaded in (("whole", 4, 4), ("bare", 1, 0)):
            tab, errors = browser.new_page(viewport={"width": 390, "height": 800}), list[str]()
            tab.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            tab.on("console", lambda message, errors=errors: errors.append(message.text))
            tab.goto((tmp_path / f"{name}.html").as_uri())
            tab.wait_for_selector(".plot .trace")
            assert tab.locator(".plot .scatterlayer .trace").count() == panels
            rectangles = "document.querySelector('.plot').layout.shapes.filter((shape) => shape.type === 'rect').length"
            assert tab.evaluate(rectangles) == shaded
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth") and errors == []
        browser.close()
