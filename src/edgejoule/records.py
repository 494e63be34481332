"""The nouns: one frozen dataclass for every thing that flows through the pipeline, in pipeline order.

Units stand in the names, SI inside (``_s`` seconds, ``_j`` joules, ``_w`` watts, ``_bytes``); the few fields in the
field's own units say so (``_pct``, ``_m`` millions, ``_g`` billions). Knows no files, no clocks, no devices, and
imports the standard library only, so that a board can read it. ``plain.py`` turns records into JSON values and back.
"""

from __future__ import annotations

import typing
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Grade = Literal["A", "B", "C", "D"]  # measurement.md 1.8: A calibrated analyser … D model, an estimate
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
Severity = Literal["note", "warn", "reject"]
if typing.TYPE_CHECKING:
    Floats = array[float]  # float64 samples
else:
    Floats = array  # not subscriptable before Python 3.12


def floats(values: typing.Iterable[float] = ()) -> Floats:
    """Float64 samples in the one container that both the standard library and numpy read without a copy."""
    return array("d", values)


@dataclass(frozen=True, slots=True)
class Caveat:
    """A doubt about a result: what was seen, why it matters, what to do. ``caveats.caveat`` makes them."""

    code: str
    seen: str
    why: str
    advice: str
    severity: Severity = "warn"


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval over ``n`` independent repeats; no bounds where none can be claimed (grade D, n < 2)."""

    value: float
    low: float | None
    high: float | None
    n: int


# ---------------------------------------------------------------- the catalog and stage 1


@dataclass(frozen=True, slots=True)
class Published:
    """What a model's authors or timm's results table state; ``source`` says who."""

    top1_pct: float | None
    params_m: float | None
    macs_g: float | None
    source: str
    top5_pct: float | None = None


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a network's input: resize the short side to size / crop_pct, centre-crop, (x/255 - mean)/std."""

    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A row of the catalog, or a user's own model. ``builder`` is the grammar's spelling of what makes the module."""

    name: str
    family: str
    builder: str  # 'timm(name="levit_conv_192.fb_dist_in1k")' or 'custom(target="module:function")'
    preprocessing: Preprocessing
    num_classes: int = 1000
    dataset: str = "imagenet-1k"
    licence: str = "unknown"
    published: Published | None = None
    pools: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    plain: str = ""  # for a distilled model: the catalog name of the same network trained without a teacher


@dataclass(frozen=True, slots=True)
class Cost:
    """Counted from the built network at batch 1. One MAC is one multiply-add; activations are the counted ops' outputs."""

    params: int
    macs: int
    activation_bytes: int
    input_size: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Screened:
    """A candidate after stage 1. ``reason`` says why it was rejected, and is empty where it was kept."""

    name: str
    top1_pct: float | None
    params_m: float | None
    macs_g: float | None
    netscore: float | None
    kept: bool
    reason: str
    counted: bool = False  # params and MACs counted from the built model, not published
    accuracy: Literal["published", "measured"] = "published"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A top-1 as a fraction, and where it comes from: ``published`` figures and ``measured`` ones are never mixed unlabelled."""

    dataset: str
    split: str
    value: float
    kind: Literal["published", "measured"]
    source: str
    n: int | None = None
    low: float | None = None
    high: float | None = None
    seeds: int | None = None  # trainings that differ in nothing but their seed; value is their mean then
    std: float | None = None  # sample standard deviation over the seeds
    origin: str = ""  # of measured ones, the images': two sets may share a name


# ---------------------------------------------------------------- training and evaluation


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch of a training run, as it ended."""

    number: int  # from 1
    step: int  # optimiser steps since the beginning
    loss: float  # mean over the epoch's steps, of all processes
    lr: float  # of the epoch's last step, before any layer's own factor
    seconds: float
    images: int  # seen in this epoch, by all processes
    scores: Mapping[str, float] = field(default_factory=dict)  # on the validation split: "top1" and "loss", "map" or "miou"
    bad_images: int = 0  # distinct ones, since the beginning


