"""int8 by torchao's PT2E for torch's compiler on x86: observers in the exported graph, calibration, and the graph with its scales.

Weights are per-channel and symmetric, activations per-tensor and asymmetric, of linear layers and convolutions only: residual adds,
LayerNorm, softmax, GELU and attention's products stay in float32. Ranges are the quantiser's histograms'. Knows no compiler.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from edgejoule.compile.cpu import sums_exactly
from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError
from edgejoule.seams import CompileContext


def quantized_program(program: Any, context: CompileContext) -> Any:
    """The ExportedProgram with int8 linear layers and convolutions, but for those that cost more than the budget on held-out images.

    Calibrated on ``context.calibration()``, less the held-out third where the context holds out none itself. Raises BackendError.
    """
    import torch

    from edgejoule.compile import pt2e_search
    from edgejoule.compile.constants import compute_constants
    from edgejoule.compile.export import export_program, quiet
    from edgejoule.compile.quantize.held import calibration_and_held

    images, held = calibration_and_held(context)  # (N, C, H, W)
    narrow = not sums_exactly()
    try:
        with quiet(), torch.no_grad():
            pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
            x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=narrow))
            observed = pt2e.prepare_pt2e(apart_from_numbers(compute_constants(program.module(check_guards=False))), quantizer)
            for batch in _batches(images, context.shape[0]):
                observed(torch.from_numpy(batch))
            weights = pt2e_search.float_weights(observed)
            converted = pt2e_search.unquantize_others(pt2e.convert_pt2e(observed))
            converted, chosen = pt2e_search.choose(converted, weights, held, context.shape[0], context.max_drop_pct, "x86 inductor")
    except Exception as error:
        raise BackendError(f"torchao cannot quantise the network ({reason(error)}): use onnxruntime or openvino for int8") from error
    context.note("int8", f"x86 PT2E, linear layers and convolutions, {len(images)} images{', 7-bit activations' if narrow else ''}")
    for what, said in pt2e_search.notes(chosen).items():
        context.note(what, said)
    return export_program(converted, context.shape, "the quantised network")


def apart_from_numbers(module: Any) -> Any:
    """In place: sums with a number no longer say that they were written with ``+``. The quantiser takes what says so behind a convolution
    for a residual sum, and breaks where there is a number, as in ``0 + x``, which is how FastViT begins to add up its branches."""
    import torch

    sums = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
    for node in module.graph.nodes:
        if node.target in sums and not isinstance(node.args[1], torch.fx.Node):
            for name in ("source_fn_stack", "torch_fn"):
                node.meta.pop(name, None)
    return module


def _batches(images: Any, batch: int) -> list[Any]:
    """(N, C, H, W) in parts of (B, C, H, W), the last one filled up by repeating."""
    whole = images[np.arange(-(-len(images) // batch) * batch) % len(images)]
    return [np.ascontiguousarray(whole[i : i + batch]) for i in range(0, len(whole), batch)]
