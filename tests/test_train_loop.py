"""The loop on toys: order, learning rates, parameter groups, averages, clipping, bad images, and what it says while it goes on."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from edgejoule.bench import Event
from edgejoule.errors import BadImageError, DataError, TrainingError
from edgejoule.train import checkpoint, journal, loop
from edgejoule.train.loop import train
from edgejoule.train.optimiser import create_optimizer, create_schedule, current_lr, parameter_groups, peak_lr
from edgejoule.train.order import Order, Share, global_batch, seed_of
from edgejoule.train.recipe import Recipe
from edgejoule.train.run import Settings, create_accelerator
from tests.train_toys import Toy, ToySamples, ToyTask, recipe, settings


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def close(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


# ---------------------------------------------------------------- order


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_processes_and_micro_batches_cut_one_and_the_same_order(
    images: int, processes: int, accumulate: int, per: int, repeats: int, period: int
) -> None:
    batch = processes * accumulate * per
    if batch > images:
        return
    order = Order(images, batch, 5, repeats, period)
    steps = 2 * order.steps_per_epoch + 1
    whole = list(Share(order, 0, steps))
    parts = [list(Share(order, 0, steps, p, processes, accumulate)) for p in range(processes)]
    for step, expected in enumerate(whole):
        micro = slice(step * accumulate, (step + 1) * accumulate)
        assert [draw for part in parts for one in part[micro] for draw in one] == expected
        epoch, within = divmod(step, order.steps_per_epoch)
        shown = epoch % period if period else epoch
        assert [draw[:2] for draw in expected] == [(shown, within * batch + i) for i in range(batch)]
        assert [draw[2] for draw in expected] == order.indices(epoch)[within * batch : (within + 1) * batch].tolist()


def test_an_epoch_is_a_permutation_of_its_own_and_a_period_brings_it_back() -> None:
    order = Order(50, 10, 3, period=2)
    first, second, third = (order.indices(epoch).tolist() for epoch in range(3))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second and first == third
    assert Order(50, 10, 4).indices(0).tolist() != first


def test_a_repeated_image_stands_in_a_row_and_the_epoch_is_no_longer() -> None:
    shown = Order(10, 2, 0, repeats=3).indices(0).tolist()
    assert len(shown) == 10 and len(set(shown)) == 4
    assert all(len(set(shown[i : i + 3])) == 1 for i in range(0, 9, 3))


def test_a_batch_is_the_whole_of_a_smaller_set_and_must_be_divisible() -> None:
    assert global_batch(100, 32, 2, 4) == 32
    assert global_batch(24, 32, 2, 4) == 24
    with pytest.raises(TrainingError, match=r"2 processes x 3 .* multiple of 6, such as batch=30"):
        global_batch(100, 32, 2, 3)
    with pytest.raises(TrainingError, match="whole training split"):
        global_batch(25, 32, 2, 4)
    with pytest.raises(TrainingError, match="no images"):
        global_batch(0, 32, 1, 1)


def test_seeds_differ_by_every_number_and_by_how_many_there_are() -> None:
    asked = [("draws", 0, 1, 2), ("draws", 0, 1, 3), ("draws", 0, 1), ("draws", 0, 1, 2, 0), ("order", 0, 1, 2)]
    assert len({seed_of(*what) for what in asked}) == len(asked)
    assert seed_of("draws", 0, 1, 2) == 2895857303  # of a checkpoint that is resumed years later, too


# ---------------------------------------------------------------- learning rates


def curve(asked: Recipe, steps: int = 100, per_epoch: int = 10) -> list[float]:
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=peak_lr(asked, asked.batch))
    schedule = create_schedule(optimizer, asked, steps, per_epoch)
    rates = []
    for step in range(steps):
        schedule.step_update(step)
        rates.append(current_lr(optimizer))
    return rates


def test_cosine_warms_up_from_its_first_rate_and_ends_at_its_last() -> None:
    rates = curve(recipe(lr=1.0, warmup_epochs=2.0, warmup_lr=0.1, min_lr=0.01))
    assert rates[:3] == pytest.approx([0.1, 0.1 + 0.9 / 20, 0.1 + 2 * 0.9 / 20])
    assert rates[20] == pytest.approx(0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * 20 / 99)))
    assert rates[-1] == pytest.approx(0.01) and min(rates) == pytest.approx(0.01)


def test_warm_up_may_be_counted_in_steps() -> None:
    assert curve(recipe(lr=1.0, schedule="constant", warmup_steps=5, warmup_epochs=9.0, warmup_lr=0.5))[:7] == pytest.approx(
        [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0]
    )


def test_poly_falls_by_its_power() -> None:
    rates = curve(recipe(lr=2.0, schedule="poly", power=0.9, min_lr=0.5))
    assert rates == pytest.approx([0.5 + 1.5 * (1 - t / 100) ** 0.9 for t in range(100)])


def test_steps_fall_to_a_tenth_with_the_first_step_after_a_milestone() -> None:
    rates = curve(recipe(lr=1.0, schedule="steps", milestones=(8.0, 9.5), warmup_steps=2, warmup_lr=0.5))
    assert rates == pytest.approx([0.5, 0.75] + [1.0] * 78 + [0.1] * 15 + [0.01] * 5)


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    for schedule in ("cosine", "poly", "steps", "constant"):
        assert curve(recipe(lr=1.0, schedule=schedule), steps=1) == [1.0]


def test_the_linear_rule_scales_with_the_images_of_a_step() -> None:
    assert peak_lr(recipe(lr=5e-4, lr_batch=512), 1024) == pytest.approx(1e-3)
    assert peak_lr(recipe(lr=5e-4), 1024) == 5e-4


# ---------------------------------------------------------------- the optimiser


class Wrapped(torch.nn.Module):
    """As ``task.begin`` may give it: the network, and a part that only training needs."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.extra = network, torch.nn.Linear(6, 2)


