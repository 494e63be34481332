"""The protocols: all that a leaf must provide, on one screen. A leaf is a frozen dataclass; its fields are its configuration.

``probe()`` returns None, or one sentence: what is missing and how to get it. ``contracts.py`` judges every leaf.
Imports the standard library and the records only; tensors and arrays are named in comments and docstrings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from edgejoule.caveats import Doubts
from edgejoule.records import Artifact, Grade, Job, ModelSpec, SessionInfo, Trace, Trial


@runtime_checkable
class Sensor(Protocol):
    """A number that can be read at any time. PolledMeter turns any Sensor into a Meter."""

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]: ...
    @property
    def period_s(self) -> float: ...  # how often it is worth reading
    @property
    def averaging_s(self) -> float: ...  # its own averaging or update time
    @property
    def grade(self) -> Grade: ...
    @property
    def scope(self) -> str: ...
    def probe(self) -> str | None: ...
    def read(self) -> Mapping[str, float]: ...  # {rail: joules since whenever, monotonic | watts}; raises MeterError

    # Optional: total(rail) -> bool, doubts() -> {caveat code: what was seen}, beside() -> Sensor | None (read along, not part of
    # the total), systematic (relative error by the maker's word), stamp_uncertainty_s.


@runtime_checkable
class Streamer(Protocol):
    """A program that prints samples until it is ended. ``measure/streamed.py`` turns any Streamer into a Meter.

    Optional, as for a Sensor: ``total(rail) -> bool``, ``doubts() -> {caveat code: what was seen}``, ``systematic`` (relative),
    ``stamp_uncertainty_s``; and ``terminal``, True where the program prints line by line only on a terminal.
    """

    @property
    def quantity(self) -> Literal["energy_j", "power_w"]: ...
    @property
    def period_s(self) -> float: ...  # how often a sample comes
    @property
    def averaging_s(self) -> float: ...  # the instrument's own averaging or update time
    @property
    def grade(self) -> Grade: ...
    @property
    def scope(self) -> str: ...
    def probe(self) -> str | None: ...
    def argv(self) -> Sequence[str]: ...  # the command; raises MeterError
    def parser(self) -> Callable[[str], Mapping[str, float] | None]: ...

    # A fresh function from a line without its end to a sample {rail: joules | watts} where one is complete, else None. What it
    # cannot read it passes over (None); it raises MeterError where the stream is of no use at all, which ends it.


@dataclass(frozen=True, slots=True)
class TraceHints:
    """What the user says of a trace file because the file does not. Empty text and None mean: not said."""

    interval_s: float | None = None  # seconds between rows: wins over any stamps in the file
    voltage_v: float | None = None
    time_col: str = ""
    power_col: str = ""
    voltage_col: str = ""
    current_col: str = ""
    time_unit: str = ""  # s, ms, us, ns, min, h
    power_unit: str = ""  # W, mW, uW
    voltage_unit: str = ""  # V, mV
    current_unit: str = ""  # A, mA, uA
    decimal: str = ""  # "." or ","


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a trace file, in file order: numpy float64 arrays of one length (N,). NaN marks what could not be read."""

    times_s: Any  # (N,) seconds from any origin; NaN where a row has no stamp (then hints.interval_s is needed)
    power_w: Mapping[str, Any]  # {rail: (N,) watts}
    energy_j: Mapping[str, Any]  # {rail: (N,) joules since whenever}: the file's own counter of a rail


@runtime_checkable
class TraceFormat(Protocol):
    """A kind of trace file. Lines come without their ends; a row that cannot be read is a row of NaN and a doubt, never a guess."""

    @property
    def averaging_s(self) -> float: ...  # of the instrument that wrote it
    @property
    def grade(self) -> Grade: ...
    @property
    def scope(self) -> str: ...
    def recognises(self, head: Sequence[str]) -> bool: ...  # the first 50 lines (with content) are surely of this format
    def totals(self, rails: Sequence[str]) -> tuple[str, ...]: ...  # the rails that add up to the whole; () where nobody knows
    def read(self, lines: Iterable[str], hints: TraceHints, doubts: Doubts) -> Iterator[Block]: ...  # raises MeterError


