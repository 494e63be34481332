"""trtexec, TensorRT's own command: the line that builds and times an ONNX file, and what it prints and writes.

For boards whose Python has no TensorRT, or whose TensorRT's Python is too old for this package: it comes with JetPack as
/usr/src/tensorrt/bin/trtexec. Reads the logs of TensorRT 8 to 11; only 10 and later build strongly typed networks. Formats as in
NVIDIA/TensorRT ``samples/common/sampleReporting.cpp`` and ``sampleOptions.cpp``, v8.0 to v11.1. Pure: starts no process, opens no file.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgejoule.errors import BackendError
from edgejoule.records import Floats, Placement, floats

PROGRAM = "/usr/src/tensorrt/bin/trtexec"  # JetPack's and the Debian packages' place
OLDEST = 10  # the first with --stronglyTyped in the form that is used here
DIGITS = 6  # significant ones of a number that trtexec writes: C++'s default
LONGEST = 200  # characters of trtexec's own words in an error
PERCENTILES = (50.0, 90.0, 95.0, 99.0)
TIMED = {"Latency": "latency", "Enqueue Time": "enqueue", "H2D Latency": "upload", "GPU Compute Time": "compute", "D2H Latency": "download"}
TYPES = (("int8", "int8"), ("bfloat16", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"), ("half", "fp16"), ("fp32", "fp32"), ("float", "fp32"))
MULTIPLYING = ("conv", "gemm", "matrixmultiply", "fullyconnected")  # words of the types of layers that multiply matrices
NEWER = ["--includeDataTransfers", "--noSpinWait", "--noCudaGraph"]  # 11 leaves transfers out, spins and uses a CUDA graph by default
IDLE = ("noop", "constant", "signal", "wait", "shapehostdevicecopy")  # layers that compute nothing

_STAMP = re.compile(r"^(?:\[\d{2}/\d{2}/\d{4}-\d{2}:\d{2}:\d{2}\] )?\[([VIWEF])\] (.*)$")
_END = re.compile(r"^&&&& (PASSED|FAILED) TensorRT\.trtexec")
_VERSION = re.compile(r"\[TensorRT v(\d{4,7})\]")
_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|inf|nan))"
_QUOTED = re.compile(rf"(min|max|mean|median|percentile\(([\d.]+)%\)) =? ?{_NUMBER} ms")
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_COUNT = re.compile(r"^Timing trace has (\d+) queries over")


@dataclass(frozen=True, slots=True)
class Spread:
    """One of trtexec's timings over all its queries. ``percentiles_s`` by percent: {99.0: 0.0042}."""

    min_s: float
    max_s: float
    mean_s: float
    median_s: float
    percentiles_s: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Report:
    """trtexec's performance summary. One query is one batch. ``latency`` is upload + compute + download; None where not printed."""

    version: tuple[int, int, int] | None
    throughput_per_s: float
    latency: Spread | None
    enqueue: Spread | None
    upload: Spread | None
    compute: Spread | None
    download: Spread | None
    wall_s: float | None
    compute_total_s: float | None
    queries: int | None
    warnings: tuple[str, ...]  # its own doubts: unstable GPU time, throughput bound by transfers


@dataclass(frozen=True, slots=True)
class Times:
    """Every query after the warm-up, in order, from ``--exportTimes``: seconds, (N,) each. Starts count from trtexec's own origin."""

    start_s: Floats  # of the upload
    latency_s: Floats
    compute_s: Floats