def by_name(module: torch.nn.Module, asked: Recipe) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, asked)
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_biases_norms_and_what_the_network_names_do_not_decay(wrapped: bool) -> None:
    prefix = "network." if wrapped else ""
    module = Wrapped(Toy()) if wrapped else Toy()
    found = by_name(module, recipe(weight_decay=0.1))
    decayed = {name.removeprefix(prefix) for name, group in found.items() if group["weight_decay"] == 0.1}
    assert decayed == {"branch.1.weight", "head.weight"} | ({"extra.weight"} if wrapped else set())
    assert all(group["weight_decay"] == 0.1 for group in by_name(module, recipe(weight_decay=0.1, decay_all=True)).values())


@pytest.mark.parametrize("wrapped", [False, True])
def test_layers_learn_the_slower_the_further_they_are_from_the_head(wrapped: bool) -> None:
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=1, num_classes=3)
    asked = recipe(lr=1.0, layer_decay=0.5, weight_decay=0.1, warmup_lr=0.5, warmup_steps=1)
    found = by_name(Wrapped(network) if wrapped else network, asked)
    prefix = "network." if wrapped else ""
    scales = [found[f"{prefix}{name}"]["lr_scale"] for name in ("head.weight", "blocks.2.mlp.fc1.weight", "blocks.0.mlp.fc1.weight")]
    assert scales[0] == 1.0 and scales[1] <= 1.0 and scales[2] == scales[1] / 4
    assert found[f"{prefix}pos_embed"]["weight_decay"] == 0.0 and found[f"{prefix}pos_embed"]["lr_scale"] < scales[2]
    if wrapped:
        assert found["extra.weight"]["lr_scale"] == found["extra.bias"]["lr_scale"] == 1.0
        assert found["extra.weight"]["weight_decay"] == 0.1 and found["extra.bias"]["weight_decay"] == 0.0
    optimizer = create_optimizer(network, asked, 4)
    schedule = create_schedule(optimizer, asked, 10, 10)
    for step, lr in ((0, 0.5), (9, 0.0)):
        schedule.step_update(step)
        assert current_lr(optimizer) == pytest.approx(lr)
        assert {group["lr"] for group in optimizer.param_groups} == {lr * group["lr_scale"] for group in optimizer.param_groups}


