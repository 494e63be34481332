"""Turning a network into files that a runtime runs. ``LEAVES`` lists the backends: a new one is a file and a line here."""

LEAVES = {
    "coreml": "edgejoule.compile.coreml:CoreMl",
    "eager": "edgejoule.compile.eager:Eager",
    "executorch": "edgejoule.compile.executorch:ExecuTorch",
    "inductor": "edgejoule.compile.inductor:Inductor",
    "litert": "edgejoule.compile.litert:LiteRt",
    "mnn": "edgejoule.compile.mnn:Mnn",
    "ncnn": "edgejoule.compile.ncnn:Ncnn",
    "onnxruntime": "edgejoule.compile.onnxruntime:OnnxRuntime",
    "openvino": "edgejoule.compile.openvino:OpenVino",
    "tensorrt": "edgejoule.compile.tensorrt:TensorRt",
    "torchscript": "edgejoule.compile.torchscript:TorchScript",
}
