"""What every test can rely on: no network, one thread, fixed seeds, and the zoo as fixtures.

Environment variables are set before transformers is imported. A test that wants other randomness seeds its own
generator. Everything below tests/slow/ carries the `slow` marker. It knows nothing of kitout, so that it cannot hide
what importing kitout does.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    KITOUT_JOINED_TOKENS="64",  # no clock decides how adapters are asked
    KITOUT_RUNS="off",  # nothing is written to the user's data folder
)

import gc
import ipaddress
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import emulated_device
from zoo import DEVICE, ZOO, Specimen

EMULATION = emulated_device.install() if DEVICE == emulated_device.NAME else ()  # ends when it is no longer held
torch.set_num_threads(1)  # xdist runs one process per core

SLOW = Path(__file__).parent / "slow"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end, so the garbage collector need not pass over a million objects each time.

    Trainers collect at the end of every run: a quarter of a second of processor time, more than many a test.
    """
    gc.collect()
    gc.freeze()


def _is_local(address: Any) -> bool:
    """AF_UNIX paths and loopback addresses: the server tests talk to themselves."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Any connection from this process to another machine raises; tests run the same on a train."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guarded(original: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise AssertionError(f"a test tried to reach {address!r}: tests work offline")
            return original(self, address)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whichever tests ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def gpu_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the generators of all GPUs are seeded with while a test runs, whether there are any or not."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    return seeds


@pytest.fixture(params=ZOO.values(), ids=ZOO.keys())
def specimen(request: pytest.FixtureRequest) -> Specimen:
    """Each species of the zoo in turn."""
    return request.param


@pytest.fixture
def tiny_llama() -> nn.Module:
    """A new llama of the zoo, for tests that need one real model and do not care which."""
    return ZOO["llama"].build()
