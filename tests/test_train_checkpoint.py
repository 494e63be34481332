"""Checkpoints: whole at any moment, resumed bit for bit, refused where they are damaged or somebody else's; full disks; Ctrl-C."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgejoule.errors import BadImageError, OutputError, TrainingError
from edgejoule.records import Epoch
from edgejoule.train import checkpoint
from edgejoule.train.loop import train
from tests.train_toys import Toy, ToySamples, ToyTask, recipe, settings, train_toy

ROOT = Path(__file__).parent.parent


def untimed(epochs: tuple[Epoch, ...]) -> list[tuple[Any, ...]]:
    return [(e.number, e.step, e.loss, e.lr, e.images, dict(e.scores), e.bad_images) for e in epochs]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- killed


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_is_not(tmp_path: Path) -> None:
    steps = sorted(random.sample(range(1, 18), 3))  # truly at random: it must hold for all
    ask = {
        "drop_path": 0.4,
        "recipe": {"ema": 0.8, "clip_norm": 0.5},
        "task": {"noise": 0.5, "bad": [7]},
        "settings": {"accumulate": 2, "workers": 2, "max_bad_images": 1},
    }
    torn = [{"tear_at": 1, "checkpoint_s": 0.0}, {"tear_at": 2, "checkpoint_s": 0.0}]
    kills = torn + [{"kill_at": step, "checkpoint_s": often} for step, often in zip(steps, (1e9, 0.0, 1e9), strict=True)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-m", "tests.train_toys", str(tmp_path / "killed"), json.dumps({**ask, "kills": kills})]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (kills, done.stderr)
    whole = train_toy(tmp_path / "whole", ask)
    assert equal(torch.load(tmp_path / "killed" / "end.pt", weights_only=True), whole.module.state_dict()), kills
    ended = json.loads((tmp_path / "killed" / "end.json").read_text())
    assert [epoch["loss"] for epoch in ended["epochs"]] == [epoch.loss for epoch in whole.epochs], kills
    assert ended["bad_images"] == whole.bad_images == 1
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint.pt", "end.json", "end.pt", "tensorboard"]


def test_a_run_goes_on_in_the_middle_of_an_epoch_and_epochs_before_are_kept(tmp_path: Path) -> None:
    whole = train(Toy(0.4), ToyTask(), recipe(ema=0.8), settings(tmp_path / "whole"))
    with pytest.raises(TrainingError, match="step 11"):
        train(Toy(0.4), ToyTask(nan_at=10), recipe(ema=0.8), settings(tmp_path, checkpoint_s=0.0))
    stored = checkpoint.load(tmp_path, "a run")
    assert stored is not None and stored["step"] == 10 and len(stored["epochs"]) == 1
    again, called = ToyTask(), []
    resumed = train(Toy(0.4), again, recipe(ema=0.8), settings(tmp_path), on_epoch=called.append)
    assert equal(resumed.module.state_dict(), whole.module.state_dict()) and untimed(resumed.epochs) == untimed(whole.epochs)
    assert [epoch.number for epoch in called] == [2, 3]
    assert min(position for epoch, position, _ in again.training.seen if epoch == 1) == 16  # nothing is read twice


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(Toy(), ToyTask(), recipe(), settings(tmp_path))
    task = ToyTask()
    again = train(Toy(), task, recipe(), settings(tmp_path))
    assert not task.training.seen
    assert equal(first.module.state_dict(), again.module.state_dict()) and again.epochs == first.epochs and again.steps == 18


def test_the_number_of_micro_batches_and_workers_may_change_in_between(tmp_path: Path) -> None:
    whole = train(Toy(), ToyTask(), recipe(), settings(tmp_path / "whole"))
    with pytest.raises(TrainingError):
        train(Toy(), ToyTask(nan_at=8), recipe(), settings(tmp_path, checkpoint_s=0.0))
    resumed = train(Toy(), ToyTask(), recipe(), settings(tmp_path, accumulate=2, workers=1))
    assert [epoch.loss for epoch in resumed.epochs] == pytest.approx([epoch.loss for epoch in whole.epochs], rel=1e-5)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_for_the_end_of_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    whole = train(Toy(0.4), ToyTask(), recipe(ema=0.8), settings(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(Toy(0.4), ToyTask(interrupt_at=8), recipe(ema=0.8), settings(tmp_path))
    stored = checkpoint.load(tmp_path, "a run")
    assert stored is not None and stored["step"] == 9
    resumed = train(Toy(0.4), ToyTask(), recipe(ema=0.8), settings(tmp_path))
    assert equal(resumed.module.state_dict(), whole.module.state_dict()) and untimed(resumed.epochs) == untimed(whole.epochs)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_an_evaluation_leaves_the_epoch_to_be_judged(tmp_path: Path) -> None:
    class Slow(ToyTask):
        def scores(self, model: torch.nn.Module, device: torch.device) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Toy(), Slow(), recipe(), settings(tmp_path))
    stored = checkpoint.load(tmp_path, "a run")
    assert stored is not None and stored["step"] == 6 and not stored["epochs"]
    whole = train(Toy(), ToyTask(), recipe(), settings(tmp_path / "whole"))
    assert untimed(train(Toy(), ToyTask(), recipe(), settings(tmp_path)).epochs) == untimed(whole.epochs)


def test_bad_images_are_remembered_over_a_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        train(Toy(), ToyTask(ToySamples(bad=(3, 9)), nan_at=8), recipe(), settings(tmp_path, max_bad_images=2))
    with pytest.raises(BadImageError, match="1 such image is allowed"):
        train(Toy(), ToyTask(ToySamples(bad=(3, 9))), recipe(), settings(tmp_path, max_bad_images=1))
    assert train(Toy(), ToyTask(), recipe(), settings(tmp_path, max_bad_images=2)).bad_images == 2


# ---------------------------------------------------------------- refused


CONTENT = {"weights": {"a": torch.arange(40.0)}, "step": 3, "epochs": [{"loss": 0.5}], "none": None}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, "key") is None
    checkpoint.save(tmp_path / "new", "key", CONTENT)
    stored = checkpoint.load(tmp_path / "new", "key")
    assert stored is not None and torch.equal(stored.pop("weights")["a"], torch.arange(40.0))
    assert stored == {"step": 3, "epochs": [{"loss": 0.5}], "none": None}


def test_a_damaged_checkpoint_is_one_clear_error_wherever_it_is_damaged(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "key", CONTENT)
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    for length in [0, 1, 3, *range(5, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(TrainingError, match=r"checkpoint.pt is damaged \(.*\): delete it to begin anew$"):
            checkpoint.load(tmp_path, "key")
    refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            stored = checkpoint.load(tmp_path, "key")
            assert stored is not None and torch.equal(stored["weights"]["a"], CONTENT["weights"]["a"])  # type: ignore[index]
        except TrainingError as error:
            refused += "checkpoint.pt" in str(error)
    assert refused > 20


def test_no_code_is_loaded(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, "key": "key", "content": {"a": Code()}}, tmp_path / checkpoint.NAME)
    with pytest.raises(TrainingError, match="damaged"):
        checkpoint.load(tmp_path, "key")
    assert not (tmp_path / "executed").exists()


def test_another_runs_or_versions_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    train(Toy(), ToyTask(), recipe(), settings(tmp_path))
    before = (tmp_path / checkpoint.NAME).read_bytes()
    with pytest.raises(TrainingError, match=rf"{checkpoint.NAME} belongs to another run .*delete it to begin anew"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path, key="another"))
    with pytest.raises(TrainingError, match=r"does not fit this run .*delete it"):
        train(torch.nn.Linear(6, 3), ToyTask(), recipe(), settings(tmp_path))
    with pytest.raises(TrainingError, match=r"does not fit this run \(it is at step 18 of 6\)"):
        train(Toy(), ToyTask(), recipe(epochs=1.0), settings(tmp_path))
    assert (tmp_path / checkpoint.NAME).read_bytes() == before
    torch.save({"format": 99, "key": "a run", "content": {}}, tmp_path / checkpoint.NAME)
    with pytest.raises(TrainingError, match="another version of edgejoule"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path))


# ---------------------------------------------------------------- a disk that is full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_an_output_error_and_training_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    whole = train(Toy(0.4), ToyTask(), recipe(), settings(tmp_path / "whole"))

    def fill(epoch: Epoch) -> None:
        if epoch.number == 2:
            (tmp_path / f"{checkpoint.NAME}.part").symlink_to("/dev/full")

    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*No space left.*free some space"):
        train(Toy(0.4), ToyTask(), recipe(), settings(tmp_path), on_epoch=fill)
    stored = checkpoint.load(tmp_path, "a run")
    assert stored is not None and stored["step"] == 6
    assert not (tmp_path / f"{checkpoint.NAME}.part").is_symlink()
    resumed = train(Toy(0.4), ToyTask(), recipe(), settings(tmp_path))
    assert equal(resumed.module.state_dict(), whole.module.state_dict()) and untimed(resumed.epochs) == untimed(whole.epochs)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        checkpoint.save(tmp_path / "file" / "folder", "key", CONTENT)
    with pytest.raises(OutputError):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path / "file" / "folder"))


def test_tensorboards_full_disk_is_an_output_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(OutputError, match=r"cannot write TensorBoard.s files .No space left"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path))
