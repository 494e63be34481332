"""A network through trtexec alone, by the agent as on a board: outputs, a metered window on our clock, and every way it can fail.

The real program is not to be had here: tests/fakes/trtexec.py has its options, its formats and onnxruntime's arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import registry
from edgejoule.compile import trtexec, trtexec_session
from edgejoule.compile.export import TorchExport
from edgejoule.compile.tensorrt import FACTS, FILE, TensorRt
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.fleet.dispatch import run_job
from edgejoule.measure import trial as measure_trial
from edgejoule.measure.protocols import profile
from edgejoule.measure.trial import run_trial
from edgejoule.records import Job, Outputs, Trial, Workload, floats
from edgejoule.seams import CompileContext
from tests.fakes.artifacts import PREPROCESSING, write_artifact, write_images
from tests.fakes.measuring import FakeClock, FakeMeter, FakeSession, artifact, bench, crops, job
from tests.networks import in_folder

SHAPE = (1, 3, 16, 16)
FAKE = Path(__file__).parent / "fakes" / "trtexec.py"
BRIEF = profile("quick(idle_s=0.3, warmup_s=0.1, warmup_cap_s=0.5, window_s=0.4)")
HAS_TENSORRT = not isinstance(TensorRt().runs_here(), str)
pytestmark = pytest.mark.skipif(HAS_TENSORRT, reason="this machine has TensorRT: trtexec is not asked")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    import torch

    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(128, 3))
    return TorchExport(body.eval(), SHAPE, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def compiled(export: TorchExport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    images = np.random.default_rng(0).normal(size=(4, *SHAPE[1:])).astype(np.float32)
    TensorRt("fp16").compile(export, CompileContext(SHAPE, folder, lambda: images))
    write_artifact(folder, "tensorrt", 1, (FILE, FACTS))
    return folder


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with trtexec on its path; call it with the fake's settings -> the runs so far (without --help)."""
    program = tmp_path / "bin" / "trtexec"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("EDGEJOULE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRTEXEC_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(trtexec_session, "WARM_UP_S", 0.05)
    write_images(tmp_path / "images.npy")

    def calls(**settings: str) -> list[str]:
        for name, value in settings.items():
            monkeypatch.setenv(f"TRTEXEC_{name.upper()}", value)
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    calls()
    return calls


@pytest.fixture
def session(board: Any, compiled: Path) -> Any:
    opened = TensorRt().load(in_folder(compiled), threads=1)
    yield opened
    opened.close()


def images(n: int = 1) -> Any:
    return np.random.default_rng(1).normal(size=(n, *SHAPE[1:])).astype(np.float32)


def wanted(export: TorchExport, given: Any) -> Any:
    import torch

    with torch.inference_mode():
        return export.module(torch.from_numpy(given)).numpy()


# ---------------------------------------------------------------- by the agent, in processes of its own


def test_outputs_are_the_networks_and_the_engine_says_its_precision(board: Any, compiled: Path, export: Any, tmp_path: Path) -> None:
    events: list[Any] = []
    ask = Job("outputs", str(compiled), str(tmp_path / "images.npy"), Workload(), 1, most=2, audit=True)
    found = run_job(ask, on_event=events.append)
    assert isinstance(found, Outputs) and found.shape == (2, 3)
    shown = ((np.load(tmp_path / "images.npy")[:2] / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]).astype(np.float32)
    assert np.asarray(found.logits).reshape(2, 3) == pytest.approx(wanted(export, shown), rel=1e-2, abs=1e-2)
    info = found.info
    assert (info.precision, info.providers, info.runtime, info.threads) == ("fp16", ("Orin",), "tensorrt 10.3.0 (trtexec)", 1)
    assert [(port.name, port.shape, port.dtype) for port in (*info.inputs, *info.outputs)] == [
        ("images", SHAPE, "float32"),
        ("logits", (1, 3), "float32"),
    ]
    assert info.placement is not None and info.placement.precisions == {"fp16": 2}
    packages = set(events[-1]["packages"])
    assert "numpy" in packages and not packages & {"torch", "onnx", "onnxruntime", "scipy", "sqlalchemy"}
    assert len(board()) == 4 and "--skipInference" in board()[0]  # built, proved, and one process an image


def test_a_trial_is_what_trtexec_timed_on_the_meters_clock(board: Any, compiled: Path, tmp_path: Path) -> None:
    board(ms="5")
    ask = Job("measure", str(compiled), str(tmp_path / "images.npy"), Workload(), 1, "key", BRIEF, "estimate", 1)
    before = time.perf_counter()
    trial = run_job(ask)
    assert isinstance(trial, Trial)
    load, first, warmup, idle, window, after = trial.phases
    assert [phase.name for phase in trial.phases] == ["load", "first", "warmup", "idle_before", "window", "idle_after"]
    spent = np.asarray(trial.latencies_s)
    assert sum(spent) == pytest.approx(window.stop_s - window.start_s) and window.stop_s - window.start_s == pytest.approx(0.4, abs=0.1)
    assert np.median(spent) == pytest.approx((5 * 1.04 + 0.12 + 0.04) / 1000, rel=0.02)  # computing, both transfers and the gap
    # Its warm-up of a second lies between the idle and the window, and the window's end before the idle after it.
    assert before < load.start_s and idle.stop_s + 0.9 < window.start_s and window.stop_s < after.start_s
    (trace,) = trial.traces
    assert trace.times_s[0] < window.start_s and trace.times_s[-1] > window.stop_s
    assert first.stop_s <= warmup.start_s and trial.memory is not None
    assert trial.memory.pss_bytes is None and trial.memory.rss_bytes == trial.peak_memory_bytes > 20_000_000  # the program's own
    runs = [line for line in board() if "exportTimes" in line]
    assert len(runs) >= 2 and all("--exposeDMA" in line and "--loadInputs=images:" in line for line in runs)
    assert len([line for line in board() if "--onnx" in line]) == 1


@pytest.mark.parametrize(("workload", "what"), [(Workload("fixed_rate(hz=5)"), "fixed_rate"), (Workload(end_to_end=True), "end to end")])
def test_what_it_cannot_time_is_refused_before_any_image(board: Any, compiled: Path, tmp_path: Path, workload: Any, what: str) -> None:
    ask = Job("measure", str(compiled), str(tmp_path / "images.npy"), workload, 1, "key", BRIEF, "estimate", 1)
    with pytest.raises(BackendError, match=f"times itself, back to back only: .*{what}.*Python package"):
        run_job(ask)
    assert not any("loadInputs" in line for line in board())


# ---------------------------------------------------------------- the session alone


@pytest.mark.parametrize("version", ["100300", "101600", "110100"])
def test_both_versions_flags_are_right_and_the_engine_is_built_once(version: str, board: Any, compiled: Path, export: Any) -> None:
    board(version=version)
    backend = registry.create("backend", "tensorrt(workspace_mib=512)")
    assert backend.runs_here() is None
    opened = backend.load(in_folder(compiled), threads=1)
    given = np.asfortranarray(images())
    assert opened.infer(given)["logits"] == pytest.approx(wanted(export, images()), rel=1e-2, abs=1e-2)
    assert opened.infer(given)["logits"].dtype == np.float32
    assert list(np.diff(opened.window(images(), 0.1, 3, time.perf_counter))) == pytest.approx([0.0053] * 19, rel=0.1)
    for wrong in (images(2), images().astype(np.float64), images()[:, :, :-1]):
        with pytest.raises(BackendError, match="expected float32"):
            opened.infer(wrong)
        with pytest.raises(BackendError, match="expected float32"):
            opened.window(wrong, 0.1, 1, time.perf_counter)
    opened.close()
    backend.load(in_folder(compiled), threads=1).close()
    built = [line for line in board() if "--onnx" in line]
    assert len(built) == 1 and "--memPoolSize=workspace:512" in built[0] and "--profilingVerbosity=detailed" in built[0]
    assert all(("--includeDataTransfers" in line) == (version == "110100") for line in board())
    registry.create("backend", "tensorrt").load(in_folder(compiled), threads=1).close()
    assert len([line for line in board() if "--onnx" in line]) == 2  # another limit is another engine


def test_a_spoilt_engine_is_built_again_and_a_cache_that_cannot_be_written_is_done_without(
    board: Any, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spoil in (".engine", ".json"):
        TensorRt().load(in_folder(compiled), threads=1).close()
        kept = sorted((tmp_path / "cache" / "engines").iterdir())
        assert [file.suffix for file in kept] == [".engine", ".json"]
        next(file for file in kept if file.suffix == spoil).write_bytes(b"cut")
    TensorRt().load(in_folder(compiled), threads=1).close()
    assert len([line for line in board() if "--onnx" in line]) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEJOULE_CACHE", str(tmp_path / "file"))
    opened = TensorRt().load(in_folder(compiled), threads=1)
    assert opened.infer(images())["logits"].shape == (1, 3)
    opened.close()


def test_precision_is_the_engines_own_word(board: Any, compiled: Path) -> None:
    board(type="Int8")
    opened = TensorRt().load(in_folder(compiled), threads=1)
    assert opened.info().precision == "int8" and opened.audit(images()).precisions == {"int8": 2}
    opened.close()


def test_a_window_is_at_least_as_long_and_as_many_as_asked(session: Any) -> None:
    before = time.perf_counter()
    stamps = session.window(images(), 0.3, 1, time.perf_counter)
    assert 0.29 < stamps[-1] - stamps[0] < 0.32 and before + 0.05 < stamps[0] and stamps[-1] < time.perf_counter()
    assert len(session.window(images(), 0.0, 33, time.perf_counter)) == 34


def test_pauses_between_queries_stay_where_they_were(session: Any, board: Any) -> None:
    board(fault="pause")
    spent = np.diff(session.window(images(), 0.5, 1, time.perf_counter))
    assert 1 <= np.count_nonzero(spent > 0.02) <= 3 and np.median(spent) == pytest.approx(0.00536, rel=0.02)


FAULTS = {
    "killed": r"killed by SIGKILL \(out of memory\?\)",
    "error": "illegal memory access",
    "no times": "wrote no times",
    "cut times": "no JSON",
    "rushed": "disagree by -0",
    "garbage": "cut short",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_window_that_fails_says_why(fault: str, session: Any, board: Any) -> None:
    session.window(images(), 0.05, 1, time.perf_counter)  # what it left must not be taken for an answer
    board(fault=fault)
    with pytest.raises(BackendError, match=FAULTS[fault]) as caught:
        session.window(images(), 0.3, 1, time.perf_counter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "why"), [("nan", "finite"), ("killed", "SIGKILL"), ("error", "illegal memory"), ("garbage", "cut short")]
)
def test_an_inference_that_fails_says_why(fault: str, why: str, session: Any, board: Any) -> None:
    session.infer(images())
    board(fault=fault)
    with pytest.raises(BackendError, match=why) as caught:
        session.infer(images())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "why"), [("build", "any implementation for node fc1"), ("killed building", "SIGKILL"), ("no engine", "wrote none")]
)
def test_an_engine_that_cannot_be_built_says_why(fault: str, why: str, board: Any, compiled: Path, tmp_path: Path) -> None:
    board(fault=fault)
    with pytest.raises(BackendError, match=why):
        TensorRt().load(in_folder(compiled), threads=1)
    assert not (tmp_path / "cache" / "engines").exists()


