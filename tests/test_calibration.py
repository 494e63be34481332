"""What quantisation is calibrated on, and that it is never what an artifact is tested on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgejoule import calibration, data, zoo
from edgejoule.catalog import find_model
from edgejoule.errors import DataError, EdgejouleError, SpecError
from edgejoule.study import compile_plan, load_study
from tests.labelled_samples import write_imagefolder

DIGITS = dataclasses.replace(zoo.spec_of_timm("vit_digits"), num_classes=10, dataset="digits")
DEIT = find_model("deit_tiny")


def small(spec: object) -> object:
    return dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, input_size=(3, 32, 32)))  # type: ignore[type-var]


def test_auto_is_the_model_s_own_kind_of_images() -> None:
    assert calibration.resolve(DIGITS, "auto") == "digits"
    assert calibration.resolve(DEIT, "auto") == "photos(n=96, seed=1)"
    assert calibration.resolve(DEIT, "folder( path='x')") == "folder(path='x')"


def test_photographs_are_cut_into_two_parts_that_are_not_the_tested_ones() -> None:
    spec = small(DEIT)
    made = calibration.material(spec, "auto", 1.0)
    calibrated, (held, labels) = made.calibration(), made.held()
    assert len(calibrated) == 64 and len(held) == 32 and labels is None and calibrated.dtype == np.uint8
    tested = data.crops("photos(n=32)", spec.preprocessing)
    every = [one.tobytes() for one in (*calibrated, *held, *tested)]
    assert len(set(every)) == len(every)


def test_a_sorted_folder_is_held_out_evenly_and_compared_only_on_what_is_held_out(tmp_path: Path) -> None:
    from PIL import Image

    for shade in range(30):  # as a folder sorted by class is: all that is alike stands together
        Image.new("RGB", (64, 64), (8 * shade,) * 3).save(tmp_path / f"{shade:02}.png")
    made = calibration.material(small(DEIT), f"folder(path={str(tmp_path)!r})", 1.0)
    shades = [sorted(int(one[0, 0, 0]) // 8 for one in crops) for crops in (made.calibration(), made.held()[0])]
    assert shades[1] == list(range(1, 30, 3)) and sorted(shades[0] + shades[1]) == list(range(30))
    assert made.compared, "the tested images may be those of the same folder"
    assert not calibration.material(small(DEIT), "auto", 1.0).compared


def test_two_images_are_enough_to_calibrate_on_one_and_hold_one() -> None:
    made = calibration.material(small(DEIT), "photos(n=2)", 1.0)
    assert len(made.calibration()) == len(made.held()[0]) == 1


def test_the_first_held_images_are_of_many_classes(tmp_path: Path) -> None:
    spelling = f"imagefolder(path={write_imagefolder(tmp_path, each=60)!r})"
    from edgejoule.training import open_data

    spec = dataclasses.replace(small(DEIT), num_classes=len(open_data(spelling).classes))  # type: ignore[type-var]
    _, labels = calibration.material(spec, spelling, 1.0).held()
    assert labels is not None and set(labels[: len(labels) // 3]) == set(labels), "a set that is sorted by class is not taken as it lies"


def test_labelled_data_calibrates_on_train_and_is_judged_on_validation() -> None:
    from edgejoule.datasets.digits import Digits

    made = calibration.material(DIGITS, "auto", 1.0)
    held, labels = made.held()
    assert len(made.calibration()) == 64 and len(held) == len(labels) and labels.dtype == np.int64 and set(labels) <= set(range(10))
    tests = Digits().split("test")
    tested = {np.asarray(data.crop(tests[n][0], DIGITS.preprocessing)).tobytes() for n in range(len(tests))}
    assert not tested & {np.ascontiguousarray(one.transpose(1, 2, 0)).tobytes() for one in (*made.calibration(), *held)}


def test_identity_changes_with_what_is_seen_and_with_nothing_else() -> None:
    base = calibration.material(DEIT, "auto", 1.0).identity
    assert base == calibration.material(DEIT, "photos(seed=1, n=96)", 2.0).identity
    assert base != calibration.material(DEIT, "photos(n=97, seed=1)", 1.0).identity
    assert base != calibration.material(small(DEIT), "auto", 1.0).identity


@pytest.mark.parametrize(
    ("spelling", "said"),
    [
        ("nothing", "names no images"),
        ("photos(n=1)", "at least 2"),
        ("digits", "10: calibrate on the data"),
        ("coco(path='x')", "cannot be used here"),
    ],
)
def test_what_cannot_be_calibrated_on_says_so(spelling: str, said: str) -> None:
    with pytest.raises((SpecError, DataError), match=said):
        calibration.material(small(DEIT), spelling, 1.0).calibration()


def test_images_that_are_not_there_are_missed_before_any_work() -> None:
    calibration.check("auto")
    calibration.check("digits")
    with pytest.raises(EdgejouleError):
        calibration.check("imagefolder(path='nowhere')")


def test_a_study_calibrates_on_what_it_trains_on(tmp_path: Path) -> None:
    assert compile_plan(load_study("digits")).calibration == "digits"
    assert compile_plan(load_study("quickstart")).calibration == "auto"


def test_a_folder_of_labelled_images_serves(tmp_path: Path) -> None:
    spelling = f"imagefolder(path={write_imagefolder(tmp_path, each=30)!r})"
    from edgejoule.training import open_data

    spec = dataclasses.replace(small(DEIT), num_classes=len(open_data(spelling).classes))  # type: ignore[type-var]
    made = calibration.material(spec, spelling, 1.0)
    assert len(made.calibration()) and len(made.held()[1])


@pytest.mark.parametrize(("tested", "held_instead"), [("photos(n=8)", False), ("photos(n=8, seed=1)", True)])
def test_a_file_is_never_compared_on_what_it_was_calibrated_on(tested: str, held_instead: bool, tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import Any

    from edgejoule.compile.build import _images

    spec = small(DEIT)
    made, (crops, _) = calibration.material(spec, "auto", 1.0), data.write_crops(tested, spec.preprocessing, tmp_path)
    order: Any = SimpleNamespace(material=made, crops=crops, variant=SimpleNamespace(spec=spec))
    compared, _ = _images(order)
    assert not {one.tobytes() for one in compared} & {one.tobytes() for one in made.calibration()}
    assert (len(compared) == len(made.held()[0])) is held_instead
