"""The leaf ``custom(target="module:function")``: a user's own network. It runs the user's code, so it is never taken from a study file.

The function returns an ``nn.Module``; it is called with ``num_classes`` if it has such a parameter. A module that
carries timm's ``pretrained_cfg`` or ``default_cfg`` states its own preprocessing; any other gets ImageNet's at 224 px.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgejoule.errors import ModelError, SpecError
from edgejoule.records import ModelSpec, Preprocessing
from edgejoule.zoo.timm import preprocessing_of

IMAGENET_224 = Preprocessing(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class CustomModel:
    """A function of the user's that makes a network: ``module:function``, the module importable or in the working directory."""

    target: str

    def build(self, num_classes: int | None = None, **options: Any) -> torch.nn.Module:
        """Call the function. Raises SpecError where there is no such function and ModelError where it fails or returns no module."""
        function = self._function()
        takes = _parameters(function)
        if num_classes is not None and takes("num_classes"):
            options["num_classes"] = num_classes
        try:
            module = function(**options)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything: name it and go on with the other models
            raise ModelError(f"{self.target} raised {_said(error)}; expected it to return an nn.Module") from error
        if not isinstance(module, torch.nn.Module):
            raise ModelError(f"{self.target} returned {type(module).__name__}, expected an nn.Module")
        return module

    def spec(self) -> ModelSpec:
        """The row of this network, from the module's own configuration where it has one."""
        module = self.build()
        config = _configuration(module)
        classes = getattr(module, "num_classes", None) or config.get("num_classes") or 1000
        return ModelSpec(
            name=self.target,
            family="custom",
            builder=f"custom(target={self.target!r})",
            preprocessing=preprocessing_of(config) if config else IMAGENET_224,
            num_classes=int(classes),
            dataset="unknown",
        )

    def _function(self) -> Callable[..., Any]:
        module_name, colon, function_name = self.target.partition(":")
        if not (colon and module_name and function_name):
            raise SpecError(f"cannot read {self.target!r}: expected module:function")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))  # an installed command does not look there, and users keep model.py there
        try:
            found: Any = getattr(importlib.import_module(module_name), function_name)
        except ImportError as error:
            raise SpecError(f"cannot import {module_name!r} of {self.target!r} ({error}): expected a module on the Python path") from error
        except AttributeError as error:
            raise SpecError(f"{module_name!r} has no {function_name!r}: expected a function that returns an nn.Module") from error
        except (Exception, SystemExit) as error:  # importing runs the user's code too
            raise ModelError(f"importing {module_name!r} raised {_said(error)}; mend it and try again") from error
        if not callable(found):
            raise SpecError(f"{self.target!r} is a {type(found).__name__}, expected a function that returns an nn.Module")
        function: Callable[..., Any] = found
        return function


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _parameters(function: Callable[..., Any]) -> Callable[[str], bool]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have none to show
        return lambda name: False
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return lambda name: anything or name in parameters


def _configuration(module: torch.nn.Module) -> dict[str, Any]:
    for name in ("pretrained_cfg", "default_cfg"):
        found = getattr(module, name, None)
        if dataclasses.is_dataclass(found) and not isinstance(found, type):
            found = dataclasses.asdict(found)
        if isinstance(found, dict) and found:
            return found
    return {}