@dataclass(frozen=True, slots=True)
class Training:
    """One finished training run: what went in, what came out. ``key`` is a hash of all that determines the weights."""

    key: str
    spec: ModelSpec  # as trained: its classes, data set and preprocessing
    initial: str  # "random", "pretrained" or "file"
    initial_id: str  # what determines the weights that it began with
    data: str  # canonical spelling
    origin: str  # of the data: equal exactly when images, labels and splits are
    recipe: str  # canonical spelling
    distill: str  # canonical spelling, "" for none
    seed: int
    weights_id: str  # sha256 of the safetensors file that it ended with
    weights: str  # that file, relative to the folder of the results
    steps: int
    seconds: float  # spent training, over all sittings
    processes: int
    mixed_precision: str
    versions: Mapping[str, str]
    validation: Accuracy | None  # chosen by, where something is chosen
    accuracy: Accuracy | None  # on the test split, which nothing is chosen by
    bad_images: int = 0
    head: str = ""  # of dense tasks: retinanet, mask_rcnn, semantic_fpn
    teacher_id: str = ""  # what determines the teacher's weights, "" for none


@dataclass(frozen=True, slots=True)
class Scores:
    """What a classifier got right on ``n`` labelled images. Fractions; intervals are Wilson's, at 95 %."""

    n: int
    top1: Interval
    top5: Interval | None  # None where there are five classes or fewer
    loss: float  # mean negative log-likelihood, nats
    calibration_error: float  # expected calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599)
    per_class: Mapping[str, Interval]  # how often the images of a class were recognised; only classes that have images


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of an artifact, as its own runtime computes it, on a labelled split."""

    artifact_sha256: str
    dataset: str
    split: str
    data: str  # canonical spelling
    origin: str
    scores: Scores
    agreement: Interval | None  # how often its first answer is the float32 network's; None where that was not asked for
    reference_top1: float | None  # the float32 network's own, on the same images
    bad_images: int = 0
    evaluated_at: float = 0.0  # unix time
    drop: Interval | None = None  # the float32 network's top-1 less the artifact's, paired image by image
    caveats: tuple[Caveat, ...] = ()


# ---------------------------------------------------------------- variants and artifacts


@dataclass(frozen=True, slots=True)
class Variant:
    """A network that can be compiled: a spec, the recipe that changed it, and the identity of its weights."""

    spec: ModelSpec
    weights: str  # "pretrained", "random" or "file"
    weights_id: str  # what determines the weights: a sha256, or seed and initialisation version for random ones
    recipe: str = ""
    seed: int = 0
    optimized: str = ""  # of a recipe that is not exact: the key of the network that it made; ``spec`` is then that network's own

    @property
    def label(self) -> str:
        return f"{self.spec.name} | {self.recipe}" if self.recipe else self.spec.name


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Parity:
    """The compiled file against the float32 network on ``n`` real images, on logits (n, K)."""

    n: int
    max_abs: float
    max_rel: float  # max over images of ||compiled - eager|| / ||eager||
    top1_agreement: float  # fraction of images
    reference_rms: float  # the reference logits' root mean square: parity of vanishing outputs proves nothing
    median_rel: float | None = None  # as max_rel, the median over images
    agreement: Interval | None = None  # top1_agreement with Wilson's interval


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What a runtime executes after its own fusions, operator by operator, by its own word."""

    nodes: int  # executed operators; constants, parameters and results are none
    delegated: int  # of those, by the provider, delegate or device that was asked for
    fallbacks: Mapping[str, int] = field(default_factory=dict)  # operator type -> how many of them the others run
    precisions: Mapping[str, int] = field(
        default_factory=dict
    )  # of products with weights (linear, convolution): fp32, bf16, int8 -> how many

    @property
    def words(self) -> str:
        """``62 of 65 operators (the others: 2 LayerNorm, 1 Softmax); products with weights: 48 int8, 2 fp32``."""
        others, kinds = (
            ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
            for counts in (self.fallbacks, self.precisions)
        )
        where = f"{self.delegated} of {self.nodes} operators" + (f" (the others: {others})" if others else "")
        return where + (f"; products with weights: {kinds}" if kinds else "")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a runtime says of itself after loading: read back, never assumed."""

    precision: str
    providers: tuple[str, ...]
    runtime: str  # "onnxruntime 1.31.1"
    threads: int
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    placement: Placement | None = None  # of jobs that ask for outputs; None where the runtime does not tell


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled file and its manifest. ``sha256`` is over the files' names and hashes; ``folder`` is where it lies now."""

    sha256: str
    variant: Variant
    backend: str  # canonical spelling
    precision: str  # asked for
    batch: int
    files: tuple[ArtifactFile, ...]
    toolchain: Mapping[str, str]
    info: SessionInfo
    parity: Parity | None
    caveats: tuple[Caveat, ...] = ()
    build_key: str = ""
    folder: str = ""
    notes: Mapping[str, str] = field(
        default_factory=dict
    )  # what the backend chose while compiling: smoothing, ranges, layers left in float

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def label(self) -> str:
        return f"{self.variant.label} @ {self.backend}"


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a session. ``end_to_end`` puts preprocessing inside the window."""

    scenario: str = "single_stream"  # the grammar of scenarios.py, canonical
    batch: int = 1
    end_to_end: bool = False
    images: str = "photos(n=32)"
    images_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Protocol:
    """The numbers of measurement.md 1, as one named profile. ``images`` fixes the window by count, as E3P does, not by time."""

    name: str
    warmup_s: float
    warmup_inferences: int
    warmup_cap_s: float
    idle_s: float  # before and after, each
    window_s: float
    window_inferences: int  # at least
    repeats_min: int
    repeats_max: int
    latency_half_width: float  # relative, of the median's interval over repeats: stop when met
    energy_half_width: float
    cooldown_s: float = 0.0
    images: int | None = None
    sensor_windows: float = 0.0  # the window lasts at least this many times the sensor's update or averaging time


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    cpu: str
    arch: str
    cores: int
    memory_bytes: int
    system: str
    accelerator: str = ""
    power_mode: str = ""
    governor: str = ""


@dataclass(frozen=True, slots=True)
class Environment:
    """What must be equal before two trials may be compared (``fingerprint`` is its hash) and what was merely observed."""

    device: Device
    threads: int
    runtime: str
    versions: Mapping[str, str]
    fingerprint: str
    observed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace:
    """One rail's raw samples. ``times_s`` count on ``clock_id``; add ``offset_s`` for the trial's own clock."""

    rail: str
    quantity: Literal["energy_j", "power_w"]
    times_s: Floats
    values: Floats
    source: str  # the meter, canonical spelling
    grade: Grade
    scope: str  # wall, board-in, module-in, SoC, package, gpu, process, …
    period_s: float
    averaging_s: float = 0.0
    clock_id: str = "monotonic"
    offset_s: float = 0.0
    offset_uncertainty_s: float = 0.0
    total: bool = True  # this rail is one of those that add up to the whole
    systematic: float = 0.0  # relative error that averaging does not lessen, by the instrument's own word (0.05 is +-5 %); 0 where unknown


@dataclass(frozen=True, slots=True)
class Series:
    """Something watched beside the power during a trial: a clock, a temperature, memory. On the trial's clock."""

    name: str  # "clock", "temperature", "pss", …
    unit: str  # "Hz", "C", "bytes"
    times_s: Floats
    values: Floats


