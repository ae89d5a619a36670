"""What this machine is and does best: device, number format found by a short timing, versions.

bf16 is several times faster than fp32 on CPUs with bf16 products and slower on those without; the few milliseconds of
asking beat a list of CPU names. It knows no model.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

from kitout.version import __version__

MIN_BF16_SPEEDUP = 1.3  # bf16 must be this much faster to be chosen: fp32 is the safer format


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The format of the frozen weights and why."""
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if requested in formats:
        return formats[requested], "as asked"
    if device.type == "cuda":
        good = torch.cuda.is_bf16_supported()
        return formats["bf16" if good else "fp32"], "the GPU " + ("has bf16" if good else "has no bf16")
    gain = _time_product(torch.float32) / _time_product(torch.bfloat16)
    return formats[
        "bf16" if gain > MIN_BF16_SPEEDUP else "fp32"
    ], f"a bf16 product takes 1/{gain:.1f} of the time of fp32 here"


def _time_product(dtype: torch.dtype) -> float:
    """Seconds of a matrix product of the size of a small model's, the best of a few."""
    x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def describe_machine(device: torch.device) -> dict[str, Any]:
    import transformers

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(torch.cpu.get_capabilities().get("cpu_name", "")) or platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kitout": __version__,
    }
