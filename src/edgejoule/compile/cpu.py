"""What this machine's processor can do, read from Linux's /proc/cpuinfo. Times nothing and runs nothing."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86: Cooper Lake and Zen 4 on, Sapphire Rapids on; arm64: ARMv8.6
FP16_FLAGS = frozenset({"avx512_fp16", "asimdhp"})  # x86: Sapphire Rapids on; arm64: ARMv8.2 with FP16

EXACT_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # x86: 8-bit products summed in 32 bits at once; older ones saturate at 16


def flags(cpuinfo: Path | None = None) -> frozenset[str] | None:
    """The instruction sets that the first core names; None where the system does not say (no /proc/cpuinfo)."""
    try:
        text = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def sums_exactly(cpuinfo: Path | None = None) -> bool | None:
    """Whether an x86 processor sums 8-bit products in 32 bits, so that they cannot saturate; None elsewhere, and where nobody says."""
    found = flags(cpuinfo)
    return None if found is None or "sse2" not in found else bool(EXACT_INT8 & found)


def has_bf16(cpuinfo: Path | None = None) -> bool | None:
    """Whether the processor multiplies bfloat16 natively; None where the system does not say."""
    found = flags(cpuinfo)
    return None if found is None else bool(BF16_FLAGS & found)


def has_fp16(cpuinfo: Path | None = None) -> bool | None:
    """Whether the processor multiplies float16 natively; None where the system does not say. Converting alone (f16c) is not enough."""
    found = flags(cpuinfo)
    return None if found is None else bool(FP16_FLAGS & found)
