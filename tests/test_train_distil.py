"""The spelling of distillations, the losses by hand, a teacher of another size, and what a student learns."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgejoule.errors import SpecError, TrainingError, UnknownNameError
from edgejoule.records import Preprocessing
from edgejoule.train import distil, losses
from edgejoule.train.task import At, Distiller, Which
from edgejoule.train.teacher import Teacher

OURS = Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
THEIRS = Preprocessing((3, 12, 12), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLASSES = 5


class Counted(nn.Module):
    """A tiny classifier that counts its calls."""

    def __init__(self, size: int = 12, classes: int = CLASSES) -> None:
        super().__init__()
        self.num_classes, self.calls = classes, 0
        self.fc = nn.Linear(3 * size * size, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.fc(x.flatten(1))
        return out


def opened(text: str, teacher: nn.Module | None = None, **options: Any) -> Distiller:
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "teacher_preprocessing": THEIRS,
        "teacher_weights": "file",
        "student_preprocessing": OURS,
        "num_classes": CLASSES,
        **options,
    }
    return distil.open_distiller(distil.parse(text), teacher or Counted(), **given)


def which(size: int, position: int = 0, epoch: int = 0) -> Which:
    places = torch.arange(position, position + size)
    return Which(places + 100, torch.full((size,), epoch), places)


def at(position: int = 0, epoch: int = 0) -> At:
    return At(seed=0, epoch=epoch, position=position, step=0, steps=10)


def batch(size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def to_labels(logits: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, torch.arange(len(logits)) % CLASSES)


# ---------------------------------------------------------------- spelling


def test_a_distillation_is_spelt_in_one_way() -> None:
    a = distil.canonical('soft(temperature=2, alpha=0.5, teacher="t")|features(layers=[(0,1)], weight=2)')
    b = distil.canonical("soft(teacher='t', temperature=2.0) | features(teacher='t', layers=((0, 1),), weight=2.0)")
    assert a == b == "soft(teacher='t', temperature=2.0) | features(layers=[[0, 1]], weight=2.0)"
    assert distil.canonical(a) == a and distil.canonical("") == ""


def test_shared_options_may_stand_in_any_part_and_go_where_they_are_taken() -> None:
    plan = distil.parse("attention(teacher='t') | hard(weights='w.safetensors', heads=2)")
    assert plan.shared == distil.Shared("t", "w.safetensors", heads=2) and plan.label_share == 0.5
    assert distil.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("soft(alpha=0.5)", "needs a teacher"),
        ("", "expected hard, soft"),
        ("soft(teacher='a') | hard(teacher='b')", "give it once"),
        ("soft(teacher='a') | soft()", "twice"),
        ("soft(teacher='a', alpha=0.7) | hard(alpha=0.7)", "more than 1"),
        ("soft(teacher='a', weights='random')", "random"),
        ("soft(teacher='a', alpha='x')", "expected float"),
        ("soft(teacher='a', alpha=0)", "alpha"),
        ("soft(teacher='a', temperature=0)", "temperature"),
        ("soft(teacher=3)", "expected str"),
        ("soft(teacher='a', heads=3)", "expected 0 or 1 or 2"),
        ("soft(teacher='a', cache_epochs=-1)", "cache_epochs"),
        ("features(teacher='a', heads=2)", "hard and soft"),
        ("soft(teacher='a', cache_epochs=2) | features()", "cannot"),
        ("features(teacher='a', layers=[1, 2])", "pairs"),
        ("features(teacher='a', layers=True)", "expected"),
        ("hard(teacher='a', colour=1)", "no option 'colour'"),
        ("soft(teacher='a') + hard()", "cannot read"),
    ],
)
def test_a_spelling_that_makes_no_sense_is_told_so(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        distil.parse(text)


def test_an_unknown_part_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean features"):
        distil.parse("feature(teacher='a')")


PIECES = st.sampled_from(
    ["hard", "soft", "features", "attention", "(", ")", "teacher='t'", "alpha=0.3", ",", " | ", "layers=[[0,1]]", "=", "9"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40))
def test_any_text_is_a_plan_or_a_spec_error(text: str) -> None:
    try:
        plan = distil.parse(text)
    except SpecError:
        return
    assert distil.parse(str(plan)) == plan and distil.canonical(str(plan)) == str(plan)


def test_checking_a_spelling_imports_no_torch() -> None:
    script = "from edgejoule.train import distil; distil.parse(\"soft(teacher='t')\"); import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---------------------------------------------------------------- losses


def test_the_soft_loss_is_the_equation_worked_by_hand() -> None:
    p, z = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    q = torch.softmax(z / 2.0, dim=1)
    by_hand = 4.0 * (p * (p / q).log()).sum() / 2
    assert losses.soft_loss(z, p, temperature=2.0) == pytest.approx(by_hand.item(), rel=1e-6)
    assert losses.soft_loss(z, p, 2.0, "elements") == pytest.approx(by_hand.item() / 2, rel=1e-6)


def test_deit_released_code_is_the_average_over_elements() -> None:
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(6, 7), torch.randn(6, 7), 3.0
    theirs = functional.kl_div(
        functional.log_softmax(student / tau, 1), functional.log_softmax(teacher / tau, 1), reduction="sum", log_target=True
    )
    theirs = theirs * tau**2 / student.numel()
    assert losses.soft_loss(student, torch.softmax(teacher / tau, 1), tau, "elements") == pytest.approx(theirs.item(), rel=1e-5)


def test_a_probability_of_zero_is_no_nan() -> None:
    assert losses.soft_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])) == pytest.approx(0.6931472, rel=1e-6)


def test_the_hard_loss_is_cross_entropy_with_the_teachers_answer() -> None:
    assert losses.hard_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2])) == pytest.approx(1.3862944, rel=1e-6)


# ---------------------------------------------------------------- the teacher


def test_a_teacher_sees_the_students_images_in_its_own_size_and_colours() -> None:
    teacher = Teacher(Counted(), "t", THEIRS, OURS, CLASSES)
    seen = teacher.view((torch.full((2, 3, 8, 8), 0.25) - 0.5) / 0.5)  # a grey of 0.25
    expected = torch.tensor([(0.25 - m) / s for m, s in zip(THEIRS.mean, THEIRS.std, strict=True)]).view(1, 3, 1, 1)
    assert seen.shape == (2, 3, 12, 12) and torch.allclose(seen, expected.expand_as(seen), atol=1e-5)


def test_a_teacher_of_the_same_preprocessing_sees_the_same_images() -> None:
    images = batch()
    assert torch.allclose(Teacher(Counted(8), "t", OURS, OURS, CLASSES).view(images), images, atol=1e-6)


def test_a_larger_image_is_antialiased_on_its_way_to_a_smaller_teacher() -> None:
    stripes = torch.zeros(1, 3, 24, 24)
    stripes[..., ::4] = 1.0
    large = Preprocessing((3, 24, 24), (0.0,) * 3, (1.0,) * 3)
    small = Preprocessing((3, 6, 6), (0.0,) * 3, (1.0,) * 3, "bilinear")
    seen = Teacher(Counted(6), "t", small, large, CLASSES).view(stripes)
    assert (seen[..., 1:-1] - 0.25).abs().max() < 0.1


def test_a_teacher_stays_in_eval_mode_and_out_of_the_student() -> None:
    teacher, student = Counted(), Counted(8)
    distiller = opened("soft(teacher='t')", teacher)
    names = set(student.state_dict())
    module = distiller.begin(student).train()
    assert set(module.state_dict()) == names and not teacher.training
    loss = distiller.loss(module, batch(), module(batch()), to_labels, which(4), at())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"teacher_weights": "random"}, "random weights"),
        ({"num_classes": 7}, "knows 5 classes and the student learns 7"),
        ({"teacher_preprocessing": Preprocessing((1, 12, 12), (0.5,) * 3, (0.5,) * 3)}, "channels"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        opened("soft(teacher='t')", **options)


def test_a_teacher_that_hides_its_classes_is_refused_at_its_first_answer() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
    distiller, student = opened("soft(teacher='t')", teacher), Counted(8)
    with pytest.raises(TrainingError, match="knows 7 classes"):
        distiller.loss(student, batch(), student(batch()), to_labels, which(4), at())


def test_a_damaged_teacher_is_refused() -> None:
    teacher, student = Counted(), Counted(8)
    teacher.fc.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="damaged"):
        opened("hard(teacher='t')", teacher).loss(student, batch(), student(batch()), to_labels, which(4), at())


# ---------------------------------------------------------------- the whole loss


def test_one_head_learns_labels_and_teacher_in_their_shares() -> None:
    teacher, student, images = Counted(), Counted(8), batch()
    view = Teacher(teacher, "t", THEIRS, OURS, CLASSES).view(images)
    z, logits = teacher(view).detach(), student(images)
    found = opened("hard(teacher='t', alpha=0.2) | soft(alpha=0.3, temperature=4.0)", teacher).loss(
        student, images, logits, to_labels, which(4), at()
    )
    soft = losses.soft_loss(logits, torch.softmax(z / 4.0, 1), 4.0)
    expected = 0.5 * to_labels(logits) + 0.2 * functional.cross_entropy(logits, z.argmax(1)) + 0.3 * soft
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_of_two_heads_one_learns_the_labels_and_one_the_teacher() -> None:
    teacher, images = Counted(), batch()
    cls, dist = (torch.randn(4, CLASSES, requires_grad=True) for _ in range(2))
    distiller = opened("soft(teacher='t', alpha=1.0)", teacher)
    distiller.loss(Counted(8), images, (cls, dist), to_labels, which(4), at()).backward()
    assert cls.grad is not None and cls.grad.abs().max() == 0 and dist.grad is not None and dist.grad.abs().max() > 0
    cls.grad, dist.grad = None, None
    answers = teacher(Teacher(teacher, "t", THEIRS, OURS, CLASSES).view(images)).argmax(1)
    found = opened("hard(teacher='t')", teacher).loss(Counted(8), images, (cls, dist), to_labels, which(4), at())
    assert found.item() == pytest.approx((0.5 * to_labels(cls) + 0.5 * functional.cross_entropy(dist, answers)).item(), rel=1e-5)


def test_a_student_comes_to_answer_as_its_teacher_does() -> None:
    teacher, student = Counted(), Counted(8)
    distiller = opened("soft(teacher='t', alpha=1.0)", teacher)
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    answers = teacher(Teacher(teacher, "t", THEIRS, OURS, CLASSES).view(images)).argmax(1)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    module = distiller.begin(student).train()
    before = (student(images).argmax(1) == answers).float().mean()
    for _ in range(60):
        loss = distiller.loss(module, images, module(images), to_labels, which(32), at())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.7 < 0.95 < (student(images).argmax(1) == answers).float().mean()


# ---------------------------------------------------------------- the cache in its place


def cached(folder: Path, teacher: nn.Module, text: str = "soft(teacher='t', cache_epochs=2, top_k=3)", **identity: Any) -> Distiller:
    return opened(text, teacher, cache_folder=folder, identity={"weights": "ab", **identity})


def test_a_second_epoch_of_the_period_runs_no_teacher_and_learns_the_same(tmp_path: Path) -> None:
    teacher, student, images = Counted(), Counted(8), batch()
    distiller = cached(tmp_path, teacher)
    assert distiller.period == 2
    first = [distiller.loss(student, images * (e + 1), student(images), to_labels, which(4, 4, e), at(4, e)).item() for e in (0, 1)]
    assert teacher.calls == 2 and first[0] != first[1]
    again = [distiller.loss(student, images, student(images), to_labels, which(4, 4, e), at(4, e)).item() for e in (0, 1)]
    assert again == first and teacher.calls == 2
    later = cached(tmp_path, copy.deepcopy(teacher))  # another run
    assert later.loss(student, images, student(images), to_labels, which(4, 4, 1), at(4, 1)).item() == first[1]
    other = cached(tmp_path, teacher, weights="cd")  # another teacher
    other.loss(student, images, student(images), to_labels, which(4, 4, 1), at(4, 1))
    assert teacher.calls == 3


def test_hard_answers_alone_keep_one_class_an_image(tmp_path: Path) -> None:
    teacher, student, images = Counted(), Counted(8), batch()
    plain = opened("hard(teacher='t')", teacher).loss(student, images, student(images), to_labels, which(4), at())
    distiller = cached(tmp_path, teacher, "hard(teacher='t', cache_epochs=1)")
    for _ in range(2):
        assert distiller.loss(student, images, student(images), to_labels, which(4), at()).item() == pytest.approx(plain.item(), rel=1e-6)
    assert teacher.calls == 2
    (records,) = tmp_path.rglob("*.answers")
    assert records.stat().st_size == 4 * (4 + 4 + 8 + 8 + 2 + 2)


def test_a_cache_needs_a_folder_an_identity_and_the_runs_seed(tmp_path: Path) -> None:
    for options in ({}, {"cache_folder": tmp_path}, {"identity": {"a": 1}}):
        with pytest.raises(TrainingError, match="need a folder"):
            opened("soft(teacher='t', cache_epochs=2)", **options)
    with pytest.raises(TrainingError, match="plain values"):
        cached(tmp_path, Counted(), thing=object())
    student = Counted(8)
    with pytest.raises(TrainingError, match="seed"):
        cached(tmp_path, Counted()).loss(student, batch(), student(batch()), to_labels, which(4), At(7, 0, 0, 0, 1))


def test_what_decides_the_images_is_part_of_the_identity() -> None:
    from edgejoule.train.recipe import Recipe

    recipe = Recipe("r", "classification", "", "", "", "", mixup=0.8, lr=1.0)
    said = distil.augmentation_of(recipe)
    assert said["mixup"] == 0.8 and said["batch"] == 128 and "lr" not in said


# ---------------------------------------------------------------- with the loop


class Squares:
    """16 images of one grey each; the class is how bright."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.new("RGB", (8, 8), (15 * index,) * 3), index * CLASSES // 16

    def key(self, index: int) -> str:
        return str(index)


def test_in_a_run_only_the_first_period_asks_the_teacher_and_a_later_run_not_at_all(tmp_path: Path) -> None:
    from edgejoule import torchvision

    torchvision.ensure()
    from edgejoule.train.classification import Classification
    from edgejoule.train.loop import Settings, train
    from edgejoule.train.recipe import Recipe

    recipe = Recipe("r", "classification", "", "", "", "", epochs=4, batch=4, lr=1e-2, mixup=0.8, crop_scale=(0.5, 1.0), hflip=0.5)
    teacher = Counted()
    weights, calls = [], []
    for run in ("first", "later"):
        torch.manual_seed(0)
        student = Counted(8)
        distiller = cached(tmp_path / "teacher", teacher, "soft(teacher='t', cache_epochs=2)")
        task = Classification(Squares(), Squares(), CLASSES, OURS, recipe, 0, distiller)
        done = train(student, task, recipe, Settings(tmp_path / run, run, seed=0))
        weights.append(done.module.state_dict())
        calls.append(teacher.calls)
    assert calls == [8, 8]  # two epochs of four steps, then never again
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
