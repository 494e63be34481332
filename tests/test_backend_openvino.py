"""OpenVINO: int8 that is int8 where it should be and float elsewhere, many streams, no reports to its vendor, no claims unread."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgejoule import data, registry
from edgejoule.compile.export import TorchExport
from edgejoule.compile.openvino_import import core
from edgejoule.errors import BackendError, SpecError
from edgejoule.records import Placement, Preprocessing
from edgejoule.seams import CompileContext, Held
from tests.networks import in_folder, live
from tests.test_backends import relative

BATCH = 2
SHAPE = (BATCH, 3, 160, 160)
INT8 = 'openvino(precision="int8", smoothing=0.5, ranges="minmax")'
BY_ONNXRUNTIME = 'openvino(precision="int8", quantizer="onnxruntime", smoothing="off", ranges="minmax")'
GREY = Preprocessing((3, 160, 160), (0.5,) * 3, (0.5,) * 3)

pytest.importorskip("nncf")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return TorchExport(live("test_vit"), SHAPE, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def photos() -> Any:
    """(8, C, H, W) float32, normalised."""
    return data.normalise(data.crops("photos(n=8)", GREY), GREY)


@pytest.fixture(scope="module")
def compiled(export: Any, photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """spelling -> the folder of the compiled file, made once; ``notes`` are in ``folder/../notes``."""
    made: dict[str, Path] = {}

    def folder_of(spelling: str) -> Path:
        if spelling not in made:
            made[spelling] = tmp_path_factory.mktemp("artifact")
            context = CompileContext(SHAPE, made[spelling], lambda: photos[:4], lambda: Held(photos[4:]))
            registry.create("backend", spelling).compile(export, context)
        return made[spelling]

    return folder_of


@pytest.fixture(scope="module")
def wanted(export: Any, photos: Any) -> Any:
    import torch

    with torch.inference_mode():
        return export.module(torch.from_numpy(photos[:BATCH])).numpy()


def load(spelling: str, folder: Path, **options: Any) -> Any:
    return registry.create("backend", spelling).load(in_folder(folder), **{"threads": 1, **options})


def graph(folder: Path) -> Any:
    return core().read_model(folder / "model.xml")


@pytest.mark.parametrize("spelling", [INT8, BY_ONNXRUNTIME])
def test_int8_runs_every_product_with_weights_in_int8(spelling: str, compiled: Any, photos: Any, wanted: Any) -> None:
    session = load(spelling, compiled(spelling))
    assert 1e-3 < relative(session.infer(photos[:BATCH])["logits"], wanted) < 0.1
    placed = session.audit(photos[:BATCH])
    assert placed.precisions == {"int8": 26} and placed.nodes == placed.delegated > 50 and placed.fallbacks == {}
    assert session.info().precision == "int8" and session.info().providers == ("CPU",)
    assert sorted(path.name for path in compiled(spelling).iterdir()) == ["model.bin", "model.xml"]
    assert (compiled(spelling) / "model.bin").stat().st_size < 0.35 * (compiled("openvino") / "model.bin").stat().st_size


def test_only_products_with_weights_are_quantised_by_default(compiled: Any) -> None:
    from edgejoule.compile.openvino_restore import activation_quantizers, weighted_names

    safe = graph(compiled(INT8))
    assert {name for layers in activation_quantizers(safe).values() for name in layers} == set(weighted_names(safe))
    bolder = graph(compiled(INT8.replace(")", ', scope="attention")')))
    assert {name for layers in activation_quantizers(bolder).values() for name in layers} > set(weighted_names(bolder))


def test_int8_weights_with_float_activations_are_not_called_int8(compiled: Any, tmp_path: Path) -> None:
    import openvino

    from edgejoule.compile.openvino_restore import activation_quantizers, bypass

    model = graph(compiled(INT8))
    for name in activation_quantizers(model):
        model = bypass(model, name)
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    assert b'element_type="i8"' in (tmp_path / "model.xml").read_bytes()
    assert load("openvino", tmp_path).info().precision == "fp32"


def test_float16_storage_halves_the_file_and_computes_in_float32(compiled: Any, photos: Any, wanted: Any) -> None:
    half = 'openvino(storage="fp16")'
    session = load(half, compiled(half))
    assert 1e-6 < relative(session.infer(photos[:BATCH])["logits"], wanted) < 1e-2
    assert session.info().precision == "fp32" and session.audit(photos[:BATCH]).precisions == {"fp32": 26}
    assert (compiled(half) / "model.bin").stat().st_size < 0.51 * (compiled("openvino") / "model.bin").stat().st_size


def test_float16_is_refused_where_openvino_would_run_bfloat16() -> None:
    if "FP16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has float16 instructions")
    assert "no float16" in registry.create("backend", 'openvino(precision="fp16")').probe()
    with pytest.raises(BackendError, match="no float16"):
        load('openvino(precision="fp16")', Path("nowhere"))


def test_the_rest_of_an_int8_file_may_be_bfloat16(compiled: Any, photos: Any, wanted: Any) -> None:
    spelling = INT8.replace(")", ', rest="bf16")')
    if (missing := registry.create("backend", spelling).probe()) is not None:
        pytest.skip(missing)
    session, plain = load(spelling, compiled(INT8)), load(INT8.replace(")", ', rest="fp32")'), compiled(INT8))
    assert session.info().precision == "int8" and session.audit(photos[:BATCH]).precisions == {"int8": 26}
    logits = session.infer(photos[:BATCH])["logits"]
    assert relative(logits, wanted) < 0.1 and relative(logits, plain.infer(photos[:BATCH])["logits"]) > 1e-4


def test_the_audit_of_float_files(compiled: Any, photos: Any) -> None:
    assert load("openvino", compiled("openvino")).audit(photos[:BATCH]).precisions == {"fp32": 26}
    if registry.create("backend", 'openvino(precision="bf16")').probe() is None:
        assert load('openvino(precision="bf16")', compiled("openvino")).audit(photos[:BATCH]).precisions == {"bf16": 26}


@pytest.mark.parametrize("spelling", ["openvino", INT8])
def test_four_threads_get_their_own_answers(spelling: str, compiled: Any, photos: Any) -> None:
    one, four = load(spelling, compiled(spelling)), load(spelling, compiled(spelling), threads=2, streams=4)
    feeds = [np.ascontiguousarray(photos[place : place + BATCH]) for place in range(4)]
    wanted = [one.infer(feed)["logits"] for feed in feeds]
    wrong: list[int] = []

    def watch(camera: int) -> None:
        for _ in range(20):
            if not np.allclose(four.infer(feeds[camera])["logits"], wanted[camera], rtol=1e-4, atol=1e-4):
                wrong.append(camera)

    cameras = [threading.Thread(target=watch, args=(camera,)) for camera in range(4)]
    for camera in cameras:
        camera.start()
    for camera in cameras:
        camera.join()
    assert wrong == [] and not np.allclose(wanted[0], wanted[1], rtol=1e-2)


def test_submitted_images_are_answered_each_with_its_own(compiled: Any, photos: Any) -> None:
    session = load("openvino", compiled("openvino"), streams=3)
    feeds = [np.ascontiguousarray(photos[place : place + BATCH]) for place in range(6)]
    wanted = [session.infer(feed)["logits"] for feed in feeds]
    answers: dict[int, Any] = {}
    for place, feed in enumerate(feeds * 5):
        session.submit(feed, lambda answer, place=place: answers.update({place: answer}))
    session.close()
    assert sorted(answers) == list(range(30))
    assert all(np.allclose(answer["logits"], wanted[place % 6], rtol=1e-4, atol=1e-5) for place, answer in answers.items())
    with pytest.raises(BackendError, match="closed"):
        session.submit(feeds[0], print)
    with pytest.raises(BackendError, match="closed"):
        session.infer(feeds[0])


def test_a_submitted_inference_that_fails_says_so_and_frees_its_stream(compiled: Any, photos: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    session = load("openvino", compiled("openvino"))
    request = session._idle.get()
    session._idle.put(SimpleNamespace(infer=fail))
    answers: list[Any] = []
    with pytest.raises(BackendError, match="expected float32"):
        session.submit(photos[:1], answers.append)
    session.submit(photos[:BATCH], answers.append)
    assert session._idle.get(timeout=10) is not request
    session._idle.put(request)
    session.submit(photos[:BATCH], answers.append)
    session.close()
    assert isinstance(answers[0], BackendError) and "out of memory" in str(answers[0]) and "logits" in answers[1]


def test_nothing_is_reported_and_nothing_printed(export: Any, photos: Any, tmp_path: Path) -> None:
    """OpenVINO reports that it was imported, NNCF what it does. In a process of its own: under pytest NNCF is silent anyway."""
    np.save(tmp_path / "photos.npy", photos[:BATCH])
    script = f"""
