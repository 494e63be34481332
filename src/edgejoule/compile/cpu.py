"""What this machine's processor can do, read from Linux's /proc/cpuinfo. Times nothing and runs nothing."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86: Cooper Lake and Zen 4 on, Sapphire Rapids on; arm64: ARMv8.6


def has_bf16(cpuinfo: Path | None = None) -> bool | None:
    """Whether the processor multiplies bfloat16 natively; None where the system does not say (no /proc/cpuinfo)."""
    try:
        text = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool(BF16_FLAGS & set(value.split()))
    return None