def test_sgd_has_classical_momentum() -> None:
    options = create_optimizer(Toy(), recipe(optimizer="sgd", momentum=0.8), 4).defaults
    assert options["momentum"] == 0.8 and not options["nesterov"]


# ---------------------------------------------------------------- training


def test_a_toy_is_learned_and_the_network_that_was_given_is_left_alone(tmp_path: Path) -> None:
    given_network, task = Toy(), ToyTask()
    before = {name: value.clone() for name, value in given_network.state_dict().items()}
    trained = train(given_network, task, recipe(epochs=8.0), settings(tmp_path))
    assert all(torch.equal(before[name], value) for name, value in given_network.state_dict().items())
    assert trained.epochs[-1].scores["top1"] >= 0.9 and trained.epochs[-1].loss < trained.epochs[0].loss / 2
    assert [epoch.number for epoch in trained.epochs] == list(range(1, 9))
    assert trained.steps == 48 and trained.processes == 1 and trained.versions["timm"]
    assert not trained.module.training and all(value.dtype == torch.float32 for value in trained.module.parameters())
    assert not hasattr(trained.module, "_original_forward")  # nothing of accelerate's stays


def test_plain_gradient_descent_gives_what_a_loop_by_hand_gives(tmp_path: Path) -> None:
    asked = recipe(epochs=1.0, optimizer="sgd", momentum=0.0, lr=0.1, weight_decay=0.0, schedule="constant", clip_norm=0.3, ema=0.6)
    task, network = ToyTask(), Toy()
    average = {name: value.clone() for name, value in network.state_dict().items()}
    order = Order(24, 4, 1)
    network.train()
    for draws in Share(order, 0, 6):
        network.zero_grad()
        torch.nn.functional.cross_entropy(
            network(*task.collate([task.training[d] for d in draws])[:1]), task.collate([task.training[d] for d in draws])[1]
        ).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in network.parameters()))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad * min(1.0, 0.3 / (float(norm) + 1e-6))
            for name, value in network.state_dict().items():
                average[name] = 0.6 * average[name] + 0.4 * value
    plain = train(Toy(), task, dataclasses.replace(asked, evaluate_ema=False), settings(tmp_path / "plain"))
    averaged = train(Toy(), task, asked, settings(tmp_path / "averaged"))
    assert close(plain.module, network)
    assert all(torch.allclose(value, average[name], rtol=1e-4, atol=1e-6) for name, value in averaged.module.state_dict().items())
    assert plain.epochs[0].scores != averaged.epochs[0].scores  # judged by what it ends with


def test_adaptive_clipping_bounds_each_unit_by_its_weights(tmp_path: Path) -> None:
    task = ToyTask()
    asked = recipe(steps=1, optimizer="sgd", momentum=0.0, lr=1.0, weight_decay=0.0, schedule="constant", clip="agc", clip_norm=0.01)
    before, after = Toy().state_dict(), train(Toy(), task, asked, settings(tmp_path)).module.state_dict()
    moved = (after["head.weight"] - before["head.weight"]).norm(dim=1)
    assert torch.all(moved <= 0.01 * before["head.weight"].norm(dim=1) * 1.001) and torch.all(moved > 0)


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    ended = [
        train(Toy(0.3), ToyTask(ToySamples(noise=0.5)), recipe(ema=0.9), settings(tmp_path / str(n), workers=n)).module for n in (0, 2)
    ]
    assert equal(*ended)


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    ended = [train(Toy(), ToyTask(ToySamples(noise=0.5)), recipe(clip_norm=0.5), settings(tmp_path / str(n), accumulate=n)) for n in (1, 4)]
    assert close(ended[0].module, ended[1].module)
    assert [e.loss for e in ended[0].epochs] == pytest.approx([e.loss for e in ended[1].epochs], rel=1e-5)
    assert [e.images for e in ended[1].epochs] == [24, 24, 24]


