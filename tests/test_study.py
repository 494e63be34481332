"""The whole pipeline on a tiny network, for real: runs, resumes, survives SIGKILL at several points, full disks and bad models."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgejoule.bench import Bench, Event
from edgejoule.catalog import find_model
from edgejoule.errors import ArtifactError, SpecError
from edgejoule.records import Artifact
from edgejoule.stages import candidates, open_artifact
from edgejoule.store import Store
from edgejoule.study import run_study
from edgejoule.study_file import MeasurePlan, ScreenPlan, load_study, parse_study
from tests.fakes.artifacts import odd_artifact

SMOKE = load_study("smoke")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for the tests of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the smoke study has run to its end."""
    out = tmp_path_factory.mktemp("finished")
    run_study(SMOKE, out, Bench(cache=cache))
    return out


def trial_rows(out: Path) -> list[tuple[Any, ...]]:
    return sqlite3.connect(out / "results.sqlite").execute("SELECT key, artifact, repeat, started_at FROM trials ORDER BY key").fetchall()


def check_repeats(rows: list[tuple[Any, ...]]) -> None:
    """Three good repeats of each artifact, numbered from 0; at most two more in place of rejected ones."""
    of: dict[str, list[int]] = {}
    for row in rows:
        of.setdefault(row[1], []).append(row[2])
    assert len(of) == 3
    for repeats in of.values():
        assert 3 <= len(repeats) <= 5 and sorted(repeats) == list(range(len(repeats)))


def test_a_run_measures_every_artifact_three_times(finished: Path) -> None:
    check_repeats(trial_rows(finished))
    page = (finished / "report.html").read_text()
    assert "test_vit" in page and "weights" in page


def test_repeats_interleave(finished: Path) -> None:
    in_time = [row[1] for row in sorted(trial_rows(finished), key=lambda row: row[3])]
    assert all(len(set(in_time[i : i + 3])) == 3 for i in (0, 3, 6))  # rounds of all three


def test_what_is_said_of_an_artifact_was_read_back(finished: Path) -> None:
    with Store.open(finished / "results.sqlite") as store:
        artifacts: list[Artifact] = list(store.artifacts().values())
        trials = list(store.trials())
    assert {artifact.info.precision for artifact in artifacts} == {"fp32"}
    for artifact in artifacts:
        assert artifact.parity is not None
        assert artifact.parity.max_rel < 1e-3 and artifact.parity.top1_agreement == 1.0
        assert artifact.parity.reference_rms > 0.05, "outputs that vanish prove nothing"
        assert "weights_random" in {doubt.code for doubt in artifact.caveats}
    for trial in trials:
        assert len(trial.latencies_s) >= 5 and trial.traces and trial.peak_memory_bytes > 10**6