@dataclass(frozen=True, slots=True)
class Memory:
    """Peaks of one trial. None where the system does not say."""

    rss_bytes: int | None  # resident set, high-water mark
    pss_bytes: int | None  # proportional set, the largest of samples every 50 ms outside the metered window
    gpu_bytes: int | None  # of this process, as the GPU's driver counts it
    swap_bytes: int | None  # of this process, swapped out at the end


@dataclass(frozen=True, slots=True)
class Phase:
    name: Literal["load", "first", "warmup", "idle_before", "window", "idle_after"]
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work for the agent: ``outputs`` (what the session computes on some images) or ``measure`` (one trial)."""

    action: Literal["outputs", "measure"]
    artifact: str  # folder that holds manifest.json
    images: str  # .npy, uint8 (N, C, H, W)
    workload: Workload
    threads: int
    key: str = ""
    protocol: Protocol | None = None
    meter: str = ""
    repeat: int = 0
    seed: int = 0
    most: int = 8  # outputs: of the first so many images
    audit: bool = False  # outputs: also ask the runtime which operators run where


@dataclass(frozen=True, slots=True)
class Outputs:
    """The answer to an ``outputs`` job: logits (N, K), row by row, and what the runtime says of itself."""

    logits: Floats
    shape: tuple[int, int]
    info: SessionInfo


@dataclass(frozen=True, slots=True)
class Trial:
    """One repeat in one fresh process: raw, no statistic. Stored the moment it exists, never changed."""

    key: str
    artifact_sha256: str
    workload: Workload
    protocol: Protocol
    meter: str
    repeat: int
    environment: Environment
    started_at: float  # unix time
    phases: tuple[Phase, ...]
    latencies_s: Floats  # one per inference (a batch is one inference)
    load_s: float  # opening the artifact, the runtime's own import included
    first_inference_s: float
    peak_memory_bytes: int
    traces: tuple[Trace, ...] = ()
    caveats: tuple[Caveat, ...] = ()
    watched: tuple[Series, ...] = ()
    memory: Memory | None = None
    sampler_cores: float | None = None  # CPU seconds of all that sampled, per second
    frames_due: int | None = None  # scenario fixed_rate: frames that came in the window
    deadlines_missed: int | None = None  # of those, not finished before the next one came
    cameras: Floats = field(default_factory=floats)  # scenario streams: which camera, from 0, each of latencies_s belongs to

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclass(frozen=True, slots=True)
class Camera:
    """One of several cameras at once: seconds from handing over an image to having its logits, over all repeats."""

    inferences: int
    median_s: float
    p90_s: float
    p99_s: float | None  # needs 1000 inferences


@dataclass(frozen=True, slots=True)
class Measurement:
    """Derived from one artifact's trials, and recomputable from them at any time. Energies are per image."""

    variant: str
    model: str
    backend: str
    precision: str  # read back
    weights: str
    artifact_sha256: str
    workload: Workload
    protocol: str
    device: str
    fingerprint: str
    meter: str
    grade: Grade
    scope: str
    latency_s: Interval  # median of the inferences, per inference
    p90_s: float
    p99_s: float | None  # needs 1000 inferences
    throughput_ips: Interval  # images per second
    power_w: Interval | None
    energy_j: Interval | None  # gross
    net_energy_j: Interval | None  # above idle
    idle_w: float | None
    first_inference_s: float
    load_s: float
    peak_memory_bytes: int
    artifact_bytes: int
    inferences_per_wh: float | None  # images per watt-hour, gross
    repeats: int
    inferences: int
    accuracy: Accuracy | None = None
    caveats: tuple[Caveat, ...] = ()
    systematic: float | None = None  # relative error of the meter that repeats do not lessen; None where its maker says nothing
    power_time_j: Interval | None = None  # E3P's way: mean of the power samples times the window, per image
    p90_interval_s: Interval | None = None  # within the repeats: block bootstrap, n is the effective number of inferences
    memory: Memory | None = None
    sampler_cores: float | None = None  # CPU seconds per second of all that sampled, the most of any repeat
    frames_due: int | None = None  # scenario fixed_rate, over all repeats
    deadlines_missed: int | None = None
    cameras: tuple[Camera, ...] = ()  # scenario streams: latency_s and the percentiles are of all cameras together