def test_drop_path_follows_the_seed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(11)
    one = train(Toy(0.5), ToyTask(), recipe(), settings(tmp_path / "1"))
    torch.manual_seed(12)
    same = train(Toy(0.5), ToyTask(), recipe(), settings(tmp_path / "2"))
    other = train(Toy(0.5), ToyTask(), recipe(), settings(tmp_path / "3", seed=2))
    assert equal(one.module, same.module) and not equal(one.module, other.module)


def test_the_callers_random_numbers_are_not_disturbed(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    train(Toy(0.5), ToyTask(), recipe(), settings(tmp_path))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_lengths_are_steps_or_fractions_of_an_epoch(tmp_path: Path) -> None:
    by_steps = train(Toy(), ToyTask(), recipe(steps=14), settings(tmp_path / "1"))
    assert [(e.number, e.step, e.images) for e in by_steps.epochs] == [(1, 6, 24), (2, 12, 24), (3, 14, 8)]
    by_epochs = train(Toy(), ToyTask(), recipe(epochs=0.5), settings(tmp_path / "2"))
    assert [(e.number, e.step, e.images) for e in by_epochs.epochs] == [(1, 3, 12)]
    with pytest.raises(TrainingError, match="nothing to do"):
        train(Toy(), ToyTask(), recipe(epochs=0.0), settings(tmp_path / "3"))


def test_the_period_is_what_samples_and_losses_are_told(tmp_path: Path) -> None:
    task = ToyTask(period=2)
    train(Toy(), task, recipe(), settings(tmp_path))
    drawn = [draw for draw in task.training.seen if len(set(task.training.seen)) and draw != (0, 0, draw[2])]
    assert {epoch for epoch, _, _ in drawn} == {0, 1}


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")


@pytest.mark.parametrize(("precision", "device"), [("bf16", "cpu"), pytest.param("fp16", "auto", marks=on_a_gpu)])
def test_mixed_precision_ends_in_float32(tmp_path: Path, precision: str, device: str) -> None:
    plain = train(Toy(), ToyTask(), recipe(ema=0.5, clip_norm=5.0), settings(tmp_path / "no"))
    asked = settings(tmp_path / "mixed", mixed_precision=precision, device=device)
    mixed = train(Toy(), ToyTask(), recipe(ema=0.5, clip_norm=5.0), asked)
    assert mixed.mixed_precision == precision
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in mixed.module.parameters())
    assert mixed.epochs[-1].loss == pytest.approx(plain.epochs[-1].loss, rel=0.1) and mixed.epochs[0].loss != plain.epochs[0].loss


def float16_on_the_cpu(asked: Settings) -> Accelerator:
    """What accelerate makes for float16 on a GPU; torch's autocast and scaler work on the CPU, too, where accelerate leaves them out."""
    accelerator = create_accelerator(dataclasses.replace(asked, mixed_precision="no"))
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


@pytest.mark.usefixtures("ctrl_c")
def test_the_scale_of_fp16_losses_is_kept_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "create_accelerator", float16_on_the_cpu)
    asked: dict[str, Any] = {"mixed_precision": "fp16", "checkpoint_s": 0.0}
    toy = recipe(clip_norm=0.5, ema=0.8)
    whole = train(Toy(0.3), ToyTask(loss_scale=1e4), toy, settings(tmp_path / "whole", **asked))
    with pytest.raises(KeyboardInterrupt):
        train(Toy(0.3), ToyTask(loss_scale=1e4, interrupt_at=14), toy, settings(tmp_path / "run", **asked))
    stored = checkpoint.load(tmp_path / "run", "a run")
    assert stored is not None and stored["scaler"]["scale"] < 2**16  # it has skipped steps, which is no error
    assert not torch.equal(stored["network"]["head.weight"], Toy().head.weight)  # and has not skipped others
    assert equal(train(Toy(0.3), ToyTask(loss_scale=1e4), toy, settings(tmp_path / "run", **asked)).module, whole.module)


