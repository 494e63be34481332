"""Training joined to the rest: studies that train, runs that are not made twice, and measured accuracy in rankings."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgejoule import trained, training
from edgejoule.bench import Bench
from edgejoule.catalog import find_model
from edgejoule.errors import BackendError, BadImageError, DataError, OutputError, SpecError, StudyError
from edgejoule.records import Accuracy, Artifact, Failure, Training
from edgejoule.store import NAME, Store
from edgejoule.study import run_study
from edgejoule.study_file import ScreenPlan, TrainPlan, load_study, parse_study, with_measure
from tests import ade20k_sample
from tests.labelled_samples import write_cifar10, write_imagefolder, write_webdataset

SHORT = "quick(window_s=0.2, idle_s=0.2, warmup_s=0.1, warmup_cap_s=0.5)"
VIT = 'timm(name="vit_digits")'
LEVIT = 'timm(name="levit_digits")'


def plan(**values: object) -> TrainPlan:
    return TrainPlan(**{"data": "digits", "recipes": ("digits(steps=6)",), "weights": "random", **values})  # type: ignore[arg-type]


def made(out: Path, asked: TrainPlan, *models: str) -> list[Training | Failure]:
    """What a plan gives, kept in ``out``."""
    runs = training.runs_of([find_model(model) for model in models or (VIT,)], asked, 0)
    with Store.open(out / NAME) as store:
        return list(training.train_all(runs, out, store, store.begin_run("test", "", "", ""), Bench()))


def test_a_study_that_trains_ranks_by_what_it_measured(tmp_path: Path) -> None:
    study = with_measure(load_study("digits"), profile=SHORT)
    assert study.train is not None
    study = replace(study, train=replace(study.train, recipes=("digits(steps=12)",), seeds=2))
    outcome = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache", seed=study.study.seed))
    assert not outcome.failures
    (ranking,) = outcome.rankings
    assert len(ranking.rows) == 3 and ranking.dataset == "digits"
    assert {row.accuracy for row in ranking.rows} == {"measured"}
    assert all(row.netscore is not None for row in ranking.rows)
    for measurement in outcome.measurements:
        accuracy = measurement.accuracy
        assert accuracy is not None and accuracy.seeds == 2 and accuracy.std is not None and accuracy.n == 374
        assert accuracy.low is not None and accuracy.low <= accuracy.value <= (accuracy.high or 0)
    with Store.open(tmp_path / "out" / NAME, create=False) as store:
        assert len(store.trainings()) == 6 and len(store.evaluations()) == 3
        assert all(len(store.epochs(key)) == 1 for key in store.trainings())
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
    asked = [plan(), plan(recipes=("digits(lr=0.0001, steps=6)",)), plan(seeds=2)]
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


def test_a_copy_of_the_data_elsewhere_is_the_same_run(tmp_path: Path) -> None:
    home = Path(write_imagefolder(tmp_path / "one" / "set"))
    shutil.copytree(home, tmp_path / "two" / "set")
    recipe = ("digits(steps=1, batch=4)",)
    found = [made(tmp_path, plan(data=f"imagefolder(path={str(path)!r})", recipes=recipe)) for path in (home, tmp_path / "two" / "set")]
    assert found[0] == found[1]


def test_recipes_and_models_given_twice_are_run_once() -> None:
    asked = plan(recipes=("digits(steps=6)", "digits(batch=32, steps=6)"), seeds=2)
    assert len(training.runs_of([find_model(VIT), find_model(VIT)], asked, 0)) == 2


def test_changed_code_of_a_users_own_network_is_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule import zoo

    monkeypatch.syspath_prepend(tmp_path)
    known = []
    for n, layers in enumerate(("Linear(4, num_classes)", "Dropout(0.1), torch.nn.Linear(4, num_classes)")):
        code = f"import torch\ndef net(num_classes=10):\n    return torch.nn.Sequential(torch.nn.{layers})\n"
        (tmp_path / f"mine{n}.py").write_text(code)
        _, kind, identity = zoo.for_training(find_model(f"mine{n}:net", allow_code=True), 0)
        known.append(identity)
        assert kind == "random" and identity != zoo.for_training(find_model(f"mine{n}:net", allow_code=True), 1)[2]
    assert known[0] != known[1]


def test_a_bad_test_image_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    home = Path(write_imagefolder(tmp_path / "set", splits=("train", "val", "test")))
    next((home / "test").rglob("*.png")).write_bytes(b"no picture")
    asked = plan(data=f"imagefolder(path={str(home)!r})", recipes=("digits(steps=1, batch=4)",))
    with pytest.raises(BadImageError, match="max-bad-images"):
        made(tmp_path, asked)
    (found,) = made(tmp_path, replace(asked, max_bad_images=1))
    assert isinstance(found, Training) and found.bad_images == 1 and found.accuracy is not None and found.accuracy.n == 23


def test_a_split_without_images_is_refused_before_any_work(tmp_path: Path) -> None:
    shards = write_webdataset(tmp_path)
    with pytest.raises(DataError, match=r"test split .* holds no images"):
        training.check(plan(data=f"webdataset(path={shards!r})"))


def test_changed_test_images_are_evaluated_again(tmp_path: Path) -> None:
    home = Path(write_imagefolder(tmp_path / "set", splits=("train", "val", "test")))
    text = (
        f"[study]\nname = 'x'\n[screen]\nmodels = ['timm(name=\"vit_digits\")']\nweights = 'random'\n[train]\nweights = 'random'\n"
        f"data = 'imagefolder(path=\"{home}\")'\nrecipes = ['digits(steps=1, batch=4)']\n[compile]\nbackends = ['onnxruntime']\n"
        f"[[measure]]\nprofile = '{SHORT}'\nimages = 'photos(n=2)'\n[rank]\nmetric = 'efficiency'\n"
    )
    study, bench = parse_study(text, "x.toml"), Bench(cache=tmp_path / "cache")
    (before,) = run_study(study, tmp_path / "out", bench).measurements
    kept = sorted((home / "test").rglob("*.png"))
    for file in kept[::2]:
        file.unlink()
    outcome = run_study(study, tmp_path / "out", bench)
    newest = outcome.measurements[-1]
    assert before.accuracy is not None and newest.accuracy is not None
    assert newest.accuracy.n == len(kept) // 2 < (before.accuracy.n or 0)


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

    ten = tmp_path / "ten.safetensors"
    trained.write_weights(zoo.for_training(find_model(VIT), 0, "random")[0], ten)
    folder = write_imagefolder(tmp_path / "few")
    asked = plan(data=f"imagefolder(path={str(folder)!r})", distill=f"soft(teacher={VIT!r}, weights={str(ten)!r})")
    (failure,) = made(tmp_path, replace(asked, recipes=("digits(steps=2, batch=4)",)), LEVIT)
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


def launched(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """By two processes on the CPU. accelerate's --cpu starts one, however many are asked for; --multi_gpu starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", port, "-m", "edgejoule"]
    return subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)


