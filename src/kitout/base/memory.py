"""How much memory a piece of work takes at most: of the GPU where it runs there, else of the process.

On Linux the kernel's high-water mark is set back before the work; elsewhere it only rises, and what was reached before
counts too. It knows no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

CLEAR_REFS, PROC_STATUS, PROC_MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def reset_peak(device: torch.device) -> None:
    """From now on `peak` counts anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return  # a container may forbid it: then the mark only rises


def peak(device: torch.device) -> int:
    """Most bytes held since `reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _proc_status("VmHWM") or _max_rss()


def current(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _proc_status("VmRSS") or _max_rss()


def available(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not PROC_MEMINFO.exists():
        return None
    found = next(line for line in PROC_MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    most = int(found.split()[1]) * 1024
    if all(limit.exists() for limit in CGROUP_FILES):
        ceiling, now = (limit.read_text().strip() for limit in CGROUP_FILES)
        if ceiling != "max":
            most = min(most, int(ceiling) - int(now))
    return most


def _proc_status(name: str) -> int:
    if not PROC_STATUS.exists():
        return 0
    found = next((line for line in PROC_STATUS.read_text().splitlines() if line.startswith(name)), None)
    return 0 if found is None else int(found.split()[1]) * 1024


def _max_rss() -> int:
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
