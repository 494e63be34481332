"""Which NVIDIA GPU is meant where nobody names one: the first that CUDA programs see. Asks NVML, which the caller has started.

NVML counts by PCI bus and does not know CUDA_VISIBLE_DEVICES; CUDA counts by PCI bus where CUDA_DEVICE_ORDER is PCI_BUS_ID, which
the worker sees to. Standard library only.
"""

from __future__ import annotations

import os
from typing import Any

from edgejoule.measure.cuda import torch_cuda

HOT = 0x08 | 0x20 | 0x40 | 0x80  # hardware slowdown, software and hardware thermal, power brake
CAPPED = 0x04  # software power cap


def first_visible(nvml: Any) -> Any:
    """NVML's handle of the first GPU in CUDA_VISIBLE_DEVICES (a number, or a UUID that may be cut short), else of GPU 0.

    Raises NVMLError where there is no such GPU.
    """
    uuid = _torchs_own()
    if uuid:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip()
    if not first.startswith("GPU-"):
        # A MIG slice has no energy of its own, and NVML says so of its handle.
        return nvml.nvmlDeviceGetHandleByUUID(first) if first.startswith("MIG-") else nvml.nvmlDeviceGetHandleByIndex(_number(first))
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        if (uuid.decode() if isinstance(uuid, bytes) else uuid).startswith(first):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(first)


def clock_reasons(nvml: Any, handle: Any) -> int | None:
    """Why NVML says that the clock is held down now, as bits (HOT, CAPPED); None where board, driver or package does not tell."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):  # renamed with CUDA 12.2
        try:
            return int(getattr(nvml, name)(handle))
        except (nvml.NVMLError, AttributeError):
            continue
    return None


def clock_doubts(reasons: int) -> dict[str, str]:
    """{caveat code: what was seen} of those bits."""
    found = {"throttled": f"GPU clock reasons {reasons & HOT:#x}"} if reasons & HOT else {}
    return found | ({"power_capped": "GPU software power cap"} if reasons & CAPPED else {})


def _torchs_own() -> str:
    """The UUID of the GPU that torch computes on now; empty where torch has not begun, or does not tell."""
    cuda = torch_cuda()
    if cuda is None:
        return ""
    uuid = getattr(cuda.get_device_properties(cuda.current_device()), "uuid", None)
    return "" if uuid is None else f"GPU-{uuid}"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
