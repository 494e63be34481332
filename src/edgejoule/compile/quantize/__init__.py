"""Quantising ONNX files so that Vision Transformers survive it: linear and convolution in int8, all else in float.

Reading order: ``options`` (what may be asked, what was chosen), ``choose`` (the order of events), ``graph`` (what there is to
quantise), ``observe`` and ``ranges`` (what values flow there, and which of them int8 shall cover), ``smoothing`` (float edits that make
them easier to cover), ``qdq`` (the file), ``score`` and ``search`` (which choice loses least, and what goes back to float). ``held`` and
``budget`` (with ``score`` and ``search``) are there for other runtimes' quantisers too.
Runs on a host: needs onnx and onnxruntime, which are imported inside functions. Knows no backend and no torch.
"""

from edgejoule.compile.quantize.choose import quantize_onnx
from edgejoule.compile.quantize.options import Chosen, Options

__all__ = ["Chosen", "Options", "quantize_onnx"]
