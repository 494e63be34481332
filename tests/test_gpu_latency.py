"""What benchmarks/gpu_latency.py says without a GPU, its interval and its page, and the whole of it with a processor in its place."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_latency.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_latency", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["gpu_latency"] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_the_interval_is_of_order_statistics(script: ModuleType) -> None:
    assert script.interval([float(n) for n in range(1, 12)]) == (6.0, 2.0, 10.0)  # 11 values: ranks 2 and 10 hold the median at 98.8 %
    assert script.interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_the_page_shows_every_way_and_why_one_failed(script: ModuleType) -> None:
    rows = [
        script.Row("m", "eager", "fp32", 0.004, 0.0039, 0.0041, 0.003, 0.2, 0.0),
        script.Row("m", "inductor", "fp16", 0.002, 0.0019, 0.0021, 0.001, None, 1e-3),
        script.Row("m", "eager", "bf16", failure="no instructions"),
    ]
    page = script.markdown({"gpu": "A GPU", "date": "2020-01-01", "how": "somehow."}, rows)
    assert "| m | eager | fp32 | 4.000 [3.900, 4.100] | 3.000 | 1.00 | 200.0 | 0.0e+00 |" in page
    assert "| m | inductor | fp16 | 2.000 [1.900, 2.100] | 1.000 | 2.00 | – | 1.0e-03 |" in page
    assert "failed: no instructions" in page


class Nvml:
    """NVML of a machine with two GPUs, of which CUDA sees the second."""

    asked: list[bytes] = []  # noqa: RUF012

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, board: Any) -> int:  # noqa: N802
        self.asked.append(uuid)
        return 0 if uuid == b"GPU-second" else 1

    def nvmlDeviceGetTotalEnergyConsumption(self, board: Any, joules: Any) -> int:  # noqa: N802
        joules._obj.value = 7000
        return 0


def test_the_counter_is_that_of_the_gpu_that_computes(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(script.ctypes, "CDLL", lambda name: Nvml())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for uuid, joules in (("second", 7.0), ("of-a-slice", None)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid))
        read = script.counter()
        assert (read and read()) == joules
    assert Nvml.asked == [b"GPU-second", b"GPU-of-a-slice"]


def test_a_counter_that_does_not_move_is_none(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STILL_S", 0.05)
    assert script.energy(OnProcessor(lambda images: images, (), True), None, lambda: 1.0, 0.1) is None


def test_a_network_that_fails_in_the_middle_leaves_the_others_figures(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    def rows_of(name: str, options: Any, read: Any) -> list[Any]:
        if name == "large":
            assert json.loads(next(tmp_path.glob("*.json")).read_text())["rows"], "kept before the next is begun"
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [script.Row(name, "eager", "fp32", 1.0, 1.0, 1.0, 1.0)]

    for name, value in (("rows_of", rows_of), ("lacking", lambda *_: None), ("counter", lambda: None)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    assert script.main(["--models", "small,large,last", "--out", str(tmp_path)]) == 0
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [(row["model"], bool(row["failure"])) for row in rows] == [("small", False), ("large", True), ("last", False)]


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and done.stdout.startswith("nothing measured: ")
    assert not list(tmp_path.iterdir()) and not done.stderr


class OnProcessor:
    """GpuRun where there is no GPU."""

    device_time_s = 1e-3

    def __init__(self, call: Any, shape: tuple[int, ...], graphs: bool) -> None:
        self.call = call

    def run(self, images: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.call(images)

    def close(self) -> None:
        return None


def test_the_whole_of_it_on_a_processor(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    load = script.load_program
    monkeypatch.setattr(script, "GpuRun", OnProcessor)
    monkeypatch.setattr(script, "lacking", lambda precision, device: "no instructions" if precision == "fp16" else None)
    monkeypatch.setattr(script, "load_program", lambda path, device: load(path, "cpu"))
    monkeypatch.setattr(script, "counter", lambda: lambda: time.perf_counter() // 0.001 * 0.05)  # 50 W, in steps of a millisecond
    monkeypatch.setattr(script, "WAYS", (("eager", "fp32"), ("eager", "fp16"), ("eager", "bf16")))
    monkeypatch.setattr(script, "PLAIN", {"plain": (32, 2)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    assert script.main(["--models", "plain,no_such_network", "--rounds", "2", "--energy-s", "0.05", "--out", str(tmp_path)]) == 0
    (data,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    rows = {(row["model"], row["precision"]): row for row in json.loads(data.read_text())["rows"]}
    assert rows["plain", "fp32"]["error"] == 0 and 1e-4 < rows["plain", "bf16"]["error"] < 5e-2
    assert rows["plain", "fp16"]["failure"] == "no instructions" and rows["no_such_network", ""]["failure"]
    found = rows["plain", "fp32"]
    assert found["low_s"] <= found["latency_s"] <= found["high_s"] and found["device_s"] == 1e-3 and found["energy_j"] > 0
    assert "| plain | eager | bf16 |" in page.read_text()