def test_the_verb_trains_a_dense_head(tmp_path: Path) -> None:
    ade20k_sample.write(tmp_path / "ade")
    asked = ("--data", "ade20k(path='ade')", "--recipe", "adesegm_80k(steps=2, batch=2, size=64)", "--weights", "random", "--out", "out")
    refused = edgejoule("train", "--model", "edgevit_xxs", *asked, cwd=tmp_path)
    assert refused.returncode == 2 and "semantic_fpn" in refused.stderr
    done = edgejoule("train", "--model", "edgevit_xxs", "--head", "semantic_fpn", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "miou" in done.stdout and "edgejoule measure" not in done.stdout


def test_the_verb_trains_tells_and_resumes(tmp_path: Path) -> None:
    arguments = ("train", "--model", VIT, "--data", "digits", "--recipe", "digits(steps=6)", "--seeds", "2", "--out", "out")
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
    asked = ["train", "--model", VIT, "--data", "digits", "--recipe", "digits(steps=6)", "--out", "out", "--device", "cpu"]
    done = launched(tmp_path, *asked, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["trainings"][0]["processes"] == 2
    alone = edgejoule(*asked, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr  # made already, by two: the number of processes is no part of the key


def test_a_loss_that_is_no_number_ends_all_processes(tmp_path: Path) -> None:
    recipe = "digits(lr=1e6, clip_norm=0, warmup_epochs=0, steps=60)"
    done = launched(tmp_path, "train", "--model", VIT, "--data", "digits", "--recipe", recipe, "--seeds", "2", "--device", "cpu")
    assert done.returncode != 0 and "expected a number" in done.stderr


def test_an_artifact_that_cannot_be_evaluated_is_a_failure_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule import evaluating

    study = with_measure(load_study("digits"), profile=SHORT)
    assert study.train is not None
    models = (VIT, LEVIT)
    study = replace(study, train=replace(study.train, recipes=("digits(steps=2)",)), screen=replace(study.screen, models=models))
    real = evaluating.evaluate_artifact

    def fails_once(artifact: Artifact, *arguments: object, **options: object) -> object:
        if artifact.variant.spec.name == "vit_digits":
            raise BackendError("it died")
        return real(artifact, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluating, "evaluate_artifact", fails_once)
    outcome = run_study(study, tmp_path / "out", Bench(cache=tmp_path / "cache"))
    assert [(failure.stage, failure.reason) for failure in outcome.failures] == [("evaluate", "it died")]
    codes = {m.model: {doubt.code for doubt in m.caveats} for m in outcome.measurements}
    assert "accuracy_of_training" in codes["vit_digits"] and "accuracy_of_training" not in codes["levit_digits"]


def test_weights_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    module = torch.nn.Linear(3, 2)
    found = {trained.write_weights(module, tmp_path / "w" / f"{n}.safetensors", find_model(VIT)) for n in range(20)}
    assert len(found) == 1 and len(found.pop()) == 64
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        trained.write_weights(module, tmp_path / "file" / "a.safetensors")
