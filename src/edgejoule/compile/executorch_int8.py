"""int8 for XNNPACK: products whose activations are scaled at every inference, each with a quantisation of its input that it can read.

XNNPACK has dynamic int8 for linear layers and for convolutions of images but depthwise ones (ConvolutionConfig.check_constraints of
ExecuTorch's partitioner), which stay in float. A tensor quantised once for a 1x1 convolution and a larger one gave wrong numbers in
ExecuTorch 1.4, without an error, seen with two layers: each has its own here. Calibrates nothing, lowers nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from edgejoule.compile.constants import compute_constants
from edgejoule.compile.executorch_layouts import dynamic_chain
from edgejoule.compile.pt2e_search import choose, float_weights
from edgejoule.compile.quantize.options import Chosen
from edgejoule.seams import Held

aten = torch.ops.aten
CONVOLUTION, LINEAR = aten.conv2d.default, aten.linear.default


def quantized(program: Any, held: Held, max_drop_pct: float) -> tuple[Any, Chosen]:
    """int8 weights per channel, symmetric; activations of linear and convolution scaled anew at every inference, by row and by image.
    With it, what was chosen: products that would cost more than ``max_drop_pct`` on the held-out images stay in float.

    Nothing is calibrated, so nothing can be calibrated on the wrong images, and results stay float32: residual adds, LayerNorm, softmax,
    GELU and the attention's own products see no int8. Static ranges would store every result as int8 too, which XNNPACK asks for.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer()
    for product in (LINEAR, CONVOLUTION):
        quantizer.set_operator_type(product, config)
    images, module = program.example_inputs[0], compute_constants(program.module())
    _fuse_conv_bn_(module)  # as prepare_pt2e does, which is too late for the ReLU behind
    prepared = prepare_pt2e(spell_relu(module, aten.relu.default, aten.clamp.default), quantizer)
    prepared(*images)  # the observers of weights look when the network runs, whatever the images
    weights = float_weights(prepared)
    converted, chosen = choose(convert_pt2e(prepared), weights, held, len(images[0]), max_drop_pct, "xnnpack")
    converted = quantize_apart(spell_relu(converted, aten.clamp.default, aten.relu.default))
    return torch.export.export(converted, images, strict=False), chosen


def spell_relu(module: Any, found: Any, wanted: Any) -> Any:
    """max(x, 0) behind convolutions as another operator: the quantiser takes no convolution that it sees a ReLU behind. In place."""
    for node in module.graph.nodes:
        if node.target == aten.relu_.default and node.args[0].target == CONVOLUTION and len(node.args[0].users) == 1:
            node.target = aten.relu.default  # nobody else reads what it writes into
        plain = node.target == aten.relu.default or (node.target == aten.clamp.default and node.args[1:] == (0,) and not node.kwargs)
        if node.target == found and plain and node.args[0].target == CONVOLUTION:
            node.target, node.args = wanted, (node.args[0], 0) if wanted == aten.clamp.default else node.args[:1]
    module.recompile()
    return module


def quantize_apart(module: Any) -> Any:
    """Gives every convolution a quantisation of its input that nothing else reads. Linear layers may share one. In place."""
    for node in list(module.graph.nodes):
        chain = dynamic_chain(node.args[0]) if node.target == CONVOLUTION else None
        if chain is None or all(set(link.users) <= {node, *chain} for link in chain):
            continue
        copies: dict[Any, Any] = {}
        with module.graph.inserting_before(node):
            for link in chain:  # from the choice of a scale to the dequantised tensor
                copies[link] = module.graph.node_copy(link, lambda source, copies=copies: copies.get(source, source))
        node.replace_input_with(chain[-1], copies[chain[-1]])
    module.recompile()
    return module
