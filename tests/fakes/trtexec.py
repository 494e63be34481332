#!/usr/bin/env python3
"""A trtexec for machines that have none: its options, logs and files as NVIDIA/TensorRT samples/common has them; onnxruntime computes.

Queries take TRTEXEC_MS of real time each (5 by default), so that what it prints and writes agrees with any clock. TRTEXEC_VERSION is
what it says it is (100300), TRTEXEC_TYPE the precision of its layers (Half), TRTEXEC_FAULT what goes wrong. Each run adds its line to
TRTEXEC_CALLS. Knows no test.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAULT, VERSION = os.environ.get("TRTEXEC_FAULT", ""), os.environ.get("TRTEXEC_VERSION", "100300")
GAP_MS, UPLOAD_MS, DOWNLOAD_MS = 0.04, 0.1, 0.02
LINE = f"TensorRT.trtexec [TensorRT v{VERSION}] [b30] # {' '.join(sys.argv)}"
FLAGS = {"stronglyTyped", "noTF32", "exposeDMA", "skipInference", "includeDataTransfers", "noSpinWait", "noCudaGraph", "help"}
VALUES = {"onnx", "saveEngine", "loadEngine", "profilingVerbosity", "warmUp", "duration", "iterations", "percentile", "exportTimes"}
VALUES |= {"exportLayerInfo", "exportOutput", "loadInputs", "memPoolSize"}
NEWER = {"includeDataTransfers", "noSpinWait", "noCudaGraph"}  # TensorRT 11's


def say(words: str, level: str = "I") -> None:
    print(f"[11/02/2026-09:14:03] [{level}] {words}", file=sys.stdout if level in "IV" else sys.stderr, flush=True)


def end(how: str) -> None:
    print(f"&&&& {how} {LINE}", flush=True)
    sys.exit(how != "PASSED")


def fail(*words: str) -> None:
    for one in words:
        say(one, "E")
    end("FAILED")


def main() -> None:
    if FAULT == "garbage":
        print("Segmentation fault? \x00 &&&& no")
        return
    print(f"&&&& RUNNING {LINE}", flush=True)
    options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    known = (FLAGS | VALUES) - (NEWER if int(VERSION) < 110000 else set())
    if strange := [name for name in options if name not in known]:
        fail(*(f"Unknown option: --{name} {options[name]}" for name in strange))
    if "help" in options:
        print("=== Model Options ===\n  --onnx=<file>  ONNX model")
        return
    if calls := os.environ.get("TRTEXEC_CALLS"):
        with Path(calls).open("a") as stream:
            stream.write(" ".join(sys.argv[1:]) + "\n")
    say("Selected Device: Orin")
    plan = build(options) if "onnx" in options else Path(options["loadEngine"]).read_bytes()
    if not plan.startswith(b"plan"):
        fail("[TRT] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (assertion failed.)", "Engine deserialization failed")
    if "skipInference" in options:
        say("Skipped inference phase since --skipInference is added.")
        end("PASSED")
    infer(plan, options)
    end("PASSED")


def build(options: dict[str, str]) -> bytes:
    import onnx

    content = Path(options["onnx"]).read_bytes()
    if content.startswith(b"not"):
        fail("[TRT] ModelImporter.cpp:948: no protobuf", "Failed to parse onnx file", "Engine set up failed")
    if FAULT == "build":
        fail("[TRT] Error Code 10: Internal Error (Could not find any implementation for node fc1)", "Engine set up failed")
    if FAULT == "killed building":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT != "no engine":
        Path(options["saveEngine"]).write_bytes(b"plan" + content)
    kind = os.environ.get("TRTEXEC_TYPE", "Half")
    nodes = [node for node in onnx.load_from_string(content).graph.node if node.op_type in ("Conv", "Gemm")]
    layers = [{"LayerType": "gemm", "Inputs": [{"Format/Datatype": kind}], "Metadata": f"[ONNX Layer: {node.name}]"} for node in nodes]
    if "exportLayerInfo" in options:
        Path(options["exportLayerInfo"]).write_text(json.dumps({"Layers": layers, "Bindings": ["images", "logits"]}))
    return b"plan" + content


def infer(plan: bytes, options: dict[str, str]) -> None:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(plan.removeprefix(b"plan"))
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    images = np.random.default_rng(0).normal(size=given.shape).astype("<f4")
    if "loadInputs" in options:
        name, _, file = options["loadInputs"].partition(":")
        content = Path(file).read_bytes()
        if name != given.name or len(content) != images.nbytes:
            fail(f'Cannot find input tensor with name "{name}" in the engine bindings, or {len(content)} bytes do not fit')
        images = np.frombuffer(content, "<f4").reshape(given.shape)
    newer = " and type FP32" if int(VERSION) >= 101500 else ""
    for how, port in (("Input", given), ("Output", made)):
        say(f"{how} binding for {port.name} with dimensions {'x'.join(map(str, port.shape))}{newer} is created.")
    say("Starting inference")
    began = time.perf_counter()
    logits = session.run(None, {given.name: images})[0]
    rows, warmups = queries(options)
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "error":
        fail("[TRT] Error Code 1: Cuda Runtime (an illegal memory access was encountered)", "Error occurred during inference")
    if FAULT != "rushed":
        time.sleep(max(0.0, rows[-1]["endD2hMs"] / 1000 - (time.perf_counter() - began)))
    report(rows[warmups:], warmups, options)
    if "exportOutput" in options:
        values = "nan" if FAULT == "nan" else ", ".join(f"{value:.6g}" for value in logits.ravel())
        dims = "x".join(map(str, logits.shape))
        Path(options["exportOutput"]).write_text(
            f'[\n  {{ "name" : "{made.name}"\n  , "dimensions" : "{dims}"\n  , "values" : [ {values} ]\n  }}\n]\n'
        )


def queries(options: dict[str, str]) -> tuple[list[dict[str, float]], int]:
    """sampleInference.cpp's loop -> every query, and how many of them were the warm-up."""
    compute_ms, warmup_ms = float(os.environ.get("TRTEXEC_MS", "5")), float(options.get("warmUp", 200))
    least, most_ms = int(options.get("iterations", 10)), float(options.get("duration", 3)) * 1000 + warmup_ms
    up, down = (UPLOAD_MS, DOWNLOAD_MS) if int(VERSION) < 110000 or "includeDataTransfers" in options else (0.0, 0.0)
    rows: list[dict[str, float]] = []
    at, skip, i, reached = 0.5, 0, 0, 0.0
    while i < least + skip or reached < most_ms:
        computing = compute_ms * (1 + 0.02 * (i % 5))
        ends = [at, at + up, at + up, at + up + computing, at + up + computing, at + up + computing + down]
        row = dict(zip(("startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs", "endD2hMs"), ends, strict=True))
        row |= {"startEnqMs": at, "endEnqMs": at + 0.3, "h2dMs": up, "computeMs": computing, "d2hMs": down, "latencyMs": ends[5] - at}
        rows.append(row)
        reached = row["startComputeMs"]
        skip += reached < warmup_ms
        overlap = 0.0 if "exposeDMA" in options else computing / 2
        at = ends[5] + GAP_MS - overlap + (20 if FAULT == "pause" and len(rows) % 40 == 39 else 0)
        i += 1
    return rows, sum(row["startComputeMs"] < warmup_ms for row in rows)


