"""Every registered leaf, ours or a third party's, satisfies its contract; and the contracts can fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import contracts, data, registry, zoo
from edgejoule.compile.export import TorchExport
from edgejoule.measure.meters import open_meter
from edgejoule.measure.recording import open_recording
from edgejoule.optimize import LEAVES as PASSES
from edgejoule.seams import PassContext, TraceHints
from tests import ade20k_sample, coco_sample
from tests.elsewhere import ROOT, interpreter_of, run_tests
from tests.fakes.recordings import FILES, SAID
from tests.labelled_samples import write_cifar10, write_huggingface, write_imagefolder, write_webdataset

SHAPE = (1, 3, 160, 160)
NEEDS_OPTIONS = {"replay": 'replay(path="{trace}")'}


def spellings() -> list[str]:
    """Every backend, in every precision that its ``precision`` field admits."""
    found = []
    for name in registry.names("backend"):
        hints = typing.get_type_hints(type(registry.create("backend", name)))
        found += [f"{name}(precision={precision!r})" for precision in typing.get_args(hints["precision"])] or [name]
    return found


@pytest.fixture(scope="module")
def module() -> Any:
    return zoo.build(zoo.identify(zoo.spec_of_timm("test_vit"), weights="random"))


@pytest.mark.parametrize("spelling", spellings())
def test_every_backend(spelling: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if (python := interpreter_of(spelling)) is not None:  # judged where its runtime is
        run_tests(python, f"{Path(__file__).relative_to(ROOT)}::{request.node.name}")
        return
    module = request.getfixturevalue("module")
    (tmp_path / "export").mkdir()
    (tmp_path / "work").mkdir()
    images = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    export = TorchExport(module, SHAPE, tmp_path / "export")
    contracts.check_backend(spelling, export, SHAPE, images, tmp_path / "work")


@pytest.mark.parametrize("name", registry.names("meter"))
def test_every_meter(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time_s,power_w\n" + "".join(f"{i * 0.05},{2 + i % 3}\n" for i in range(100)))
    contracts.check_meter(NEEDS_OPTIONS.get(name, name).format(trace=trace), open_meter)


@pytest.mark.parametrize("name", registry.names("trace"))
def test_every_trace_format(name: str) -> None:
    contracts.check_trace_format(name, FILES[name], SAID)


@pytest.mark.parametrize("name", registry.names("trace"))
def test_every_trace_file_is_recognised_by_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("\n".join(FILES[name]) + "\n")
    found = open_recording(path, hints=TraceHints(voltage_v=3.3 if name == "ppk2" else None))
    assert found.format == name and any(trace.total for trace in found.traces)


def test_the_contract_of_trace_formats_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule.measure.traces.table import Csv

    monkeypatch.setattr(Csv, "recognises", lambda self, head: True)
    with pytest.raises(contracts.ContractError, match="claims to recognise"):
        contracts.check_trace_format("csv", FILES["csv"], SAID)


def data_of(name: str, folder: Path) -> str:
    """A spelling of a data leaf, with the files that it needs."""
    if name == "digits":
        return name
    writers: dict[str, Callable[[Path], str]] = {
        "cifar10": lambda path: write_cifar10(path, train=150),
        "imagefolder": lambda path: write_imagefolder(path, each=30),
        "huggingface": lambda path: write_huggingface(path, {"train": 90}),
        "webdataset": lambda path: write_webdataset(path, each=45),
        "ade20k": lambda path: str(ade20k_sample.write(path)),
        "coco": coco_of,
    }
    return f"{name}(path={writers[name](folder / name)!r})"


def coco_of(folder: Path) -> str:
    """COCO's layout with the sample as both splits."""
    images, file = coco_sample.write(folder)
    shutil.copytree(images, folder / "train2017")
    shutil.copy(file, file.with_name("instances_train2017.json"))
    return str(folder)


@pytest.mark.parametrize("name", registry.names("data"))
def test_every_data_set(name: str, tmp_path: Path) -> None:
    contracts.check_data(data_of(name, tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "huggingface", "webdataset", "coco", "ade20k"])
