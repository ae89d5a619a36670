"""Whether several routes are faster as rows of one batch than one after the other: tried once, and kept.

Few tokens are bound by reading the base's weights, and rows share that; many are bound by arithmetic, and rows of
different adapters cost more. Where the limit lies depends on model, methods and machine, so each class of batch (a
power of two of tokens, a number of routes) is tried on its first batch. What was found is kept in the cache: both ways
are equal but for rounding, and so the same run gives the same bits again. It knows times, and no tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from kitout import fast
from kitout.assets.store import cache_dir
from kitout.files.atomic import write_text
from kitout.kit import Kit
from kitout.route import RouteEntry, adapter_names
from kitout.version import __version__

VARIABLE = "KITOUT_JOINED_TOKENS"  # rows join up to so many tokens of each route, without a trial
SURE_TOKENS = 16  # of each route: up to here joining was always faster (0.4 to 0.5 with 8 LoRAs)
WITHOUT_TRIAL = 64  # several processes run the same forwards together, which a clock must not decide
CLEAR_RATIO = 1.4  # nearer than this, both ways are timed a second time
FILE = "joined-rows.json"


def joins(kit: Kit, routes: tuple[RouteEntry, ...], num_tokens: int) -> bool | None:
    """Whether these routes share a batch of so many tokens each; None: not known yet, so `try_both`."""
    if not fast.enabled():
        return False
    if (limit := os.environ.get(VARIABLE, "")).isdigit():
        return num_tokens <= int(limit)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return num_tokens <= WITHOUT_TRIAL
    return True if num_tokens <= SURE_TOKENS else _read().get(_key(kit, routes, num_tokens))


def try_both(
    kit: Kit, routes: tuple[RouteEntry, ...], num_tokens: int, joined: Callable[[], object],
    apart: Callable[[], object],
) -> bool:  # fmt: skip
    """Times both ways to ask the first batch of its class, and keeps which is faster. Both end in plain numbers."""
    times: list[list[float]] = [[], []]
    for number in range(2):
        for own, call in zip(times, (apart, joined), strict=True):
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
        slower, faster = sorted(map(min, times), reverse=True)
        if number or slower > CLEAR_RATIO * faster:
            break
    found = min(times[1]) < min(times[0])
    _keep(_key(kit, routes, num_tokens), found)
    return found


_found: dict[str, dict[str, bool]] = {}  # by file: of this process


def _read() -> dict[str, bool]:
    """What is known on this machine."""
    file = cache_dir() / FILE
    if str(file) not in _found:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        _found[str(file)] = {k: v for k, v in kept.items() if isinstance(v, bool)} if isinstance(kept, dict) else {}
    return _found[str(file)]


def _keep(key: str, joined: bool) -> None:
    known, file = _read(), cache_dir() / FILE
    known[key] = joined
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(known, indent=1))
    except OSError:  # this process knows it all the same
        return


def _key(kit: Kit, routes: tuple[RouteEntry, ...], num_tokens: int) -> str:
    names = kit.state.names_with_parts(name for route in routes for name in adapter_names(route))
    config: Any = kit.config
    sizes = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    device = torch.cuda.get_device_name(kit.device) if kit.device.type == "cuda" else platform.processor()
    parts = [
        sizes, str(config._attn_implementation), str(kit.dtype), kit.device.type, device, torch.get_num_threads(),
        [type(kit[name].method).__name__ for name in names], len(routes), num_tokens.bit_length(),
        torch.__version__, __version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
