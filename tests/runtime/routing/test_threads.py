"""One model, many threads and tasks: a `with` belongs to its own, a sticky choice to all, also while generating."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import Kit, LoRA, PrefixTuning, PromptTuning
from laws.activate import assert_same, put_on, run
from zoo import ZOO

NAMES = (None, "a", "b", "c")
ROUNDS = 8


@pytest.fixture
def kit(tiny_llama: nn.Module) -> Kit:
    kit = kitout.attach(tiny_llama)
    for seed, name in enumerate(NAMES[1:]):
        put_on(kit, LoRA(rank=2, targets="all-linear"), name, seed=seed)
    return kit


def together(*works: Callable[[], None]) -> None:
    """Runs all at once; the first exception of any is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(w,)) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    if errors:
        raise errors[0]


def alone(kit: Kit, batch: dict[str, Tensor]) -> dict[str | None, Tensor]:
    values = {}
    for name in NAMES:
        with kit.use(name):
            values[name] = run(kit, batch)
    return values


def test_each_thread_has_its_own_route(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    gate = threading.Barrier(len(NAMES))

    def work(name: str | None) -> Callable[[], None]:
        def forward() -> None:
            with kit.use(name):
                gate.wait(30)
                for _ in range(ROUNDS):
                    assert torch.equal(run(kit, batch), want[name]), f"{name}: something else was active"
                gate.wait(30)

        return forward

    together(*map(work, NAMES))
    assert kit.active is None


def test_rows_in_one_thread_and_the_base_in_another(kit: Kit) -> None:
    batch, longer = ZOO["llama"].batch(3, 0), ZOO["llama"].batch(5, 1)
    rows = ["a", None, "c"]
    with kit.use(rows):
        by_row = run(kit, batch)
    with kit.use("b"):
        whole = run(kit, longer)
    gate = threading.Barrier(2)

    def mixed() -> None:
        with kit.use(rows):
            gate.wait(30)
            for _ in range(ROUNDS):
                assert_same(run(kit, batch), by_row, 0.0)

    def single() -> None:
        with kit.use("b"):
            gate.wait(30)
            for _ in range(ROUNDS):
                assert_same(run(kit, longer), whole, 0.0)

    together(mixed, single)


def test_generating_beside_a_forward(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    with kit.use("a"):
        tokens = kit.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    gate = threading.Barrier(2)

    def generate() -> None:
        with kit.use("a"):
            gate.wait(30)
            for _ in range(3):
                again = kit.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
                assert torch.equal(again, tokens)

    def forward() -> None:
        with kit.use("b"):
            gate.wait(30)
            for _ in range(ROUNDS):
                assert torch.equal(run(kit, batch), want["b"])

    together(generate, forward)


def test_training_in_one_thread_and_answering_in_another(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    kit.train_only("a")
    gate = threading.Barrier(2)

    def train() -> None:
        optimizer = torch.optim.SGD(kit["a"].parameters(), lr=0.01)
        with kit.use("a"):
            gate.wait(30)
            for _ in range(ROUNDS):
                optimizer.zero_grad()
                kit(**batch, labels=batch["input_ids"]).loss.backward()
                optimizer.step()

    def answer() -> None:
        with kit.use("b"):
            gate.wait(30)
            for _ in range(ROUNDS):
                assert torch.equal(run(kit, batch), want["b"])

    together(train, answer)
    assert all(p.grad is None for n in ("b", "c") for p in kit[n].parameters())


def test_each_task_has_its_own_route(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)

    async def serve(name: str | None) -> None:
        with kit.use(name):
            for _ in range(ROUNDS):
                await asyncio.sleep(0)
                assert torch.equal(run(kit, batch), want[name])
                assert kit.active == name

    async def every() -> None:
        await asyncio.gather(*(serve(n) for n in NAMES))

    asyncio.run(every())


def test_a_sticky_choice_reaches_threads_that_have_none(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    kit.use("c")

    def forward() -> None:
        assert kit.active == "c"
        assert torch.equal(run(kit, batch), want["c"])

    together(forward)


def test_a_dropped_choice_holds_for_every_thread_at_once(kit: Kit) -> None:
    kit.use("c")
    together(lambda: assert_active(kit, "c"))
    assert not kit.state.active.pending, "nobody can enter it any more"


def test_a_choice_whose_handle_is_kept_holds_for_every_thread(kit: Kit) -> None:
    """What becomes of the handle does not decide for whom the choice holds."""
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    handle = kit.use("b")

    def forward() -> None:
        assert torch.equal(run(kit, batch), want["b"])
        assert kit.active == "b"

    together(forward, forward)
    with handle:
        together(lambda: assert_active(kit, None))
        assert kit.active == "b"
    assert kit.active is None


def test_the_last_choice_holds_in_whatever_order_they_are_settled(kit: Kit) -> None:
    earlier = kit.use("a")
    together(lambda: kit.use("b"))
    together(lambda: assert_active(kit, "b"))
    assert_active(kit, "b")
    with earlier:
        assert_active(kit, "a")
    assert_active(kit, "b")


def test_an_adapter_that_another_thread_has_just_chosen_is_not_removed(kit: Kit) -> None:
    handles = [kit.use("a")]

    def remove() -> None:
        with pytest.raises(kitout.errors.RouteError, match="active"):
            kit.remove("a")

    together(remove)
    assert "a" in kit
    assert len(handles) == 1


def test_a_with_is_never_seen_by_others(kit: Kit) -> None:
    """Two threads over many rounds: neither the other's route nor its choice on the way into the `with`."""
    rounds = 2000
    batch = ZOO["llama"].batch(1, 0)
    base = run(kit, batch)
    done = threading.Event()

    def enter() -> None:
        try:
            for i in range(rounds):
                with kit.use(NAMES[1 + i % 3]):
                    assert kit.active == NAMES[1 + i % 3]
        finally:
            done.set()

    def look() -> None:
        looks = 0
        while not done.is_set() or looks < rounds:
            assert kit.active is None
            if looks % 50 == 0:
                assert torch.equal(run(kit, batch), base)
            looks += 1

    together(enter, look)
    assert kit.active is None


def test_forwards_outside_of_every_with_run_the_base(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    base = run(kit, batch)
    stop = threading.Event()

    def loop(name: str) -> Callable[[], None]:
        def forward() -> None:
            while not stop.is_set():
                with kit.use(name):
                    run(kit, batch)

        return forward

    def outside() -> None:
        try:
            for _ in range(60):
                assert torch.equal(run(kit, batch), base)
        finally:
            stop.set()

    together(loop("a"), loop("b"), loop("a"), outside)


@pytest.mark.parametrize("what", ["prompt", "initial values"])
def test_beside_a_part_of_the_model_run_ahead(kit: Kit, what: str) -> None:
    """A prompt before its text, a text that initial values are read off: others wait, and have their own routes."""
    batch = ZOO["llama"].batch(2, 0)
    put_on(kit, PromptTuning(length=3), "prompt")
    want = alone(kit, batch)
    entered = threading.Barrier(3)
    inside, goes_on = pause_in(kit.base.model.layers[0])

    def ahead() -> None:
        entered.wait(30)
        if what == "prompt":
            with kit.use("prompt"):
                run(kit, batch)
        else:
            kit.add("read", PrefixTuning(length=3, init=(5, 6, 7)), seed=0)

    def answer(name: str | None) -> Callable[[], None]:
        def work() -> None:
            with kit.use(name):
                entered.wait(30)
                assert inside.wait(30)
                threading.Timer(0.1, goes_on.set).start()
                assert torch.equal(run(kit, batch), want[name])

        return work

    together(ahead, answer(None), answer("a"))


def pause_in(module: nn.Module) -> tuple[threading.Event, threading.Event]:
    """The next call of the module sets the first event and waits for the second."""
    inside, goes_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        hook.remove()
        inside.set()
        goes_on.wait(30)

    hook = module.register_forward_pre_hook(pause)
    return inside, goes_on


def test_a_seed_leaves_the_draws_of_others_alone(kit: Kit) -> None:
    """An adapter that has to wait for the model does not put back the random state from before it waited."""
    adding = threading.Thread(target=kit.add, args=("drawn", LoRA(rank=2)), kwargs={"seed": 3})
    with kit.state.active.lock:
        adding.start()
        time.sleep(0.1)
        drawn = torch.rand(3)
    adding.join(30)
    assert not torch.equal(torch.rand(3), drawn), "drawn twice"
    adapters = kit["drawn"], kit.add("again", LoRA(rank=2), seed=3)
    assert all(torch.equal(p, q) for p, q in zip(*(a.parameters() for a in adapters), strict=True))


@pytest.mark.parametrize("what", ["kit", "model"])
def test_a_copy_while_another_thread_computes(kit: Kit, what: str) -> None:
    batch = ZOO["llama"].batch(2, 0)
    put_on(kit, PrefixTuning(length=3), "prefix")
    with kit.use("prefix"):
        want = run(kit, batch)
    inside, goes_on = pause_in(kit.base.model.layers[0].self_attn.o_proj)

    def compute() -> None:
        with kit.use("prefix"):
            kit(**batch)

    def copied() -> None:
        assert inside.wait(30)
        threading.Timer(0.1, goes_on.set).start()
        other = copy.deepcopy(kit if what == "kit" else kit.base)
        kit_of_copy = other if isinstance(other, Kit) else other._kitout
        with kit_of_copy.use("prefix"):
            assert torch.equal(run(other, batch), want)

    together(compute, copied)


def test_a_forward_that_another_thread_detaches(kit: Kit) -> None:
    """The one in progress ends as it began; the one that waits says so."""
    batch = ZOO["llama"].batch(2, 0)
    with kit.use("a"):
        want = run(kit, batch)
    inside, goes_on = pause_in(kit.base.model.layers[0])

    def forward() -> None:
        with kit.use("a"):
            assert torch.equal(run(kit, batch), want)

    def detach() -> None:
        assert inside.wait(30)
        threading.Timer(0.1, goes_on.set).start()
        kit.detach()

    together(forward, detach)


def test_worker_threads_of_tasks(kit: Kit) -> None:
    """to_thread takes the task's `with` along; an executor's thread has the sticky route."""
    batch = ZOO["llama"].batch(2, 0)
    want = alone(kit, batch)
    kit.use("c")

    async def serve(name: str | None) -> None:
        loop = asyncio.get_running_loop()
        with kit.use(name):
            for _ in range(ROUNDS):
                assert torch.equal(await asyncio.to_thread(run, kit, batch), want[name])
                assert torch.equal(await loop.run_in_executor(None, run, kit, batch), want["c"])

    async def every() -> None:
        await asyncio.gather(*(serve(n) for n in NAMES))

    asyncio.run(every())


def test_continuous_batching_has_no_part_in_a_with(kit: Kit) -> None:
    with kit.use("a"), pytest.raises(kitout.errors.RouteError, match="thread of its own"):
        kit.base.init_continuous_batching()
    kit.use("a")
    with kit.use("a"):
        kit.base.init_continuous_batching()


def assert_active(kit: Kit, name: str | None) -> None:
    assert kit.active == name


def test_two_threads_cannot_take_one_name(kit: Kit) -> None:
    gate, won = threading.Barrier(4), []

    def add() -> None:
        gate.wait(30)
        try:
            kit.add("new", LoRA(rank=2), seed=0)
            won.append(1)
        except kitout.errors.AdapterExists:
            pass

    together(*[add] * 4)
    assert len(won) == 1
    assert kit.names.count("new") == 1