import logging, socket, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import openvino_telemetry
reports = []
openvino_telemetry.Telemetry.init = lambda self, *args, **options: reports.append("init")
openvino_telemetry.Telemetry.send_event = lambda self, *args, **options: reports.append("event")
socket.socket.connect = lambda self, address: reports.append(address)
from edgejoule import registry
from edgejoule.seams import CompileContext
work = Path({str(tmp_path)!r})
kind = logging.getLoggerClass()
context = CompileContext({SHAPE}, work, lambda: np.load(work / "photos.npy"))
registry.create("backend", {INT8!r}).compile(SimpleNamespace(onnx=Path({str(export.onnx)!r})), context)
from tests.networks import in_folder
registry.create("backend", {INT8!r}).load(in_folder(work), threads=1).infer(np.load(work / "photos.npy"))
assert sys.modules["openvino_telemetry"] is openvino_telemetry and logging.getLoggerClass() is kind
assert "nncf" in sys.modules and (work / "model.xml").exists() and not reports, reports
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_an_interrupt_after_two_sessions_is_an_interrupt(compiled: Any, photos: Any, tmp_path: Path) -> None:
    """OpenVINO's plugins leave an unmapped stack for signal handlers where they end in the order in which they began."""
    np.save(tmp_path / "photos.npy", photos[:BATCH])
    script = f"""
import gc, os, signal
from pathlib import Path
import numpy as np
from edgejoule import registry
from tests.networks import in_folder
sessions = [registry.create("backend", "openvino").load(in_folder(Path({str(compiled("openvino"))!r})), threads=1) for _ in range(2)]
sessions[0].audit(np.load({str(tmp_path / "photos.npy")!r}))
while sessions:
    sessions.pop(0).close()
    gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def outlier_network() -> Any:
    """(B, 3, 8, 8) -> (B, 10); a channel before the last layer is 1000 times the others' size, and the last layer leaves it out."""
    import torch

    torch.manual_seed(0)
    first, last = torch.nn.Linear(192, 64), torch.nn.Linear(64, 10)
    with torch.no_grad():
        first.weight[5] *= 1000
        last.weight[:, 5] = 0
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.GELU(), last).eval()


