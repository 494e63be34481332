"""Core ML programs are written and read back here, and say that they run on a Mac; what their session does is seen on a stand-in.

What needs coremltools is skipped with the sentence that says how to get it.
"""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgejoule import environments, registry
from edgejoule.compile import coreml_worker
from edgejoule.compile.coreml import MODEL, NAMED, PACKAGE, CoreMl, _check, placement_of
from edgejoule.compile.export import TorchExport
from edgejoule.errors import ArtifactError, BackendError, SpecError
from edgejoule.seams import CompileContext
from tests.networks import in_folder, live

SHAPE = (1, 3, 160, 160)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> TorchExport:
    return TorchExport(live("test_vit"), SHAPE, tmp_path_factory.mktemp("export"), "test_vit")


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(1).normal(size=(4, *SHAPE[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def compiled(export: TorchExport, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """precision -> (folder, notes), made once."""
    made: dict[str, tuple[Path, dict[str, str]]] = {}

    def of(precision: str) -> tuple[Path, dict[str, str]]:
        backend = registry.create("backend", f"coreml(precision={precision!r})")
        if (missing := backend.probe()) is not None:
            pytest.skip(missing)
        if precision not in made:
            folder, notes = tmp_path_factory.mktemp(precision), {}
            context = CompileContext(SHAPE, folder, lambda: images, note=lambda what, chosen: notes.__setitem__(what, chosen))
            assert backend.compile(export, context) == folder / PACKAGE
            made[precision] = folder, notes
        return made[precision]

    return of


@pytest.mark.parametrize(("precision", "most_bytes"), [("fp32", 1_600_000), ("fp16", 850_000), ("int8", 550_000)])
def test_the_program_is_what_was_asked_for(precision: str, most_bytes: int, compiled: Any) -> None:
    folder, notes = compiled(precision)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {f"{PACKAGE}/Manifest.json", MODEL, f"{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin"}
    assert sum(files.values()) < most_bytes
    assert notes["products"] == f"26 {precision}" and "CoreML7" in notes["operators"]
    if precision == "int8":
        assert notes["kept in float"] == "none" and float(notes["held-out error"].split()[0]) < 0.1


def test_the_environment_is_named_in_the_toolchain(compiled: Any) -> None:
    compiled("fp16")
    assert CoreMl().toolchain()["coremltools"].startswith("9.")


def test_a_network_that_core_ml_cannot_express_is_refused_in_one_sentence(tmp_path: Path, images: Any) -> None:
    import torch

    if (missing := CoreMl().probe()) is not None:
        pytest.skip(missing)

    class Odd(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return torch.special.bessel_j0(images.flatten(1)[:, :5])

    with pytest.raises(BackendError) as caught:
        CoreMl().compile(TorchExport(Odd().eval(), SHAPE, tmp_path), CompileContext(SHAPE, tmp_path, lambda: images))
    assert "\n" not in str(caught.value) and "use another backend" in str(caught.value)


def test_where_it_cannot_run_it_says_so_and_loading_says_the_same(tmp_path: Path) -> None:
    why = CoreMl().runs_here()
    if why is None:
        pytest.skip("this is a Mac with coremltools")
    assert "\n" not in why and ("Mac" in why or "doctor --install coreml" in why)
    with pytest.raises(BackendError) as caught:
        CoreMl().load(in_folder(tmp_path), threads=1)
    assert str(caught.value) == why


def test_units_decide_the_device() -> None:
    assert CoreMl(units="cpu_only").device == "cpu" and CoreMl().device == "apple"
    for spelling in ('coreml(units="npu")', 'coreml(precision="bf16")', 'coreml(target="iOS13")'):
        with pytest.raises(SpecError):
            registry.create("backend", spelling)


FACTS: dict[str, Any] = {
    "inputs": [["images", list(SHAPE), "float32"]],
    "outputs": [["logits", [1, 1000], "float32"]],
    "products": {"a": "int8", "b": "int8", "c": "fp16"},
}


def test_a_program_that_is_not_what_was_asked_for_is_refused() -> None:
    _check(FACTS, "int8", SHAPE)
    with pytest.raises(BackendError, match="asked for fp16"):
        _check(FACTS, "fp16", SHAPE)
    with pytest.raises(BackendError, match="asked for int8"):
        _check({**FACTS, "products": {"a": "int8", "b": "fp16", "c": "fp16"}}, "int8", SHAPE)
    with pytest.raises(BackendError, match="takes"):
        _check({**FACTS, "inputs": [["images", list(SHAPE), "float16"]]}, "int8", SHAPE)
    with pytest.raises(BackendError, match="takes"):
        _check({**FACTS, "outputs": [["var_3", [1, 1000], "float32"]]}, "int8", SHAPE)


def test_int8_without_images_is_refused(export: TorchExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "missing", lambda name: None)
    with pytest.raises(BackendError, match="at least 1 images to calibrate"):
        CoreMl("int8").compile(export, CompileContext(SHAPE, tmp_path, lambda: None))


# ---------------------------------------------------------------- ranges, which torch sees


def test_ranges_are_those_of_the_inputs_of_products_and_cut_as_told(images: Any) -> None:
    import torch

    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, 16), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(400, 7)).eval()
    program = torch.export.export(module, (torch.zeros(SHAPE),), strict=False)
    names = {node.name for node in program.graph.nodes if node.op == "call_function"}
    seen = coreml_worker.observe(program, images, {"images", "relu", "flatten", "nowhere"}, 0.0)
    assert seen.keys() == {"images", *({"relu", "flatten"} & names)} and seen["relu"]["rmin"] == 0.0
    assert seen["images"] == {"rmin": pytest.approx(images.min()), "rmax": pytest.approx(images.max())}
    cut = coreml_worker.observe(program, images, {"images"}, 0.1)["images"]
    assert cut["rmax"] < seen["images"]["rmax"] * 0.8
    assert coreml_worker.emulated_error(program, images, {}) == 0.0
    fine = coreml_worker.emulated_error(program, images, seen)
    coarse = coreml_worker.emulated_error(program, images, {name: {"rmin": -300.0, "rmax": 300.0} for name in seen})
    assert 1e-4 < fine < 0.05 < coarse


# ---------------------------------------------------------------- the session, on a stand-in for a Mac


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Any:
    """coremltools as a Mac has it, as far as the session uses it: every prediction is the images' first 1000 values, doubled."""
    monkeypatch.setattr("edgejoule.compile.coreml.platform.system", lambda: "Darwin")
    monkeypatch.setattr(environments, "missing", lambda name: None)
    monkeypatch.setattr("edgejoule.compile.coreml.facts_of", lambda spec: FACTS)
    loaded: list[Any] = []

    class MLModel:
        def __init__(self, path: str, compute_units: str) -> None:
            if (Path(path) / "Manifest.json").read_text() != "{}":
                raise RuntimeError("Error reading protobuf spec. validator error: line one\nline two")
            loaded.append(compute_units)

        def get_spec(self) -> None:
            return None

        def predict(self, data: dict[str, Any]) -> dict[str, Any]:
            return {"logits": data["images"].reshape(1, -1)[:, :1000].astype(np.float16) * 2}

    ct = types.ModuleType("coremltools")
    units = types.SimpleNamespace(ALL="ALL", CPU_ONLY="CPU_ONLY", CPU_AND_GPU="CPU_AND_GPU", CPU_AND_NE="CPU_AND_NE")
    ct.__dict__.update(__version__="9.0", ComputeUnit=units, models=types.SimpleNamespace(MLModel=MLModel))
    monkeypatch.setitem(sys.modules, "coremltools", ct)
    return loaded


def package(folder: Path) -> Path:
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).write_bytes(b"spec")
    (folder / PACKAGE / "Manifest.json").write_text("{}")
    return folder


def test_a_session_asks_for_its_units_and_gives_float32(mac: Any, images: Any, tmp_path: Path) -> None:
    session = CoreMl("int8", units="cpu_and_ne").load(in_folder(package(tmp_path)), threads=1)
    assert mac == ["CPU_AND_NE"]
    logits = session.infer(images[:1])["logits"]
    assert logits.dtype == np.float32 and np.allclose(logits, images[:1].reshape(1, -1)[:, :1000] * 2, atol=1e-2)
    info = session.info()
    assert (info.precision, info.providers, info.runtime, info.threads) == ("int8", ("cpu_and_ne",), "coremltools 9.0", 1)
    assert [(port.name, port.shape) for port in (*info.inputs, *info.outputs)] == [("images", SHAPE), ("logits", (1, 1000))]
    with pytest.raises(BackendError, match="expected float32"):
        session.infer(images)
    session.close()
    with pytest.raises(BackendError, match="one stream"):
        CoreMl().load(in_folder(tmp_path), threads=1, streams=2)


def test_a_mac_without_compute_plans_is_no_failure(mac: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = CoreMl("int8").load(in_folder(package(tmp_path)), threads=1)
    monkeypatch.setattr("edgejoule.compile.coreml.platform.mac_ver", lambda: ("13.6.1", ("", "", ""), "arm64"))
    assert session.audit(images[:1]) is None
    plans = types.ModuleType("coremltools.models.compute_plan")
    plans.__dict__["MLComputePlan"] = None
    monkeypatch.setitem(sys.modules, plans.__name__, plans)
    for newer in ("15.1", "10.16"):  # which is what an interpreter made for an older system takes any newer one for
        monkeypatch.setattr("edgejoule.compile.coreml.platform.mac_ver", lambda newer=newer: (newer, ("", "", ""), "arm64"))
        with pytest.raises(BackendError, match="no compute plan"):  # asked for where macOS has them
            session.audit(images[:1])


def test_damaged_packages(mac: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        CoreMl().load(in_folder(tmp_path), threads=1)
    (package(tmp_path) / PACKAGE / "Manifest.json").write_text("not a model")
    with pytest.raises(ArtifactError, match="line one\\)") as caught:
        CoreMl().load(in_folder(tmp_path), threads=1)
    assert "\n" not in str(caught.value)


def test_the_handover_runs_without_edgejoule(mac: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = CoreMl(units="cpu_and_gpu").handover(in_folder(package(tmp_path)))
    ast.parse(how.python)
    assert len(how.python.splitlines()) <= 10 and ".cpuAndGPU" in how.cpp and "coremltools" in how.install
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "edgejoule", None)
    scope: dict[str, Any] = {}
    exec(how.python, scope)
    assert scope["run"](images[:1]).shape == (1, 1000) and mac == ["CPU_AND_GPU"]


def test_placement_is_where_most_operators_go_and_what_the_others_run() -> None:
    usages = [("ios17.linear", "MLNeuralEngineComputeDevice")] * 5 + [("ios16.cast", "MLCPUComputeDevice")] * 2
    found = placement_of(usages, {"fp16": 5})
    assert (found.nodes, found.delegated, dict(found.fallbacks), found.precisions) == (7, 5, {"cast": 2}, {"fp16": 5})
    assert placement_of([], {}).nodes == 0


def test_a_program_that_stays_on_the_cpu_did_not_go_to_the_unit_that_was_named() -> None:
    usages = [("ios17.linear", "MLCPUComputeDevice")] * 5
    assert placement_of(usages, {}).delegated == placement_of(usages, {}, "cpu").delegated == 5
    found = placement_of(usages, {}, "neural engine")
    assert (found.nodes, found.delegated, dict(found.fallbacks)) == (5, 0, {"linear": 5})
    assert {CoreMl(units=units).device for units in NAMED if NAMED[units] != "cpu"} == {"apple"}, "else the gate would not look"
