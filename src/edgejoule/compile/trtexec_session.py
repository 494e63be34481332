"""A session by trtexec alone, for boards whose Python has no TensorRT: one process builds, one computes, one times a whole window.

An inference of ``infer`` is a process of its own, seconds long: right for outputs and the truth gate, useless as a timing. What is timed
is ``window``: one process that runs one batch again and again by itself. Images and logits travel in files (logits with six digits, as
trtexec writes them). Formats as NVIDIA/TensorRT ``samples/common`` and ``samples/trtexec`` print them, v8.6 to v11.1. Knows no meter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgejoule.bench import default_cache
from edgejoule.compile import trtexec
from edgejoule.compile.reasons import reason
from edgejoule.compile.sessions import check_images
from edgejoule.errors import ArtifactError, BackendError
from edgejoule.processes import signal_name
from edgejoule.records import Floats, Placement, SessionInfo, TensorInfo, floats

WARM_UP_S = 1.0  # trtexec's own, before each window: the GPU's clock has risen by then
ANSWERS_S, BUILDS_S, RUNS_S = 60.0, 3500.0, 600.0  # the longest that a run may last, besides the window
EARLY_S, LATE_S = 0.05, 0.5  # how far the last query's end may lie after and before the line that reports it
STARTS, REPORTS = "] [I] Starting inference", "] [I] Warmup completed"  # before and after all queries
PARSING = "Failed to parse onnx file"

Clock = Callable[[], float]

_PORT = re.compile(r"\[I\] (Input|Output) binding for (\S+) with dimensions (\d+(?:x\d+)*)(?: and type \S+)? is created\.")
_GPU = re.compile(r"\[I\] Selected Device: (.+)")


@dataclass(frozen=True, slots=True)
class Trtexec:
    program: str
    version: tuple[int, int, int]  # the TensorRT that it is: (10, 3, 0)


def find_trtexec() -> Trtexec | str:
    """The program on the path or in JetPack's place, if it builds strongly typed networks; else one clause: what to do."""
    program = shutil.which("trtexec") or shutil.which(trtexec.PROGRAM)
    if program is None:
        return f"or install trtexec {trtexec.OLDEST} or later, which runs without Python (on a Jetson: JetPack 6.1's {trtexec.PROGRAM})"
    try:
        said = subprocess.run([program, "--help"], capture_output=True, text=True, errors="replace", timeout=ANSWERS_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nor does {program} run ({reason(error)}): install it again"
    version = trtexec.version_in(said)
    if version is None:
        return f"nor does {program} say which TensorRT it is: install trtexec {trtexec.OLDEST} or later (JetPack 6.1)"
    if version[0] < trtexec.OLDEST:
        return (
            f"{program} is of {_dotted(version)}, with no strongly typed networks: install trtexec {trtexec.OLDEST} or later (JetPack 6.1)"
        )
    return Trtexec(program, version)


class TrtexecSession:
    """``infer`` takes (B, C, H, W) float32 and returns {"logits": (B, K) float32}, by a process of its own; ``window`` times."""

    def __init__(self, found: Trtexec, onnx: Path, products: Mapping[str, str], workspace_mib: int, threads: int) -> None:
        self._trtexec, self._products = found, products
        self._folder = tempfile.TemporaryDirectory(prefix="edgejoule-trtexec-")
        try:
            self._engine, said = self._open(onnx, workspace_mib)
            ports = {kind: TensorInfo(name, tuple(map(int, dims.split("x"))), "float32") for kind, name, dims in _PORT.findall(said)}
            if ports.keys() != {"Input", "Output"}:
                raise BackendError("trtexec names no input and output with their shapes: expected TensorRT 10 or 11")
            self._input, self._output = ports["Input"], ports["Output"]
            gpu = _GPU.search(said)
            self._info = SessionInfo(
                precision=trtexec.dominant(self.audit(None), products),
                providers=(gpu[1].strip() if gpu else "GPU",),
                runtime=f"tensorrt {_dotted(found.version)} (trtexec)",
                threads=threads,
                inputs=(self._input,),
                outputs=(self._output,),
            )
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise BackendError(f"the engine of {onnx} cannot be kept ({reason(error)}): free some disk space") from error
            raise

    def infer(self, images: Any) -> Mapping[str, Any]:
        """Raises BackendError for another shape or dtype than compiled for, and where trtexec fails."""
        import numpy as np

        check_images(images, self._input.shape)
        self._file("logits.json").unlink(missing_ok=True)
        trtexec.check_end(self._run([*self._queries(self._engine), self._write(images), "--exportOutput=logits.json"]))
        try:
            (told,) = (one for one in json.loads(self._file("logits.json").read_text()) if one["name"] == self._output.name)
            return {"logits": np.asarray(told["values"], dtype=np.float32).reshape(self._output.shape)}
        except (OSError, ValueError, KeyError, TypeError) as error:  # a value that is no number is no JSON, either
            raise BackendError(f"trtexec's file of outputs cannot be read ({reason(error)}): are the logits finite?") from error

    def window(self, images: Any, duration_s: float, at_least: int, clock: Clock) -> Floats:
        """Instants (n + 1,) on ``clock``, of queries one after the other: the first one's start and the end of each. The batch is the same.

        trtexec counts from an event of the GPU that it records right after the line "Starting inference" (trtexec.cpp, then runInference
        in sampleInference.cpp); warm-up queries count too, but are not written (sampleReporting.cpp, exportJSONTrace). The line is flushed,
        so its arrival here is that origin. It is late by a pipe's delay, about 0.1 ms on an idle core, and early by the making of streams
        and events, some ms: a window that is early begins in trtexec's own warm-up, at the same power. The line after the last query
        checks it: BackendError where the last end lies over 50 ms after or 500 ms before. For the gaps between queries see ``instants_of``.
        """
        check_images(images, self._input.shape)
        argv = self._queries(self._engine, WARM_UP_S, duration_s, at_least)
        self._file("times.json").unlink(missing_ok=True)
        stamps: dict[str, float] = {}
        trtexec.check_end(self._run([*argv, self._write(images), "--exportTimes=times.json"], RUNS_S + 10 * duration_s, stamps, clock))
        try:
            times = trtexec.read_times(self._file("times.json").read_text())
        except OSError as error:
            raise BackendError("trtexec wrote no times of its queries: is the disk full?") from error
        if stamps.keys() != {STARTS, REPORTS}:
            raise BackendError("trtexec did not say when its inferences began and ended: expected TensorRT 10 or 11")
        instants = floats(stamps[STARTS] + instant for instant in trtexec.instants_of(times))
        if not -EARLY_S <= stamps[REPORTS] - instants[-1] <= LATE_S:
            off = f"{stamps[REPORTS] - instants[-1]:.3f} s"
            raise BackendError(f"trtexec's times and the clock here disagree by {off}: is the board overloaded, or its clock being set?")
        return instants

    def info(self) -> SessionInfo:
        """``precision`` is that of most products with weights, by the engine's layers; the network's where they do not tell."""
        return self._info

    def audit(self, images: Any) -> Placement:
        """The engine's layers, and its products' precisions, as trtexec wrote them. The images do not matter: an engine is fixed."""
        return trtexec.placement_of(self._layers, self._products.keys())

    def close(self) -> None:
        self._folder.cleanup()

    def _open(self, onnx: Path, workspace_mib: int) -> tuple[Path, str]:
        """The engine, from the cache or built and put there, and what trtexec says when it runs it once. Reads its layers, too."""
        content = onnx.read_bytes() if onnx.is_file() else b""
        if not content:
            raise ArtifactError(f"TensorRT cannot read {onnx} (it is missing or empty): compile again")
        facts = f"{hashlib.sha256(content).hexdigest()} trtexec {_dotted(self._trtexec.version)} {_board()} {workspace_mib}"
        kept = default_cache() / "engines" / f"{hashlib.sha256(facts.encode()).hexdigest()}.engine"
        if kept.is_file():
            with contextlib.suppress(BackendError, OSError):  # cut short, or another driver's: built again
                return kept, self._proved(kept)
        said = self._proved(built := self._build(onnx, workspace_mib))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".json", ".engine"):  # the engine last: it is what is looked for
                partial = kept.with_suffix(f"{suffix}.{os.getpid()}")
                shutil.copyfile(built.with_suffix(suffix), partial)
                partial.replace(kept.with_suffix(suffix))
        except OSError:  # a cache that cannot be written costs the next load minutes, nothing else
            return built, said
        built.unlink()
        return kept, said

    def _build(self, onnx: Path, workspace_mib: int) -> Path:
        major, program = self._trtexec.version[0], self._trtexec.program
        argv = trtexec.argv_of(str(onnx.resolve()), "model.engine", major=major, layers="model.json", program=program)
        argv += ["--skipInference", *([f"--memPoolSize=workspace:{workspace_mib}"] if workspace_mib else [])]
        said = self._run(argv, BUILDS_S)
        try:
            trtexec.check_end(said)
        except BackendError as error:
            if PARSING in said:
                raise ArtifactError(f"TensorRT cannot read {onnx}: compile again ({reason(error)})") from error
            raise
        if not ((built := self._file("model.engine")).is_file() and built.with_suffix(".json").is_file()):
            raise BackendError("trtexec built an engine and wrote none: is the disk full?")
        return built

    def _proved(self, engine: Path) -> str:
        """What trtexec says when it runs an engine once. Raises BackendError where it does not run, or its layers cannot be read."""
        self._layers = engine.with_suffix(".json").read_text()
        trtexec.placement_of(self._layers)
        trtexec.check_end(said := self._run(self._queries(engine)))
        return said

    def _queries(self, engine: Path, warmup_s: float = 0, seconds: float = 0, at_least: int = 1) -> list[str]:
        major, program = self._trtexec.version[0], self._trtexec.program
        return trtexec.run_argv(str(engine), major=major, warmup_s=warmup_s, seconds=seconds, at_least=at_least, program=program)

    def _write(self, images: Any) -> str:
        try:
            self._file("images.bin").write_bytes(images.astype("<f4").tobytes())
        except OSError as error:
            raise BackendError(f"the images for trtexec cannot be written ({reason(error)}): free some disk space") from error
        return f"--loadInputs={self._input.name}:images.bin"  # relative to trtexec's folder: a path's own colon would end the name

    def _file(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def _run(
        self, argv: Sequence[str], most_s: float = RUNS_S, stamps: dict[str, float] | None = None, clock: Clock = time.perf_counter
    ) -> str:
        """All that a run printed; ``stamps`` gets the instants at which its telling lines came. Raises BackendError where it was killed."""
        lines = []
        try:
            process = subprocess.Popen(
                argv, cwd=self._folder.name, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
            )
        except OSError as error:
            raise BackendError(f"{argv[0]} cannot be started ({reason(error)}): install it again") from error
        late = threading.Timer(most_s, process.kill)
        late.start()
        try:
            with process:
                for line in process.stdout or ():
                    now = clock()
                    lines.append(line)
                    for mark in (STARTS, REPORTS):
                        if stamps is not None and mark in line:
                            stamps.setdefault(mark, now)
        finally:
            in_time = late.is_alive()
            late.cancel()
        if not in_time:
            raise BackendError(f"trtexec did not end within {most_s:g} s and was killed: is another program using the GPU?")
        if process.returncode < 0:
            raise BackendError(f"trtexec was killed by {signal_name(-process.returncode)}: free some of the board's memory")
        return "".join(lines)


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _board() -> str:
    """What an engine is for, as far as can be told without CUDA: the board's model, the first GPU's name, else this machine's."""
    with contextlib.suppress(OSError):
        return Path("/proc/device-tree/model").read_text(errors="replace").rstrip("\x00")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        argv = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        said = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=ANSWERS_S, check=False)
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.splitlines()[0].strip()
    return platform.node()
