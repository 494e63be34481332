"""The README in every artifact's folder: its Python runs without edgejoule, and computes what the artifact does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgejoule import compiling, data, environments, registry, zoo
from edgejoule.bench import Bench
from edgejoule.compile.handover import NAME
from edgejoule.fleet.dispatch import run_job
from edgejoule.records import Artifact, Job, Outputs, Workload
from edgejoule.study_file import MeasurePlan

CHECK = """
import sys
assert not [name for name in sys.modules if name.startswith("edgejoule")]
np.save("logits.npy", run(images)); np.save("images.npy", images)
"""


def backends() -> list[str]:
    return [name for name in registry.names("backend") if getattr(type(registry.create("backend", name)), "handover", None)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("backend", backends())
def test_the_readme_runs_with_the_runtime_alone(backend: str, batch: int, tmp_path: Path) -> None:
    leaf = registry.create("backend", backend)
    if (missing := leaf.probe()) is not None or (missing := getattr(leaf, "runs_here", lambda: None)()) is not None:
        pytest.skip(missing)
    if batch > 1 and getattr(leaf, "batches", True) is False:
        pytest.skip(f"{backend} takes one image at a time")
    python = environments.python_of(leaf.environment) if hasattr(leaf, "environment") else sys.executable
    plan = MeasurePlan(threads=1, batch=batch, scenario="offline" if batch > 1 else "single_stream")
    (made,) = compiling.compile_model(zoo.spec_of_timm("test_vit"), (backend,), plan, "random", Bench(cache=tmp_path))
    assert isinstance(made, Artifact), made
    folder = Path(made.folder)
    text = (folder / NAME).read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert made.label in text and NAME not in {file.name for file in made.files}
    assert script.count("\n") <= 25, "as short as it can be"
    (photo,) = list(data.source("photos(n=1, seed=5)").images())
    photo.save(folder / "photo.png")  # not .jpg, which changes pixels
    (folder / "run.py").write_text(script.replace("photo.jpg", "photo.png") + CHECK)
    done = subprocess.run([python, "run.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    preprocessing = made.variant.spec.preprocessing
    crop = np.asarray(data.crop(photo, preprocessing), dtype=np.uint8).transpose(2, 0, 1)[None]
    images = np.repeat(data.normalise(np.ascontiguousarray(crop), preprocessing), batch, axis=0)  # (B, C, H, W)
    assert np.allclose(np.load(folder / "images.npy"), images, atol=1e-5)
    np.save(tmp_path / "crop.npy", crop)
    told = run_job(Job("outputs", str(folder), str(tmp_path / "crop.npy"), Workload(batch=batch), threads=1))
    assert isinstance(told, Outputs)
    logits = np.frombuffer(told.logits, dtype=np.float64).reshape(told.shape)  # (1, K), by the worker in the backend's own environment
    assert logits.std() > 1e-3 and np.load(folder / "logits.npy").shape == (batch, logits.shape[1])
    assert np.allclose(np.load(folder / "logits.npy"), logits, rtol=1e-3, atol=1e-4)
