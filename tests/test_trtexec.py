"""trtexec's line is one that its versions take, and what it prints and writes is read in seconds, or refused with its own words.

tests/data/trtexec_10.txt follows the format of NVIDIA/TensorRT's sampleReporting.cpp, with numbers of our own.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejoule.compile.trtexec import argv_of, parse_log, placement_of, read_times
from edgejoule.errors import BackendError

LOG = (Path(__file__).parent / "data" / "trtexec_10.txt").read_text()
OLD = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=m.engine
[06/26/2023-11:30:51] [I] === Performance summary ===
[06/26/2023-11:30:51] [I] Throughput: 1.57 qps
[06/26/2023-11:30:51] [I] Latency: min = 634 ms, max = 638.5 ms, mean = 636 ms, median = 636 ms, percentile(99%) = 638.5 ms
[06/26/2023-11:30:51] [I] End-to-End Host Latency: min = 1 ms, max = 1 ms, mean = 1 ms, median = 1 ms, percentile(99%) = 1 ms
[06/26/2023-11:30:51] [I] GPU Compute Time: min = 634 ms, max = 638 ms, mean = 635 ms, median = 635.5 ms, percentile(99%) = 638 ms
&&&& PASSED TensorRT.trtexec [TensorRT v8601] # trtexec --loadEngine=m.engine
"""
FAILED = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v101303] # trtexec --onnx=model.onnx
[11/02/2026-09:14:03] [E] [TRT] ModelImporter.cpp:948: ERROR: no importer for NonMaxSomething
[11/02/2026-09:14:03] [E] Engine set up failed
&&&& FAILED TensorRT.trtexec [TensorRT v101303] # trtexec --onnx=model.onnx
"""
TIMES = """[
  { "startEnqMs" : 2.6, "endEnqMs" : 2.7, "startH2dMs" : 2.5, "endH2dMs" : 2.6, "startComputeMs" : 2.6, "endComputeMs" : 3.5,
   "startD2hMs" : 3.5, "endD2hMs" : 3.6, "h2dMs" : 0.1, "computeMs" : 0.9, "d2hMs" : 0.1, "latencyMs" : 1.1 }
, { "startEnqMs" : 4.6, "endEnqMs" : 4.7, "startH2dMs" : 4.5, "endH2dMs" : 4.6, "startComputeMs" : 4.6, "endComputeMs" : 5.6,
   "startD2hMs" : 5.6, "endD2hMs" : 5.7, "h2dMs" : 0.1, "computeMs" : 1.0, "d2hMs" : 0.1, "latencyMs" : 1.2 }
]
"""


def test_a_summary_is_read_in_seconds() -> None:
    report = parse_log(LOG)
    assert report.version == (10, 3, 0) and report.queries == 1998
    assert report.throughput_per_s == 199.559 and report.wall_s == 10.0121 and report.compute_total_s == 9.76367
    assert report.latency is not None and report.compute is not None and report.upload is not None and report.download is not None
    assert report.latency.median_s == pytest.approx(0.00498633) and report.latency.percentiles_s[99.0] == pytest.approx(0.00570898)
    assert sorted(report.latency.percentiles_s) == [50.0, 90.0, 95.0, 99.0]
    assert (
        report.compute.min_s == pytest.approx(0.00478906)
        and report.enqueue is not None
        and report.enqueue.max_s == pytest.approx(0.00240234)
    )
    assert report.latency.mean_s == pytest.approx(report.upload.mean_s + report.compute.mean_s + report.download.mean_s, rel=1e-4)
    assert report.warnings == ("GPU compute time is unstable, with coefficient of variance = 3.14159%.",)


def test_an_older_summary_lacks_what_it_lacks() -> None:
    report = parse_log(OLD)
    assert report.version == (8, 6, 1) and report.upload is None and report.wall_s is None and report.queries is None
    assert report.latency is not None and report.latency.max_s == pytest.approx(0.6385)  # not the end-to-end line's


def test_a_failure_is_told_in_its_own_words() -> None:
    with pytest.raises(BackendError, match=r"trtexec failed \(\[TRT\] ModelImporter.*no importer for NonMaxSomething\)"):
        parse_log(FAILED)
    with pytest.raises(BackendError, match="cut short"):
        parse_log(LOG[: len(LOG) // 2])
    with pytest.raises(BackendError, match="printed nothing"):
        parse_log("")
    with pytest.raises(BackendError, match="no performance summary"):
        parse_log("&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec --skipInference\n")


@pytest.mark.parametrize("number", ["nan", "-3.1", "inf", "", "4,88672", "0x12"])
def test_a_number_that_is_none_is_never_a_time(number: str) -> None:
    with pytest.raises(BackendError, match="no performance summary"):
        parse_log(LOG.replace("mean = 4.88672", f"mean = {number}"))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_spoilt_log_gives_finite_times_or_our_error(data: st.DataObject) -> None:
    text = LOG
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text(max_size=8)) + text[at + data.draw(st.integers(0, 40)) :]
    try:
        report = parse_log(text)
    except BackendError:
        return
    spread = report.compute
    assert spread is not None and all(math.isfinite(s) and s >= 0 for s in (spread.min_s, spread.mean_s, spread.median_s, spread.max_s))


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["Layers", "LayerType", "Inputs", "Weights", "Metadata", "startH2dMs", "latencyMs", "computeMs"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(value: object) -> None:
    for reader in (read_times, placement_of):
        try:
            reader(json.dumps(value))
        except BackendError as error:
            assert "\n" not in str(error)


def test_times_of_every_query() -> None:
    times = read_times(TIMES)
    assert list(times.latency_s) == pytest.approx([0.0011, 0.0012]) and list(times.compute_s) == pytest.approx([0.0009, 0.001])
    assert list(times.start_s) == pytest.approx([0.0025, 0.0045])
    for spoilt in ("", "[]", "{}", TIMES[:200], TIMES.replace("1.1", "-1.1"), TIMES.replace("latencyMs", "latency"), "[1]"):
        with pytest.raises(BackendError):
            read_times(spoilt)


def test_the_line_is_strongly_typed_and_times_what_a_session_times() -> None:
    argv = argv_of("model.onnx", "model.engine", major=10, times="times.json", layers="layers.json", seconds=2.5)
    assert argv[0].endswith("trtexec") and {"--onnx=model.onnx", "--stronglyTyped", "--noTF32", "--exportTimes=times.json"} <= set(argv)
    assert "--duration=2.5" in argv and "--percentile=50,90,95,99" in argv and "--includeDataTransfers" not in argv
    assert not any(word in " ".join(argv) for word in ("--fp16", "--int8", "--best"))  # types are the file's: a hint would be refused
    assert {"--includeDataTransfers", "--noSpinWait"} <= set(argv_of("model.onnx", "model.engine", major=11))
    with pytest.raises(BackendError, match="JetPack"):
        argv_of("model.onnx", "model.engine", major=8)


def layer(kind: str, dtype: str, metadata: str = "", **more: object) -> dict[str, object]:
    inputs = [{"Name": "x", "Dimensions": [1, 4], "Format/Datatype": dtype}]
    return {"Name": kind, "LayerType": kind, "Inputs": inputs, "Outputs": inputs, "Metadata": metadata, **more}


def test_precisions_are_those_of_the_layers_that_products_became() -> None:
    layers = [
        layer("Reformat", "Row major linear FP32"),
        layer("CaskConvolution", "Row major Int8 format", "[ONNX Layer: patches]", Weights={"Type": "Int8", "Count": 99}),
        layer("kgen", "Float", "[ONNX Layer: norm]\x1f[ONNX Layer: fc1]"),
        layer("gemm", "Int8", "[ONNX Layer: fc1]\x1f[ONNX Layer: gelu]"),
        layer("gemm", "Half", "[ONNX Layer: q]\x1f[ONNX Layer: k]"),
        layer("kgen", "Half", "[ONNX Layer: attention]"),
        layer("NoOp", "Half"),
    ]
    found = placement_of(json.dumps({"Layers": layers, "Bindings": []}), {"patches", "fc1", "q", "k"})
    assert found.nodes == found.delegated == 6 and found.precisions == {"int8": 2, "fp16": 2}
    assert placement_of(json.dumps({"Layers": layers})).precisions == {"int8": 1}  # only the layer that states its weights
    with pytest.raises(BackendError, match="detailed"):
        placement_of(json.dumps({"Layers": ["gemm", "kgen"]}))  # as without detailed verbosity
