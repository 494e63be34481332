"""What every leaf must satisfy, ours and third parties' alike: call these in your own tests.

    from edgejoule.contracts import check_meter
    check_meter("mymeter(port=3)")

Each function returns nothing, or raises ContractError with the first promise that is broken. A leaf whose ``probe`` says
that it cannot work here is judged by what it says, and by its shape. Host only (torch for models and backends).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgejoule import manifest, registry
from edgejoule.caveats import Doubts
from edgejoule.errors import ArtifactError, BackendError, BadImageError, DataError, EdgejouleError, TransportError
from edgejoule.records import Artifact, ModelSpec, Preprocessing, SessionInfo, Trace, Variant
from edgejoule.seams import (
    Backend,
    CompileContext,
    Export,
    LabelledData,
    LabelledImages,
    Meter,
    Pass,
    PassContext,
    Sensor,
    Session,
    Streamer,
    TraceFormat,
    TraceHints,
    Transport,
)

GRADES = ("A", "B", "C", "D")
# precision -> relative error of logits that rounding explains in a sane network
FARTHEST = {"fp32": 1e-3, "tf32": 0.1, "fp16": 0.1, "bf16": 0.1, "int8": 0.5}


class ContractError(AssertionError):
    """A promise of the seams that a leaf breaks."""


def check_meter(spelling: str, meter_of: Callable[[str], Meter | None], seconds: float = 0.3) -> None:
    """A sensor or meter: its facts, its probe and, where it works here, its traces. ``meter_of`` makes a Meter of a spelling."""
    leaf = _leaf("meter", spelling)
    remedy = _probe(leaf)
    if isinstance(leaf, (Sensor, Streamer)):
        _require(leaf.quantity in ("energy_j", "power_w"), f"quantity is {leaf.quantity!r}, not energy_j or power_w")
        _require(leaf.period_s > 0 and leaf.averaging_s >= 0, "period_s must be positive and averaging_s not negative")
        _require(leaf.grade in GRADES, f"grade is {leaf.grade!r}, not A to D")
        _require(bool(leaf.scope), "scope is empty: say what the sensor sees")
    else:
        _require(isinstance(leaf, Meter), "it is no Sensor (quantity, …, read), no Streamer (…, argv, parser) and no Meter (start, stop)")
    if remedy is not None:
        return
    meter = meter_of(spelling)
    _require(meter is not None, "no meter could be made of it")
    assert meter is not None
    meter.start()
    time.sleep(seconds)
    traces = meter.stop()
    _require(bool(traces), "it gave no trace")
    for trace in traces:
        _check_trace(trace)


def _check_trace(trace: Trace) -> None:
    times, values = list(trace.times_s), list(trace.values)
    _require(len(times) == len(values) >= 2, f"rail {trace.rail}: {len(times)} times and {len(values)} values; at least two of each")
    _require(all(math.isfinite(x) for x in times + values), f"rail {trace.rail}: a sample is not finite")
    _require(all(a < b for a, b in itertools.pairwise(times)), f"rail {trace.rail}: times do not increase")
    if trace.quantity == "energy_j":
        _require(all(a <= b for a, b in itertools.pairwise(values)), f"rail {trace.rail}: joules decrease (unwrap the counter)")
    _require(trace.grade in GRADES and bool(trace.scope) and bool(trace.source), f"rail {trace.rail}: grade, scope or source is missing")


def check_trace_format(spelling: str, sample: Sequence[str], hints: TraceHints) -> None:
    """A format of trace files. ``sample`` is a real file's lines, which it must recognise and read; then it is given rubbish."""
    leaf: TraceFormat = _leaf("trace", spelling)
    _require(isinstance(leaf, TraceFormat), "it lacks a part of TraceFormat (averaging_s, grade, scope, recognises, totals, read)")
    _require(leaf.averaging_s >= 0 and leaf.grade in GRADES and bool(leaf.scope), "averaging_s, grade or scope is missing")
    _require(leaf.recognises(sample), "it does not recognise its own file")
    for other in ([], ["", ""], ["no trace", "of any kind"], ["\x00\x00"], ["{}"], ["1,2,3"]):
        _require(not leaf.recognises(other), f"it claims to recognise {other}")
    blocks = list(leaf.read(iter(sample), hints, Doubts()))
    _require(sum(len(found.times_s) for found in blocks) >= 2, "it reads fewer than two samples of its own file")
    rails: dict[str, None] = {}
    for found in blocks:
        for rail, values in (*found.power_w.items(), *found.energy_j.items()):
            _require(len(values) == len(found.times_s), f"rail {rail}: {len(values)} values and {len(found.times_s)} stamps")
            rails[rail] = None
    _require(set(leaf.totals(tuple(rails))) <= set(rails), "totals() names rails that are not there")
    for n, line in enumerate(sample):
        for spoiled in (line[: len(line) // 2], line.replace(",", ";"), line.replace(".", ","), line + "\x00", line + line, "-1"):
            with contextlib.suppress(EdgejouleError):  # one clear error is as good as a doubt
                list(leaf.read(iter([*sample[:n], spoiled, *sample[n + 1 :]]), hints, Doubts()))


def check_backend(spelling: str, export: Export, shape: tuple[int, int, int, int], images: Any, workdir: Path) -> None:
    """Compiles a network, compares the file with it, and breaks it. ``images`` is (B, C, H, W) float32, ``export`` of that shape."""
    import numpy as np

    backend: Backend = _leaf("backend", spelling)
    _require(backend.precision in FARTHEST, f"precision is {backend.precision!r}")
    _require(bool(backend.device) and backend.device == backend.device.lower(), "device is a lower-case word, such as cpu")
    if _probe(backend) is not None:
        return
    _require(all(isinstance(v, str) for v in backend.toolchain().values()), "toolchain() maps packages to version texts")
    made = backend.compile(export, CompileContext(shape=shape, workdir=workdir, calibration=lambda: images))
    _require(made.is_relative_to(workdir) and made.exists(), f"compile returned {made}, which is not a file in the workdir")
    artifact = _artifact(spelling, backend, shape, workdir)
    _check_handover(backend, artifact)
    if (elsewhere := getattr(backend, "runs_here", lambda: None)()) is not None:  # compiled here, run on another machine
        _require(bool(elsewhere.strip()) and "\n" not in elsewhere, f"runs_here() returned {elsewhere!r}: None or one sentence")
        _refuses("load where runs_here() says that it cannot", lambda: backend.load(artifact, threads=1), BackendError)
        return
    session = backend.load(artifact, threads=1)
    before = images.copy()
    first, second = session.infer(images)["logits"], session.infer(images)["logits"]
    _require(isinstance(first, np.ndarray) and first.dtype == np.float32, "logits are float32 arrays on the host")
    _require(first.ndim == 2 and first.shape[0] == shape[0], f"logits are (B, K), not {first.shape}")
    _require(bool(np.isfinite(first).all()) and float(np.abs(first).max()) > 1e-6, "logits vanish or are not finite")
    _check_parity(export, images, first, backend.precision)
    _require(bool(np.allclose(first, second, rtol=1e-5, atol=1e-6)), "the same images give other logits the second time")
    _require(bool((images == before).all()), "infer changed its input")
    _check_info(session.info(), backend)
    _check_audit(session, images, backend)
    _refuses("infer of another shape", lambda: session.infer(images[:, :, :-1]), BackendError)
    session.close()
    for file in artifact.files:
        (workdir / file.name).write_bytes(b"not a model")
    _refuses("load of a damaged file", lambda: backend.load(artifact, threads=1), (BackendError, ArtifactError))


def _check_parity(export: Export, images: Any, logits: Any, precision: str) -> None:
    import numpy as np
    import torch

    with torch.inference_mode():
        wanted = export.module(torch.from_numpy(images)).numpy()  # (B, K)
    _require(logits.shape == wanted.shape, f"logits are {logits.shape}, the network's {wanted.shape}")
    error = float((np.linalg.norm(logits - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())
    _require(error < FARTHEST[precision], f"logits are {error:.0e} away from the network's (relative), too far for {precision}")


def _check_info(info: SessionInfo, backend: Backend) -> None:
    _require(info.precision == backend.precision, f"the runtime reads back {info.precision}, asked for {backend.precision}")
    _require(bool(info.providers) and bool(info.runtime), "info() names neither providers nor runtime")
    _require(bool(info.inputs) and bool(info.outputs), "info() names no inputs or outputs")
    _require(info.threads == 1, f"info() says {info.threads} threads where 1 was asked for")


def _check_handover(backend: Backend, artifact: Artifact) -> None:
    """What the README is made of: an optional method of backends. That its Python runs is for each backend's own tests."""
    tell = getattr(backend, "handover", None)
    if tell is None:
        return
    how = tell(artifact)
    _require(bool(how.install.strip()) and "\n" not in how.install.strip(), f"handover().install is {how.install!r}: one shell line")
    compile(how.python, "handover", "exec")  # a SyntaxError names the line
    _require("def run(" in how.python and "edgejoule" not in how.python, "handover().python does not define run(images) without edgejoule")


def _check_audit(session: Session, images: Any, backend: Backend) -> None:
    audit = getattr(session, "audit", None)
    if audit is None:
        _require(backend.precision != "int8", "an int8 session has no audit(images): nobody can see what runs in int8")
        return
    placed = audit(images)
    if placed is None:  # an older system that cannot tell
        return
    elsewhere = sum(placed.fallbacks.values())
    _require(placed.nodes >= placed.delegated >= 0 and placed.nodes > 0, f"{placed.delegated} of {placed.nodes} nodes are delegated")
    _require(
        placed.nodes == placed.delegated + elsewhere, f"{placed.delegated} nodes are delegated, {elsewhere} fell back, of {placed.nodes}"
    )
    if placed.precisions:
        most = max(placed.precisions, key=lambda kind: placed.precisions[kind])
        _require(most == backend.precision, f"most products with weights run in {most}, asked for {backend.precision}")


def _artifact(spelling: str, backend: Backend, shape: tuple[int, int, int, int], workdir: Path) -> Artifact:
    names = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file())
    files = manifest.hash_files(workdir, names)
    grey = Preprocessing((shape[1], shape[2], shape[3]), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    variant = Variant(ModelSpec("contract", "contract", "timm(name='test_vit')", grey), "random", "contract")
    info = SessionInfo(backend.precision, ("?",), "?", 1)
    sha256 = manifest.artifact_sha256(files)
    found = Artifact(sha256, variant, registry.canonical(spelling), backend.precision, shape[0], files, {}, info, None)
    return dataclasses.replace(found, folder=str(workdir))


def check_model(build: Callable[[int], Any], input_size: tuple[int, int, int]) -> None:
    """A network that follows timm's model API. ``build(num_classes)`` makes it; ``input_size`` is (C, H, W)."""
    import torch

    module = build(7).eval()
    for name in ("forward_features", "forward_head", "reset_classifier", "num_features"):
        _require(hasattr(module, name), f"it has no {name}")
    images = torch.rand(2, *input_size)  # (B, C, H, W)
    with torch.inference_mode():
        logits = module(images)  # (B, K)
        _require(tuple(logits.shape) == (2, 7), f"logits are {tuple(logits.shape)}, not (2, 7)")
        parts = module.forward_head(module.forward_features(images))
        _require(bool(torch.allclose(logits, parts, atol=1e-5)), "forward is not forward_head of forward_features")
        _require(bool(torch.allclose(logits, module(images), atol=1e-6)), "in eval mode the same images give other logits")
        _require(bool(torch.allclose(logits[:1], module(images[:1]), atol=1e-3)), "an image's logits depend on the rest of its batch")
    module.reset_classifier(3)
    with torch.inference_mode():
        _require(tuple(module.eval()(images).shape) == (2, 3), "reset_classifier(3) does not give 3 classes")
    torch.export.export(module, (images,))


def check_pass(spelling: str, module: Any, spec: ModelSpec, context: PassContext, images: Any) -> None:
    """A pass on one network: it leaves that alone, gives another that computes and exports, and the same one for the same seed.

    ``module`` is in eval mode; ``images`` (B, C, H, W) float32 tensors of ``spec``'s input size.
    """
    import torch

    one: Pass = _leaf("pass", spelling)
    _require(one.needs <= {"calibration", "training", "teacher"}, f"needs is {sorted(one.needs)}, not of calibration, training, teacher")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.inference_mode():
        before = module(images)  # (B, K)
    first, changed = one(module, spec, context)
    again, _ = one(module, spec, context)
    _require(first is not module, "it returned the module that it was given: work on a copy")
    same = state.keys() == module.state_dict().keys() and all(torch.equal(state[k], t) for k, t in module.state_dict().items())
    with torch.inference_mode():
        _require(same and bool(torch.equal(before, module(images))), "it changed the module that it was given")
        size = changed.preprocessing.input_size
        resized = torch.nn.functional.interpolate(images, size[1:]) if size != spec.preprocessing.input_size else images
        first.eval()  # not in one breath: some networks' eval() gives None
        again.eval()
        logits = first(resized)  # (B, K)
        _require(tuple(logits.shape) == (len(images), changed.num_classes), f"logits are {tuple(logits.shape)} after it")
        _require(bool(torch.isfinite(logits).all()) and float(logits.abs().max()) > 1e-6, "logits vanish or are not finite after it")
        _require(bool(torch.allclose(logits, again(resized), rtol=1e-4, atol=1e-5)), "the same seed gives another network")
    try:
        torch.export.export(first, (resized.clone(),), strict=False)
    except Exception as error:  # the exporter raises whatever its many parts raise
        raise ContractError(f"torch.export refuses what it returned ({type(error).__name__})") from error


def check_transport(spelling: str, workdir: Path) -> None:
    """Files go there and back, lines come as they are printed, a failing and a hanging command raise TransportError."""
    transport: Transport = _leaf("transport", spelling)
    if _probe(transport) is not None:
        return
    here, there, back = workdir / "here", str(workdir / "there"), workdir / "back"
    here.write_bytes(bytes(range(256)))
    transport.push(here, there)
    transport.pull(there, back)
    _require(back.read_bytes() == here.read_bytes(), "a file came back changed")
    lines = list(transport.run(["sh", "-c", "cat; echo second"], "first\n", 20.0))
    _require([line.rstrip("\n") for line in lines] == ["first", "second"], f"expected two lines, found {lines}")
    _refuses("a failing command", lambda: list(transport.run(["sh", "-c", "exit 3"], "", 20.0)), TransportError)
    began = time.monotonic()
    _refuses("a hanging command", lambda: list(transport.run(["sleep", "60"], "", 0.5)), TransportError)
    _require(time.monotonic() - began < 20, "the time limit was not kept")


def check_data(spelling: str, most: int = 32) -> None:
    """A labelled set: its facts twice over, and for classification its splits: disjoint, the same again, and ``most`` images of each.

    For detection and segmentation the samples are the task's own; here only the set's facts are judged.
    """
    leaf: LabelledData = _leaf("data", spelling)
    lacking = {"kind", "dataset", "classes", "probe", "origin", "split"} - set(dir(leaf))  # isinstance would read classes
    _require(not lacking, f"it lacks a part of LabelledData: {', '.join(sorted(lacking))}")
    _require(leaf.kind in ("classification", "detection", "segmentation"), f"kind is {leaf.kind!r}")
    _require(isinstance(leaf.dataset, str) and bool(leaf.dataset.strip()), f"dataset is {leaf.dataset!r}: expected its name in tables")
    if _probe(leaf) is not None:
        _refuses("split of what probe() says is not there", lambda: leaf.split("train"), DataError)
        return
    names, again = leaf.classes, registry.create("data", spelling)
    sound = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
    _require(sound and len(set(names)) == len(names) > 0, "classes is no tuple of different names")
    _require(isinstance(leaf.origin(), str) and bool(leaf.origin()), "origin() is no text")
    for other, when in ((again, "made again"), (pickle.loads(pickle.dumps(leaf)), "pickled")):
        _require((other.classes, other.origin()) == (names, leaf.origin()), f"{when}, it has other classes or another origin")
    _refuses("split of a name that is none", lambda: leaf.split("nonsense"), DataError)  # type: ignore[arg-type]
    if leaf.kind != "classification":
        return
    seen: set[str] = set()
    for part in ("train", "validation", "test"):
        images, twin = leaf.split(part), again.split(part)
        _require(part != "train" or len(images) > 0, "the split train is empty")
        keys = [images.key(index) for index in range(len(images))]
        _require(keys == [twin.key(index) for index in range(len(twin))], f"made again, its split {part} has other images")
        _require(len(set(keys)) == len(keys), f"two images of {part} have one key")
        _require(not seen & set(keys), f"{part} shares images with another split, such as {min(seen & set(keys), default='')}")
        seen |= set(keys)
        _check_images(images, part, len(names), most)


def _check_images(images: LabelledImages, part: str, classes: int, most: int) -> None:
    from PIL import Image

    copy, read = pickle.loads(pickle.dumps(images)), 0
    for index in sorted({n * (len(images) - 1) // max(most - 1, 1) for n in range(most)} if len(images) else ()):
        try:
            image, label = images[index]
            twin, other = copy[index]
        except BadImageError:  # a user's set may have one
            continue
        _require(isinstance(image, Image.Image) and image.mode == "RGB", f"{part}[{index}] is no PIL image in RGB")
        _require(
            type(label) is int and 0 <= label < classes,
            f"{part}[{index}] has the label {label!r}: expected a whole number in 0..{classes - 1}",
        )
        same = label == other and image.size == twin.size and image.tobytes() == twin.tobytes()
        _require(same, f"pickled, {part}[{index}] is another image")
        read += 1
    _require(read > 0 or len(images) == 0, f"none of the images of {part} that were tried can be read")
    for index in (-1, len(images), len(images) + 10**9):
        try:
            images[index]
        except IndexError:
            continue
        raise ContractError(f"{part}[{index}] of {len(images)} images is no IndexError")


def _leaf(kind: str, spelling: str) -> Any:
    leaf = registry.create(kind, spelling)
    frozen = getattr(getattr(leaf, "__dataclass_params__", None), "frozen", False)
    _require(frozen, f"{type(leaf).__name__} is not a frozen dataclass")
    _require(bool(type(leaf).__doc__), f"{type(leaf).__name__} has no docstring")
    return leaf


def _probe(leaf: Any) -> str | None:
    answer = leaf.probe()
    said = answer is None or (isinstance(answer, str) and bool(answer.strip()) and "\n" not in answer)
    _require(said, f"probe() returned {answer!r}: None or one sentence")
    return answer if isinstance(answer, str) else None


def _refuses(what: str, call: Callable[[], Any], kinds: type[EdgejouleError] | tuple[type[EdgejouleError], ...]) -> None:
    try:
        call()
    except kinds:
        return
    except Exception as error:
        raise ContractError(f"{what} raises {type(error).__name__}, a foreign exception: map it to ours") from error
    raise ContractError(f"{what} raises nothing")


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise ContractError(promise)
