"""Training joined to the rest: studies that train, runs that are not made twice, and measured accuracy in rankings."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgejoule import trained, training
from edgejoule.bench import Bench
from edgejoule.catalog import find_model
from edgejoule.errors import DataError, OutputError, SpecError, StudyError
from edgejoule.records import Accuracy, Failure, Training
from edgejoule.store import NAME, Store
from edgejoule.study import run_study
from edgejoule.study_file import ScreenPlan, TrainPlan, load_study, parse_study, with_measure
from tests.labelled_samples import write_cifar10

SHORT = "quick(window_s=0.2, idle_s=0.2, warmup_s=0.1, warmup_cap_s=0.5)"
VIT = 'timm(name="vit_digits")'
LEVIT = 'timm(name="levit_digits")'


def plan(**values: object) -> TrainPlan:
    return TrainPlan(**{"data": "digits", "recipes": ("digits(epochs=1)",), "weights": "random", **values})  # type: ignore[arg-type]


def made(out: Path, asked: TrainPlan, *models: str) -> list[Training | Failure]:
    """What a plan gives, kept in ``out``."""
    runs = training.runs_of([find_model(model) for model in models or (VIT,)], asked, 0)
    with Store.open(out / NAME) as store:
        return list(training.train_all(runs, out, store, store.begin_run("test", "", "", ""), Bench()))


def test_a_study_that_trains_ranks_by_what_it_measured(tmp_path: Path) -> None:
    study = with_measure(load_study("digits"), profile=SHORT)
    assert study.train is not None
    study = replace(study, train=replace(study.train, recipes=("digits(epochs=2)",), seeds=2))
    outcome = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache", seed=study.study.seed))
    assert not outcome.failures
    (ranking,) = outcome.rankings
    assert len(ranking.rows) == 3 and ranking.dataset == "digits"
    assert {row.accuracy for row in ranking.rows} == {"measured"}
    assert all(row.netscore is not None for row in ranking.rows)
    for measurement in outcome.measurements:
        accuracy = measurement.accuracy
        assert accuracy is not None and accuracy.seeds == 2 and accuracy.std is not None and accuracy.n == 374
        assert accuracy.low is not None and accuracy.low < accuracy.value < (accuracy.high or 0)
    with Store.open(tmp_path / "out" / NAME, create=False) as store:
        assert len(store.trainings()) == 6 and len(store.evaluations()) == 3
        assert all(len(store.epochs(key)) == 2 for key in store.trainings())
        assert all(e.agreement is not None and e.agreement.value > 0.99 for e in store.evaluations())
    again = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache", seed=study.study.seed))
    assert [m.artifact_sha256 for m in again.measurements] == [m.artifact_sha256 for m in outcome.measurements]


def test_the_cifar10_study_runs_on_a_file_of_the_same_form(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar", train=60, test=20)
    study = with_measure(load_study("cifar10"), profile=SHORT)
    assert study.train is not None and len(study.train.recipes) == 3 and study.train.seeds == 3
    recipes = ("cifar10_finetune(steps=2, batch=8)", "cifar10_finetune(steps=2, batch=8, lr=0.003)", "cifar10_levit(epochs=0.2, batch=8)")
    short = replace(study.train, data=f'cifar10(path="{tmp_path / "cifar"}")', recipes=recipes, seeds=2)
    models = ('timm(name="test_vit.r160_in1k")', 'timm(name="test_efficientnet.r160_in1k")')
    study = replace(study, train=short, screen=ScreenPlan(models=models), rank=replace(study.rank, baseline=""))
    outcome = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache"))
    assert not outcome.failures and len(outcome.measurements) == 2
    with Store.open(tmp_path / "out" / NAME, create=False) as store:
        trainings = tuple(store.trainings().values())
    assert len(trainings) == 2 * 3 * 2
    assert {t.spec.num_classes for t in trainings} == {10} and {t.spec.preprocessing.crop_pct for t in trainings} <= {1.0, 0.95}


def test_what_is_there_is_not_trained_again_and_what_is_gone_is(tmp_path: Path) -> None:
    (first,) = made(tmp_path, plan())
    assert isinstance(first, Training)
    (second,) = made(tmp_path, plan())
    assert second == first
    weights = tmp_path / first.weights
    content = weights.read_bytes()
    weights.unlink()
    (third,) = made(tmp_path, plan())
    assert third.weights_id == first.weights_id and weights.read_bytes() == content
    weights.write_bytes(content[:-1])
    (fourth,) = made(tmp_path, plan())
    assert isinstance(fourth, Failure) and "restore it" in fourth.reason


def test_keys_tell_apart_what_gives_other_weights(tmp_path: Path) -> None:
    asked = [plan(), plan(recipes=("digits(epochs=1, lr=0.0001)",)), plan(seeds=2)]
    keys = {t.key for one in asked for t in made(tmp_path, one) if isinstance(t, Training)}
    assert len(keys) == 3  # the first of the two seeds is the first plan's


def test_the_recipe_is_chosen_by_validation_and_the_seed_is_the_first(tmp_path: Path) -> None:
    (base,) = made(tmp_path, plan())
    assert isinstance(base, Training)

    def other(recipe: str, seed: int, validation: float, test: float) -> Training:
        seen = Accuracy("digits", "validation", validation, "measured", "")
        return replace(base, recipe=recipe, seed=seed, validation=seen, accuracy=replace(seen, split="test", value=test))

    lucky = [other("a", 0, 0.90, 0.99), other("a", 1, 0.92, 0.99), other("b", 0, 0.93, 0.5), other("b", 1, 0.95, 0.6)]
    (found,) = trained.chosen(lucky).values()
    assert (found.recipe, found.seed) == ("b", 0)
    spec = trained.measured_spec(found, lucky)
    assert spec.published is not None and spec.published.top1_pct == pytest.approx(55.0)


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"data": "nothing"}, SpecError, "no data is called"),
        ({"data": 'cifar10(path="nowhere")'}, DataError, "cifar-10-binary.tar.gz"),
        ({"recipes": ("digitz",)}, SpecError, "digits"),
        ({"recipes": ("dense_1x",)}, SpecError, "detection"),
        ({"distill": "soft(alpha=0.5)"}, SpecError, "teacher"),
    ],
)
def test_what_cannot_be_trained_is_said_before_any_work(asked: dict[str, object], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        training.check(plan(**asked))


def test_a_study_says_where_its_training_plan_is_wrong() -> None:
    text = '[study]\nname = "x"\n[screen]\nmodels = ["vit_small"]\n[train]\ndata = "digits"\nseeds = 0\n'
    with pytest.raises(StudyError, match=r"x.toml, line 7, train.seeds"):
        parse_study(text, "x.toml")
    with pytest.raises(StudyError, match=r"line 6, train.data"):
        parse_study(text.replace('"digits"', '"digits("'), "x.toml")


def test_a_teacher_with_random_weights_is_refused(tmp_path: Path) -> None:
    (failure,) = made(tmp_path, plan(distill='soft(teacher="vit_small")'), LEVIT)
    assert isinstance(failure, Failure) and "teach nothing" in failure.reason


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    from edgejoule import zoo

    spec = replace(find_model(VIT), num_classes=7)
    trained.write_weights(zoo.for_training(spec, 0, "random")[0], tmp_path / "seven.safetensors")
    asked = plan(distill=f"soft(teacher={VIT!r}, weights={str(tmp_path / 'seven.safetensors')!r})")
    (failure,) = made(tmp_path, asked, LEVIT)
    assert isinstance(failure, Failure) and "other classes" in failure.reason


def test_a_student_learns_from_a_trained_teacher(tmp_path: Path) -> None:
    (teacher,) = made(tmp_path, plan())
    assert isinstance(teacher, Training)
    spelled = f"soft(alpha=0.5, teacher='timm(name=\"vit_digits\")', weights={str(tmp_path / teacher.weights)!r})"
    (student,) = made(tmp_path, plan(distill=spelled), LEVIT)
    (alone,) = made(tmp_path, plan(), LEVIT)
    assert isinstance(student, Training) and isinstance(alone, Training)
    assert student.distill and student.weights_id != alone.weights_id and student.key != alone.key


def edgejoule(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgejoule", *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_verb_trains_tells_and_resumes(tmp_path: Path) -> None:
    arguments = ("train", "--model", VIT, "--data", "digits", "--recipe", "digits(epochs=1)", "--seeds", "2", "--out", "out")
    done = edgejoule(*arguments, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [t["seed"] for t in told["trainings"]] == [0, 1] and Path(tmp_path / told["trainings"][0]["file"]).is_file()
    (accuracy,) = told["accuracy"]
    assert accuracy["seeds"] == 2 and accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    again = edgejoule(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and "vit_digits" in again.stdout and "Next: edgejoule measure" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train",), "name a study that trains"),
        (("train", "quickstart"), "no table"),
        (("train", "--model", VIT, "--data", "digits", "--device", "tpu"), "--device"),
        (("train", "--model", VIT, "--data", "digits", "--head", "retinanet"), "leave it out"),
        (("train", "--model", VIT, "--data", "digits", "--weights", "none.safetensors"), "no weights file"),
    ],
)
def test_the_verb_refuses_in_one_sentence(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    done = edgejoule(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_two_processes_train_through_the_verb(tmp_path: Path) -> None:
    asked = ["train", "--model", VIT, "--data", "digits", "--recipe", "digits(epochs=1)", "--out", "out", "--device", "cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate's --cpu starts one process, however many are asked for; --multi_gpu starts them, and --device keeps them off GPUs.
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--main_process_port", port, "-m", "edgejoule"]
    done = subprocess.run([*command, *asked, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["trainings"][0]["processes"] == 2
    alone = edgejoule(*asked, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr  # made already, by two: the number of processes is no part of the key


def test_weights_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    module = torch.nn.Linear(3, 2)
    sha256 = trained.write_weights(module, tmp_path / "w" / "a.safetensors")
    assert len(sha256) == 64 and trained.write_weights(module, tmp_path / "w" / "b.safetensors") == sha256
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        trained.write_weights(module, tmp_path / "file" / "a.safetensors")