def report(rows: list[dict[str, float]], warmups: int, options: dict[str, str]) -> None:
    wall_ms = rows[-1]["endD2hMs"] - rows[0]["startH2dMs"]
    say(f"Warmup completed {warmups} queries over {options.get('warmUp')} ms")
    say(f"Timing trace has {len(rows)} queries over {wall_ms / 1000:.6g} s")
    say("")
    say("=== Performance summary ===")
    say(f"Throughput: {len(rows) / wall_ms * 1000:.6g} qps")
    for label, key in (("Latency", "latencyMs"), ("H2D Latency", "h2dMs"), ("GPU Compute Time", "computeMs"), ("D2H Latency", "d2hMs")):
        found = sorted(row[key] for row in rows)
        mean, middle = sum(found) / len(found), found[len(found) // 2]
        say(f"{label}: min = {found[0]:.6g} ms, max = {found[-1]:.6g} ms, mean = {mean:.6g} ms, median = {middle:.6g} ms")
    say(f"Total Host Walltime: {wall_ms / 1000:.6g} s")
    if "exportTimes" in options and FAULT != "no times":
        body: Any = ["{ " + ", ".join(f'"{key}" : {value:.6g}' for key, value in row.items()) + " }" for row in rows]
        text = "[\n  " + "\n, ".join(body) + "\n]\n"
        Path(options["exportTimes"]).write_text(text[: len(text) // 2] if FAULT == "cut times" else text)


if __name__ == "__main__":
    main()
