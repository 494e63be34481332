"""The worker for real: fresh processes, a real runtime, and a third party's backend that dies, hangs and chatters."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule import environments, errors, stages
from edgejoule.bench import Bench
from edgejoule.errors import AgentError, ArtifactError, BackendError, DataError, EdgejouleError, MeterError, SpecError, TransportError
from edgejoule.fleet import dispatch
from edgejoule.fleet.agent import thread_limits
from edgejoule.fleet.dispatch import rebuild, run_job
from edgejoule.fleet.local import Local
from edgejoule.measure.environment import environment
from edgejoule.measure.protocols import profile
from edgejoule.measure.summary import summarise
from edgejoule.plain import encode
from edgejoule.records import Job, Outputs, SessionInfo, Trial, Workload, floats
from edgejoule.study_file import MeasurePlan
from tests import samples
from tests.fakes.artifacts import PREPROCESSING, install_plugin, odd_artifact, onnx_artifact, write_images

BRIEF = profile("quick(idle_s=0.3, warmup_s=0.1, warmup_cap_s=0.5, window_s=0.4)")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a job for the misbehaving backend; workers see its entry point as they would see an installed package's."""
    install_plugin(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    write_images(tmp_path / "images.npy")

    def make(mode: str, action: Any = "outputs", batch: int = 1, **more: Any) -> Job:
        odd_artifact(tmp_path / mode, mode, batch)
        workload = Workload("offline" if batch > 1 else "single_stream", batch)
        return Job(action, str(tmp_path / mode), str(tmp_path / "images.npy"), workload, 2, protocol=BRIEF, **more)

    return make


def test_a_trial_of_a_real_runtime_from_end_to_end(tmp_path: Path) -> None:
    artifact = onnx_artifact(tmp_path / "artifact")
    write_images(tmp_path / "images.npy")
    events: list[Any] = []
    job = Job("measure", str(tmp_path / "artifact"), str(tmp_path / "images.npy"), Workload(), 1, "key", BRIEF, "estimate", 2)
    trial = run_job(job, on_event=events.append)
    assert isinstance(trial, Trial)
    assert (trial.key, trial.repeat, trial.artifact_sha256, trial.meter) == ("key", 2, artifact.sha256, "estimate")
    names = [event["event"] for event in events]
    assert names == [*(phase.name for phase in trial.phases), "done"] and names[0] == "load" and "window" in names
    window = trial.phase("window")
    assert window and sum(trial.latencies_s) == pytest.approx(window.stop_s - window.start_s) and len(trial.latencies_s) > 100
    (trace,) = trial.traces
    assert trace.times_s[0] < trial.phases[3].start_s and trace.times_s[-1] > trial.phases[-1].stop_s - 0.1
    assert trial.environment.runtime.startswith("onnxruntime ") and trial.peak_memory_bytes > 10_000_000
    # The invariant of the board: a runtime's backend brings numpy and that runtime, and nothing of the host.
    packages = set(events[-1]["packages"])
    assert {"onnxruntime", "numpy"} <= packages and not packages & {"torch", "scipy", "sqlalchemy", "onnx", "PIL", "timm"}
    found = summarise([trial], artifact)
    assert found.energy_j and found.energy_j.value > 0 and found.latency_s.value == pytest.approx(np.median(trial.latencies_s))


def test_a_trial_of_another_environment_has_the_fingerprint_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what runs in a backend's own environment, which holds another package, would stand in a ranking of its own."""
    artifact = onnx_artifact(tmp_path / "artifact")
    write_images(tmp_path / "images.npy")
    (tmp_path / "site" / "openvino-1.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "openvino-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: openvino\nVersion: 1\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(dispatch, "worker_argv", lambda artifact, transport: [str(python), "-m", dispatch.AGENT])
    entrant = stages.Entrant(dataclasses.replace(artifact, folder=str(tmp_path / "artifact")), tmp_path / "images.npy", Workload(), "none")
    trial = stages.run_trial(entrant, "key", BRIEF, 1, 0, Bench(cache=tmp_path))
    here = environment(1)
    assert trial.environment.versions["openvino"] == "1" != here.versions.get("openvino")
    assert trial.environment.fingerprint == here.fingerprint


@pytest.mark.parametrize(("backend", "known_anew"), [("litert", True), ("onnxruntime", False)])
def test_another_version_in_a_backends_own_environment_is_another_trial(
    backend: str, known_anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint sees this installation only; the same bytes run otherwise on a newer runtime."""
    keys = []
    for version in ("2.1.0", "2.1.0", "2.2.0"):
        monkeypatch.setattr(environments, "versions", lambda name, packages, version=version: {"ai-edge-litert": version})
        made = stages.Entrant(samples.artifact(backend=backend), tmp_path / "images.npy", Workload(), "none")
        keys.append(stages.trial_keys(made, MeasurePlan(threads=1)))
    assert keys[0] == keys[1] and (keys[0] != keys[2]) is known_anew


@pytest.mark.parametrize("work", ["streams(n=2)", "fixed_rate(hz=30)"])
def test_a_sustained_profile_has_one_inference_after_the_other(work: str) -> None:
    stages.check(MeasurePlan(profile="sustained(window_s=60)", meter="none"), ["onnxruntime"])
    with pytest.raises(SpecError, match="one inference after the other"):
        stages.check(MeasurePlan(profile="sustained(window_s=60)", scenario=work, meter="none"), ["onnxruntime"])


@pytest.mark.parametrize("batch", [1, 4])
def test_outputs_are_row_by_row_those_of_the_images(batch: int, tmp_path: Path) -> None:
    import onnxruntime

    onnx_artifact(tmp_path / "artifact", batch)
    crops = write_images(tmp_path / "images.npy", 11)
    workload = Workload("offline" if batch > 1 else "single_stream", batch)
    found = run_job(Job("outputs", str(tmp_path / "artifact"), str(tmp_path / "images.npy"), workload, 1))
    assert isinstance(found, Outputs) and found.shape == (8, 3) and found.info.threads == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "artifact" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = ((crops[:8] / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]).astype(np.float32)
    expected = [session.run(None, {"images": images[i : i + batch]})[0] for i in range(0, 8, batch)]
    assert np.asarray(found.logits).reshape(8, 3) == pytest.approx(np.concatenate(expected), abs=1e-5)


def test_as_many_outputs_are_computed_as_were_asked_for(odd: Any) -> None:
    counts = {most: run_job(odd("ok", batch=2, most=most)) for most in (1, 3, 5, 100)}
    assert {most: found.shape[0] for most, found in counts.items() if isinstance(found, Outputs)} == {1: 1, 3: 3, 5: 5, 100: 5}
    first, every = counts[3], counts[100]
    assert isinstance(first, Outputs) and isinstance(every, Outputs) and list(first.logits) == list(every.logits)[:9]
    with pytest.raises(AgentError, match="expected at least one"):
        run_job(odd("ok", most=0))


def test_a_last_batch_is_filled_by_repeating_and_cut_off_again(odd: Any) -> None:
    found = run_job(odd("ok", batch=3))
    assert isinstance(found, Outputs) and found.shape == (5, 3)
    alone = run_job(odd("ok"))
    assert isinstance(alone, Outputs) and list(found.logits) == pytest.approx(list(alone.logits), rel=1e-6)


def test_threads_are_limited_before_anything_reads_the_limit(odd: Any) -> None:
    found = run_job(odd("ok"))
    assert isinstance(found, Outputs) and found.info.providers == ("2PASSIVE",) and found.info.threads == 2
    assert thread_limits(3)["OPENBLAS_NUM_THREADS"] == "3" and "OMP_NUM_THREADS" not in thread_limits(0)


def test_what_a_runtime_prints_does_not_reach_the_protocol(odd: Any) -> None:
    trial = run_job(odd("noise", "measure"))
    assert isinstance(trial, Trial) and len(trial.latencies_s) > 50 and "no_meter" in {c.code for c in trial.caveats}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_dies_is_named_by_its_signal(odd: Any, name: str) -> None:
    with pytest.raises(AgentError, match=f"killed by {name}"):
        run_job(odd(name))


def test_a_worker_that_exits_hangs_or_fails(odd: Any) -> None:
    with pytest.raises(AgentError, match="exit code 7"):
        run_job(odd("exit"))
    with pytest.raises(BackendError, match=r"^the runtime refuses the model: compile it again$"):
        run_job(odd("raise"))
    with pytest.raises(AgentError, match="ValueError: a bug of ours"):
        run_job(odd("bug"))
    began = time.monotonic()
    with pytest.raises(AgentError, match="no end after 3 s"):
        run_job(odd("hang"), timeout_s=3)
    assert time.monotonic() - began < 10


def test_a_crash_while_closing_loses_nothing(odd: Any) -> None:
    assert isinstance(run_job(odd("late")), Outputs)


def test_errors_come_back_as_what_they_were(odd: Any, tmp_path: Path) -> None:
    job = odd("ok")
    (tmp_path / "ok" / "weights.bin").write_bytes(b"changed")
    with pytest.raises(ArtifactError):
        run_job(job)
    with pytest.raises(ArtifactError):
        run_job(dataclasses.replace(job, artifact=str(tmp_path / "nowhere")))
    good = odd("ok")
    with pytest.raises(DataError):
        run_job(dataclasses.replace(good, images=str(tmp_path / "none.npy")))
    with pytest.raises(MeterError, match="no recording"):
        run_job(odd("ok", "measure", meter="replay(path='none.csv')"))
    with pytest.raises(SpecError, match="estimate"):
        run_job(odd("ok", "measure", meter="estimat"))


@pytest.mark.parametrize("text", ["{}", "", "\xff\x00", "[" * 200_000])
def test_a_worker_that_is_given_nonsense_says_so(text: str) -> None:
    done = subprocess.run([sys.executable, "-m", "edgejoule.fleet.agent"], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["kind"] == "AgentError"
    assert "not given a job" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_a_worker_does_not_outlive_a_run_that_is_killed(odd: Any, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(encode(odd("hang"))))
    start = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'edgejoule.fleet.agent'], stdin=open(sys.argv[1]),"
    start += " start_new_session=True); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", start, str(tmp_path / "job.json")], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        worker = int(run.stdout.readline())
        time.sleep(1.0)  # until it hangs
        assert alive(worker)
        run.kill()
    for _ in range(100):
        if not alive(worker):
            break
        time.sleep(0.05)
    assert not alive(worker)


# ---------------------------------------------------------------- dispatch, without processes


@dataclasses.dataclass
class Says:
    """A transport that says what it was told to, then perhaps fails."""

    lines: Any = ()
    error: str = ""

    def run(self, argv: Any, stdin: str, timeout_s: float) -> Any:
        yield from self.lines
        if self.error:
            raise TransportError(self.error)


def told(monkeypatch: pytest.MonkeyPatch, *lines: str, error: str = "") -> Any:
    monkeypatch.setattr(dispatch.registry, "create", lambda kind, text: Says(lines, error))
    return run_job(Job("outputs", "folder", "images", Workload(), 1))


OUTPUTS = json.dumps({"outputs": encode(Outputs(floats([1.5]), (1, 1), SessionInfo("fp32", (), "x", 1)))})


@pytest.mark.parametrize(
    "lines", [(), ("hello",), ("[1]",), ('{"trial": {}}',), ('{"outputs": 3}',), ("{}",), ('{"error": {}}',), ('{"event": "load"}',), ("",)]
)
def test_nonsense_is_an_agent_error(lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgentError):
        told(monkeypatch, *lines)


def test_an_answer_stands_though_the_worker_crashes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(told(monkeypatch, OUTPUTS, error="killed by SIGSEGV"), Outputs)
    with pytest.raises(AgentError, match="SIGSEGV"):
        told(monkeypatch, '{"event": "load"}', error="killed by SIGSEGV")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), lambda x: st.dictionaries(st.sampled_from(
    ["trial", "outputs", "error", "kind", "message"]), x), max_leaves=5).map(json.dumps)))  # fmt: skip
def test_any_line_is_an_answer_or_an_edgejoule_error(line: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(EdgejouleError):
        told(patch, line)


def test_every_error_of_ours_comes_back_by_name() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, EdgejouleError):
            found = rebuild({"kind": name, "message": "what happened"})
            assert str(found) == "what happened" and isinstance(found, SpecError if issubclass(kind, SpecError) else kind)
    assert type(rebuild({"kind": "Iterable", "message": "x"})) is AgentError


# ---------------------------------------------------------------- local


def test_lines_come_as_they_are_written() -> None:
    lines = Local().run([sys.executable, "-c", "import time; print('a', flush=True); time.sleep(30)"], "", 60)
    began = time.monotonic()
    assert next(lines) == "a" and time.monotonic() - began < 20
    lines.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 25


def test_closing_ends_the_whole_group(tmp_path: Path) -> None:
    lines = Local().run(["sh", "-c", "sleep 60 & echo $!; wait"], "", 60)
    child = int(next(lines))
    lines.close()  # type: ignore[attr-defined]
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_failures_carry_the_last_words_and_the_signal() -> None:
    with pytest.raises(TransportError, match=r"(?s)exit code 3.*last words:\noops"):
        list(Local().run(["sh", "-c", "echo oops >&2; exit 3"], "", 20))
    with pytest.raises(TransportError, match="killed by SIGTERM"):
        list(Local().run(["sh", "-c", f"kill -{int(signal.SIGTERM)} $$"], "", 20))
    with pytest.raises(TransportError, match="cannot start"):
        list(Local().run(["no-such-program"], "", 20))
    with pytest.raises(TransportError, match="cannot copy"):
        Local().push(Path("no-such-file"), "there")


def test_much_input_to_a_program_that_reads_none_and_much_output() -> None:
    assert list(Local().run(["true"], "x" * 1_000_000, 20)) == []
    assert sum(1 for _ in Local().run(["seq", "100000"], "", 60)) == 100_000
