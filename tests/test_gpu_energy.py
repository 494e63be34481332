"""What benchmarks/gpu_energy.py makes of trials, what it says without a GPU, and the whole of it against a fake NVML."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from edgejoule.measure.summary import summarise
from edgejoule.records import Accuracy, Failure, Phase, Trace, Trial, floats
from tests.samples import artifact
from tests.samples import trial as sample_trial

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_energy.py"
# NVML as the worker's process sees it: 50 W since the epoch, and a power figure that is 2 % lower.
FAKE_NVML = """
import time, types

class NVMLError(Exception):
    value = 3

def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetTotalEnergyConsumption(handle): return int(50_000 * (time.time() - 1.7e9))
def nvmlDeviceGetPowerUsage(handle): return 49_000
def nvmlDeviceGetFieldValues(handle, fields):
    milliwatts = 49_000 + time.perf_counter_ns() % 7
    return [types.SimpleNamespace(nvmlReturn=0, valueType=1, value=types.SimpleNamespace(uiVal=milliwatts)) for _ in fields]
def nvmlDeviceGetArchitecture(handle): return 8
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_energy", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["gpu_energy"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def gpu_trial(repeat: int = 0, counter_w: float = 100.0, power_w: float = 98.0) -> Trial:
    phases = (Phase("idle_before", 0.0, 2.0), Phase("window", 2.0, 12.0), Phase("idle_after", 12.0, 14.0))
    times = np.arange(0, 14.05, 0.05)
    busy = (times >= 2) & (times <= 12)
    joules = 20 * times + (counter_w - 20) * np.clip(times - 2, 0, 10)
    counter = Trace("gpu", "energy_j", floats(times), floats(joules), "nvml", "C", "gpu", 0.05, 0.1)
    watts = floats(np.where(busy, power_w, 20.0))
    power = Trace("gpu/power", "power_w", floats(times), watts, "nvml", "C", "gpu", 0.05, 0.1, total=False)
    return dataclasses.replace(
        sample_trial(repeat=repeat), phases=phases, latencies_s=floats([0.01] * 1000), traces=(counter, power), meter="nvml", caveats=()
    )


def test_both_figures_are_taken_over_one_padded_window(script: ModuleType) -> None:
    pair = script.pair_of("m", gpu_trial())
    assert pair.counted_j == pytest.approx(1020, rel=1e-3) and pair.integrated_j == pytest.approx(
        1000, rel=1e-2
    )  # half a second of idle each
    whole = gpu_trial()
    for traces in (whole.traces[:1], whole.traces[1:], ()):
        assert script.pair_of("m", dataclasses.replace(whole, traces=traces)) is None
    short = dataclasses.replace(whole, phases=(Phase("window", -1.0, 12.0),))
    assert script.pair_of("m", short) is None


def test_agreement_is_over_models_and_judged_by_the_worst_repeat(script: ModuleType) -> None:
    pairs = [script.Pair("a", 0, 102, 100), script.Pair("a", 1, 104, 100), script.Pair("b", 0, 99, 100)]
    found = script.agreement(pairs)
    assert found.ratio.n == 2 and found.ratio.value == pytest.approx(math.sqrt(math.sqrt(1.02 * 1.04) * 0.99))
    assert found.within and found.furthest == pairs[1]
    assert not script.agreement([*pairs, script.Pair("c", 0, 90, 100)]).within and script.agreement([]) is None
    assert "within 5 %" in script.said(found) and "NOT within" in script.said(script.agreement([script.Pair("c", 0, 90, 100)]))
    assert "only one" in script.said(None)


def test_the_page_shows_the_ranking_beside_what_the_paper_prints(script: ModuleType) -> None:
    accuracy = Accuracy("imagenet-1k", "validation", 0.7986, "published", "a table")
    found = [summarise([gpu_trial(n) for n in range(3)], artifact("levit_conv_192"), accuracy)]
    facts = {"gpu": "A GPU", "date": "2020-01-01", "commit": "abc", "how": "One model."}
    page = script.markdown(facts, script.ranked(found), None, [Failure("x", "eager", "compile", "why")])
    row = next(line for line in page.splitlines() if line.startswith("| 1 |"))
    assert "levit_conv_192" in row and "79.86" in row and "SAM5 1.44" in row and "- x, compile: why" in page
    assert set(script.in_public()) == {"tiny_vit_11m_distilled", "levit_conv_192", "vit_small"}


def test_the_thirteen_models_of_the_study_are_measured(script: ModuleType) -> None:
    assert len(script.candidates([])) == 13 and [spec.name for spec in script.candidates(["ViT_S"])] == ["vit_small"]


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and done.stdout.startswith("nothing measured: ")
    assert not list(tmp_path.iterdir()) and not done.stderr


@pytest.mark.study
def test_the_whole_of_it_on_a_processor_with_a_fake_nvml(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "pynvml.py").write_text(FAKE_NVML)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "fake"), "EDGEJOULE_CACHE": str(tmp_path / "cache")}
    options = ["--backend", "eager", "--models", "levit_conv_192,efficientvit_b1", "--out", str(tmp_path / "out")]
    options += ["--profile", "quick(repeats_min=2, repeats_max=2, warmup_cap_s=1.0)"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,), (data,) = (tmp_path / "out").glob("*.md"), (tmp_path / "out").glob("*.json")
    found = json.loads(data.read_text())
    # Two repeats each; a repeat that other programs disturbed is made again, and tells as much of the two sensors.
    assert len(found["measurements"]) == 2 and len(found["pairs"]) >= 4 and not found["failures"]
    assert found["agreement"]["within"] and found["agreement"]["ratio"]["value"] == pytest.approx(50 / 49, rel=0.01)
    assert "| 1 |" in page.read_text() and "| 2 |" in page.read_text()
