"""Where a `with` is left, and by whom: in its own context, in another, out of order, or never."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch

from kitout import Kit, LoRA
from kitout.errors import RouteError
from laws.activate import kit_with


@pytest.fixture
def kit() -> Kit:
    return kit_with("llama", a=LoRA(rank=2), b=LoRA(rank=3))[0]


def in_thread(work: Callable[[], Any]) -> Any:
    """The work's result, from a thread that is over."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(30)
    assert results, "the thread raised"
    return results[0]


def holding(kit: Kit, name: str) -> Iterator[str]:
    with kit.use(name):
        yield name


def test_a_generator_finished_in_another_context(kit: Kit) -> None:
    generator = holding(kit, "a")
    contextvars.copy_context().run(next, generator)
    assert kit.active is None
    with pytest.raises(RouteError, match="active"):
        kit.remove("a")
    assert list(generator) == []
    kit.remove("a")


def test_a_generator_finished_in_another_thread(kit: Kit) -> None:
    kit.use("b")
    generator = in_thread(lambda: (g := holding(kit, "a"), next(g))[0])
    generator.close()
    assert kit.active == "b"
    kit.remove("a")


def test_its_own_context_has_the_route_before_it_again(kit: Kit) -> None:
    generator = holding(kit, "a")
    next(generator)
    assert kit.active == "a"
    in_thread(lambda: generator.close() or True)
    assert kit.active is None
    with kit.use("b"):
        assert kit.active == "b"
    kit.remove("a")


def test_a_copied_context_that_leaves_it_leaves_it_everywhere(kit: Kit) -> None:
    with kit.use("b"):
        generator = holding(kit, "a")
        next(generator)
        contextvars.copy_context().run(generator.close)
        assert kit.active == "b"
    assert kit.active is None
    kit.remove("a")


def test_blocks_left_out_of_order(kit: Kit) -> None:
    one, two = holding(kit, "a"), holding(kit, "b")
    next(one)
    next(two)
    one.close()
    assert kit.active == "b"
    two.close()
    assert kit.active is None
    kit.remove("a")
    kit.remove("b")


def test_an_abandoned_async_generator(kit: Kit) -> None:
    async def answers(name: str) -> AsyncIterator[int]:
        with kit.use(name):
            for i in range(3):
                yield i

    async def read_one(name: str) -> None:
        async for _ in answers(name):
            assert kit.active == name
            break

    async def main() -> None:
        await asyncio.create_task(read_one("a"))
        gc.collect()
        await asyncio.sleep(0.01)  # the loop closes it in a task of its own
        assert kit.active is None
        await read_one("b")
        gc.collect()
        await asyncio.sleep(0.01)
        assert kit.active is None

    asyncio.run(main())
    kit.remove("a")
    kit.remove("b")


def test_a_thread_that_died_inside(kit: Kit) -> None:
    handles: list[Any] = []

    def enter() -> bool:
        handles.append(kit.use("a"))
        handles[0].__enter__()
        assert kit.active == "a"
        return True

    in_thread(enter)
    assert kit.active is None
    kit.remove("a")


def test_one_handle_for_many_threads(kit: Kit) -> None:
    """Each leaves its own block, in whatever order they entered."""
    handle = kit.use("a")
    gate = threading.Barrier(2, timeout=30)

    def first() -> bool:
        with handle:
            gate.wait()
            gate.wait()
        assert kit.active is None
        gate.wait()
        gate.wait()
        return True

    thread = threading.Thread(target=first)
    thread.start()
    gate.wait()
    with handle:
        gate.wait()
        gate.wait()
        assert kit.active == "a"
        gate.wait()
        thread.join()
    assert kit.active is None
    kit.remove("a")


def test_a_generator_of_a_shared_handle_ends_nobody_elses_block(kit: Kit) -> None:
    handle = kit.use("a")

    def hold() -> Iterator[None]:
        with handle:
            yield

    generator = in_thread(lambda: (g := hold(), next(g))[0])
    with handle:
        in_thread(lambda: generator.close() or True)
        assert kit.active == "a"
    assert kit.active is None
    kit.remove("a")


def test_a_task_begun_inside_keeps_the_route(kit: Kit) -> None:
    async def look() -> Any:
        await asyncio.sleep(0)
        return kit.active

    async def main() -> Any:
        with kit.use("a"):
            task = asyncio.create_task(look())
        assert kit.active is None
        return await task

    assert asyncio.run(main()) == "a"


def test_a_removed_adapter_in_a_context_that_outlived_its_with(kit: Kit) -> None:
    with kit.use("a"):
        context = contextvars.copy_context()
    kit.remove("a")
    with pytest.raises(RouteError, match="'a' was removed"):
        context.run(kit, torch.tensor([[5, 6]]))
    kit(torch.tensor([[5, 6]]))


def test_an_interrupted_entry_leaves_nothing(kit: Kit) -> None:
    active, handle = kit.state.active, kit.use("a")

    class Interrupted:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    lock, active.lock = active.lock, Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        handle.__enter__()
    active.lock = lock
    assert kit.active is None
    kit.remove("a")


def test_a_copy_made_inside_a_with_is_in_nobodys_use(kit: Kit) -> None:
    with kit.use("a"):
        other = copy.deepcopy(kit)
    other.remove("a")
    assert kit.names == ["a", "b"]
