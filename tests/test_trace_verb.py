"""The verb trace: the fixed shape of its JSON, its text, its page, and one sentence for what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edgejoule.errors import EdgejouleError
from edgejoule.measure.recording import Recording
from edgejoule.measure.traced import traced
from edgejoule.report.traces import MOST, plot_data, plot_page, thinned, trace_text
from edgejoule.verbs.tracing import trace
from tests.fakes.pulses import Pulses, power_trace

app = typer.Typer()
app.command()(trace)
FIXED = {
    *("format", "rails", "total_rails", "duration_s", "energy_j", "total_energy_j", "net_energy_j"),
    *("idle_w", "segments", "caveats"),
}


def written(tmp_path: Path, pulses: Pulses) -> Path:
    path = tmp_path / "power.csv"
    rows = (f"{at:.6f},{watts:.6f}\n" for at, watts in zip(*pulses.samples(), strict=True))
    path.write_text("time (s),power (W)\n" + "".join(rows))
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def as_json(*arguments: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return value


def test_the_shape_of_the_json(tmp_path: Path) -> None:
    pulses = Pulses(5, noise_w=0.01)
    path = written(tmp_path, pulses)
    found = as_json(path, "--segments", 5)
    assert set(found) >= FIXED
    assert found["format"] == "csv"
    assert found["total_rails"] == found["rails"] == list(found["energy_j"])
    assert found["duration_s"] == pytest.approx(pulses.duration_s, abs=1e-3)
    assert [set(one) for one in found["segments"]] == [{"start_s", "stop_s", "energy_j", "net_energy_j"}] * 5
    assert [one["net_energy_j"] for one in found["segments"]] == pytest.approx(pulses.truth(), rel=0.01)
    assert found["total_energy_j"] == pytest.approx(pulses.duration_s + float(np.sum(pulses.truth())), rel=0.01)


def test_a_window(tmp_path: Path) -> None:
    pulses = Pulses(5, noise_w=0.01)
    path = written(tmp_path, pulses)
    start, stop = pulses.starts_s[0] - 0.01, pulses.starts_s[-1] + 0.03
    found = as_json(path, "--start", start, "--stop", stop)
    assert found["net_energy_j"] == pytest.approx(float(np.sum(pulses.truth())), rel=0.01)
    assert found["idle_w"] == pytest.approx(1.0, rel=0.01)
    assert (found["start_s"], found["stop_s"], found["segments"]) == (pytest.approx(start), pytest.approx(stop), [])


def test_interval_wins_over_stamps(tmp_path: Path) -> None:
    path = written(tmp_path, Pulses(1))
    plain, stretched = as_json(path), as_json(path, "--interval", 0.0004)
    assert stretched["total_energy_j"] == pytest.approx(2 * plain["total_energy_j"], rel=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--segments", 4),
        ("--segments", 6),
        ("--segments", 0),
        ("--segments", 5, "--k", 0),
        ("--segments", 5, "--k", "nan"),
        ("--start", 2, "--stop", 1),
        ("--start", "nan"),
        ("--stop", 1000),
        ("--interval", 0),
        ("--decimal", ";"),
        ("--format", "nosuch"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_sentence(tmp_path: Path, arguments: tuple[object, ...]) -> None:
    with pytest.raises(EdgejouleError) as caught:
        run(written(tmp_path, Pulses(5, noise_w=0.01)), *arguments)
    assert "\n" not in str(caught.value)
    assert not str(caught.value).endswith(".")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EdgejouleError, match="no file"):
        run(tmp_path / "none.csv")


def test_the_text(tmp_path: Path) -> None:
    text = run(written(tmp_path, Pulses(5, noise_w=0.01)), "--segments", 5)
    assert "5 inferences" in text
    assert re.search(r"mean ± sd: [\d.]+ ± [\d.]+ mJ", text)
    assert "k = 3" in text
    assert "total" in text
    whole = run(written(tmp_path, Pulses(5, noise_w=0.01)))
    assert "no idle outside the window" in whole


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    times, watts = Pulses(1).samples()
    evil = "</script><script>alert(1)</script>\x1b[31m"
    seen = traced(Recording("csv", (power_trace(times, watts, evil),), len(times), float(times[-1]), ()), segments=1)
    assert seen.curve is not None
    page = plot_page(seen.energy, evil, (seen.curve.times_s, seen.curve.power_w))
    assert "<script>alert" not in page
    assert "\x1b" not in trace_text(seen.energy, evil)


def test_the_page(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "deep" / "power.html"
    run(written(tmp_path, Pulses(50, noise_w=0.01, gap_s=0.1)), "--segments", 50, "--plot", page)
    text = page.read_text()
    assert "default-src 'none'" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    assert [line["name"] for line in data["lines"]] == ["power", "background", "threshold"]
    assert len(data["segments"]) == 50
    assert len(data["lines"][0]["x"]) <= MOST


def test_thinning_loses_no_peak() -> None:
    values = np.random.default_rng(0).standard_normal(300_001)
    values[123_456], values[300_000] = 99.0, -99.0
    kept = thinned(values)
    assert len(kept) <= MOST
    assert np.all(np.diff(kept) > 0)
    assert {123_456, 300_000} <= set(kept.tolist())
    assert thinned(values[:100]).tolist() == list(range(100))


def test_a_plot_without_a_total() -> None:
    times, watts = Pulses(1).samples()
    rails = tuple(power_trace(times, watts, name, total=False) for name in "ab")
    seen = traced(Recording("csv", rails, len(times), float(times[-1]), ()))
    assert plot_data(seen.energy, None) == {"lines": [], "segments": []}
