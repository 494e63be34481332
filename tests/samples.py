"""Small complete records for tests: one artifact, one trial of it."""

from __future__ import annotations

from edgejoule.caveats import caveat
from edgejoule.records import (
    Artifact,
    ArtifactFile,
    Device,
    Environment,
    ModelSpec,
    Parity,
    Phase,
    Preprocessing,
    Protocol,
    Published,
    SessionInfo,
    TensorInfo,
    Trace,
    Trial,
    Variant,
    Workload,
    floats,
)

PREPROCESSING = Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9)
PROTOCOL = Protocol("quick", 0.5, 5, 3.0, 1.0, 2.0, 5, 3, 3, 0.01, 0.02)


def spec(name: str = "levit_conv_192") -> ModelSpec:
    published = Published(79.86, 10.95, 0.66, "a table")
    return ModelSpec(name, "levit", f'timm(name="{name}")', PREPROCESSING, published=published)


def artifact(name: str = "levit_conv_192", backend: str = "onnxruntime") -> Artifact:
    info = SessionInfo("fp32", ("CPU",), "onnxruntime 1", 2, (TensorInfo("images", (1, 3, 224, 224), "float32"),))
    variant = Variant(spec(name), "random", "random-seed0-v1")
    sha256 = f"sha-{name}-{backend}"
    files = (ArtifactFile("model.onnx", "0" * 64, 44_000_000),)
    return Artifact(sha256, variant, backend, "fp32", 1, files, {"torch": "2"}, info, Parity(8, 1e-6, 1e-6, 1.0, 1.0))


def trial(key: str = "k0", name: str = "levit_conv_192", repeat: int = 0, latency_s: float = 0.010, samples: int = 200) -> Trial:
    device = Device("board", "cpu", "x86_64", 2, 2**34, "Linux")
    window = samples * latency_s
    phases = (Phase("idle_before", 0.0, 1.0), Phase("window", 1.0, 1.0 + window), Phase("idle_after", 1.0 + window, 2.0 + window))
    times = floats([0.0, 1.0, 1.0 + window, 2.0 + window])
    joules = floats([0.0, 2.0, 2.0 + 10.0 * window, 4.0 + 10.0 * window])
    trace = Trace("package-0", "energy_j", times, joules, "rapl", "C", "package", 0.05)
    return Trial(
        key=key,
        artifact_sha256=artifact(name).sha256,
        workload=Workload(),
        protocol=PROTOCOL,
        meter="rapl",
        repeat=repeat,
        environment=Environment(device, 2, "onnxruntime 1", {"numpy": "2"}, "fp", {"load": "0.1"}),
        started_at=1.7e9 + repeat,
        phases=phases,
        latencies_s=floats([latency_s] * samples),
        load_s=0.2,
        first_inference_s=0.05,
        peak_memory_bytes=10**8,
        traces=(trace,),
        caveats=(caveat("outliers", "2 of 200"),),
    )
