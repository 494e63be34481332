"""Making and loading AOTInductor's packages: what it takes, for which machine one is, and torch's two calls with the options they need.

Compiling works in a temporary folder, torch's caches included, and leaves nothing else behind. Knows no backend.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgejoule.compile import cpu
from edgejoule.compile.aoti_source import FACTS, metadata
from edgejoule.compile.reasons import reason
from edgejoule.compile.torch_program import lacking, shapes_of
from edgejoule.errors import ArtifactError
from edgejoule.plain import digest

TORCHAO = "torchao==0.18.*"
# Instruction sets of x86 that a compiler uses of its own accord where it is told to make code for this very processor.
USED_ON_X86 = re.compile(r"^(avx|amx|fma|f16c|bmi|sse4|ssse3|vaes|vpclmul|gfni|adx|movbe|abm|popcnt|sha_ni|xop|tbm)")


def lacking_int8() -> str | None:
    """One sentence where PT2E's int8 kernels do not run."""
    if (missing := lacking("fp32", "cpu")) is not None:
        return missing
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"inductor's int8 is for x86, this is {platform.machine()}: use onnxruntime or executorch for int8"
    return None


def lacking_to_compile(precision: str, device: str, package: bool) -> str | None:
    """One sentence where a tool is missing that compiles, not runs."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"inductor needs a C++ compiler, and {compiler} is not there: apt install g++, or set CXX"
    if precision == "int8" and importlib.util.find_spec("torchao") is None:
        return f"int8 needs torchao: pip install '{TORCHAO}' with the torch that is installed"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "inductor needs triton for a GPU: pip install triton in the version that this torch names"
    if device == "cuda" and package and not (os.environ.get("CUDA_HOME") or shutil.which("nvcc") or Path("/usr/local/cuda").is_dir()):
        return "a package for a GPU needs CUDA's headers: install the CUDA toolkit and set CUDA_HOME, or use package=False"
    return None


def machine(device: str) -> dict[str, str]:
    """What the machine code depends on besides torch: the compiler, the processor's instructions, the GPU's architecture."""
    found = {"c++": _compiler_version(os.environ.get("CXX", "g++")), "instructions": digest(_instructions())[:12]}
    if device == "cuda":
        import torch

        found["gpu"] = "sm_{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "none"
    return found


@functools.lru_cache
def _compiler_version(compiler: str) -> str:
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "none"
    return said.partition("\n")[0]


def _instructions() -> list[str]:
    found = cpu.flags() or frozenset()
    return sorted(flag for flag in found if platform.machine() != "x86_64" or USED_ON_X86.match(flag))


def compile_package(program: Any, path: Path, device: str, max_autotune: bool) -> None:
    """Compiles an ExportedProgram of float32 images into ``path``. Raises OSError and whatever torch raises."""
    import torch
    from torch._inductor.utils import fresh_cache

    from edgejoule.compile.export import quiet

    images, logits = shapes_of(program)
    facts = {"images": images, "logits": logits, "instructions": _instructions()}
    with tempfile.TemporaryDirectory(prefix="edgejoule-", ignore_cleanup_errors=True) as folder:
        made = Path(folder) / path.name
        options = _options(torch, max_autotune, {FACTS: json.dumps(facts)})
        with quiet(), fresh_cache(dir=folder), torch.no_grad():
            if device == "cuda":
                program = _moved(program, device)
            torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=options)
        shutil.copyfile(made, path)


def _options(torch: Any, max_autotune: bool, told: Mapping[str, str]) -> dict[str, Any]:
    """Those that this version of torch knows."""
    wanted = {
        "freezing": True,  # folds constants, and packs weights for oneDNN
        "max_autotune": max_autotune,
        "cpp.dynamic_threads": True,  # else the number of threads of this process is part of the code
        "cpp.threads": max(2, os.cpu_count() or 2),  # with one, loops would not be made parallel at all
        "aot_inductor.metadata": dict(told),
        "aot_inductor.precompile_headers": False,  # would lie in a folder outside, and pays for many compilations only
        "aot_inductor.enable_line_tables": False,
    }
    known = set(torch._inductor.list_options())
    return {key: value for key, value in wanted.items() if key in known}


def _moved(program: Any, device: str) -> Any:
    """A copy on the device: the program itself belongs to the caller."""
    import io

    import torch
    from torch.export.passes import move_to_device_pass

    held = io.BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    return move_to_device_pass(torch.export.load(held), device)


def check_machine(path: Path) -> Mapping[str, Any]:
    """What compile wrote of the package: {"images": shape, "logits": shape, …}. Raises ArtifactError where it is for another machine."""
    found = metadata(path)
    facts: Mapping[str, Any] = found[FACTS]
    if found.get("AOTI_MACHINE", platform.machine()) != platform.machine():
        raise ArtifactError(f"{path} holds code for {found['AOTI_MACHINE']}, and this is {platform.machine()}: compile on this machine")
    here = cpu.flags()
    absent = sorted(set(facts["instructions"]) - here) if here is not None else []
    if absent:
        raise ArtifactError(f"{path} holds instructions that this processor lacks ({', '.join(absent[:4])}): compile on this machine")
    if found.get("AOTI_DEVICE_KEY") == "cuda":
        _check_gpu(path, str(found.get("AOTI_COMPUTE_CAPABILITY", "")))
    return facts


def _check_gpu(path: Path, made_for: str) -> None:
    import torch

    here = "{}{}".format(*torch.cuda.get_device_capability())
    if made_for and made_for.replace(".", "") != here:
        raise ArtifactError(f"{path} holds kernels for compute capability {made_for}, and this GPU has {here}: compile on this machine")


def load_package(path: Path) -> Callable[[Any], Any]:
    """A function from a float32 tensor (B, C, H, W) to logits (B, K), not for several threads at once. Raises ArtifactError."""
    import torch

    from edgejoule.compile.export import quiet

    try:
        with quiet():
            loader = torch._inductor.aoti_load_package(str(path), run_single_threaded=True).loader
    except Exception as error:
        raise ArtifactError(f"{path} is not a package that torch {torch.__version__} can load ({reason(error)}): compile again") from error
    run = getattr(loader, "boxed_run", loader.run)  # the package's own __call__ parses its signature anew each time

    def call(images: Any) -> Any:
        return run([images])[0]

    return call