@dataclass(frozen=True, slots=True)
class Segment:
    """One inference found in a power trace. Seconds from the trace's first sample."""

    start_s: float
    stop_s: float
    energy_j: float  # net, and the background from start to stop
    net_energy_j: float  # above the background, tails beyond start and stop included


@dataclass(frozen=True, slots=True)
class TraceEnergy:
    """What a trace file holds between two instants. Seconds from its first sample; None where it has no meaning."""

    format: str
    rails: tuple[str, ...]
    total_rails: tuple[str, ...]
    samples: int
    duration_s: float
    period_s: float
    start_s: float
    stop_s: float
    energy_j: Mapping[str, float | None]
    power_w: Mapping[str, float | None]
    total_energy_j: float | None
    net_energy_j: float | None
    idle_w: float | None
    grade: Grade
    scope: str
    segments: tuple[Segment, ...] = ()
    segment_energy_j: tuple[float, float] | None = None  # mean and standard deviation over the segments
    segment_net_energy_j: tuple[float, float] | None = None
    sensitivity: Mapping[str, float | None] = field(default_factory=dict)  # {k: net joules of all segments at that threshold}
    caveats: tuple[Caveat, ...] = ()


# ---------------------------------------------------------------- ranking


@dataclass(frozen=True, slots=True)
class Worth:
    """Whether a changed network is worth it: one row with a recipe beside the row without one that speaks most against it.

    ``yes``: no row without a recipe is at least as accurate for no more. ``no``: ``beside`` is. ``not shown``: ``beside`` may be.
    """

    verdict: Literal["yes", "no", "not shown", "unknown"]
    cost: Literal["energy", "latency"] = "energy"  # latency where the energies are estimates
    beside: str = ""  # label of the plain row that the two figures are against, "" where there is none
    points: Interval | None = None  # top-1 less that of ``beside``, percentage points
    cost_ratio: Interval | None = None  # cost over that of ``beside``
    missing: str = ""  # not shown: what would decide it; unknown: what is not there
    own: str = ""  # label of the same network without the recipe, "" where it is not in the ranking
    plain_models: int = 0  # networks of the ranking without a recipe; those that were not run cannot be compared
    cheapest: bool = False  # no plain row costs as little: a smaller plain network was not measured


