"""Does a teacher help? A distilled student against the same student without, on real scans, paired by seed.

    python benchmarks/distill_digits.py [--seeds 5] [--share 1.0 --share 0.1] [--data 'cifar10(path="...")'] [--json distill.json]

For every seed and labelled share: a teacher is trained on the labelled images, then the student twice on the same images, with the same
weights to begin with, the same order and the same augmentation, once with the teacher and once without. Nobody sees an image or a label
that the others do not, and all runs take the same number of optimiser steps. Top-1 is of the test split, which nothing is chosen by; the
validation split is not used. The difference is a mean over seeds with Student's t interval (95 %), so it covers both the teacher's seed
and the student's, not the choice of the test images. What is compared was chosen before it was seen; give --distill for another.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from edgejoule import registry, zoo
from edgejoule.catalog import find_model
from edgejoule.measure.stats import t_interval
from edgejoule.records import ModelSpec
from edgejoule.train import distil, recipes
from edgejoule.train.augment import preprocessing_for
from edgejoule.train.classification import Classification, logits
from edgejoule.train.loop import Settings, train
from edgejoule.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Some:
    """The images of a split whose key's hash lies below ``share``, or the ``first`` so many."""

    images: Any
    places: tuple[int, ...]

    @classmethod
    def below(cls, images: Any, share: float) -> Some:
        hashes = (int.from_bytes(hashlib.sha256(f"share {images.key(n)}".encode()).digest()[:8], "big") for n in range(len(images)))
        return cls(images, tuple(n for n, hashed in enumerate(hashes) if hashed < share * 2**64))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        found: tuple[Any, int] = self.images[self.places[index]]
        return found

    def key(self, index: int) -> str:
        return str(self.images.key(self.places[index]))


@dataclasses.dataclass(frozen=True)
class Bed:
    """What all runs of one share have in common."""

    data: Any
    training: Some
    recipe: Recipe
    folder: Path

    def spec(self, name: str) -> ModelSpec:
        spec = find_model(name if "(" in name else f'timm(name="{name}")')
        return dataclasses.replace(
            spec, num_classes=len(self.data.classes), preprocessing=preprocessing_for(spec.preprocessing, self.recipe), published=None
        )

    def run(self, name: str, seed: int, distiller: Any = None, label: str = "") -> tuple[torch.nn.Module, float]:
        """A network trained from random weights, and its top-1 on the test split."""
        spec = self.spec(name)
        module, _, _ = zoo.for_training(spec, seed, "random", self.recipe.drop_path)
        classes = len(self.data.classes)
        few = Some(self.data.split("validation"), tuple(range(2)))  # the loop asks for scores, this comparison for none
        task = Classification(self.training, few, classes, spec.preprocessing, self.recipe, seed, distiller)
        settings = Settings(self.folder / f"{label}-{seed}", f"{label}-{seed}", seed)
        done = train(module, task, self.recipe, settings)
        answers, labels, _ = logits(done.module, self.data.split("test"), spec.preprocessing, torch.device("cpu"))
        return done.module, float((answers.argmax(1) == labels).mean())

    def pair(self, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
        """Top-1 of the teacher, of the student alone and of the student that learned from it."""
        teacher, of_teacher = self.run(arguments.teacher, seed, label="teacher")
        _, plain = self.run(arguments.student, seed, label="plain")
        teacher_spec, student_spec = self.spec(arguments.teacher), self.spec(arguments.student)
        distiller = distil.open_distiller(
            distil.parse(arguments.distill),
            teacher,
            teacher_preprocessing=teacher_spec.preprocessing,
            teacher_weights="file",
            student_preprocessing=student_spec.preprocessing,
            num_classes=len(self.data.classes),
            seed=seed,
        )
        _, distilled = self.run(arguments.student, seed, distiller, "distilled")
        return {"teacher": of_teacher, "plain": plain, "distilled": distilled}


def of_share(arguments: argparse.Namespace, share: float, data: Any, folder: Path) -> dict[str, Any]:
    """All seeds of one labelled share."""
    training = Some.below(data.split("train"), share)
    recipe = dataclasses.replace(recipes.find(arguments.recipe), steps=arguments.steps)
    bed = Bed(data, training, recipe, folder / f"share-{share}")
    pairs = []
    for seed in range(arguments.seeds):
        began = time.monotonic()
        pairs.append(bed.pair(arguments, seed))
        shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in pairs[-1].items())
        print(f"share {share:g}, seed {seed}: {shown} ({time.monotonic() - began:.0f} s)", flush=True)
    difference = t_interval([pair["distilled"] - pair["plain"] for pair in pairs])
    return {
        "share": share,
        "labelled": len(training),
        "tested": len(data.split("test")),
        "pairs": pairs,
        "mean": {name: statistics.fmean(pair[name] for pair in pairs) for name in pairs[0]},
        "difference": dataclasses.asdict(difference),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One row a share, in percent."""
    lines = ["| labelled images | teacher | student alone | distilled student | difference, points (95 %) |", "|---|---|---|---|---|"]
    for result in results:
        mean, interval = result["mean"], result["difference"]
        means = " | ".join(f"{100 * mean[name]:.2f} %" for name in ("teacher", "plain", "distilled"))
        difference = f"{100 * interval['value']:+.2f} [{100 * interval['low']:+.2f}, {100 * interval['high']:+.2f}]"
        lines.append(f"| {result['labelled']} ({100 * result['share']:g} %) | {means} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--student", default="vit_digits")
    parser.add_argument("--teacher", default="edgevit_digits")
    parser.add_argument("--distill", default='soft(teacher="edgevit_digits", alpha=0.5, temperature=2.0)')
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--steps", type=int, default=760, help="optimiser steps of every run")
    parser.add_argument("--share", type=float, action="append", help="labelled share of the training split; may be repeated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("an interval needs at least two seeds")
    data = registry.create("data", arguments.data)
    if missing := data.probe():
        parser.error(missing)
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        results = [of_share(arguments, share, data, Path(folder)) for share in arguments.share or (1.0, 0.1)]
    print(f"\n{table(results)}\n\n{time.monotonic() - began:.0f} s, distillation {distil.canonical(arguments.distill)}")
    if arguments.json:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"asked": asked, "torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
