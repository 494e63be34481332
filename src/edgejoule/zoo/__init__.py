"""The models' code, and networks out of catalog rows. ``LEAVES`` lists what can make one: a new leaf is a file and a line here.

Host only: importing this imports torch, and registers our own architectures with timm, so that ``timm.create_model("edgevit_xxs")``
works. A leaf is a frozen dataclass with ``build(num_classes, **options) -> nn.Module`` and ``spec() -> ModelSpec``.
A new architecture is a file that registers its names with timm, and a name in the import below. Knows no backend, meter or study.
"""

from edgejoule.zoo import digits, edgevit_ablations, edgevit_variants, pvt_v1, t2t_vit, tnt, twins, uniformer
from edgejoule.zoo.edgevit_released import load_released_weights
from edgejoule.zoo.networks import build, build_meta, dense_for_training, for_training, identify, seeded, spec_of_custom, spec_of_timm
from edgejoule.zoo.optimized import OPTIMIZED_FILES, contents, is_optimized, load, read_note, spec_after

ARCHITECTURES = (edgevit_variants, edgevit_ablations, t2t_vit, uniformer, pvt_v1, tnt, twins, digits)
LEAVES = {
    "timm": "edgejoule.zoo.timm:TimmModel",
    "backbone": "edgejoule.zoo.backbone:Backbone",
    "custom": "edgejoule.zoo.custom:CustomModel",
    "optimized": "edgejoule.zoo.optimized:OptimizedModel",
}

__all__ = [
    "ARCHITECTURES",
    "LEAVES",
    "OPTIMIZED_FILES",
    "build",
    "build_meta",
    "contents",
    "dense_for_training",
    "for_training",
    "identify",
    "is_optimized",
    "load",
    "load_released_weights",
    "read_note",
    "seeded",
    "spec_after",
    "spec_of_custom",
    "spec_of_timm",
]