def pooled_network() -> Any:
    """(B, 3, 8, 8) -> (B, 10): a patch embedding, the mean of the tokens, a linear layer; channels differ in size, as smoothing expects."""
    import torch

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Conv2d(3, 64, 2, 2), torch.nn.Linear(64, 10)

        def forward(self, images: Any) -> Any:
            return self.head(torch.nn.functional.gelu(self.embed(images)).flatten(2).transpose(1, 2).mean(1))

    torch.manual_seed(0)
    network = Pooled().eval()
    with torch.no_grad():
        network.embed.weight *= torch.linspace(0.5, 8, 64).reshape(-1, 1, 1, 1)
    return network


def quantised(
    tmp_path: Path, options: str, network: Callable[[], Any] = outlier_network, **context: Any
) -> tuple[dict[str, str], Placement]:
    """The notes and the placement of a network."""
    images = np.random.default_rng(2).normal(size=(24, 3, 8, 8)).astype(np.float32)
    export, notes = TorchExport(network(), (4, 3, 8, 8), tmp_path / "export"), {}
    (tmp_path / "work").mkdir()
    held = context.pop("held", lambda: Held(images[8:]))
    order = CompileContext((4, 3, 8, 8), tmp_path / "work", lambda: images[:8], held, note=notes.__setitem__, **context)
    spelling = f'openvino(precision="int8", {options})'
    registry.create("backend", spelling).compile(export, order)
    return notes, load(spelling, tmp_path / "work").audit(images[:4])


def test_a_layer_that_hurts_goes_back_to_float(tmp_path: Path) -> None:
    notes, placed = quantised(tmp_path, 'smoothing="off", ranges="minmax"', max_drop_pct=20.0)
    assert notes["quantized"] == "1 of 2 products with weights" and placed.precisions == {"int8": 1, "fp32": 1}
    assert float(notes["held-out error, min-max without smoothing"]) > 0.5 > 0.2 > float(notes["held-out error"].split()[0])
    assert float(notes["held-out drop"].partition(" points of agreement")[0]) <= 20


@pytest.mark.parametrize("options", ["smoothing=0.5", "smoothing=0.95", 'smoothing=0.5, quantizer="onnxruntime"'])
def test_pooled_tokens_may_be_smoothed(options: str, tmp_path: Path) -> None:
    notes, placed = quantised(tmp_path, f'{options}, ranges="minmax", search=False', pooled_network)
    assert placed.precisions == {"int8": 2} and float(notes["held-out error"].split()[0]) < 0.2  # was 1.9 and more