def test_every_data_set_that_is_not_there_says_so(name: str, tmp_path: Path) -> None:
    spelling = f"{name}(path={str(tmp_path / 'nowhere')!r})"
    assert registry.create("data", spelling).probe() is not None
    contracts.check_data(spelling)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            {"split": lambda self, name: Broken(self.whole("train" if name == "validation" else name))},
            "validation shares images with another split",
        ),
        ({"split": lambda self, name: Broken(self.whole(name), mode="L")}, "no PIL image in RGB"),
        ({"split": lambda self, name: Broken(self.whole(name), label=10)}, "has the label 10"),
        ({"split": lambda self, name: Broken(self.whole(name), wraps=True)}, "no IndexError"),
        ({"split": lambda self, name: Broken(self.whole(name), key=str(time.perf_counter_ns()))}, "made again"),
        ({"origin": lambda self: str(time.perf_counter_ns())}, "another origin"),
        ({"classes": ("0", "0")}, "different names"),
        ({"probe": lambda self: "It rains."}, "raises nothing"),
        ({"split": lambda self, name: self.whole("train" if name == "nonsense" else name)}, "a name that is none"),
        ({"split": lambda self, name: Broken(self.whole(name), drifts=True)}, "is another image"),
    ],
)
def test_a_data_set_that_breaks_a_promise_is_caught(spoil: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule.datasets.digits import Digits

    monkeypatch.setattr(Digits, "whole", Digits.split, raising=False)
    for attribute, value in spoil.items():
        monkeypatch.setattr(Digits, attribute, value)
    with pytest.raises(contracts.ContractError, match=said):
        contracts.check_data("digits")


class Broken:
    """A split that keeps all promises but one."""

    def __init__(self, whole: Any, **faults: Any) -> None:
        self.whole, self.faults = whole, faults

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.whole[index % len(self.whole) if self.faults.get("wraps") else index]
        if self.faults.get("drifts"):
            image = image.point(lambda value: value ^ os.urandom(1)[0])
        return image.convert(self.faults.get("mode", "RGB")), self.faults.get("label", label)

    def key(self, index: int) -> str:
        return self.faults.get("key", "") + self.whole.key(index)


@pytest.mark.parametrize("name", ["fuse", *(name for name in registry.names("pass") if name not in PASSES)])  # test_passes judges our own
@pytest.mark.parametrize("model", ["test_efficientnet", "test_vit"])
def test_every_pass(name: str, model: str, tmp_path: Path) -> None:
    spec = zoo.spec_of_timm(model)
    network = zoo.build(zoo.identify(spec, weights="random"))
    contracts.check_pass(name, network, spec, pass_context(tmp_path), photos(spec))


def pass_context(workdir: Path) -> PassContext:
    return PassContext(fit=None, teacher=None, data=None, seed=0, workdir=workdir)


def photos(spec: Any) -> Any:
    import torch

    return torch.from_numpy(data.normalise(data.crops("photos(n=2)", spec.preprocessing), spec.preprocessing))


@dataclasses.dataclass(frozen=True)
class Vandal:
    """A pass that works on the module it was given."""

    needs: frozenset[str] = frozenset()

    def __call__(self, module: Any, spec: Any, context: Any) -> tuple[Any, Any]:
        import copy

        twin = copy.deepcopy(module)
        for parameter in module.parameters():
            parameter.data.mul_(0.5)
        return twin, spec


def test_a_pass_that_changes_its_input_is_caught(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"vandal": f"{__name__}:Vandal"})
    spec = zoo.spec_of_timm("test_vit")
    with pytest.raises(contracts.ContractError, match="changed the module"):
        contracts.check_pass("vandal", zoo.build(zoo.identify(spec, weights="random")), spec, pass_context(tmp_path), photos(spec))


@dataclasses.dataclass(frozen=True)
class Shrink:
    """A pass that gives another input size, and a network that cannot be exported where ``sound`` is false."""

    sound: bool = True
    needs: frozenset[str] = frozenset()

    def __call__(self, module: Any, spec: Any, context: Any) -> tuple[Any, Any]:
        import copy

        twin = copy.deepcopy(module)
        if not self.sound:
            twin.register_forward_hook(lambda module, args, out: out if float(out.detach().sum()) < 1e30 else -out)
        smaller = dataclasses.replace(spec.preprocessing, input_size=(3, 128, 128))
        return twin, dataclasses.replace(spec, preprocessing=smaller)


def test_a_pass_that_resizes_is_fine_and_one_that_cannot_be_exported_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.optimize.LEAVES", {"shrink": f"{__name__}:Shrink"})
    spec = zoo.spec_of_timm("test_efficientnet")
    network = zoo.build(zoo.identify(spec, weights="random"))
    contracts.check_pass("shrink", network, spec, pass_context(tmp_path), photos(spec))
    with pytest.raises(contracts.ContractError, match=r"torch\.export refuses"):
        contracts.check_pass("shrink(sound=False)", network, spec, pass_context(tmp_path), photos(spec))


@pytest.mark.parametrize("name", registry.names("transport"))
def test_every_transport(name: str, tmp_path: Path) -> None:
    contracts.check_transport(name, tmp_path)


def test_a_model_of_timm() -> None:
    import timm

    contracts.check_model(lambda classes: timm.create_model("test_vit", num_classes=classes), (3, 160, 160))


@dataclasses.dataclass(frozen=True)
class Liar:
    """A sensor whose joules run backwards."""

    quantity: str = "energy_j"
    period_s: float = 0.01
    averaging_s: float = 0.0
    grade: str = "C"
    scope: str = "nothing"

    def probe(self) -> None:
        return None

    def read(self) -> dict[str, float]:
        import time

        return {"rail": -time.monotonic()}


def test_a_meter_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgejoule.measure.LEAVES", {"liar": f"{__name__}:Liar"})
    with pytest.raises(contracts.ContractError, match="decrease"):
        contracts.check_meter("liar", open_meter)


def test_a_backend_that_computes_something_else_is_caught(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgejoule.compile.eager import EagerSession

    infer = EagerSession.infer
    monkeypatch.setattr(EagerSession, "infer", lambda self, images: {"logits": infer(self, images)["logits"][:, ::-1].copy()})
    images = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    with pytest.raises(contracts.ContractError, match="away from the network's"):
        contracts.check_backend("eager", TorchExport(module, SHAPE, tmp_path / "export"), SHAPE, images, tmp_path)


def test_a_model_that_mixes_its_batch_is_caught() -> None:
    import timm
    import torch

    class Mixing(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.num_features = inner.num_features
            self.reset_classifier = inner.reset_classifier

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner.forward_features(x - x.mean() * x.shape[0])

        def forward_head(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner.forward_head(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward_head(self.forward_features(x))

    torch.manual_seed(0)
    with pytest.raises(contracts.ContractError, match="rest of its batch"):
        contracts.check_model(lambda classes: Mixing(timm.create_model("test_vit", num_classes=classes)), (3, 160, 160))
