"""ExecuTorch's choice of layouts for XNNPACK, which computes maps as (B, H, W, C), corrected where it gives wrong numbers.

Two defects of ExecuTorch 1.4's ChannelsLastTaggedReshapePass are worked around, both seen with one or two layers. It looks for what a
quantised convolution reads by following first arguments up to the program's images, and transposes those: a convolution behind a
transpose or a view failed ("Propagating input shapes failed"), or ran on wrong numbers. And it leaves a softmax behind a convolution in
the convolution's layout, where XNNPACK's last axis is the channels: EfficientFormerV2's talking heads were wrong. Lowers nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def dynamic_chain(dequantized: Any) -> tuple[Any, ...] | None:
    """(choice, scale, zero point, quantised, dequantised), where the scale is chosen at run time; else None."""
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_dynamic_qdq

    if not (is_dequant(dequantized) and is_dynamic_qdq(dequantized)):
        return None
    link = dequantized.args[0]
    scale, zero = link.args[1:3]
    return scale.args[0], scale, zero, link, dequantized


@contextlib.contextmanager
def corrected() -> Iterator[None]:
    """Within it the pass transposes what is quantised, not the program's images, and a softmax reads (B, C, H, W)."""
    from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass as Pass
    from executorch.exir.dialects._ops import ops

    to_nhwc, to_nchw = Pass.input_to_nhwc, Pass.input_to_nchw

    def traced(convert: Any, channels_last: bool) -> Any:
        def convert_input(self: Any, module: Any, source: Any, target: Any) -> None:
            chain = dynamic_chain(source)
            readers = [target] if chain is None else [chain[0], chain[3]]  # the scale is chosen from what is then quantised
            for reader in readers:
                convert(self, module, source if chain is None else reader.args[0], reader)
            for link in chain or ():
                (self.mark_as_nhwc_node if channels_last else self.mark_as_nchw_node)(link)

        return convert_input

    changed: Any = Pass
    sensitive = Pass.memory_sensitive_ops_nchw
    try:
        changed.input_to_nhwc, changed.input_to_nchw = traced(to_nhwc, True), traced(to_nchw, False)
        changed.memory_sensitive_ops_nchw = sensitive | {ops.edge.aten._softmax.default}
        yield
    finally:
        changed.input_to_nhwc, changed.input_to_nchw = to_nhwc, to_nchw
        changed.memory_sensitive_ops_nchw = sensitive
