"""What this machine is and does best: device, dtype found by a short timing, versions.

bf16 is several times faster than fp32 on CPUs with bf16 products and slower on those without; a few milliseconds of
timing replace a list of CPU names. It knows no model.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from typing import Any

import torch

from kitout.version import __version__

MIN_BF16_SPEEDUP = 1.3  # bf16 must be this much faster to be chosen: fp32 is the safer format
ROWS, INPUTS, OUTPUTS = 512, 576, 1536  # of the product that is timed
FLOATING_POINT_OPERATIONS = 2 * ROWS * INPUTS * OUTPUTS


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(
    requested: str, device: torch.device, seconds: Mapping[torch.dtype, float] | None = None
) -> tuple[torch.dtype, str]:
    """The dtype of the frozen weights and why. requested: "auto", "fp32" or "bf16".

    seconds: of `time_dtypes`, where it was called already.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if requested in dtypes:
        return dtypes[requested], "as requested"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported()
        return dtypes["bf16" if has_bf16 else "fp32"], "the GPU " + ("has bf16" if has_bf16 else "has no bf16")
    seconds = seconds or time_dtypes(device)
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    ratio = f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"
    dtype = dtypes["bf16" if speedup > MIN_BF16_SPEEDUP else "fp32"]
    return dtype, f"bf16 matmul is {ratio} than fp32 on this CPU"


def time_dtypes(device: torch.device) -> dict[torch.dtype, float]:
    """Seconds of the same matrix product in fp32 and in bf16."""
    return {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of a matrix product of the size of a small model's, the best of a few."""
    x, w = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((ROWS, INPUTS), (OUTPUTS, INPUTS)))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name", "")) or platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, system and versions, as results.json has them."""
    import transformers

    return {
        "device": f"{device.type}: {device_name(device)}",
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kitout": __version__,
    }