@runtime_checkable
class Meter(Protocol):
    """Records while it runs. One use each: start, then stop."""

    def probe(self) -> str | None: ...
    def start(self) -> None: ...
    def stop(self) -> tuple[Trace, ...]: ...


class LabelledImages(Protocol):
    """One split of a labelled set, by position. The same position gives the same image in every process and at any time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...  # PIL image, RGB, upright; class. Raises BadImageError naming the file
    def key(self, index: int) -> str: ...  # names the image in messages and caches: a path, an index in the original file


@runtime_checkable
class LabelledData(Protocol):
    """Labelled images. Reading nothing but what is asked for; ``probe`` says what is missing.

    ``kind`` detection and segmentation sets give torch datasets of their own from ``split`` (see ``datasets``), not LabelledImages.
    """

    @property
    def kind(self) -> Literal["classification", "detection", "segmentation"]: ...
    @property
    def dataset(self) -> str: ...  # its name in tables: "digits", "cifar-10", the folder's own
    @property
    def classes(self) -> tuple[str, ...]: ...  # names by label; raises DataError
    def probe(self) -> str | None: ...
    def origin(self) -> str: ...  # equal exactly when images, labels and splits are; raises DataError
    def split(self, name: Literal["train", "validation", "test"]) -> LabelledImages: ...  # raises DataError; disjoint, stable


class Session(Protocol):
    """A loaded artifact. ``infer`` blocks until the host has the arrays; loaded with ``streams=n``, n threads may call it at once.

    Optional: ``audit(images) -> Placement | None`` runs the images once more, however slowly, to see which operators run where and in what
    precision (never called where time is measured); ``submit(images, done)`` begins an inference and returns at once, where a stream
    is free; ``done({"logits": ...} | an exception)`` is called from any thread; ``window(images, duration_s, at_least, clock)`` of a
    runtime that times itself (``infer`` is then no timing): instants (n + 1,) on ``clock``, one batch run back to back after a warm-up.
    """

    def infer(self, images: Any) -> Mapping[str, Any]: ...  # (B, C, H, W) float32 -> {"logits": (B, K) float32}
    def info(self) -> SessionInfo: ...  # read back from the runtime, never assumed; cheap
    def close(self) -> None: ...


class Export(Protocol):
    """One network in the forms that backends start from: made lazily, once, shared by all backends."""

    @property
    def module(self) -> Any: ...  # nn.Module in eval mode, float32, on the CPU
    @property
    def program(self) -> Any: ...  # torch.export.ExportedProgram of (B, C, H, W)
    @property
    def onnx(self) -> Path: ...  # from the dynamo exporter: input "images", output "logits"


@dataclass(frozen=True, slots=True)
class Held:
    """Images held out from calibration and from every measurement: what quantisation's choices are judged by."""

    images: Any  # (M, C, H, W) float32, normalised
    labels: Any = None  # (M,) int64; None where nobody knows: then the float32 network's own answers are the truth


@dataclass(frozen=True, slots=True)
class CompileContext:
    """What a backend may need to know besides the network. ``calibration`` and ``held`` are made when called, at some cost."""

    shape: tuple[int, int, int, int]  # (B, C, H, W), static
    workdir: Path  # write here, and return a path in here; every file in it is part of the artifact
    calibration: Callable[[], Any]  # -> (N, C, H, W) float32, normalised real images
    held: Callable[[], Held] | None = None
    max_drop_pct: float = 1.0  # the most top-1 (or agreement) that quantisation may cost on the held-out images
    note: Callable[[str, str], None] = lambda what, chosen: None  # what was chosen goes into the manifest
    notify: Callable[[str], None] = lambda line: None  # progress of anything over two seconds


