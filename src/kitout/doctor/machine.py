"""The machine: processors and threads, memory, the device and the speed of each dtype on it, the cache and its disk.

Nothing is downloaded or kept. Packages are imported inside the checks: where one is missing, the others go on.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from kitout.doctor.diagnosis import Diagnosis, Finding
from kitout.format import format_bytes

LITTLE = 2**30  # bytes of memory or disk below which hardly any model fits
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check_system(result: Diagnosis) -> None:
    processors = _num_processors()
    result.system = {
        "platform": platform.platform(),
        "location": str(Path(__file__).parents[1]),
        "executable": sys.executable,
        "processors": processors,
    }
    import torch

    from kitout.base import memory

    threads, available = torch.get_num_threads(), memory.available(torch.device("cpu"))
    result.system |= {"threads": threads, "memory_available": available}
    if threads > processors:
        what = f"torch uses {threads} threads and this process may use {processors} processors, which is slower"
        result.findings.append(Finding(what, f"export OMP_NUM_THREADS={processors}"))
    if available is not None and available < LITTLE:
        what = f"{format_bytes(available)} of memory are available"
        result.findings.append(Finding(what, "stop other programs, or take a machine with more"))


def _num_processors() -> int:
    """Those that this process may use: its affinity, and a container's share."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU.read_text().split()
        return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):
        return count


def check_device(result: Diagnosis) -> None:
    import torch

    from kitout.train.setup.device import (
        FLOATING_POINT_OPERATIONS,
        choose_dtype,
        default_device,
        device_name,
        time_dtypes,
    )

    device = default_device()
    result.device = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        count = torch.cuda.device_count()
        result.device |= {"count": count, "memory_available": free, "memory_total": total}
    elif NVIDIA_DRIVER.exists() or shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f", and CUDA_VISIBLE_DEVICES is {visible!r}"
        what = f"there is an NVIDIA driver, and torch uses no GPU: it is built {built}{hidden}"
        fix = "unset CUDA_VISIBLE_DEVICES" if hidden and torch.version.cuda else "see pytorch.org/get-started/locally"
        result.findings.append(Finding(what, fix))
    seconds = time_dtypes(device)
    chosen, reason = choose_dtype("auto", device, seconds)
    speeds = {str(dtype)[6:]: round(FLOATING_POINT_OPERATIONS / 1e9 / seconds[dtype], 1) for dtype in seconds}
    result.dtypes = {"gflops_per_second": speeds, "auto": str(chosen)[6:], "reason": reason}


def check_cache(result: Diagnosis) -> None:
    from kitout.assets import store
    from kitout.assets.catalog import ASSETS

    folder = store.cache_dir()
    assets = {}
    for name in ASSETS:
        path = store.asset_folder(name)
        if store.is_installed(name):
            assets[name] = _size(path)
        elif path.exists():
            what = f"the built-in {name} in {path} is damaged or of an earlier version"
            result.findings.append(Finding(what, f"kitout assets get {name}"))
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    free = shutil.disk_usage(existing).free
    result.cache = {"folder": str(folder), "assets": assets, "bytes": _size(folder), "disk_available": free}
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"{existing} is a file" if existing.is_file() else error.strerror or error
        what = f"the cache folder {folder} cannot be written ({reason})"
        fix = "set KITOUT_CACHE to a folder that can be written"
        result.findings.append(Finding(what, fix, is_needed=not assets))
        return
    if free < LITTLE:
        what = f"{format_bytes(free)} are free on the disk of the cache folder {folder}"
        result.findings.append(Finding(what, "free some space, or set KITOUT_CACHE to a folder on another disk"))


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed, and what cannot be read counts nothing."""
    total = 0
    for parent, _folders, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(parent) / file).lstat().st_size
            except OSError:
                continue
    return total
