"""A process forked while another thread is inside a forward says so; any other fork has a model that works."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch

from kitout import Kit, LoRA
from kitout.errors import ForkedModel
from laws.activate import kit_with, run
from zoo import ZOO

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
BATCH = ZOO["llama"].batch(2, 0)


@pytest.fixture
def kit() -> Kit:
    return kit_with("llama", a=LoRA(rank=2))[0]


def in_fork(work: Callable[[], bool]) -> bool:
    """Whether the work is true in a forked process; False if it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    killer = threading.Timer(20, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    return status == 0


def forked_inside_a_forward(kit: Kit, work: Callable[[], bool]) -> bool:
    """The work's result in a process forked while another thread is inside a forward."""
    inside, done = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        done.wait(60)

    hook = kit.base.lm_head.register_forward_pre_hook(wait)
    thread = threading.Thread(target=run, args=(kit, BATCH))
    thread.start()
    assert inside.wait(30)
    try:
        return in_fork(work)
    finally:
        done.set()
        thread.join()
        hook.remove()


@pytest.mark.parametrize(
    "action",
    [
        lambda kit: run(kit, BATCH),
        lambda kit: kit.use("a"),
        lambda kit: kit.generate(**BATCH),
        lambda kit: kit.merge("a"),
    ],
    ids=["forward", "use", "generate", "merge"],
)
def test_inside_another_threads_forward(kit: Kit, action: Callable[[Kit], object]) -> None:
    def refused() -> bool:
        try:
            action(kit)
        except ForkedModel as error:
            return "spawn" in str(error)
        return False

    assert forked_inside_a_forward(kit, refused)
    run(kit, BATCH)


def test_outside_of_every_forward(kit: Kit) -> None:
    with kit.use("a"):
        want = run(kit, BATCH)
        assert in_fork(lambda: torch.equal(run(kit, BATCH), want))
        kit.state.active.choices.acquire()  # whoever holds it, the child has one of its own
        assert in_fork(lambda: torch.equal(run(kit, BATCH), want))
        kit.state.active.choices.release()


def test_by_the_thread_that_is_in_the_forward(kit: Kit) -> None:
    """The child goes on with the forward it was forked in."""
    want = run(kit, BATCH)
    forked: list[bool] = []

    def fork(*_: object) -> None:
        hook.remove()
        forked.append(in_fork(lambda: torch.equal(run(kit, BATCH), want)))

    hook = kit.base.lm_head.register_forward_pre_hook(fork)
    assert torch.equal(run(kit, BATCH), want)
    assert forked == [True]
