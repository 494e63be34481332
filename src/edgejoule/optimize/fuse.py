"""Pass: exact fusion. Batch norms and layer scales into their layers, residual convolutions and parallel branches into one kernel.

The fused network gives the same logits with fewer operations, for any architecture: what may be folded is read off its graph, as it
is at one input size (a forward that takes other branches at other sizes is checked at this one only).
Features between layers may be scaled otherwise than before (a norm that went into the classifier no longer normalises them).
Knows no backend; trains nothing.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgejoule import data
from edgejoule.errors import ModelError
from edgejoule.optimize.branches import Merged, distance, merge_branches, merge_residuals, replace
from edgejoule.optimize.copies import copied, forget_caches
from edgejoule.optimize.folding import Affine, affine_of_norm, affine_of_scale, fold_into_following, fold_into_preceding
from edgejoule.optimize.pairs import LAYER_SCALES, Fold, bare_activation, find_folds
from edgejoule.records import ModelSpec
from edgejoule.seams import PassContext

TOLERANCE = 1e-5  # relative distance of the outputs, |fused - plain| / |plain|
SEED = 20
PHOTOS = "photos(n=4, seed=20)"


@dataclass(frozen=True, slots=True)
class Fused:
    """What was done to a network, and how far its outputs moved: rounding only."""

    norms: int  # batch norms folded into layers
    layer_scales: int
    residuals: int  # identities put into kernels
    blocks: int  # blocks of parallel branches that became one layer
    left: tuple[str, ...]  # batch norms that stay, because no fold of them is exact, and blocks whose own rewrite is not
    error: float  # relative distance of the outputs, in the network's own arithmetic; may exceed TOLERANCE where ``exact_error`` does not
    exact_error: float | None  # the same in float64, fused weights too, asked only where ``error`` exceeds TOLERANCE: then it decides


@dataclass(frozen=True)
class Fuse:
    """``fuse``: the same outputs, fewer operations. Needs nothing but the network."""

    exact: ClassVar[bool] = True  # its network answers as its model does

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset()

    def __call__(self, module: nn.Module, spec: ModelSpec, context: PassContext) -> tuple[nn.Module, ModelSpec]:
        """A fused copy in eval mode, compared on photographs, and the spec as it is. Raises ModelError naming the model."""
        images = torch.from_numpy(data.normalise(data.crops(PHOTOS, spec.preprocessing), spec.preprocessing))  # (N, C, H, W)
        return fused_report(module, spec.preprocessing.input_size, spec.name, images)[0], spec


def fuse(module: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A fused copy of a network in eval mode; ``input_size`` is (C, H, W). Raises ModelError, see ``fused_report``."""
    return fused_report(module, input_size)[0]


def fused_report(
    module: nn.Module, input_size: tuple[int, int, int], name: str | None = None, images: Tensor | None = None
) -> tuple[nn.Module, Fused]:
    """A fused copy of a network in eval mode, and what was done; ``name`` is what errors call it.

    Both are compared on ``images`` (N, *input_size), at least two, of the kind that the network's norms know: on others some networks
    blow up rounding errors by five orders (LeViT with random weights on noise). Without ``images``, on random ones that vary as
    photographs do. The network maps images to a tensor, or to tuples, lists or dicts of tensors. It is never changed; fusing a fused
    network changes nothing. Raises ModelError where it is not in float32 or float64, does not run, or cannot be copied or exported,
    and where the outputs would differ by more than ``TOLERANCE``: in its own arithmetic and in float64, for a network may blow up
    its own rounding errors beyond that (``Fused.error`` says how far).
    """
    called = name or type(module).__name__
    twin = copied(module, called)
    images = photo_like(2, input_size) if images is None else images
    images = images.to(next((p for p in twin.parameters() if p.is_floating_point()), images))  # its type and device
    if images.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"{called} is in {str(images.dtype).removeprefix('torch.')}, too coarse to fuse: fuse it in float32, then convert it"
        )
    expected = _outputs(twin, images, called)
    merged, folds = _fuse_in_place(twin, images, called)
    error = distance(_outputs(twin, images, called), expected)
    exact = _exact_distance(module, images, called) if error > TOLERANCE else None
    if (moved := error if exact is None else exact) > TOLERANCE:
        raise ModelError(
            f"fusing {called} would change its outputs by {moved:.1e} of their size, and only {TOLERANCE:g} is rounding: "
            "leave the pass 'fuse' out of its recipe"
        )
    norms = sum(fold.is_norm for fold in folds)
    left = (*merged.left, *(path for path, part in twin.named_modules() if isinstance(part, _BatchNorm)))
    return twin, Fused(norms, len(folds) - norms, len(merged.residuals), len(merged.blocks), left, error, exact)


