"""Small networks with live weights, and a backend of numpy alone, for the tests of compiling. Knows no test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgejoule import data, manifest, registry
from edgejoule.errors import ArtifactError
from edgejoule.records import Artifact, ModelSpec, Outputs, Preprocessing, SessionInfo, Variant, floats
from tests.samples import artifact


def live(name: str) -> Any:
    """A timm network whose random weights give logits of order 1 and whose every branch takes part."""
    import torch

    from edgejoule.torchvision import ensure

    ensure()
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False).eval()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.8, 1.2)
    with torch.no_grad():
        head = module.get_classifier()
        scale = module(torch.randn(2, 3, 160, 160)).std()
        head.weight /= scale
        head.bias.normal_()
    return module


def linear(classes: int = 5) -> Any:
    """(B, 3, 8, 8) -> (B, classes)."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes)).eval()


def variant(name: str = "linear", size: int = 8, **changes: Any) -> Variant:
    spec = ModelSpec(name, "test", "custom(target='tests.networks:linear')", Preprocessing((3, size, size), (0.5,) * 3, (0.25,) * 3))
    return dataclasses.replace(Variant(spec, "random", "random-seed0-v1"), **changes)


def loaded_here(change: Callable[[Outputs], Outputs] = lambda answer: answer) -> Callable[[Path, Path, int], Outputs]:
    """Stands in for the agent: reads the manifest, loads the artifact in this process and runs it on the images."""

    def outputs(folder: Path, images: Path, threads: int) -> Outputs:
        made = manifest.read(folder)
        session = registry.create("backend", made.backend).load(made, threads)
        crops = data.normalise(data.read_crops(images), made.variant.spec.preprocessing)  # (N, C, H, W)
        ready = np.resize(crops, (-(-len(crops) // made.batch) * made.batch, *crops.shape[1:]))
        parts = [session.infer(ready[i : i + made.batch])["logits"] for i in range(0, len(ready), made.batch)]
        logits = np.concatenate(parts)[: len(crops)]
        answer = Outputs(floats(logits.ravel().tolist()), (logits.shape[0], logits.shape[1]), session.info())
        session.close()
        return change(answer)

    return outputs


def in_folder(folder: Path) -> Artifact:
    """An artifact that lies in a folder: all that a backend's load asks of it."""
    return dataclasses.replace(artifact(), folder=str(folder))


@dataclass(frozen=True)
class Matmul:
    """A backend that keeps a linear network's weights as JSON. ``calls.txt`` in ``log`` gets a line for each compilation."""

    log: str = ""
    precision: str = "fp32"
    device: str = "cpu"

    def probe(self) -> str | None:
        return None

    def toolchain(self) -> Mapping[str, str]:
        return {"numpy": np.__version__}

    def compile(self, export: Any, context: Any) -> Path:
        if self.log:
            with Path(self.log).open("a") as stream:
                stream.write("compiled\n")
        path: Path = context.workdir / "weights.json"
        layer = export.module[1]
        path.write_text(json.dumps([layer.weight.tolist(), layer.bias.tolist()]))
        return path

    def load(self, made: Artifact, threads: int, streams: int = 1) -> MatmulSession:
        try:
            weight, bias = json.loads((Path(made.folder) / "weights.json").read_text())
        except ValueError as error:
            raise ArtifactError("weights.json is damaged: compile again") from error
        return MatmulSession(np.array(weight), np.array(bias), threads)


@dataclass
class MatmulSession:
    weight: Any
    bias: Any
    threads: int

    def infer(self, images: Any) -> Mapping[str, Any]:
        return {"logits": (images.reshape(len(images), -1) @ self.weight.T + self.bias).astype(np.float32)}

    def info(self) -> SessionInfo:
        return SessionInfo("fp32", ("numpy",), "numpy", self.threads)

    def close(self) -> None:
        return None
