"""Autotuning: only what passes the truth gate races, the winner keeps the budget, and what was found is found again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgejoule import caveats, data, manifest, tuning, zoo
from edgejoule.bench import Bench, Event
from edgejoule.errors import BackendError, DataError
from edgejoule.measure.race import Lane
from edgejoule.plain import encode
from edgejoule.report.tuning import tuning_table
from edgejoule.study_file import CompilePlan, MeasurePlan
from edgejoule.tuning import Choice, tune, usable, varied

SPEC = zoo.spec_of_timm("test_vit")
BACKENDS = ("onnxruntime", "openvino", "openvino(rewrite=False)")
SECONDS = {"onnxruntime": 3.0, "openvino": 2.0, "openvino(rewrite=False)": 1.0}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for all tests."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def cache(artifacts: Path) -> Path:
    """Artifacts are kept from test to test, tunings are not."""
    shutil.rmtree(artifacts / "tunings", ignore_errors=True)
    return artifacts


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Compiling is real, the timings are told: a thread less costs half, fusing nothing."""
    seen: list[Choice] = []

    def seconds(self: Any, choice: Choice, number: int) -> float:
        seen.append(choice)
        return SECONDS[choice.backend] * (1.5 if choice.threads == 1 else 1.0) * (1 + 0.001 * number)

    monkeypatch.setattr("edgejoule.tuning._Tuner.seconds", seconds)
    return seen


def tuned(
    cache: Path, plan: MeasurePlan | None = None, compiling: CompilePlan | None = None, events: list[Event] | None = None, **options: Any
) -> Any:
    bench = Bench(cache=cache, notify=(events if events is not None else []).append)
    backends = options.pop("backends", BACKENDS)
    return tune(SPEC, "random", plan or MeasurePlan(threads=2), compiling or CompilePlan(), bench, backends, **options)


def test_the_fastest_that_passes_wins_and_is_found_again(timed: list[Choice], cache: Path) -> None:
    found = tuned(cache)
    assert found.winner.verdict == "won" and found.winner.choice == Choice("openvino(rewrite=False)", "", 2)
    assert Path(found.winner.folder, "manifest.json").is_file() and found.winner.top1_agreement > 0.5
    tried = {one.choice: one for one in found.tried}
    assert Choice("onnxruntime", "", 2) in tried and Choice("openvino(rewrite=False)", "", 1) in tried
    assert Choice("openvino(rewrite=False)", "fuse", 2) in tried
    assert tried[Choice("openvino", "", 2)].ratio.value == pytest.approx(2.0, rel=0.01)
    before = len(timed)
    assert encode(tuned(cache)) == encode(found) and len(timed) == before, "nothing is raced twice"
    assert tuned(cache, compiling=CompilePlan(max_drop_pct=2.0)).key != found.key
    table = tuning_table(found.model, found.device, found.tried)
    assert "won" in table and "openvino(rewrite=False), 1 thread" in table
    json.dumps(encode(found), allow_nan=False)


def test_a_winner_whose_file_is_gone_is_raced_again(timed: list[Choice], cache: Path) -> None:
    found = tuned(cache, backends=("onnxruntime",))
    shutil.rmtree(found.winner.folder)
    before = len(timed)
    assert Path(tuned(cache, backends=("onnxruntime",)).winner.folder).is_dir() and len(timed) > before


def test_a_winner_whose_file_is_damaged_is_raced_again(timed: list[Choice], cache: Path) -> None:
    found = tuned(cache, backends=("onnxruntime",))
    with (Path(found.winner.folder) / "model.onnx").open("ab") as file:
        file.write(b"x")
    before = len(timed)
    again = tuned(cache, backends=("onnxruntime",))
    assert len(timed) > before
    manifest.read(Path(again.winner.folder))
    (place,) = (cache / "tunings").glob("*.json")
    place.write_text(json.dumps(encode(dataclasses.replace(again, tried=()))))
    assert tuned(cache, backends=("onnxruntime",)).winner.verdict == "won", "a tuning that holds nothing is none"


