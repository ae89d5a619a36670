"""Peak, current and available memory: of the GPU where the work runs there, else of the process.

On Linux the kernel's peak is reset before the work; elsewhere it only rises, so earlier peaks count too. It also tells
an out-of-memory error from others. It knows no model.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

CLEAR_REFS, PROC_STATUS, PROC_MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")
CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


def reset_peak(device: torch.device) -> None:
    """`peak` starts again from what is held now, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return  # a container may forbid it: then the peak only rises


def peak(device: torch.device) -> int:
    """Maximum of the bytes held since `reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _proc_status("VmHWM") or _max_rss()


def current(device: torch.device) -> int:
    """Bytes held now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _proc_status("VmRSS") or _max_rss()


def release() -> None:
    """Gives back to the system what nothing holds any more, as a model and a loop that are done with: the C library
    keeps much of it, which then counts as held.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other libraries give it back themselves
        if trim is not None:
            trim(0)


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not PROC_MEMINFO.exists():
        return None
    line = next(line for line in PROC_MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    num_bytes = int(line.split()[1]) * 1024
    if all(path.exists() for path in CGROUP_FILES):
        limit, used = (path.read_text().strip() for path in CGROUP_FILES)
        if limit != "max":
            num_bytes = min(num_bytes, int(limit) - int(used))
    return num_bytes


def _proc_status(name: str) -> int:
    if not PROC_STATUS.exists():
        return 0
    """Bytes that a line of /proc/self/status reports; 0 without it."""
    line = next((line for line in PROC_STATUS.read_text().splitlines() if line.startswith(name)), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def _max_rss() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    max_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_rss if sys.platform == "darwin" else max_rss * 1024  # macOS counts bytes, others KiB


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's error, Python's, and the messages of torch's CPU allocator on Linux and on Windows."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    messages = ("can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
