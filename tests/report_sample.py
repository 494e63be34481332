"""A realistic study for the report's tests: five models on two runtimes, as a quiet laptop might measure them."""

from __future__ import annotations

import hashlib

from edgejoule.caveats import caveat
from edgejoule.records import Accuracy, Device, Environment, Failure, Interval, Measurement, Screened, Workload

MODELS = {  # name: (top-1 %, params M, MACs G, ms on onnxruntime, mJ on onnxruntime)
    "efficientvit_b1": (79.25, 9.10, 0.53, 14.6, 205.0),
    "levit_conv_192": (79.86, 10.95, 0.66, 10.9, 168.0),
    "tiny_vit_11m": (81.54, 11.00, 2.03, 34.8, 512.0),
    "tiny_vit_11m_dist": (83.23, 11.00, 2.03, 34.9, 515.0),
    "vit_small_patch16_224": (81.40, 22.05, 4.61, 48.2, 770.0),
}
BACKENDS = {"onnxruntime": 1.0, "openvino": 0.82}
PLAIN = {"tiny_vit_11m_dist": "tiny_vit_11m"}


def about(value: float, spread: float = 0.012, n: int = 5) -> Interval:
    return Interval(value, value * (1.0 - spread), value * (1.0 + spread), n)


def measurement(model: str = "levit_conv_192", backend: str = "onnxruntime") -> Measurement:
    top1_pct, params_m, _, latency_ms, energy_mj = MODELS.get(model, (80.0, 5.0, 1.0, 10.0, 150.0))
    factor = BACKENDS.get(backend, 1.0)
    latency_s, energy_j = latency_ms * factor / 1e3, energy_mj * factor / 1e3
    return Measurement(
        variant=model,
        model=model,
        backend=backend,
        precision="fp32",
        weights="pretrained",
        artifact_sha256=hashlib.sha256(f"{model} {backend}".encode()).hexdigest(),
        workload=Workload(),
        protocol="standard",
        device="thinkpad",
        fingerprint="f1",
        meter="rapl",
        grade="C",
        scope="package",
        latency_s=about(latency_s, 0.006),
        p90_s=latency_s * 1.05,
        p99_s=latency_s * 1.19,
        throughput_ips=about(1.0 / latency_s, 0.006),
        power_w=about(energy_j / latency_s, 0.01),
        energy_j=about(energy_j, 0.017),
        net_energy_j=about(energy_j * 0.71, 0.024),
        idle_w=3.9,
        first_inference_s=latency_s * 3.1,
        load_s=0.21,
        peak_memory_bytes=int(180e6 + params_m * 8e6),
        artifact_bytes=int(params_m * 4.02e6),
        inferences_per_wh=3600.0 / energy_j,
        repeats=5,
        inferences=5400,
        accuracy=Accuracy("imagenet-1k", "val", top1_pct / 100.0, "published", "timm"),
        caveats=(caveat("outliers", "31 of 5400 inferences"),) if model == "efficientvit_b1" else (),
    )


def sample_measurements() -> tuple[Measurement, ...]:
    return tuple(measurement(model, backend) for model in MODELS for backend in BACKENDS)


def sample_screened() -> tuple[Screened, ...]:
    scores = {
        "efficientvit_b1": 69.1,
        "levit_conv_192": 67.5,
        "tiny_vit_11m_dist": 63.3,
        "tiny_vit_11m": 63.0,
        "vit_small_patch16_224": 56.3,
    }
    kept = tuple(Screened(name, MODELS[name][0], MODELS[name][1], MODELS[name][2], score, True, "") for name, score in scores.items())
    lost = (
        Screened("deit_tiny_patch16_224", 72.19, 5.72, 1.26, 65.8, False, "top-1 72.19 % is below 79 %"),
        Screened("vit_base_patch16_224", 84.53, 86.6, 17.6, 45.2, False, "86.6 M parameters, allowed are fewer than 23 M"),
    )
    return kept + lost


def sample_environment() -> Environment:
    device = Device("thinkpad", "AMD Ryzen 7 PRO 6850U", "x86_64", 8, 32 * 2**30, "Linux 6.8", "", "balanced", "schedutil")
    return Environment(
        device, 4, "onnxruntime 1.23.0", {"numpy": "2.1.0", "onnxruntime": "1.23.0", "openvino": "2025.3.0"}, "f1", {"load": "0.12"}
    )


def sample_failures() -> tuple[Failure, ...]:
    return (Failure("poolformerv2_s24", "openvino", "compile", "the operator StarReLU is not known to this runtime: use onnxruntime"),)
