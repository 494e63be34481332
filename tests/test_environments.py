"""Worker environments: made offline from a folder of wheels, used by workers, unusable when half-made or another installation's."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgejoule import environments, installing
from edgejoule.cli import app
from edgejoule.environments import Environment
from edgejoule.errors import BackendError, ModelError, OutputError, UnknownNameError
from edgejoule.fleet.dispatch import worker_argv
from tests.samples import artifact
from tests.tiny_packages import TINY, write

WORKER = "tinybackend.worker"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("index") / "wheels")


@pytest.fixture(scope="module")
def made(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root folder in which ``tiny`` is installed, under settings of the user's that would lead a plain pip astray."""
    root, astray = tmp_path_factory.mktemp("environments"), tmp_path_factory.mktemp("astray")
    (astray / "tinybackend.py").write_text("raise SystemExit('not this one')")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, wheels, root)
        patch.setenv("PIP_TARGET", str(astray))
        patch.setenv("PIP_USER", "1")
        patch.setenv("PIP_REQUIRE_HASHES", "1")
        installing.install("tiny", lambda line: None)
    assert [path.name for path in astray.iterdir()] == ["tinybackend.py"]
    yield root


def offline(patch: pytest.MonkeyPatch, wheels: Path, root: Path, table: Environment = TINY) -> None:
    patch.setenv("EDGEJOULE_ENVIRONMENTS", str(root))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheels))
    patch.setattr(environments, "TABLE", {"tiny": table})


