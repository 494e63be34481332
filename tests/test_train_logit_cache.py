"""A teacher's answers on disk: sparse, whole or not there, and never another run's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.errors import OutputError, TrainingError
from edgejoule.train.logit_cache import HEADER, Answers, LogitCache
from edgejoule.train.task import Which

IDENTITY = {"teacher": "ab", "data": "digits"}


def opened(folder: Path, classes: int = 6, top_k: int = 2, period: int = 3, **identity: Any) -> LogitCache:
    return LogitCache(folder, {**IDENTITY, **identity}, classes, top_k, period)


def which(size: int = 4, position: int = 0, epoch: int = 0) -> Which:
    places = torch.arange(position, position + size)
    return Which(places * 7, torch.full((size,), epoch), places)


def probabilities(size: int = 4, classes: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.softmax(torch.randn(size, classes, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_largest_are_kept_and_the_rest_is_spread_evenly(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    p = torch.tensor([[0.5, 0.1, 0.0, 0.25, 0.05, 0.1]])
    written = cache.write(which(1), 0, p)
    assert written.classes.tolist() == [[0, 3]] and written.first().tolist() == [0]
    assert torch.allclose(written.dense(6), torch.tensor([[0.5, 0.0625, 0.0625, 0.25, 0.0625, 0.0625]]))


def test_all_classes_kept_are_the_probabilities_themselves(tmp_path: Path) -> None:
    p = probabilities()
    found = opened(tmp_path, top_k=100).write(which(), 0, p).dense(6)
    assert torch.allclose(found, p, atol=5e-4) and torch.allclose(found.sum(1), torch.ones(4), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.floats(0.01, 60.0), st.integers(0, 1000))
def test_what_is_given_back_are_always_probabilities(top_k: int, classes: int, scale: float, seed: int) -> None:
    p = torch.softmax(scale * torch.randn(3, classes, generator=torch.Generator().manual_seed(seed)), dim=1)
    values, found = p.topk(min(top_k, classes), dim=1)
    dense = Answers(values.half().float(), found).dense(classes)
    assert (dense >= 0).all() and torch.allclose(dense.sum(1), torch.ones(3), atol=1e-5) and torch.equal(dense.argmax(1), found[:, 0])


def test_reading_gives_what_writing_gave_in_every_epoch_of_the_period(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    written = {e: cache.write(which(position=8, epoch=e), 8, probabilities(seed=e)) for e in (0, 1, 2)}
    cache.close()
    for cache in (cache, opened(tmp_path)):  # noqa: B020 - the same object, then a later run's
        for epoch in (2, 0, 1, 4):  # 4 repeats 1
            found = cache.read(which(position=8, epoch=epoch), 8)
            assert found is not None and torch.equal(found.probabilities, written[epoch % 3].probabilities)
            assert torch.equal(found.classes, written[epoch % 3].classes)


def test_an_answer_is_only_for_the_image_and_the_mixture_it_was_made_of(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.write(which(), 0, probabilities())
    assert cache.read(which(), 0) is not None
    other = Which(which().index + 1, which().epoch, which().position)
    assert cache.read(other, 0) is None  # another image, as where a bad one was passed over
    assert cache.read(which(2), 0) is None and cache.read(which(), 2) is None  # another micro-batch: mixup has other partners
    assert cache.read(which(position=2), 2) is None and cache.read(which(epoch=1), 0) is None  # not written


def test_a_record_is_whole_or_not_there(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.write(which(), 0, probabilities())
    cache.close()
    (path,) = tmp_path.rglob("*.answers")
    whole = path.read_bytes()
    size = len(whole) // 4
    for byte in range(2 * size, 3 * size):  # every byte of the third record
        damaged = bytearray(whole)
        damaged[byte] ^= 0x10
        path.write_bytes(damaged)
        assert opened(tmp_path).read(which(), 0) is None, byte
    path.write_bytes(whole[: 3 * size + 5])  # torn at the end
    assert opened(tmp_path).read(which(), 0) is None
    path.write_bytes(whole[size:] + whole[:size])  # each record in another's place
    assert opened(tmp_path).read(which(), 0) is None
    path.write_bytes(bytes(len(whole)))  # a hole in the file
    assert opened(tmp_path).read(which(), 0) is None
    path.write_bytes(whole)
    assert opened(tmp_path).read(which(), 0) is not None
    path.with_name("epoch_00001.answers").write_bytes(whole)  # another epoch's: the same images, augmented otherwise
    assert opened(tmp_path).read(which(epoch=1), 0) is None


def test_other_runs_have_other_folders(tmp_path: Path) -> None:
    folders = {opened(tmp_path, **{k: v}).folder for k, v in [("teacher", "cd"), ("data", "x"), ("more", 1)]}
    folders |= {opened(tmp_path).folder, opened(tmp_path, top_k=3).folder, opened(tmp_path, period=4).folder}
    assert len(folders) == 6 and opened(tmp_path).folder in folders


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{}"])
def test_a_damaged_or_foreign_header_is_an_error(tmp_path: Path, content: bytes) -> None:
    header = opened(tmp_path).folder / HEADER
    header.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        opened(tmp_path)


def test_answers_without_their_header_are_an_error(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.write(which(), 0, probabilities())
    (cache.folder / HEADER).unlink()
    with pytest.raises(TrainingError, match="no header"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another folder"):
        opened(tmp_path / "file")
    cache = opened(tmp_path / "cache")
    monkeypatch.setattr(os, "pwrite", lambda *given: 3)  # a disk that is nearly full
    with pytest.raises(OutputError, match="make room"):
        cache.write(which(), 0, probabilities())
    monkeypatch.undo()
    assert cache.read(which(), 0) is None


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    def fill(process: int) -> None:
        cache = opened(tmp_path)
        for step in range(20):
            cache.write(which(position=8 * step + 4 * process), 8 * step + 4 * process, probabilities(seed=2 * step + process))

    threads = [threading.Thread(target=fill, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = opened(tmp_path)
    for step in range(40):
        found = cache.read(which(position=4 * step), 4 * step)
        assert found is not None and torch.equal(found.classes, probabilities(seed=step).topk(2).indices)


KILLED = """
import sys, torch
from pathlib import Path
from tests.test_train_logit_cache import opened, probabilities, which
cache = opened(Path(sys.argv[1]))
print("ready", flush=True)
for step in range(10**6):
    cache.write(which(position=4 * step), 4 * step, probabilities(seed=step % 50))
"""


def test_a_killed_process_leaves_only_whole_records(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, env={**os.environ}
    )
    assert child.stdout is not None and child.stdout.readline()
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    while not (records := list(folder.glob("*.answers"))) or records[0].stat().st_size < 20_000:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    cache = opened(tmp_path)
    steps = records[0].stat().st_size // (4 * (4 + 4 + 8 + 8 + 4 + 4))
    for step in random.Random(0).sample(range(steps), 20):
        found = cache.read(which(position=4 * step), 4 * step)
        assert found is not None and torch.equal(found.classes, probabilities(seed=step % 50).topk(2).indices)
