"""One network in the forms that backends start from: module, ExportedProgram, ONNX file; each made once, when asked for.

Knows torch's two exporters and nothing of runtimes, caches or model zoos. torch is imported inside the functions, because
a backend that is loaded on a board must be able to import its own file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgejoule.compile.reasons import reason
from edgejoule.errors import BackendError, ModelError, OutputError

OPSET = 20  # the first with a Gelu operator: before it, every GELU is five nodes
INPUT, OUTPUT = "images", "logits"


class TorchExport:
    """``seams.Export`` of a torch network.

    ``module`` is an nn.Module, or a function of no arguments that builds it (called at the first use). ``shape`` is
    (B, C, H, W), static. ``name`` is what errors call the network. A failure is remembered and raised again.
    """

    def __init__(self, module: Any, shape: tuple[int, int, int, int], workdir: Path, name: str = "the network") -> None:
        self._source = module
        self._shape = shape
        self._workdir = workdir
        self._name = name
        self._made: dict[str, Any] = {}

    @property
    def module(self) -> Any:
        """The nn.Module in eval mode, float32, on the CPU. Raises ModelError unless it maps (B, C, H, W) to logits (B, K)."""
        return self._once("module", self._module)

    @property
    def program(self) -> Any:
        """The ExportedProgram of the module at the static shape. Raises ModelError."""
        return self._once("program", lambda: export_program(self.module, self._shape, self._name))

    @property
    def onnx(self) -> Path:
        """The file, opset 20: "images" in, "logits" out, weights inside. Raises ModelError, and OutputError if it cannot be written."""
        path: Path = self._once("onnx", self._onnx)
        return path

    def _once(self, form: str, make: Callable[[], Any]) -> Any:
        if form not in self._made:
            try:
                self._made[form] = make()
            except ModelError as error:
                self._made[form] = error
        if isinstance(self._made[form], ModelError):
            raise self._made[form]
        return self._made[form]

    def _module(self) -> Any:
        import torch

        module = self._source if isinstance(self._source, torch.nn.Module) else self._source()
        module = module.to("cpu", torch.float32).eval()
        # One plain run: tells a wrong input or output before the slow exporters do, and fills caches that some networks
        # (LeViT's attention biases) fill at their first inference, which an exporter would trace as work of every inference.
        with torch.no_grad():
            try:
                logits = module(torch.zeros(self._shape))
            except Exception as error:
                raise ModelError(
                    f"{self._name} does not run on images of shape {self._shape} ({reason(error)}): check its input size"
                ) from error
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[0] != self._shape[0]:
            seen = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise ModelError(f"{self._name} returns {seen} in eval mode, expected logits ({self._shape[0]}, classes): name a classifier")
        return module

    def _onnx(self) -> Path:
        try:
            program = _onnx_program(self.program)
        except Exception as error:
            fused = [part for part in self.module.modules() if getattr(part, "fused_attn", False)]
            if isinstance(error, ModelError) or not fused:
                raise _not_onnx(self._name, error) from error
            program = self._unfused_onnx_program()
        path = self._workdir / "model.onnx"
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            program.save(path, external_data=False)
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror or error}): free some space or choose another folder") from error
        except Exception as error:  # protobuf's limit of 2 GiB
            raise _not_onnx(self._name, error) from error
        return path

    def _unfused_onnx_program(self) -> Any:
        """The exporter translates fused attention of 4-D tensors only; window and mask-unit attention have 5-D: spell it out."""
        twin = copy.deepcopy(self.module)
        for part in twin.modules():
            if getattr(part, "fused_attn", False):
                part.fused_attn = False
        try:
            return _onnx_program(export_program(twin, self._shape, self._name))
        except Exception as error:
            raise _not_onnx(self._name, error) from error


def export_program(module: Any, shape: tuple[int, int, int, int], name: str, dtype: Any = None) -> Any:
    """torch.export of a module in eval mode on (B, C, H, W) images of ``dtype`` (float32). Raises ModelError."""
    import torch

    with torch.no_grad(), quiet():
        try:
            return torch.export.export(module, (torch.zeros(shape, dtype=dtype or torch.float32),), strict=False)
        except Exception as error:
            raise ModelError(
                f"torch.export refuses {name} ({reason(error)}): its forward must not depend on the values of tensors"
            ) from error


def save_program(program: Any, path: Path) -> None:
    """Raises BackendError, and OSError where the folder cannot be written: the caller knows it, and says why."""
    import torch

    try:
        with quiet():
            torch.export.save(program, path)
    except OSError:
        raise
    except Exception as error:
        raise BackendError(f"torch cannot save the exported program ({reason(error)}): use another backend") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps a library's prints, warnings and logs off stdout and stderr: a failed export prints the whole graph there."""
    before, sink = logging.root.manager.disable, io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _onnx_program(program: Any) -> Any:
    import torch

    with torch.no_grad(), quiet():
        return torch.onnx.export(
            program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, external_data=False, verbose=False
        )


def _not_onnx(name: str, error: Exception) -> ModelError:
    if isinstance(error, ModelError):
        return error
    return ModelError(f"{name} cannot be exported to ONNX ({reason(error)}): use the eager backend, or a network without that operation")
