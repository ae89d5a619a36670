"""Functions run in processes of their own that may be killed, limited or joined to a group; they start at once.

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
TIMEOUT_SECONDS = 120


def start_process(
    function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None
) -> tuple[BaseProcess, Connection]:
    """A running process, and the end of a pipe that will receive its result."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(sender, function, args, env or {}), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def run_in_processes(function: Callable[..., Any], *args: Any, processes: int = 1) -> list[Any]:
    """What the function returns in each of so many processes, which form one group if there are several."""
    port = _free_port()
    envs = [{}] if processes == 1 else [_torchrun_env(rank, processes, port) for rank in range(processes)]
    started = [start_process(function, *args, env=env) for env in envs]
    return [_result(process, receiver) for process, receiver in started]


def _result(process: BaseProcess, receiver: Connection) -> Any:
    try:
        assert receiver.poll(TIMEOUT_SECONDS), "it takes too long"
        is_result, result = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert is_result, result
    return result


def _run(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    try:
        sender.send((True, function(*args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise


def _torchrun_env(rank: int, size: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