def test_gradients_are_clipped_at_their_own_size_not_at_the_scaled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "create_accelerator", float16_on_the_cpu)
    asked = recipe(steps=6, optimizer="sgd", momentum=0.0, lr=1.0, weight_decay=0.0, schedule="constant", clip_norm=0.01)
    trained = train(Toy(), ToyTask(), asked, settings(tmp_path, mixed_precision="fp16"))
    pairs = zip(Toy().state_dict().values(), trained.module.state_dict().values(), strict=True)
    assert 0.01 <= math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs)) <= 0.0601  # at most six steps of 0.01


def test_what_a_machine_cannot_do_is_a_training_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'fp4' on device 'cpu' \(.*expected what this machine can do"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path, mixed_precision="fp4"))
    with pytest.raises(TrainingError, match=r"cpu cannot train with mixed precision 'fp16'.*use mixed precision 'no' or 'bf16'"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path, mixed_precision="fp16"))


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_no_number_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss of step 9 of 18 is nan.*lower the learning rate"):
        train(Toy(), ToyTask(nan_at=8), recipe(), settings(tmp_path))


def test_fp16_may_overflow_for_a_while_because_its_scaler_skips_such_steps() -> None:
    def progress(losses: list[float]) -> Any:
        pending = [torch.tensor(loss) for loss in losses]
        return SimpleNamespace(pending=pending, step=len(losses), loss_sum=0.0, losses=0, overflows=0, last_loss=0.0)

    parts: Any = SimpleNamespace(settings=SimpleNamespace(mixed_precision="fp16"), steps=99, recipe=recipe())
    some = progress([math.inf] * 5 + [1.0, 2.0] + [math.nan] * loop.OVERFLOWS + [3.0])
    loop.settle(parts, some)
    assert (some.loss_sum, some.losses, some.last_loss, some.pending) == (6.0, 3, 3.0, [])
    with pytest.raises(TrainingError, match=f"loss of step {loop.OVERFLOWS + 1} of 99 is inf"):
        loop.settle(parts, progress([math.inf] * (loop.OVERFLOWS + 1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_counted_and_replaced_by_the_next(tmp_path: Path, workers: int) -> None:
    bad = (3, 4, 23)
    with_bad = train(Toy(), ToyTask(ToySamples(bad=bad)), recipe(), settings(tmp_path / "1", max_bad_images=3, workers=workers))
    assert with_bad.bad_images == 3 and with_bad.epochs[0].bad_images == 3

    class Replaced(ToySamples):
        def __getitem__(self, which: tuple[int, int, int]) -> Any:
            epoch, position, index = which
            return super().__getitem__((epoch, position, {3: 5, 4: 5, 23: 0}.get(index, index)))

    assert equal(with_bad.module, train(Toy(), ToyTask(Replaced()), recipe(), settings(tmp_path / "2")).module)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_bad_image_too_many_is_one_clear_error(tmp_path: Path, workers: int) -> None:
    with pytest.raises(BadImageError, match=r"^cannot decode image-\d+.png: .*\(2 such images are allowed.*--max-bad-images\)$"):
        train(Toy(), ToyTask(ToySamples(bad=(3, 9, 11))), recipe(), settings(tmp_path / "1", max_bad_images=2, workers=workers))
    with pytest.raises(BadImageError, match=r"image-3.png: .*\(0 such images are allowed"):
        train(Toy(), ToyTask(ToySamples(bad=(3,))), recipe(), settings(tmp_path / "2", workers=workers))
    with pytest.raises(DataError, match="none of the training images"):
        task = ToyTask(ToySamples(bad=tuple(range(24))))
        train(Toy(), task, recipe(), settings(tmp_path / "3", max_bad_images=50, workers=workers))


def test_another_error_of_a_worker_comes_out_as_it_was_said(tmp_path: Path) -> None:
    class Broken(ToySamples):
        def __getitem__(self, which: tuple[int, int, int]) -> Any:
            raise DataError("the archive is gone: bring it back")

    with pytest.raises(DataError, match=r"^the archive is gone: bring it back$"):
        train(Toy(), ToyTask(Broken()), recipe(), settings(tmp_path, workers=1))


def test_a_worker_that_dies_is_a_training_error(tmp_path: Path) -> None:
    class Deadly(ToySamples):
        def __getitem__(self, which: tuple[int, int, int]) -> Any:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingError, match="process that reads images died"):
        train(Toy(), ToyTask(Deadly()), recipe(), settings(tmp_path, workers=1))


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    for wrong in ({"accumulate": 0}, {"workers": -1}, {"max_bad_images": -1}):
        with pytest.raises(TrainingError, match="expected at least 1, 0 and 0"):
            train(Toy(), ToyTask(), recipe(), settings(tmp_path, **wrong))
    with pytest.raises(TrainingError, match="cannot be divided"):
        train(Toy(), ToyTask(), recipe(), settings(tmp_path, accumulate=3))


# ---------------------------------------------------------------- what it says


def test_progress_tells_throughput_and_time_left_and_ends_with_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(journal, "BETWEEN_S", 0.0)
    train(Toy(), ToyTask(), recipe(warmup_epochs=4.0), settings(tmp_path), notify=events.append)
    steps = [event for event in events if event.total]
    assert [(event.stage, event.done, event.total) for event in steps] == [("train", step, 18) for step in range(1, 19)]
    assert "images/s" in steps[3].text and steps[3].text.endswith(" left") and "loss " in steps[3].text
    lines = [event.text for event in events if not event.total]
    assert lines[0] == "the warm-up of 24 steps is not over when training ends, after 18"
    assert [line[:13] for line in lines[1:]] == ["epoch 1 ended", "epoch 2 ended", "epoch 3 ended"] and "top1 " in lines[-1]


def test_progress_is_told_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(journal, "BETWEEN_S", 1e6)
    train(Toy(), ToyTask(), recipe(), settings(tmp_path), notify=events.append)
    assert [event.done for event in events if event.total] == [18]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BETWEEN_S", 0.0)
    whole = train(Toy(), ToyTask(), recipe(), settings(tmp_path / "whole"))
    with pytest.raises(TrainingError):  # at step 9, with step 6 in the checkpoint
        train(Toy(), ToyTask(nan_at=8), recipe(), settings(tmp_path))
    train(Toy(), ToyTask(), recipe(), settings(tmp_path))
    assert scalars(tmp_path, "train/loss") == scalars(tmp_path / "whole", "train/loss")
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(1, 19))
    assert [step for step, _ in scalars(tmp_path, "val/top1")] == [6, 12, 18]
    assert [value for _, value in scalars(tmp_path, "val/top1")] == pytest.approx([e.scores["top1"] for e in whole.epochs])
    assert [value for _, value in scalars(tmp_path, "train/lr")] == pytest.approx(curve(recipe(), 18, 6), abs=1e-8)


def test_without_tensorboard_training_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    events: list[Event] = []
    trained = train(Toy(), ToyTask(), recipe(), settings(tmp_path), notify=events.append)
    assert trained.steps == 18 and not (tmp_path / "tensorboard").exists()
    assert sum("pip install tensorboard" in event.text for event in events) == 1