def test_a_run_without_end_is_ended(session: Any, board: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    board(ms="20000")
    monkeypatch.setattr(trtexec_session, "RUNS_S", 0.3)
    with pytest.raises(BackendError, match=r"did not end within 0.4 s and was killed"):
        session.window(images(), 0.01, 1, time.perf_counter)


def test_files_and_programs_that_do_not_fit(board: Any, compiled: Path, tmp_path: Path) -> None:
    for number, (name, content) in enumerate(((FILE, b"not a model"), (FACTS, b"no"), (FILE, b""))):
        folder = tmp_path / str(number)
        shutil.copytree(compiled, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="compile again"):
            TensorRt().load(in_folder(folder), threads=1)
    with pytest.raises(BackendError, match="one stream"):
        TensorRt().load(in_folder(compiled), threads=1, streams=2)
    for settings, why in (({"version": "8601"}, "8.6.1, with no strongly typed"), ({"fault": "garbage"}, "nor does .* say which")):
        board(**settings)
        missing = TensorRt().runs_here()
        assert missing and "\n" not in missing
        with pytest.raises(BackendError, match=why) as caught:
            TensorRt().load(in_folder(compiled), threads=1)
        assert str(caught.value) == missing


def test_where_nothing_is_both_remedies_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = TensorRt().runs_here()
    assert missing and "pip install tensorrt" in missing and "trtexec" in missing and "JetPack" in missing


# ---------------------------------------------------------------- instants, and the order of events


def test_instants_are_finer_than_the_digits_that_starts_are_written_with() -> None:
    """Over a hundred seconds trtexec writes starts to 1 ms; the latencies and their sum are still right."""
    rng = np.random.default_rng(0)
    spent, gaps = 0.002 + 0.0001 * rng.random(5000), 0.00003 + 0.00001 * rng.random(5000)
    gaps[2500] = 0.050
    starts = 150 + np.concatenate([[0.0], np.cumsum(spent + gaps)[:-1]])
    times = trtexec.Times(floats(round(start, 3) for start in starts), floats(spent.tolist()), floats(spent.tolist()))
    found = np.asarray(trtexec.instants_of(times))
    assert found[-1] - found[0] == pytest.approx(starts[-1] + spent[-1] - starts[0], abs=0.002)
    latencies = np.diff(found)
    assert latencies[2501] == pytest.approx(0.052, abs=0.0012)
    ordinary = np.delete(latencies, 2501)[1:]
    assert ordinary == pytest.approx(np.delete(spent[1:] + gaps[:-1], 2500), abs=2e-5)
    closer = trtexec.Times(floats((150 + 0.001 * np.arange(100)).tolist()), floats([0.004] * 100), floats([0.004] * 100))
    with pytest.raises(BackendError, match="overlap"):
        trtexec.instants_of(closer)


@dataclasses.dataclass
class Alone(FakeSession):
    """A session that times itself: half a second to start, windows of 10 ms inferences, slower at first."""

    windows: int = 0

    def window(self, images: Any, duration_s: float, at_least: int, clock: Any) -> Any:
        self.windows += 1
        self.clock.now += 0.5
        count = max(at_least, round(duration_s / 0.01))
        slower = [0.02 - 0.01 * i / count if self.windows == 1 else 0.01 for i in range(count)]
        stamps = clock() + np.concatenate([[0.0], np.cumsum(slower)])
        self.clock.now = float(stamps[-1]) + 0.1
        return floats(stamps.tolist())


def test_a_session_that_times_itself_warms_up_by_windows_until_one_is_steady(tmp_path: Path) -> None:
    clock = FakeClock()
    session = Alone(clock)
    meter = FakeMeter(clock, session)
    trial = run_trial(lambda: session, artifact(), crops(), job(), meter, bench=bench(clock, tmp_path))
    assert session.windows == 3 and len(session.seen) == 1  # the first was not steady, the third is the measured one
    assert "no_steady_state" not in {doubt.code for doubt in trial.caveats}
    window = trial.phase("window")
    assert window and sum(trial.latencies_s) == pytest.approx(window.stop_s - window.start_s) == pytest.approx(2.0)
    started = Alone(clock)
    paced = job()
    paced = dataclasses.replace(paced, workload=dataclasses.replace(paced.workload, scenario="streams(n=2)"))
    meter = FakeMeter(clock, started)
    with pytest.raises(BackendError, match="back to back only"):
        run_trial(lambda: started, artifact(), crops(), paced, meter, bench=bench(clock, tmp_path))
    assert not meter.events and not started.seen


def test_the_runtimes_own_program_is_no_other_program_that_takes_the_processor() -> None:
    before = measure_trial._ended_cpu_s()
    burn = "import time\nwhile time.process_time() < 0.15: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert 0.14 < measure_trial._childs_cpu_s(None, 1.0, before) < 1.0


def test_the_fake_prints_what_the_parsers_of_the_real_logs_read(board: Any, session: Any) -> None:
    assert json.loads((Path(session._engine).with_suffix(".json")).read_text())["Layers"]
    report = trtexec.parse_log(session._run(session._queries(session._engine)))
    assert report.version == (10, 3, 0) and report.latency is not None and report.queries == 1