def test_a_second_run_compiles_and_measures_nothing(finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a finished study started a worker or built a model")

    monkeypatch.setattr("edgejoule.fleet.dispatch.run_job", never)
    monkeypatch.setattr("edgejoule.zoo.build", never)
    before = trial_rows(finished)
    outcome = run_study(SMOKE, finished, Bench(cache=cache))
    assert trial_rows(finished) == before
    assert len(outcome.rankings) == 1 and len(outcome.rankings[0].rows) == 3


def _run_until(marker: str, out: Path, cache: Path) -> int:
    """Starts the smoke study and kills it when it says ``marker``; how many trials it had announced by then."""
    command = [sys.executable, "-m", "edgejoule", "run", "smoke", "--out", str(out), "--cache", str(cache)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    begun = 0
    for line in process.stderr:
        begun += line.startswith("measure")
        if marker in line:
            time.sleep(0.3)  # into the work that was announced, not before it
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    return begun


def test_killed_at_any_point_it_loses_at_most_the_trial_in_flight(tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    stored = 0
    for marker in ("compile  0/", "compile  1/", "measure  0/", "measure  3/", "measure  5/"):
        begun = _run_until(marker, out, cache)
        if (out / "results.sqlite").exists():
            now = len(trial_rows(out))
            assert now >= stored + max(0, begun - 1), f"a stored trial was lost by the kill at {marker!r}"
            stored = now
    before = trial_rows(out)
    outcome = run_study(SMOKE, out, Bench(cache=cache))
    after = trial_rows(out)
    assert set(before) <= set(after)
    check_repeats(after)
    assert len(outcome.measurements) == 3
    assert (out / "report.html").exists()
    assert not list(cache.glob("export-*")), "scratch folders of killed runs stay behind"


def test_ctrl_c_says_one_sentence_and_leaves_no_worker(finished: Path, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgejoule", "run", "smoke", "--out", str(tmp_path), "--cache", str(cache)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests themselves run in the background it is ignored
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("measure"):
            time.sleep(0.5)
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "stopped; every finished trial is stored: run the same command again to go on"
    assert not [worker for worker in workers if Path("/proc", worker).exists()]


def test_a_model_named_twice_is_measured_once() -> None:
    plan = ScreenPlan(models=("vit_small", "ViT_S", 'timm(name="vit_small_patch16_224.augreg_in21k_ft_in1k")', "levit_192"))
    assert [spec.name for spec in candidates(plan)] == ["vit_small", "levit_192"]


def test_two_models_may_not_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.stages.find_model", lambda text, allow_code: replace(find_model("vit_small"), builder=text))
    with pytest.raises(SpecError, match="mine and mine\\(width=4\\) are both called vit_small"):
        candidates(ScreenPlan(models=("mine", "mine(width=4)")))


def test_an_artifact_of_another_backend_is_not_measured_as_this_one(tmp_path: Path) -> None:
    odd_artifact(tmp_path)
    assert open_artifact(tmp_path, MeasurePlan(), "odd(mode='ok')").backend == "odd(mode='ok')"
    with pytest.raises(ArtifactError, match="leave --backend out"):
        open_artifact(tmp_path, MeasurePlan(), "openvino")


def test_a_model_that_fails_to_export_does_not_stop_the_rest(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from edgejoule import zoo

    class Undecided(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))  # the graph depends on the data

    build = zoo.build
    monkeypatch.setattr(zoo, "build", lambda variant: Undecided().eval() if "efficientnet" in variant.spec.builder else build(variant))
    text = SMOKE.text.replace("models = [", 'models = ["timm(name=\\"test_efficientnet.r160_in1k\\")", ').replace(', "eager"', "")
    outcome = run_study(parse_study(text, "two.toml"), tmp_path, Bench(cache=cache))
    assert {failure.stage for failure in outcome.failures} == {"compile"}
    assert {failure.backend for failure in outcome.failures} == {"onnxruntime", "openvino"}
    assert all("export" in failure.reason for failure in outcome.failures)
    assert len(outcome.rankings[0].rows) == 2
    assert "could not" in (tmp_path / "report.html").read_text() or "export" in (tmp_path / "report.html").read_text()


def test_a_damaged_artifact_is_refused_by_measure_and_compiled_again_by_run(finished: Path, cache: Path, tmp_path: Path) -> None:
    with Store.open(finished / "results.sqlite") as store:
        artifact = next(a for a in store.artifacts().values() if a.backend == "onnxruntime")
    folder = next(path.parent for path in cache.glob("artifacts/*/manifest.json") if artifact.sha256 in path.read_text())
    model = folder / artifact.files[0].name
    model.write_bytes(model.read_bytes()[:-100] + b"\0" * 100)
    command = [sys.executable, "-m", "edgejoule", "measure", str(folder), "--profile", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert artifact.files[0].name in done.stderr
    outcome = run_study(SMOKE, finished, Bench(cache=cache))
    assert not outcome.failures and len(outcome.rankings[0].rows) == 3


def test_a_full_disk_stops_with_one_sentence_and_keeps_what_was_measured(finished: Path, cache: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root can make a small file system to fill")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgejoule", "run", "smoke", "--out", str(small), "--cache", str(cache)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "space" in done.stderr.splitlines()[-1]
        with Store.open(small / "results.sqlite", create=False) as store:
            assert all(len(trial.latencies_s) for trial in store.trials())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_progress_is_told(finished: Path, cache: Path) -> None:
    told: list[Event] = []
    run_study(SMOKE, finished, Bench(notify=told.append, cache=cache))
    assert {event.stage for event in told} >= {"screen", "compile", "meter", "report"}