def _fuse_in_place(twin: nn.Module, images: Tensor, called: str) -> tuple[Merged, tuple[Fold, ...]]:
    """What was merged (all residuals among it) and what was folded."""
    merged = merge_branches(twin, images[:1].clone())
    folds = _folds(twin, images, called)
    for fold in folds:
        _apply(twin, fold)
    merged.residuals += merge_residuals(twin)
    forget_caches(twin)
    return merged, folds


def _exact_distance(plain: nn.Module, images: Tensor, called: str) -> float | None:
    """The distance in float64, the fused weights too: what is left is not rounding. None for networks that do not run in float64."""
    try:
        expected = _outputs(copied(plain, called).double(), images.double(), called)
        twin = copied(plain, called).double()
        _fuse_in_place(twin, images.double(), called)
        return distance(_outputs(twin, images.double(), called), expected)
    except ModelError:  # constants or buffers that insist on float32
        return None


def photo_like(count: int, input_size: tuple[int, int, int]) -> Tensor:
    """Random images (count, C, H, W), standardised, that vary as photographs do: the coarser, the more.

    Octaves of smooth noise, each half as strong as the next coarser one (amplitude falls with frequency: Field 1987). White noise
    would be so far from what norms were trained on that in some networks its rounding errors alone move the outputs by percents.
    """
    channels, height, width = input_size
    generator = torch.Generator().manual_seed(SEED)
    images, side = torch.zeros(count, channels, height, width), 2
    while side <= max(height, width):
        noise = torch.randn(count, channels, min(side, height), min(side, width), generator=generator)
        images += nn.functional.interpolate(noise, (height, width), mode="bilinear", align_corners=False) / side
        side *= 2
    return (images - images.mean()) / images.std()


def _outputs(module: nn.Module, images: Tensor, called: str) -> Any:
    with torch.no_grad():
        try:
            return module(images.clone())  # some networks change their input
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise ModelError(
                f"{called} does not run on images of shape {tuple(images.shape)} ({_line(error)}): check its input size"
            ) from error


def _folds(module: nn.Module, images: Tensor, called: str) -> tuple[Fold, ...]:
    """What the graph allows to fold; networks without norms and layer scales are spared the export."""
    if not any(isinstance(part, _BatchNorm) or type(part).__name__ in LAYER_SCALES for part in module.modules()):
        return ()
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(module, (images,), strict=False)
        except Exception as error:  # the exporter raises whatever its many parts raise
            raise ModelError(
                f"torch.export refuses {called} ({_line(error)}): its forward must not depend on the values of tensors"
            ) from error
    return find_folds(module, program)


def _apply(module: nn.Module, fold: Fold) -> None:
    source = module.get_submodule(fold.source)
    for name in fold.layers:
        layer: Any = module.get_submodule(name)
        (fold_into_preceding if fold.backwards else fold_into_following)(layer, _affine(source))
    rest = bare_activation(source) if fold.is_norm else nn.Identity()
    assert rest is not None
    rest.eval()
    replace(module, source, rest)


def _affine(source: nn.Module) -> Affine:
    if isinstance(source, _BatchNorm):
        return affine_of_norm(source)
    return affine_of_scale(getattr(source, LAYER_SCALES[type(source).__name__]))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A failed export prints its whole graph: keep that off the terminal."""
    before, sink = logging.root.manager.disable, io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