@pytest.fixture
def tiny(made: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the installed environment; its marker is as it was afterwards."""
    offline(monkeypatch, wheels, made)
    marker = made / "tiny" / environments.MARKER
    before = marker.read_text()
    yield made / "tiny"
    marker.write_text(before)


def work(**job: Any) -> Any:
    return environments.run("tiny", WORKER, job, timeout_s=60)


# ---------------------------------------------------------------- what is in it


def test_its_own_packages_come_first_and_this_installations_after(tiny: Path) -> None:
    assert environments.missing("tiny") is None
    assert environments.python_of("tiny") == str(environments.interpreter(tiny))
    seen = work(what="where")
    assert Path(seen["typing_extensions"]).is_relative_to(tiny) and Path(seen["prefix"]) == tiny
    import numpy

    assert seen["numpy"] == numpy.__file__
    own, source, ours = (
        seen["path"].index(str(place))
        for place in (environments.packages_of(tiny), Path(environments.__file__).parents[1], Path(numpy.__file__).parents[1])
    )
    assert own < source <= ours  # this very edgejoule, whatever else is installed
    assert importlib.metadata.version("typing_extensions") != "0.0.1"  # ours is untouched


def test_versions_are_those_that_its_interpreter_sees(tiny: Path) -> None:
    found = environments.versions("tiny", ("tinybackend", "typing-extensions", "numpy", "no-such-package"))
    assert found == {"tinybackend": "1.2", "typing-extensions": "0.0.1", "numpy": importlib.metadata.version("numpy")}
    assert environments.packages_named("tiny") == ("tinybackend",)


def test_pythonpath_does_not_get_in_its_way(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("typing_extensions.py", "json.py", "tinybackend.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Path(work(what="where")["typing_extensions"]).is_relative_to(tiny)


def test_this_interpreter_serves_where_it_has_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr(environments, "TABLE", {"tiny": replace(TINY, imports=("numpy", "json"))})
    assert environments.python_of("tiny") == sys.executable and environments.missing("tiny") is None
    assert environments.versions("tiny", ("numpy",)) == {"numpy": importlib.metadata.version("numpy")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tinybackend").mkdir()  # a folder of that name is not the package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environments, "TABLE", {"tiny": TINY})
    assert environments.python_of("tiny") is None


def test_a_name_that_is_not_there() -> None:
    for ask in (environments.python_of, environments.missing, environments.environment_of):
        with pytest.raises(UnknownNameError, match="did you mean litert"):
            ask("litret")
    with pytest.raises(UnknownNameError, match="known: coreml, executorch, litert, mnn, ncnn"):
        environments.run("tflite", WORKER, {}, 1)


# ---------------------------------------------------------------- half-made, damaged, another installation's


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "1.0"}, "torch was 1.0 and is"),
        ({"python": "3.1"}, "python was 3.1"),
        ({"home": "/elsewhere"}, "home was /elsewhere"),
        ({"source": "/old/checkout"}, "source was /old/checkout"),
        ({"requirements": ["tinybackend==0.*"]}, r"requirements was tinybackend==0\.\* and is tinybackend==1\.\*"),
    ],
)
def test_one_that_was_made_for_another_installation_is_not_used(change: dict[str, Any], said: str, tiny: Path) -> None:
    marker = tiny / environments.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), **change}))
    assert environments.python_of("tiny") is None
    with pytest.raises(BackendError, match=said + r".*edgejoule doctor --install tiny"):
        work(what="echo")


@pytest.mark.parametrize("content", ["", "[]", '{"python"'])
def test_one_that_was_not_finished_is_not_used(content: str, tiny: Path) -> None:
    (tiny / environments.MARKER).write_text(content)
    assert environments.python_of("tiny") is None and "was not finished or is damaged" in str(environments.missing("tiny"))


def test_one_whose_packages_are_gone_is_not_used_and_is_made_again(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path)
    installing.install("tiny", lambda line: None)
    assert environments.missing("tiny") is None
    for left in environments.packages_of(tmp_path / "tiny").glob("tinybackend*"):
        left.rename(tmp_path / left.name)
    assert environments.python_of("tiny") is None
    assert "is damaged (tinybackend cannot be found in it): edgejoule doctor --install tiny" in str(environments.missing("tiny"))
    assert installing.install("tiny", lambda line: None) == environments.python_of("tiny") is not None


def test_one_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    for row in environments.survey():
        assert row["ok"] or f"edgejoule doctor --install {row['name']}" in row["remedy"]
    assert environments.python_of("litert") is None or environments.python_of("litert") == sys.executable
    monkeypatch.delenv("EDGEJOULE_ENVIRONMENTS")
    assert environments.folder_of("litert") == Path.home() / ".local/share/edgejoule/environments/litert"


# ---------------------------------------------------------------- workers


def test_a_job_goes_there_and_the_answer_comes_back_through_any_chatter(tiny: Path) -> None:
    assert work(what="echo", deep={"a": [1, None, "ü"]}) == {"echo": {"what": "echo", "deep": {"a": [1, None, "ü"]}}}


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("refuse", ModelError, "^it has no head: give it one$"),
        ("bug", BackendError, r"ZeroDivisionError: a zero somewhere"),
        ("full", OutputError, "No space left on device"),
        ("crash", BackendError, r"was killed by SIGSEGV \(last words\)"),
        ("leave", BackendError, "ended with exit code 0 and no answer"),
    ],
)
def test_what_goes_wrong_there_is_told_here(what: str, kind: type[Exception], said: str, tiny: Path) -> None:
    with pytest.raises(kind, match=said) as caught:
        work(what=what)
    assert type(caught.value) is kind


def test_a_worker_that_hangs_is_killed(tiny: Path) -> None:
    with pytest.raises(BackendError, match=r"did not end within 0\.5 s"):
        environments.run("tiny", WORKER, {"what": "hang"}, timeout_s=0.5)


def test_one_that_falls_after_its_answer_has_answered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY", "--fall")
    assert work(what="echo") == {"echo": {"what": "echo"}}


def test_a_backends_worker_is_run_by_its_environments_interpreter(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule import manifest
    from edgejoule.compile.eager import Eager

    here = [sys.executable, "-m", "edgejoule.fleet.agent"]
    manifest.write(tmp_path, replace(artifact(), backend="eager"))
    assert worker_argv(str(tmp_path)) == here
    monkeypatch.setattr(Eager, "environment", "tiny", raising=False)
    there = worker_argv(str(tmp_path))
    assert there[0] == str(environments.interpreter(tiny)) and there[-2:] == ["-m", "edgejoule.fleet.agent"]
    (tiny / environments.MARKER).unlink()
    assert worker_argv(str(tmp_path)) == here  # and the backend's own load says what is missing
    assert worker_argv(str(tmp_path / "nowhere")) == here


# ---------------------------------------------------------------- installing


def test_what_is_there_is_not_made_again(tiny: Path) -> None:
    told: list[str] = []
    assert installing.install("tiny", told.append) == environments.python_of("tiny")
    assert len(told) == 1 and "can be used already" in told[0]


def test_making_an_environment_leaves_setuptools_importable(tmp_path: Path) -> None:
    """torch's compiler imports it. In a process of its own, where nothing has imported it yet."""
    made = "import pathlib, sys; from edgejoule import installing; installing._make(pathlib.Path(sys.argv[1]), print); import setuptools"
    done = subprocess.run([sys.executable, "-c", made, str(tmp_path / "venv")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


def test_pip_that_fails_leaves_nothing_and_says_why(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path, replace(TINY, requirements=("tinybackend==7.*",)))
    with pytest.raises(BackendError, match=r"No matching distribution found for tinybackend==7\.\*.*check the network"):
        installing.install("tiny", lambda line: None)
    assert not (tmp_path / "tiny").exists() and "is not installed" in str(environments.missing("tiny"))


def test_numpy_and_torch_are_never_replaced(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path, replace(TINY, requirements=("greedybackend",), imports=("greedybackend",)))
    with pytest.raises(BackendError, match=r"conflict.*make a new virtual environment"):
        installing.install("tiny", lambda line: None)
    assert not (tmp_path / "tiny").exists()


def test_what_cannot_be_imported_is_not_installed(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path, replace(TINY, requirements=("brokenbackend",), imports=("brokenbackend",)))
    with pytest.raises(BackendError, match=r"cannot be imported .*nothing_of_that_name"):
        installing.install("tiny", lambda line: None)
    assert environments.python_of("tiny") is None and not (tmp_path / "tiny").exists()


def test_ctrl_c_leaves_nothing_that_looks_usable(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path)

    def stop(line: str) -> None:
        if line.startswith("putting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        installing.install("tiny", stop)
    assert environments.python_of("tiny") is None and not (tmp_path / "tiny").exists()


def test_a_half_made_one_is_cleared_and_a_second_installer_waits(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, wheels, tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "left").write_text("by a killed installer")
    told: list[str] = []
    waiting = threading.Event()
    with (tmp_path / ".tiny.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def note(line: str) -> None:
            told.append(line)
            waiting.set()

        thread = threading.Thread(target=installing.install, args=("tiny", note))
        thread.start()
        assert waiting.wait(60) and told == ["waiting for another process that installs tiny"]
    thread.join()
    assert told[-1].startswith("tiny is ready") and environments.python_of("tiny") is not None
    assert not (tmp_path / "tiny" / "left").exists()


def test_a_folder_that_cannot_be_written(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    offline(monkeypatch, wheels, tmp_path / "file")
    with pytest.raises(OutputError, match="EDGEJOULE_ENVIRONMENTS"):
        installing.install("tiny", lambda line: None)


def test_nothing_is_installed_where_torch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    offline(monkeypatch, wheels, tmp_path)
    found = installing.importlib.util.find_spec
    monkeypatch.setattr(installing.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    with pytest.raises(BackendError, match=r"pip install 'edgejoule\[host\]'"):
        installing.install("tiny", lambda line: None)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("  Downloading https://index/ab/torch-2.13.0-cp311-manylinux.whl (539.4 MB)", "downloading torch (539.4 MB)"),
        ("Downloading ai_edge_litert-2.3.0-cp311-manylinux_2_27.whl (21.8 MB)", "downloading ai_edge_litert (21.8 MB)"),
        ("Downloading fire-0.7.1-py3-none-any.whl (115 kB)", ""),
        ("Installing collected packages: a, b, c", "putting 3 packages in place"),
        ("WARNING: Retrying (Retry(total=4)) after connection broken", "the package index does not answer, trying again"),
        ("Collecting fire", ""),
    ],
)
def test_pips_output_is_condensed(line: str, told: str) -> None:
    assert installing.condensed(line) == told


def test_a_full_disk_is_told_as_one() -> None:
    from collections import deque

    tail = deque(["Collecting a", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", ""])
    assert "No space left on device" in installing.last_words(tail)
    assert "free some space" in installing._advice(tail, Path("/x/tiny"))


# ---------------------------------------------------------------- doctor


def test_doctor_installs_and_says_what(tiny: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--install", "tiny", "--install", "tiny", "--json"])
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)["environments"]
    assert one == {"name": "tiny", "python": str(environments.interpreter(tiny)), "versions": {"tinybackend": "1.2"}}
    assert CliRunner().invoke(app, ["doctor", "--install", "tiny"]).stdout == "tiny: tinybackend 1.2\n"


def test_doctor_installs_nothing_where_one_name_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr(installing, "install", lambda *args: pytest.fail("it began"))
    done = CliRunner().invoke(app, ["doctor", "--install", "litert", "--install", "litret"])
    assert done.exit_code != 0 and isinstance(done.exception, UnknownNameError)
    assert "did you mean litert" in str(done.exception)


def test_doctor_lists_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEJOULE_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setattr("edgejoule.stages.survey", dict)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["environments"]}
    assert set(rows) == set(environments.TABLE)
    shown = " ".join(CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"}).stdout.split())
    assert "edgejoule doctor --install" in shown and "environments" in shown
