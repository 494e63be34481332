"""The versions of installed packages, without importing them. Knows no package by itself: each backend names its own."""

from __future__ import annotations

import importlib.metadata

import edgejoule

EXPORTER = ("torch", "timm")  # what shapes the network and its exported program
ONNX_EXPORTER = (*EXPORTER, "onnx", "onnxscript")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """{package: version} of those that are installed, and our own version."""
    found = {"edgejoule": edgejoule.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an absent package shapes nothing; the backend's probe says what it needs
    return found
