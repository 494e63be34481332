"""From files on disk to a score: the labels of the data sets, of the heads of dense.py and of the evaluations are the same ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from edgejoule.datasets.ade20k import IGNORE, Ade20k
from edgejoule.datasets.average_precision import evaluate_detections
from edgejoule.datasets.coco import CocoDetection, collate
from edgejoule.datasets.mean_iou import MeanIoU, predicted_classes
from edgejoule.zoo import dense
from tests import ade20k_sample, coco_sample

BACKBONE = "edgevit_xxs"


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> CocoDetection:
    return CocoDetection(*coco_sample.write(tmp_path_factory.mktemp("coco")))


def step(module: torch.nn.Module, loss: torch.Tensor) -> None:
    """One backward step that reaches the backbone and the heads."""
    assert loss.isfinite()
    loss.backward()
    reached = [parameter for parameter in module.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert len(reached) > 0.9 * len(list(module.parameters()))
    torch.optim.AdamW(module.parameters(), lr=1e-4).step()


@pytest.mark.parametrize(("detector", "kinds"), [(dense.retinanet, ("bbox",)), (dense.mask_rcnn, ("bbox", "segm"))])
def test_a_detector_learns_from_coco_files_and_is_scored_on_them(detector: Any, kinds: tuple[str, ...], objects: CocoDetection) -> None:
    torch.manual_seed(0)
    limit: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 9}
    if "segm" in kinds:
        limit = {"box_score_thresh": 0.0, "box_detections_per_img": 9, "box_batch_size_per_image": 32}
        limit |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50}
    module = detector(BACKBONE, num_classes=len(objects.truth.category_ids), min_size=96, max_size=128, **limit)
    images, targets = next(iter(DataLoader(objects, batch_size=len(objects), collate_fn=collate)))
    assert 0 in [len(target["labels"]) for target in targets]  # an image without objects is in the batch
    assert max(int(target["labels"].max()) for target in targets if len(target["labels"])) == len(objects.truth.category_ids)
    step(module.train(), sum(module(images, targets).values()))
    with torch.inference_mode():
        found = module.eval()(images)
    assert sum(len(one["labels"]) for one in found) > 9
    scores = evaluate_detections(objects, ((int(t["image_id"]), one) for t, one in zip(targets, found, strict=True)), kinds)
    assert set(scores) == set(kinds)
    assert all(0.0 <= scores[kind]["AP"] <= 1.0 for kind in kinds)


class Averages(nn.Module):
    """A body without weights: the image itself, at strides 4, 8, 16 and 32."""

    feature_info = SimpleNamespace(channels=lambda: [3] * 4, reduction=lambda: [4, 8, 16, 32])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [functional.avg_pool2d(images, stride, ceil_mode=True) for stride in (4, 8, 16, 32)]


class Answers(nn.Module):
    """In the place of RetinaNet's head: answers for each anchor that are weights themselves, so that training can make them right."""

    def __init__(self, head: Any, anchors: int) -> None:
        super().__init__()
        self.classification_head, self.compute_loss = head.classification_head, head.compute_loss
        self.cls_logits = nn.Parameter(torch.full((1, anchors, 4), -4.0))
        self.bbox_regression = nn.Parameter(torch.zeros(1, anchors, 4))

    def forward(self, maps: Any) -> dict[str, torch.Tensor]:
        return {"cls_logits": self.cls_logits, "bbox_regression": self.bbox_regression}


def test_a_detector_that_has_learnt_the_files_by_heart_scores_1(objects: CocoDetection) -> None:
    """Targets as loaded, torchvision's loss, its answers, COCO's score: one label off, or boxes of another scale, would not give 1."""
    found = {}
    for image, target in objects:
        module = dense.retinanet(Averages(), num_classes=4, min_size=160, max_size=256)
        with torch.inference_mode():
            anchors = module.head(list(module.backbone(module.transform([image])[0].tensors).values()))["cls_logits"].shape[1]
        module.head = Answers(module.head, anchors)
        optimizer = torch.optim.Adam([module.head.cls_logits, module.head.bbox_regression], lr=0.05)
        for scale in torch.linspace(1, 0.02, 80):
            optimizer.param_groups[0]["lr"] = 0.1 * float(scale)
            optimizer.zero_grad()
            sum(module.train()([image], [target]).values()).backward()
            optimizer.step()
        with torch.inference_mode():
            (found[int(target["image_id"])],) = module.eval()([image])
    labels = {key: sorted(set(one["labels"].tolist())) for key, one in found.items()}
    assert labels == {139: [1, 2], 285: [4], 632: [1], 724: [2, 4], 9999: []}
    scores = evaluate_detections(objects, found, ("bbox",))["bbox"]
    assert scores["AP50"] == 1.0 and scores["AP"] > 0.9


def test_a_segmenter_learns_from_ade20k_files_and_is_scored_on_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    root = ade20k_sample.write(tmp_path)
    module = dense.semantic_fpn(BACKBONE)
    normalised = {"mean": module.mean, "std": module.std}
    images, labels = next(iter(DataLoader(Ade20k(root, "training", size=64, **normalised), batch_size=3)))
    assert set(labels.unique().tolist()) - {IGNORE} <= set(range(150))
    step(module.train(), functional.cross_entropy(module(images), labels, ignore_index=IGNORE))
    module.eval()
    scored, perfect = MeanIoU(), MeanIoU()
    for image, truth in Ade20k(root, "validation", size=64, **normalised):
        with torch.inference_mode():
            scored.add(predicted_classes(module(image[None]), tuple(truth.shape)), truth[None])
        perfect.add(truth.clamp(max=149)[None], truth[None])
    assert 0.0 <= scored.scores().miou < 1.0
    assert scored.confusion.sum() == perfect.confusion.sum() > 0
    assert perfect.scores().miou == 1.0 and 149 in [i for i, value in enumerate(perfect.scores().iou) if value is not None]
