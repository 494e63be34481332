"""The worker that writes mlprograms: runs in the environment that has coremltools, on any system. ``coreml.py`` gives it the job.

    {program, package, precision, target, images} -> {opset, inputs, outputs, operators, products, notes}

``program`` is a saved ExportedProgram, ``images`` a .npy of real images for int8 (calibration; ranges are chosen by a second .npy,
``held``). Activations are quantised by coremltools' own pass, but the ranges are observed in torch: its own observer runs the model,
which only a Mac can. Knows no artifact and no manifest.
"""

from __future__ import annotations

import operator
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejoule import environments
from edgejoule.compile.mlprogram import facts_of
from edgejoule.errors import BackendError

RANGES: Mapping[str, float] = {"minmax": 0.0, "percentile 99.99": 0.01, "percentile 99.9": 0.1}  # cut off at each end, percent
MOST_IMAGES = 32  # that ranges are observed on, and chosen by
LEVELS = 127  # of symmetric int8 weights
PRODUCTS = ("linear", "conv")
IMAGES = "images"


def main() -> int:
    return environments.answer(convert)


def convert(job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises BackendError where coremltools refuses the network."""
    import coremltools as ct
    import numpy as np
    import torch

    program = _folded(torch.export.load(job["program"]))
    half = job["precision"] != "fp32"
    shape = tuple(next(iter(program.module().graph.find_nodes(op="placeholder"))).meta["val"].shape)
    try:
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, job["target"]),
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            inputs=[ct.TensorType(name=IMAGES, shape=shape, dtype=np.float32)],
            outputs=[ct.TensorType(name="logits", dtype=np.float32)],  # or else half precision, as the program
            skip_model_load=True,
        )
    except NotImplementedError as error:
        raise BackendError(f"Core ML has no counterpart of an operation ({error}): use another backend or network") from error
    notes: dict[str, str] = {}
    if job["precision"] == "int8":
        model, notes = _quantised(model, program, job)
    package = Path(job["package"])
    model.save(str(package))
    _strip(package)
    return {**facts_of(ct.models.MLModel(str(package), skip_model_load=True).get_spec()), "notes": notes}


def _folded(program: Any) -> Any:
    """What depends on weights alone is computed once: position tables that are resized at every inference would be refused."""
    import torch
    from torch._inductor.constant_folding import constant_fold

    module = program.module()
    with torch.no_grad():
        constant_fold(module)
        example = torch.zeros(tuple(next(iter(module.graph.find_nodes(op="placeholder"))).meta["val"].shape))
        return torch.export.export(module, (example,), strict=False).run_decompositions({})


def _strip(package: Path) -> None:
    """Only what load needs: coremltools leaves a table for ExecuTorch's debugger beside the model."""
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    for folder in package.rglob("__pycache__"):
        shutil.rmtree(folder)


# ---------------------------------------------------------------- int8


def _quantised(model: Any, program: Any, job: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """Weights per channel and symmetric, inputs of linear and convolution asymmetric, all else in half precision."""
    import coremltools.optimize.coreml as quantize
    import numpy as np

    inputs = _inputs_of_products(model)
    calibration, held = (np.load(job[name])[:MOST_IMAGES] for name in ("images", "held"))
    tried = {}
    for name, cut in RANGES.items():
        seen = observe(program, calibration, set(inputs.values()), cut)
        tried[name] = (emulated_error(program, held, seen), seen)
    chosen = min(tried, key=lambda name: tried[name][0])
    stats = {variable: tried[chosen][1][node] for variable, node in inputs.items() if node in tried[chosen][1]}
    model = _with_activations(model, stats)
    each = quantize.OpLinearQuantizerConfig(mode="linear_symmetric", granularity="per_channel", weight_threshold=1)
    weights = {op.inputs["weight"].name: each for op in _products(model)}  # by name: biases may be shared with other operators
    model = quantize.linear_quantize_weights(model, quantize.OptimizationConfig(op_name_configs=weights))
    notes = {
        "ranges": chosen,
        "held-out error": f"{tried[chosen][0]:.2g} of the logits' norm ({len(held)} images, emulated in torch)",
        "tried": ", ".join(f"{name} {error:.2g}" for name, (error, _) in tried.items()),
    }
    return model, notes


def _inputs_of_products(model: Any) -> dict[str, str]:
    """{variable of the mlprogram that a linear or convolution reads: the exported program's node of that value}."""
    found = {}
    for op in _products(model):
        name = op.inputs["x"].name
        found[name] = IMAGES if name in (IMAGES, f"{IMAGES}_to_fp16") else name.removesuffix("_cast_fp16")
    return found


def _products(model: Any) -> list[Any]:
    """coremltools' own operators of a converted model. It has no public name for them."""
    return [op for op in model._mil_program.functions["main"].operations if op.op_type in PRODUCTS]


def observe(program: Any, images: Any, wanted: set[str], cut: float) -> dict[str, dict[str, float]]:
    """{node: {rmin, rmax}} over ``images`` (N, C, H, W), without the outermost ``cut`` percent of each batch's values at either end."""
    import numpy as np
    import torch

    seen: dict[str, dict[str, float]] = {}

    class Observer(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            value = super().run_node(node)
            name = IMAGES if node.op == "placeholder" else node.name
            first = value[0] if isinstance(value, (tuple, list)) else value  # of a normalisation, which gives its statistics too
            if name in wanted and isinstance(first, torch.Tensor):
                low, high = np.percentile(first.detach().numpy(), (cut, 100 - cut))
                old = seen.get(name, {"rmin": low, "rmax": high})
                seen[name] = {"rmin": min(float(low), old["rmin"]), "rmax": max(float(high), old["rmax"])}
            return value

    _run(program, Observer, images)
    return seen


def emulated_error(program: Any, images: Any, ranges: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over images of ||quantised - float|| / ||float|| of the logits: weights and inputs rounded as the mlprogram will, in torch."""
    import torch

    aten = torch.ops.aten
    products = (aten.linear.default, aten.conv2d.default, aten.convolution.default)

    class Rounded(torch.fx.Interpreter):
        def run_node(self, node: Any) -> Any:
            source: Any = node.args[0] if node.target in products else None
            if getattr(source, "target", None) is operator.getitem:
                source = source.args[0]
            self._range = ranges.get(IMAGES if getattr(source, "op", "") == "placeholder" else getattr(source, "name", ""))
            return super().run_node(node)

        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in products and self._range is not None:
                args = (_rounded_input(args[0], self._range), _rounded_weight(args[1]), *args[2:])
            return super().call_function(target, args, kwargs)

    wanted, found = (_run(program, kind, images) for kind in (torch.fx.Interpreter, Rounded))  # (N, K)
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-12)).mean())


def _rounded_input(x: Any, seen: Mapping[str, float]) -> Any:
    low, high = min(seen["rmin"], 0.0), max(seen["rmax"], 0.0)
    scale = (high - low) / (2 * LEVELS + 1) or 1.0
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 2 * LEVELS + 1).sub(zero) * scale


def _rounded_weight(weight: Any) -> Any:
    scale = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp_min(1e-12) / LEVELS
    return (weight / scale).round() * scale


def _run(program: Any, kind: Any, images: Any) -> Any:
    """The logits (N, K) of whole batches, by an fx interpreter."""
    import torch

    module = program.module()
    batch = next(iter(module.graph.find_nodes(op="placeholder"))).meta["val"].shape[0]
    interpreter = kind(module)
    with torch.no_grad():
        parts = [interpreter.run(torch.from_numpy(images[i : i + batch])) for i in range(0, len(images) - batch + 1, batch)]
        return torch.cat([part[0] if isinstance(part, (tuple, list)) else part for part in parts])


def _with_activations(model: Any, stats: Mapping[str, Mapping[str, float]]) -> Any:
    """coremltools' pass that puts quantize and dequantize before operators; those whose range nobody saw stay in float.

    As its ``linear_quantize_activations`` does, but with ranges from outside, and inputs only.
    """
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils
    from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig

    asymmetric = OpLinearQuantizerConfig(mode="linear")
    unseen = [op.name for op in _products(model) if op.inputs["x"].name not in stats]
    config = OptimizationConfig(op_type_configs=dict.fromkeys(PRODUCTS, asymmetric), op_name_configs=dict.fromkeys(unseen))
    insert = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
    insert.set_options([PassOption("config", config), PassOption("activation_stats", dict(stats))])
    return utils._apply_graph_pass(
        model, [insert], spec_version=model.get_spec().specificationVersion, pymil_load_func=milproto.load, skip_model_load=True
    )


if __name__ == "__main__":
    sys.exit(main())
