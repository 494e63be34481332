"""Turning a network into files that a runtime runs. ``LEAVES`` lists the backends: a new one is a file and a line here."""

LEAVES = {
    "eager": "edgejoule.compile.eager:Eager",
    "onnxruntime": "edgejoule.compile.onnxruntime:OnnxRuntime",
    "openvino": "edgejoule.compile.openvino:OpenVino",
    "torchscript": "edgejoule.compile.torchscript:TorchScript",
}
