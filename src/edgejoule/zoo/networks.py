"""From a catalog row to a network: ``identify`` chooses its weights, ``build`` makes it, ``build_meta`` makes it without memory.

Knows the leaves through the registry, and the order in which weights are looked for. Knows no backend and no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from edgejoule import data, registry
from edgejoule.errors import EdgejouleError, ModelError
from edgejoule.plain import digest
from edgejoule.records import ModelSpec, Variant
from edgejoule.zoo import live
from edgejoule.zoo import weights as _weights
from edgejoule.zoo.backbone import Backbone
from edgejoule.zoo.custom import CustomModel
from edgejoule.zoo.optimized import OptimizedModel
from edgejoule.zoo.timm import TimmModel

STATE = "state:"  # marks the identity of weights that came with a user's own code


def spec_of_timm(name: str) -> ModelSpec:
    """The row of any timm name: timm's preprocessing, no published numbers. Raises UnknownNameError."""
    return TimmModel(name).spec()


def spec_of_custom(target: str) -> ModelSpec:
    """The row of a user's ``module:function``; runs the user's code. Raises SpecError, ModelError."""
    return CustomModel(target).spec()


def identify(spec: ModelSpec, seed: int = 0, weights: str = "auto") -> Variant:
    """Decide a network's weights without building it (a user's own code alone is built, to hash what it carries).

    ``weights``: ``auto`` is the hub's or its cache's file, else live random weights; ``pretrained`` insists on the file;
    ``random``; or the path of a safetensors or .pth file. Raises ModelError where they cannot be had, SpecError for the builder.
    """
    leaf = registry.create("model", spec.builder)
    if weights == "random":
        return Variant(spec, "random", live.identity(seed), seed=seed)
    if weights not in ("auto", "pretrained"):
        return Variant(spec, "file", _weights.remember(weights), seed=seed)
    if isinstance(leaf, OptimizedModel):
        return Variant(spec, "file", leaf.identity(), seed=seed)
    if not isinstance(leaf, (TimmModel, Backbone)):
        with seeded(seed):
            module = _made(leaf, spec)
        return Variant(spec, "file", STATE + _weights.state_sha256(module), seed=seed)
    found = _weights.find_pretrained(leaf.config())
    if found is not None:
        return Variant(spec, "pretrained", found.sha256, seed=seed)
    if weights == "pretrained":
        raise ModelError(f"no pretrained weights of {spec.name} in the hub's cache, and the hub does not offer them: go online once")
    return Variant(spec, "random", live.identity(seed), seed=seed)


def build(variant: Variant) -> torch.nn.Module:
    """The network in eval mode, float32, on the CPU, with the weights that ``identify`` chose.

    Raises ModelError where they are gone or do not fit, SpecError for a builder that names nothing.
    """
    spec = variant.spec
    leaf = registry.create("model", spec.builder)
    module: torch.nn.Module
    with seeded(_own_seed(variant)):
        if variant.weights == "random":
            module = _made(leaf, spec)
            crops = data.crops(live.PHOTOS, spec.preprocessing)
            images = torch.from_numpy(data.normalise(crops, spec.preprocessing))  # (N, C, H, W)
            module = module.float().cpu()
            live.enliven(module, images, _own_seed(variant))
        elif isinstance(leaf, OptimizedModel):
            if leaf.identity() != variant.weights_id:
                raise ModelError(f"{leaf.path} holds another network than before: compile it again")
            module = leaf.build()
        elif variant.weights_id.startswith(STATE):
            module = _made(leaf, spec)
            if STATE + _weights.state_sha256(module) != variant.weights_id:
                raise ModelError(f"{spec.name} came with other weights than before: identify it again, or make its function repeatable")
        else:
            module = _load(leaf, spec, _file(variant, leaf))
    return module.float().cpu().eval()


def for_training(spec: ModelSpec, seed: int = 0, weights: str = "auto", drop_path: float | None = None) -> tuple[torch.nn.Module, str, str]:
    """The network to begin training with, float32, on the CPU; ``random``, ``pretrained`` or ``file``; and the identity of its weights.

    ``weights`` as in ``identify``. Random means fresh from the constructor: zero gammas and small heads are part of how a network learns,
    and ``build``'s live weights are for measuring only. A head for other classes than the file's is fresh. ``drop_path`` None leaves the
    network's own rate. Raises ModelError where weights cannot be had or the network takes no drop path, SpecError for the builder.
    """
    leaf = registry.create("model", spec.builder)
    options = {} if drop_path is None else {"drop_path_rate": drop_path}
    with seeded(seed):
        if weights not in ("auto", "pretrained", "random"):
            sha256 = _weights.remember(weights)
            return _load(leaf, spec, Path(weights).expanduser(), True, **options).float().cpu(), "file", sha256
        found = _weights.find_pretrained(leaf.config()) if weights != "random" and isinstance(leaf, (TimmModel, Backbone)) else None
        if found is not None:
            return _load(leaf, spec, _weights.fetch(found), True, **options).float().cpu(), "pretrained", found.sha256
        if weights == "pretrained":
            raise ModelError(f"no pretrained weights of {spec.name} in the hub's cache, and the hub does not offer them: go online once")
        module = _made_with(leaf, spec, drop_path)
        if isinstance(leaf, (TimmModel, Backbone)):
            return module, "random", f"fresh(seed={seed})"
    with seeded(seed + 1):
        other = _made_with(leaf, spec, drop_path)
    begun = _weights.state_sha256(module)  # a user's own code may bring weights, and may change: its layers are part of what it is
    kind = "file" if begun == _weights.state_sha256(other) else "random"
    return module, kind, STATE + digest([begun, repr(module)])


