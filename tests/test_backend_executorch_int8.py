"""ExecuTorch's int8 for XNNPACK: convolutions behind a transpose, of one input, before a ReLU; the runtime's logits are the network's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgejoule import environments
from edgejoule.compile import executorch
from edgejoule.compile.executorch import ExecuTorch
from edgejoule.compile.executorch_int8 import spell_relu
from edgejoule.compile.export import TorchExport
from edgejoule.seams import CompileContext

SHAPE = (2, 3, 16, 16)
ROOT = Path(__file__).parents[1]
ROUNDING = 0.03  # of the logits' norm; a wrong answer was 0.3 and more


class Behind(nn.Module):
    """A convolution that reads tokens: LayerNorm over channels, and a view back to a map. Was: refused, or wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.point, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Any) -> Any:  # (B, 3, 16, 16)
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))  # (B, 16, 8)
        return self.head(self.point(tokens.transpose(1, 2).reshape(-1, 8, 4, 4)).mean((2, 3)))


class Parallel(nn.Module):
    """Two convolutions and a linear layer that read one map. Was: no lowering, and without the linear layer wrong numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.columns, self.head = nn.Linear(16, 16), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        return self.head((self.point(x) + self.wide(x) + self.columns(x)).mean((2, 3)))


class Rectified(nn.Module):
    """A ReLU behind a convolution, and one behind a depthwise one. Was: the first stayed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.head = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.depth(self.stem(x).relu()).relu().mean((2, 3)))


class Normed(nn.Module):
    """Convolution, BatchNorm and ReLU, as most networks have them, and a ReLU that writes in place. Was: both in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.more, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)
        with torch.no_grad():
            for statistic in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
                statistic.uniform_(0.5, 1.5)

    def forward(self, x: Any) -> Any:
        return self.head(self.more(self.norm(self.stem(x)).relu()).relu_().mean((2, 3)))


class Talking(nn.Module):
    """A softmax behind a convolution, as talking heads have it. Was: over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.head((16 * self.more(self.stem(x).softmax(-1))).amax((2, 3)))


NETWORKS = {
    "behind": (Behind, {"int8": 3}),
    "parallel": (Parallel, {"int8": 5}),
    "rectified": (Rectified, {"int8": 2, "fp32": 1}),
    "normed": (Normed, {"int8": 3}),
    "talking": (Talking, {"int8": 3}),
}

RUN = """
import json, sys
from pathlib import Path
import numpy as np
from edgejoule.compile.executorch import ExecuTorch
from tests.networks import in_folder
folder = Path(sys.argv[1])
session = ExecuTorch(precision="int8").load(in_folder(folder), 1)
images = np.load(folder / "images.npy")
print(json.dumps({"logits": session.infer(images)["logits"].tolist(), "precisions": session.audit(images).precisions}))
"""


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_small_convolution_networks_keep_their_logits_in_int8(name: str, tmp_path: Path) -> None:
    if (missing := environments.missing("executorch")) is not None:
        pytest.skip(missing)
    torch.manual_seed(0)
    made, precisions = NETWORKS[name]
    module = made().eval()
    images = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    (tmp_path / "export").mkdir()
    context = CompileContext(SHAPE, tmp_path, lambda: images)
    ExecuTorch(precision="int8").compile(TorchExport(module, SHAPE, tmp_path / "export"), context)
    np.save(tmp_path / "images.npy", images)
    python = environments.python_of("executorch")
    assert python is not None
    done = subprocess.run([python, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        wanted = module(torch.from_numpy(images)).numpy()
    assert told["precisions"] == precisions
    assert 1e-4 < np.linalg.norm(np.float32(told["logits"]) - wanted) / np.linalg.norm(wanted) < ROUNDING
    assert executorch._precision(told["precisions"]) == "int8"


def test_only_a_relu_behind_a_convolution_is_spelt_otherwise_and_back() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x: Any) -> Any:
            return self.stem(x.relu()).relu() + self.stem(x).clamp(0, 1) + self.stem(x).clamp(min=0)

    aten = torch.ops.aten
    images = torch.randn(SHAPE)
    module: Any = torch.export.export(Mixed().eval(), (images,), strict=False).module()
    wanted = module(images)
    spell_relu(module, aten.relu.default, aten.clamp.default)
    assert [node.target for node in module.graph.nodes].count(aten.relu.default) == 1
    assert torch.equal(module(images), wanted)
    spell_relu(module, aten.clamp.default, aten.relu.default)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(aten.relu.default) == 3 and targets.count(aten.clamp.default) == 1
    assert torch.equal(module(images), wanted)
