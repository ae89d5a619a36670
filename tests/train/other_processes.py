"""Functions run in processes of their own that may be killed, limited or joined to a group; started in no time.

A server process imports torch and kitout once and forks from there: it never runs a backward pass, after which torch
could not be forked. It knows processes, and nothing of training.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.subprocess_runs"])
SECONDS = 120


def started(function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None) -> tuple[BaseProcess, Any]:
    """A process at work, and the end of a pipe that will say what came of it."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(there, function, args, env or {}), daemon=True)
    process.start()
    there.close()
    return process, here


def apart(function: Callable[..., Any], *args: Any, processes: int = 1) -> list[Any]:
    """What the function returns in each of so many processes, which form one group if there are several."""
    env = [{}] if processes == 1 else [_member(rank, processes, _port()) for rank in range(processes)]
    port = env[0].get("MASTER_PORT", "")
    begun = [started(function, *args, env={**one, "MASTER_PORT": port} if port else one) for one in env]
    return [_result(*one) for one in begun]


def _result(process: BaseProcess, end: Connection) -> Any:
    try:
        assert end.poll(SECONDS), "it takes too long"
        good, found = end.recv()
    finally:
        process.kill()
        process.join()
    assert good, found
    return found


def _run(end: Connection, function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    try:
        end.send((True, function(*args)))
    except BaseException:
        end.send((False, traceback.format_exc()))
        raise


def _member(rank: int, size: int, port: int) -> dict[str, str]:
    """As torchrun says it."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