def _made_with(leaf: Any, spec: ModelSpec, drop_path: float | None) -> torch.nn.Module:
    """The module of a leaf with a rate of drop path, float32, on the CPU. Raises ModelError, also where it takes none."""
    if drop_path is None:
        return _made(leaf, spec).float().cpu()
    try:
        return _made(leaf, spec, drop_path_rate=drop_path).float().cpu()
    except ModelError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ModelError(f"{spec.name} takes no drop path, and the recipe has {drop_path:g}: give it drop_path=None") from error


def dense_for_training(
    spec: ModelSpec, head: str, seed: int = 0, weights: str = "auto", drop_path: float | None = None
) -> tuple[torch.nn.Module, str, str]:
    """A head for detection or segmentation (``dense.HEADS``) of ``spec.num_classes`` on the maps of the spec's network.

    Returns what ``for_training`` does. Weights are the backbone's; the head is fresh. Raises ModelError for a network that is
    not timm's or has no maps, UnknownNameError for the head, and what ``for_training`` raises.
    """
    from edgejoule.zoo.backbone import feature_maps
    from edgejoule.zoo.dense import build_head

    leaf = registry.create("model", spec.builder)
    if not isinstance(leaf, (TimmModel, Backbone)):
        raise ModelError(f"{spec.name} cannot be a backbone: expected a network of timm or of the catalog")
    options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    kind, identity = "random", f"fresh(seed={seed})"
    if weights not in ("auto", "pretrained", "random"):
        kind, identity, file = "file", _weights.remember(weights), Path(weights).expanduser()
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}
    elif weights != "random" and (found := _weights.find_pretrained(leaf.config())) is not None:
        kind, identity = "pretrained", found.sha256
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(_weights.fetch(found)), "custom_load": False}}
    elif weights == "pretrained":
        raise ModelError(f"no pretrained weights of {spec.name} in the hub's cache, and the hub does not offer them: go online once")
    with seeded(seed):
        return build_head(head, feature_maps(leaf.name, **options), spec.num_classes), kind, identity


def _own_seed(variant: Variant) -> int:
    """Of one seed, another for each builder: twins that differ only in their training (distilled, plain) stay two networks."""
    return int(digest([registry.canonical(variant.spec.builder), variant.seed])[:8], 16) if variant.weights == "random" else variant.seed


def build_meta(spec: ModelSpec) -> torch.nn.Module:
    """The network without weights, on the meta device, for counting; a builder that needs real tensors gets them.

    Raises ModelError and SpecError as ``build`` does.
    """
    leaf = registry.create("model", spec.builder)
    try:
        with torch.device("meta"):
            module = _made(leaf, spec)
    except ModelError:
        module = _made(leaf, spec)
    return module.eval()


def _made(leaf: Any, spec: ModelSpec, **options: Any) -> torch.nn.Module:
    """The module of a leaf; what a third party's leaf raises becomes a ModelError, so that other models go on."""
    try:
        module: torch.nn.Module = leaf.build(num_classes=spec.num_classes, **options)
    except EdgejouleError:
        raise
    except Exception as error:
        raise ModelError(f"{spec.builder} raised {type(error).__name__}: {' '.join(str(error).split())}; mend its build()") from error
    return module


def _file(variant: Variant, leaf: Any) -> Path:
    """The weights file of a variant. A file that the user named is known only in the process that identified it."""
    if variant.weights == "file":
        path = _weights.recall(variant.weights_id)
        if path is None:
            raise ModelError(f"the weights file of {variant.label} is not known any more: name its path again")
        return path
    found = _weights.find_pretrained(leaf.config())
    if found is None or found.sha256 != variant.weights_id:
        raise ModelError(f"the pretrained weights {variant.weights_id[:12]}… of {variant.label} are gone: run again to choose anew")
    return _weights.fetch(found)


def _load(leaf: Any, spec: ModelSpec, path: Path, fresh_head: bool = False, **options: Any) -> torch.nn.Module:
    """A network with a file's weights; timm's own code renames, converts and checks them where the network is timm's.

    A head for other classes than the spec's is refused, or left out for a fresh one where ``fresh_head``.
    """
    state = _weights.read_state(path)  # before timm does, so that a bad file is told from a bad fit
    if isinstance(leaf, (TimmModel, Backbone)):
        overlay: dict[str, Any] = {"file": str(path), "custom_load": False}
        classes = leaf.config().get("num_classes")
        there = _classes_of(leaf, state) if isinstance(leaf, TimmModel) else None
        if there is not None and there != classes and (fresh_head or there == spec.num_classes):
            overlay["num_classes"] = there  # a fine-tuned file: its head is kept where it fits; else it is left out, or refused
        return leaf.build(spec.num_classes, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    module = _made(leaf, spec, **options)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path.name} does not fit {spec.name}: {' '.join(str(error).split())[:300]}") from error
    return module


def _classes_of(leaf: TimmModel, state: dict[str, torch.Tensor]) -> int | None:
    names = leaf.config().get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        if (bias := state.get(f"{name}.bias")) is not None:
            return int(bias.shape[0])
    return None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Constructors draw from torch's global generator: give them the seed, and put the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