@dataclass(frozen=True, slots=True)
class RankRow:
    """One line of a ranking. ``rank`` 1 is best; 0 where the metric could not be computed (``note`` says why)."""

    model: str
    rank: int
    top1_pct: float | None
    accuracy: str  # "published" or "measured"
    energy_mj: Interval
    latency_ms: Interval | None
    power_w: Interval | None
    sam: Interval | None
    efficiency_pct_per_mj: Interval | None
    pareto_energy: bool
    pareto_latency: bool | None
    saved_pct: float | None = None  # energy saved against the baseline
    netscore: float | None = None
    params_m: float | None = None
    macs_g: float | None = None
    weights: str = ""
    note: str = ""
    artifact_sha256: str = ""
    top1: Interval | None = None  # percent, where the accuracy has an interval
    seeds: int | None = None  # trainings that top1_pct is the mean of
    recipe: str = ""
    worth: Worth | None = None  # of rows with a recipe


@dataclass(frozen=True, slots=True)
class Agreement:
    """Kendall's tau-b between a stage-1 figure and a stage-2 figure over ``n`` models."""

    stage1: str
    stage2: str
    tau: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A distilled model beside its plain twin: distilled over plain."""

    distilled: str
    plain: str
    energy_ratio: float
    delta_sam: float | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Models on one data set, device, workload, grade and scope, best first."""

    title: str
    metric: str
    a: float
    b: float
    dataset: str
    device: str
    workload: str
    protocol: str
    grade: str
    scope: str
    meter: str
    rows: tuple[RankRow, ...]
    baseline: str = ""
    agreements: tuple[Agreement, ...] = ()
    pairs: tuple[Pair, ...] = ()
    caveats: tuple[Caveat, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A variant that could not go on: which stage, and one sentence. The rest of the study goes on."""

    variant: str
    backend: str
    stage: str
    reason: str