@dataclass(frozen=True, slots=True)
class Handover:
    """How an artifact runs with its runtime alone, without edgejoule: what its folder's README says."""

    install: str  # one shell line: pip install onnxruntime numpy pillow
    python: str  # run in the folder; defines ``run(images)``: numpy float32 (B, C, H, W), normalised -> logits (B, K)
    cpp: str = ""  # where usual


@runtime_checkable
class Backend(Protocol):
    """Changes the representation, not the network.

    Optional: ``environment`` names the worker environment (``environments.py``) in which it compiles or runs where its packages are not
    in this one; ``runs_here() -> str | None`` says why a file that can be compiled here cannot be loaded here (``probe`` is of both
    without it); ``handover(artifact) -> Handover``; ``learned``, True where int8 runs networks that were trained for it.
    """

    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...  # "cpu", "cuda", … : decides which meters see it
    def probe(self) -> str | None: ...
    def toolchain(self) -> Mapping[str, str]: ...  # {package: version} of all that shapes the compiled file
    def compile(self, export: Export, context: CompileContext) -> Path: ...  # on the host
    def load(
        self, artifact: Artifact, threads: int, streams: int = 1
    ) -> Session: ...  # on the device, from artifact.folder; imports no torch


class Fit(Protocol):
    """Trains a copy of a network on the recipe's data and gives it back in eval mode. Raises TrainingError, DataError.

    ``distill`` is a distillation's spelling (``soft(alpha=0.5)``); its teacher stands in it, else it is the one that the user names, else
    the network that the recipe began with. ``lr`` is a factor of the training recipe's rate. While it trains, submodules are asked:
    ``begin_step(step, steps)`` before each forward, and ``penalty()`` after it, a tensor () that is added to the loss, or None. Layers
    with an attribute ``sparsity`` keep the zeros of their weights.
    """

    def __call__(
        self,
        module: Any,
        spec: ModelSpec,
        *,
        epochs: float,
        lr: float = 1.0,
        distill: str = "",
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may need: how to train, from whom to learn, on what data. ``data(spec, n)`` draws n training images for a spec."""

    fit: Fit | None
    teacher: tuple[Any, ModelSpec] | None  # the network that the recipe began with, in eval mode; never changed
    data: Callable[[ModelSpec, int], Held] | None
    seed: int
    workdir: Path
    notify: Callable[[str], None] = lambda line: None  # progress of anything over two seconds


@runtime_checkable
class Pass(Protocol):
    """Changes the network: a new module and a new spec, still exportable; never the ones it was given.

    The new module differs from its builder's in what ``architecture.py`` can write down: plain attributes, tensors, submodules of torch's,
    timm's and edgejoule's classes; no hooks and no patched functions.

    Optional: ``exact``, True where it leaves every answer as it is; ``learns_from``, the distillation that it asks of ``fit``, by which
    the teacher is checked before any work and identified in the cache.
    """

    @property
    def needs(self) -> frozenset[Literal["calibration", "training", "teacher"]]: ...
    def __call__(self, module: Any, spec: ModelSpec, context: PassContext) -> tuple[Any, ModelSpec]: ...


@runtime_checkable
class Runner(Protocol):
    """Runs an artifact and measures it: the Python agent is one, a vendor's benchmark tool another."""

    def run(self, artifact: Artifact, job: Job) -> Trial: ...


@runtime_checkable
class Transport(Protocol):
    """A way to a device."""

    def probe(self) -> str | None: ...
    def push(self, local: Path, remote: str) -> None: ...
    def run(self, argv: Sequence[str], stdin: str, timeout_s: float) -> Iterator[str]: ...  # lines as they come; raises TransportError
    def pull(self, remote: str, local: Path) -> None: ...


class Builder(Protocol):
    """A function that makes a network following timm's model API."""

    def __call__(self, *, num_classes: int, **options: Any) -> Any: ...  # nn.Module