def test_what_it_was_judged_by_is_part_of_its_key(
    timed: list[Choice], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, photo in enumerate(data.source("photos(n=3)").images()):
        photo.save(tmp_path / f"{seed}.png")
    compiling, backends = CompilePlan(calibration=f"folder(path={str(tmp_path)!r})"), ("onnxruntime",)
    first = tuned(cache, compiling=compiling, backends=backends).key
    assert tuned(cache, compiling=compiling, backends=backends).key == first
    (tmp_path / "0.png").unlink()
    changed = tuned(cache, compiling=compiling, backends=backends).key
    assert changed != first, "the folder holds other images now"
    monkeypatch.setattr("edgejoule.compile.build.BUILD_VERSION", 10**6)
    assert tuned(cache, compiling=compiling, backends=backends).key not in (first, changed), "the gate may have changed"


def test_labels_of_another_network_are_told_before_the_race(timed: list[Choice], cache: Path) -> None:
    with pytest.raises(DataError, match="tells 1000 classes apart"):
        tuned(cache, compiling=CompilePlan(calibration="digits"), backends=("onnxruntime",))
    assert not timed


def test_times_of_the_two_races_are_never_compared() -> None:
    def lane(name: str, seconds: float, left: str = "") -> Lane[Choice]:
        return Lane(Choice(name, "", 1), (seconds,) * 3, left)

    coarse = (lane("a", 1.0), lane("b", 1.2), lane("c", 1.5))  # the machine was twice as fast then
    fine = (lane("a", 2.0), lane("b", 2.4), lane("broken", 0.1, "failed: it rains"), lane("late", 2.1, "dropped after 1 round"))
    order = [one.candidate.backend for one in tuning._fastest_first(fine, coarse)]
    assert order == ["a", "b", "c", "late"]


def test_why_all_failed_in_the_race_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(self: Any, choice: Choice, number: int) -> float:
        raise BackendError("the device is gone")

    monkeypatch.setattr("edgejoule.tuning._Tuner.seconds", seconds)
    with pytest.raises(BackendError, match=r"nothing that was tried runs test_vit.*the device is gone"):
        tuned(cache, backends=("onnxruntime",))


def test_what_fails_the_truth_gate_never_races(timed: list[Choice], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule import compiling

    real = compiling.compile_model

    def lying(spec: Any, backends: Any, *rest: Any, **options: Any) -> Any:
        for made in real(spec, backends, *rest, **options):
            lies = "rewrite" in backends[0]
            yield dataclasses.replace(made, caveats=(caveats.caveat("parity_low", "0.56"),)) if lies else made

    monkeypatch.setattr(compiling, "compile_model", lying)
    found = tuned(cache)
    assert found.winner.choice.backend == "openvino" and not any("rewrite" in one.backend for one in timed)
    assert [one.verdict for one in found.tried if "rewrite" in one.choice.backend] == ["not raced: parity low (0.56)"]


@pytest.mark.parametrize(("weights", "races"), [("pretrained", False), ("random", True)])
def test_what_quantising_could_not_bring_under_the_budget_does_not_race(
    weights: str, races: bool, timed: list[Choice], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgejoule import compiling

    real = compiling.compile_model

    def missing(spec: Any, backends: Any, *rest: Any, **options: Any) -> Any:
        for made in real(spec, backends, *rest, **options):
            doubts = (caveats.caveat("budget_missed", "drop 9.4 points"),) if "rewrite" in backends[0] else ()
            yield dataclasses.replace(made, caveats=doubts, variant=dataclasses.replace(made.variant, weights=weights))

    monkeypatch.setattr(compiling, "compile_model", missing)
    found = tuned(cache)
    assert any("rewrite" in one.backend for one in timed) is races and ("rewrite" in found.winner.choice.backend) is races
    assert ("not raced: budget missed (drop 9.4 points)" in {one.verdict for one in found.tried}) is not races


def called_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled networks say that their weights are: random ones have no budget."""
    from edgejoule import compiling

    real = compiling.compile_model

    def renamed(*given: Any, **options: Any) -> Any:
        for made in real(*given, **options):
            yield dataclasses.replace(made, variant=dataclasses.replace(made.variant, weights="pretrained"))

    monkeypatch.setattr(compiling, "compile_model", renamed)


def test_the_winner_keeps_the_budget(timed: list[Choice], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called_pretrained(monkeypatch)
    monkeypatch.setattr("edgejoule.tuning._Tuner.drop_pct", lambda self, choice: 3.0 if "rewrite" in choice.backend else 0.5)
    found = tuned(cache)
    assert found.winner.choice.backend == "openvino" and found.winner.drop_pct == 0.5
    assert "over budget: 3.0 points lost" in {one.verdict for one in found.tried}
    monkeypatch.setattr("edgejoule.tuning._Tuner.drop_pct", lambda self, choice: 3.0)
    with pytest.raises(BackendError, match=r"budget of 0\.9 points"):
        tuned(cache, compiling=CompilePlan(max_drop_pct=0.9))


def test_nothing_that_runs_is_an_error_with_the_reasons(timed: list[Choice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule.compile.onnxruntime import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "probe", lambda self: "it rains")
    with pytest.raises(BackendError, match=r"nothing that was tried runs test_vit.*it rains"):
        tuned(tmp_path, backends=("onnxruntime",))


def test_all_that_works_here_races() -> None:
    found = usable()
    assert {"eager(precision='fp32')", "onnxruntime(precision='fp32')", "openvino(precision='int8')"} <= set(found)
    assert not [one for one in found if "cuda" in one or "tensorrt" in one] or __import__("torch").cuda.is_available()


def test_one_thing_is_varied_at_a_time() -> None:
    found = list(varied(Choice("eager", "", 4), 4))
    assert Choice("eager", "", 1) in found and Choice("eager", "", 2) in found and Choice("eager", "fuse", 4) in found
    assert Choice("eager(layout='channels_last')", "", 4) in found and Choice("eager", "", 4) not in found
    assert [one.recipe for one in varied(Choice("onnxruntime", "fuse", 1), 1)] == []


def test_a_real_race_of_real_workers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "COARSE", 1)
    monkeypatch.setattr(tuning, "FINE", 2)
    monkeypatch.setattr(
        tuning,
        "SHORT",
        "quick(window_s=0.05, window_inferences=2, warmup_s=0.02, warmup_cap_s=0.05, idle_s=0.0, repeats_max=1, repeats_min=1)",
    )
    found = tuned(cache, plan=MeasurePlan(threads=1), backends=("onnxruntime",))
    assert 0 < found.winner.latency_s < 5 and found.winner.rounds >= 1
