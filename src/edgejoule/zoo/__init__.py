"""The models' code, and networks out of catalog rows. ``LEAVES`` lists what can make one: a new leaf is a file and a line here.

Host only: importing this imports torch. A leaf is a frozen dataclass with ``build(num_classes, **options) -> nn.Module``
and ``spec() -> ModelSpec``. Knows no backend, no meter and no study.
"""

from edgejoule.zoo.networks import build, build_meta, identify, spec_of_custom, spec_of_timm

LEAVES = {
    "timm": "edgejoule.zoo.timm:TimmModel",
    "custom": "edgejoule.zoo.custom:CustomModel",
}

__all__ = ["LEAVES", "build", "build_meta", "identify", "spec_of_custom", "spec_of_timm"]