def test_without_a_search_it_stays_and_the_note_says_so(tmp_path: Path) -> None:
    notes, placed = quantised(tmp_path, 'smoothing="off", ranges="minmax", search=False')
    assert "lost on" in notes["over budget"] and placed.precisions == {"int8": 2}


def test_a_wider_budget_is_used(tmp_path: Path) -> None:
    notes, _ = quantised(tmp_path, 'smoothing="off", ranges="minmax"', max_drop_pct=100.0)
    assert notes["quantized"] == "2 of 2 products with weights" and "over budget" not in notes


def test_labels_are_the_truth_where_they_are_known(tmp_path: Path) -> None:
    images = np.random.default_rng(2).normal(size=(24, 3, 8, 8)).astype(np.float32)
    labels = np.full(16, 10)  # no answer is right, so nothing can be lost
    notes, placed = quantised(tmp_path, 'smoothing="off", ranges="minmax"', held=lambda: Held(images[8:], labels))
    assert notes["held-out drop"].startswith("0 points of top-1 (one image of ") and placed.precisions == {"int8": 2}


def test_smoothing_and_ranges_are_chosen_by_the_error(tmp_path: Path) -> None:
    notes, _ = quantised(tmp_path, "search=False")
    errors = {name: float(error) for name, error in (entry.rsplit(" ", 1) for entry in notes["tried"].split(", "))}
    assert {name.split()[0] for name in errors} == {"off", "0.15", "0.5", "0.95"} and {name.split()[1] for name in errors} == {
        "minmax",
        "percentile",
        "mse",
    }
    assert errors[f"{notes['smoothing']} {notes['ranges']}"] == min(errors.values()) < errors["off minmax"]


def test_calibration_without_images_is_refused(export: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="images to calibrate"):
        registry.create("backend", INT8).compile(export, CompileContext(SHAPE, tmp_path, lambda: np.zeros((0, 3, 160, 160), np.float32)))


@pytest.mark.parametrize("spelling", ["openvino", INT8])
def test_the_handover_runs_without_edgejoule(spelling: str, compiled: Any, photos: Any, tmp_path: Path) -> None:
    folder = compiled(spelling)
    how = registry.create("backend", spelling).handover(in_folder(folder))
    assert how.install.startswith("pip install openvino") and "numpy" in how.install and how.python.count("\n") <= 10
    stated = spelling != INT8  # what is not int8 is left to the device
    assert ("f32" in how.cpp) == ("f32" in how.python) == stated and "compile_model" in how.cpp
    np.save(tmp_path / "images.npy", photos[:BATCH])
    check = """
import numpy, pathlib, sys
here = pathlib.Path(__file__).parent
numpy.save(here / "logits.npy", run(numpy.load(here / "images.npy")))
assert not {"edgejoule", "torch", "nncf"} & set(sys.modules)
"""
    (tmp_path / "run.py").write_text(how.python + check)
    subprocess.run([sys.executable, str(tmp_path / "run.py")], cwd=folder, check=True)
    assert np.allclose(np.load(tmp_path / "logits.npy"), load(spelling, folder).infer(photos[:BATCH])["logits"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_devices_that_are_not_here_are_named(device: str) -> None:
    backend = registry.create("backend", f'openvino(device="{device}")')
    if any(found.startswith(device.upper()) for found in core().available_devices):
        pytest.skip(f"this machine has a {device}")
    assert f"sees no {device.upper()}" in backend.probe() and "cpu" in backend.probe()
    with pytest.raises(BackendError, match=f"sees no {device.upper()}"):
        backend.load(in_folder(Path("nowhere")), threads=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ('scope="all"', "use it with precision='int8'"),
        ('rest="bf16"', "use it with precision='int8'"),
        ('precision="int8", smoothing="fold"', "not one of nncf's"),
        ('precision="int8", smoothing=1.5', "between 0 and 1"),
        ('precision="int8", quantizer="olive"', "expected"),
    ],
)
def test_options_that_do_not_go_together(options: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        registry.create("backend", f"openvino({options})")


def test_a_board_that_runs_int8_files_needs_no_quantiser(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = compiled(INT8)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend = registry.create("backend", INT8)
    assert "nncf, which quantises, is not installed" in backend.probe()
    assert backend.load(in_folder(folder), threads=1).info().precision == "int8"


def test_what_quantises_is_part_of_the_toolchain() -> None:
    assert "nncf" in registry.create("backend", INT8).toolchain()
    assert "nncf" not in registry.create("backend", "openvino").toolchain()
    assert "onnxruntime" in registry.create("backend", BY_ONNXRUNTIME).toolchain()
