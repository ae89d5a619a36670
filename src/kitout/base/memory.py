"""How much memory a piece of work takes at most: of the GPU where it runs there, else of the process.

On Linux the kernel's high-water mark is set back before the work; elsewhere it only rises, and what was reached before
counts too. It knows no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

CLEAR, STATUS, MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def reset_peak(device: torch.device) -> None:
    """From now on `peak` counts anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        try:
            CLEAR.write_text("5")
        except OSError:
            return  # a container may forbid it: then the mark only rises


def peak(device: torch.device) -> int:
    """Most bytes held since `reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or _rusage()


def held(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or _rusage()


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not MEMINFO.exists():
        return None
    found = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    most = int(found.split()[1]) * 1024
    if all(limit.exists() for limit in LIMITS):
        ceiling, now = (limit.read_text().strip() for limit in LIMITS)
        if ceiling != "max":
            most = min(most, int(ceiling) - int(now))
    return most


def _status(name: str) -> int:
    if not STATUS.exists():
        return 0
    found = next((line for line in STATUS.read_text().splitlines() if line.startswith(name)), None)
    return 0 if found is None else int(found.split()[1]) * 1024


def _rusage() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA's error, Python's, or what the CPU's allocator says on Linux and on Windows."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
