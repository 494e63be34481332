"""The graph as OpenVINO's processor plugin runs it fastest, rewritten without loss before the runtime sees it.

What a float32 network computes stays the same to rounding; int8 weights and the steps of every quantiser stay what they are. Each
rewriting is a file that says what it costs the runtime otherwise. Knows no quantiser and no device, runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgejoule.compile.openvino_attention import rewrite_attention
from edgejoule.compile.openvino_import import core
from edgejoule.compile.openvino_maps import rewrite_maps
from edgejoule.compile.openvino_moves import rewrite_moves
from edgejoule.compile.openvino_patches import rewrite_patches
from edgejoule.compile.openvino_shapes import keep_axes, rewrite_masks, rewrite_norms

REWRITINGS = {
    "attentions": rewrite_attention,
    "maps of heads": rewrite_maps,
    "masks": rewrite_masks,
    "norms": rewrite_norms,
    "quantisers": rewrite_moves,
    "patch embeddings": rewrite_patches,
}


def read_for_int8(source: Path | bytes) -> Any:
    """An ONNX file as OpenVINO's model, without what the plugin computes wrongly once it is quantised."""
    model = core().read_model(source)
    keep_axes(model)
    return model


def rewrite(model: Any, fold: bool) -> dict[str, int]:
    """In place. Returns how many of what were rewritten; nothing in a graph whose shapes are not all static.

    ``fold``: constants are computed first, as a float file needs; int8 weights would go back to float.
    """
    if any(output.get_partial_shape().is_dynamic for node in model.get_ops() for output in node.outputs()):
        return {}
    if fold:
        fold_constants(model)
    found = {what: work(model) for what, work in REWRITINGS.items()}
    model.validate_nodes_and_infer_types()
    return {what: count for what, count in found.items() if count}


def fold_constants(model: Any) -> Any:
    """In place, and returned: what depends on no image is computed. Exporters reshape and transpose weights."""
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    return model
