"""Dense tasks: small networks learn real files by heart, samples are functions of numbers, and what does not fit together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from edgejoule.datasets.ade20k_set import Ade20kSet
from edgejoule.datasets.coco_set import CocoSet
from edgejoule.errors import BadImageError, DataError, ModelError, SpecError, TrainingError, UnknownNameError
from edgejoule.seams import LabelledData
from edgejoule.train.dense import Detection, Segmentation, freeze_statistics
from edgejoule.train.loop import Settings, train
from edgejoule.train.recipe import Recipe
from edgejoule.train.task import At
from edgejoule.zoo import dense as heads
from edgejoule.zoo import semantic_fpn
from tests import ade20k_sample, coco_sample

CPU, AT = torch.device("cpu"), At(0, 0, 0, 0, 1)
SMALL: dict[str, dict[str, Any]] = {
    "retinanet": {"detections_per_img": 20},
    "mask_rcnn": {
        "box_detections_per_img": 20,
        "box_batch_size_per_image": 16,
        "rpn_post_nms_top_n_train": 40,
        "rpn_post_nms_top_n_test": 40,
    },
}


class Body(nn.Module):
    """Four strided convolutions: maps at strides 4, 8, 16 and 32, with batch norms, as a backbone has them."""

    feature_info = SimpleNamespace(channels=lambda: [16] * 4, reduction=lambda: [4, 8, 16, 32])

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 16, 3, stride, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            for c, stride in ((3, 4), (16, 2), (16, 2), (16, 2))
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps


def recipe(kind: Any, **changes: Any) -> Recipe:
    given = {"detection": {"size": 64, "longest": 96}, "segmentation": {"size": 32}}[kind]
    return Recipe(f"small_{kind}", kind, "", "", "", "", **{"hflip": 0.5, **given, **changes})


def network(head: str, classes: int) -> nn.Module:
    """The real heads on a pyramid of 32 channels in place of 256: seconds in place of minutes."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "PYRAMID_CHANNELS", 32)
        patch.setattr(semantic_fpn, "PYRAMID_CHANNELS", 32)
        return heads.build_head(head, Body(), classes, **SMALL.get(head, {}))


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both splits of COCO's layout: the sample's five images, to train on and to be judged by."""
    root = tmp_path_factory.mktemp("coco")
    _write_coco(root)
    return root


def _write_coco(root: Path) -> None:
    images, file = coco_sample.write(root)
    (root / "train2017").mkdir()
    for image in images.iterdir():
        (root / "train2017" / image.name).write_bytes(image.read_bytes())
    (root / "annotations" / "instances_train2017.json").write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def ade_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ade20k_sample.write(tmp_path_factory.mktemp("ade"))


def detection(root: Path, **options: Any) -> Detection:
    data = CocoSet(str(root))
    changes = options.pop("recipe", {})
    return Detection(data.split("train"), data.split("validation"), recipe("detection", **changes), **options)


def segmentation(root: Path, **options: Any) -> Segmentation:
    data = Ade20kSet(str(root))
    changes = options.pop("recipe", {})
    return Segmentation(data.split("train"), data.split("validation"), recipe("segmentation", **changes), **options)


def losses_of(task: Any, module: nn.Module, steps: int, images: int = 2, lr: float = 1e-3) -> list[float]:
    """A loop of the fewest lines: the first images of the split, again and again."""
    model = task.begin(module).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = []
    for step in range(steps):
        batch = task.collate([task.training[step, position, position] for position in range(images)])
        loss = task.loss(model, batch, At(0, step, 0, step, steps))
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(("head", "steps"), [("retinanet", 40), ("mask_rcnn", 18)])
def test_a_detector_learns_two_pictures_by_heart_and_is_scored(head: str, steps: int, coco_root: Path) -> None:
    task = detection(coco_root, recipe={"hflip": 0.0})
    module = network(head, classes=4)
    losses = losses_of(task, module, steps)
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses
    scores = task.scores(task.end(module).eval(), CPU)
    assert task.headline in scores and all(0.0 <= value <= 1.0 for value in scores.values())
    assert {"map", "map50", "map75", "map_small", "map_medium", "map_large"} <= set(scores)
    assert ("mask_map" in scores) == (head == "mask_rcnn")


def test_a_segmenter_learns_two_pictures_by_heart_and_is_scored(ade_root: Path) -> None:
    task = segmentation(ade_root)
    module = network("semantic_fpn", classes=150)
    before = task.scores(module.eval(), CPU)
    losses = losses_of(task, module, steps=40, images=3, lr=5e-3)
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    scores = task.scores(task.end(module).eval(), CPU)
    assert set(scores) == {"miou", "pixel_accuracy"} and task.headline in scores
    assert scores["pixel_accuracy"] > before["pixel_accuracy"] + 0.1


def test_the_recipes_size_is_the_one_the_detector_resizes_to(coco_root: Path) -> None:
    task = detection(coco_root, recipe={"size": 48, "longest": 50})
    module = task.begin(network("retinanet", 4))
    resized, _ = module.transform([torch.rand(3, 160, 200)])
    assert resized.image_sizes == [(40, 50)]
    plain = network("retinanet", 4)
    assert detection(coco_root, recipe={"size": 0, "longest": 0}).begin(plain).transform.min_size == (800,)


def test_a_step_over_halves_of_a_batch_is_the_step_over_the_batch(coco_root: Path, ade_root: Path) -> None:
    """The losses of RetinaNet and Semantic FPN are means over images, whatever their objects and labelled pixels."""
    cases: list[tuple[Any, nn.Module]] = [
        (detection(coco_root), network("retinanet", 4)),
        (segmentation(ade_root), network("semantic_fpn", 150)),
    ]
    for task, module in cases:
        model = task.begin(module).train()
        for part in model.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.Dropout2d)):
                part.eval()  # both look at the whole batch
        samples = [task.training[0, position, position] for position in range(2)]
        if isinstance(task, Detection):  # of one size, so that no padding differs
            image, target = samples[0]
            samples = [(image, target), (image.flip(-1), {key: value[:1] for key, value in target.items() if value.ndim})]
        else:
            samples[0][1][:20] = 255  # so that a mean over labelled pixels would be another
        whole = task.loss(model, task.collate(samples), AT)
        halves = [task.loss(model, task.collate([one]), AT) for one in samples]
        assert not torch.isclose(halves[0], halves[1], rtol=1e-3)
        assert torch.allclose(whole, sum(halves) / 2, rtol=1e-4)


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_every_parameter_has_a_gradient_where_a_batch_has_no_object(head: str, coco_root: Path) -> None:
    """Else DistributedDataParallel would wait for it for ever."""
    task, module = detection(coco_root), network(head, 4)
    image, target = task.training[0, 0, 0]
    task.loss(
        task.begin(module).train(), task.collate([(image, {key: value[:0] for key, value in target.items() if value.ndim})]), AT
    ).backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_unlabelled_pixels_add_nothing_and_a_crop_without_labels_is_no_nan(ade_root: Path) -> None:
    task, module = segmentation(ade_root), network("semantic_fpn", 150)
    images, labels = task.collate([task.training[0, n, n] for n in range(2)])
    empty = task.loss(task.begin(module).train(), (images, torch.full_like(labels, 255)), AT)
    assert float(empty.detach()) == 0.0
    empty.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_masks_are_read_and_images_normalised_as_the_network_wants_them(coco_root: Path, ade_root: Path) -> None:
    objects, scenes = detection(coco_root), segmentation(ade_root)
    for head, masks in (("mask_rcnn", True), ("retinanet", False), ("mask_rcnn", True)):
        objects.begin(network(head, 4))
        assert ("masks" in objects.training[0, 0, 0][1]) == masks
    before, module = scenes.training[0, 0, 0][0], network("semantic_fpn", 150)
    module.mean, module.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    scenes.begin(module)
    after, (whole, _) = scenes.training[0, 0, 0][0], scenes.validation[0]
    assert float(before.min()) < 0 <= float(after.min()) <= float(after.max()) <= 1
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1


def test_frozen_statistics_stay_and_gains_learn(coco_root: Path) -> None:
    for frozen in (True, False):
        task, module = detection(coco_root, frozen_statistics=frozen), network("retinanet", 4)
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
        before = [(norm.running_mean.clone(), norm.weight.detach().clone()) for norm in norms]
        losses_of(task, module, steps=2)
        assert all(torch.equal(norm.running_mean, mean) == frozen for norm, (mean, _) in zip(norms, before, strict=True))
        assert all(not torch.equal(norm.weight, gain) for norm, (_, gain) in zip(norms, before, strict=True))


def test_only_the_backbones_norms_are_frozen() -> None:
    module = network("semantic_fpn", 3).train()
    freeze_statistics(nn.Sequential(module))  # as a wrapper names it
    frozen = {name.split(".")[0] for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d) and not part.training}
    assert frozen == {"backbone"}


# ---------------------------------------------------------------- functions of numbers


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("make", [lambda c, a: detection(c), lambda c, a: segmentation(a)], ids=["detection", "segmentation"])
def test_a_sample_is_a_function_of_seed_epoch_position_and_index(make: Any, coco_root: Path, ade_root: Path) -> None:
    task, again = make(coco_root, ade_root), make(coco_root, ade_root)
    asked = [(epoch, position, index) for epoch in range(4) for position in range(4) for index in range(2)]
    first = [task.training[which] for which in asked]
    backwards = [again.training[which] for which in reversed(asked)]  # what was drawn before does not matter
    assert equal(first, backwards[::-1])
    of_image_0 = first[0::2]
    assert any(not equal(of_image_0[0], other) for other in of_image_0[1:4])  # by position
    assert any(not equal(of_image_0[0], other) for other in of_image_0[4::4])  # by epoch
    again.training.seed = 1
    assert not equal(first, [again.training[which] for which in asked])


@pytest.mark.parametrize("make", [lambda c, a: detection(c), lambda c, a: segmentation(a)], ids=["detection", "segmentation"])
def test_worker_processes_give_the_same_batches_in_every_epoch(make: Any, coco_root: Path, ade_root: Path) -> None:
    task = make(coco_root, ade_root)

    def batches(workers: int) -> list[Any]:
        order = [[(epoch, position, 1 - position) for position in range(2)] for epoch in range(3)]
        return list(DataLoader(task.training, batch_sampler=order, collate_fn=task.collate, num_workers=workers))

    alone = batches(0)
    assert equal(alone, batches(2))
    assert not equal(alone[0], alone[1]) or not equal(alone[1], alone[2])


def test_validation_scores_do_not_depend_on_workers(coco_root: Path, ade_root: Path) -> None:
    for make, root, head, classes in ((detection, coco_root, "retinanet", 4), (segmentation, ade_root, "semantic_fpn", 150)):
        module = network(head, classes).eval()
        alone, beside = make(root), make(root, workers=1)
        assert alone.scores(alone.begin(module), CPU) == beside.scores(beside.begin(module), CPU)


# ---------------------------------------------------------------- through the loop


@pytest.mark.parametrize(("head", "classes", "workers"), [("mask_rcnn", 4, 0), ("semantic_fpn", 150, 1)])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    head: str, classes: int, workers: int, coco_root: Path, ade_root: Path, tmp_path: Path
) -> None:
    """Flips and crops, sampled boxes and dropout come again as they would have been, whatever was drawn before."""
    changes = {"epochs": 2, "batch": 2, "lr": 1e-3}
    module = network(head, classes)

    def run(folder: str, stop_after: int = 0) -> Any:
        task: Any = detection(coco_root, recipe=changes) if head == "mask_rcnn" else segmentation(ade_root, recipe=changes)

        def on_epoch(epoch: Any) -> None:
            if epoch.number == stop_after:
                raise KeyboardInterrupt

        settings = Settings(tmp_path / folder, "key", seed=5, workers=workers, device="cpu")
        return train(module, task, task_recipe(task, changes), settings, on_epoch=on_epoch)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_after=1)
    torch.manual_seed(9)
    resumed = run("stopped")
    pairs = zip(whole.module.state_dict().values(), resumed.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [epoch.scores for epoch in whole.epochs] == [epoch.scores for epoch in resumed.epochs]
    assert (len(whole.epochs) == 2 and whole.epochs[0].scores.keys() >= {"map", "mask_map"}) or "miou" in whole.epochs[0].scores
    assert not torch.equal(next(whole.module.parameters()), next(module.parameters()))


def task_recipe(task: Any, changes: dict[str, Any]) -> Recipe:
    return recipe("detection" if isinstance(task, Detection) else "segmentation", **changes)


def test_the_loop_passes_over_a_bad_image_and_counts_it(tmp_path: Path) -> None:
    ade = ade20k_sample.write(tmp_path / "ade")
    (ade / "images/training/ADE_train_00000002.jpg").write_bytes(b"no picture")
    changes = {"epochs": 2, "batch": 3}
    task = segmentation(ade, recipe=changes)

    def run(most: int) -> Any:
        settings = Settings(tmp_path / str(most), "key", seed=0, max_bad_images=most, device="cpu")
        return train(network("semantic_fpn", 150), task, task_recipe(task, changes), settings)

    assert run(1).bad_images == 1
    with pytest.raises(BadImageError, match=r"ADE_train_00000002\.jpg"):
        run(0)


# ---------------------------------------------------------------- what does not fit


def test_a_bad_image_is_named_by_training_and_by_scoring(tmp_path: Path) -> None:
    _write_coco(tmp_path / "coco")
    ade = ade20k_sample.write(tmp_path / "ade")
    for folder in ("train2017", "val2017"):
        (tmp_path / "coco" / folder / "000000000139.jpg").write_bytes(b"\xff\xd8\xff no picture")
    for folder, stem in (("training", "train"), ("validation", "val")):
        Image.fromarray(np.full((60, 90), 200, dtype=np.uint8)).save(ade / "annotations" / folder / f"ADE_{stem}_00000001.png")
    cases: list[tuple[Any, nn.Module, str]] = [
        (detection(tmp_path / "coco"), network("retinanet", 4), r"139\.jpg"),
        (segmentation(ade), network("semantic_fpn", 150), r"00000001\.png holds class 200"),
    ]
    for task, module, says in cases:
        with pytest.raises(BadImageError, match=says):
            task.training[0, 0, 0]
        assert task.training[0, 0, 1]  # the others are read
        for task.workers in (0, 1):
            with pytest.raises(BadImageError, match=says) as caught:
                task.scores(module.eval(), CPU)
            assert "\n" not in str(caught.value)


def test_images_without_objects_are_left_out_of_training_only(coco_root: Path) -> None:
    task = detection(coco_root)
    assert len(task.training) == 4 and len(task.validation) == 5
    assert [int(task.training[0, 0, index][1]["image_id"]) for index in range(4)] == [139, 285, 632, 724]


def _changed(root: Path, split: str, change: Callable[[Any], Any]) -> Path:
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return root


def test_splits_and_recipes_that_do_not_fit_are_refused(tmp_path: Path, coco_root: Path, ade_root: Path) -> None:
    with pytest.raises(TrainingError, match="recipe small_segmentation is for segmentation"):
        Detection(CocoSet(str(coco_root)).split("train"), CocoSet(str(coco_root)).split("validation"), recipe("segmentation"))
    for split in ("train", "val"):
        _write_coco(tmp_path / split)
        with pytest.raises(TrainingError, match="no object"):
            detection(_changed(tmp_path / split, split, lambda c: c.update(annotations=[])))
    _write_coco(tmp_path / "other")
    with pytest.raises(TrainingError, match="different categories"):
        detection(_changed(tmp_path / "other", "val", lambda c: c["categories"][0].update(name="comb")))
    scenes = Ade20kSet(str(ade_root))
    with pytest.raises(TrainingError, match="classes"):
        Segmentation(scenes.split("train"), Ade20kSet(str(ade_root), 151).split("validation"), recipe("segmentation"))
    with pytest.raises(TrainingError, match="whole images"):
        Segmentation(scenes.split("train"), scenes.split("train"), recipe("segmentation"))


def test_networks_that_do_not_fit_are_refused(coco_root: Path, ade_root: Path) -> None:
    with pytest.raises(TrainingError, match="no detector"):
        detection(coco_root).begin(network("semantic_fpn", 4))
    boxes = CocoSet(str(coco_root), masks=False)
    with pytest.raises(TrainingError, match=r"coco\(masks=True\)"):
        Detection(boxes.split("train"), boxes.split("validation"), recipe("detection")).begin(network("mask_rcnn", 4))
    task, few = segmentation(ade_root), network("semantic_fpn", 3)
    with pytest.raises(TrainingError, match="gives 3 classes"):
        task.loss(task.begin(few), task.collate([task.training[0, n, n] for n in range(2)]), AT)
    objects, few = detection(coco_root), network("retinanet", 1)
    with pytest.raises(ModelError, match="label"):
        objects.loss(objects.begin(few).train(), objects.collate([objects.training[0, 0, 1]]), AT)


# ---------------------------------------------------------------- leaves and heads


def test_both_sets_are_labelled_data_with_names_and_origins(coco_root: Path, ade_root: Path, tmp_path: Path) -> None:
    coco, ade = CocoSet(str(coco_root)), Ade20kSet(str(ade_root))
    for leaf in (coco, ade):
        assert isinstance(leaf, LabelledData) and leaf.probe() is None
        with pytest.raises(DataError, match="test"):
            leaf.split("test")
    assert (coco.kind, coco.dataset, coco.classes) == ("detection", "coco", ("car", "cat", "bottle", "toothbrush"))
    assert (ade.kind, ade.dataset, len(ade.classes), ade.classes[149]) == ("segmentation", "ade20k", 150, "class 150")
    _write_coco(tmp_path / "coco")
    copied = CocoSet(str(tmp_path / "coco"))
    assert copied.origin() == coco.origin() != CocoSet(str(coco_root), masks=False).origin()
    _changed(tmp_path / "coco", "val", lambda c: c["annotations"].pop())
    assert copied.origin() != coco.origin()
    twin = ade20k_sample.write(tmp_path / "ade")
    assert Ade20kSet(str(twin)).origin() == ade.origin()
    label = twin / "annotations/training/ADE_train_00000001.png"
    label.write_bytes(label.read_bytes()[:-1] + b"x")
    assert Ade20kSet(str(twin)).origin() != ade.origin()


def test_an_annotation_file_is_read_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    _write_coco(tmp_path)
    leaf = CocoSet(str(tmp_path))
    assert leaf.split("validation").truth is leaf.split("validation").truth
    _changed(tmp_path, "val", lambda c: c["categories"][0].update(name="comb"))
    assert leaf.classes == ("car", "cat", "bottle", "comb")


def test_class_names_come_from_the_file_that_ade20k_ships(tmp_path: Path) -> None:
    root = ade20k_sample.write(tmp_path)
    rows = [f"{n}\t0.1\t11\t2\t{'wall' if n == 1 else f'thing {n}, object'}   " for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    assert Ade20kSet(str(root)).classes[:2] == ("wall", "thing 2, object")
    (root / "objectInfo150.txt").write_text("\n".join(rows[:9]))
    assert Ade20kSet(str(root)).classes[0] == "class 1"


def test_what_is_missing_is_said_before_anything_is_read(tmp_path: Path) -> None:
    for leaf, names in ((CocoSet(str(tmp_path)), "instances_train2017.json"), (Ade20kSet(str(tmp_path)), "training")):
        assert names in str(leaf.probe()) and "unpack" in str(leaf.probe())
        with pytest.raises(DataError, match=str(tmp_path)):
            leaf.origin()
        with pytest.raises(DataError, match=str(tmp_path)):
            leaf.split("train")
    for path in ("a\0b", str(tmp_path / "none")):
        with pytest.raises(DataError):
            CocoSet(path).classes  # noqa: B018
        with pytest.raises(DataError):
            Ade20kSet(path).origin()
    with pytest.raises(SpecError, match="both"):
        CocoSet(str(tmp_path), train="a", validation="a")
    with pytest.raises(SpecError, match="254"):
        Ade20kSet(str(tmp_path), num_classes=255)


def test_heads_have_names_and_kinds() -> None:
    assert heads.head_of("detection", "retinanet") is heads.retinanet
    assert heads.head_of("segmentation", "semantic_fpn") is heads.semantic_fpn
    with pytest.raises(UnknownNameError, match="mask_rcnn"):
        heads.head_of("detection", "mask_rnn")
    with pytest.raises(UnknownNameError, match="segmentation head"):
        heads.head_of("segmentation", "retinanet")
    with pytest.raises(UnknownNameError, match="kind of dense task"):
        heads.head_of("classification", "retinanet")
    with pytest.raises(UnknownNameError, match="did you mean retinanet"):
        heads.build_head("retinanets", Body(), 3)
    with pytest.raises(SpecError, match="semantic_fpn with min_size"):
        heads.build_head("semantic_fpn", Body(), 3, min_size=64)
    with pytest.raises(UnknownNameError):
        heads.build_head("retinanet", "edgevit_xxxs", 3)
