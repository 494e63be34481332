"""Two processes, started by ``accelerate launch`` and talking by gloo, learn what one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgejoule.errors import TrainingError
from edgejoule.train import checkpoint
from edgejoule.train.loop import train
from edgejoule.train.order import Order, Share
from tests.train_toys import Toy, ToyTask, recipe, settings, train_toy

ROOT = Path(__file__).parent.parent
# accelerate's --cpu starts one process, however many are asked for; --multi_gpu starts them, and settings.device keeps them off GPUs.
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"

BAD = [5, 11, 17, 23]
ASK = {
    "recipe": {"ema": 0.9, "clip_norm": 0.5, "batch": 8, "epochs": 4.0},
    "task": {"bad": BAD},
    "settings": {"max_bad_images": 4},
}


def launch(*asked: object) -> subprocess.CompletedProcess[str]:
    """Folders and what to train in them, in turn."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), "--main_process_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [*command, "-m", "tests.train_toys", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in asked)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes have trained in ``two``, and have finished in ``begun`` what one began."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "two").mkdir()
    with pytest.raises(TrainingError):
        train(Toy(), ToyTask(nan_at=8), recipe(), settings(folder / "begun", checkpoint_s=0.0))
    stored = checkpoint.load(folder / "begun", "a run")
    assert stored is not None and stored["step"] == 8
    done = launch(folder / "two", {**ASK, "settings": {"max_bad_images": 4, "accumulate": 2}}, folder / "begun", {})
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_give_the_loss_curve_of_one_and_count_each_others_bad_images(launched: Path, tmp_path: Path) -> None:
    two, one = json.loads((launched / "two" / "end.json").read_text()), train_toy(tmp_path, ASK)
    assert two["processes"] == 2 and one.processes == 1
    assert [epoch["loss"] for epoch in two["epochs"]] == pytest.approx([epoch.loss for epoch in one.epochs], rel=1e-5)
    assert [epoch["images"] for epoch in two["epochs"]] == [epoch.images for epoch in one.epochs] == [24] * 4
    assert two["epochs"][0]["scores"]["top1"] == one.epochs[0].scores["top1"]
    seen_by_main = {index for draws in Share(Order(24, 8, 1), 0, 3, 0, 2, 2) for _, _, index in draws}
    assert not set(BAD) <= seen_by_main  # in the first epoch: it knows of the others' because it was told
    assert two["bad_images"] == one.bad_images == two["epochs"][0]["bad_images"] == 4
    for name, value in torch.load(launched / "two" / "end.pt", weights_only=True).items():
        assert torch.allclose(value, one.module.state_dict()[name], rtol=1e-4, atol=1e-6), name


def test_what_one_process_began_two_may_finish(launched: Path, tmp_path: Path) -> None:
    whole = train(Toy(), ToyTask(), recipe(), settings(tmp_path))
    ended = json.loads((launched / "begun" / "end.json").read_text())
    assert [epoch["loss"] for epoch in ended["epochs"]] == pytest.approx([epoch.loss for epoch in whole.epochs], rel=1e-5)