def argv_of(
    onnx: str,
    engine: str,
    *,
    major: int,
    times: str = "",
    layers: str = "",
    warmup_s: float = 1.0,
    seconds: float = 10.0,
    program: str = PROGRAM,
) -> list[str]:
    """The command that builds ``onnx`` strongly typed, saves the engine and times it for ``seconds`` with transfers, waiting asleep.

    Paths are the board's. ``major`` is its TensorRT's first number: 11 has other defaults than 10. ``times`` and ``layers`` name the
    JSON files for ``read_times`` and ``placement_of``. Raises BackendError for a TensorRT that has no strongly typed networks.
    """
    if major < OLDEST:
        raise BackendError(f"TensorRT {major} builds no strongly typed networks, expected {OLDEST} or later: install JetPack 6.1 or later")
    argv = [program, f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--noTF32", "--profilingVerbosity=detailed"]
    argv += [f"--warmUp={round(warmup_s * 1000)}", f"--duration={seconds:g}", f"--percentile={','.join(f'{p:g}' for p in PERCENTILES)}"]
    argv += NEWER if major >= 11 else []
    if times:
        argv.append(f"--exportTimes={times}")
    if layers:
        argv.append(f"--exportLayerInfo={layers}")
    return argv


def run_argv(engine: str, *, major: int, warmup_s: float, seconds: float, at_least: int, program: str = PROGRAM) -> list[str]:
    """The command that loads ``engine`` and runs at least ``at_least`` queries for ``seconds`` after a warm-up: transfers included, waiting
    asleep, one query after the other (``--exposeDMA``: by default the next one's upload overlaps this one's computing)."""
    argv = [program, f"--loadEngine={engine}", "--exposeDMA", f"--warmUp={round(warmup_s * 1000)}", f"--duration={seconds:g}"]
    argv.append(f"--iterations={at_least}")
    return argv + (NEWER if major >= 11 else [])


# ---------------------------------------------------------------- what it prints


def parse_log(text: str) -> Report:
    """The summary in what trtexec printed. Raises BackendError, with trtexec's first error, where it failed or printed none."""
    said = check_end(text)
    spreads = {field: _spread(said, label) for label, field in TIMED.items()}
    throughput = _first(said, rf"^Throughput: {_NUMBER} qps")
    if throughput is None or spreads["compute"] is None:
        raise BackendError("trtexec printed no performance summary that can be read: expected TensorRT 8.0 to 11, without --skipInference")
    counted = next((found for _, words in said if (found := _COUNT.match(words))), None)
    return Report(
        version=version_in(text),
        throughput_per_s=throughput,
        wall_s=_first(said, rf"^Total Host Walltime: {_NUMBER} s"),
        compute_total_s=_first(said, rf"^Total GPU Compute Time: {_NUMBER} s"),
        queries=int(counted[1]) if counted else None,
        warnings=tuple(words.lstrip("* ") for level, words in said if level == "W" and words.startswith("* ")),
        **spreads,
    )


def _words(line: str) -> tuple[str, str]:
    """(level, words) of a line; the level is empty where there is none."""
    found = _STAMP.match(line.strip())
    return (found[1], found[2].strip()) if found else ("", line.strip())


def check_end(text: str) -> list[tuple[str, str]]:
    """(level, words) of every line of a run that passed. Raises BackendError with trtexec's first error where it did not."""
    said = [_words(line) for line in text.splitlines()]
    ends = [found[1] for _, words in said if (found := _END.match(words))]
    if "FAILED" in ends or not ends:
        first = next((words for level, words in said if level in ("E", "F") and words), "")
        how = "failed" if ends else "was cut short" if text.strip() else "printed nothing"
        raise BackendError(f"trtexec {how}{f' ({first[:LONGEST]})' if first else ''}: run its command on the board to see why")
    return said


def version_in(text: str) -> tuple[int, int, int] | None:
    """What the first line of every run says, None where none does: 8601 is 8.6.1, and 100300 is 10.3.0."""
    found = _VERSION.search(text)
    if found is None:
        return None
    number = int(found[1])
    wide = 10000 if number >= 10000 else 1000
    return number // wide, number % wide // 100, number % 100


def _first(said: Sequence[tuple[str, str]], pattern: str) -> float | None:
    for _, words in said:
        if found := re.match(pattern, words):
            value = float(found[1])
            return value if math.isfinite(value) and value >= 0 else None
    return None


def _spread(said: Sequence[tuple[str, str]], label: str) -> Spread | None:
    line = next((words for _, words in said if words.startswith(f"{label}: min")), "")
    values: dict[str, float] = {}
    percentiles: dict[float, float] = {}
    for name, percent, number in _QUOTED.findall(line):
        seconds = float(number) / 1000
        if not (math.isfinite(seconds) and seconds >= 0):
            return None
        if percent:
            percentiles[float(percent)] = seconds
        else:
            values[name] = seconds
    if values.keys() != {"min", "max", "mean", "median"}:
        return None
    return Spread(values["min"], values["max"], values["mean"], values["median"], percentiles)


# ---------------------------------------------------------------- what it writes


def read_times(text: str) -> Times:
    """The file of ``--exportTimes``. Raises BackendError where it is not one, or holds no query."""
    rows = _json(text, "times")
    try:
        found = [(row["startH2dMs"] / 1000, row["latencyMs"] / 1000, row["computeMs"] / 1000) for row in rows]
        sound = bool(found) and all(math.isfinite(start) and 0 <= compute <= latency < math.inf for start, latency, compute in found)
    except (TypeError, KeyError, OverflowError):
        sound = False
    if not sound:
        raise BackendError(
            "trtexec's file of times holds no queries that can be read: expected startH2dMs, latencyMs and computeMs in each"
        )
    starts, latencies, computes = zip(*found, strict=True)
    return Times(floats(starts), floats(latencies), floats(computes))


def instants_of(times: Times) -> Floats:
    """The first query's start and the end of each (n + 1,), in seconds from trtexec's origin; queries must not overlap.

    Starts are written with six digits, so to 0.1 ms after ten seconds and 1 ms after a hundred; latencies nearly to a microsecond. So the
    gap before a query (the host hears of the end, and enqueues the next) is its own where the rounding cannot explain how it differs from
    the others, and the mean of such where it can: latencies and their sum are right, gaps finer than a digit are evened out.
    Raises BackendError for queries that overlap: their latencies are not the time that each takes.
    """
    digit = 10.0 ** (math.floor(math.log10(max(1e-3, times.start_s[-1]))) - DIGITS + 1)  # of the last start, in seconds
    starts, latencies = times.start_s, times.latency_s
    gaps = [after - start - spent for start, after, spent in zip(starts, starts[1:], latencies, strict=False)]
    usual = statistics.median(gaps) if gaps else 0.0
    if usual < -digit:
        raise BackendError("trtexec's queries overlap, so that none can be timed alone: expected a trtexec that knows --exposeDMA")
    unsure = 1.5 * digit  # one of a gap, half of one of their median
    alike = [gap for gap in gaps if abs(gap - usual) <= unsure]
    mean = statistics.fmean(alike) if alike else 0.0
    steps = [latencies[0], *((mean if abs(gap - usual) <= unsure else gap) + spent for gap, spent in zip(gaps, latencies[1:], strict=True))]
    return floats(itertools.accumulate(steps, initial=starts[0]))


def placement_of(text: str, products: Collection[str] = ()) -> Placement:
    """The engine's layers, from ``--exportLayerInfo`` or from the Python inspector, both in JSON. Raises BackendError.

    ``products`` names the ONNX file's operators with weights: each is looked for in the layers' own account of what they were fused
    from (TensorRT 9 and later), besides the layers that state weights. The precision is that of a layer's first input.
    """
    found = _json(text, "layers")
    layers = found.get("Layers") if isinstance(found, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise BackendError("the engine tells no details of its layers: build it with detailed profiling verbosity")
    running = [layer for layer in layers if str(layer.get("LayerType")).lower() not in IDLE]
    of_name: dict[str, Mapping[str, Any]] = {}
    for layer in running:
        for name in _ORIGIN.findall(str(layer.get("Metadata") or "")):
            if name in products and (name not in of_name or _multiplies(layer)):
                of_name[name] = layer
    told = {id(layer) for layer in of_name.values()}
    own = [layer for layer in running if id(layer) not in told and _states_weights(layer)]
    return Placement(len(running), len(running), precisions=dict(Counter(map(_type_of, [*of_name.values(), *own]))))


def dominant(seen: Placement, written: Mapping[str, str]) -> str:
    """The precision of most products: as the engine says, else as the network that it may not depart from says."""
    counted = {kind: n for kind, n in seen.precisions.items() if kind != "unknown"} or Counter(written.values())
    return max(counted, key=lambda kind: counted[kind], default="unknown")


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BackendError(f"trtexec's file of {what} is no JSON: was it cut short?") from error


def _multiplies(layer: Mapping[str, Any]) -> bool:
    kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}".lower()
    return any(word in kind for word in MULTIPLYING)


def _states_weights(layer: Mapping[str, Any]) -> bool:
    weights = layer.get("Weights") or layer.get("ConvWeights")
    return isinstance(weights, dict) and weights.get("Count", 1) != 0 and _multiplies(layer)


def _type_of(layer: Mapping[str, Any]) -> str:
    inputs = layer.get("Inputs")
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    told = str(first.get("Format/Datatype") or first.get("Datatype") or "").lower()
    return next((short for word, short in TYPES if word in told), "unknown")
